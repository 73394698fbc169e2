"""The plain classes of a run as they live in Ray actors: what plays, fits and tells how far it is."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from raywm.collect import Collector
from raywm.config import EnvConfig
from raywm.fast import FastCollector
from raywm.recording import BLOCK_BYTES
from raywm.seeding import derive

if TYPE_CHECKING:  # it imports torch, which a collector of random actions can do without
    from raywm.loops.parts import Played

IN_FLIGHT = 2  # blocks on their way to the shard


class CollectWorker:
    """A collector that hands blocks of episodes to a shard and tells the driver only their numbers, steps and returns.

    Args:
        env: an EnvConfig; seed, envs: of the ``Collector``; shards: (node, actor) of each, the one on its own node is
            used if there is one; stall_s: an environment call that takes longer takes this process down with it.
        piece_rows: episodes are handed over in pieces of so many rows, while they are played.
    """

    def __init__(
        self,
        env: EnvConfig,
        seed: int,
        envs: int,
        shards: Sequence[tuple[str, Any]],
        stall_s: float = 60.0,
        piece_rows: int | None = None,
    ):
        self.collector, self.piece_rows = Collector(env, seed, envs), piece_rows
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.common = {"collector": self.name, "env_config": env.model_dump(mode="json")}
        self.shards, self.stall_s = [actor for _, actor in shards], stall_s
        node = ray.get_runtime_context().get_node_id()
        near = [actor for at, actor in shards if at == node] or self.shards
        self.shard: Any = near[zlib.crc32(self.name.encode()) % len(near)]
        self.agent: Any = None
        self._run, self._cancelled = 0, -1
        self._stream = ""
        threading.Thread(target=self._watch, daemon=True, name="stall-watch").start()

    def set_agent(self, agent: Any) -> None:
        """Who plays from now on; comes between two units of work."""
        self.agent = agent
        self.collector.offers.clear()
        if "torch" in sys.modules:  # came with the agent
            sys.modules["torch"].set_num_threads(1)

    def offer(self, agent: Any) -> None:
        """A newer version of the agent, taken up by episodes that begin; may come at any time."""
        self.collector.offer(agent)
        self.agent = agent

    def cancel(self, run: int) -> None:
        """What is under way for `run`, or one before it, is not wanted any more; may come at any time."""
        self._cancelled = max(self._cancelled, run)
        if self._run <= run:
            self.collector.stop()

    def collect(self, numbers: Sequence[int], stream: str, run: int = 0, again: bool = False) -> list[Played]:
        """Play and store episodes; returns when the shard has acknowledged them all. `again`: after a death."""
        out: list[Played] = []
        if again:
            for listed in ray.get([shard.which.remote(stream, list(numbers)) for shard in self.shards]):
                out += listed
            done = {n for n, *_ in out}
            out.sort(key=lambda p: p[1])  # what broke in one may be whole in another
            numbers, out = [n for n in numbers if n not in done], list({p[0]: p for p in out}.values())
        self._run = run
        if run <= self._cancelled:
            return out
        self._stream = stream
        try:
            return out + self._collect(numbers, stream)
        finally:
            self._stream = ""

    def _collect(self, numbers: Sequence[int], stream: str) -> list[Played]:
        out: list[Played] = []
        flying: list[Any] = []
        blocks: Any = self.collector.blocks(self.agent, numbers, stream, common=self.common, piece_rows=self.piece_rows)
        for block, played in blocks:
            flying.append(self.shard.add.remote(block))
            out += [(p.number, 0, float("nan")) if p.broken else (p.number, p.steps, p.ret) for p in played]
            while len(flying) > IN_FLIGHT:
                ready, flying = ray.wait(flying)
                ray.get(ready)
        ray.get(flying)
        return out

    def collect_fast(self, unit: int, steps: int, envs: int, run: int = 0) -> tuple[int, int, float]:
        """Play and store about `steps` steps in `envs` native copies, of a seed of this unit's own (`FastCollector`).

        Returns episodes, steps and the sum of returns.
        """
        fast = FastCollector(self.collector.config, self.collector.seed, envs, unit)
        done, total, returns = 0, 0, 0.0
        flying: list[Any] = []
        block_bytes = min(
            BLOCK_BYTES, max(1 << 14, steps * fast.recording.row_bytes)
        )  # a small goal wants small blocks
        for block, played in fast.blocks(self.agent, common=self.common, block_bytes=block_bytes):
            flying.append(self.shard.add.remote(block))
            done += len(played)
            total += sum(p.steps for p in played)
            returns += sum(p.ret for p in played)
            if len(flying) > IN_FLIGHT:
                ray.get(flying.pop(0))
            if total >= steps or run <= self._cancelled:
                break
        ray.get(flying)
        fast.close()
        return done, total, returns

    def play(self, numbers: Sequence[int], stream: str) -> list[Played]:
        """Play episodes without keeping them."""
        self._run = sys.maxsize  # a cancel that comes late is not meant for this
        return [(p.number, p.steps, p.ret) for p in self.collector.play(self.agent, numbers, stream)]

    def real_fitness(self, theta: np.ndarray, numbers: Sequence[int], stream: str) -> list[Played]:
        """Play episodes with one controller's parameters (D,)."""
        self.agent.theta = theta
        return self.play(numbers, stream)

    def _watch(self) -> None:
        """An environment that hangs cannot be interrupted: mark its episode, and end this process."""
        while True:
            time.sleep(min(1.0, self.stall_s / 4))
            stalled = self.collector.stalled()
            if stalled is not None and stalled[1] > self.stall_s:
                number, seconds = stalled
                reason = f"stalled: a step or reset of the environment took more than {self.stall_s:g} s"
                if self._stream:  # an episode that is to be kept
                    seed = derive(self.collector.seed, self._stream, "env", number)
                    info = {"number": number, "seed": seed, "env": self.collector.id, "broken": reason}
                    with contextlib.suppress(Exception):
                        ray.get(self.shard.mark.remote(f"{self._stream}-{number:09d}", info), timeout=60)
                os._exit(1)


class FitActor:
    """A `FitWorker` that reads its episodes from the shards: by mapping their segments where it can."""

    def __init__(self, spec: dict[str, Any], seed: int, fit: dict[str, Any], shards: Sequence[Any], board: Any):
        from raywm.loops.parts import FitWorker

        self.worker, self.shards, self.board, self.codec = FitWorker(spec, seed, fit), shards, board, spec["codec"]

    def load(self, weights: dict[str, Any], optimisers: dict[str, Any]) -> None:
        self.worker.load(weights, optimisers)

    def fit(self, ids: Sequence[str], iteration: int) -> dict[str, Any]:
        from raywm.loops.parts import whole
        from raywm.runtime.shards import read

        episodes, opened = read(self.shards, ids, self.codec)
        try:
            return self.worker.fit(whole(episodes, ids, self.codec), iteration, self._report)
        finally:
            del episodes
            for store in opened:
                store.close()

    def _report(self, **progress: Any) -> None:
        self.board.put.remote(progress)


class Board:
    """Where a long call says how far it is."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] | None = None

    def put(self, progress: dict[str, Any] | None) -> None:
        self._latest = progress

    def get(self) -> dict[str, Any] | None:
        return self._latest
