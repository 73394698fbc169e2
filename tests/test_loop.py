"""The V-M-C loop as a whole: the same bits whoever does the work, whoever dies, and wherever it is resumed."""

import json
import os
import signal
import threading
from collections import Counter

import numpy as np
import pytest

from raywm import checkpoint
from raywm import config as configs
from raywm.data.store import EpisodeStore
from raywm.log import RunLog
from raywm.loops import vmc
from raywm.loops.executor import InProcess

TINY = {
    "seed": 3,
    "iterations": 2,
    "env": {"id": "CartPole-v1", "time_limit": 60},
    "collect": {"workers": 2, "envs": 4, "initial_steps": 200, "episodes": 3},
    "target": {"episodes": 3},
    "model": {"hidden": 16, "head_hidden": 16, "mixtures": 2},
    "fit": {"memory_steps": 100, "batch": 8, "sequence": 16, "lr": 0.01, "evaluate_every": 30, "threads": 1},
    "evolve": {"population": 8, "rollouts": 4, "generations": 3},
    "dream": {"workers": 2, "unit": 4, "horizon": 40},
    "evaluate": {"episodes": 6},
    "log": {"console": False, "tensorboard": False},
}
PRIVATE = ("wall_seconds", "worker_deaths")  # what may differ between two runs of one seed


def tiny(**sections):
    """The tiny config with sections overridden: tiny(seed=1, collect={"workers": 3})."""
    data = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for key, value in sections.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return configs.parse(data)


def run(config, out, executor=InProcess, **options):
    """A run, or the rest of one, in `out`; returns its summary."""
    out.mkdir(parents=True, exist_ok=True)
    with RunLog(out, config.log.tensorboard, config.log.console) as log, executor(config, out, **options) as work:
        return vmc.train(config, out, work, log)


def rows(out, kind=None):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in lines if kind in (None, row["kind"])]


def outcome(out):
    """All that the seed decides: metrics, summary, final controller and model, and every stored byte."""
    saved = checkpoint.load(out / "checkpoints")
    summary = json.loads((out / "summary.json").read_text())
    with EpisodeStore(out / "episodes", read_only=True) as store:
        episodes = {}
        for id in store.ids():
            episode = store.get(id)
            columns = {**episode.columns(), "info": np.array(json.dumps(episode.info, sort_keys=True))}
            episodes[id] = {k: (v.dtype.str, v.shape, v.tobytes()) for k, v in columns.items()}
    return {
        "metrics": rows(out),
        "summary": {k: v for k, v in summary.items() if k not in PRIVATE},
        "controller": {k: v.tolist() for k, v in saved.arrays["controller"].items()},
        "weights": {k: v.numpy().tobytes() for k, v in saved.tensors["model"].items()},
        "accepted": saved.state["accepted"],
        "episodes": episodes,
    }


def same(got, expected):
    """Part by part, so that a failure says what differs before it prints it."""
    for part in ("metrics", "summary", "controller", "accepted"):
        assert got[part] == expected[part], part
    assert list(got["episodes"]) == list(expected["episodes"])
    for id, columns in expected["episodes"].items():
        assert got["episodes"][id] == columns, id
    assert got["weights"] == expected["weights"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The outcome of the tiny run in one process, with nothing in its way."""
    out = tmp_path_factory.mktemp("reference")
    run(tiny(), out)
    expected = outcome(out)
    fitness = np.array([row["fitness"] for row in rows(out, "generation")])
    assert fitness.shape == (6, 8) and (fitness.std(1) > 0).all()  # or their equality would say nothing
    return expected


def test_a_run_is_whole(reference):
    kinds = [row["kind"] for row in reference["metrics"]]
    assert [k for k in dict.fromkeys(kinds)] == [
        "collect", "fit", "quality", "calibration", "generation", "dream", "trial", "evaluate"
    ]  # fmt: skip
    summary = reference["summary"]
    assert summary["iterations"] == 2 and summary["real_return_episodes"] == 6
    assert sorted(reference["accepted"]) == list(reference["episodes"])
    steps = sum(len(columns["reward"][2]) // 4 - 1 for columns in reference["episodes"].values())
    assert steps == summary["real_env_steps"]
    gap = summary["dream_return_mean"] - summary["real_return_mean"]
    assert summary["dream_gap"] == pytest.approx(gap)


# ------------------------------------------------------------------------------------------------ who does the work


def haunted(base):
    """An executor whose workers and store are killed on the way, each at its work."""

    import ray

    class Haunted(base):
        killed: Counter

        def _kill(self, name, delay=0.0):
            if self.killed[name] < self.kills.get(name, 0):
                pids = self._pool(name).ready().pids()
                self.killed[name] += 1
                threading.Timer(delay, os.kill, (pids[-1], signal.SIGKILL)).start()

        def _lose_store(self, at):
            if self.kills.get(at) and not self.killed[at]:
                self.killed[at] += 1
                ray.kill(self.store, no_restart=False)

        def collect(self, numbers, stream):
            self._kill("collect")
            for played in super().collect(numbers, stream):
                yield played
                self._lose_store("store while collecting")

        def commit(self, numbers):
            self._lose_store("store before commit")
            super().commit(numbers)

        def fit(self, *args):
            self._lose_store("store before fit")
            self._kill("fit", 0.1)
            return super().fit(*args)

        def fitness(self, theta, seed):
            self._kill("dream", 0.005)
            return super().fitness(theta, seed)

    return Haunted


def on_ray(kills=None):
    """A factory of Ray executors for `run`."""
    from raywm.runtime.executor import RayExecutor

    def make(config, out):
        if not kills:
            return RayExecutor(config, out)
        work = haunted(RayExecutor)(config, out)
        work.kills, work.killed = kills, Counter()
        return work

    return make


def test_ray_gives_the_bits_of_one_process(reference, ray_session, tmp_path):
    summary = run(tiny(collect={"workers": 3}, dream={"workers": 1}), tmp_path, on_ray())
    assert summary["worker_deaths"] == 0
    same(outcome(tmp_path), reference)


def test_killed_workers_change_nothing(reference, ray_session, tmp_path):
    kills = {"collect": 1, "fit": 1, "dream": 1, "store while collecting": 1, "store before fit": 1}
    summary = run(tiny(), tmp_path, on_ray(kills))
    assert summary["worker_deaths"] == 3
    same(outcome(tmp_path), reference)
