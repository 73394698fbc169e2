"""Who does a loop's work: Ray actors. The twin of `raywm.loops.executor.InProcess`, with the same bits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywm.config import RunConfig
from raywm.learners.fitness import DreamWorker
from raywm.loops.parts import Parts, joined, units
from raywm.runtime.cluster import beside, connect, on, user_modules
from raywm.runtime.needs import Need
from raywm.runtime.pool import WorkerPool
from raywm.runtime.rollouts import Rollouts
from raywm.runtime.workers import Board, FitActor


class _DreamActor(DreamWorker):
    def __init__(self, spec: dict[str, Any], arguments: dict[str, Any]):
        super().__init__(spec, **arguments)


def needs_of(config: RunConfig, threads: int) -> list[Need]:
    """The actors of a V-M-C run, whose trainer has so many threads."""
    dream, fit = config.dream, config.fit
    return [
        Need("collector", "collect.workers", config.collect.workers, labels=config.collect.labels),
        Need("dream worker", "dream.workers", dream.workers, dream.threads, labels=dream.labels),
        Need("trainer", "fit.threads", 1, threads, fit.num_gpus, fit.labels),
    ]


class RayExecutor:
    """Collectors, one trainer and a dream pool, none of which can stop a run by dying.

    Episodes go from collectors to replay shards and from there to the trainer; the driver sees counts, metrics and
    weights. Collectors and dream workers are pools: work of a
    dead or silent worker is done again by another, and since work is a function of its arguments, with the same result.

    Args:
        config: the run's; out: the run directory; address: of a running cluster, else a private local Ray starts.
    """

    def __init__(self, config: RunConfig, out: Path, address: str | None = None, say: Callable[[str], None] = print):
        self.config, self.parts, self.say = config, Parts(config), say
        fit = self.parts.fit_arguments()
        self.threads = fit["threads"] if config.fit.threads else 1  # all cores of a laptop are not asked for twice
        self._started = not ray.is_initialized()
        connect(address or config.address, needs_of(config, self.threads), modules=user_modules(config), say=say)
        self.node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(self.node, soft=False)
        self.rollouts = Rollouts(
            config.env,
            config.collect,
            config.replay,
            config.seed,
            Path(out) / "episodes",
            self.parts.columns,
            self.parts.codec,
            say=say,
            on_death=self._on_death,
        )
        self.board: Any = ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._pools: dict[str, WorkerPool] = {}
        count = -(-config.evolve.population // config.dream.unit)
        if config.dream.workers > count:
            say(
                f"a generation is {count} units of work, so {config.dream.workers - count} of dream.workers will idle; "
                "lower it, or raise evolve.population or lower dream.unit in a new run"
            )

    # ------------------------------------------------------------------------------------------------ workers

    def _pool(self, name: str) -> WorkerPool:
        """Pools start when they are first needed: a run that only fits starts no collectors."""
        if name not in self._pools:
            c, spec = self.config, self.parts.spec
            kinds: dict[str, Callable[[], dict[str, Any]]] = {
                "fit": lambda: {
                    "cls": FitActor,
                    "args": (spec, c.seed, self.parts.fit_arguments(), self.rollouts.shards.actors, self.board),
                    "count": 1,
                    "options": {
                        "num_cpus": self.threads,
                        "num_gpus": c.fit.num_gpus,
                        **beside(self.node, c.fit.labels),  # the episodes: elsewhere they go through the object store
                    },
                    "timeout_s": None,
                },
                "dream": lambda: {
                    "cls": _DreamActor,
                    "args": (spec, self.parts.dream_arguments()),
                    "count": c.dream.workers,
                    "options": {"num_cpus": c.dream.threads, **on(c.dream.labels)},
                    "timeout_s": c.dream.timeout_s,
                },
            }
            self._pools[name] = WorkerPool(name=name, on_death=self._on_death, say=self.say, **kinds[name]())
        return self._pools[name]

    def _on_death(self, pool: str, reason: str) -> None:
        self.say(f"{pool}: {reason}; its work goes to another")

    @property
    def deaths(self) -> int:
        """Workers that died and were replaced."""
        return self.rollouts.deaths + sum(pool.deaths for pool in self._pools.values())

    def pids(self) -> dict[str, list[int]]:
        """Process ids by pool, for tests that kill them."""
        return {"collect": self.rollouts.pids()} | {pool.name: pool.pids() for pool in self._pools.values()}

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in self._pools.values():
            pool.shutdown()
        with contextlib.suppress(Exception):
            self.rollouts.close()
        if self._started:
            ray.shutdown()
        else:
            ray.kill(self.board)

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
        pool = self._pool("fit")
        pool.broadcast("load", weights, optimisers)
        ray.get(self.board.put.remote(None))  # or the end of the last fit would pass for progress of this one
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                with contextlib.suppress(Exception):
                    if progress := ray.get(self.board.get.remote(), timeout=5):
                        report(**progress)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            ((_, result),) = pool.map("fit", [(iteration, (list(ids), iteration))])
            return result
        finally:
            done.set()
            thread.join(10)

    def load_dream(self, weights: dict[str, torch.Tensor], starts: dict[str, torch.Tensor]) -> None:
        """The model that is dreamt in from now on, sent once for all dream workers."""
        self._pool("dream").broadcast("load", weights, starts)

    def fitness(self, theta: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        """Mean dream returns (P,) of controllers (P, D) and the dream steps it took."""
        work = [(i, (unit, seed)) for i, unit in enumerate(units(theta, self.config.dream.unit))]
        done = dict(self._pool("dream").map("evaluate", work))
        parts = [done[i] for i in range(len(work))]
        return joined(parts, len(theta))

    def _one(self, method: str, *args: Any) -> Any:
        ((_, result),) = self._pool("dream").map(method, [(method, args)])
        return result

    def rate(self, theta: np.ndarray, seed: int) -> tuple[float, int]:
        """One controller's mean return over many dreams."""
        return self._one("rate", theta, seed)

    def scripted(self, actions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Dream returns and lengths (E,) of given actions (H, E, A)."""
        return self._one("scripted", actions, seed)

    def reinforce(self, state: dict[str, np.ndarray], seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """One REINFORCE update in the dream."""
        return self._one("reinforce", state, seed)
