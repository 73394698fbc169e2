"""Searches: strict files, trials in their own groups, shared episodes that are counted, resumes, copies, failures."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from test_loop import TINY, rows, run, tiny
from typer.testing import CliRunner

from raywm import checkpoint
from raywm import config as configs
from raywm import search as searches
from raywm.cli import app
from raywm.data.dataset import Dataset
from raywm.data.store import EpisodeStore
from raywm.log import RunLog
from raywm.loops import shared
from raywm.loops.online import Online
from raywm.loops.online_work import LocalOnline
from raywm.loops.saved import open_run
from raywm.report.search import commands, write_search_report
from raywm.standings import Scores, directories, real_steps, spent, standings

ROOT = Path(__file__).parents[1]
SMALL = {
    "preset": "cartpole",
    "overrides": {
        **{k: v for k, v in TINY.items() if k not in ("env", "seed")},
        "env": {"time_limit": 30},
        "target": {"episodes": 2, "real_return": None},
        "budget": {"real_steps": None},
        "collect": {"workers": 1, "envs": 4, "initial_steps": 100, "episodes": 2},
        "fit": {"memory_steps": 10, "batch": 4, "sequence": 8, "evaluate_every": 5, "threads": 1},
        "evolve": {"population": 4, "rollouts": 2, "generations": 2},
        "dream": {"workers": 1, "unit": 4, "horizon": 20},
        "evaluate": {"episodes": 2},
    },
    "space": {"fit.lr": {"loguniform": [1e-3, 1e-2]}},
    "trials": 2,
    "resources": {"in_process": True},
}
DREAMER = {
    "preset": "dreamer-cartpole",
    "overrides": {
        "env.time_limit": 20,
        "target.real_return": None,
        "collect": {"workers": 1, "envs": 4},
        "rssm": {"deter": 8, "stoch": 2, "classes": 2, "units": 8, "hidden": 8, "bins": 11},
        "dreamer": {"batch": 2, "sequence": 4, "warmup": 0},
        "online": {"steps": 160, "prefill": 40, "train_ratio": 1, "evaluate_every": 80, "evaluate_episodes": 1},
        "evaluate.episodes": 1,
        "log.tensorboard": False,
    },
    "space": {"dreamer.lr": {"loguniform": [1e-4, 1e-3]}},
    "resources": {"in_process": True},
}


def written(path, **changes):
    """A search file: SMALL with keys changed; None takes one out."""
    data = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def searched(tmp_path, **changes):
    return searches.load(written(tmp_path / "file" / "search.yaml", **changes))


def do(search, out):
    from raywm.tune import open_search, run_search

    with open_search(search, out, False):
        run_search(search, out)
    return standings(search, out)


# ---------------------------------------------------------------------------------------------------- files


def test_every_shipped_search_is_sound():
    assert {"vmc_cartpole_random", "vmc_cartpole_asha", "doom_temperature", "dreamer_pbt", "rssm_size_grid"} < set(
        searches.names()
    )
    for name in searches.names():
        whole, small = searches.load(name), searches.load(name, smoke=True)
        assert small.total <= whole.total
        assert searches.parse_text(searches.dumps(small), name).space == small.space


BAD = {
    "spce: {}": ({"spce": {}}, "unknown key 'spce'; did you mean 'space'"),
    "spce for space": ({"spce": {}, "space": None}, "unknown key 'spce'; did you mean 'space'"),
    "no space": ({"space": None}, "space is missing"),
    "key of a run": ({"space": {"fit.lrr": {"uniform": [0, 1]}}}, r"space.fit.lrr: .*did you mean 'fit.lr'"),
    "sampler": (
        {"space": {"fit.lr": {"loguniforn": [1, 2]}}},
        "unknown sampler 'loguniforn'; did you mean 'loguniform'",
    ),
    "code": ({"space": {"fit.lr": {"sample_from": ["__import__('os')"]}}}, "unknown sampler 'sample_from'"),
    "a mere value": ({"space": {"fit.lr": 0.1}}, "space.fit.lr: got 0.1, expected one sampler"),
    "bounds": ({"space": {"fit.lr": {"uniform": [1, 0]}}}, "expected the low end below the high one"),
    "log of 0": ({"space": {"fit.lr": {"loguniform": [0, 1]}}}, "expected a low end above 0"),
    "numbers": ({"space": {"fit.lr": {"uniform": [0, "x"]}}}, "expected numbers"),
    "step": ({"space": {"fit.lr": {"quniform": [0, 1]}}}, r"expected numbers \[low, high, step\]"),
    "an end": (
        {"space": {"fit.lr": {"uniform": [0, 1]}}},
        "space.fit.lr: cartpole: fit.lr: got 0, expected more than 0",
    ),
    "whole": ({"space": {"fit.patience": {"uniform": [8, 16]}}}, "a whole number.*; randint, qrandint and lograndint"),
    "whole or null": (
        {"space": {"dream.horizon": {"uniform": [100, 900]}}, "overrides": {}},
        "dream.horizon: got .*a whole number",
    ),
    "no multiples": ({"space": {"fit.lr": {"quniform": [0.05, 0.5, 0.1]}}}, "multiples of the step"),
    "no whole multiples": ({"space": {"fit.batch": {"qrandint": [1, 10, 3]}}}, "multiples of the step"),
    "grace": ({"scheduler": {"asha": {"grace": 9}}}, "scheduler.asha.grace: got 9, but a trial reports 2 times"),
    "one storage": ({"overrides": {"replay.storage": "s3://b/x"}}, "replay.storage: .* holds one run, not many trials"),
    "a choice": ({"space": {"controller.kind": {"choice": ["mlp", "mpl"]}}}, "controller.kind: got 'mpl'"),
    "empty": ({"space": {"fit.lr": {"choice": []}}}, "expected a list of values"),
    "twice": ({"overrides": {"fit.lr": 0.1}}, "overrides.fit.lr: it is in the space as well"),
    "override": ({"overrides": {"fit": {"lrr": 1}}}, "unknown key 'fit.lrr'; did you mean 'fit.lr'"),
    "preset": ({"preset": "cartpol"}, "did you mean 'cartpole'"),
    "scheduler": ({"scheduler": "ashaa"}, "scheduler: got 'ashaa', expected none, asha or pbt"),
    "its key": ({"scheduler": {"asha": {"gace": 1}}}, "unknown key 'scheduler.asha.gace'; did you mean"),
    "two of them": ({"scheduler": {"asha": {}, "pbt": {}}}, "expected one scheduler"),
    "pbt of sizes": (
        {"scheduler": "pbt", "trials": 4, "space": {"controller.hidden": {"choice": [8, 16]}}},
        "space.controller.hidden cannot change in the middle of a run",
    ),
    "pbt of two": ({"scheduler": "pbt"}, "expected a population of 4 or more"),
    "pbt of a grid": ({"scheduler": "pbt", "space": {"fit.lr": {"grid": [0.1]}}}, "draws values; use choice"),
    "trials of a grid": ({"space": {"fit.lr": {"grid": [0.1, 0.2]}}}, "expected to be left out"),
    "metric": ({"metric": "reward"}, "metric"),
    "no trial": ({"trials": 0}, "trials: got 0"),
    "data of a dreamer": ({**DREAMER, "data": "train"}, "only vmc shares"),
    "smoke": ({"smoke": {"trils": 1}}, "smoke: unknown key 'trils'"),
    "address": ({"space": {"address": {"choice": ["auto"]}}}, "decides what a run computes"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        searches.load(written(tmp_path / "bad.yaml", **changes))
    assert "\n" not in str(caught.value)


def test_yaml_tags_are_not_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"preset: !!python/object/apply:os.system ['touch {tmp_path}/done']\n")
    with pytest.raises(ValueError, match=r"bad YAML at line 1"):
        searches.load(path)
    assert not (tmp_path / "done").exists()


def test_names_and_overrides(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vmc_cartpole_asha'"):
        searches.load("vmc_cartpol_asha")
    with pytest.raises(ValueError, match="no search file"):
        searches.load(tmp_path / "none.yaml")
    search = searches.load("vmc_cartpole_asha", ["trials=4", "scheduler.asha.grace=2", "overrides.seed=5"])
    assert (search.total, search.scheduler.asha.grace, search.run_config().seed) == (4, 2, 5)


def test_bounds_are_inclusive_and_kept():
    from raywm.tune import _bounded, domain

    sample = searches.Sampler
    drawn = {domain(sample("randint", (1, 3))).sample() for _ in range(200)}
    assert drawn == {1, 2, 3}
    assert {domain(sample("qrandint", (2, 6, 2))).sample() for _ in range(200)} == {2, 4, 6}
    assert domain(sample("grid", (1, 2))) == {"grid_search": [1, 2]}
    space = {"a": sample("uniform", (0.0, 1.0)), "b": sample("qrandint", (2, 6, 2)), "c": sample("choice", ("x",))}
    assert _bounded(space, {"a": 1.2, "b": 5.2, "c": "x"}) == {"a": 1.0, "b": 6, "c": "x"}


def test_optuna_is_asked_for(tmp_path, monkeypatch):
    from raywm.tune import _searcher

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'raywm\[optuna\]'"):
        _searcher(searched(tmp_path, search="optuna"))


# ---------------------------------------------------------------------------------------------------- shared episodes


def shared_run(config, out):
    out.mkdir()
    configs.save(config, out / "config.yaml")
    shared.share(config, out)
    return run(config, out)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    config = tiny(iterations=1)
    out.mkdir()
    configs.save(config, out / "config.yaml")
    run(config, out)
    return out


def test_a_run_learns_from_anothers_episodes(source, tmp_path):
    before = {path: path.read_bytes() for path in (source / "episodes").glob("*.arrows")}
    ours = tiny(iterations=2, data=str(source))
    summary = shared_run(ours, tmp_path / "run")
    again = shared_run(ours, tmp_path / "again")
    assert {k: v for k, v in again.items() if k != "wall_seconds"} == {
        k: v for k, v in summary.items() if k != "wall_seconds"
    }
    assert {path: path.read_bytes() for path in (source / "episodes").glob("*.arrows")} == before
    linked = [path for path in (tmp_path / "run" / "episodes").glob("*.arrows") if path.stat().st_nlink > 1]
    assert {path.name for path in linked} == {path.name for path in before}
    state = checkpoint.load(tmp_path / "run" / "checkpoints").state
    theirs = checkpoint.load(source / "checkpoints").state
    assert state["accepted"] == theirs["accepted"]
    assert state["random"] == pytest.approx(theirs["random"])
    # what was played: trials only, under names of their own
    trials = [row for row in rows(tmp_path / "run") if row["kind"] == "trial"]
    played = sum(round(row["episodes"] * row["length_mean"]) for row in trials)
    assert summary["real_env_steps"] == played > 0
    assert real_steps(tmp_path / "run")["collected"] == 0
    with EpisodeStore(tmp_path / "run" / "episodes", read_only=True) as store:
        assert set(theirs["accepted"]) < set(store.ids())
        assert sum(store.length(id)[0] for id in store.ids() if id.startswith("trial-")) >= played
    with Dataset(tmp_path / "run") as dataset:
        assert dataset.verify()["ok"]
    assert open_run(tmp_path / "run").agent() is not None


def test_shared_data_must_fit(source, tmp_path):
    for config, message in (
        (tiny(data=str(source), env={"time_limit": 61}), "give the run the same env section"),
        (tiny(data=str(tmp_path)), "no config.yaml and no dataset.json"),
        (tiny(data="s3://bucket/run"), "on this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            shared.share(config, tmp_path / "run")
    with pytest.raises(ValueError, match="only vmc learns from episodes"):
        configs.parse({"algorithm": "dreamer", "env": {"id": "CartPole-v1"}, "data": "runs/x"})


def test_episodes_of_another_policy_calibrate_nothing(source, tmp_path):
    summary = shared_run(tiny(iterations=1, data=str(source), collect={"policy": "random"}), tmp_path / "run")
    assert summary["random_return_mean"] is None and summary["calibration_gap"] is None


def test_an_open_segment_is_copied(tmp_path):
    from raywm.envs.classic import bifurcation_episodes

    with EpisodeStore(tmp_path / "a") as store:
        for episode in bifurcation_episodes(3, 0):
            store.add(episode)
        shared.link(tmp_path / "a", tmp_path / "b")
        ids = store.ids()
        with EpisodeStore(tmp_path / "b") as other:
            assert other.ids() == ids
        assert store.opened() is not None


# ---------------------------------------------------------------------------------------------------- searches


def smoke_search(name, tmp_path, *overrides):
    if name == "doom_temperature":
        pytest.importorskip("vizdoom", reason="needs raywm[doom]")
    search = searches.load(name, overrides, smoke=True)
    trials = do(search, tmp_path / "out")
    assert len(trials) == search.total
    assert [t.status for t in trials if t.error] == []
    for trial in trials:
        assert trial.score is not None and math.isfinite(trial.score)
        assert open_run(trial.path).agent() is not None
    page = write_search_report(search, tmp_path / "out", trials, spent(tmp_path / "out")).read_text()
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page
    assert all(trial.path.name in page for trial in trials)
    return search, trials


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmc_cartpole_asha", "dreamer_pbt"])
def test_smoke_in_process(name, tmp_path, ray_session):
    search, trials = smoke_search(name, tmp_path, "resources.in_process=true")
    if search.data is not None:
        steps = spent(tmp_path / "out")
        with Dataset(tmp_path / "out" / "source") as dataset:
            assert 0 < steps["shared"] <= dataset.steps
        assert steps["collected"] == 0 < steps["trials"]
        for trial in trials:  # not a step more than the shared ones but in trials
            with EpisodeStore(trial.path / "episodes", read_only=True) as store:
                assert all(id.startswith("trial-") for id in set(store.ids()) - set(dataset.ids()))


@pytest.mark.slow
@pytest.mark.parametrize("name", searches.names())
def test_smoke(name, tmp_path, ray_session):
    inside = {"smoke", "vmc_cartpole_random", "vmc_cartpole_asha"}  # as they are; the others' trials are smaller
    smoke_search(name, tmp_path, *([] if name in inside else ["resources.in_process=false"]))


@pytest.mark.slow
def test_actors_are_scheduled_inside_the_trials_group(tmp_path, all_cpus):
    # its group takes all 8 CPUs there are: an actor outside of it would wait for ever
    overrides = {**SMALL["overrides"], "iterations": 1, "dream": {**SMALL["overrides"]["dream"], "threads": 6}}
    search = searched(tmp_path, overrides=overrides, resources=None, trials=1, concurrent=1)
    (trial,) = do(search, tmp_path / "out")
    assert trial.status == "done"


def test_a_failing_trial_leaves_the_others_alone(tmp_path, ray_session):
    space = {"env.id": {"grid": ["CartPole-v1", "NoSuchEnv-v0"]}}
    search = searched(tmp_path, space=space, trials=None)
    good, bad = do(search, tmp_path / "out")
    assert (good.status, bad.status) == ("done", "failed")
    assert "NoSuchEnv" in bad.error and "\n" not in bad.error
    page = write_search_report(search, tmp_path / "out", [good, bad], spent(tmp_path / "out")).read_text()
    assert "NoSuchEnv" in page
    assert commands(tmp_path / "out", good)[0].startswith(f"raywm evaluate {good.path} ")
    result = CliRunner().invoke(app, ["evaluate", str(good.path), "--episodes", "2", "--seed", "9", "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["episodes"] == 2


@pytest.mark.slow
def test_all_failing_is_an_error(tmp_path, ray_session):
    with pytest.raises(ValueError, match="all 1 trials failed, the first one with: ValueError: .*NoSuchEnv"):
        do(searched(tmp_path, space={"env.id": {"grid": ["NoSuchEnv-v0"]}}, trials=None), tmp_path / "out")


def test_a_directory_is_one_searchs(tmp_path):
    from raywm.tune import open_search

    search, out = searched(tmp_path), tmp_path / "out"
    with open_search(search, out, False):
        with pytest.raises(ValueError, match="is being written by another process"):
            with open_search(search, out, True):
                pass
    with pytest.raises(ValueError, match="already holds a search; continue it with --resume"):
        with open_search(search, out, False):
            pass
    with pytest.raises(ValueError, match="trials: got 3, but the search was started with 2"):
        with open_search(searched(tmp_path, trials=3), out, True):
            pass
    with open_search(search, out, True):
        pass
    with pytest.raises(ValueError, match="is not empty and holds no search"):
        with open_search(search, tmp_path, False):
            pass


def test_a_search_that_cannot_start_leaves_no_directory(tmp_path, monkeypatch):
    from raywm.tune import open_search

    monkeypatch.setitem(sys.modules, "optuna", None)
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for changes, said in (
        ({"data": str(tmp_path / "none")}, "data: got .*none', expected the directory of a run or a dataset"),
        ({"data": str(tmp_path / "empty")}, "has no config.yaml and no dataset.json"),
        ({"search": "optuna"}, "search: optuna needs optuna"),
    ):
        with pytest.raises(ValueError, match=said):
            with open_search(searched(tmp_path, **changes), out, True):
                pass
        assert not out.exists()  # where only the address could be mended


def test_scores():
    scores = Scores({"real_return": 1.0, "model_quality": 100.0}, "vmc")
    for turn, (real, error) in enumerate([(20.0, 0.5), (10.0, 0.2)]):
        assert not scores.take({"kind": "quality", "open_loop_15": error, "open_loop_50": None})
        assert scores.take({"kind": "trial", "iteration": turn, "return_mean": real, "real_env_steps": 7})
    # V-M-C keeps the better controller
    assert [(r.turn, r.real_return, round(r.score, 6)) for r in scores.reports()] == [(1, 20.0, 70.0), (2, 20.0, 100.0)]
    scores.take({"kind": "trial", "iteration": 1, "return_mean": 30.0})  # done again
    assert len(scores.reports()) == 2 and scores.report().real_return == 30.0
    dreamer = Scores({"model_quality": 1.0}, "dreamer")
    dreamer.take({"kind": "trial", "return_mean": 5.0})
    assert dreamer.report().score is None
    dreamer.take({"kind": "train", "model_loss": 2.0})
    assert dreamer.report().score == -2.0


def test_a_trial_that_cannot_say_why_it_died_has_failed_as_well(tmp_path, capsys):
    from raywm.tune import Teller, mark_dead

    search, out = searched(tmp_path), tmp_path / "out"
    error = RuntimeError("The actor died unexpectedly before finishing this task.\n\tpid: 7\nIts node has died.")
    dead = types.SimpleNamespace(path=str(out / "tune" / "00001"), error=error, config={"fit.lr": 0.002})
    mark_dead(out, [dead, types.SimpleNamespace(path=str(out / "tune" / "00000"), error=None, config={})])
    (trial,) = standings(search, out)
    assert (trial.name, trial.status, trial.values) == ("00001", "failed", {"fit.lr": 0.002})
    assert trial.error == "its process died: Its node has died."
    told = types.SimpleNamespace(trial_id="abc_00001")
    Teller(out, 2).on_trial_complete(1, [], told)
    assert trial.error in capsys.readouterr().out
    # a failure in a directory that the trial has left does not count
    later = out / "trials" / "00001-1"
    later.mkdir()
    checkpoint.atomic_write_json(later / "trial.json", {"trial": "00001", "values": {}})
    Teller(out, 2).on_trial_complete(2, [], told)
    assert "failed" not in capsys.readouterr().out


def test_what_a_loop_takes_back_is_no_report(tmp_path):
    """A Dreamer that is killed between an evaluation and its checkpoint evaluates again: as the same report."""
    from raywm.tune import _Trial, _TrialLog

    search = searched(tmp_path, **DREAMER)
    trial = _Trial(search, search.run_config(), tmp_path)
    with _TrialLog(trial, tmp_path, False, []) as log:
        for value in (1.0, 2.0):
            log.write("train", model_loss=float("nan"), real_env_steps=80)
            log.write("trial", return_mean=value, real_env_steps=80)
        assert trial.scores.report().turn == 2 and trial.scores.report().model_quality is None
    again = _Trial(search, search.run_config(), tmp_path)
    with _TrialLog(again, tmp_path, False, []) as log:
        log.truncate(2)
        assert again.pending and again.scores.report().turn == 1
        log.write("trial", return_mean=3.0, real_env_steps=80)
        assert [(r.turn, r.real_return) for r in again.scores.reports()] == [(1, 1.0), (2, 3.0)]


def test_places_of_trials_and_modules_that_travel(tmp_path):
    from raywm.tune import modules_of, needs_of

    search = searched(tmp_path, resources={"driver_cpus": 1})
    assert [(n.cpus, n.count) for n in needs_of(search, search.run_config(), 2)] == [(1.0, 2)] * 4
    whole = searched(tmp_path, resources={"driver_cpus": 1, "strategy": "STRICT_PACK"})
    (need,) = needs_of(whole, whole.run_config(), 2)
    assert (need.cpus, need.count) == (4.0, 2)
    kinds = {"space": {"model.kind": {"choice": ["squares:Squares", "vm"]}}}
    overrides = {k: v for k, v in SMALL["overrides"].items() if k != "model"}
    assert modules_of(searched(tmp_path, **kinds, overrides=overrides))[-1] == "squares"


def test_a_search_keeps_its_preset(tmp_path, ray_session, monkeypatch):
    """A file that is named from where the search started, and is changed later: trials have what it was."""
    (tmp_path / "mine.yaml").write_text(configs.dumps(configs.load("cartpole", ["seed=5"])))
    monkeypatch.chdir(tmp_path)
    overrides = {**SMALL["overrides"], "iterations": 1}
    search = searched(tmp_path, preset="mine.yaml", overrides=overrides, trials=1)
    do(search, tmp_path / "out")
    (tmp_path / "mine.yaml").write_text(configs.dumps(configs.load("cartpole", ["seed=6"])))
    assert configs.load(tmp_path / "out" / "preset.yaml").seed == 5
    (run,) = directories(tmp_path / "out")
    assert configs.load(run / "config.yaml").seed == 5


def online(config, out):
    out.mkdir(exist_ok=True)
    configs.save(config, out / "config.yaml")
    with RunLog(out, False, False) as log, LocalOnline(config, out) as executor:
        return Online(config, out, executor, log).run()


def test_a_copy_goes_on_with_other_values(tmp_path):
    """What population-based training does to a trial: another's checkpoint and replay, with its own values changed."""
    from raywm.tune import copy_run

    search = searched(tmp_path, **DREAMER, trials=None)
    before = search.run_config({"dreamer.lr": 1e-4})
    first = online(before, tmp_path / "donor")
    copy_run(tmp_path / "donor", tmp_path / "copy")
    inherited = real_steps(tmp_path / "copy")
    assert inherited["collected"] == first["real_env_steps"]
    after = search.run_config({"dreamer.lr": 1e-3, "online.steps": 240})
    second = online(after, tmp_path / "copy")
    assert 236 < second["real_env_steps"] <= 240 and second["updates"] > first["updates"]
    more = real_steps(tmp_path / "copy")["collected"] - inherited["collected"]
    assert more == second["real_env_steps"] - first["real_env_steps"] and not second["lost_updates"]
    assert json.loads((tmp_path / "donor" / "summary.json").read_text()) == json.loads(json.dumps(first))


# ---------------------------------------------------------------------------------------------------- the command


def command(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "raywm.cli", "tune", *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reported(out, count, seconds=300):
    """Wait until trials have reported so often in all."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lines = [line for run in directories(out) if (run / "metrics.jsonl").is_file() for line in rows(run)]
        if sum(line["kind"] == "trial" for line in lines) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {count} reports within {seconds} s")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_stopped_search_goes_on(sign, tmp_path):
    file = written(tmp_path / "search.yaml", trials=5, overrides={**SMALL["overrides"], "iterations": 3})
    out = tmp_path / "out"
    first = command(file, "--out", out)
    try:
        reported(out, 7)
        second = command(file, "--out", out, "--resume")
        assert "is being written by another process" in second.communicate(timeout=200)[0] and second.returncode == 2
        first.send_signal(sign)
        said = first.communicate(timeout=200)[0]
    finally:
        first.kill()
    if sign == signal.SIGINT:
        assert first.returncode == 130
        assert said.strip().splitlines()[-1] == f"stopped; continue with: raywm tune {file} --out {out} --resume"
    done = {
        run.name: (run / "summary.json").stat().st_mtime_ns
        for run in directories(out)
        if (run / "summary.json").exists()
    }
    assert done and len(done) < 5
    result = command(file, "--out", out, "--resume")
    said = result.communicate(timeout=500)[0]
    assert result.returncode == 0, said
    trials = standings(searches.load(file), out)
    assert [t.status for t in trials] == ["done"] * 5 and all(t.last.turn == 3 for t in trials)
    for name, stamp in done.items():  # what had ended was not done again
        assert (out / "trials" / name / "summary.json").stat().st_mtime_ns == stamp
    again = command(file, "--out", out, "--resume")
    assert again.communicate(timeout=300)[0].count("report 1:") == 0 and again.returncode == 0
