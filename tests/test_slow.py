"""What takes minutes: drivers killed on Ray, learning, and a process whose entropy is known."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import test_loop as loop

from raywm import config as configs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    loop.run(loop.tiny(), out)
    return loop.outcome(out)


# ------------------------------------------------------------------------------------------------ Ray


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers(workers, reference, ray_session, tmp_path):
    config = loop.tiny(collect={"workers": workers}, dream={"workers": 4 - workers})
    loop.run(config, tmp_path, loop.on_ray())
    loop.same(loop.outcome(tmp_path), reference)


def test_a_stalled_environment_costs_a_collector(ray_session, tmp_path):
    def config(fault):
        kwargs = {"fault": fault, "once": str(tmp_path / "once"), "seconds": 600}
        return loop.tiny(env={"id": "raywm/Faulty-v0", "kwargs": kwargs}, collect={"timeout_s": 20.0, "stall_s": 10.0})

    summary = loop.run(config("stall"), tmp_path / "a", loop.on_ray())
    assert summary["worker_deaths"] == 1
    loop.run(config(None), tmp_path / "b")
    loop.same(loop.outcome(tmp_path / "a"), loop.outcome(tmp_path / "b"))


def family(pid):
    """A process's descendants now, for whoever wants to see them gone."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def test_killed_drivers_on_ray(reference, tmp_path):
    """kill -9 of the driver in every phase. The Ray it had started dies with it and is in nobody's way."""
    deaths = [
        ("collect", 1),
        ("settle", 1),
        ("fit", 1),
        ("save", 3),
        ("fitness", 2),
        ("play_trial", 1),
        ("row", 6),
        ("fitness", 3),
        ("play", 1),
    ]
    orphans = set()
    for event, count in deaths:
        event, count = ("collect", 1) if event == "play_trial" else (event, count)
        child = multiprocessing.get_context("spawn").Process(
            target=loop.die_at, args=(loop.tiny(), tmp_path, event, count, True)
        )
        child.start()
        while child.is_alive():
            orphans |= family(child.pid)
            child.join(0.3)
        assert child.exitcode == -signal.SIGKILL, (event, count, child.exitcode)
    patience = time.monotonic() + 150  # its agents take their time
    while (left := [p for p in orphans if p.is_running() and p.status() != "zombie"]) and time.monotonic() < patience:
        time.sleep(0.5)
    assert not left, left
    code = f"import test_loop as l, pathlib; l.run(l.tiny(), pathlib.Path({str(tmp_path)!r}), l.on_ray())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(__file__), timeout=300)
    loop.same(loop.outcome(tmp_path), reference)


def test_a_train_command_killed_and_interrupted_at_any_time(reference, tmp_path):
    """`raywm train --resume`, killed or interrupted after random times until it ends by itself."""
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    configs.save(loop.tiny(), config)
    command = [sys.executable, "-m", "raywm.cli", "train", str(config), "--out", str(out), "--resume"]
    rng = np.random.default_rng()
    times, codes = [], []
    for attempt in range(8):
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            times.append(float(rng.uniform(8, 30)))
            text, _ = child.communicate(timeout=None if attempt == 7 else times[-1])
            break
        except subprocess.TimeoutExpired:
            if attempt % 2:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
            else:
                os.killpg(child.pid, signal.SIGINT)  # as a terminal's Ctrl-C: to Ray's processes as well
                text, _ = child.communicate(timeout=60)
                assert child.returncode == 130, text
        codes.append(child.returncode)
    assert child.returncode == 0, (times, codes, text)
    loop.same(loop.outcome(out), reference)


# ------------------------------------------------------------------------------------------------ learning


def test_cartpole_is_learned_in_dreams(tmp_path):
    config = configs.load("cartpole", ["seed=11", "log.console=false", "fit.threads=1", "evaluate.episodes=50"])
    summary = loop.run(config, tmp_path)
    assert summary["real_return_mean"] >= 475
    assert summary["real_env_steps"] <= 10_000 + 500


def test_reinforce_learns_in_dreams(tmp_path):
    config = configs.load(
        "cartpole",
        ["seed=5", "log.console=false", "fit.threads=1", "evolve.learner=reinforce", "evolve.generations=60"]
        + ["iterations=3", "dream.horizon=200", "target.real_return=200", "evaluate.episodes=50"],
    )
    summary = loop.run(config, tmp_path)
    climbs = [row["mean"] for row in loop.rows(tmp_path, "generation") if row["iteration"] == 0]
    assert np.mean(climbs[-5:]) > 2 * np.mean(climbs[:5])
    assert summary["real_return_mean"] > 3 * summary["random_return_mean"]


# ------------------------------------------------------------------------------------------------ known entropy


def test_a_bifurcation_is_predicted_to_its_entropy():
    """With the default model settings, on 30,000 held-out steps."""
    nll, entropy, weights = loop.predict_bifurcation(episodes=5000, steps=5000)
    assert entropy - 0.02 < nll < entropy + 0.05
    for weight in weights:
        assert 0.4 < float(weight.mean()) < 0.6
        assert float(((weight > 0.4) & (weight < 0.6)).float().mean()) > 0.9  # step by step, not only on average


CLUSTER = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
from raywm.config import load
from raywm.log import RunLog
from raywm.loops.vmc import train
from raywm.runtime.executor import RayExecutor

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 100 * 2**20})
    cluster.add_node(num_cpus=4, object_store_memory=100 * 2**20)
    tiny = ["collect.initial_steps=300", "fit.memory_steps=30", "evolve.generations=2", "iterations=1",
            "target.episodes=2", "evaluate.episodes=4", "model.hidden=16", "fit.threads=1", "log.console=false"]
    out = Path(sys.argv[1])
    config = load("cartpole", [*tiny, "collect.workers=4", "dream.workers=2"])  # more than one node holds
    with RunLog(out, console=False) as log, RayExecutor(config, out, cluster.address) as executor:
        print("random", train(config, out, executor, log)["random_return_mean"])
        try:
            RayExecutor(load("cartpole", ["collect.workers=50"]), out / "other", cluster.address)
        except ValueError as error:
            print(error)
    cluster.shutdown()
"""


def test_a_cluster_is_joined_and_one_too_small_says_so(tmp_path):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    command = [sys.executable, str(tmp_path / "cluster.py"), str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "random" in done.stdout and "53 CPUs needed, 8 there" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()
