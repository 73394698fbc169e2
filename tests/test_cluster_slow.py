"""cluster/README.md word for word, on three nodes of this machine, while one leaves and one joins; and the driver's
node lost with its disk."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
BIN = str(Path(sys.executable).parent)
ENV = """
import time
from gymnasium.envs.classic_control import CartPoleEnv

class Slow(CartPoleEnv):
    def step(self, action):
        time.sleep(0.003)
        return super().step(action)

"""
TINY = (
    "env.id=their_env:Slow env.time_limit=200 target.real_return=null target.episodes=2 iterations=2 seed=7 "
    "collect.episodes=2 collect.initial_steps={steps} collect.stall_s=60 fit.memory_steps=40 fit.evaluate_every=20 "
    "evolve.population=8 evolve.rollouts=4 evolve.generations=3 dream.unit=4 dream.horizon=50 evaluate.episodes=4 "
    "log.tensorboard=false"
)


def readme(heading, start):
    """The command under a heading that begins so, its lines joined."""
    section = (ROOT / "cluster" / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    commands = "\n".join(re.findall(r"(?ms)^```\n(.*?)^```$", section)).replace("\\\n", " ").splitlines()
    (command,) = [c for c in commands if c.startswith(start)]
    return command


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "their_env.py").write_text(ENV)
    monkeypatch.setenv("PATH", BIN + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # raywm, where it is not installed; not the user's module
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "work"


@pytest.fixture
def three_nodes(work, monkeypatch):
    """A head that only drives, a node that collects and one that learns, with a token."""
    from ray.cluster_utils import Cluster

    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    }
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "_system_config": quick}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**head, "dashboard_agent_listen_port": free_port()},  # jobs are started by it
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
    try:
        collect = add_node(cluster, "collect")
        add_node(cluster, "learn")
        yield cluster, collect
    finally:
        cluster.shutdown()


def add_node(cluster, label):
    # A machine of its own unpacks what travels with a job into a directory of its own. Nodes that share one empty it
    # for each other as they join.
    own = f"runtime_env_{len(cluster.list_all_nodes())}-{time.monotonic_ns()}"
    return cluster.add_node(num_cpus=2, labels={"raywm": label}, runtime_env_dir_name=own)


def children(node):
    pids = [p.process.pid for kind, ps in node.all_processes.items() if kind == "raylet" for p in ps]
    return [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]


def wait_for(what, process, log, seconds=240):
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["raywm", "job"])
def test_a_node_leaves_and_a_node_joins(how, three_nodes, work, tmp_path, monkeypatch):
    cluster, leaves = three_nodes
    if how == "raywm":
        command, out = readme("Nodes that come and go", "raywm train"), tmp_path / "runs" / "cluster"
        storage = tmp_path / "runs" / "cluster-storage"
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{work}")
    else:
        command, out, storage = readme("Submit a run", "cluster/submit.sh"), tmp_path / "run", tmp_path / "storage"
        command = command.replace("cluster/submit.sh", shlex.quote(str(ROOT / "cluster" / "submit.sh")))
        command = command.replace("s3://YOUR-BUCKET/cartpole", str(storage))
        command = command.replace("/home/ubuntu/runs/cartpole", str(out))
        command = command.replace("collect.workers=12 dream.workers=4", "collect.workers=2 dream.workers=1")
        monkeypatch.delenv("RAY_ADDRESS")
    log = tmp_path / "log"
    with open(log, "w") as file:
        run = subprocess.Popen(
            f"exec {command} {TINY.format(steps=4000)}", shell=True, cwd=work, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: any(out.glob("episodes/*.arrow*")), run, log)
        joined = add_node(cluster, "collect")
        victims = children(leaves)
        assert any("_Host" in " ".join(victim.cmdline()) for victim in victims)
        cluster.remove_node(leaves, allow_graceful=False)
        for victim in victims:  # a machine that is lost takes its processes with it at once
            if victim.is_running():
                victim.kill()
        wait_for(
            lambda: (out / "metrics.jsonl").exists() and '"collect"' in (out / "metrics.jsonl").read_text(), run, log
        )
        assert any("_Host" in " ".join(child.cmdline()) for child in children(joined))  # where they are now
        assert run.wait(600) == 0, log.read_text()
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
            run.wait(60)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["worker_deaths"] >= 2 and summary["broken_episodes"] == 0, log.read_text()
    assert summary["stopped"] == "2 iterations done" and summary["real_env_steps"] >= 4000
    assert json.loads((storage / "run" / "summary.json").read_text()) == summary
    if how == "job":
        assert "succeeded" in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_drivers_node_is_lost_with_its_disk(work, tmp_path, monkeypatch):
    """Killed in the middle, its directory gone: from the copy, elsewhere, it ends as if nothing had happened."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{work}")
    tiny = TINY.format(steps=600).split()
    command = ["raywm", "train", "cartpole", *tiny, "collect.workers=2", "dream.workers=1", "fit.threads=1"]

    runs = []

    def start(out, *more):
        log = open(tmp_path / f"log-{out}", "w")
        arguments = [*command, "--out", str(tmp_path / out), "--resume", *more]
        runs.append(subprocess.Popen(arguments, cwd=work, stdout=log, stderr=subprocess.STDOUT))
        return runs[-1], tmp_path / f"log-{out}"

    try:
        storage = f"replay.storage=file://{tmp_path}/storage"
        lost, log = start("lost", storage)
        copied = tmp_path / "storage" / "run" / "checkpoints"
        wait_for(lambda: len(list(copied.glob("*/state.json"))) >= 2, lost, log)  # in the middle of the first turn
        lost.kill()
        lost.wait()
        time.sleep(3)  # its Ray notices
        shutil.rmtree(tmp_path / "lost")
        elsewhere, log = start("elsewhere", storage)
        assert elsewhere.wait(300) == 0, log.read_text()
        assert f"going on with the run that file://{tmp_path}/storage/run keeps" in log.read_text()
        whole, log = start("whole")
        assert whole.wait(300) == 0, log.read_text()
    finally:
        for run in runs:
            run.terminate()
            run.wait(60)
    ends = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("whole", "elsewhere")]
    for key in ("wall_seconds", "worker_deaths"):
        for end in ends:
            del end[key]
    assert ends[0] == ends[1]
