"""What takes minutes of Dreamer: a run killed again and again that still learns, and memory that stays flat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_dreamer import make
from test_online import Rows
from test_presets import skip_without
from typer.testing import CliRunner

from raywm import config as configs
from raywm.cli import app
from raywm.data.store import EpisodeStore
from raywm.learners.memory import keep_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = 5


def steps_of(out: Path) -> int:
    """The real steps of the last line that was logged."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line).get("real_env_steps", 0) for line in whole[-50:]), default=0)


def kill_after(steps: int, command: list[str], out: Path) -> None:
    """Start the run, and kill its driver when it has logged so many real steps."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 900
    while steps_of(out) < steps and process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
    assert process.poll() is None, "it ended by itself"
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=60)
    assert steps_of(out) >= steps, "it did not get that far"


def test_a_run_that_is_killed_five_times_still_learns(tmp_path):
    """kill -9 of the driver on Ray, five times in the part where CartPole is learned; no replay lost or doubled."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "raywm.cli", "train", "dreamer-cartpole", "seed=0", "online.checkpoint_s=15"]
    command += ["dreamer.threads=1", "evaluate.episodes=20", "--out", str(out), "--resume"]
    for kill in range(KILLS):
        kill_after(600 + 500 * kill, command, out)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["real_return_mean"] >= 400, summary
    assert summary["train_ratio"] == pytest.approx(summary["set_train_ratio"], rel=0.02)
    store = EpisodeStore(out / "episodes", read_only=True)
    assert not store.verify()["damaged"]
    store.watch(pieces := Rows())
    store.close()
    assert summary["real_env_steps"] == sum(pieces.rows.values()) - len(pieces.rows), "a step is lost or doubled"


@pytest.mark.parametrize("preset", [name for name in configs.presets() if name.startswith("dreamer-")])
def test_presets_train_on_their_real_environments(preset, tmp_path):
    """Collect, learn, try and evaluate with everything as the preset has it but for sizes: those of a laptop."""
    config = configs.load(preset)
    skip_without(config.env.id)
    small = {
        "rssm.size": "nano",
        "dreamer.num_gpus": 0,
        "dreamer.batch": 4,
        "dreamer.sequence": 16,
        "collect.workers": 1,
        "collect.envs": 2,
        "env.time_limit": 30,
        "online.steps": 240,
        "online.prefill": 64,
        "online.train_ratio": 8,
        "online.evaluate_every": 100,
        "online.evaluate_episodes": 2,
        "target.real_return": 1e9,  # no lucky end
        "target.episodes": 2,
        "evaluate.episodes": 2,
        "log.tensorboard": "false",
    }
    command = ["train", preset, *(f"{k}={v}" for k, v in small.items()), "--in-process", "--out", str(tmp_path / "run")]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 238 < summary["real_env_steps"] <= 240  # 2 environments step together
    assert summary["updates"] >= 10 and np.isfinite(summary["real_return_mean"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["model_loss"] for line in lines if "model_loss" in line]
    assert losses and np.isfinite(losses).all()


def test_a_run_goes_on_with_other_numbers_of_learners_and_collectors(tmp_path):
    """On Ray: killed with one learner and two collectors, resumed with two and one, then with one and three."""
    out, reached = tmp_path / "run", 0
    command = [sys.executable, "-m", "raywm.cli", "train", "dreamer-cartpole", "online.checkpoint_s=5", "seed=3"]
    command += ["online.train_ratio=32", "evaluate.episodes=5", "dreamer.threads=1", "--out", str(out), "--resume"]
    for learners, collectors, steps in ((1, 2, 1300), (2, 1, 1900)):
        kill_after(steps, [*command, f"dreamer.learners={learners}", f"collect.workers={collectors}"], out)
        assert steps_of(out) > reached, "it went back"
        reached = steps_of(out)
    subprocess.run([*command, "collect.workers=3", "online.steps=2500"], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    assert reached < summary["real_env_steps"] and 2492 < summary["real_env_steps"] <= 2500  # 8 step together
    assert summary["train_ratio"] == pytest.approx(32, rel=0.1)
    store = EpisodeStore(out / "episodes", read_only=True)
    assert not store.verify()["damaged"]
    store.watch(pieces := Rows())
    store.close()
    assert summary["real_env_steps"] == sum(pieces.rows.values()) - len(pieces.rows), "a step is lost or doubled"


def test_memory_stays_flat_over_5000_updates():
    keep_memory()
    learner, batch = make(B=4, T=8, **{"rssm__size": "nano"})
    sizes = {}
    for update in range(1, 5001):
        learner.update(batch)
        if update in (1000, 5000):
            sizes[update] = psutil.Process().memory_info().rss
    assert sizes[5000] - sizes[1000] < 8 * 2**20, sizes
