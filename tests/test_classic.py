"""raywm's own small environments whose returns are known: memory, and images drawn with numpy."""

import gymnasium as gym
import numpy as np
import pytest

from raywm.envs import make_env
from raywm.envs.classic import MemoryEnv
from raywm.envs.pixels import PIXELS, CartPolePixelsEnv, GridEnv


def returns(env, policy, seeds):
    """Returns of `policy(first observation, observation, rng)`, one a seed."""
    totals = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        first, _ = env.reset(seed=seed)
        obs, total, ended = first, 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(first, obs, rng))
            total, ended = total + reward, terminated or truncated
        totals.append(total)
    return np.array(totals)


# Memory


@pytest.mark.parametrize(("cues", "steps"), [(2, 20), (3, 1), (5, 7)])
def test_memory_tells_the_cue_once_and_asks_once(cues, steps):
    env, seen = MemoryEnv(steps=steps, cues=cues, noise=3), set()
    for seed in range(30):
        rows, rewards, ends = [env.reset(seed=seed)[0]], [], []
        cue = int(rows[0][:cues].argmax())
        for _ in range(steps + 1):
            obs, reward, terminated, truncated, _ = env.step(cue)
            rows.append(obs), rewards.append(reward), ends.append(terminated)
            assert not truncated
        rows = np.stack(rows)
        assert rows[0, :cues].tolist() == np.eye(cues)[cue].tolist() and not rows[1:, :cues].any()
        assert rows[:, cues].nonzero()[0].tolist() == [steps]
        assert rewards == [0.0] * steps + [1.0] and ends == [False] * steps + [True]
        assert len(np.unique(rows[:, cues + 1 :])) == 3 * (steps + 2)
        seen.add(cue)
    assert seen == set(range(cues))


def test_memory_needs_one():
    env, n = MemoryEnv(), 600
    remembers = returns(env, lambda first, obs, rng: int(first[:2].argmax()), range(50))
    assert (remembers == 1).all()
    forgets = {
        "constant": lambda first, obs, rng: 1,
        "random": lambda first, obs, rng: int(rng.integers(2)),
        "of the noise": lambda first, obs, rng: int(obs[3:].sum() > 0),
    }
    for name, policy in forgets.items():
        assert abs(returns(env, policy, range(n)).mean()) < 4 / n**0.5, name
    wrong = returns(MemoryEnv(cues=4), lambda first, obs, rng: 0, range(n))
    assert abs(wrong.mean() - (2 / 4 - 1)) < 4 * wrong.std() / n**0.5


def test_memory_says_what_it_takes():
    with pytest.raises(ValueError, match="cues >= 2"):
        MemoryEnv(cues=1)


# CartPole from pixels


def test_cartpole_pixels_have_cartpoles_physics():
    ours, theirs = gym.make("raywm/CartPolePixels-v0"), gym.make("CartPole-v1")
    for seed in range(5):
        ours.reset(seed=seed), theirs.reset(seed=seed)
        rng, end = np.random.default_rng(seed), False
        while not end:
            action = int(rng.integers(2))
            a, b = ours.step(action), theirs.step(action)
            assert a[1:4] == b[1:4]
            assert np.array_equal(ours.unwrapped.game.state.astype(np.float32), b[0])
            end = a[2] or a[3]
    state = theirs.reset(seed=0)[0]
    ours.reset(seed=0)
    for step in range(1, 501):  # a balancing controller reaches the limit
        action = int(state @ [0.1, 0.5, 1.0, 1.0] > 0)
        state, end = theirs.step(action)[0], ours.step(action)[2:4]
        assert end == (False, step == 500)


def column(image, colour):
    """The mean column of what has this colour, by how near each pixel is to it."""
    weight = np.clip(1 - np.abs(image.astype(float) - colour).sum(-1) / 150, 0, 1)
    return (weight.sum(0) * np.arange(PIXELS)).sum() / weight.sum()


def test_cart_and_pole_can_be_read_off_the_image():
    env = CartPolePixelsEnv()
    env.reset(seed=0)

    def at(x, angle):
        env.game.state = np.array([x, 0, angle, 0])
        return env.frame()

    straight = at(0, 0)
    assert straight.shape == (PIXELS, PIXELS, 3) and straight.dtype == np.uint8
    assert np.array_equal(straight, straight[:, ::-1])
    assert np.array_equal(at(0.5, 0.1), at(-0.5, -0.1)[:, ::-1])
    carts = [column(at(x, 0), env.BODY) for x in np.linspace(-2.4, 2.4, 25)]
    assert np.allclose(np.diff(carts), 0.2 * env._scale, atol=0.2)  # in sub-pixels, over the whole track
    poles = [column(at(0, angle), env.WOOD) for angle in np.linspace(-0.2, 0.2, 21)]
    assert (np.diff(poles) > 0.2).all()
    small = np.abs(at(0.02, 0).astype(int) - straight).max()
    assert small > 20  # what a cart does in one step of 1 unit a second is seen


# Grid


def test_grid_images_show_every_cell():
    env = GridEnv()
    for seed in range(20):
        image, _ = env.reset(seed=seed)
        cells = image[::8, ::8].reshape(-1, 3)  # corners, which the agent does not cover
        assert np.array_equal(cells, env.COLOURS[env.cells])
        assert [int((env.cells == kind).sum()) for kind in range(4)] == [64 - 16, 10, 5, 1]
        centres = image[4::8, 4::8].reshape(-1, 3)
        assert (centres == env.AGENT).all(1).nonzero()[0].tolist() == [env.agent]
        assert env.cells[env.agent] == env.FLOOR


@pytest.mark.parametrize("kwargs", [{}, {"size": 4, "walls": 2, "lava": 2}, {"size": 16, "walls": 60, "lava": 10}])
def test_grid_returns_are_known(kwargs):
    env = gym.make("raywm/Grid-v0", **kwargs)
    grid, n = env.unwrapped, 60
    for seed in range(n):  # shortest ways: as many steps as they say, and 1 at the end
        env.reset(seed=seed)
        for left in range(int(grid.distances()[grid.agent]), 0, -1):
            _, reward, terminated, truncated, _ = env.step(grid.optimal_action())
            assert (reward, terminated, truncated) == (float(left == 1), left == 1, False)
    if "size" in kwargs and kwargs["size"] == 16:
        return
    played, expected = [], []
    rng = np.random.default_rng(0)
    for seed in range(10):
        for _ in range(n):
            env.reset(seed=seed)
            expected.append(grid.random_return())
            end, total = False, 0.0
            while not end:
                _, reward, terminated, truncated, _ = env.step(rng.integers(4))
                end, total = terminated or truncated, total + reward
            played.append(total)
    assert abs(np.mean(played) - np.mean(expected)) < 4 * np.std(played) / len(played) ** 0.5
    assert np.std(expected) > 0.1  # grids differ


def test_grid_walls_hold_lava_kills_and_time_runs_out():
    env = gym.make("raywm/Grid-v0", size=2, walls=1, lava=1)
    grid = env.unwrapped
    seen = set()
    for seed in range(40):
        env.reset(seed=seed)
        for action in range(4):
            to = int(grid.next[action, grid.agent])
            assert grid.cells[to] != grid.WALL
            if grid.cells[to] == grid.LAVA:
                assert env.step(action)[1:4] == (-1.0, True, False)
                seen.add("lava")
                break
            if to == grid.agent:
                assert env.step(action)[1:4] == (0.0, False, False)
                seen.add("held")
    assert seen == {"lava", "held"}
    env.reset(seed=0)
    still = int((grid.next[:, grid.agent] == grid.agent).argmax())
    ends = [env.step(still)[1:4] for _ in range(50)]
    assert ends == [(0.0, False, False)] * 49 + [(0.0, False, True)]


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"size": 7}, "size is 7"), ({"walls": 60}, "at most 62"), ({"lava": -1}, "at most")]
)
def test_grids_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env({"id": "raywm/Grid-v0", "kwargs": kwargs})
    crowded = GridEnv(size=16, walls=254, lava=0)
    for seed in range(3):
        crowded.reset(seed=seed)
        assert crowded.distances()[crowded.agent] == 1
