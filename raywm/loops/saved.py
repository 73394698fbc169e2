"""What a run directory holds of a run: read back without Ray, without its environment, changing nothing."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from raywm import checkpoint
from raywm import config as configs
from raywm.agent import Agent, LiveAgent
from raywm.controllers import Controller, ControllerAgent
from raywm.data.dataset import Dataset
from raywm.data.episode import Episode
from raywm.data.store import DamagedError
from raywm.learners.actor import Actor
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.loops.parts import dreamer_specification, specification
from raywm.models import build_model
from raywm.models.base import WorldModel
from raywm.models.heads import Head
from raywm.spaces import ActionCodec, columns_from_json


def open_run(run: str | Path) -> SavedRun:
    """A run of any algorithm from its directory."""
    algorithm = SavedRun(run).config.algorithm
    return SavedDreamer(run) if algorithm == "dreamer" else Saved(run)


class SavedRun:
    """What the directory of any run holds; it may still be going on, or have been stopped anywhere.

    Attributes: config, codec, columns, horizon; state: the last checkpoint's JSON; made_by: the raywm that wrote it.
    Raises ValueError: not a run directory, or one that was stopped before it knew its spaces.
    """

    def __init__(self, run: str | Path):
        self.path = Path(run)
        if not (self.path / "config.yaml").is_file():
            raise ValueError(
                f"{self.path} has no config.yaml, expected the directory of a run, e.g. runs/cartpole-seed0"
            )
        self.config = configs.load(self.path / "config.yaml")
        if not (self.path / "spaces.json").is_file():
            raise ValueError(
                f"{self.path} has no spaces.json: the run was stopped at its start; continue it with --resume"
            )
        try:
            spaces = json.loads((self.path / "spaces.json").read_text())
            self.codec, self.columns = ActionCodec.from_json(spaces["action"]), columns_from_json(spaces["columns"])
            self.horizon = int(spaces["horizon"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}/spaces.json is damaged ({error}); continue the run with --resume") from None
        self.state: dict[str, Any] = {}
        self.made_by = "unknown"

    def agent(self) -> Agent:
        """The trained agent; raises ValueError if there is none yet."""
        raise NotImplementedError

    def live(self) -> LiveAgent:
        return LiveAgent(self.agent(), self.codec, self.columns, self.config.seed)

    def world_model(self) -> WorldModel:
        """The model that the trained agent acts by, for dreams; raises ValueError if there is none yet."""
        raise NotImplementedError

    def episodes(self) -> list[Episode]:
        """The run's own real episodes that can be read, as they are now, in the order of their ids: those it has
        accepted, where it says which."""
        accepted = self.state.get("accepted")
        found = []
        with Dataset(self.path) as dataset:
            for id in dataset.ids() if accepted is None else sorted(set(accepted) & set(dataset.ids())):
                with contextlib.suppress(DamagedError, KeyError):
                    found.append(dataset.get(id))
        return found


def check_dreamer(
    spec: dict[str, Any], tensors: dict[str, Any], where: str | Path, made_by: str, learner: bool = False
) -> None:
    """Raise ValueError, in one line, unless the weights of a policy (or of a `learner`) are what `spec` builds."""
    with torch.device("meta"):  # only names and shapes are asked for
        model = build_model(**spec["model"])
        parts: dict[str, Any] = {"model": model, "actor": Actor(model.feat_dim, model.act_dim, **spec["actor"])}
        if learner:
            bins = spec["model"].get("bins", 255)
            critic = Head(model.feat_dim, spec["actor"]["units"], spec["actor"]["layers"], bins)
            parts |= {"critic": critic, "slow_critic": critic}
    known = {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}
    found = {k: v for k, v in tensors.items() if k.startswith(tuple(f"{part}." for part in parts))}
    checkpoint.same_parameters(found, known, where, made_by)


class SavedDreamer(SavedRun):
    """A Dreamer run: `policy` (tensors) and `version` (updates) of its agent, or `why` there is none yet; all `tensors`
    of its last checkpoint."""

    def __init__(self, run: str | Path):
        super().__init__(run)
        self.policy: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}
        self.why = f"{self.path} has no trained policy yet; continue the run with --resume"
        try:
            saved = checkpoint.load(self.path / "checkpoints", read_only=True)
        except FileNotFoundError as error:
            self.why = str(error)
            return
        self.state, self.tensors, self.made_by = saved.state, saved.tensors, saved.made_by
        self.policy = self.tensors.get("policy", {})

    @property
    def version(self) -> int:
        return self.state.get("version", 0)

    def agent(self) -> DreamerAgent:
        """The greedy agent; its model is whole, with decoder and heads."""
        if not self.policy:
            raise ValueError(self.why)
        spec = dreamer_specification(self.config, self.columns, self.codec)
        check_dreamer(spec, self.policy, self.path, self.made_by)
        return DreamerAgent(spec, self.policy, self.version, greedy=True)

    def world_model(self) -> WorldModel:
        return self.agent().model


class Saved(SavedRun):
    """A V-M-C run.

    Attributes: model, theta: the best ones by their trial in reality, or the present ones before any trial. model is
        None before the first fit; `why` then says so. starts: the first observations of the real episodes, as the
        present model encodes them, where dreams begin; leaves (N, *).
    """

    def __init__(self, run: str | Path):
        super().__init__(run)
        if self.config.algorithm != "vmc":
            raise ValueError(f"{self.path} is a run of {self.config.algorithm}, expected one of vmc")
        own = self.config.model.kind.partition(":")[0]
        if ":" in self.config.model.kind and own not in sys.modules:
            raise ValueError(
                f"{self.path} has a world model of its own, {self.config.model.kind}; import {own} first, if you trust "
                "it: what is loaded from a run does not import code"
            )
        self.spec = specification(self.config, self.columns, self.codec)
        self.controller = Controller(**self.spec["controller"])
        self.model: Any = None
        self.theta: Any = None
        self.starts: dict[str, Any] = {}
        self.why = ""
        self._load()

    def _load(self) -> None:
        try:
            saved = checkpoint.load(self.path / "checkpoints", read_only=True)
        except FileNotFoundError as error:
            self.why = str(error)
            return
        self.state, self.made_by = saved.state, saved.made_by
        tried = saved.state.get("best_trial") is not None
        if not tried and not saved.tensors.get("starts"):
            self.why = f"{self.path} has no fitted model yet; continue the run with --resume"
            return
        self.starts = saved.tensors.get("starts", {})
        self.model = build_model(**self.spec["model"])
        weights = saved.tensors["best_model" if tried else "model"]
        checkpoint.same_parameters(weights, self.model.state_dict(), self.path, self.made_by)
        self.model.load_state_dict(weights)
        self.model.eval()
        self.theta = saved.arrays["controller"]["best" if tried else "theta"]

    @property
    def iteration(self) -> int:
        """The turn of the loop that `model` and `theta` are of."""
        best = self.state.get("best_trial") is not None
        return self.state.get("best_iteration" if best else "iteration", 0)

    def world_model(self) -> WorldModel:
        if self.model is None:
            raise ValueError(self.why)
        return self.model

    def agent(self) -> ControllerAgent:
        """V, M and C; raises ValueError if there is no fitted model yet."""
        if self.model is None:
            raise ValueError(self.why)
        return ControllerAgent(self.model, self.controller, self.codec, self.theta, version=self.iteration)
