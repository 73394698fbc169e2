"""Dreamer's run: collecting, training and evaluating at the same time, in step by the train ratio.

The loop gives orders and hears answers; who carries them out, in this process or on Ray, is the executor's affair. A
collector takes steps when the governor lets it, a learner does updates when they are due, and neither waits for the
other beyond that. The results of such a run depend on who was faster; its random streams derive from its seed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raywm import checkpoint
from raywm.config import RunConfig
from raywm.evaluate import summarise
from raywm.log import RunLog
from raywm.loops.governor import TrainRatio
from raywm.loops.online_figures import Figures
from raywm.loops.online_work import KEEP, Answer, OnlineParts

ORDER_S = 0.4  # of work in an order, at most: the driver's share is small, and weights are never much older
AHEAD = 0.005  # share of the steps so far that may be waiting to be replayed, and again as much under way
LEAST_AHEAD = 32  # steps
POLL_S = 0.25
REPORT_S = 10.0
SAY_AFTER_S = 60.0
SAVE_PATIENCE_S = 60.0  # to wait for the learner's state when the run is interrupted
BLOCK = 1_000_000  # episode numbers of a worker's life
LIVES = 10_000  # of workers, in one start of the run


class Weights(NamedTuple):
    """A version of the policy: the learner's updates, and what stands for its tensors."""

    serial: int  # of versions of this start; updates go back when a learner dies
    version: int
    policy: Any


@dataclass
class Seat:
    """What the loop knows of a collector."""

    first: int = 0  # of its episode numbers
    serial: int = -1  # of its weights
    version: int = KEEP
    under_way: int = 0  # steps


class Online:
    """One run. What it knows is `state` (JSON), the governor's counts, the learner's tensors and the policy's.

    Args:
        config: the run's; out: its directory; executor: who does the work; log: where it is told.
    """

    def __init__(self, config: RunConfig, out: Path, executor: Any, log: RunLog):
        self.config, self.out, self.executor, self.log = config, Path(out), executor, log
        self.parts: OnlineParts = executor.parts
        self.rows = self.parts.rows
        online, workers = config.online, sum(post.kind == "collect" for post in executor.posts)
        budget = config.budget.real_steps
        self.limit = online.steps if budget is None else min(online.steps, budget)
        self.workers = workers
        self.governor = TrainRatio(online.train_ratio, 0, self.warmup(1), log.say)
        self.seats = {post.name: Seat() for post in executor.posts}
        self.weights: Weights | None = None
        self.evaluated: Weights | None = None  # by the evaluation under way, or the last one
        self.best: Weights | None = None  # that reached the target
        self.saved: Any = None  # stands for the learner's state as it was last saved
        self.updates = 0
        self.lives = 0
        self.interrupted = self.save_due = False
        self.began = self.heard = self.checked = time.monotonic()
        self.pace = {"advance": 0.0, "update": 0.0}  # seconds of a vector step, of an update
        self.figures = Figures({"collect": workers})
        self.base = 0  # steps collected in earlier starts, less those that the replay's marks count
        self.final: list[list[int]] = []  # numbers of the last evaluation that nobody plays yet
        self.played: dict[int, tuple[int, int, float]] = {}
        self.writer, self.writing = ThreadPoolExecutor(1, "raywm-checkpoint"), Future[Any]()
        self.writing.set_result(None)
        self.state: dict[str, Any] = {
            "saves": 0,
            "phase": "run",
            "stopped": None,
            "updates": 0,
            "lost_updates": 0,
            "real_env_steps": 0,
            "eval_env_steps": 0,
            "episodes": 0,
            "broken_episodes": 0,
            "evaluations": 0,
            "evaluated_at": 0,
            "target_return": None,
            "random": [],
            "wall_seconds": 0.0,
            "worker_deaths": 0,
        }

    def warmup(self, shards: int) -> int:
        """Steps before the first update: the prefill, and enough that a sequence can be drawn from some shard."""
        return max(self.config.online.prefill, self.parts.length * shards)

    def run(self) -> dict[str, Any]:
        """Collect and train until the steps are done or the target is reached; returns what `summary.json` holds."""
        try:
            done = self.restore()
            if done is not None:
                return done
            self.began = self.heard = self.checked = time.monotonic()
            self.figures.start(self.collected)
            with self._interruptible():
                with self.log.progress("online", self.limit) as bar:
                    self._until(self._over, bar)
                if not self.interrupted:
                    return self._finish()
                self.log.say("stopping: the learner's state is being saved")
                self._report()
                self.save()
            raise KeyboardInterrupt
        finally:
            self.writer.shutdown()

    # ------------------------------------------------------------------------------------------------ orders

    def _until(self, over: Callable[[], bool], bar: Any = None, patience: float | None = None) -> bool:
        """Give orders and hear answers until it is `over`; False if interrupted (or out of patience) before."""
        began = time.monotonic()
        while not over():
            if patience is None and self.interrupted or patience is not None and time.monotonic() - began > patience:
                return False
            for post in self.executor.posts:
                if post.free:
                    getattr(self, f"_order_{post.kind}")(post)
            for answer in self.executor.wait(POLL_S):
                self.heard = time.monotonic()
                getattr(self, f"_hear_{answer.what}")(answer)
            if bar is not None:
                bar.advance(self.collected - bar.done)
            self._tick(bar)
        return True

    @property
    def collected(self) -> int:
        return int(self.governor.state()["collected"])

    def _ahead(self) -> float:
        """Steps that may wait to be replayed: few in the beginning, so that a run that ends early has its ratio."""
        done = self.collected - self.governor.warmup
        return max(AHEAD * done, -done, LEAST_AHEAD, self.rows / self.config.online.train_ratio)

    @property
    def under_way(self) -> int:
        """Steps, at most."""
        return sum(seat.under_way for seat in self.seats.values())

    @property
    def running(self) -> bool:
        return self.state["phase"] == "run" and self.state["stopped"] is None and not self.interrupted

    def _order_learn(self, post: Any) -> None:
        """Updates, as many as are due and make an order; at times its state, to be saved."""
        if self.running and self.collected and time.monotonic() - self.checked > self.config.online.checkpoint_s:
            self.save_due = True
        if self.save_due and self.state["stopped"] and self.weights and self.weights.version < self.updates:
            return self.executor.order(post, "begin", None)  # the run's last weights
        if self.save_due:
            return self.executor.order(post, "save")
        count = min(self.governor.due(self.rows), self._updates())
        if count and self.running:
            assert self.weights is not None
            publish = self.updates + count - self.weights.version >= self.config.online.publish
            self.executor.order(post, "update", count, publish)

    def _updates(self) -> int:
        """Updates of an order: quick ones are published less often than `publish` says, or orders would cost more."""
        online, pace = self.config.online, self.pace["update"]
        quick = round(ORDER_S / 2 / pace) if pace else 1
        return max(online.publish, min(quick, online.staleness // 2))

    def _order_collect(self, post: Any) -> None:
        """Steps, with the newest weights, if that keeps the train ratio and the weights are not too old."""
        if self.final:
            return self._order_evaluate(post)
        self.governor.slack = round(self._ahead())
        steps, envs = self._steps(), self.config.collect.envs
        if steps < 1 or not self.running or not self.governor.may_collect():
            return
        seat, new = self.seats[post.name], (KEEP, None)
        if self.collected + self.under_way >= self.config.online.prefill:
            if self.weights is None or self.updates - self.weights.version > self.config.online.staleness:
                return
            if seat.serial != self.weights.serial:
                new = self.weights.version, self.weights.policy
                seat.serial, seat.version = self.weights.serial, self.weights.version
        seat.under_way = steps * envs
        self.executor.order(post, "advance", steps, seat.first, *new)

    def _steps(self) -> int:
        """Vector steps of an order; 0 where the run has all its steps."""
        online, envs, pace = self.config.online, self.config.collect.envs, self.pace["advance"]
        # while they are taken the learner may do as many updates as a quarter of the staleness bound
        seconds = min(ORDER_S, online.staleness / 4 * self.pace["update"] or ORDER_S)
        steps = min(online.unit, int(self._ahead() / self.workers / envs), int(seconds / pace) if pace else 1)
        return min(max(steps, 1), (self.limit - self.collected - self.under_way) // envs)

    def _order_evaluate(self, post: Any) -> None:
        """Episodes of an evaluation beside, or of the last one."""
        online, state = self.config.online, self.state
        if self.final and self.weights is not None:
            numbers, weights = self.final.pop(), self.best or self.weights
            return self.executor.order(post, "play", numbers, "evaluate", weights.version, weights.policy)
        due = online.evaluate_every and self.collected - state["evaluated_at"] >= online.evaluate_every
        if due and self.running and self.weights is not None:
            state["evaluated_at"] = self.collected
            self.evaluated = self.weights
            first = state["evaluations"] * BLOCK
            numbers = list(range(first, first + online.evaluate_episodes))
            self.executor.order(post, "play", numbers, "beside", self.weights.version, self.weights.policy)

    # ------------------------------------------------------------------------------------------------ answers

    def _hear_started(self, answer: Answer) -> None:
        """A worker, for the first time or in place of a dead one: with numbers and weights of its own."""
        if answer.post.kind == "learn":
            self.executor.order(answer.post, "begin", self.saved)
        else:
            first = (self.state["starts"] * LIVES + self.lives) * BLOCK
            self.seats[answer.post.name] = Seat(first)
            self.lives += 1

    def _hear_died(self, answer: Answer) -> None:
        """Its order is lost: steps are taken anew by whoever may, updates are due again once the learner is back."""
        self.log.say(f"{answer.post.name} died: {answer.report}; a new one is started")
        self.seats[answer.post.name].under_way = 0
        if answer.payload[1:2] == ("evaluate",):  # the arguments of its order: numbers of the last evaluation
            self.final.append(answer.payload[0])

    def _hear_begin(self, answer: Answer) -> None:
        lost, self.updates = self.updates - answer.report["updates"], answer.report["updates"]
        if lost > 0:
            self.state["lost_updates"] += lost
            self.governor.replayed(-lost * self.rows)  # they are due again
            self.log.say(f"the learner is back at update {self.updates}: {lost} are done again")
        self._publish(answer.payload)

    def _hear_update(self, answer: Answer) -> None:
        report = answer.report
        count, working = report["count"], report["seconds"] - report["waited"]
        self.governor.replayed(count * self.rows)
        self.updates += count
        self.pace["update"] = working / count
        self.figures.work("learn", working)
        self.figures.learned(count, report["metrics"])
        assert self.weights is not None
        if self.updates - self.weights.version >= self.config.online.publish:
            self._publish(answer.payload)

    def _publish(self, policy: Any) -> None:
        serial = 0 if self.weights is None else self.weights.serial + 1
        self.weights = Weights(serial, self.updates, policy)

    def _hear_advance(self, answer: Answer) -> None:
        report, seat, state = answer.report, self.seats[answer.post.name], self.state
        seat.under_way = 0
        self.governor.collected(report["steps"])
        self.pace["advance"] = report["seconds"] / report["vector"]
        self.figures.work("collect", report["seconds"])
        if seat.version >= 0:
            self.figures.stale(max(0, self.updates - seat.version))
        state["broken_episodes"] += report["broken"]
        for number, steps, ret, version in report["episodes"]:
            state["episodes"] += 1
            if seat.version < 0:
                state["random"].append(ret)
            played_by = KEEP if seat.version < 0 else version  # the first policy, which is not version 0 of the actor
            self._tell("episode", **{"number": number, "return": ret, "length": steps, "version": played_by})

    def _hear_play(self, answer: Answer) -> None:
        played, state = answer.report["episodes"], self.state
        state["eval_env_steps"] += sum(p[1] for p in played)
        if state["phase"] == "evaluate":
            self.played |= {p[0]: p for p in played}
            return
        assert self.evaluated is not None
        self.figures.work("evaluate", answer.report["seconds"])
        state["evaluations"] += 1
        result = summarise([p[2] for p in played], [p[1] for p in played])
        self._tell("trial", updates=self.updates, version=self.evaluated.version, **result)
        state["target_return"], target = result["return_mean"], self.config.target.real_return
        if self._reached() and state["stopped"] is None:
            state["stopped"], self.best = f"target return {target:g} reached", self.evaluated

    def _hear_save(self, answer: Answer) -> None:
        """The learner stands at exactly `updates`, and the governor too: one checkpoint of all."""
        self.saved, self.save_due, self.checked = answer.payload, False, time.monotonic()
        marks, state = self.executor.marks, self.state
        state["saves"] += 1
        state["updates"] = self.updates
        collected = self.collected
        # What a shard has and no collector has told of yet is in the mark, and counted with it.
        marked = min(max(self.base + sum(mark["steps"] for mark in marks), collected), collected + self.under_way)
        held = self.best or self.weights
        saved = state | {
            "real_env_steps": marked,
            "figures": self.figures.totals,
            "governor": self.governor.save() | {"collected": marked},
            "marks": marks,
            "version": held.version if held else 0,
            "wall_seconds": self._wall(),
            "worker_deaths": state["worker_deaths"] + self.executor.deaths,
            "log_rows": self.log.rows,
        }
        tensors = {"learner": self.executor.fetch(answer.payload)}
        tensors["policy"] = self.executor.fetch(held.policy) if held else {}
        self.writing.result()  # of the one before: a full disk is heard of here
        self.writing = self.writer.submit(
            checkpoint.save, self.out / "checkpoints", state["saves"], tensors=tensors, state=checkpoint.plain(saved)
        )

    # ------------------------------------------------------------------------------------------------ telling

    def _tick(self, bar: Any) -> None:
        if time.monotonic() - self.heard > SAY_AFTER_S:
            self.heard = time.monotonic()
            waiting = ", ".join(post.name for post in self.executor.posts if not post.free)
            self.log.say(f"nothing has been answered for {SAY_AFTER_S:g} s; waiting for {waiting or 'steps to be due'}")
        if bar is None or self.figures.age < REPORT_S:
            return
        self._report()
        bar.set(updates=self.updates, trial=self.state["target_return"])

    def _report(self) -> None:
        """What happened since the last report."""
        got = self.governor.state()
        told = self.figures.report(got["collected"])
        self._tell("train", updates=self.updates, train_ratio=got["ratio"], set_train_ratio=got["set_ratio"], **told)

    def _tell(self, kind: str, **metrics: Any) -> None:
        self.log.write(kind, real_env_steps=self.collected, wall_seconds=round(self._wall(), 3), **metrics)

    def _wall(self) -> float:
        return self.state["wall_seconds"] + time.monotonic() - self.began

    # ------------------------------------------------------------------------------------------------ ends

    def _over(self) -> bool:
        """Whether all has come to rest; decides that the steps are done."""
        busy = [post for post in self.executor.posts if not post.free]
        if self.running and not busy and self._steps() < 1 and not self.governor.due(self.rows):
            self.state["stopped"] = f"{self.limit} real steps done"
        return self.state["stopped"] is not None and not busy

    def save(self) -> None:
        """A checkpoint now, on the disk when this returns; without one where the learner does not answer."""
        saves, self.save_due = self.state["saves"], True
        patience = SAVE_PATIENCE_S if self.interrupted else None
        if not self._until(lambda: self.state["saves"] > saves, patience=patience):
            self.log.say("the learner does not answer: the last checkpoint stands")
        self.writing.result()

    def _finish(self) -> dict[str, Any]:
        """The last measurement, which decides nothing, and the run's summary."""
        state, count = self.state, self.config.evaluate.episodes
        self._report()
        state["real_env_steps"] = self.collected
        self.save()
        state["phase"] = "evaluate"
        size = max(1, min(self.config.collect.envs, -(-count // len(self.executor.posts))))
        self.final = [list(range(at, min(at + size, count))) for at in range(0, count, size)]
        with self.log.progress("evaluate", count) as bar:
            if not self._until(lambda: len(self.played) == count):
                raise KeyboardInterrupt
            bar.advance(count)
        returns, lengths = zip(*((ret, steps) for _, steps, ret in map(self.played.__getitem__, range(count))))
        self._tell("evaluate", updates=self.updates, **summarise(returns, lengths))
        summary = self._summary(returns)
        state["phase"] = "done"
        self.save()
        checkpoint.atomic_write_json(self.out / "summary.json", summary)
        return summary

    def _summary(self, returns: tuple[float, ...]) -> dict[str, Any]:
        state, got = self.state, self.governor.state()
        return {
            "env_id": self.config.env.id,
            "seed": self.config.seed,
            "stopped": state["stopped"],
            "real_return_mean": float(np.mean(returns)),
            "real_return_std": float(np.std(returns)),
            "real_return_episodes": len(returns),
            "random_return_mean": float(np.mean(state["random"])) if state["random"] else None,
            "real_env_steps": self.collected,
            "eval_env_steps": state["eval_env_steps"],
            "episodes": state["episodes"],
            "updates": self.updates,
            "lost_updates": state["lost_updates"],
            "train_ratio": got["ratio"],
            "set_train_ratio": got["set_ratio"],
            **self.figures.summary(),
            "wall_seconds": round(self._wall(), 1),
            "worker_deaths": state["worker_deaths"] + self.executor.deaths,
            "broken_episodes": state["broken_episodes"],
        }

    # ------------------------------------------------------------------------------------------------ resuming

    def restore(self) -> dict[str, Any] | None:
        """Go back to the last checkpoint, if there is one, and start everybody; a finished run's summary.

        The learner goes back to the checkpoint, or to its beginning, the replay does not: what was collected after it
        counts as collected, and its updates are due again. So no step is lost or counted twice, and the train ratio
        holds over the whole.
        """
        checkpoint.atomic_write_json(self.out / "spaces.json", self.parts.spaces())
        saved = None
        if checkpoint.latest(self.out / "checkpoints") is not None:
            saved = checkpoint.load(self.out / "checkpoints")
            self.parts.check(saved.tensors["learner"], self.out, saved.made_by)
            self.state.update(saved.state)
            if done := self._already():
                return done
            self.state["phase"] = "run"
            if self.state["stopped"] is not None and self._reached():  # only the last evaluation is to be done
                self.best = Weights(0, self.state["version"], saved.tensors["policy"])
            else:
                self.state["stopped"] = None
        self.state["starts"] = self._start_number()  # no number of an episode is given twice, whatever became of it
        replay = self.executor.start(None if saved is None else saved.state["marks"])
        warmup = self.warmup(len(self.executor.marks))
        self.governor = TrainRatio(self.config.online.train_ratio, 0, warmup, self.log.say)
        if saved is None:  # what a start collected that ended before its first checkpoint counts too
            if found := sum(mark["steps"] for mark in self.executor.marks):
                self.governor.collected(found)
                self.log.say(f"resumed at step {found}, from before the first checkpoint: update 0")
            self._keep_log(0)
        else:
            later = replay.aside_steps
            replay.release()
            self.figures.totals.update(saved.state["figures"])
            counts = saved.state["governor"]
            self.governor.load(counts | {"collected": counts["collected"] + later})
            self.updates, self.saved = saved.state["updates"], saved.tensors["learner"]
            self._keep_log(saved.state["log_rows"])
            self.log.say(f"resumed at step {self.collected}, update {self.updates}; {later} steps are later than that")
        self.base = self.collected - sum(mark["steps"] for mark in self.executor.marks)
        return None

    def _already(self) -> dict[str, Any] | None:
        """The summary of a run that is finished, unless more steps or a higher target continue it."""
        state, summary = self.state, self.out / "summary.json"
        if state["phase"] != "done" or not summary.exists():
            return None
        if not self._reached() and self.limit - state["governor"]["collected"] >= self.config.collect.envs:
            return None
        done: dict[str, Any] = json.loads(summary.read_text())
        if done["real_return_episodes"] != self.config.evaluate.episodes:
            return None
        self.log.say(f"already finished: {state['stopped']}; more online.steps would continue it")
        return done

    def _reached(self) -> bool:
        """Whether the last trial reached the target."""
        target, last = self.config.target.real_return, self.state["target_return"]
        return target is not None and last is not None and last >= target

    def _start_number(self) -> int:
        path = self.out / "starts.json"
        number = json.loads(path.read_text())["starts"] + 1 if path.exists() else 0
        checkpoint.atomic_write_json(path, {"starts": number})
        return number

    def _keep_log(self, rows: int) -> None:
        """Drop what was logged after a checkpoint, but for the episodes: those were played, and took their time."""
        later = self.log.read()[rows:] if self.collected else []
        self.log.truncate(rows)
        self.state["wall_seconds"] = max([self.state["wall_seconds"], *(row["wall_seconds"] for row in later)])
        for row in later:
            if row["kind"] == "episode":
                self.state["episodes"] += 1
                if row["version"] < 0:
                    self.state["random"].append(row["return"])
                self.log.write(row.pop("kind"), **row)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the loop between two answers; the second ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def train(config: RunConfig, out: Path, executor: Any, log: RunLog) -> dict[str, Any]:
    """Run, or go on with, a Dreamer run in `out`; returns its summary."""
    return Online(config, out, executor, log).run()
