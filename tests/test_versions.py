"""Runs whose checkpoints another raywm wrote: one line that says which, what differs and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_export import RUNS, command, line

from raywm import __version__, checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}
    for name in ("vmc", "dreamer"):
        made[name] = tmp_path_factory.mktemp("runs") / name
        assert command("train", *RUNS[name], "--in-process", "--out", made[name]).exit_code == 0
    return made


def resume(name: str, run: Path):
    more = "iterations=2" if name == "vmc" else "online={steps: 200, prefill: 60, train_ratio: 2, evaluate_every: 0}"
    return command("train", *RUNS[name], more, "--in-process", "--resume", "--out", run)


@pytest.mark.parametrize(
    ("name", "file", "lost"),
    [
        ("vmc", "best_model", "memory.lstm.weight_hh_l0"),
        ("dreamer", "policy", "model.encoder.mlp.0.bias"),
        ("dreamer", "learner", "model.encoder.mlp.0.bias"),
        ("dreamer", "learner", "critic.hidden.0.weight"),
    ],
)
@pytest.mark.parametrize("change", ["lacks", "has", "of another shape is"])
def test_other_parameters(runs, tmp_path, name, file, lost, change):
    run = Path(shutil.copytree(runs[name], tmp_path / "run"))
    saved = checkpoint.load(run / "checkpoints")
    weights = saved.tensors[file]
    if change == "lacks":
        del weights[lost]
    elif change == "has":
        weights[f"{lost}_of_old"] = weights[lost]
    else:
        weights[lost] = weights[lost][:1]
    checkpoint.save(run / "checkpoints", saved.step, tensors=saved.tensors, arrays=saved.arrays, state=saved.state)
    before = sorted((run / "checkpoints").iterdir())
    words = {"learner": [], "policy": [["evaluate"], ["export", "--format", "torch-export"]]}
    words["best_model"] = [*words["policy"], ["dream"]]
    said = [line(command(word[0], run, *word[1:])) for word in words[file]]
    if file != "policy":  # which a resumed run does not need
        said.append(line(resume(name, run)))
    for text in said:
        assert f"written by raywm {__version__}, holds other parameters" in text and f"{change} {lost}" in text
        assert "use the raywm that wrote it" in text
    assert sorted((run / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("name", ["vmc", "dreamer"])
def test_checkpoints_of_the_first_format_are_read(runs, tmp_path, name):
    run = Path(shutil.copytree(runs[name], tmp_path / "run"))
    for path in (run / "checkpoints").glob("*/state.json"):
        manifest = json.loads(path.read_text())
        assert manifest.pop("raywm") == __version__
        path.write_text(json.dumps(manifest | {"format": 1}))
    assert command("evaluate", run, "--episodes", 2).exit_code == 0
    result = resume(name, run)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(run / "checkpoints").made_by == __version__


@pytest.mark.parametrize("name", ["vmc", "dreamer"])
def test_a_newer_format(runs, tmp_path, name):
    run = Path(shutil.copytree(runs[name], tmp_path / "run"))
    for path in (run / "checkpoints").glob("*/state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3, "raywm": "9.1.0"}))
    for said in (line(command("evaluate", run)), line(resume(name, run))):
        assert "format 3, written by raywm 9.1.0" in said and "pip install raywm==9.1.0" in said
