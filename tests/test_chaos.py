"""Everything dies, on a cluster of three nodes: what was acknowledged is there once, whole, and the run goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raywm.data.dataset import Dataset
from raywm.envs.classic import CountingEnv, check_counting

SECONDS = 60
EPISODES = 12_000


class SlowCounting(CountingEnv):
    """A counting environment of at most 2,000 steps a second."""

    def step(self, action):
        time.sleep(0.0005)
        return super().step(action)


DRIVER = """
import json, os, sys
from pathlib import Path
from raywm.config import parse
from raywm.runtime.collect import collect_dataset
from raywm.runtime.rollouts import Rollouts

out, address, acknowledged = sys.argv[1:4]
plain = Rollouts.collect

def noted(self, *args):
    with open(acknowledged, "a", buffering=1) as file:
        for played in plain(self, *args):
            file.write(f"{played[0]}\\n")  # with the system before anyone acts on it
            yield played

Rollouts.collect = noted
config = parse({
    "env": {"id": "test_chaos:SlowCounting"},
    "address": address,
    "collect": {"workers": 4, "timeout_s": 30, "stall_s": 20},
    "replay": {"shards": "nodes", "storage": f"file://{out}-copies", "segment_mb": 0.1, "seal_s": 2},
})
print(json.dumps(collect_dataset(config, out, episodes=int(sys.argv[4]), policy="random", resume=True)))
"""


def processes(name, nodes):
    """Ray workers on these nodes by what their actor is called."""
    found = []
    for pid in [pid for node in nodes for pid in raylets(node)]:
        for process in psutil.Process(pid).children() if psutil.pid_exists(pid) else []:
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue  # gone, or about to be
            if line.startswith("ray::") and name in line:
                found.append(process.pid)
    return found


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_collection_survives_everything(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": quick})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    out, acknowledged = tmp_path / "data", tmp_path / "acknowledged"
    command = [sys.executable, "-c", DRIVER, str(out), cluster.address, str(acknowledged), str(EPISODES)]

    def start():
        log = open(tmp_path / f"log-{time.monotonic()}", "w")
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log.name

    rng, killed = random.Random(0), {"collector": 0, "shard": 0, "node": 0, "driver": 0}
    try:
        driver, log = start()
        while not acknowledged.exists():
            assert driver.poll() is None, Path(log).read_text()
            time.sleep(0.2)
        began = time.monotonic()
        for turn in range(SECONDS // 2):
            time.sleep(2)
            assert driver.poll() is None, Path(log).read_text()
            if collectors := processes("_Host", cluster.list_all_nodes()):
                killed["collector"] += kill(rng.choice(collectors))
            if turn == 7:
                killed["shard"] += kill(rng.choice(processes("ReplayShard", cluster.list_all_nodes())))
            if turn == 14:
                places = json.loads((out / "shards.json").read_text())
                assert len(places) == 3
                before = {name: len(os.listdir(out / name)) for name in places}
                # not the first shard's node, which the driver is attached to: the driver dies later
                victim, theirs = next((n, s) for n in nodes if not (s := shard_of(n, out)).startswith("shard-000"))
                workers = [
                    child.pid for pid in raylets(victim) for child in psutil.Process(pid).children(recursive=True)
                ]
                cluster.remove_node(victim, allow_graceful=False)
                for pid in workers:  # a machine that is lost takes its processes with it at once
                    kill(pid)
                shutil.rmtree(out / theirs)
                killed["node"] += 1
                assert before[theirs] > 1
            if turn == 22:
                driver.kill()
                driver.wait()
                killed["driver"] += 1
                driver, log = start()
        assert time.monotonic() - began >= SECONDS
        assert driver.wait(300) == 0, Path(log).read_text()
    finally:
        driver.kill()
        cluster.shutdown()
    assert killed["collector"] > 15 and killed["shard"] == killed["node"] == killed["driver"] == 1
    done = json.loads(Path(log).read_text().splitlines()[-1])
    numbers = {int(line) for line in acknowledged.read_text().split()}
    with Dataset(out) as data:
        report = data.verify()
        assert report["ok"], report
        assert len(data) == done["episodes"] >= EPISODES and done["broken"] == 0
        assert {f"collect-{n:09d}" for n in numbers} <= set(data.ids())
        for episode in data:
            check_counting(episode)
            assert int(episode.obs["vector"][0, 0]) == CountingEnv.identity(episode.info["seed"])


def raylets(node):
    return [p.process.pid for kind, ps in node.all_processes.items() if kind == "raylet" for p in ps]


def shard_of(node, out):
    """The directory of the shard that lives on a node: its actor's process is a child of the node's raylet."""
    for _ in range(150):  # one that was just restarted has not opened it yet
        for pid in processes("ReplayShard", [node]):
            held = [file.path for file in psutil.Process(pid).open_files()]
            for name in sorted(os.listdir(out)):
                if any(str(out / name) in path for path in held):
                    return name
        time.sleep(0.1)
    raise AssertionError("no shard on that node")
