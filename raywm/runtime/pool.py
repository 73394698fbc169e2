"""A pool of Ray actors that no death, hang or lost node can stop, and in which no unit of work is lost or doubled.

The pool replaces a dead actor by a fresh one instead of letting Ray restart it: a restart would come back without the
shared state (weights), and Ray's own retry of a lost call would run it before that state is there again.
"""

from __future__ import annotations

import os
import queue
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raywm.runtime.cluster import seat

SAY_AFTER_S = 60.0  # silence after which the pool says what it waits for
UNIT_DEATHS = 4  # workers that one unit of work may take down before it is the unit that is blamed
START_FAILURES = 3  # consecutive failures to start one worker before the pool gives up, if no other worker is up
POLL_S = 0.25  # how often all workers are looked at, for timeouts
Part = tuple[Any, tuple]  # key and arguments of a unit of work


class PoolError(ChildProcessError, RuntimeError):
    """Workers that die or do not start, whatever is done: the work or the machines need mending, not raywm."""


class _Host:
    """The actor: holds one instance of the pool's class.

    The class arrives by a call, not by the actor's constructor, so that whatever it raises comes back as itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name  # Ray's prefix of this worker's log lines

    def start(self, cls: type, args: tuple) -> int:
        self._worker = cls(*args)
        return os.getpid()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)

    @ray.method(concurrency_group="beside")
    def tell(self, method: str, *args: Any) -> None:
        """Reaches the worker while it is in the middle of a call."""
        getattr(self._worker, method)(*args)


@dataclass(eq=False)
class _Unit:
    key: Any
    args: tuple
    run: int  # which map it belongs to; results of an abandoned map are dropped
    suspect: bool = False  # it, or what it is a part of, was with a worker as that died
    deaths: int = 0  # of workers that were at it


@dataclass(eq=False)
class _Call:
    future: Future
    what: str
    unit: _Unit | None = None  # None: start or broadcast


@dataclass(eq=False)
class _Slot:
    """One place in the pool and the actor in it now. Actors answer in order: only the head call can be running."""

    index: int
    actor: Any = None
    calls: deque[_Call] = field(default_factory=deque)
    head_since: float = 0.0
    born: float = 0.0
    started: bool = False
    ready: bool = False  # started, and holds the shared state
    pid: int | None = None
    failures: int = 0
    retry_at: float = 0.0
    error: BaseException | None = None


def _cause(error: RayTaskError) -> BaseException:
    """What the worker's code raised, out of Ray's wrapping (twice so when the worker itself waited for an actor)."""
    cause: Any = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return cause if isinstance(cause, BaseException) else RuntimeError(str(error))


class WorkerPool:
    """`count` Ray actors, each holding one `cls(*args)`.

    `args` must be small and free of object references: they are sent again whenever an actor is replaced. What is
    large goes through `broadcast`. `options` are Ray actor options (num_cpus, num_gpus, scheduling_strategy, ...).
    A call that takes longer than `timeout_s` is lost with its worker; None waits for ever. `on_death(pool name,
    reason)` hears of every replaced worker, `say(text)` what is waited for after a minute of silence.

    The pool is driven by the thread that uses it, from inside `map`, `ready` and `drain`; it is not thread-safe.
    """

    def __init__(
        self,
        cls: type,
        args: tuple,
        count: int,
        *,
        options: dict[str, Any] | None = None,
        name: str = "pool",
        timeout_s: float | None = 600.0,
        start_timeout_s: float = 600.0,
        inflight: int = 2,
        on_death: Callable[[str, str], None] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if count < 1 or inflight < 1:
            raise ValueError(f"pool {name!r}: got count={count}, inflight={inflight}; both must be at least 1")
        self.name = name
        self.deaths = 0
        self.version = 0  # of the last broadcast
        self._cls, self._args = cls, tuple(args)
        self._options = {**(options or {}), "max_restarts": 0, "max_task_retries": 0}
        self._timeout_s, self._start_timeout_s, self._inflight = timeout_s, start_timeout_s, inflight
        self._on_death = on_death or (lambda name, reason: None)
        self._say = say
        self._state: dict[str, list] = {}  # method -> arguments (references) of its last broadcast
        self._lost: deque[_Unit] = deque()  # units of dead workers, to be given out again
        self._done: deque[tuple[Any, Any]] = deque()
        self._open = 0  # units of this map that have been given out and not yielded
        self._again: tuple = ()
        self._divide: Callable[[Any, tuple, int, str], Iterable[Part] | None] | None = None
        # What a unit costs the driver does not grow with the workers: answers announce themselves, and those who can
        # take one are kept by the number of their calls.
        self._answered: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._free: list[OrderedDict[_Slot, None]] = [OrderedDict() for _ in range(inflight)]
        self._down: list[_Slot] = []  # to be spawned again
        self._look_at = 0.0
        self._run = 0
        self._heard = time.monotonic()
        self._closed = False
        self._slots = [_Slot(i) for i in range(count)]
        for slot in self._slots:
            self._spawn(slot)

    # -- what users call

    def broadcast(self, method: str, *values: Any) -> int:
        """Call `method(*values)` on every worker before any further unit, and on every later replacement.

        Each value is put into the object store once (references are passed on as they are). Only the last broadcast
        of a method is remembered. Returns the number of this broadcast; an error in it is raised by the next `map`.
        """
        self._check_open()
        self.version += 1
        refs = [v if isinstance(v, ray.ObjectRef) else ray.put(v) for v in values]
        self._state.pop(method, None)  # replacements hear the broadcasts in the order they were last made
        self._state[method] = refs
        for slot in self._slots:
            if slot.actor is not None:
                self._submit(slot, method, refs)
        return self.version

    def tell(self, method: str, *values: Any) -> None:
        """Call `method(*values)` on every worker that is up at once, even in the middle of a unit; no answer is waited
        for. Workers that start later do not hear it: what they must know is `broadcast` as well."""
        self._check_open()
        refs = [v if isinstance(v, ray.ObjectRef) else ray.put(v) for v in values]
        for slot in self._slots:
            if slot.started:
                slot.actor.tell.remote(method, *refs)

    def map(
        self,
        method: str,
        units: Iterable[Part],
        again: tuple = (),
        divide: Callable[[Any, tuple, int, str], Iterable[Part] | None] | None = None,
    ) -> Generator[tuple[Any, Any], None, None]:
        """Run `method(*args)` for every (key, args) and yield (key, result) as they complete, each exactly once.

        A unit that was with a worker as it died is run with the further arguments `again`. Where a worker died while
        it was at a unit, `divide(key, args, deaths, reason)`, called with how often that happened, may give what shall
        be run in its place: smaller units, whose deaths are counted from none on; None: the same again.

        `units` may be lazy and endless: it is read only as workers become free. Closing the iterator abandons what is
        in flight; its results never reach a later map. What the worker's code raises is raised here as itself and is
        not retried. Raises PoolError when one undivided unit has taken down UNIT_DEATHS workers.
        """
        self._check_open()
        self._run += 1
        run = self._run
        self._again, self._divide = tuple(again), divide
        self._lost.clear()
        self._done.clear()
        self._heard = time.monotonic()
        source = iter(units)
        more = True
        self._open = 0
        try:
            while True:
                while (self._lost or more) and (slot := self._free_slot(alone=bool(self._lost))) is not None:
                    if self._lost:
                        unit = self._lost.popleft()
                    else:
                        item = next(source, None)
                        if item is None:
                            more = False
                            break
                        unit = _Unit(item[0], tuple(item[1]), run)
                        self._open += 1
                    self._submit(slot, method, unit.args + (self._again if unit.suspect else ()), unit)
                while self._done:
                    self._open -= 1
                    yield self._done.popleft()
                    if run != self._run:
                        raise RuntimeError(
                            f"pool {self.name!r}: a new map began before this one ended; close() or exhaust one first"
                        )
                if not self._open and not more:
                    return
                self._pump()
        finally:
            if run == self._run:
                self._run += 1

    def ready(self) -> WorkerPool:
        """Wait until every worker has started and holds the shared state."""
        self._check_open()
        self._heard = time.monotonic()
        while not all(slot.ready for slot in self._slots):
            self._pump()
        return self

    def drain(self) -> None:
        """Wait until no call is in flight, for instance those of a map that was closed early."""
        self._check_open()
        self._heard = time.monotonic()
        while any(call.unit is not None for slot in self._slots for call in slot.calls):
            self._pump()

    def pids(self) -> list[int]:
        """Process ids of the workers that have started (on whatever node they are)."""
        return [slot.pid for slot in self._slots if slot.started and slot.pid is not None]

    def shutdown(self) -> None:
        """Kill the workers. Safe to call twice."""
        self._closed = True
        self._run += 1
        for slot in self._slots:
            if slot.actor is not None and ray.is_initialized():
                ray.kill(slot.actor)
            slot.actor, slot.ready = None, False
            slot.calls.clear()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    # -- how it works

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"pool {self.name!r} has been shut down")

    def _spawn(self, slot: _Slot) -> None:
        host: Any = ray.remote(concurrency_groups={"beside": 1})(_Host)  # type: ignore[call-overload]
        name = f"{self.name}-{slot.index}"
        actor = host.options(**self._options, **seat(name, self._options)).remote(name)
        slot.actor, slot.started, slot.ready, slot.pid = actor, False, False, None
        slot.born = slot.head_since = time.monotonic()
        self._await(slot, actor.start.remote(self._cls, self._args), "start")
        for method, refs in self._state.items():
            self._submit(slot, method, refs)

    def _submit(self, slot: _Slot, method: str, args: Iterable, unit: _Unit | None = None) -> None:
        if not slot.calls:
            slot.head_since = time.monotonic()
        self._await(slot, slot.actor.call.remote(method, *args), method, unit)

    def _await(self, slot: _Slot, ref: ray.ObjectRef, what: str, unit: _Unit | None = None) -> None:
        call = _Call(ref.future(), what, unit)
        slot.calls.append(call)
        self._place(slot)
        call.future.add_done_callback(lambda _: self._answered.put(slot))  # on a thread of Ray's

    def _place(self, slot: _Slot) -> None:
        """Note whether, and after how many calls, a slot could begin another unit."""
        for level in self._free:
            level.pop(slot, None)
        if slot.ready and len(slot.calls) < self._inflight:
            if not any(c.unit is not None and c.unit.suspect for c in slot.calls):
                self._free[len(slot.calls)][slot] = None

    def _free_slot(self, alone: bool) -> _Slot | None:
        """Where the next unit goes. One that was with a worker as it died runs `alone`: the next death tells."""
        for level in self._free[: 1 if alone else None]:
            if level:
                return next(iter(level))
        return None

    def _pump(self) -> None:
        """One round: take in what is ready, replace what has died or hung; waits at most POLL_S."""
        if self._down:
            due = [slot for slot in self._down if time.monotonic() >= slot.retry_at]
            for slot in due:
                self._down.remove(slot)
                self._spawn(slot)
        try:
            self._take(self._answered.get(timeout=POLL_S))
            while not self._answered.empty():
                self._take(self._answered.get())
        except queue.Empty:
            pass
        now = time.monotonic()
        if now >= self._look_at:  # not every time: this grows with the number of workers
            self._look_at = now + POLL_S
            for slot in self._slots:
                if slot.calls and slot.started and self._timeout_s is not None:
                    if now - slot.head_since > self._timeout_s and not slot.calls[0].future.done():
                        self._bury(
                            slot,
                            f"no answer within {self._timeout_s:g} s: it hangs where Python cannot look (a call that "
                            "holds the GIL), or its work takes longer (then raise timeout_s)",
                        )
            self._watch(now)

    def _take(self, slot: _Slot) -> None:
        """Take in the answers of a slot that has answered. (Or had: it may have been buried since.)"""
        while slot.calls and slot.calls[0].future.done():
            self._settle(slot)

    def _settle(self, slot: _Slot) -> None:
        """Take in the answer to a slot's head call."""
        call = slot.calls[0]
        try:
            value = call.future.result()
        except RayTaskError as error:
            cause = _cause(error)
            if not slot.started:
                # A constructor that has never worked anywhere is the user's mistake, not a broken node.
                hopeless = not self.deaths and not any(s.started for s in self._slots)
                slot.error = cause
                slot.failures = START_FAILURES if hopeless else slot.failures
                self._bury(slot, repr(cause))
                return
            slot.calls.popleft()
            slot.head_since = self._heard = time.monotonic()
            self._place(slot)
            if call.unit is None or call.unit.run == self._run:
                raise cause from error
            return
        except RayError as error:
            slot.error = error
            self._bury(slot, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            return
        slot.calls.popleft()
        slot.head_since = self._heard = time.monotonic()
        if not slot.started:
            slot.started, slot.pid = True, value
        if not slot.ready and all(c.unit is not None for c in slot.calls):
            slot.ready, slot.failures, slot.error = True, 0, None
        self._place(slot)
        if call.unit is not None and call.unit.run == self._run:
            self._done.append((call.unit.key, value))

    def _bury(self, slot: _Slot, reason: str) -> None:
        """Kill a slot's actor, give its units back, and have a fresh one started (later, if it keeps failing)."""
        calls, was_ready, pid = list(slot.calls), slot.ready, slot.pid
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.started, slot.ready, slot.pid = None, False, False, None
        slot.calls.clear()
        self._place(slot)
        self._down.append(slot)
        slot.failures += not was_ready
        slot.retry_at = time.monotonic() + (0.0 if was_ready else min(2.0 ** (slot.failures - 1), 10.0))
        lost = [c.unit for c in calls if c.unit is not None and c.unit.run == self._run]
        self.deaths += 1
        doing = f" in {calls[0].what}" + (f" of unit {calls[0].unit.key!r}" if calls[0].unit else "") if calls else ""
        self._on_death(self.name, f"worker {slot.index} (pid {pid}) died{doing}: {reason}")
        for unit in lost:  # a quick unit's answer may be lost with the worker that the next one took down: all suspects
            unit.suspect = True
        if lost and lost[0] is calls[0].unit:
            lost[:1] = self._accuse(lost[0], calls[0].what, reason)
        self._lost.extendleft(reversed(lost))
        if slot.failures >= START_FAILURES:
            if slot.error is not None and not isinstance(slot.error, RayError):
                raise slot.error
            if not any(s.ready for s in self._slots):  # else the others go on, and this one is tried again and again
                what = f"worker {slot.index} failed {slot.failures} times to start"
                raise PoolError(f"pool {self.name!r}: {what}, the last time{doing}: {reason}")

    def _accuse(self, unit: _Unit, method: str, reason: str) -> list[_Unit]:
        """A worker died at a unit: what shall be run in its place."""
        unit.deaths += 1
        if unit.deaths >= UNIT_DEATHS:
            raise PoolError(
                f"pool {self.name!r}: {method} of unit {unit.key!r} has taken down {UNIT_DEATHS} workers, "
                f"the last time by {reason}; look for a crash or for memory, or raise timeout_s={self._timeout_s}"
            )
        parts = None if self._divide is None else self._divide(unit.key, unit.args, unit.deaths, reason)
        if parts is None:
            return [unit]
        found = [_Unit(key, tuple(args), unit.run, suspect=True) for key, args in parts]
        self._open += len(found) - 1
        return found

    def _watch(self, now: float) -> None:
        if not any(slot.ready for slot in self._slots) and all(
            slot.actor is not None and now - slot.born > self._start_timeout_s for slot in self._slots
        ):
            needs = {k: v for k, v in self._options.items() if k.startswith(("num_", "resources", "memory"))}
            raise PoolError(
                f"pool {self.name!r}: no worker has started within {self._start_timeout_s:g} s; each needs {needs}, "
                f"free in the cluster: {ray.available_resources()}. Ask for fewer or smaller workers, or add nodes"
            )
        if now - self._heard > SAY_AFTER_S:
            self._heard = now
            calls = [f"{c.unit.key!r}" if c.unit else c.what for s in self._slots for c in s.calls]
            ready = sum(slot.ready for slot in self._slots)
            self._say(
                f"{self.name}: nothing has finished for {SAY_AFTER_S:g} s; {ready}/{len(self._slots)} workers are up, "
                f"waiting for {', '.join(calls[:6]) or 'workers to start'}" + (" ..." if len(calls) > 6 else "")
            )
