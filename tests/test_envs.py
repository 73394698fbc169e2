import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest

from raywm.data.episode import Episode, validate
from raywm.envs import make_env
from raywm.envs.classic import (
    BifurcationEnv,
    CountingEnv,
    LinearWorldEnv,
    bifurcation_episodes,
    check_counting,
)
from raywm.spaces import ActionCodec, obs_columns


def play(env, seed, steps=300, actions=0):
    """All that an episode shows, as bytes, under actions that depend on `actions` only."""
    codec, rng = ActionCodec(env.action_space), np.random.default_rng(actions)
    obs, _ = env.reset(seed=seed)
    seen = [tuple(column.tobytes() for column in obs.values())]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(codec.sample(rng))
        seen.append((*(column.tobytes() for column in obs.values()), float(reward), terminated, truncated))
        if terminated or truncated:
            break
    return seen


def episode_of(env, seed, id="e"):
    codec, rng = ActionCodec(env.action_space), np.random.default_rng(seed)
    obs, action, reward, ends = [env.reset(seed=seed)[0]], [codec.zero()], [0.0], [(False, False)]
    while not any(ends[-1]):
        action.append(codec.sample(rng))
        o, r, terminated, truncated, _ = env.step(action[-1])
        obs.append(o), reward.append(r), ends.append((terminated, truncated))
    end = np.array(ends)
    return Episode(
        id,
        {name: np.stack([o[name] for o in obs]) for name in obs[0]},
        np.stack(action).astype(codec.dtype),
        np.array(reward, np.float32),
        np.arange(len(obs)) == 0,
        end.any(1),
        end[:, 0].copy(),
    )


WORLDS = [
    ({"id": "raywm/Counting-v0", "kwargs": {"image": True}}, None),
    ({"id": "raywm/Bifurcation-v0"}, None),
    ({"id": "raywm/LinearWorld-v0"}, None),
    ({"id": "CartPole-v1", "action_repeat": 2}, None),
    ({"id": "Pendulum-v1"}, None),
    ({"id": "Acrobot-v1"}, None),
    ({"id": "MountainCarContinuous-v0"}, None),
    ({"id": "Taxi-v3"}, None),
    ({"id": "Blackjack-v1"}, None),
    ({"id": "raywm/Memory-v0"}, None),
    ({"id": "raywm/CartPolePixels-v0"}, None),
    ({"id": "raywm/Grid-v0"}, None),
    ({"id": "ALE/Pong-v5", "kwargs": {"noop_max": 30, "repeat_action_probability": 0}}, "ale_py"),
    ({"id": "dm_control/walker-walk-v0", "action_repeat": 2}, "dm_control"),
    ({"id": "dm_control/lqr-lqr_2_1-v0"}, "dm_control"),
    ({"id": "CrafterReward-v1"}, "crafter"),
    ({"id": "BipedalWalker-v3"}, "Box2D"),
    ({"id": "LunarLander-v3"}, "Box2D"),
    ({"id": "CarRacing-v3", "crop": (0, 12, 0, 0), "resize": (64, 64)}, "Box2D"),
    ({"id": "VizdoomTakeCover-v1", "resize": (64, 64), "action_repeat": 4}, "vizdoom"),
]


@pytest.mark.parametrize("cfg,needs", WORLDS, ids=lambda x: x["id"] if isinstance(x, dict) else "")
def test_an_episode_depends_on_its_seed_and_actions_only(cfg, needs):
    if needs:
        pytest.importorskip(needs)
    steps = 60 if cfg["id"] in ("CarRacing-v3", "CrafterReward-v1") else 250  # slow ones
    used, fresh = make_env(cfg), make_env(cfg)
    first = play(used, 3, steps)
    play(used, 4, steps // 3, actions=1)  # left in the middle
    play(used, 5, steps, actions=2)
    assert play(used, 3, steps) == first
    play(fresh, 9, 5)
    assert play(fresh, 3, steps) == first
    assert play(used, 6, steps) != first
    used.close(), fresh.close()


@pytest.mark.parametrize("cfg,needs", WORLDS, ids=lambda x: x["id"] if isinstance(x, dict) else "")
def test_observations_are_columns_of_the_announced_spaces(cfg, needs):
    if needs:
        pytest.importorskip(needs)
    env = make_env(cfg)
    columns = obs_columns(env.observation_space)
    first, _ = env.reset(seed=0)
    kept = {name: column.copy() for name, column in first.items()}
    codec, rng = ActionCodec(env.action_space), np.random.default_rng(0)
    for _ in range(5):
        obs, _, terminated, truncated, _ = env.step(codec.sample(rng))
        assert set(obs) == set(columns)
        for name, box in columns.items():
            assert obs[name].shape == box.shape and obs[name].dtype == box.dtype
        if terminated or truncated:
            break
    for name, column in first.items():
        assert np.array_equal(column, kept[name]), "an observation changed after it was returned"
    env.close()


# make_env


class Mixed(gym.Env):
    """Observes what spaces there are beside Box and image."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Dict(
        {
            "view": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "bytes": gym.spaces.Box(0, 255, (3,), np.uint8),
            "choice": gym.spaces.Discrete(3, start=5),
            "choices": gym.spaces.MultiDiscrete([2, 3]),
            "coins": gym.spaces.MultiBinary(2),
            "both": gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (2,), np.float64))),
        }
    )
    now: ClassVar = {
        "view": np.full((8, 8, 3), 7, np.uint8),
        "bytes": np.array([0, 128, 255], np.uint8),
        "choice": 6,
        "choices": np.array([1, 2]),
        "coins": np.array([1, 0], np.int8),
        "both": (1, np.array([0.5, -0.5])),
    }

    def reset(self, seed=None, options=None):
        return self.now, {}

    def step(self, action):
        return self.now, 0.0, False, False, {}


def test_whatever_is_numbers_is_a_vector():
    env = make_env({"id": "test_envs:Mixed"})
    vectors = {
        "bytes": [0, 128, 255],
        "choice": [0, 1, 0],
        "choices": [0, 1, 0, 0, 1],
        "coins": [1, 0],
        "both": [0, 1, 0.5, -0.5],
    }
    for obs in (env.reset()[0], env.step(0)[0]):
        assert env.observation_space.contains(obs)
        assert obs["view"].shape == (8, 8, 3) and obs["view"].dtype == np.uint8 and (obs["view"] == 7).all()
        for name, vector in vectors.items():
            assert obs[name].dtype == np.float32 and obs[name].tolist() == vector


@pytest.mark.parametrize("id,n", [("FrozenLake-v1", 16), ("Taxi-v3", 500)])
def test_a_choice_is_a_one_hot(id, n):
    env = make_env({"id": id})
    obs, _ = env.reset(seed=0)
    assert list(obs) == ["vector"] and obs["vector"].shape == (n,)
    assert obs["vector"][env.unwrapped.s] == 1 and obs["vector"].sum() == 1


def test_config_may_be_an_object_or_a_dict():
    config = SimpleNamespace(
        id="raywm.envs.classic:CountingEnv",
        kwargs={"lengths": (9, 9)},
        crop=None,
        resize=None,
        grayscale=False,
        action_repeat=1,
        time_limit=4,
    )
    assert len(play(make_env(config), 0)) == 5
    assert len(play(make_env({"id": "raywm.envs.classic:CountingEnv", "kwargs": {"lengths": (9, 9)}}), 0)) == 10


@pytest.mark.parametrize("limit,rows", [(7, 8), (None, 21), (30, 31)])
def test_time_limit_replaces_the_registered_one(limit, rows):
    seen = play(make_env({"id": "raywm/Bifurcation-v0", "time_limit": limit}), 0)
    assert len(seen) == rows and seen[-1][-2:] == (False, True)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    cfg = {"id": "raywm/Counting-v0", "kwargs": {"lengths": (10, 10)}}
    plain, repeated = make_env(cfg), make_env(cfg | {"action_repeat": 4})
    rewards = [row[-3] for row in play(repeated, 0)[1:]]
    expected = [sum(map(CountingEnv.reward, steps)) for steps in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10])]
    assert rewards == expected and len(play(plain, 0)) == 11
    limited = make_env(cfg | {"action_repeat": 4, "time_limit": 6})  # counted in the environment's own steps
    assert [row[-3] for row in play(limited, 0)[1:]] == [expected[0], CountingEnv.reward(5) + CountingEnv.reward(6)]


class PaintEnv(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (20, 30, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.canvas = np.zeros((20, 30, 3), np.uint8)
        self.canvas[2:12, 5:25] = (200, 100, 50)  # what a crop of (2, 8, 5, 5) leaves

    def reset(self, *, seed=None, options=None):
        return self.canvas, {}

    def step(self, action):
        self.canvas += 1  # the same buffer, as some environments do
        return self.canvas, 0.0, False, False, {}


def test_images_are_cropped_resized_and_made_grey():
    name = f"{__name__}:PaintEnv"
    image = make_env({"id": name, "crop": (2, 8, 5, 5)}).reset()[0]["image"]
    assert image.shape == (10, 20, 3) and (image == (200, 100, 50)).all()
    image = make_env({"id": name, "crop": (2, 8, 5, 5), "resize": (5, 4)}).reset()[0]["image"]
    assert image.shape == (5, 4, 3) and (image == (200, 100, 50)).all()
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    for more in ({}, {"resize": (5, 4)}):
        env = make_env({"id": name, "crop": (2, 8, 5, 5), "grayscale": True, **more})
        image = env.reset()[0]["image"]
        assert image.shape[2] == 1 and (image == grey).all() and env.observation_space["image"].contains(image)
    for cut in ({}, {"crop": (2, 8, 5, 5)}):
        for more in ({}, {"resize": (5, 4)}, {"grayscale": True}, {"resize": (5, 4), "grayscale": True}):
            env = make_env({"id": name} | cut | more)
            seen, raw = env.reset()[0]["image"], env.env.reset()[0]
            now = {"image": np.full((3, *seen.shape), 7, np.uint8)}
            env.write(raw, now, 1)  # what collectors do
            assert np.array_equal(now["image"][1], seen) and (now["image"][::2] == 7).all()
    env = make_env({"id": name})
    first = env.reset()[0]["image"]
    before = first.copy()
    env.step(0)
    assert np.array_equal(first, before)


@pytest.mark.parametrize(
    "cfg,message",
    [
        ({"id": "CartPol-v1"}, "did you mean 'CartPole-v1'"),
        ({"id": "raywm/Counting-v7"}, "raywm/Counting-v0"),
        ({"id": "nowhere:Env"}, "no module 'nowhere'"),
        ({"id": "raywm.envs.classic:Cunting"}, "CountingEnv"),
        ({"id": "CartPole-v1", "time_limt": 3}, "did you mean 'time_limit'"),
        ({"id": "CartPole-v1", "resize": (64, 64)}, "are for images"),
        ({"id": "CartPole-v1", "action_repeat": 0}, "at least 1"),
        ({"id": ""}, "expected a gymnasium id"),
        ({"id": f"{__name__}:PaintEnv", "crop": (15, 15, 0, 0)}, "leaves nothing"),
    ],
)
def test_mistakes_are_named_with_a_way_out(cfg, message):
    with pytest.raises(ValueError, match=message):
        make_env(cfg)


@pytest.mark.parametrize(
    "module,id,package",
    [
        ("ale_py", "ALE/Pong-v5", "raywm[atari]"),
        ("mujoco", "Hopper-v5", "raywm[mujoco]"),
        ("vizdoom", None, "raywm[doom]"),
        ("dm_control", "dm_control/walker-walk-v0", "raywm[dmc]"),
        ("crafter", "CrafterReward-v1", "raywm[crafter]"),
    ],
)
def test_missing_extras_come_with_their_install_line(module, id, package, monkeypatch):
    ours = ("raywm.envs.dmc", "raywm.envs.crafter")
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.") or n in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # makes importing it fail
    monkeypatch.setitem(sys.modules, f"gymnasium.envs.{module}", None)
    with pytest.raises(ValueError, match=re.escape(f'pip install "{package}"')):
        make_env({"id": id or "VizdoomTakeCover-v1"})


# ViZDoom


@pytest.fixture
def doom(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    envs = []

    def make(**cfg):
        envs.append(make_env({"id": "VizdoomTakeCover-v1", **cfg}))
        return envs[-1]

    yield make
    for env in envs:
        env.close()
    assert os.listdir(tmp_path) == [], "ViZDoom left files in the working directory"


def test_doom_steps_are_tics_and_the_last_frame_is_not_black(doom):
    env = doom(resize=(64, 64), kwargs={"available_game_variables": []})
    assert set(env.observation_space.spaces) == {"image"} and isinstance(env.action_space, gym.spaces.Discrete)
    seen = play(env, 1, 2000)
    assert seen[-1][-2:] == (True, False) and all(row[-3] == 1 for row in seen[1:])
    assert seen[-1][0] == seen[-2][0] and any(seen[-1][0])
    skipping = play(doom(kwargs={"frame_skip": 4, "available_game_variables": []}), 1, 20)
    assert all(row[-3] == 4 for row in skipping[1:])
    assert set(doom().observation_space.spaces) == {"image", "vector"}  # its game variable is the health


def test_a_doom_timeout_is_not_a_death(doom):
    assert play(doom(kwargs={"episode_timeout": 20}), 0)[-1][-2:] == (False, True)
    assert play(doom(time_limit=15), 0)[-1][-2:] == (False, True)


def test_a_scalar_array_presses_the_same_button_as_a_number(doom):
    env = doom()
    frames = []
    for action in (np.int64(2), np.array(2)):
        env.reset(seed=0)
        for _ in range(12):
            obs = env.step(action)[0]
        frames.append(obs["image"])
    assert np.array_equal(*frames)


def test_the_doom_engine_dies_with_a_killed_owner(tmp_path):
    pytest.importorskip("vizdoom")
    code = (
        "import glob, os, time; from raywm.envs import make_env;"
        "e = make_env({'id': 'VizdoomTakeCover-v1'}); e.reset(seed=0);"
        "tasks = glob.glob(f'/proc/{os.getpid()}/task/*/children');"
        "print(*[p for t in tasks for p in open(t).read().split()], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as owner:
        engines = [int(pid) for pid in owner.stdout.readline().split()]
        owner.send_signal(signal.SIGKILL)
    assert engines
    patience = time.monotonic() + 10
    while time.monotonic() < patience and any(map(_runs, engines)):
        time.sleep(0.1)
    assert not any(map(_runs, engines))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# raywm's own


@pytest.mark.parametrize("image", [False, True])
def test_counting_episodes_prove_their_integrity(image):
    env = make_env({"id": "raywm/Counting-v0", "kwargs": {"image": image}})
    ends = set()
    for seed in range(12):
        episode = episode_of(env, seed)
        validate(episode, obs_columns(env.observation_space), ActionCodec(env.action_space))
        check_counting(episode)
        assert episode.obs["vector"][0, 0] == CountingEnv.identity(seed)
        ends.add(bool(episode.is_terminal[-1]))
    assert ends == {True, False}


def _with(episode, **changes):
    parts = vars(episode) | changes
    return Episode(**parts)


def _rows(episode, rows):
    parts = {name: value[rows] for name, value in vars(episode).items() if isinstance(value, np.ndarray)}
    return _with(episode, obs={k: v[rows] for k, v in episode.obs.items()}, **parts)


def test_counting_finds_what_is_lost_doubled_or_shifted():
    episode = episode_of(make_env({"id": "raywm/Counting-v0"}), 3)
    order = np.arange(len(episode))
    roll = np.roll(episode.action, -1)
    terminal = episode.is_terminal.copy()
    terminal[-1] ^= True
    broken = {
        "lost": _rows(episode, np.delete(order, 4)),
        "lost end": _rows(episode, order[:-1]),
        "doubled": _rows(episode, np.insert(order, 4, 4)),
        "swapped": _rows(episode, np.r_[order[:2], 3, 2, order[4:]]),
        "shifted actions": _with(episode, action=roll),
        "shifted rewards": _with(episode, reward=np.roll(episode.reward, -1)),
        "wrong end": _with(episode, is_terminal=terminal),
    }
    for what, bad in broken.items():
        with pytest.raises(ValueError):
            check_counting(bad)
            pytest.fail(f"{what} was not found")


def test_bifurcation_has_the_stated_law():
    episodes = bifurcation_episodes(400, seed=0)
    for episode in episodes[:5]:
        validate(episode, codec=ActionCodec(gym.spaces.Box(-4, 4, (2,))))
    z = np.stack([e.obs["vector"] for e in episodes]).astype(np.float64)
    a = np.stack([e.action for e in episodes])
    assert z.shape == (400, BifurcationEnv.STEPS + 1, 2)
    assert abs(z[:, 0].std() - 0.5) < 0.03 and abs(a[:, 1:].std() - 0.5) < 0.01 and not a[:, 0].any()
    rest = z[:, 1:] - z[:, :-1] - 0.3 * np.tanh(a[:, 1:])
    right = z[:, :-1, 0] > 0.5
    assert abs(rest[~right].std() - 0.05) < 0.002 and abs(rest[right][:, 0].std() - 0.05) < 0.004
    jump = rest[right][:, 1]
    assert abs((jump > 0).mean() - 0.5) < 0.05 and np.abs(np.abs(jump) - 0.4).max() < 0.3
    assert [e.id for e in episodes] == sorted(e.id for e in episodes)
    again = bifurcation_episodes(400, seed=0)
    assert all(np.array_equal(x.obs["vector"], y.obs["vector"]) for x, y in zip(episodes, again))


def test_linear_world_has_its_closed_form_optimum():
    gains, optimum = LinearWorldEnv.optimal()
    env = LinearWorldEnv()

    def mean_return(gains, n=400):
        returns = []
        for seed in range(n):
            x, total = env.reset(seed=seed)[0], 0.0
            for gain in gains:
                x, reward, _, truncated, _ = env.step(-gain @ x)
                total += reward
            assert truncated
            returns.append(total)
        return np.mean(returns), np.std(returns) / n**0.5

    mean, error = mean_return(gains)
    assert abs(mean - optimum) < 4 * error
    worse = [gains * 0.8, gains * 1.2, gains + 0.1, gains * 0]
    assert all(LinearWorldEnv.expected_return(g) < optimum for g in worse)
    mean, error = mean_return(worse[0], 200)
    assert abs(mean - LinearWorldEnv.expected_return(worse[0])) < 4 * error


def test_faulty_fails_as_told(tmp_path):
    def run(**kwargs):
        return play(make_env({"id": "raywm/Faulty-v0", "kwargs": kwargs}), 0)

    clean = run(fault=None)
    assert len(clean) == 21
    with pytest.raises(RuntimeError, match="step 5"):
        run(fault="raise")
    seen = run(fault="nan_reward", at=3)
    assert [np.isnan(row[1]) for row in seen[1:]].index(True) == 2
    seen = run(fault="nan_obs", at=0)
    assert np.isnan(np.frombuffer(seen[0][0], np.float32)).all()
    begin = time.monotonic()
    run(fault="stall", seconds=0.2)
    assert time.monotonic() - begin >= 0.2
    once = str(tmp_path / "struck")
    with pytest.raises(RuntimeError):
        run(fault="raise", once=once)
    assert run(fault="raise", once=once) == clean
    with pytest.raises(ValueError, match="expected one of"):
        run(fault="rise")
