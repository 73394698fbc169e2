"""Who does a loop's work: everything in this process. `raywm.runtime.executor` is its twin on Ray.

A loop asks for six things: play episodes (kept or not), fit, and dream (fitness of controllers, a rating, scripted
actions, a REINFORCE update). Both executors run the same plain classes in the same shapes, so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raywm.collect import Collector
from raywm.config import RunConfig
from raywm.data.store import EpisodeStore
from raywm.loops.parts import Parts, Played, chunks, joined, stored, units, whole


class InProcess:
    """All of a run's work in one process, one thing after the other, without Ray."""

    deaths = 0

    def __init__(self, config: RunConfig, out: Path, say: Callable[[str], None] = print):
        self.config, self.parts = config, Parts(config)
        self.store = EpisodeStore(out / "episodes", columns=self.parts.columns, codec=self.parts.codec)
        self.collector = Collector(config.env, config.seed, config.collect.envs)
        self.fitter, self.dreamer = self.parts.fit_worker(), self.parts.dream_worker()
        self._staged: dict[int, Any] = {}
        self._agent: Any = None

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.collector.close()
        self.store.close()

    # ------------------------------------------------------------------------------------------------ reality

    def set_agent(self, agent: Any) -> None:
        """The agent that plays from now on."""
        self._agent = agent

    def collect(self, numbers: Iterable[int], stream: str) -> Iterator[Played]:
        """Play episodes `numbers` and hold them until `commit`; in the order of their ends."""
        for chunk in chunks(numbers, self.config.collect.envs):
            for episode in self.collector.collect(self._agent, chunk, stream):
                number = int(episode.info["number"])
                self._staged[number] = episode
                yield number, episode.steps, episode.ret

    def kept(self, first: int, stream: str) -> list[Played]:
        """The episodes from number `first` on, without a gap, that the store already holds."""
        return list(stored(self.store, first, stream))

    def commit(self, numbers: Sequence[int], stream: str) -> int:
        """Write these of the held episodes to the store, in this order; how many it still held, and has written."""
        for number in numbers:
            self.store.add(self._staged.pop(number))
        return len(numbers)

    def settle(self) -> None:
        """Forget what is still held, and see what was written onto the disk."""
        self._staged.clear()
        self.store.seal()

    def play(self, numbers: Sequence[int], stream: str) -> list[Played]:
        """Play episodes without keeping them, in order of their numbers."""
        played = [(n, steps, ret) for n, ret, steps, *_ in self.collector.play(self._agent, numbers, stream)]
        return sorted(played)

    def real_fitness(self, theta: np.ndarray, numbers: Sequence[int], stream: str) -> tuple[np.ndarray, int]:
        """Mean real returns (P,) of controllers (P, D), each playing the same episodes; and the steps it took."""
        returns, steps = [], 0
        for candidate in theta:
            self._agent.theta = candidate
            played = self.play(numbers, stream)
            returns.append(float(np.mean([p[2] for p in played])))
            steps += sum(p[1] for p in played)
        return np.array(returns), steps

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
        return self.fitter.fit(whole(self.store.readable(ids), ids, self.parts.codec), iteration, report)

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
