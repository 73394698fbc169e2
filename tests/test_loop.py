"""The V-M-C loop as a whole: the same bits whoever does the work, whoever dies, and wherever it is resumed."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from raywm import checkpoint
from raywm import config as configs
from raywm.data.batch import Batch
from raywm.data.snapshot import Snapshot
from raywm.data.store import EpisodeStore
from raywm.envs.classic import BifurcationEnv, FaultyEnv, LinearWorldEnv, bifurcation_episodes, check_counting
from raywm.evaluate import encoded_actions
from raywm.fit import Trainer
from raywm.log import RunLog
from raywm.loops import vmc
from raywm.loops.executor import InProcess
from raywm.loops.parts import in_order
from raywm.models import build_model
from raywm.seeding import derive
from raywm.spaces import ActionCodec

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
    return [
        {k: v for k, v in row.items() if k not in ("time", "wall_seconds")}
        for row in lines
        if kind in (None, row["kind"])
    ]


def outcome(out):
    """All that the seed decides: metrics, summary, final controller and model, and every stored byte."""
    saved = checkpoint.load(out / "checkpoints")
    summary = json.loads((out / "summary.json").read_text())
    with EpisodeStore(out / "episodes", read_only=True) as store:
        episodes = {}
        for id in saved.state["accepted"]:  # others had ended before a collector heard that there are enough
            episode = store.get(id)
            info = {k: v for k, v in episode.info.items() if k != "collector"}
            columns = {**episode.columns(), "info": np.array(json.dumps(info, sort_keys=True))}
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
    assert list(dict.fromkeys(kinds)) == [
        "collect", "fit", "quality", "calibration", "generation", "dream", "trial", "evaluate"
    ]  # fmt: skip
    summary = reference["summary"]
    assert summary["iterations"] == 2 and summary["real_return_episodes"] == 6
    assert reference["accepted"] == list(reference["episodes"])
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

        def haunt(self):
            collect, self.rollouts.collect = self.rollouts.collect, lambda *args: doomed(*args)

            def doomed(*args):
                self._kill(self.rollouts.pool)
                for played in collect(*args):
                    yield played
                    self._lose_store("store while collecting")

        def _kill(self, pool, delay=0.0):
            if self.killed[pool.name] < self.kills.get(pool.name, 0):
                pids = pool.ready().pids()
                self.killed[pool.name] += 1
                threading.Timer(delay, os.kill, (pids[-1], signal.SIGKILL)).start()

        def _lose_store(self, at):
            if self.kills.get(at) and not self.killed[at]:
                self.killed[at] += 1
                ray.kill(self.rollouts.shards.actors[0], no_restart=False)

        def fit(self, *args):
            self._lose_store("store before fit")
            self._kill(self._pool("fit"), 0.1)
            return super().fit(*args)

        def fitness(self, theta, seed):
            self._kill(self._pool("dream"), 0.005)
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
        work.haunt()
        return work

    return make


@pytest.mark.slow
def test_ray_gives_the_bits_of_one_process(reference, ray_session, tmp_path):
    summary = run(tiny(collect={"workers": 3}, dream={"workers": 1}), tmp_path, on_ray())
    assert summary["worker_deaths"] == 0
    same(outcome(tmp_path), reference)


def test_killed_workers_change_nothing(reference, ray_session, tmp_path):
    kills = {"collect": 1, "fit": 1, "dream": 1, "store while collecting": 1, "store before fit": 1}
    summary = run(tiny(), tmp_path, on_ray(kills))
    assert summary["worker_deaths"] == 3
    same(outcome(tmp_path), reference)


# ------------------------------------------------------------------------------------------------ resume


def die_at(config, out, event, count, ray=False):
    """Run until the `count`-th event, and die there of SIGKILL. In a process of its own.

    Events: "row" (a line of metrics was written), "add" (an episode), "save" (a checkpoint is about to appear),
    "saved" (it has just appeared), "summary" (it is written, its checkpoint is not), or a method of the executor (its
    work has been under way for a moment).
    """
    left = [count]
    executor = on_ray() if ray else InProcess
    if ray:
        from raywm.runtime.executor import RayExecutor
        from raywm.runtime.rollouts import Rollouts

        def doomed(function):
            def wrapper(self, *args):
                left[0] -= 1
                if left[0] == 0:
                    for pool in self._pools.values() if hasattr(self, "_pools") else [self.pool]:
                        pool.ready()
                    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
                    if event != "collect":  # which works only as its results are taken
                        function(self, *args)
                        time.sleep(60)
                return function(self, *args)

            return wrapper

        for cls in (RayExecutor, Rollouts):
            if hasattr(cls, event):
                setattr(cls, event, doomed(getattr(cls, event)))

    def mortal(function, name, after=True):
        def wrapper(*args, **kwargs):
            left[0] -= name == event
            if not after and name == event and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if after and name == event and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    vmc.SAVE_EVERY_S = 0.0
    RunLog.write = mortal(RunLog.write, "row")
    EpisodeStore.add = mortal(EpisodeStore.add, "add")
    checkpoint._publish = mortal(mortal(checkpoint._publish, "save", after=False), "saved")
    checkpoint.atomic_write_json = mortal(checkpoint.atomic_write_json, "summary")
    run(config, out, executor)


def kill(config, out, event, count):
    """`die_at` in a process forked from one that has imported everything."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["pytest", "raywm.loops.executor", "raywm.loops.vmc", "safetensors.torch"])
    child = fork.Process(target=die_at, args=(config, out, event, count))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, (event, count, child.exitcode)


def test_killed_drivers_change_nothing(reference, tmp_path, monkeypatch):
    """kill -9 after kill -9, in every phase and in the middle of every kind of write; then the rest of the run."""
    process = multiprocessing.get_context("forkserver")
    process.set_forkserver_preload(
        ["torch", "raywm.loops.executor", "raywm.loops.vmc", "gymnasium.envs.classic_control"]
    )
    deaths = [
        ("add", 4),  # in the middle of the first commit
        ("row", 1),  # collected, not yet saved
        ("row", 3),  # in the fit
        ("saved", 2),  # between fit and calibration
        ("row", 2),  # calibrated; in the dream
        ("save", 2),  # a generation's checkpoint not yet there
        ("add", 2),  # in a trial
        ("save", 1),  # after it
        ("row", 9),  # in the second search
        ("summary", 1),  # evaluated
    ]
    for event, count in deaths:
        kill(tiny(), tmp_path, event, count)
    monkeypatch.setattr(vmc, "SAVE_EVERY_S", 0.0)
    run(tiny(), tmp_path)
    same(outcome(tmp_path), reference)


def test_a_finished_run_stays_or_goes_on(reference, tmp_path):
    first = run(tiny(iterations=1), tmp_path)
    before = outcome(tmp_path)
    assert run(tiny(iterations=1), tmp_path) == first
    same(outcome(tmp_path), before)
    assert run(tiny(), tmp_path)["iterations"] == 2
    got = outcome(tmp_path)
    assert [r["kind"] for r in got["metrics"]].count("evaluate") == 2  # of the first end as well
    got["metrics"] = [r for r in got["metrics"] if r["kind"] != "evaluate" or r["iteration"] == 1]
    same(got, reference)
    (tmp_path / "summary.json").unlink()
    run(tiny(), tmp_path)
    assert outcome(tmp_path)["summary"] == reference["summary"]


def test_an_interrupted_measurement_goes_on_with_more_iterations(reference, tmp_path):
    def stopped(*args):
        raise KeyboardInterrupt

    def executor(config, out):
        work = InProcess(config, out)
        work.rollouts.play = stopped
        return work

    with pytest.raises(KeyboardInterrupt):
        run(tiny(iterations=1), tmp_path, executor)
    run(tiny(), tmp_path)
    same(outcome(tmp_path), reference)


def test_a_changed_config_is_refused_by_its_key():
    configs.diff_for_resume(tiny(), tiny(iterations=9, collect={"workers": 7}, budget={"real_steps": 10}))
    for changed, key in (({"seed": 4}, "seed"), ({"evolve": {"population": 12}}, "evolve.population")):
        with pytest.raises(ValueError, match=f"^{key}: got"):
            configs.diff_for_resume(tiny(), tiny(**changed))


# ------------------------------------------------------------------------------------------------ other ways to run


@pytest.mark.parametrize("where", ["real", pytest.param("both", marks=pytest.mark.slow)])
def test_evolving_in_reality(where, tmp_path):
    evolve = {"where": where, "real_generations": 2, "real_rollouts": 2}
    summary = run(tiny(evolve=evolve), tmp_path / "a")
    assert summary["dream_gap"] == summary["dream_return_mean"] - summary["real_return_mean"]  # wherever it evolved
    kept = EpisodeStore(tmp_path / "a" / "episodes", read_only=True).steps
    assert summary["real_env_steps"] > kept  # steps that only chose a controller count as well
    generations = rows(tmp_path / "a", "generation")
    assert [g["where"] for g in generations] == 2 * (3 * ["dream"] * (where == "both") + 2 * ["real"])
    for death in (("row", 7), ("row", 4)):
        kill(tiny(evolve=evolve), tmp_path / "b", *death)
    run(tiny(evolve=evolve), tmp_path / "b")
    same(outcome(tmp_path / "b"), outcome(tmp_path / "a"))


def test_reinforce_resumes_too(tmp_path):
    config = tiny(evolve={"learner": "reinforce"})
    run(config, tmp_path / "a")
    for death in (("row", 7), ("row", 3)):
        kill(config, tmp_path / "b", *death)
    run(config, tmp_path / "b")
    same(outcome(tmp_path / "b"), outcome(tmp_path / "a"))


@pytest.mark.parametrize("where", ["dream", "both"])
def test_the_budget_of_real_steps_is_kept(where, tmp_path):
    config = tiny(iterations=20, budget={"real_steps": 400}, evolve={"where": where, "real_generations": 2})
    summary = run(config, tmp_path)
    assert summary["stopped"] == "budget of 400 real steps spent"
    # no episode begins that could cross the line, and no trial of three that could not be whole
    assert 400 - 3 * 60 < summary["real_env_steps"] <= 400
    bigger = config.model_copy(update={"budget": configs.BudgetConfig(real_steps=600)})
    assert run(bigger, tmp_path)["real_env_steps"] > 600 - 3 * 60


def test_a_budget_without_room_for_a_trial_still_gives_what_was_trained(tmp_path):
    summary = run(tiny(budget={"real_steps": 150}), tmp_path)
    assert summary["iterations"] == 1 and summary["dream_gap"] is not None
    saved = checkpoint.load(tmp_path / "checkpoints")
    assert np.abs(saved.arrays["controller"]["best"]).max() > 0
    assert torch.equal(saved.tensors["best_model"]["target_scale"], saved.tensors["model"]["target_scale"])


# ------------------------------------------------------------------------------------------------ broken environments


@pytest.mark.parametrize("fault", ["raise", "nan_reward", "nan_obs"])
def test_a_broken_environment_ends_the_run_and_nothing_else(fault, tmp_path, monkeypatch):
    once = tmp_path / "once"
    once.touch()  # it has "failed" already, and works
    config = tiny(iterations=1, env={"id": "raywm/Faulty-v0", "kwargs": {"fault": fault, "once": str(once)}})
    out = tmp_path / "run"

    def breaking(config, out):
        """Lets raywm/Faulty-v0 fail for good once the first episode has come in."""
        work = InProcess(config, out)
        collect = work.rollouts.collect

        def doomed(*args):
            for played in collect(*args):
                yield played
                monkeypatch.setattr(FaultyEnv, "_strikes", lambda env: env.t == env.at)

        work.rollouts.collect = doomed
        return work

    with pytest.raises(ValueError, match=r"^environment 'raywm/Faulty-v0', episode [4-7], step 5: .*") as error:
        run(config, out, breaking)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    with EpisodeStore(out / "episodes", read_only=True) as store:
        assert store.ids() == [f"collect-{n:09d}" for n in range(4)]  # what ended before stays
    run(config, out)  # mended, it goes on
    run(config, tmp_path / "whole")
    same(outcome(out), outcome(tmp_path / "whole"))


def test_a_broken_environment_speaks_through_ray(ray_session, tmp_path):
    config = tiny(env={"id": "raywm/Faulty-v0", "kwargs": {"fault": "nan_reward", "at": 7}})
    with pytest.raises(ValueError, match=r"^environment 'raywm/Faulty-v0', episode \d, step 7: reward nan"):
        run(config, tmp_path, on_ray())


# ------------------------------------------------------------------------------------------------ transitions


def test_transitions_arrive_whole_and_once(ray_session, tmp_path):
    """An environment whose vectors and frames tell their past, through collectors, the store actor, deaths of both."""
    # a model takes frames of 64 x 64: resized, each frame of one colour still has that colour
    env = {"id": "raywm/Counting-v0", "kwargs": {"image": True}, "resize": [64, 64], "time_limit": None}
    config = tiny(env=env, model={"latent": 4})
    kills = {"collect": 1, "store while collecting": 1}
    with on_ray(kills)(config, tmp_path) as work:
        work.rollouts.set_agent(work.parts.first_agent())
        results = work.rollouts.collect(itertools.count(), "collect")
        taken = [number for number, _, _ in itertools.islice(in_order(results, 0), 30)]
        results.close()
        assert taken == list(range(30))
        assert work.deaths == 1 and work.killed["store while collecting"] == 1
        again = [n for n, _, _ in work.rollouts.collect(range(20, 40), "collect")]  # half of them are there
        assert sorted(again) == list(range(20, 40))
        assert set(range(40)) <= set(work.rollouts.stored("collect", 0))
    with EpisodeStore(tmp_path / "episodes", read_only=True) as store:
        ids = store.ids()
        assert ids[:40] == [f"collect-{n:09d}" for n in range(40)]
        assert not store.verify()["damaged"]
        identities = set()
        for id in ids:
            episode = store.get(id)
            small = {**episode.obs, "image": episode.obs["image"][:, ::8, ::8]}
            check_counting(dataclasses.replace(episode, obs=small))
            identities.add(float(episode.obs["vector"][0, 0]))
        assert len(identities) == len(ids)


# ------------------------------------------------------------------------------------------------ learning


def play_linear_optimum(seed, episodes):
    """Mean return of the linear-quadratic regulator in the very episodes that a run's evaluation plays."""
    gains, _ = LinearWorldEnv.optimal()
    env, returns = LinearWorldEnv(), []
    for n in range(episodes):
        env.reset(seed=derive(seed, "evaluate", "env", n))
        returns.append(sum(env.step(-gains[t] @ env.x)[1] for t in range(env.steps)))
    return float(np.mean(returns))


def test_a_linear_world_is_solved_in_dreams(tmp_path):
    """Against the closed-form optimum, which no stationary controller squashed by tanh can quite reach."""
    config = tiny(
        seed=0,
        iterations=5,
        env={"id": "raywm/LinearWorld-v0", "time_limit": 50},
        collect={"envs": 8, "initial_steps": 2000, "episodes": 4, "policy": "random"},
        target={"episodes": 16},
        model={"hidden": 32, "head_hidden": 64},
        fit={"memory_steps": 400, "batch": 32, "sequence": 32, "evaluate_every": 100, "lr": 0.003},
        controller={"features": "z"},
        evolve={"population": 16, "rollouts": 16, "generations": 15, "sigma": 0.3},
        dream={"unit": 16, "horizon": 50},
        evaluate={"episodes": 200},
    )
    summary = run(config, tmp_path)
    optimum = play_linear_optimum(0, 200)
    assert optimum == pytest.approx(LinearWorldEnv.optimal()[1], rel=0.2)
    # costs: the optimum 2.5, doing nothing 28, random actions 2500; a mended dream gives 2.7 to 3.3
    assert optimum - 1.5 < summary["real_return_mean"] < optimum + 0.05, optimum


def whole(episodes, codec):
    """Episodes of one length as one batch."""
    columns = [e.columns() for e in episodes]
    stacked = {name: torch.from_numpy(np.stack([c[name] for c in columns])) for name in columns[0]}
    action = torch.from_numpy(np.stack([encoded_actions(e, codec) for e in episodes]))
    reward = stacked["reward"]
    flags = [stacked[name].bool() for name in ("is_first", "is_last", "is_terminal")]
    mask, weight = torch.ones_like(reward, dtype=torch.bool), torch.ones(len(episodes))
    obs, ids = {"vector": stacked["obs.vector"]}, [e.id for e in episodes]
    return Batch(obs, action, reward, *flags, mask, weight, ids, None)


def predict_bifurcation(episodes, steps):
    """Fit M, with the default model settings, to the process whose entropy is known.

    Returns its NLL and the true entropy in nats a step of the raw (x, y), on 30,000 held-out steps, and the weights
    (N,) that its mixtures give to either branch (0.2 around it) on the N of them past the boundary.
    """
    codec = ActionCodec(BifurcationEnv().action_space)
    settings = configs.parse({"env": {"id": "raywm/Bifurcation-v0"}}).model.model_dump(exclude={"kind", "kwargs"})
    torch.manual_seed(0)
    model = build_model(kind="vm", columns={"vector": ((2,), False)}, act_dim=codec.dim, **settings)
    trainer = Trainer(model, 0, memory_steps=steps, batch=64, lr=3e-3, patience=30)
    trainer.fit(Snapshot(bifurcation_episodes(episodes, seed=1), codec), 0)
    held = bifurcation_episodes(1500, seed=2)
    batch, standard, memory = whole(held, codec), model.vision.nets["vector"], model.memory
    past = batch.obs["vector"][:, :-1, 0] > BifurcationEnv.EDGE
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(BifurcationEnv.NOISE))
    entropy += math.log(2) * float(past.float().mean())
    with torch.inference_mode():
        nll = 2 * model.eval().loss(batch, "memory", states=False).metrics["nll"] + standard.scale.log().sum()
        x = torch.cat([standard(batch.obs["vector"])[0][:, :-1], batch.action[:, 1:]], -1)
        logits, mean, logstd = memory.split(memory.mixture(torch.cat([memory.lstm(x)[0], x], -1)))
        scale = model.target_scale[1] * standard.scale[1]
        jump = mean[..., 1, :] * scale + model.target_mean[1] * standard.scale[1]  # (B, T, K) of y, by component
        pushed = np.stack([BifurcationEnv.GAIN * np.tanh(e.action[1:, 1:]) for e in held])
        jump, std = jump - torch.from_numpy(pushed), logstd[..., 1, :].exp() * scale
        weights = []
        for branch in (-BifurcationEnv.JUMP, BifurcationEnv.JUMP):
            mass = torch.special.ndtr((branch + 0.2 - jump) / std) - torch.special.ndtr((branch - 0.2 - jump) / std)
            weights.append((logits.softmax(-1)[..., 0, :] * mass).sum(-1)[past])
    return float(nll), entropy, weights


@pytest.mark.slow
def test_a_bifurcation_has_two_branches():
    """The quick version; the slow suite's comes within 0.05 nats."""
    nll, entropy, weights = predict_bifurcation(episodes=1500, steps=500)
    assert entropy - 0.02 < nll < entropy + 0.25
    assert all(0.35 < float(weight.mean()) < 0.65 for weight in weights)
