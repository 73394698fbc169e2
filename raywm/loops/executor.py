"""Who does a loop's work: everything in this process. `raywm.runtime.executor` is its twin on Ray.

A loop asks for six things: play episodes (kept or not), fit, and dream (fitness of controllers, a rating, scripted
actions, a REINFORCE update). Both executors run the same plain classes in the same shapes, so both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raywm.collect import Collector
from raywm.config import CollectConfig, EnvConfig, ReplayConfig, RunConfig
from raywm.data.store import EpisodeStore
from raywm.loops.parts import Parts, Played, chunks, joined, stored, units, whole


class LocalRollouts:
    """A collector and the store that it fills: the twin of `raywm.runtime.rollouts.Rollouts` in one process."""

    deaths = 0

    def __init__(
        self,
        env: EnvConfig,
        collect: CollectConfig,
        replay: ReplayConfig,
        seed: int,
        directory: Path,
        columns: dict[str, Any],
        codec: Any,
    ):
        if replay.storage is not None or replay.shards != "driver":
            raise ValueError("replay.storage and replay.shards are for Ray, got them with --in-process; leave it out")
        capacity = replay.capacity_mb
        self.config = collect
        self.store = EpisodeStore(
            directory,
            columns,
            codec,
            segment_bytes=int(replay.segment_mb * 2**20),
            capacity_bytes=None if capacity is None else int(capacity * 2**20),
        )
        self.collector = Collector(env, seed, collect.envs)
        self._common = {"collector": "in-process", "env_config": env.model_dump(mode="json")}
        self._agent: Any = None

    def set_agent(self, agent: Any) -> None:
        """The agent that plays from now on."""
        self._agent = agent

    def collect(self, numbers: Iterable[int], stream: str, left: Any = None) -> Iterator[Played]:
        """Play and store episodes; see `Rollouts.collect`."""
        for chunk in chunks(numbers, self.config.envs):
            have = [played for played in stored(self.store, stream, numbers=chunk) if played[1]]
            yield from have
            done = {number for number, *_ in have}
            fresh = [number for number in chunk if number not in done]
            for block, played in self.collector.blocks(self._agent, fresh, stream, common=self._common):
                self.store.add(block)
                for p in played:
                    yield (p.number, 0, math.nan) if p.broken else (p.number, p.steps, p.ret)

    def play(self, numbers: Sequence[int], stream: str) -> list[Played]:
        """Play episodes without keeping them, in order of their numbers."""
        return sorted((n, steps, ret) for n, ret, steps, *_ in self.collector.play(self._agent, numbers, stream))

    def real_fitness(self, theta: np.ndarray, numbers: Sequence[int], stream: str) -> tuple[np.ndarray, int]:
        """Mean real returns (P,) of controllers (P, D), each playing the same episodes; and the steps it took."""
        returns, steps = [], 0
        for candidate in theta:
            self._agent.theta = candidate
            played = self.play(numbers, stream)
            returns.append(float(np.mean([p[2] for p in played])))
            steps += sum(p[1] for p in played)
        return np.array(returns), steps

    def settle(self) -> None:
        """See what was written onto the disk."""
        self.store.seal()

    def stored(self, stream: str, first: int) -> dict[int, Played]:
        """Episodes of a stream that are in the store, from number `first` on, by their numbers."""
        return {played[0]: played for played in stored(self.store, stream, first)}

    def verify(self) -> list[dict[str, Any]]:
        """Hold every byte against its CRC; see `EpisodeStore.verify`."""
        return [self.store.verify()]

    def close(self) -> None:
        self.collector.close()
        self.store.close()


class InProcess:
    """All of a run's work in one process, one thing after the other, without Ray."""

    deaths = 0

    def __init__(self, config: RunConfig, out: Path, say: Callable[[str], None] = print):
        self.config, self.parts = config, Parts(config)
        columns, codec = self.parts.columns, self.parts.codec
        self.rollouts = LocalRollouts(
            config.env, config.collect, config.replay, config.seed, out / "episodes", columns, codec
        )
        self.fitter, self.dreamer = self.parts.fit_worker(), self.parts.dream_worker()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.rollouts.close()

    # ------------------------------------------------------------------------------------------------ the model

    def fit(
        self,
        weights: dict[str, torch.Tensor],
        optimisers: dict[str, torch.Tensor],
        ids: Sequence[str],
        iteration: int,
        report: Callable[..., None],
    ) -> dict[str, Any]:
        """Fit from these weights to these episodes; see `FitWorker.fit`."""
        self.fitter.load(weights, optimisers)
        torch.set_num_threads(self.parts.fit_arguments()["threads"])
        return self.fitter.fit(whole(self.rollouts.store.readable(ids), ids, self.parts.codec), iteration, report)

    def load_dream(self, weights: dict[str, torch.Tensor], starts: dict[str, torch.Tensor]) -> None:
        """The model that is dreamt in from now on."""
        torch.set_num_threads(self.config.dream.threads)  # of all dreams that follow
        self.dreamer.load(weights, starts)

    def fitness(self, theta: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        """Mean dream returns (P,) of controllers (P, D) and the dream steps it took."""
        parts = [self.dreamer.evaluate(unit, seed) for unit in units(theta, self.config.dream.unit)]
        return joined(parts, len(theta))

    def rate(self, theta: np.ndarray, seed: int) -> tuple[float, int]:
        """One controller's mean return over many dreams."""
        return self.dreamer.rate(theta, seed)

    def scripted(self, actions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Dream returns and lengths (E,) of given actions (H, E, A)."""
        return self.dreamer.scripted(actions, seed)

    def reinforce(self, state: dict[str, np.ndarray], seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """One REINFORCE update in the dream."""
        return self.dreamer.reinforce(state, seed)
