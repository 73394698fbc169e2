"""RLlib both ways: its PPO in a run's dream, and what it learned as an agent in the real environment."""

import json
import os
import pickle
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import raywm
from raywm import cli
from raywm import config as configs
from raywm.collect import Collector
from raywm.log import RunLog
from raywm.loops.executor import InProcess
from raywm.loops.vmc import train
from raywm.pickled import Named, read_pickle
from raywm.rllib import DREAM, POLICY, REAL, RLlibAgent, SavedPolicy, real_env, register
from raywm.spaces import ActionCodec

TINY = {
    "iterations": 1,
    "env": {"id": "CartPole-v1", "time_limit": 40},
    "collect": {"workers": 1, "envs": 4, "initial_steps": 200},
    "target": {"episodes": 1},
    "model": {"hidden": 8, "head_hidden": 8, "mixtures": 2},
    "fit": {"memory_steps": 40, "batch": 8, "sequence": 16, "lr": 0.01, "evaluate_every": 20, "threads": 1},
    "evolve": {"population": 4, "rollouts": 2, "generations": 1},
    "dream": {"workers": 1, "unit": 4},
    "evaluate": {"episodes": 2},
    "log": {"console": False, "tensorboard": False},
}


class TwoColumns(gym.Env):
    observation_space = gym.spaces.Dict({"a": gym.spaces.Box(0, 1, (2,)), "b": gym.spaces.Box(0, 1, (1,))})
    action_space = gym.spaces.Discrete(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    out.mkdir()
    config = configs.parse(TINY)
    configs.save(config, out / "config.yaml")
    with RunLog(out, False, False) as log, InProcess(config, out) as executor:
        train(config, out, executor, log)
    return out


def ppo(env, env_config, mode="sync", runners=0, **training):
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    config = PPOConfig().environment(env, env_config=env_config).debugging(seed=0, log_level="ERROR")
    config.training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1, **training)
    config.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[8]))
    config.env_runners(num_env_runners=runners, num_envs_per_env_runner=8, gym_env_vectorize_mode=mode)
    return config


def trained(config, out, iterations=2):
    """(results, the algorithm's own module) of a few iterations, saved in `out`."""
    algorithm = config.build_algo()
    try:
        results = [algorithm.train() for _ in range(iterations)]
        algorithm.save_to_path(str(out))
        return results, algorithm.get_module()
    finally:
        algorithm.stop()


@pytest.fixture(scope="module")
def dreamt(ray_session, run, tmp_path_factory):
    """PPO of two iterations in the tiny run's dream, as one batch in an EnvRunner of its own: checkpoint, results."""
    register()
    out = tmp_path_factory.mktemp("policies") / "dreamt"
    config = ppo(DREAM, {"run": str(run), "starts": "any"}, "vector_entry_point", runners=1)
    results, module = trained(config, out)
    return out, results, module


def test_ppo_learns_in_the_dream(dreamt, run):
    from raywm.envs.dream_env import DreamVectorEnv

    _, results, module = dreamt
    played = results[-1]["env_runners"]
    assert played["num_env_steps_sampled_lifetime"] >= 256
    assert 1 <= played["episode_return_mean"] <= 40 and played["episode_len_max"] <= 40
    loss = results[-1]["learners"]["default_policy"]["total_loss"]
    assert np.isfinite(float(loss))
    assert module.observation_space == DreamVectorEnv(run).single_observation_space


def test_its_policy_plays_real_episodes(dreamt, run):
    out, _, module = dreamt
    live = raywm.load_agent(f"rllib:{out}")
    agent = live.agent
    assert isinstance(agent, RLlibAgent) and agent.model is not None
    collector = Collector(configs.load(run / "config.yaml").env, 0, 4)
    episodes = {e.id: e for e in collector.collect(agent, range(6))}
    assert len(episodes) == 6 and all(1 <= e.steps <= 40 for e in episodes.values())
    # it travels, and each row acts for itself: another process with other neighbours plays the same
    again = pickle.loads(pickle.dumps(agent))
    assert again.version == agent.version != 0
    alone = {e.id: e for e in Collector(configs.load(run / "config.yaml").env, 0, 4).collect(again, [4])}
    assert all(np.array_equal(a.action, episodes[id].action) for id, a in alone.items())
    collector.close()
    # by hand: the posterior's features, the network's most likely action
    obs, state = np.array([[0.01, -0.02, 0.03, 0.04]] * 2, np.float32), agent.initial(2)
    action, state = agent.act({"vector": obs}, state, np.ones(2, bool), [np.random.default_rng(i) for i in (0, 1)])
    from raywm.loops.saved import open_run

    model = open_run(run).world_model()
    begin = model.posterior(
        model.initial(2),
        torch.zeros(2, 2),
        {"vector": torch.from_numpy(obs)},
        torch.ones(2).bool(),
        model.zero_noise(2),
    )
    with torch.no_grad():
        scores = module.forward_inference({"obs": model.features(begin)})["action_dist_inputs"]
    assert np.array_equal(action, scores.argmax(-1).numpy())
    assert np.array_equal(state["action"].numpy(), np.eye(2)[action])
    live.reset()
    assert live.act(obs[0]) in (0, 1)


def test_evaluate_and_collect_take_it(dreamt, run, tmp_path):
    out = dreamt[0]
    runner = CliRunner()
    result = runner.invoke(cli.app, ["evaluate", f"rllib:{out}", "--episodes", "3", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["episodes"] == 3 and 1 <= told["return_mean"] <= 40
    command = ["collect", str(run / "config.yaml"), "--policy", f"rllib:{out}", "--episodes", "3", "--in-process"]
    result = runner.invoke(cli.app, [*command, "--out", str(tmp_path / "data"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["episodes"] == 3
    result = runner.invoke(cli.app, ["collect", "Pendulum-v1", *command[2:], "--out", str(tmp_path / "other")])
    assert result.exit_code == 2 and "acts on" in result.output


def test_the_real_environment_is_that_of_runs():
    env = real_env({"id": "Pendulum-v1", "action_repeat": 2, "time_limit": 60})
    assert env.reset(seed=0)[0] in env.observation_space
    steps = 1
    while not env.step(env.action_space.sample())[3]:
        steps += 1
    assert steps == 30
    with pytest.raises(ValueError, match="expected one: RLlib"):
        real_env({"id": f"{__name__}:TwoColumns"})


def test_real_policies_act_as_rllib_lets_them(ray_session, tmp_path):
    """A Box of actions, squashed: what RLlib's own connectors would give the environment."""
    from ray.rllib.utils.spaces.space_utils import unsquash_action

    register()
    out = tmp_path / "pendulum"
    env = {"id": "Pendulum-v1", "action_repeat": 2, "time_limit": 60}
    _, module = trained(ppo(REAL, env), out, 1)
    policy = SavedPolicy(out)
    assert policy.env == env and policy.model is None
    agent = policy.agent()
    obs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    with torch.no_grad():
        mean = module.forward_inference({"obs": torch.from_numpy(obs * 50)})["action_dist_inputs"][:, :1].numpy()
    action, _ = agent.act({"vector": obs * 50}, None, np.ones(64, bool), [])
    assert np.allclose(action, unsquash_action(mean, policy.codec.space), atol=1e-6)
    assert np.ptp(action) > 0 and np.abs(action).max() <= 2
    assert agent.act({"vector": obs}, None, np.ones(64, bool), [])[0].dtype == np.float32


def test_bench_learns_in_the_dream(ray_session, run, tmp_path, monkeypatch):
    from raywm.bench import rllib as bench

    sizes = {"train_batch_size_per_learner": 256, "minibatch_size": 256, "num_epochs": 1}
    monkeypatch.setattr(bench, "PPO", bench.PPO | sizes)
    out = tmp_path / "bench.json"
    bench.main(None, "dream", str(run), seconds=0.1, episodes=3, as_json=True, out=out)
    told = json.loads(out.read_text())
    found = told["algorithms"]["dream"]
    steps, seconds, mean = found["curve"][-1]
    assert found["steps"] == steps >= 256 and found["seconds"] == round(seconds, 1) and 1 <= mean <= 40
    assert found["real"]["episodes"] == 3 and not found["reached"]
    summary = json.loads((run / "summary.json").read_text())
    assert found["real_steps"] == summary["real_env_steps"] and told["settings"]["env"]["time_limit"] == 40
    with pytest.raises(ValueError, match="give it with --run"):
        bench.run("CartPole-v1", ["dream"])
    with pytest.raises(ValueError, match="expected some of ppo, dreamer, dream"):
        bench.run("CartPole-v1", ["sac"])


def test_bench_tells_what_has_not_ended(tmp_path, capsys):
    """An iteration in which no episode ended has no mean return; 20 of DreamerV3's episodes may not be there."""
    from raywm.bench import rllib as bench
    from raywm.bench.common import finish

    one = {"steps": 9, "real_steps": 9, "seconds": 2.0}
    found: dict = {"dreamer": {**one, "curve": [(9, 2.0, 777.0)], "mean_20": None}}
    found["ppo"] = {**one, "curve": [(9, 2.0, np.nan)]}
    result = {"settings": {"env": {"id": "CartPole-v1"}, "seed": 0, "run": None}, "algorithms": found}
    finish(lambda say: result, bench._show, True, tmp_path / "bench.json")
    told = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    assert told["algorithms"]["ppo"]["curve"] == [[9, 2.0, None]]
    capsys.readouterr()
    finish(lambda say: result, bench._show)
    table = capsys.readouterr().out
    assert "DreamerV3" in table and "777" not in table


# ------------------------------------------------------------------------------------------------ hostile files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Context(dict):
    """As RLlib's EnvContext."""


class Builder:
    """NumPy's object arrays, whose bytes would be anything."""

    def __reduce__(self):
        return np._core.numeric._frombuffer, (b"12345678", np.dtype("O"), (1,), "C")


@pytest.mark.parametrize(
    "file", ["class_and_ctor_args.pkl", f"{POLICY}/class_and_ctor_args.pkl", f"{POLICY}/module_state.pkl"]
)
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"class": bomb, "pi": bomb}])
def test_a_crafted_checkpoint_executes_nothing(dreamt, tmp_path, file, wrap):
    crafted = tmp_path / "crafted"
    shutil.copytree(dreamt[0], crafted)
    (crafted / file).write_bytes(pickle.dumps(wrap(Bomb(tmp_path / "executed"))))
    with pytest.raises(ValueError, match="crafted|AlgorithmConfig"):
        SavedPolicy(crafted).agent()
    assert not (tmp_path / "executed").exists()


def test_settings_and_spaces_that_are_not_plain(dreamt, run, tmp_path, monkeypatch):
    """A run named by a Path is found; an observation of several columns, or no run at all, is said in words."""
    made = read_pickle(dreamt[0] / "class_and_ctor_args.pkl")
    config = made["ctor_args_and_kwargs"][0][0]
    spec = read_pickle(dreamt[0] / POLICY / "class_and_ctor_args.pkl")
    monkeypatch.setattr("raywm.rllib.read_pickle", lambda path: spec if POLICY in str(path) else made)

    def pickled(value):
        (tmp_path / "some.pkl").write_bytes(pickle.dumps(value))
        return read_pickle(tmp_path / "some.pkl")

    config["env_config"] = pickled(Context(run=run))
    assert isinstance(config["env_config"], Named)
    assert SavedPolicy(dreamt[0]).model is not None
    for wrong in ({}, {"run": 3}, {"run": pickled(Context())}):
        config["env_config"] = wrong
        with pytest.raises(ValueError, match="expected a run's directory"):
            SavedPolicy(dreamt[0])
    config["env_config"] = "run"
    with pytest.raises(ValueError, match="no AlgorithmConfig"):
        SavedPolicy(dreamt[0])
    config["env_config"] = {"run": str(run)}
    spec["ctor_args_and_kwargs"][1]["observation_space"] = pickled(TwoColumns.observation_space)
    with pytest.raises(ValueError, match="its observation_space is <gymnasium.spaces.dict.Dict>"):
        SavedPolicy(dreamt[0])


@pytest.mark.parametrize("cls", ["tests.test_rllib.Own", "os.system", "ray.rllib.examples.Thing"])
def test_only_rllibs_own_networks_are_used(dreamt, tmp_path, cls, monkeypatch):
    crafted = tmp_path / "crafted"
    shutil.copytree(dreamt[0], crafted)
    made = read_pickle(crafted / POLICY / "class_and_ctor_args.pkl")
    made["class"] = type("Named", (Named,), {"name": cls})
    monkeypatch.setattr("raywm.rllib.read_pickle", lambda path: made if POLICY in str(path) else read_pickle(path))
    with pytest.raises(ValueError, match="expected one of RLlib's own"):
        SavedPolicy(crafted)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x05", b"cos\nsystem\n(S'true'\ntR.", pickle.dumps(Builder()), b"\x80\x04" + b"]" * 100, b"P1\n."],
)
def test_pickles_are_data(tmp_path, data):
    path = tmp_path / "some.pkl"
    path.write_bytes(data)
    try:
        read = read_pickle(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(read, (Named, list)) and not callable(read)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_spaces_come_back(tmp_path, protocol):
    fortran = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    wanted = {
        "arrays": [np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2], fortran, np.array(True), np.zeros((0, 2))],
        "scalar": np.float64(0.5),
        "spaces": (gym.spaces.Box(-1, 2, (2,)), gym.spaces.Discrete(3, start=1), gym.spaces.MultiDiscrete([2, 3])),
    }
    (tmp_path / "some.pkl").write_bytes(pickle.dumps(wanted, protocol))
    read = read_pickle(tmp_path / "some.pkl")
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(wanted["arrays"], read["arrays"], strict=True)
    )
    assert read["scalar"] == 0.5 and read["spaces"] == wanted["spaces"]


def test_what_cannot_act_is_told(dreamt, run, tmp_path):
    with pytest.raises(ValueError, match="expected an RLlib algorithm's checkpoint"):
        raywm.load_agent(f"rllib:{run}")
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    try:
        with pytest.raises(ValueError, match="was trained in the dream of"):
            SavedPolicy(dreamt[0])
    finally:
        shutil.move(moved, run)

    class Recurrent:
        def is_stateful(self):
            return True

    with pytest.raises(ValueError, match="use_lstm"):
        RLlibAgent(Recurrent(), ActionCodec(gym.spaces.Discrete(2)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_ppo_learns_in_the_dream_of_cartpole_helps_in_reality(tmp_path):
    """Never a real step of its own: 100 real episodes of 80 steps and more in the mean, where random ones are of 20.
    How far the dream carries differs from run to run (README)."""
    from raywm.bench.rllib import run as measure

    out = tmp_path / "cartpole"
    result = CliRunner().invoke(cli.app, ["train", "dreamer-cartpole", "--out", str(out), "--in-process"])
    assert result.exit_code == 0, result.output
    told = measure(None, ["dream"], str(out), seconds=900, target=490, save=tmp_path / "policy")["algorithms"]["dream"]
    assert told["real"]["return_mean"] >= 80, told["curve"][-1]
    assert told["real_steps"] <= 15_000
    assert Path(tmp_path / "policy" / "dream").is_dir()
