"""Collectors as Ray actors: episodes go straight to the store's actor, the driver hears only of counters."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from raywm.agent import Agent
from raywm.collect import Collector, Played
from raywm.config import EnvConfig
from raywm.data.episode import Episode

if TYPE_CHECKING:
    from raywm.data.store import EpisodeStore

SENT_AT_ONCE = 256 * 1024  # bytes: shorter episodes share a call to the store, which costs more than playing them
UNACKNOWLEDGED = 4  # calls on their way to the store while the next episode is played


def _add_all(store: EpisodeStore, episodes: Sequence[Episode]) -> None:
    for episode in episodes:
        store.add(episode)


class RayCollector:
    """A Collector whose episodes go to a store. Runs in a WorkerPool; the agent comes by `broadcast("set_agent", ...)`.

    `threads` is what a model that acts may use; it is part of a run's bits and must not vary between workers.
    """

    def __init__(self, env: EnvConfig | Mapping[str, Any], seed: int, envs: int = 8, threads: int = 1) -> None:
        self.collector = Collector(env, seed, envs)
        self._threads = threads
        self._agent: Agent | None = None

    def set_agent(self, agent: Agent, version: int) -> None:
        if "torch" in sys.modules:  # the agent brought it along; a random one must not cost its import
            import torch

            torch.set_num_threads(self._threads)
        agent.version = version
        self._agent = agent

    def collect_to(
        self, store: ActorHandle, numbers: Sequence[int], stream: str = "collect"
    ) -> list[tuple[int, int, float]]:
        """Play episodes into `store` (a ray.remote(EpisodeStore)); [(number, steps, return)], by completion.

        An episode is reported only once the store has acknowledged it: from then on it survives this actor. Episodes
        travel as they are: their arrays are as zero-copy as Arrow's, and the store would unwrap a table first.
        """
        played, calls, sending, size = [], deque(), [], 0
        for episode in self.collector.collect(self._acting(), numbers, stream):
            sending.append(episode)
            played.append((episode.info["number"], episode.steps, episode.ret))
            size += sum(column.nbytes for column in episode.columns().values())
            if size >= SENT_AT_ONCE:
                calls.append(store.__ray_call__.remote(_add_all, sending))
                sending, size = [], 0
                if len(calls) > UNACKNOWLEDGED:
                    ray.get(calls.popleft())
        calls.append(store.__ray_call__.remote(_add_all, sending))
        ray.get(list(calls))
        return played

    def play(self, numbers: Sequence[int], stream: str = "evaluate") -> list[Played]:
        return self.collector.play(self._acting(), numbers, stream)

    def _acting(self) -> Agent:
        if self._agent is None:
            raise RuntimeError('no agent; call broadcast("set_agent", agent, version) on the pool first')
        return self._agent
