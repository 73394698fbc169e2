"""How the trials of a search stand: read from their run directories, without Ray."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raywm import config as configs
from raywm.log import read_rows
from raywm.search import SearchConfig

TRIALS, TRIAL, FAILED, SOURCE = "trials", "trial.json", "failed.json", "source"
HORIZONS = (50, 15, 5, 1)  # of the open-loop errors in a "quality" row; the longest that could be measured counts


@dataclass
class Report:
    """One report of a trial: what its controller is worth after so many turns or evaluations."""

    turn: int
    real_return: float
    model_quality: float | None
    score: float | None  # None: the metric asks for a model quality that was not measured


class Scores:
    """What a run's rows of metrics say, as a search counts it. Higher is better, in everything.

    real_return: of the controller that the run would be evaluated with now: V-M-C's best trial so far, Dreamer's last.
    model_quality: V-M-C: 1 - its open-loop error on held-out episodes, at most 1 and 0 for guessing the mean; Dreamer:
    minus its model's loss.
    """

    def __init__(self, weights: Mapping[Any, float], algorithm: str):
        self.weights, self.algorithm = dict(weights), algorithm
        self.real_env_steps = 0
        self._quality: float | None = None
        self._returns: dict[int, float] = {}  # by turn; one that is done again after a restart counts once
        self._qualities: dict[int, float | None] = {}

    def take(self, row: Mapping[str, Any]) -> bool:
        """Hear of a row; whether it is a new report."""
        self.real_env_steps = row.get("real_env_steps") or self.real_env_steps
        if row["kind"] == "quality":
            errors = [row.get(f"open_loop_{k}") for k in HORIZONS]
            self._quality = next((1 - e for e in errors if e is not None and math.isfinite(e)), None)
        elif row["kind"] == "train" and row.get("model_loss") is not None:
            self._quality = -row["model_loss"]
        elif row["kind"] == "trial":
            turn = row["iteration"] + 1 if self.algorithm == "vmc" else len(self._returns) + 1
            self._returns[turn], self._qualities[turn] = row["return_mean"], self._quality
            return True
        return False

    def report(self) -> Report | None:
        """The last one."""
        reports = self.reports()
        return reports[-1] if reports else None

    def reports(self) -> list[Report]:
        """All, in order."""
        found, best = [], -math.inf
        for turn, real in sorted(self._returns.items()):
            best = max(best, real)
            real, quality = best if self.algorithm == "vmc" else real, self._qualities[turn]
            if quality is None and self.algorithm == "dreamer":
                quality = self._quality  # evaluated before the first word of the losses
            score: float | None = self.weights.get("real_return", 0.0) * real
            if "model_quality" in self.weights:
                score = None if quality is None else (score or 0.0) + self.weights["model_quality"] * quality
            found.append(Report(turn, real, quality, score))
        return found


@dataclass
class Trial:
    """One trial, as its directory shows it."""

    name: str
    path: Path
    values: dict[str, Any]
    reports: list[Report] = field(default_factory=list)
    status: str = "waiting"
    error: str = ""
    copied_from: str | None = None

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    @property
    def score(self) -> float | None:
        return self.last.score if self.last else None


def standings(search: SearchConfig, out: Path) -> list[Trial]:
    """The trials, best first; those without a score last. A trial that went on as a copy of another counts as it is
    now."""
    now: dict[str, Trial] = {}
    algorithm = search.run_config().algorithm
    for path in directories(out):
        trial = _trial(path, search, algorithm)
        now[trial.name] = trial  # a later directory of the same trial
    return sorted(now.values(), key=_rank)


def directories(out: Path) -> list[Path]:
    """Run directories of trials, of one trial in the order in which it had them."""
    found = [p for p in (out / TRIALS).glob("*") if (p / TRIAL).is_file()]
    return sorted(found, key=lambda p: [int(part) for part in re.findall(r"\d+", p.name)])


def _trial(path: Path, search: SearchConfig, algorithm: str) -> Trial:
    about = json.loads((path / TRIAL).read_text())
    scores = Scores(search.metric, algorithm)
    for row in read_rows(path / "metrics.jsonl"):
        scores.take(row)
    trial = Trial(about["trial"], path, about["values"], scores.reports(), copied_from=about.get("from"))
    if (path / FAILED).is_file():
        trial.status, trial.error = "failed", json.loads((path / FAILED).read_text())["error"]
    elif (path / "summary.json").is_file():
        trial.status = "done"
    elif trial.reports:
        trial.status = "stopped"
    return trial


def _rank(trial: Trial) -> tuple[Any, ...]:
    last = trial.last
    if trial.status == "failed" or last is None or last.score is None:
        return (1, 0.0, 0.0, trial.name)
    return (0, -last.score, -(last.model_quality or 0.0), trial.name)


# ------------------------------------------------------------------------------------------------ real steps


def real_steps(run: Path) -> dict[str, int]:
    """Real steps of a run by what they were for: "collected" to train on (V-M-C's trials are data as well, but not
    where the data is given), "trials" that only decided, "evaluated" at its end."""
    counts = {"collected": 0, "trials": 0, "evaluated": 0}
    last = decided = 0
    for row in read_rows(run / "metrics.jsonl"):
        last = row.get("real_env_steps") or last
        steps = round(row.get("episodes", 0) * row.get("length_mean", 0)) if row["kind"] in ("trial", "evaluate") else 0
        if row["kind"] == "evaluate":
            counts["evaluated"] = steps
        decided += steps if row["kind"] == "trial" else 0
    config = configs.load(run / "config.yaml")
    if config.algorithm == "dreamer" or config.data is not None:
        counts["trials"] = decided
    counts["collected"] = last if config.data is None else last - decided
    return counts


def spent(out: Path) -> dict[str, int]:
    """What a search played in reality: by its trials (a copy's steps before it was one are the other's), and once for
    all of them ("shared": the steps of the common data)."""
    total = {"collected": 0, "trials": 0, "evaluated": 0, "shared": 0}
    for path in directories(out):
        inherited = json.loads((path / TRIAL).read_text()).get("inherited", {})
        for kind, steps in real_steps(path).items():
            total[kind] += steps - inherited.get(kind, 0)
        if (path / "data.json").is_file():
            total["shared"] = json.loads((path / "data.json").read_text())["steps"]
    return total
