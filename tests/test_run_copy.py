"""The copy of a run's directory: a wiped disk costs nothing, and a checkpoint there is whole or does not count."""

import json
import os
import shutil

import numpy as np
import pytest

from raywm import checkpoint
from raywm.run_copy import LOG_S, RunCopy


def make_run(out, steps=(1,)):
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text("env: {id: CartPole-v1}\n")
    (out / "metrics.jsonl").write_text('{"kind": "train"}\n' * len(steps))
    (out / ".lock").write_text("")
    (out / "tensorboard").mkdir(exist_ok=True)
    (out / "tensorboard" / "events").write_text("e")
    (out / "episodes").mkdir(exist_ok=True)
    (out / "episodes" / ".origin").write_text("mine")
    (out / "episodes" / "000001.arrow").write_text("s" * 100)
    for step in steps:
        arrays = {"controller": {"theta": np.arange(step)}}
        checkpoint.save(out / "checkpoints", step, arrays=arrays, state={"step": step})


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_wiped_run_comes_back_from_its_copy(tmp_path, form):
    out, storage = tmp_path / "run", form.format(tmp_path / "storage")
    make_run(out, steps=(1, 2, 3))
    with RunCopy(out, storage):
        pass
    there = files(tmp_path / "storage" / "run")
    assert "episodes/000001.arrow" not in there and "episodes/.origin" in there  # segments are the shards' affair
    assert not any(name.startswith("tensorboard") or ".lock" in name or name.endswith(".part") for name in there)
    before = {name: (out / name).read_bytes() for name in there}
    shutil.rmtree(out)
    copy = RunCopy(tmp_path / "elsewhere", storage)
    assert copy.ahead()
    copy.fetch()
    assert {name: (tmp_path / "elsewhere" / name).read_bytes() for name in there} == before
    assert files(tmp_path / "elsewhere") == there and not copy.ahead()
    assert checkpoint.load(tmp_path / "elsewhere" / "checkpoints").state == {"step": 3}


def test_no_run_there_and_a_run_that_is_further_here(tmp_path):
    make_run(tmp_path / "run", steps=(1, 2))
    copy = RunCopy(tmp_path / "run", str(tmp_path / "storage"))
    assert not copy.ahead()
    copy.sync()
    checkpoint.save(tmp_path / "run" / "checkpoints", 3)
    assert not copy.ahead()  # a driver that is quicker than its copies goes on with what it has
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000003")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000002")
    assert copy.ahead()  # it went on on another machine meanwhile


def test_a_look_at_the_copy_leaves_what_another_process_writes(tmp_path):
    make_run(tmp_path / "run")
    copy = RunCopy(tmp_path / "run", str(tmp_path / "storage"))
    copy.sync()
    (tmp_path / "run" / "checkpoints" / ".tmp-000002-7").mkdir()
    assert not copy.ahead() and (tmp_path / "run" / "checkpoints" / ".tmp-000002-7").exists()


def test_a_fetch_that_is_killed_is_done_again(tmp_path, monkeypatch):
    """What makes it seem complete, a newer state.json and then config.yaml, comes after everything else."""
    out, order = tmp_path / "run", []
    make_run(out, steps=(1, 2))
    RunCopy(out, str(tmp_path / "storage")).sync()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    RunCopy(tmp_path / "elsewhere", str(tmp_path / "storage")).fetch()
    assert order[-3:] == ["state.json", "state.json", "config.yaml"] and "metrics.jsonl" in order


def test_checkpoints_go_as_they_went_here(tmp_path):
    out = tmp_path / "run"
    make_run(out)
    copy = RunCopy(out, str(tmp_path / "storage"))
    for step in (2, 3, 4):
        checkpoint.save(out / "checkpoints", step, state={})
        copy.sync()
    assert {p.name for p in (tmp_path / "storage" / "run" / "checkpoints").iterdir()} == {"000003", "000004"}


def test_state_json_comes_last_and_the_log_before_it(tmp_path, monkeypatch):
    out, order = tmp_path / "run", []
    make_run(out)
    plain = RunCopy._copy
    monkeypatch.setattr(RunCopy, "_copy", staticmethod(lambda s, a, t, b: (order.append(b), plain(s, a, t, b))))
    RunCopy(out, str(tmp_path / "storage")).sync()
    names = [name.rpartition("/")[2] for name in order]
    assert names[-1] == "state.json" and names.index("metrics.jsonl") < names.index("controller.npz")


def test_a_growing_log_alone_waits(tmp_path):
    out = tmp_path / "run"
    make_run(out)
    copy = RunCopy(out, str(tmp_path / "storage"))
    copy.sync()
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train"}\n')
    there = tmp_path / "storage" / "run" / "metrics.jsonl"
    copy.sync(log=False)
    assert len(there.read_text().splitlines()) == 1 and LOG_S > 1
    copy.sync()
    assert len(there.read_text().splitlines()) == 2


def test_a_storage_that_is_away_is_said_and_ends_in_an_error(tmp_path):
    out, said = tmp_path / "run", []
    make_run(out)
    (tmp_path / "storage").mkdir()
    with pytest.raises(OSError, match="--resume"):
        with RunCopy(out, str(tmp_path / "storage"), said.append) as copy:
            shutil.rmtree(tmp_path / "storage")
            (tmp_path / "storage").write_text("not a directory")
            checkpoint.save(out / "checkpoints", 2)
    with pytest.raises(KeyboardInterrupt):  # an interrupted run says so, and stays interrupted
        (tmp_path / "storage").unlink()
        with RunCopy(out, str(tmp_path / "storage"), said.append) as copy:
            shutil.rmtree(tmp_path / "storage")
            (tmp_path / "storage").write_text("not a directory")
            checkpoint.save(out / "checkpoints", 3)
            raise KeyboardInterrupt
    assert "not complete" in said[-1] and copy.uri in said[-1]


def test_the_command_line_goes_on_from_the_copy(tmp_path, monkeypatch):
    """`raywm train --resume` on a machine that has nothing of the run: what it is given is the copied directory."""
    from typer.testing import CliRunner

    from raywm import cli

    storage = tmp_path / "storage"
    monkeypatch.setattr(cli, "_parts", lambda config: None)
    seen = {}

    def executor(config, out, in_process):
        seen.update(files={p.name for p in out.iterdir()}, saves=checkpoint.latest(out / "checkpoints"))
        raise ValueError("far enough")

    monkeypatch.setattr(cli, "_executor", executor)
    command = ["train", "cartpole", f"replay.storage={storage}", "--out"]
    first = CliRunner().invoke(cli.app, [*command, str(tmp_path / "a")])
    assert "far enough" in first.output and (storage / "run" / "config.yaml").exists()
    checkpoint.save(tmp_path / "a" / "checkpoints", 7, state={"phase": "fit"})
    again = CliRunner().invoke(cli.app, [*command, str(tmp_path / "a"), "--resume"])
    assert "far enough" in again.output
    refused = CliRunner().invoke(cli.app, [*command, str(tmp_path / "b")])
    assert refused.exit_code == 2 and "already holds a run; continue it with --resume" in refused.output
    assert not (tmp_path / "b" / "config.yaml").exists()
    elsewhere = CliRunner().invoke(cli.app, [*command, str(tmp_path / "b"), "--resume"])
    assert "far enough" in elsewhere.output and seen["saves"] == 7
    state = json.loads((tmp_path / "b" / "checkpoints" / "000007" / "state.json").read_text())
    assert state["state"] == {"phase": "fit"}


def test_out_is_no_uri(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from raywm import cli

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["train", "cartpole", "--out", "s3://bucket/run"])
    assert result.exit_code == 2 and "replay.storage=URI" in result.output and not list(tmp_path.iterdir())
