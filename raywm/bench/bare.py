"""Bare loops over environments, the floor of ``raywm bench collect``: no Ray and no torch in their processes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from raywm.agent import _draw
from raywm.bench.common import Work
from raywm.envs import make_env
from raywm.spaces import ActionCodec

FLOOR, PLAIN = "floor", "floor, plain gymnasium"
ROWS = 64  # vector steps of a piece of work
DRAWN = 4096  # actions that are drawn at once


def wrapped_loop(env: dict[str, Any], envs: int) -> dict[str, Work]:
    """Steps `envs` environments in turn, each observation into an array that is there already."""
    made = [make_env(env) for _ in range(envs)]
    codec, rng, rows = ActionCodec(made[0].action_space), np.random.default_rng(0), ROWS
    seen = {name: np.zeros((rows, envs, *box.shape), box.dtype) for name, box in columns_of(made[0]).items()}
    for index, one in enumerate(made):
        one.reset(seed=index)

    def work() -> float:
        actions = _draw(codec, rng, rows * envs).reshape(rows, envs, *codec.shape)
        for t in range(rows):
            for index, one in enumerate(made):
                obs, _, terminated, truncated, _ = one.step(actions[t, index])
                for name, column in seen.items():
                    column[t, index] = obs[name]
                if terminated or truncated:
                    one.reset()
        return float(rows * envs)

    return {FLOOR: work}


def plain_loop(id: str) -> dict[str, Work]:
    """Steps one `gymnasium.make(id)` and looks at nothing."""
    env = gym.make(id, disable_env_checker=True)
    codec, rng = ActionCodec(env.action_space), np.random.default_rng(0)
    env.reset(seed=0)

    def work() -> float:
        drawn = _draw(codec, rng, DRAWN)
        for action in drawn.tolist() if codec.kind == "discrete" else drawn:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return float(DRAWN)

    return {PLAIN: work}


def columns_of(env: gym.Env) -> dict[str, gym.spaces.Box]:
    """The observation columns of what ``make_env`` makes."""
    return dict(env.observation_space.spaces)  # type: ignore[attr-defined]
