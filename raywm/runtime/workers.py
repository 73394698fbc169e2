"""The plain classes of a run as they live in Ray actors: what holds episodes, plays, fits and dreams."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raywm.collect import Collector
from raywm.data.episode import from_table, to_table
from raywm.data.store import EpisodeStore


class StoreWorker:
    """The run's episode store. Episodes wait here until the loop says which of them count; then they are written.

    Every method may be repeated: a duplicate changes nothing, so calls lost with this actor are simply made again.
    """

    def __init__(self, path: str, columns: dict[str, Any], codec: Any):
        self._arguments = path, columns, codec
        self._store: EpisodeStore | None = None
        self._staged: dict[str, pa.Table] = {}

    @property
    def store(self) -> EpisodeStore:
        """Opened by the first call and not by the constructor, whose errors Ray would not pass on as themselves."""
        if self._store is None:
            path, columns, codec = self._arguments
            self._store = EpisodeStore(Path(path), columns=columns, codec=codec)
        return self._store

    def stage(self, id: str, table: pa.Table) -> None:
        """Hold an episode, by reference to the object store."""
        self._staged[id] = table

    def commit(self, ids: Sequence[str]) -> int:
        """Write these episodes, in this order, up to the first that is nowhere; how many are in the store now."""
        have = set(self.store.ids())
        for count, id in enumerate(ids):
            if id not in have and id not in self._staged:
                return count
            episode = self._staged.pop(id, None)
            if id not in have:
                self.store.add(episode)
        return len(ids)

    def kept(self, first: int, stream: str) -> list[tuple[int, int, float]]:
        """See `raywm.loops.parts.stored`."""
        from raywm.loops.parts import stored

        return list(stored(self.store, first, stream))

    def settle(self) -> None:
        """Forget what is still held, and see what was written onto the disk."""
        self._staged.clear()
        self.store.seal()

    def where(self) -> tuple[str, str]:
        """Node and path, for readers that can map the segments themselves."""
        return ray.get_runtime_context().get_node_id(), str(self.store.path)

    def read(self, ids: Sequence[str]) -> list[pa.Table]:
        """Episodes for a reader on another machine."""
        return [to_table(episode) for episode in self.store.readable(ids)]

    def close(self) -> None:
        self.store.close()


class CollectWorker:
    """A collector that hands its episodes to the store and tells the driver only their numbers, steps and returns."""

    def __init__(self, env: Any, seed: int, envs: int, store: Any):
        self.collector = Collector(env, seed, envs)
        self.store = store
        self.agent: Any = None

    def set_agent(self, agent: Any) -> None:
        self.agent = agent
        if "torch" in sys.modules:  # came with the agent
            sys.modules["torch"].set_num_threads(1)

    def collect(self, numbers: Sequence[int], stream: str) -> list[tuple[int, int, float]]:
        """Play and stage episodes; returns when the store holds them all."""
        out, held = [], []
        for episode in self.collector.collect(self.agent, numbers, stream):
            held.append(self.store.stage.remote(episode.id, to_table(episode)))
            ret = float(episode.reward.sum(dtype=np.float64))
            out.append((int(episode.info["number"]), len(episode) - 1, ret))
        ray.get(held)
        return out

    def play(self, numbers: Sequence[int], stream: str) -> list[tuple[int, int, float]]:
        """Play episodes without keeping them."""
        return [(p.number, p.steps, p.ret) for p in self.collector.play(self.agent, numbers, stream)]

    def real_fitness(self, theta: np.ndarray, numbers: Sequence[int], stream: str) -> list[tuple[int, int, float]]:
        """Play episodes with one controller's parameters (D,)."""
        self.agent.theta = theta
        return self.play(numbers, stream)


class FitActor:
    """A `FitWorker` that reads its episodes from the store: by mapping its segments where it can."""

    def __init__(self, spec: dict[str, Any], seed: int, fit: dict[str, Any], store: Any, board: Any):
        from raywm.loops.parts import FitWorker

        self.worker, self.store, self.board, self.codec = FitWorker(spec, seed, fit), store, board, spec["codec"]

    def load(self, weights: dict[str, Any], optimisers: dict[str, Any]) -> None:
        self.worker.load(weights, optimisers)

    def fit(self, ids: Sequence[str], iteration: int) -> dict[str, Any]:
        from raywm.loops.parts import whole

        node, path = ray.get(self.store.where.remote())
        local = None
        if node == ray.get_runtime_context().get_node_id():
            local = EpisodeStore(Path(path), codec=self.codec, read_only=True)
            episodes = local.readable(ids)
        else:
            episodes = []
            for at in range(0, len(ids), 16):
                tables = ray.get(self.store.read.remote(ids[at : at + 16]))
                episodes += [from_table(t) for t in tables]
        try:
            return self.worker.fit(whole(episodes, ids, self.codec), iteration, self._report)
        finally:
            del episodes
            if local is not None:
                local.close()

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
