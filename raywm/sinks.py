"""Where metrics go beside metrics.jsonl and TensorBoard, if the config says so: Weights & Biases, MLflow.

A sink has three methods, all called by ``raywm.log.RunLog``: ``write(row, step)`` for a line of metrics.jsonl (`step`:
lines of its kind before it), ``finish(summary)`` at a run's end, ``close(failed)`` whatever happens. What it raises
while the run goes on ends the sink with a warning, never the run. Lines that a resume writes again are not told twice.
"""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

from raywm import config as configs
from raywm.checkpoint import atomic_write_json
from raywm.config import RunConfig

NAMES_FILE = "sinks.json"  # in the run's directory: what a resumed run is called there


def check_sinks(config: RunConfig) -> None:
    """Raise ValueError, naming the extra, if the config asks for a sink whose library is not installed."""
    for name in SINKS:
        if getattr(config.log, name) is not None:
            _library(name, config)


def open_sinks(config: RunConfig, out: Path, group: str | None = None) -> list[Any]:
    """The sinks that `config.log` names, for the run in `out`; a resumed run goes on where it was.

    `group`: the search that the run is a trial of; it stands before the run's name, and is W&B's group.
    Raises ValueError where a library is missing, OSError where it cannot begin: not logged in, no such server.
    """
    opened: list[Any] = []
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, sink in SINKS.items():
        wanted = getattr(config.log, name)
        if wanted is None:
            continue
        library = _library(name, config)
        try:
            opened.append(sink(library, wanted, Path(out), config, group))
        except Exception as error:
            for other in opened:
                other.close(True)
            raise OSError(f"log.{name}: got {wanted!r}, which {name} cannot open: {error}; {sink.fix}") from error
    return opened


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a line, as "kind/name"."""
    values = {k: v for k, v in row.items() if k not in ("kind", "time") and isinstance(v, (int, float))}
    return {f"{row['kind']}/{k}": float(v) for k, v in values.items()}


class WandB:
    """A run of a Weights & Biases project. Every kind of line has its own axis, "kind/count"."""

    fix = "log in with `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, wandb: Any, project: str, out: Path, config: RunConfig, group: str | None):
        names = _names(out)
        name = names.setdefault("wandb", uuid.uuid4().hex[:12])
        options = {"project": project, "name": _title(out, group), "dir": str(out), "config": configs.leaves(config)}
        self._run = wandb.init(id=name, resume="allow", group=group, **options)
        self._kinds: set[str] = set()
        atomic_write_json(out / NAMES_FILE, names)

    def write(self, row: dict[str, Any], step: int) -> None:
        kind, figures = row["kind"], numbers(row)
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/count")
        if figures:
            self._run.log(figures | {f"{kind}/count": step})

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an MLflow experiment; the server is MLflow's own setting, MLFLOW_TRACKING_URI."""

    fix = "check MLFLOW_TRACKING_URI"

    def __init__(self, mlflow: Any, experiment: str, out: Path, config: RunConfig, group: str | None):
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        names = _names(out)
        if "mlflow" in names:
            self.id = names["mlflow"]
            self._client.update_run(self.id, status="RUNNING")
        else:
            run = self._client.create_run(self._experiment(experiment), run_name=_title(out, group))
            self.id = names["mlflow"] = run.info.run_id
            atomic_write_json(out / NAMES_FILE, names)
            # once: MLflow lets no parameter change, as workers and budgets may at a resume
            params = [mlflow.entities.Param(k, str(v)[:500]) for k, v in configs.leaves(config).items()]
            for at in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[at : at + 100])

    def _experiment(self, name: str) -> str:
        """Its id; made if it is not there."""
        there = self._client.get_experiment_by_name(name)
        if there is None:
            try:
                return self._client.create_experiment(name)
            except Exception:
                there = self._client.get_experiment_by_name(name)
                if there is None:
                    raise
        return there.experiment_id  # also of another trial that was quicker

    def write(self, row: dict[str, Any], step: int) -> None:
        metric, at = self._mlflow.entities.Metric, int(row["time"] * 1000)
        if figures := numbers(row):
            self._client.log_batch(self.id, metrics=[metric(k, v, at, step) for k, v in figures.items()])

    def finish(self, summary: dict[str, Any]) -> None:
        row = {"kind": "summary", **summary}
        for name, value in numbers(row).items():
            self._client.log_metric(self.id, name, value)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


SINKS: dict[str, Any] = {"wandb": WandB, "mlflow": MLflow}


def _library(name: str, config: RunConfig) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"log.{name}: got {getattr(config.log, name)!r}, but {name} cannot be imported ({error}); "
            f'pip install "raywm[{name}]", or leave log.{name} out'
        ) from error


def _title(out: Path, group: str | None) -> str:
    return f"{group}-{out.name}" if group else out.name


def _names(out: Path) -> dict[str, str]:
    path = out / NAMES_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
