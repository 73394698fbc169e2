"""A run as its report sees it: metrics, saved model, episodes. Reading changes nothing in the directory."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raywm.data.episode import Episode
from raywm.data.store import EpisodeStore, Snapshot
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.log import read_rows
from raywm.loops.saved import Saved, SavedDreamer, SavedRun
from raywm.loops.vmc import BLOCK, TRIALS
from raywm.seeding import derive
from raywm.spaces import is_image

Row = dict[str, Any]


class Logged(SavedRun):
    """A run's directory with what was logged: `rows` of metrics.jsonl, `summary` (None while there is none)."""

    def __init__(self, run: str | Path):
        super().__init__(run)
        self.rows = read_rows(self.path / "metrics.jsonl")
        summary = self.path / "summary.json"
        self.summary: Row | None = json.loads(summary.read_text()) if summary.is_file() else None

    def kind(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] in kinds]

    @property
    def images(self) -> list[str]:
        return [name for name, box in self.columns.items() if is_image(box)]

    @property
    def vectors(self) -> list[str]:
        return [name for name, box in self.columns.items() if not is_image(box)]

    def seed(self, *path: int | str) -> int:
        return derive(self.config.seed, "report", *path)

    def rng(self, *path: int | str) -> np.random.Generator:
        return np.random.default_rng(self.seed(*path))


class DreamerRun(Logged, SavedDreamer):
    """A Dreamer run: of its policies the one that counts, the first that reached the target or else the last."""

    @cached_property
    def trained(self) -> DreamerAgent:
        """The greedy agent, and the model that it acts by. ValueError: none yet."""
        return self.agent()


class Run(Logged, Saved):
    """A V-M-C run, with what was logged and what was played."""

    @property
    def vm(self) -> bool:
        """Whether the model is V and M; another one may have no latent z."""
        return self.config.model.kind == "vm"

    @property
    def learned(self) -> list[str]:
        """Columns that V compresses; the others are standardised, which loses nothing."""
        return self.images + [name for name in self.vectors if self.config.model.vision == "mlp"]

    @cached_property
    def snapshot(self) -> Snapshot:
        """The episodes that the run has accepted; all that are there if no checkpoint says which."""
        path = self.path / "episodes"
        if not path.is_dir():
            return Snapshot([], self.codec)
        store = EpisodeStore(path, codec=self.codec, read_only=True)
        try:
            return Snapshot(store.readable(self.state.get("accepted", store.ids())), self.codec)
        finally:
            store.close()

    @cached_property
    def held_out(self) -> list[Episode]:
        """Episodes that no fit has trained on; all of them if there are too few to hold any out."""
        if len(self.snapshot) < 2:
            return list(self.snapshot.episodes)
        return list(self.snapshot.split(self.config.fit.held_out)[1].episodes)

    @property
    def trials(self) -> list[Episode]:
        """The controller's own episodes, of the turn that `model` and `theta` are of."""
        return [e for e in self.snapshot.episodes if is_trial(e) and number(e) // BLOCK == self.iteration]


def number(episode: Episode) -> int:
    """The number that the loop gave an episode: the last part of its id."""
    tail = episode.id.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else 0


def is_trial(episode: Episode) -> bool:
    return number(episode) % BLOCK >= TRIALS
