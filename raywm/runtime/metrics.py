"""A run's counters in Ray's own metrics, where Prometheus finds them: ``ray_raywm_real_steps`` and the others.

Set in the driver, from the lines of metrics.jsonl: a sink like those of ``raywm.sinks``. Counters begin at 0 in every
process, as Prometheus expects; the run's totals are in its log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raywm.config import RunConfig
from raywm.log import read_rows

TAGS = ("run", "env", "algorithm")
# Counters: the column of a line that holds the run's total so far, meaning.
TOTALS = {
    "raywm_real_steps": ("real_env_steps", "Real environment steps of the run."),
    "raywm_updates": ("updates", "Updates of the learner."),
}
# Gauges: kind of line, column, meaning.
GAUGES = {
    "raywm_return": (("trial", "evaluate"), "return_mean", "Mean return of the last trial in reality."),
    "raywm_dream_return": (("dream",), "return_mean", "Mean return of the controller in its dream."),
    "raywm_dream_gap": (("trial",), "dream_gap", "Dream return minus real return."),
    "raywm_calibration_gap": (("calibration",), "calibration_gap", "The dream gap of the first policy."),
    "raywm_train_ratio": (("train",), "train_ratio", "Rows replayed per real step."),
}
EPISODES = "raywm_episodes"


class RayMetrics:
    """Counters of real steps, updates and episodes, and gauges of returns and gaps, tagged by run and environment."""

    def __init__(self, config: RunConfig, out: Path):
        self._tags = {"run": Path(out).name, "env": config.env.id, "algorithm": config.algorithm}
        self._made: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        for row in read_rows(Path(out) / "metrics.jsonl"):  # of a resumed run: counted by the process before
            for name, (column, _) in TOTALS.items():
                self._last[name] = max(self._last.get(name, 0), row.get(column) or 0)

    def _metric(self, name: str, kind: str, text: str) -> Any:
        from ray.util import metrics  # when there is something to count, Ray is up

        if name not in self._made:
            self._made[name] = getattr(metrics, kind)(name, description=text, tag_keys=TAGS)
            self._made[name].set_default_tags(self._tags)
        return self._made[name]

    def write(self, row: dict[str, Any], step: int) -> None:
        kind = row["kind"]
        for name, (column, text) in TOTALS.items():
            if (total := row.get(column)) is not None:
                more = total - self._last.get(name, 0)
                if more > 0:  # a learner that went back to its checkpoint does some again
                    self._metric(name, "Counter", text).inc(more)
                    self._last[name] = total
        if episodes := _episodes(row):
            self._metric(EPISODES, "Counter", "Real episodes that ended.").inc(episodes)
        for name, (kinds, column, text) in GAUGES.items():
            if kind in kinds and row.get(column) is not None:
                self._metric(name, "Gauge", text).set(row[column])

    def finish(self, summary: dict[str, Any]) -> None:
        if (dead := summary.get("worker_deaths")) is not None:
            self._metric("raywm_worker_deaths", "Gauge", "Workers that died and were replaced.").set(dead)

    def close(self, failed: bool) -> None:
        pass


def _episodes(row: dict[str, Any]) -> int:
    """Episodes that a line tells of: Dreamer logs each, V-M-C's collections and trials log how many."""
    if row["kind"] == "episode":
        return 1
    if "data" in row:  # another run's episodes, which this one only learns from
        return 0
    return row.get("episodes", 0) if row["kind"] in ("collect", "trial", "evaluate") else 0
