"""Collectors and the shards that they fill: real experience, which never passes through the driver."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raywm.config import CollectConfig, EnvConfig, ReplayConfig
from raywm.data.mirror import absolute, claim
from raywm.loops.parts import Played
from raywm.playing import BROKEN_SHARE, MAY_BREAK
from raywm.runtime.cluster import spread
from raywm.runtime.pool import Part, WorkerPool
from raywm.runtime.shards import Shards, place
from raywm.runtime.workers import CollectWorker
from raywm.seeding import derive

UNIT_S = 1.0  # what one order to a collector should take: the driver's share of the work falls with it
UNIT_MOST = 4096  # episodes
BLAMED = 2  # collectors that die while they play one episode and nothing else, until it counts as broken


class Rollouts:
    """A pool of collectors, and the shards of the run's replay.

    Args:
        env, collect, replay: sections of the config; seed: the run's; directory: of its episodes.
        columns, codec: of the environment; say, on_death: as in ``WorkerPool``; adopt: see ``claim``.
    """

    def __init__(
        self,
        env: EnvConfig,
        collect: CollectConfig,
        replay: ReplayConfig,
        seed: int,
        directory: Path,
        columns: dict[str, Any],
        codec: Any,
        *,
        say: Callable[[str], None] = print,
        on_death: Callable[[str, str], None] | None = None,
        adopt: bool = False,
    ):
        self.config = collect
        mb, directory = 2**20, Path(directory).resolve()
        storage = absolute(replay.storage)
        if storage is not None:
            claim(directory, storage, adopt)
        self.shards = Shards(
            directory,
            columns,
            codec,
            place(directory, replay.shards == "nodes", storage, collect.labels),
            storage=storage,
            segment_bytes=int(replay.segment_mb * mb),
            capacity_bytes=None if replay.capacity_mb is None else int(replay.capacity_mb * mb),
            seal_s=replay.seal_s,
        )
        self._worker = env, seed, collect.envs, self.shards.places(), collect.stall_s, collect.piece_rows
        self._say, self._on_death = say, on_death
        self._pool: WorkerPool | None = None
        self._env, self._seed = env.id, seed
        self._whole = self._broken = 0  # episodes that were yielded
        self._reason = ""  # of the last death while an episode was played
        self._run = 0
        self._pace = 0.0  # episodes a second of one collector

    @property
    def pool(self) -> WorkerPool:
        """The collectors; they start when they are first needed."""
        if self._pool is None:
            self._pool = WorkerPool(
                CollectWorker,
                self._worker,
                self.config.workers,
                options={"num_cpus": 1, **spread(self.config.labels)},
                name="collect",
                timeout_s=self.config.timeout_s,
                on_death=self._on_death,
                say=self._say,
            )
        return self._pool

    @property
    def deaths(self) -> int:
        """Collectors that died and were replaced."""
        return self._pool.deaths if self._pool else 0

    def pids(self) -> list[int]:
        """Process ids of the collectors that are up."""
        return self._pool.pids() if self._pool else []

    def set_agent(self, agent: Any) -> None:
        """The agent that plays from now on, sent once for all collectors."""
        self.pool.broadcast("set_agent", _sent(agent))

    def offer(self, agent: Any) -> None:
        """A newer version of it, sent once and taken up by episodes as they begin."""
        ref = _sent(agent)
        self.pool.tell("offer", ref)
        self.pool.broadcast("set_agent", ref)

    def collect(self, numbers: Iterable[int], stream: str, left: Callable[[], float] | None = None) -> Iterator[Played]:
        """Play and store episodes; yields (number, steps, return) in the order of their ends, 0 steps for broken ones.

        What is yielded is acknowledged: some shard has it. Episodes that a shard has are not played again, broken ones
        are. Where a collector dies, its unit of work is halved until a single episode is left to blame: one that stalls
        is marked by its collector, one that takes two collectors down by the driver, and the rest is played.
        `left`, where given, says how many episodes are about still wanted of endless `numbers`.

        Raises ValueError when more than three and more than a tenth of all episodes so far broke.
        """
        self._run += 1
        run, numbers = self._run, iter(numbers)
        number = next(numbers, None)
        have = {} if number is None else self.shards.stored(stream, number)
        have = {n: played for n, played in have.items() if played[1]}  # what broke last time may go well now
        while number is not None and number in have:
            yield from self._counted([have[number]])
            number = next(numbers, None)
        if number is None:
            return
        fresh = itertools.chain([number], numbers)
        found: list[Played] = []
        began: dict[int, tuple[float | None, int]] = {}  # None: it is not measured

        def divide(key: int, args: tuple, deaths: int, reason: str) -> list[Part] | None:
            unit, *rest = args
            if len(unit) == 1:
                self._blame(unit[0], stream, deaths, reason)
                return None
            parts = _halves(unit)
            del began[key]
            began.update({part[0]: (None, len(part)) for part in parts})
            return [(part[0], (part, *rest)) for part in parts]

        def units() -> Iterator[Part]:
            while True:
                size = self._size(None if left is None else left() - sum(count for _, count in began.values()))
                unit: list[int] = []
                for number in fresh:
                    if number in have:
                        found.append(have[number])
                    else:
                        unit.append(number)
                    if len(unit) == size:
                        break
                if not unit:
                    return
                began[unit[0]] = time.monotonic(), len(unit)
                yield unit[0], (unit, stream, run)

        results = self.pool.map("collect", units(), again=(True,), divide=divide)
        try:
            for key, played in results:
                self._measure(*began.pop(key))
                yield from self._counted(found)
                found.clear()
                yield from self._counted(played)
            yield from self._counted(found)
        finally:
            results.close()
            self.pool.tell("cancel", run)

    def _counted(self, played: Sequence[Played]) -> Sequence[Played]:
        """Episodes that are to be yielded, unless too many broke. Each collector counts only those that it outlives."""
        broken = [number for number, steps, _ in played if not steps]
        self._broken += len(broken)
        self._whole += len(played) - len(broken)
        count = self._whole + self._broken
        if broken and self._broken > max(MAY_BREAK, BROKEN_SHARE * count):
            last = f"; {self._reason}" if self._reason else ""
            raise ValueError(
                f"environment {self._env!r}: {self._broken} of {count} episodes broke, the last of them {broken[-1]}"
                f"{last}; raywm data verify says why. Mend the environment or the agent, or raise "
                f"collect.stall_s={self.config.stall_s:g} where it is only slow"
            )
        return played

    def _blame(self, number: int, stream: str, deaths: int, reason: str) -> None:
        """A collector died while it played this episode alone. Its unit is run again, which finds what is marked."""
        self._reason = f"episode {number} took its collector down: {reason}"
        if deaths < BLAMED:
            return
        broken = f"took {deaths} collectors down: {reason}"
        seed = derive(self._seed, stream, "env", number)
        info = {"number": number, "seed": seed, "env": self._env, "broken": broken}
        # every shard: whichever has pieces of it. One that is away now is asked again after the next death.
        marks = [actor.mark.remote(f"{stream}-{number:09d}", info) for actor in self.shards.actors]
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(marks, timeout=60)

    def collect_fast(self, unit: int, envs: int, left: Callable[[], float]) -> Iterator[tuple[int, int, float]]:
        """Play and store in the environment's native vector form, from unit number `unit` on, without an end.

        Yields (episodes, steps, sum of returns) a unit, which is about a second of one collector's work; `left`: about
        how many steps are still wanted. See `FastCollector`.
        """
        self._run += 1
        run = self._run
        began: dict[int, tuple[float, int]] = {}
        pace = 10_000.0

        def units() -> Iterator[Part]:
            for number in itertools.count(unit):
                wanted = left() - sum(steps for _, steps in began.values())
                steps = max(1000, round(min(pace * UNIT_S, wanted / self.config.workers)))
                began[number] = time.monotonic(), steps
                yield number, (number, steps, envs, run)

        results = self.pool.map("collect_fast", units())
        try:
            for number, done in results:
                since, _ = began.pop(number)
                pace = min(done[1] / max(time.monotonic() - since, 1e-3), 8 * pace)
                yield done
        finally:
            results.close()
            self.pool.tell("cancel", run)

    def streams(self) -> set[str]:
        """What the ids of stored episodes begin with, up to their numbers."""
        return {stream for found in self.shards.ask("streams") for stream in found}

    def _size(self, left: float | None) -> int:
        """Episodes of the next unit: about a second of one collector's work, less where little is left."""
        size = min(round(self._pace * UNIT_S), UNIT_MOST)
        least = self.config.envs
        if left is not None and math.isfinite(left):
            size = min(size, round(left / (2 * self.config.workers)))
            least = min(least, max(1, math.ceil(left / self.config.workers)))
        return max(size, least)

    def _measure(self, since: float | None, episodes: int) -> None:
        """From order to answer, of which up to two are with a collector at once."""
        if since is None:
            return
        pace = episodes / max(time.monotonic() - since, 1e-3)
        self._pace = min(pace, 4 * max(self._pace, self.config.envs))

    def play(self, numbers: Sequence[int], stream: str) -> list[Played]:
        """Play episodes without keeping them, in order of their numbers."""
        size = max(1, min(self.config.envs, -(-len(numbers) // self.config.workers)))
        chunks = [list(numbers[at : at + size]) for at in range(0, len(numbers), size)]

        def divide(key: int, args: tuple, deaths: int, reason: str) -> list[Part] | None:
            unit, *rest = args  # halved until the error names one episode
            return None if len(unit) == 1 else [(part[0], (part, *rest)) for part in _halves(unit)]

        results = self.pool.map("play", ((c[0], (c, stream)) for c in chunks), divide=divide)
        return sorted(p for _, played in results for p in played)

    def real_fitness(self, theta: np.ndarray, numbers: Sequence[int], stream: str) -> tuple[np.ndarray, int]:
        """Mean real returns (P,) of controllers (P, D), each playing the same episodes; and the steps it took."""
        work = ((i, (t, list(numbers), stream)) for i, t in enumerate(theta))
        played = dict(self.pool.map("real_fitness", work))
        means = [float(np.mean([p[2] for p in sorted(played[i])])) for i in range(len(theta))]
        return np.array(means), sum(p[1] for each in played.values() for p in each)

    def settle(self) -> None:
        """Wait for what was cancelled to end; see what was written onto the disks, and to the storage."""
        if self._pool is not None:
            self._pool.drain()
        self.shards.settle()

    def stored(self, stream: str, first: int) -> dict[int, Played]:
        """Episodes of a stream that some shard holds, from number `first` on, by their numbers."""
        return self.shards.stored(stream, first)

    def verify(self) -> list[dict[str, Any]]:
        """Hold every byte of every shard against its CRC; see `EpisodeStore.verify`."""
        return self.shards.ask("verify")

    def close(self) -> None:
        """End the collectors, then seal, upload and end the shards."""
        if self._pool is not None:
            self._pool.shutdown()
        self.shards.close()


def _sent(agent: Any) -> ray.ObjectRef:
    try:
        return ray.put(agent)
    except Exception as error:  # pickle's, of whatever kind
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"agent {agent.name!r} cannot be sent to the collectors: {type(error).__name__}: {what}; leave out of it "
            "what cannot be pickled"
        ) from error


def _halves(unit: list[int]) -> tuple[list[int], list[int]]:
    middle = len(unit) // 2
    return unit[:middle], unit[middle:]
