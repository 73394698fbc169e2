"""What an export says of itself: card.json for programs, MODEL_CARD.md for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

import raywm
from raywm import config as configs
from raywm.export.step import AgentStep, Field
from raywm.loops.saved import SavedRun
from raywm.report.load import read_rows
from raywm.spaces import columns_to_json

FORMAT = 1
PACKAGES = ("torch", "numpy", "gymnasium", "onnx", "onnxruntime", "onnxscript")
FILLS = {
    "observation": "as the environment gives it, images uint8, vectors float32",
    "state": "zeros at first, then what the last call returned",
    "flag": "true where an episode begins with this observation",
    "zeros": "zeros: the mean of what is seen, as the run's agent acts (standard normal numbers: a sample of it)",
    "uniform": "uniform numbers in [0, 1)",
    "normal": "standard normal numbers",
}


def make_card(run: SavedRun, step: AgentStep, file: str, parity: dict[str, Any], command: str) -> dict[str, Any]:
    """All that is known of an export. Metrics that the run does not have are None, with the reason beside them."""
    summary = run.path / "summary.json"
    return {
        "format": FORMAT,
        "file": file,
        "inputs": [_field(f) for f in step.inputs],
        "outputs": [_field(f) for f in step.outputs],
        "parity": parity,
        "algorithm": run.config.algorithm,
        "version": _version(run),
        "environment": run.config.env.model_dump(mode="json"),
        "spaces": {"action": run.codec.to_json(), "columns": columns_to_json(run.columns)},
        "metrics": json.loads(summary.read_text()) if summary.is_file() else None,
        "real_returns": real_returns(run.path),
        "dream": dream_of(run),
        "data": data_of(run),
        "config": run.config.model_dump(mode="json"),
        "versions": versions(run),
        "command": command,
    }


def _field(field: Field) -> dict[str, Any]:
    told = {"give": FILLS[field.fill]} if field.fill else {}
    return {"name": field.name, "shape": ["batch", *field.shape], "dtype": field.dtype, **told}


def _version(run: SavedRun) -> dict[str, int]:
    """Of what is exported: Dreamer's updates, or the turn of V-M-C's loop."""
    if run.config.algorithm == "dreamer":
        return {"updates": run.version}  # type: ignore[attr-defined]
    return {"iteration": run.iteration}  # type: ignore[attr-defined]


def versions(run: SavedRun) -> dict[str, str]:
    """Of what exported, and of the raywm that saved the checkpoint."""
    found = {"raywm": raywm.__version__, "trained_by": run.made_by, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def real_returns(path: Path) -> list[dict[str, Any]]:
    """Every measurement in the real environment: trials on the way, and the last one ("evaluate")."""
    names = ("kind", "real_env_steps", "return_mean", "return_std", "episodes")
    rows = read_rows(path / "metrics.jsonl")
    return [{name: row.get(name) for name in names} for row in rows if row["kind"] in ("trial", "evaluate")]


def dream_of(run: SavedRun) -> dict[str, Any]:
    """Dream returns beside real ones, measured now: see ``raywm.report.dream_summary``."""
    from raywm.report import dream_summary

    try:
        return dream_summary(run.path, seed=run.config.seed)
    except ValueError as error:
        return {"dream_gap": None, "why": str(error)}


def data_of(run: SavedRun) -> dict[str, Any]:
    """How many episodes the model has learned from (of those still there), and a hash of every byte of them.

    The same episodes have the same hash, wherever and in what order they were collected.
    """
    try:
        found = run.episodes()
    except (ValueError, OSError) as error:
        return {"sha256": None, "why": f"the run's episodes cannot be read here: {error}"}
    whole = hashlib.sha256()
    for episode in found:
        whole.update(json.dumps([episode.id, len(episode)]).encode())
        for name, column in episode.columns().items():
            whole.update(f"{name} {column.dtype} {column.shape}".encode())
            whole.update(column.reshape(-1).view(np.uint8).data)
    about = {"episodes": len(found), "steps": sum(episode.steps for episode in found)}
    return {"sha256": whole.hexdigest() if found else None, **about}


def markdown(card: dict[str, Any]) -> str:
    """card.json for people."""
    env, parity, data, dream = card["environment"], card["parity"], card["data"], card["dream"]
    kind = {"vmc": "V-M-C (vision, memory, controller)", "dreamer": "Dreamer, greedy"}[card["algorithm"]]
    made = {"updates": "after {} updates", "iteration": "of turn {}"}
    ((name, number),) = card["version"].items()
    lines = [f"# {env['id']}: {kind}", "", f"`{card['file']}` is the agent {made[name].format(number)} as one step:"]
    lines += ["(obs, state, is_first, noise) -> (action, state). `example.py` runs it without raywm.", ""]
    rows = [[f["name"], " x ".join(map(str, f["shape"])), f["dtype"], f.get("give", "")] for f in card["inputs"]]
    lines += ["## Inputs", "", *_table(["name", "shape", "dtype", "what to give"], rows), ""]
    rows = [[f["name"], " x ".join(map(str, f["shape"])), f["dtype"]] for f in card["outputs"]]
    lines += ["## Outputs", "", *_table(["name", "shape", "dtype"], rows), ""]
    lines += [
        "The action is as the environment takes it; next.* is given back as state.*.",
        "",
        "## How good it is",
        "",
    ]
    rows = [[_number(row[k]) for k in row] for row in card["real_returns"]]
    names = ["measurement", "real steps so far", "mean return", "std", "episodes"]
    lines += [*(_table(names, rows) if rows else ["Never measured in the real environment."]), ""]
    gap = dream.get("dream_gap")
    said = (
        dream.get("why", "the run has no real return to hold it against")
        if gap is None
        else (
            f"{gap:.4g} (in the dream {dream['dream_return_mean']:.4g} over {dream['dream_episodes']} dreams, "
            f"in reality {dream['real_return_mean']:.4g})"
        )
    )
    lines += [f"Dream gap: {said}.", "", "## Where it comes from", ""]
    hashed = data["sha256"] or data.get("why", "no episodes are left")
    lines += [f"- environment: `{json.dumps(env)}`", f"- data: {data.get('episodes', 0)} episodes, sha256 {hashed}"]
    lines += [
        f"- parity with the run's agent: {parity['max_abs_difference']:.3g} at most over {parity['steps']} real steps"
    ]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in card['versions'].items())}"]
    lines += [f"- made by `{card['command']}`", "", "## Config", "", "```yaml"]
    return "\n".join([*lines, configs.dumps(configs.parse(card["config"])).strip(), "```", ""])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
