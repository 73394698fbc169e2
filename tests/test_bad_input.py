"""What a user gets wrong, through the real command in one process: one clear line, nothing lost, the next try works."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from typer.testing import CliRunner

import raywm
from raywm.cli import app
from raywm.data.store import EpisodeStore
from raywm.envs import make_env

TINY = (
    "collect.initial_steps=200 fit.memory_steps=4 fit.evaluate_every=2 evolve.generations=1 evolve.population=8 "
    "evolve.rollouts=2 dream.unit=8 dream.horizon=10 iterations=1 target.episodes=2 evaluate.episodes=2 "
    "model.hidden=8 fit.threads=1 log.tensorboard=false"
).split()


class Env(gym.Env):
    """A module:EnvClass that works."""

    observation_space: gym.Space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space: gym.Space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, self.t >= 20, {}


class NoLicence(Env):
    def __init__(self):
        raise RuntimeError("no licence file")


class NoReward(Env):
    def step(self, action):
        return super().step(action)[0], None, False, False, {}


class TupleObs(Env):
    observation_space = gym.spaces.Tuple((gym.spaces.Text(2),))


class SequenceObs(Env):
    observation_space = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Sequence(gym.spaces.Discrete(2))))


class NoObs(Env):
    observation_space = gym.spaces.Tuple(())


class NoSpaces(gym.Env):
    pass


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(out, *more):
    return command("train", "cartpole", *TINY, *more, "--in-process", "--out", out)


def line(result) -> str:
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    assert train(out).exit_code == 0
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("CartPol-v1", "did you mean 'CartPole-v1'"),
        ("test_bad_input:Envv", "did you mean 'Env'?"),
        ("test_bad_input.py:Env", "did you mean 'test_bad_input:Env'?"),
        ("./test_bad_input.py:Env", "expected 'module:EnvClass'"),
        ("no_such_module:Env", "there is no module 'no_such_module'"),
        ("test_bad_input:NoLicence", "cannot be made with kwargs {}: RuntimeError: no licence file"),
        ("test_bad_input:NoSpaces", "has no observation_space"),
        ("test_bad_input:TupleObs", "is not supported, expected a float Box"),
        ("test_bad_input:SequenceObs", "is not supported, expected a float Box"),
        ("test_bad_input:NoObs", "is not supported, expected a float Box"),
    ],
)
def test_environments_that_cannot_be_had(tmp_path, monkeypatch, id, said):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert said in line(train(tmp_path / "run", f"env.id={id}"))
    assert not any(tmp_path.iterdir())


def test_a_module_that_does_not_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_done.py").write_text("import no_such_library")
    said = line(train(tmp_path / "run", "env.id=half_done:Env"))
    assert "'half_done' cannot be imported" in said and "no_such_library" in said


@pytest.mark.parametrize(
    ("id", "module", "fix"),
    [
        ("ALE/Breakout-v5", "ale_py", 'pip install "raywm[atari]"'),
        ("VizdoomTakeCover-v1", "vizdoom.gymnasium_wrapper", 'pip install "raywm[doom]"'),
        ("LunarLander-v3", "Box2D", 'pip install "raywm[box2d]"'),
        ("HalfCheetah-v5", "mujoco", 'pip install "raywm[mujoco]"'),
    ],
)
def test_extras_that_are_not_installed(monkeypatch, id, module, fix):
    for name in [n for n in sys.modules if n.startswith("gymnasium.envs.box2d") or n.startswith("gymnasium.envs.muj")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        make_env({"id": id})
    assert fix in str(error.value)


def test_a_run_that_failed_at_its_start_does_not_block_the_next(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    out = tmp_path / "run"
    said = line(train(out, "env.id=test_bad_input:NoReward"))
    assert "episode 3, step 1: TypeError" in said and "--resume" in said
    assert train(out, "env.id=test_bad_input:Env").exit_code == 0
    assert "already holds a run" in line(train(out))


def test_a_config_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    line(train(tmp_path))
    line(train(tmp_path, "--resume"))
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_finished_run_says_so(copy):
    before = (copy / "metrics.jsonl").read_bytes()
    assert "already finished: 1 iterations done" in train(copy, "--resume").stdout
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be written: Not a directory; give another --out" in line(train(tmp_path / "file" / "run"))


def test_evaluate_is_pure_json(run):
    result = command("evaluate", run, "--episodes", 2, "--json")
    assert json.loads(result.stdout)["episodes"] == 2, result.output


def _one_of(copy: Path) -> Path:
    return min((copy / "episodes").glob("*.arrows"))


def test_a_foreign_file_in_the_store(copy):
    (copy / "episodes" / "segment-00000009.arrows").write_bytes(os.urandom(3000))
    (copy / "episodes" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="damaged and set aside"):
        assert train(copy, "iterations=2", "--resume").exit_code == 0
    assert (copy / "episodes" / "notes.txt").exists()


def test_a_run_goes_on_without_a_damaged_episode(copy):
    path = _one_of(copy)
    data = bytearray(path.read_bytes())
    with EpisodeStore(copy / "episodes", read_only=True) as store:
        last = next(id for id in reversed(store.ids()) if id.encode() in data)
    at = data.index(last.encode())  # in the header of a block
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="set aside .* that are whole are kept"):
        result = train(copy, "iterations=2", "--resume")
    assert result.exit_code == 0 and "episodes are gone or damaged and left out" in result.stdout, result.output


def test_a_run_without_its_episodes_says_what_is_missing(copy):
    path = _one_of(copy)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4])
    with pytest.warns(UserWarning, match="damaged and set aside"):
        assert "too few are left to go on" in line(train(copy, "iterations=2", "--resume"))
    aside = next((copy / "episodes").glob("*.damaged"))
    assert aside.read_bytes() == data[: len(data) // 4]
    aside.unlink()  # put back, as the line says, it goes on
    path.write_bytes(data)
    assert train(copy, "iterations=2", "--resume").exit_code == 0


def test_damaged_checkpoints_and_metrics(copy):
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"x")
    for name in ("evaluate", "report"):
        assert f"remove {newest} to continue" in line(command(name, copy))
    assert f"remove {newest} to continue" in line(train(copy, "iterations=2", "--resume"))
    shutil.rmtree(newest)
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
    assert "line 2: got b'garbage" in line(train(copy, "iterations=2", "--resume"))
    (copy / "metrics.jsonl").write_bytes(b"".join(lines)[:-10])
    assert train(copy, "iterations=2", "--resume").exit_code == 0


def test_wrong_observations_for_an_agent(run):
    agent = raywm.load_agent(run)
    for wrong in (np.zeros(3), np.zeros((2, 4)), "x", {"v": np.zeros(4)}, np.full(4, np.nan)):
        with pytest.raises(ValueError, match="expected"):
            agent.act(wrong)
    assert agent.act(np.zeros(4)) in (0, 1)
