"""Crafter (Hafner, arXiv 2109.06780) for gymnasium: ``CrafterReward-v1``; imported when asked for."""

from __future__ import annotations

import collections
from typing import Any

import crafter
import gymnasium as gym
import numpy as np
from crafter import engine

STEPS = 10_000
VIDEO = (256, 256)


class _InOrder(dict):
    """A set that remembers the order in which things came."""

    def add(self, thing: Any) -> None:
        self[thing] = None

    def remove(self, thing: Any) -> None:
        del self[thing]


class _World(engine.World):
    """Crafter's world, with the creatures of a chunk in a fixed order.

    It keeps them in sets and removes the n-th one, which is another one wherever memory is laid out differently: an
    episode would not depend on its seed and actions alone.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks: dict = collections.defaultdict(_InOrder)


class Crafter(gym.Env):
    """Survive and progress in a world of 64 x 64 cells: 22 achievements, 17 actions, images of `size`.

    A new achievement gives 1, health won or lost 0.1 a point; without `reward` nothing does. Death is terminal; 10,000
    steps under its registered id. ``step``'s info has ``achievements`` (how often each), ``inventory`` and more.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's name)

    def __init__(self, size: tuple[int, int] = (64, 64), reward: bool = True, render_mode: str | None = None) -> None:
        height, width = int(size[0]), int(size[1])
        self.render_mode = render_mode
        self.game = crafter.Env(size=(width, height), reward=reward, length=None, seed=0)
        self.game._world.__class__ = _World  # its views hold this object, so it cannot be another one
        self.observation_space = gym.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.game.action_names))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.game._seed, self.game._episode = int(self.np_random.integers(2**31 - 1)), 0
        return self.game.reset(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, _, info = self.game.step(int(action))
        return obs, float(reward), info["discount"] == 0, False, info

    def render(self) -> np.ndarray:  # type: ignore[override]
        return self.game.render(np.array(VIDEO))


for _name, _reward in (("CrafterReward-v1", True), ("CrafterNoReward-v1", False)):
    if _name not in gym.registry:
        gym.register(
            _name, entry_point="raywm.envs.crafter:Crafter", kwargs={"reward": _reward}, max_episode_steps=STEPS
        )
