"""Metrics beside metrics.jsonl: Weights & Biases, MLflow, Prometheus through Ray."""

from __future__ import annotations

import json
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
from test_report import SMALL
from typer.testing import CliRunner

from raywm import config as configs
from raywm.cli import app
from raywm.log import RunLog
from raywm.sinks import NAMES_FILE, check_sinks, open_sinks

TINY = [*SMALL, "iterations=1", "collect.initial_steps=60", "log.console=false"]


class Recorder:
    """A sink that remembers, and breaks where it is told to."""

    def __init__(self, breaks: str = ""):
        self.heard, self.breaks = [], breaks

    def write(self, row, step):
        if row["kind"] == self.breaks:
            raise ConnectionError("gone")
        self.heard.append((row["kind"], step, row.get("loss")))

    def finish(self, summary):
        self.heard.append(("summary", summary))

    def close(self, failed):
        self.heard.append(("close", failed))


def test_sinks_hear_every_line_once_though_a_resume_writes_them_again(tmp_path):
    first = Recorder()
    with RunLog(tmp_path, console=False, sinks=[first]) as log:
        for loss in (3.0, 2.0, 1.0):
            log.write("train", loss=loss)
        log.write("trial", return_mean=1)
        log.finish({"real": 1})
    assert first.heard == [
        ("train", 0, 3.0), ("train", 1, 2.0), ("train", 2, 1.0), ("trial", 0, None),
        ("summary", {"real": 1}), ("close", False),
    ]  # fmt: skip
    again = Recorder()
    with pytest.raises(KeyError), RunLog(tmp_path, console=False, sinks=[again]) as log:
        log.truncate(1)
        for loss in (2.0, 1.0, 0.5):
            log.write("train", loss=loss)
        raise KeyError
    assert again.heard == [("train", 3, 0.5), ("close", True)]


def test_a_sink_that_breaks_ends_with_a_warning_and_alone(tmp_path):
    broken, whole = Recorder(breaks="trial"), Recorder()
    with RunLog(tmp_path, tensorboard=False, console=False, sinks=[broken, whole]) as log:
        with pytest.warns(UserWarning, match="Recorder hears no more of this run: ConnectionError: gone"):
            log.write("trial", loss=1.0)
        log.write("train", loss=2.0)
    assert [h[0] for h in broken.heard] == [] and [h[0] for h in whole.heard] == ["trial", "train", "close"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_said_before_there_is_a_run(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", "cartpole", f"log.{name}=project", "--in-process", "--out", str(out)])
    assert done.exit_code == 2 and f'pip install "raywm[{name}]"' in done.output
    assert not out.exists()
    check_sinks(configs.load("cartpole"))


class FakeWandB(types.ModuleType):
    """What raywm uses of wandb, by its documented names."""

    def __init__(self):
        super().__init__("wandb")
        self.runs: list[dict] = []

    def init(self, **options):
        assert set(options) == {"id", "resume", "project", "name", "dir", "config", "group"}
        assert options["resume"] == "allow"
        run = {"options": options, "logged": [], "axes": {}, "summary": {}, "exit": None}
        self.runs.append(run)
        return types.SimpleNamespace(
            define_metric=lambda name, step_metric: run["axes"].__setitem__(name, step_metric),
            log=run["logged"].append,
            summary=run["summary"],
            finish=lambda exit_code: run.update(exit=exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_config_lines_and_summary_and_goes_on_after_a_resume(wandb, tmp_path):
    out = tmp_path / "run"
    command = ["train", "cartpole", *TINY, "log.wandb=my-project", "--in-process", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (run,) = wandb.runs
    assert run["options"]["project"] == "my-project" and run["options"]["name"] == "run"
    assert run["options"]["group"] is None
    assert run["options"]["config"]["fit.batch"] == 8 and run["axes"]["fit/*"] == "fit/count"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["fit/loss"] for line in run["logged"] if "fit/loss" in line]
    assert losses == [row["loss"] for row in rows if row["kind"] == "fit"] and len(losses) >= 2
    assert run["summary"] == json.loads((out / "summary.json").read_text()) and run["exit"] == 0
    assert CliRunner().invoke(app, [*command, "iterations=2", "--resume"]).exit_code == 0
    assert wandb.runs[1]["options"]["id"] == run["options"]["id"]
    kinds = [next(iter(line)).split("/")[0] for line in wandb.runs[1]["logged"]]
    assert kinds[0] == "collect" and len(wandb.runs[1]["logged"]) < len(rows) + 2


def test_a_sink_that_cannot_begin_is_one_line(wandb, tmp_path):
    def init(**options):
        raise RuntimeError("not logged in")

    wandb.init = init
    with pytest.raises(OSError, match=r"log\.wandb: got 'p', which wandb cannot open: not logged in; log in with"):
        open_sinks(configs.load("cartpole", ["log.wandb=p"]), tmp_path)


def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    out = tmp_path / "run"
    for turn in range(2):  # the second goes on in the same MLflow run, with more of what may change at a resume
        config = configs.load("cartpole", ["log.mlflow=worlds", "seed=5", f"iterations={turn + 3}"])
        with RunLog(out, tensorboard=False, console=False, sinks=open_sinks(config, out)) as log:
            log.write("train", loss=1.0 + turn, nothing=None, words="x")
            log.finish({"real_return_mean": 7.0, "stopped": "done"})
    client = mlflow.MlflowClient()
    name = json.loads((out / NAMES_FILE).read_text())["mlflow"]
    run = client.get_run(name)
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "5" and run.data.params["env.id"] == "CartPole-v1"
    assert run.data.params["iterations"] == "3"
    assert [(m.step, m.value) for m in client.get_metric_history(name, "train/loss")] == [(0, 1.0), (1, 2.0)]
    assert run.data.metrics["summary/real_return_mean"] == 7.0
    assert client.get_experiment(run.info.experiment_id).name == "worlds"


def test_two_trials_make_one_mlflow_experiment(tmp_path):
    """Both found that it is not there; the second one is told so when it makes it."""
    from raywm.sinks import MLflow

    class Client:
        there = None

        def get_experiment_by_name(self, name):
            return self.there

        def create_experiment(self, name):
            self.there = types.SimpleNamespace(experiment_id="7")
            raise RuntimeError("RESOURCE_ALREADY_EXISTS")

        def create_run(self, experiment, run_name):
            assert (experiment, run_name) == ("7", f"search-{tmp_path.name}")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_batch(self, id, params):
            pass

    library = types.SimpleNamespace(MlflowClient=Client, entities=types.SimpleNamespace(Param=lambda k, v: (k, v)))
    assert MLflow(library, "worlds", tmp_path, configs.load("cartpole"), "search").id == "r"


def test_trials_are_told_of_as_one_group(wandb, tmp_path, monkeypatch):
    """A trial as Tune calls it, twice: ended by its scheduler after its first report, and at its own end."""
    from ray import tune

    from raywm import search as searches
    from raywm import tune as searching

    overrides = dict(item.split("=", 1) for item in [*SMALL, "iterations=2", "log.wandb=p"])
    data = {"preset": "cartpole", "space": {"fit.lr": {"uniform": [0.001, 0.01]}}, "resources": {"in_process": True}}
    path, out = tmp_path / "search.yaml", tmp_path / "tune-x"
    path.write_text(json.dumps(data))
    given = [f"overrides.{key}={value}" for key, value in overrides.items()]
    setup = {"search": searches.dumps(searches.load(path, given)), "out": str(out), "data": None}
    monkeypatch.setattr(tune, "get_context", lambda: types.SimpleNamespace(get_trial_id=lambda: "abc_00000"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(tune, "report", lambda *_, **__: sys.exit(0))
    with pytest.raises(SystemExit):
        searching.run_trial({"fit.lr": 0.005}, setup)
    monkeypatch.setattr(tune, "report", lambda *_, **__: None)
    searching.run_trial({"fit.lr": 0.005}, setup)
    first, second = wandb.runs
    assert (first["options"]["group"], first["options"]["name"]) == ("tune-x", "tune-x-00000")
    assert first["options"]["id"] == second["options"]["id"] and (first["exit"], second["exit"]) == (0, 0)
    assert not first["summary"] and second["summary"]["iterations"] == 2
    told = [line for run in wandb.runs for line in run["logged"] if "trial/return_mean" in line]
    assert [line["trial/count"] for line in told] == [0, 1]


def scrape(ray) -> dict[str, float]:
    """What Prometheus would read of raywm: name and run -> value."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("ray_raywm_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            found[f"{name} {'run=' + labels.split('run=')[1].split(',')[0]}".replace('"', "")] = float(value)
    return found


@pytest.mark.slow
def test_prometheus_counts_a_run_on_ray(ray_session, tmp_path):
    from raywm.runtime.metrics import RayMetrics

    out = tmp_path / "counted"
    sink = RayMetrics(configs.load("dreamer-cartpole"), out)
    for steps, updates in ((100, 10), (250, 40), (300, 35)):  # the learner went back
        sink.write({"kind": "train", "real_env_steps": steps, "updates": updates, "train_ratio": 3.5}, 0)
    for _ in range(3):
        sink.write({"kind": "episode", "real_env_steps": 300, "return": 9.0}, 0)
    sink.write({"kind": "trial", "real_env_steps": 320, "return_mean": 12.5, "episodes": 4}, 0)
    sink.finish({"worker_deaths": 2})
    wanted = {
        "ray_raywm_real_steps_total run=counted": 320,
        "ray_raywm_updates_total run=counted": 40,
        "ray_raywm_episodes_total run=counted": 7,
        "ray_raywm_return run=counted": 12.5,
        "ray_raywm_train_ratio run=counted": 3.5,
        "ray_raywm_worker_deaths run=counted": 2,
    }
    end, seen = time.monotonic() + 60, {}
    while time.monotonic() < end and not wanted.items() <= seen.items():
        time.sleep(1)
        seen = scrape(ray_session)
    assert wanted.items() <= seen.items(), seen


def test_a_resumed_run_counts_only_what_is_new(tmp_path, monkeypatch):
    from raywm.runtime import metrics

    told = []
    monkeypatch.setattr(metrics.RayMetrics, "_metric", lambda self, name, kind, text: Told(name, told))
    with RunLog(tmp_path, console=False) as log:
        log.write("train", real_env_steps=1000, updates=50)
    sink = metrics.RayMetrics(configs.load("dreamer-cartpole"), tmp_path)
    sink.write({"kind": "train", "real_env_steps": 990, "updates": 49}, 1)  # done again
    sink.write({"kind": "train", "real_env_steps": 1010, "updates": 51}, 2)
    sink.write({"kind": "collect", "data": "runs/other", "episodes": 70, "real_env_steps": 1010}, 0)
    assert told == [("raywm_real_steps", 10), ("raywm_updates", 1)]


@pytest.mark.slow
def test_the_command_line_counts_in_ray(tmp_path, monkeypatch, ray_session):
    from raywm.runtime import metrics

    told = []
    monkeypatch.setattr(metrics.RayMetrics, "_metric", lambda self, name, kind, text: Told(name, told))
    out = Path(tmp_path / "run")
    command = ["train", "cartpole", *TINY, "collect.workers=1", "dream.workers=1", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    assert sum(v for name, v in told if name == "raywm_real_steps") == summary["real_env_steps"]
    assert [v for name, v in told if name == "raywm_return"][-1] == summary["real_return_mean"]


class Told:
    def __init__(self, name, told):
        self.name, self.told = name, told

    def inc(self, value):
        self.told.append((self.name, value))

    set = inc
