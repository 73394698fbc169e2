"""Atari, DeepMind Control and Crafter, where their extras are installed; tests/test_envs.py holds what all share."""

import os
import subprocess
import sys

import numpy as np
import pytest

from raywm.envs import make_env

# Atari

PROTOCOL = {"frame_skip": 4, "noop_max": 30, "repeat_action_probability": 0}


@pytest.fixture
def pong():
    pytest.importorskip("ale_py")
    return lambda **kwargs: make_env({"id": "ALE/Pong-v5", "kwargs": PROTOCOL | kwargs})


def test_atari_frames_are_skipped_pooled_and_shrunk(pong):
    import cv2

    env, raw = pong(), make_env({"id": "ALE/Pong-v5", "kwargs": {"frameskip": 1, "repeat_action_probability": 0}})
    assert env.observation_space["image"].shape == (64, 64, 3) and env.action_space.n == 6
    assert pong(full_action_space=True).action_space.n == 18
    obs, info = env.reset(seed=3)
    raw.reset(seed=3)
    for _ in range(info["episode_frame_number"]):
        frame = raw.step(0)[0]["image"]

    def shrunk(frame):
        return cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA)

    assert np.array_equal(obs["image"], shrunk(frame))
    rng = np.random.default_rng(0)
    for _ in range(40):
        action = rng.integers(6)
        obs, reward, *_ = env.step(action)
        frames, rewards = zip(*[(o["image"], r) for o, r, *_ in (raw.step(action) for _ in range(4))])
        assert np.array_equal(obs["image"], shrunk(np.maximum(*frames[2:]))) and reward == sum(rewards)


def test_atari_begins_with_some_steps_of_nothing(pong):
    env = pong()
    starts = [env.reset(seed=seed)[1]["episode_frame_number"] for seed in range(12)]
    assert min(starts) >= 1 and max(starts) <= 30 and len(set(starts)) > 5
    assert pong(noop_max=0).reset(seed=0)[1]["episode_frame_number"] == 0


def test_atari_skips_frames_in_one_place(pong):
    with pytest.raises(ValueError, match="give frame_skip instead"):
        pong(frameskip=4)
    plain = make_env({"id": "ALE/Pong-v5"})  # without those arguments it is ale_py's own
    assert plain.observation_space["image"].shape == (210, 160, 3)


# DeepMind Control


def test_dmc_columns_are_the_suites():
    pytest.importorskip("dm_control")
    from raywm.envs.dmc import suite  # not from dm_control, which would choose another renderer

    env = make_env({"id": "dm_control/walker-walk-v0"})
    theirs = suite.load("walker", "walk", task_kwargs={"random": 1})
    assert theirs._step_limit == 1000  # the limit that is registered
    obs, _ = env.reset(seed=0)
    physics = env.unwrapped.env.physics
    with theirs.physics.reset_context():
        theirs.physics.data.qpos[:], theirs.physics.data.qvel[:] = physics.data.qpos, physics.data.qvel
    rng, total = np.random.default_rng(0), 0.0
    theirs._reset_next_step = False
    for step in range(1, 1001):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        moment, (obs, reward, terminated, truncated, _) = theirs.step(action), env.step(action)
        assert not terminated and truncated == (step == 1000)
        if step <= 20:  # later they drift apart, by what their solvers start from
            assert abs(moment.reward - reward) < 1e-3
            for name, column in obs.items():
                assert column.dtype == np.float32 and np.allclose(column, moment.observation[name], atol=1e-3)
        total += reward
    assert 0 < total < 1000


def test_dmc_ends_that_are_terminal():
    pytest.importorskip("dm_control")
    env = make_env({"id": "dm_control/lqr-lqr_2_1-v0"})
    env.reset(seed=0)
    physics = env.unwrapped.env.physics
    with physics.reset_context():  # LQR ends where the state is next to zero
        physics.data.qpos[:], physics.data.qvel[:] = 0, 0
    assert env.step(np.zeros(env.action_space.shape, np.float32))[2:4] == (True, False)


PIXELS = """
import numpy as np
from raywm.envs import make_env

cfg = {"id": "dm_control/walker-walk-v0", "kwargs": {"pixels": True}, "action_repeat": 2}
env = make_env(cfg)
assert set(env.observation_space.spaces) == {"image"}
first = env.reset(seed=0)[0]["image"]
assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and first.std() > 10
moved = [env.step(np.ones(6, np.float32))[0]["image"] for _ in range(5)]
assert not np.array_equal(moved[-1], first)
other = make_env(cfg)
assert np.array_equal(other.reset(seed=0)[0]["image"], first)
assert not np.array_equal(other.reset(seed=1)[0]["image"], first)
assert env.render().shape == (240, 240, 3)
env.close(), other.close()
"""


def test_dmc_from_pixels():
    """In a process of its own, as collectors are: a graphics library may abort one that has loaded several."""
    pytest.importorskip("dm_control")
    from raywm.envs.dmc import NO_RENDERER

    done = subprocess.run([sys.executable, "-c", PIXELS], capture_output=True, text=True, timeout=120)
    if NO_RENDERER in done.stderr:
        pytest.skip("no OpenGL renderer")
    assert done.returncode == 0, done.stderr[-2000:]


def test_dmc_without_a_renderer_does_all_but_images():
    pytest.importorskip("dm_control")
    code = (
        "from raywm.envs import make_env;"
        "print(make_env({'id': 'dm_control/walker-walk-v0'}).reset(seed=0)[0]['height'].shape);"
        "make_env({'id': 'dm_control/walker-walk-v0', 'kwargs': {'pixels': True}})"
    )
    environment = os.environ | {"MUJOCO_GL": "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "(1,)\n" and "libegl1" in done.stderr.splitlines()[-1]


# Crafter


@pytest.fixture
def crafter():
    pytest.importorskip("crafter")
    return make_env({"id": "CrafterReward-v1"})


def test_crafter_is_the_same_wherever_memory_is(crafter):
    def play(env):
        env.reset(seed=2)
        rng, seen = np.random.default_rng(0), []
        for _ in range(700):
            env.unwrapped.game._player.health = 9  # so that nights are seen, and creatures come and go
            obs, reward, *_ = env.step(rng.integers(17))
            seen.append((obs["image"].tobytes(), reward))
        return seen

    assert play(crafter) == play(make_env({"id": "CrafterReward-v1"}))


def test_crafter_rewards_deaths_and_limits(crafter):
    crafter.reset(seed=0)
    player = crafter.unwrapped.game._player
    player.achievements["collect_wood"] += 1
    _, reward, terminated, truncated, info = crafter.step(0)
    assert (reward, terminated, truncated) == (1.0, False, False) and info["achievements"]["collect_wood"] == 1
    assert crafter.step(0)[1] == 0
    player.health = 0
    _, reward, terminated, truncated, _ = crafter.step(0)
    assert abs(reward + 0.9) < 1e-6 and (terminated, truncated) == (True, False)
    unpaid = make_env({"id": "CrafterNoReward-v1", "kwargs": {"size": [32, 48]}, "time_limit": 2})
    assert unpaid.reset(seed=0)[0]["image"].shape == (32, 48, 3)
    unpaid.unwrapped.game._player.achievements["collect_wood"] += 1
    assert unpaid.step(0)[1:4] == (0.0, False, False) and unpaid.step(0)[1:4] == (0.0, False, True)
