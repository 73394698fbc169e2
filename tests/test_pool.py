"""The pool under death, hangs, errors and early closing, with real Ray actors."""

import cProfile
import itertools
import os
import pstats
import signal
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from raywm.runtime.pool import WorkerPool


class Worker:
    def __init__(self, base=0):
        self.base, self.state = base, None

    def set_state(self, value, version):
        self.state = (value, version)

    def work(self, x, seconds=0.0):
        time.sleep(seconds)
        return self.base + x

    def read(self, x):
        time.sleep(0.05)
        return self.state

    def hang_once(self, x, marker):
        if x == 3 and not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(600)
        return x

    def fail(self, x):
        if x == 5:
            raise ValueError("environment 5 is broken")
        return x

    def die(self, x):
        if x == "poison":
            os._exit(1)
        return x

    def die_at_5(self, numbers, again=False):
        if 5 in numbers:
            os._exit(1)
        return numbers, again


class Broken:
    def __init__(self):
        raise KeyError("no such model")


def pool(count=2, cls=Worker, args=(), **kwargs):
    return WorkerPool(cls, args, count, options={"num_cpus": 0.5}, name="test", **kwargs)


def test_each_unit_once(ray_session):
    with pool(args=(100,)) as workers:
        results = list(workers.map("work", ((i, (i,)) for i in range(50))))
    assert sorted(results) == [(i, 100 + i) for i in range(50)]
    assert workers.deaths == 0
    with pytest.raises(RuntimeError, match="shut down"):
        next(workers.map("work", [(0, (0,))]))


@pytest.mark.parametrize("count", [1, 2])
def test_killed_worker(ray_session, count):
    heard = []
    with pool(count, on_death=lambda name, reason: heard.append((name, reason))) as workers:
        workers.broadcast("set_state", {"w": 7}, 3)
        first = workers.ready().pids()
        assert len(first) == count
        results = []
        for key, value in workers.map("read", ((i, (i,)) for i in range(20))):
            results.append((key, value))
            if len(results) == 3:
                os.kill(workers.pids()[0], signal.SIGKILL)
        # a replacement holds the broadcast state before it gets any unit
        assert sorted(results) == [(i, ({"w": 7}, 3)) for i in range(20)]
        assert workers.deaths == 1
        assert len(heard) == 1 and heard[0][0] == "test" and "died" in heard[0][1]
        assert first[0] not in workers.ready().pids()


def test_broadcasts_are_in_order_and_the_last_one_counts(ray_session):
    with pool() as workers:
        assert workers.broadcast("set_state", "old", 1) == 1
        assert workers.broadcast("set_state", "new", 2) == 2
        assert {v for _, v in workers.map("read", ((i, (i,)) for i in range(4)))} == {("new", 2)}
        os.kill(workers.ready().pids()[1], signal.SIGKILL)  # noticed only in the next map
        workers.broadcast("set_state", "newest", 3)
        assert {v for _, v in workers.map("read", ((i, (i,)) for i in range(4)))} == {("newest", 3)}


def test_hanging_worker_is_replaced(ray_session, tmp_path):
    heard = []
    with pool(timeout_s=1.0, on_death=lambda name, reason: heard.append(reason)) as workers:
        results = list(workers.map("hang_once", ((i, (i, str(tmp_path / "hung"))) for i in range(8))))
        assert sorted(results) == [(i, i) for i in range(8)]
        assert workers.deaths == 1
        assert "in hang_once of unit 3: no answer within 1 s" in heard[0] and "GIL" in heard[0]


def test_queueing_behind_a_slow_unit_is_no_timeout(ray_session):
    with pool(1, timeout_s=1.0) as workers:
        assert len(list(workers.map("work", ((i, (i, 0.7)) for i in range(3))))) == 3
        assert workers.deaths == 0


def test_error_of_the_work_is_raised_as_itself(ray_session):
    with pool() as workers:
        with pytest.raises(ValueError, match="environment 5 is broken") as caught:
            list(workers.map("fail", ((i, (i,)) for i in range(20))))
        assert type(caught.value) is ValueError
        assert workers.deaths == 0
        assert sorted(workers.map("work", ((i, (i,)) for i in range(10)))) == [(i, i) for i in range(10)]


def test_constructor_error_is_raised_as_itself(ray_session):
    with pool(cls=Broken) as workers, pytest.raises(KeyError, match="no such model"):
        workers.ready()


def test_unit_that_kills_its_workers_is_named(ray_session):
    with pool() as workers:
        with pytest.raises(RuntimeError, match="'poison' has taken down 4 workers"):
            list(workers.map("die", [("good", ("good",)), ("poison", ("poison",))]))
        assert workers.deaths in (4, 5)  # good's answer may be lost with the worker that poison, behind it, took down


def test_a_unit_that_kills_its_workers_is_divided(ray_session):
    seen = []

    def divide(key, args, deaths, reason):
        (numbers,) = args
        seen.append((numbers, deaths))
        assert "ActorDiedError" in reason
        if len(numbers) == 1:
            return [] if deaths == 2 else None
        middle = len(numbers) // 2
        return [(part[0], (part,)) for part in (numbers[:middle], numbers[middle:])]

    units = [(n, (list(range(n, n + 8)),)) for n in (0, 8, 16)]
    with pool() as workers:
        results = dict(workers.map("die_at_5", units, again=(True,), divide=divide))
        # every number but 5 once; parts are told that they are run again
        assert sorted(n for numbers, _ in results.values() for n in numbers) == [n for n in range(24) if n != 5]
        assert {key: again for key, (_, again) in results.items() if key < 8} == {0: True, 4: True, 6: True}
        assert seen == [(list(range(8)), 1), ([4, 5, 6, 7], 1), ([4, 5], 1), ([5], 1), ([5], 2)]
        assert workers.deaths == 5


class Simulated(WorkerPool):
    """A pool whose actors are in this process; the oldest call is answered whenever the driver waits."""

    def _spawn(self, slot):
        self.asked = getattr(self, "asked", deque())
        slot.actor = SimpleNamespace(call=SimpleNamespace(remote=self._remote))
        slot.started = slot.ready = True
        self._place(slot)

    def _remote(self, method, *args):
        future = Future()
        self.asked.append((future, args))
        return SimpleNamespace(future=lambda: future)

    def _pump(self):
        future, args = self.asked.popleft()
        future.set_result(args[0])
        super()._pump()


def calls_per_unit(workers, units=500):
    """Python calls that a unit costs the driver."""
    simulated = Simulated(Worker, (), workers)
    results = simulated.map("work", ((i, (i,)) for i in itertools.count()))
    assert next(results) == (0, 0)  # each has two now
    assert len(simulated.asked) == 2 * workers
    simulated._look_at = time.monotonic() + 600  # what is looked at by the clock is no cost of a unit
    profile = cProfile.Profile()
    profile.enable()
    keys = [key for key, _ in itertools.islice(results, units)]
    profile.disable()
    assert keys == list(range(1, units + 1))
    return pstats.Stats(profile).total_calls / units


def test_a_units_cost_does_not_grow_with_the_workers():
    few, many = calls_per_unit(10, 500), calls_per_unit(4000, 500)
    assert many < 1.2 * few
    assert few < 100


def test_endless_units_closed_early(ray_session):
    pulled = []

    def units():
        for i in itertools.count():
            pulled.append(i)
            yield i, (i, 0.02)

    with pool() as workers:
        running = workers.map("work", units())
        got = [key for key, _ in itertools.islice(running, 10)]
        running.close()
        assert len(set(got)) == 10
        # two a worker are in flight, and as many may have been answered at once, of which the tenth was the first
        assert len(pulled) <= 10 + 2 * 2 + 3
        # same keys, other results: nothing of the abandoned map may leak into this one
        again = list(workers.map("work", ((i, (i + 1000,)) for i in range(10))))
        assert sorted(again) == [(i, i + 1000) for i in range(10)]
        workers.drain()
        stale = workers.map("work", ((i, (i,)) for i in range(5)))
        next(stale)
        list(workers.map("work", [(0, (0,))]))
        with pytest.raises(RuntimeError, match="a new map began"):
            list(stale)
