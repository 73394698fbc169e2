"""What a run directory holds of a run: read back without Ray, without its environment, changing nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raywm import checkpoint
from raywm import config as configs
from raywm.agent import Agent, LiveAgent
from raywm.controllers import Controller, ControllerAgent
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.loops.parts import dreamer_specification, specification
from raywm.models import build_model
from raywm.spaces import ActionCodec, columns_from_json


def open_run(run: str | Path) -> SavedRun:
    """A run of any algorithm from its directory."""
    algorithm = SavedRun(run).config.algorithm
    return SavedDreamer(run) if algorithm == "dreamer" else Saved(run)


class SavedRun:
    """What the directory of any run holds; it may still be going on, or have been stopped anywhere.

    Attributes: config, codec, columns, horizon; state: the last checkpoint's JSON.
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
        spaces = json.loads((self.path / "spaces.json").read_text())
        self.codec, self.columns = ActionCodec.from_json(spaces["action"]), columns_from_json(spaces["columns"])
        self.horizon: int = spaces["horizon"]
        self.state: dict[str, Any] = {}

    def agent(self) -> Agent:
        """The trained agent; raises ValueError if there is none yet."""
        raise NotImplementedError

    def live(self) -> LiveAgent:
        return LiveAgent(self.agent(), self.codec, self.columns, self.config.seed)


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
        self.state, self.tensors = saved.state, saved.tensors
        self.policy = self.tensors.get("policy", {})

    @property
    def version(self) -> int:
        return self.state.get("version", 0)

    def agent(self) -> Agent:
        """The greedy agent."""
        if not self.policy:
            raise ValueError(self.why)
        spec = dreamer_specification(self.config, self.columns, self.codec)
        return DreamerAgent(spec, self.policy, self.version, greedy=True)


class Saved(SavedRun):
    """A V-M-C run.

    Attributes: model, theta: the best ones by their trial in reality, or the present ones before any trial. model is
        None before the first fit; `why` then says so.
    """

    def __init__(self, run: str | Path):
        super().__init__(run)
        if self.config.algorithm != "vmc":
            raise ValueError(f"{self.path} is a run of {self.config.algorithm}, expected one of vmc")
        self.spec = specification(self.config, self.columns, self.codec)
        self.controller = Controller(**self.spec["controller"])
        self.model: Any = None
        self.theta: Any = None
        self.why = ""
        self._load()

    def _load(self) -> None:
        try:
            saved = checkpoint.load(self.path / "checkpoints", read_only=True)
        except FileNotFoundError as error:
            self.why = str(error)
            return
        self.state = saved.state
        tried = saved.state.get("best_trial") is not None
        if not tried and not saved.tensors.get("starts"):
            self.why = f"{self.path} has no fitted model yet; continue the run with --resume"
            return
        self.model = build_model(**self.spec["model"])
        try:
            self.model.load_state_dict(saved.tensors["best_model" if tried else "model"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: the saved model does not fit this raywm ({str(error).splitlines()[-1].strip()}); "
                "use the version that trained it"
            ) from None
        self.model.eval()
        self.theta = saved.arrays["controller"]["best" if tried else "theta"]

    @property
    def iteration(self) -> int:
        """The turn of the loop that `model` and `theta` are of."""
        best = self.state.get("best_trial") is not None
        return self.state.get("best_iteration" if best else "iteration", 0)

    def agent(self) -> ControllerAgent:
        """V, M and C; raises ValueError if there is no fitted model yet."""
        if self.model is None:
            raise ValueError(self.why)
        return ControllerAgent(self.model, self.controller, self.codec, self.theta, version=self.iteration)
