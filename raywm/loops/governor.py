"""The train ratio: how many rows are replayed for each step collected, held by making the side that is ahead wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

SAY_AFTER = 60.0  # seconds of waiting, after which it is said what for, and again after as many


class TrainRatio:
    """Holds replayed rows / collected steps to `ratio` (DreamerV3's train ratio: a batch replays B * T rows).

    Steps up to `warmup` are collected freely and not trained on in the count; then, with
    ``due = ratio * (collected - warmup)``:

    - n rows may be replayed while replayed + n <= due: training never runs ahead of the ratio;
    - steps may be collected while due - replayed < ratio * slack: collection runs ahead by less than `slack` steps and
      what was already under way when it was told to wait.

    So at any moment  1 - (slack + under way) / (collected - warmup)  <=  got / ratio  <=  1,  where got is
    replayed / (collected - warmup): after 50 times slack and what is under way, within 2%. With a `slack` below one
    batch's n / ratio steps both would wait for each other; then that many may be collected.

    Several threads may collect and several replay; those that were told they may, and have not counted yet, are what is
    under way (n rows each, where several replay). Counts are plain numbers (``save``), so a resumed run goes on at its
    ratio; a ratio changed since holds from there on.

    Args:
        ratio: replayed rows per collected step, > 0.
        slack: steps that collection may be ahead.
        warmup: steps collected before anything is replayed.
        say: is told in words what has been waited for, every 60 s.
    """

    def __init__(
        self, ratio: float, slack: int = 1024, warmup: int = 0, say: Callable[[str], object] = lambda message: None
    ):
        if not ratio > 0 or slack < 0 or warmup < 0:
            raise ValueError(f"ratio={ratio}, slack={slack}, warmup={warmup}: expected ratio > 0 and the others >= 0")
        self.ratio, self.slack, self.warmup, self.say = float(ratio), slack, warmup, say
        self._changed = threading.Condition()
        self._collected = self._replayed = 0
        self._since = (warmup, 0)  # collected and replayed when this ratio began to hold
        self._batch = 0  # the most rows anyone asked to replay at once
        self._waiting = {"collect": 0, "replay": 0}  # threads
        self._waited = {"collect": 0.0, "replay": 0.0}  # seconds

    # Counting

    def collected(self, n: int) -> None:
        """n more steps have been collected."""
        with self._changed:
            self._collected += n
            self._changed.notify_all()

    def replayed(self, n: int) -> None:
        """n more rows have been trained on."""
        with self._changed:
            self._replayed += n
            self._changed.notify_all()

    # Asking

    def may_collect(self) -> bool:
        """Whether collection is not too far ahead."""
        with self._changed:
            return self._may_collect()

    def may_replay(self, n: int) -> bool:
        """Whether n more rows are due."""
        with self._changed:
            self._batch = max(self._batch, n)
            return self._may_replay(n)

    def due(self, n: int) -> int:
        """How many times n rows are due."""
        with self._changed:
            self._batch = max(self._batch, n)
            return max(0, int(self._owed() // n))

    def wait_to_collect(self, timeout: float | None = None) -> bool:
        """Wait until steps may be collected; False if that took more than `timeout` seconds."""
        return self._wait("collect", self._may_collect, timeout)

    def wait_to_replay(self, n: int, timeout: float | None = None) -> bool:
        """Wait until n rows may be replayed; False if that took more than `timeout` seconds."""
        with self._changed:
            if n > self._batch:
                self._batch = n
                self._changed.notify_all()  # collection may now go as far as a batch of n needs
        return self._wait("replay", lambda: self._may_replay(n), timeout)

    def _owed(self) -> float:
        """Rows that are due and not replayed."""
        collected, replayed = self._since
        return self.ratio * (self._collected - collected) - (self._replayed - replayed)

    def _may_replay(self, n: int) -> bool:
        return self._owed() >= n

    def _may_collect(self) -> bool:
        return self._owed() < max(self.ratio * self.slack, self._batch, 1e-9)

    def _wait(self, side: str, may: Callable[[], bool], timeout: float | None) -> bool:
        began = time.monotonic()
        said, until = began, None if timeout is None else began + timeout
        while True:
            with self._changed:
                self._waiting[side] += 1
                now = time.monotonic()
                left = said + SAY_AFTER - now
                done = self._changed.wait_for(may, left if until is None else max(0.0, min(left, until - now)))
                self._waiting[side] -= 1
                self._waited[side] += time.monotonic() - now
            now = time.monotonic()
            if done or (until is not None and now >= until):
                return done
            if now >= said + SAY_AFTER:
                said = now
                self.say(self._waits(side, now - began))  # not under the lock: it may take its time

    def _waits(self, side: str, seconds: float) -> str:
        counts = f"{self._collected} steps collected (warm-up {self.warmup}), {self._replayed} rows replayed"
        other = "training: are its learners alive?" if side == "collect" else "new steps: are its collectors alive?"
        verb = "collect" if side == "collect" else "replay"
        return f"waiting to {verb} for {seconds:.0f} s at the train ratio of {self.ratio:g} ({counts}), for {other}"

    # Telling

    def state(self) -> dict[str, Any]:
        """For metrics: counts, the ratio got (after the warm-up) and set, threads and seconds waiting on each side."""
        with self._changed:
            collected, replayed = self._since
            steps = self._collected - collected
            return {
                "collected": self._collected,
                "replayed": self._replayed,
                "ratio": (self._replayed - replayed) / steps if steps > 0 else 0.0,
                "set_ratio": self.ratio,
                "waiting_to_collect": self._waiting["collect"],
                "waiting_to_replay": self._waiting["replay"],
                "waited_to_collect": self._waited["collect"],
                "waited_to_replay": self._waited["replay"],
            }

    def save(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        with self._changed:
            collected, replayed = self._since
            return {
                "collected": self._collected,
                "replayed": self._replayed,
                "ratio": self.ratio,
                "since_collected": collected,
                "since_replayed": replayed,
            }

    def load(self, saved: dict[str, float]) -> None:
        """Go on from ``save``'s numbers. Under another ratio than theirs, what was done counts as even."""
        with self._changed:
            self._collected, self._replayed = int(saved["collected"]), int(saved["replayed"])
            self._since = (int(saved["since_collected"]), int(saved["since_replayed"]))
            if saved["ratio"] != self.ratio:
                self._since = (max(self._collected, self.warmup), self._replayed)
            self._changed.notify_all()
