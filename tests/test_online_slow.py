"""What takes minutes of Dreamer: a run killed again and again that still learns, and memory that stays flat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_dreamer import make
from test_online import Rows

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


def test_a_run_that_is_killed_five_times_still_learns(tmp_path):
    """kill -9 of the driver on Ray, five times in the part where CartPole is learned; no replay lost or doubled."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "raywm.cli", "train", "dreamer-cartpole", "seed=100", "online.checkpoint_s=15"]
    command += ["evaluate.episodes=20", "--out", str(out), "--resume"]
    for kill in range(KILLS):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        goal, until = 600 + 500 * kill, time.monotonic() + 900
        while steps_of(out) < goal and process.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        assert process.poll() is None, "it ended by itself"
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=60)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["real_return_mean"] >= 400, summary
    assert summary["train_ratio"] == pytest.approx(summary["set_train_ratio"], rel=0.02)
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
