"""Environments for tests of what runs without raywm: this module imports nothing of it."""

import gymnasium as gym
import numpy as np


class Square(gym.Env):
    """A bright square on a dark image of 64 x 64 that walks about and ends at the edges."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space: gym.Space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 28
        return self._draw(), {}

    def step(self, action):
        self.x += int(self.np_random.integers(-6, 7))
        return self._draw(), 1.0, not 0 < self.x < 56, False, {}

    def _draw(self):
        image = np.full((64, 64, 3), 20, np.uint8)
        image[28:36, max(self.x, 0) : self.x + 8] = 250
        return image


class Both(Square):
    """The same larger, seen by its image and by its place; pushed by two numbers."""

    observation_space = gym.spaces.Dict(  # type: ignore[assignment]
        {
            "seen": gym.spaces.Box(0, 255, (128, 96, 3), np.uint8),
            "at": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        }
    )
    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))

    def _draw(self):
        image = np.full((128, 96, 3), 20, np.uint8)
        image[28:36, max(self.x, 0) : self.x + 8] = 250
        return {"seen": image, "at": np.array([self.x], np.float32)}
