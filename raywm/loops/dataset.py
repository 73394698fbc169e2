"""A dataset of real episodes: so many of them, or of their steps, of any environment under any policy."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from raywm.log import Console
from raywm.loops.parts import Played, in_order

STREAM = "collect"
FAST_ENVS = 64  # copies in a native vector environment
REPAIRS = 3  # times that episodes which a lost node took with it are played again


class Collection:
    """Collects into whatever its rollouts write to; goes on where an earlier one stopped.

    Args:
        rollouts: `LocalRollouts` or `Rollouts`; agent: who plays.
        episodes, steps: how much there shall be in all, one of them; console: who is told.
        fast: in the environment's native vector form, if it has one: quicker, and not reproducible one by one.
    """

    def __init__(
        self,
        rollouts: Any,
        agent: Any,
        *,
        episodes: int | None = None,
        steps: int | None = None,
        console: Console,
        fast: bool = False,
    ):
        if (episodes is None) == (steps is None):
            raise ValueError(f"got episodes={episodes}, steps={steps}; expected one of them")
        self.rollouts, self.agent, self.episodes, self.steps = rollouts, agent, episodes, steps
        self.console, self.fast = console, fast
        self.have: dict[int, Played] = {}  # from before

    def run(self) -> dict[str, Any]:
        """Play what is missing, see it onto the disk, and check every byte of it. Returns what is there."""
        began = time.monotonic()
        self.rollouts.set_agent(self.agent)
        if self.fast:
            return self._run_fast(began)
        self.have = self.rollouts.stored(STREAM, 0)
        acknowledged = self._play()
        for attempt in range(REPAIRS + 1):
            self.rollouts.settle()
            with self.console.progress("checking every byte"):
                checks = self.rollouts.verify()
            there = self.rollouts.stored(STREAM, 0)
            # lost with a node or a damaged file; or never played, below surplus ones that another collector had ended
            lost = sorted(set(range(max([*there, *acknowledged], default=-1) + 1)) - set(there))
            if not lost:
                break
            if attempt == REPAIRS:
                raise OSError(f"{len(lost)} episodes are still missing after {REPAIRS} repairs; look at the disks")
            if gone := sorted(set(lost) & acknowledged):
                self.console.say(f"{len(gone)} episodes were lost with a node or a damaged file; playing them again")
            for _ in self.rollouts.collect(lost, STREAM):
                pass
        whole = [played for played in there.values() if played[1]]
        returns = np.array([ret for *_, ret in whole])
        fresh = sum(steps for number, steps, _ in whole if number not in self.have)
        return {
            "episodes": len(whole),
            "steps": sum(steps for _, steps, _ in whole),
            "broken": len(there) - len(whole),
            "return_mean": float(returns.mean()) if len(returns) else math.nan,
            "return_std": float(returns.std()) if len(returns) else math.nan,
            **self._told(checks, fresh, began),
        }

    def _told(self, checks: list[dict[str, Any]], fresh: int, began: float) -> dict[str, Any]:
        seconds = time.monotonic() - began
        return {
            "bytes": sum(check["bytes"] for check in checks),
            "seconds": round(seconds, 1),
            "new_steps": fresh,
            "steps_per_second": round(fresh / seconds, 1),
            "worker_deaths": self.rollouts.deaths,
            "set_aside": [name for check in checks for name in check["set_aside"]],
        }

    def _run_fast(self, began: float) -> dict[str, Any]:
        """Until there is enough, in units that play from seeds of their own; a broken environment ends it."""
        before = self.rollouts.verify()
        done = sum(check["episodes"] for check in before)
        steps = sum(check["steps"] for check in before)
        unit = max((int(s[4:]) for s in self.rollouts.streams() if re.fullmatch(r"fast\d+", s)), default=-1) + 1
        goal, fresh, returns, played = self.episodes or self.steps or 0, 0, 0.0, 0

        def left() -> float:
            if self.steps is not None:
                return goal - steps
            return (goal - done) * (steps / done if done else 100)

        with self.console.progress("episodes" if self.episodes else "steps", goal) as bar:
            bar.advance(done if self.episodes else steps)
            while left() > 0:
                with contextlib.closing(self.rollouts.collect_fast(unit, FAST_ENVS, left)) as results:
                    for episodes, more, ret in results:
                        done, steps, fresh = done + episodes, steps + more, fresh + more
                        played, returns = played + episodes, returns + ret
                        bar.advance(episodes if self.episodes else more)
                        if left() <= 0:
                            break
        self.rollouts.settle()
        with self.console.progress("checking every byte"):
            checks = self.rollouts.verify()
        now = sum(check["steps"] for check in checks)
        return {
            "episodes": sum(check["episodes"] for check in checks),
            "steps": now,
            **({"new_return_mean": returns / played} if played else {}),
            **self._told(checks, now - sum(check["steps"] for check in before), began),
        }

    def _play(self) -> set[int]:
        """Take episodes in the order of their numbers until there are enough; the numbers of all that some shard has
        acknowledged."""
        goal = self.episodes or self.steps or 0
        number = whole = steps = fresh = broken = 0
        acknowledged = set(self.have)
        began = time.monotonic()

        def left() -> float:
            if self.episodes is not None:
                return self.episodes - whole
            return math.inf if not steps else (goal - steps) * whole / steps

        def heard(results: Iterable[Played]) -> Iterator[Played]:
            for played in results:
                acknowledged.add(played[0])
                yield played

        with self.console.progress("episodes" if self.episodes else "steps", goal) as bar:
            while left() > 0:
                numbers = range(number, number + int(left())) if self.episodes else itertools.count(number)
                results = self.rollouts.collect(numbers, STREAM, left)
                with contextlib.closing(results):
                    for played in in_order(heard(results), number):
                        number += 1
                        whole += played[1] > 0
                        broken += played[1] == 0
                        steps += played[1]
                        fresh += 0 if played[0] in self.have else played[1]
                        bar.advance((played[1] > 0) if self.episodes else played[1])
                        bar.set(steps_s=round(fresh / max(time.monotonic() - began, 1e-9)), broken=broken)
                        if left() <= 0:
                            break
        return acknowledged
