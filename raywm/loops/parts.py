"""What a run's config builds, in whatever process: models, trainers, dream workers, agents."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch

from raywm.agent import Agent, MixedAgent, RandomAgent, StickyAgent
from raywm.config import CollectConfig, EnvConfig, RunConfig
from raywm.controllers import Controller, ControllerAgent
from raywm.data.episode import Episode
from raywm.data.store import DamagedError, EpisodeStore, Snapshot
from raywm.envs import make_env
from raywm.evaluate import open_loop_error
from raywm.fit import Trainer
from raywm.learners.fitness import DreamWorker
from raywm.models import build_model
from raywm.models.rssm import SIZES
from raywm.seeding import derive
from raywm.spaces import ActionCodec, columns_to_json, is_image

Played = tuple[int, int, float]  # episode number, steps, return; 0 steps: it broke and is kept out
DEFAULT_HORIZON = 1000  # of dreams of an environment that names no time limit


class Parts:
    """A config and what its environment says of itself: the one place where both meet."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.columns, self.codec, self.time_limit = described(config.env)
        self.horizon = config.dream.horizon or self.time_limit or DEFAULT_HORIZON
        self.spec = spec = specification(config, self.columns, self.codec)
        torch.manual_seed(derive(config.seed, "model"))
        built = build_model(**spec["model"])
        self.weights = {k: v.clone() for k, v in built.state_dict().items()}  # the first ones, of the run's seed
        self.controller = Controller(**spec["controller"])

    def spaces(self) -> dict[str, Any]:
        """What a run directory keeps of the environment, so that its agent and report need no environment."""
        columns = columns_to_json(self.columns)
        return {"action": self.codec.to_json(), "columns": columns, "horizon": self.horizon}

    def first_agent(self) -> Agent:
        """Who plays before there is a controller."""
        return first_agent(self.config.collect, self.codec)

    def agent(self, weights: dict[str, torch.Tensor], theta: np.ndarray, version: int = 0) -> ControllerAgent:
        model = build_model(**self.spec["model"])
        model.load_state_dict(weights)
        return ControllerAgent(model, self.controller, self.codec, theta, version=version)

    def dream_arguments(self) -> dict[str, Any]:
        """Arguments of every `DreamWorker` of the run."""
        d = self.config.dream
        return {
            "starts": self.config.evolve.rollouts,
            "horizon": self.horizon,
            "temperature": d.temperature,
            "sampled_ends": d.sampled_ends,
            "precision": d.precision,
            "threads": d.threads,
        }

    def dream_worker(self) -> DreamWorker:
        return DreamWorker(self.spec, **self.dream_arguments())

    def fit_worker(self) -> FitWorker:
        return FitWorker(self.spec, self.config.seed, self.fit_arguments())

    def fit_arguments(self) -> dict[str, Any]:
        """Arguments of the run's `FitWorker`. Threads are counted here, once: another count may round differently."""
        fit = self.config.fit
        return {k: v for k, v in fit if k != "labels"} | {"threads": fit.threads or cores()}


def described(config: EnvConfig) -> tuple[dict[str, Any], ActionCodec, int | None]:
    """What an environment says of itself: observation columns, its actions' codec, and the steps of its longest
    episode, if it has a limit."""
    env = make_env(config)
    try:
        space: Any = env.observation_space  # make_env gives a Dict
        limit = config.time_limit or time_limit(env)
        steps = -(-limit // config.action_repeat) if limit else None
        return dict(space.spaces), ActionCodec(env.action_space), steps
    finally:
        env.close()


def first_agent(collect: CollectConfig, codec: ActionCodec) -> Agent:
    """The policy that a config names."""
    if collect.policy == "random":
        return RandomAgent(codec)
    return {"sticky": StickyAgent, "mixed": MixedAgent}[collect.policy](codec, collect.hold)


def first_policy(collect: CollectConfig) -> str:
    """What ``first_agent`` is called."""
    return collect.policy if collect.policy == "random" else f"{collect.policy}, hold {collect.hold}"


def specification(config: RunConfig, columns: dict[str, Any], codec: ActionCodec) -> dict[str, Any]:
    """Arguments that rebuild a run's model and controller: "model" (of `build_model`), "controller" and "codec"."""
    m, c = config.model, config.controller
    shapes = {k: (tuple(box.shape), is_image(box)) for k, box in columns.items()}
    model: dict[str, Any] = {"kind": m.kind, "columns": shapes, "act_dim": codec.dim}
    if m.kind == "vm":
        model |= {"features": c.features, **m.model_dump(exclude={"kind", "kwargs"})}
    else:
        model |= m.kwargs
    with torch.device("meta"):  # only its size is asked for
        feat_dim = build_model(**model).feat_dim
    controller = {"feat_dim": feat_dim, "act_dim": codec.dim, "kind": c.kind, "hidden": c.hidden}
    return {"model": model, "controller": controller, "codec": codec}


def dreamer_specification(config: RunConfig, columns: dict[str, Any], codec: ActionCodec) -> dict[str, Any]:
    """Arguments that rebuild a Dreamer: "model" (of `build_model`), "actor" (of `Actor`), "codec" and "dreamer"."""
    shapes = {k: (tuple(box.shape), is_image(box)) for k, box in columns.items()}
    sizes = dict(config.rssm)
    units = sizes["units"] or SIZES[sizes["size"]]["units"]
    return {
        "model": {"kind": "rssm", "columns": shapes, "act_dim": codec.dim, **sizes},
        "actor": {
            "kind": codec.kind,
            "groups": codec.groups,
            "units": units,
            "layers": config.dreamer.actor_layers,
            "unimix": config.rssm.unimix,
        },
        "codec": codec,
        "dreamer": dict(config.dreamer),
    }


def time_limit(env: gymnasium.Env) -> int | None:
    """The steps after which the environment itself ends an episode, if it says."""
    spec = getattr(env, "spec", None)
    return getattr(spec, "max_episode_steps", None)


class FitWorker:
    """A trainer and what is measured of its model after a fit. Plain: `runtime` makes it an actor."""

    def __init__(self, spec: dict[str, Any], seed: int, fit: dict[str, Any]):
        fit = dict(fit)
        torch.set_num_threads(fit.pop("threads"))
        gpu = fit.pop("num_gpus") > 0
        if gpu and not torch.cuda.is_available():
            raise ValueError("got fit.num_gpus > 0, but this torch sees no GPU; install a CUDA build, or set it to 0")
        device = "cuda" if gpu else "cpu"
        self.seed, self.codec, self.held_out = seed, spec["codec"], fit["held_out"]
        self.trainer = Trainer(build_model(**spec["model"]), seed, device=device, **fit)

    def load(self, weights: dict[str, torch.Tensor], optimisers: dict[str, torch.Tensor]) -> None:
        """Go back to the state that a fit begins from: what the driver holds, so that a repeated fit is the same."""
        self.trainer.model.load_state_dict(weights)
        self.trainer.load_optimisers(optimisers)

    def fit(self, snapshot: Snapshot, iteration: int, report: Any = lambda **_: None) -> dict[str, Any]:
        """Fit to a snapshot.

        Returns:
            "weights", "optimisers" (flat dicts of CPU tensors), "rows" (metrics by look), "starts" (the first
            observations as encoded), "quality" (open-loop error on held-out episodes).
        """
        trainer = self.trainer
        rows = trainer.fit(snapshot, iteration, report)
        _, held = snapshot.split(self.held_out)
        model = trainer.model.cpu().eval()
        rng = torch.Generator().manual_seed(derive(self.seed, "open-loop", iteration))
        latents = [trainer.latents[e.id] for e in held.episodes]
        quality = open_loop_error(model, self.codec, held.episodes, latents, rng)
        firsts = [trainer.latents[e.id] for e in snapshot.episodes]
        starts = {k: torch.from_numpy(np.stack([columns[k][0] for columns in firsts])) for k in firsts[0]}
        weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        trainer.model.to(trainer.device)
        return {
            "weights": weights,
            "optimisers": trainer.optimiser_tensors(),
            "rows": rows,
            "starts": starts,
            "quality": quality,
            "ids": [e.id for e in snapshot.episodes],
        }


def whole(episodes: Sequence[Episode], ids: Sequence[str], codec: ActionCodec) -> Snapshot:
    """What can be read of the run's episodes `ids`. Raises ValueError if that is not enough to go on with."""
    if len(episodes) < max(2, len(ids) / 2) and len(episodes) < len(ids):
        raise ValueError(
            f"{len(ids) - len(episodes)} of this run's {len(ids)} episodes are gone or damaged, too few are left to go "
            "on; put the files of its episodes/ back and continue with --resume, or start a new run in another --out"
        )
    return Snapshot(list(episodes), codec)


def units(theta: np.ndarray, size: int) -> list[np.ndarray]:
    """(P, D) cut into units of `size` controllers, the last filled up with its own last row: one shape for all."""
    short = -len(theta) % size
    padded = np.concatenate([theta, np.repeat(theta[-1:], short, 0)])
    return list(padded.reshape(-1, size, theta.shape[1]))


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, int]:
    """Units' fitnesses as one (P,), and the dream steps of those that count: what fills up a unit does not."""
    return np.concatenate([p[0] for p in parts])[:count], int(np.concatenate([p[1] for p in parts])[:count].sum())


def stored(store: EpisodeStore, stream: str, first: int = 0, numbers: Sequence[int] | None = None) -> list[Played]:
    """What a store holds of a stream's episodes: of `numbers`, or of all from number `first` on; broken ones as well.

    An episode is a function of its number and of who played it, so one that was written before a crash counts."""
    if numbers is None:
        ids = [id for id in (*store.ids(), *store.broken) if re.fullmatch(rf"{re.escape(stream)}-\d{{9,}}", id)]
        numbers = [number for id in ids if (number := int(id.rpartition("-")[2])) >= first]
    found: list[Played] = []
    for number in numbers:
        id = f"{stream}-{number:09d}"
        if not store.known(id):
            continue
        try:
            found.append((number, *store.length(id)))
        except (DamagedError, KeyError):
            continue  # it is forgotten now (or evicted), and played again
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """Possibly endless numbers, `size` at a time."""
    numbers = iter(numbers)
    while chunk := list(itertools.islice(numbers, size)):
        yield chunk


def in_order(results: Iterable[tuple[int, int, float]], first: int) -> Iterator[tuple[int, int, float]]:
    """Results (number, ...) in the order of their numbers from `first` on, each as soon as those before it are in."""
    waiting: dict[int, tuple[int, int, float]] = {}
    for result in results:
        waiting[result[0]] = result
        while first in waiting:
            yield waiting.pop(first)
            first += 1
