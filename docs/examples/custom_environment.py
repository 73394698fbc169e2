"""An environment of your own: any gymnasium.Env, named as module:Class.

    raywm train cartpole env.id=custom_environment:Thermostat env.time_limit=100 target.real_return=-20

The module must be importable where the command runs (its directory on PYTHONPATH, or installed); on a cluster it
travels along. Observations are a vector, an image, or a Dict of both; actions a Box, Discrete, MultiDiscrete or
MultiBinary. raywm seeds `reset` with a number of its own for every episode: draw all randomness from `self.np_random`,
and an episode is the same bits wherever it is played.
"""

import gymnasium as gym
import numpy as np


class Thermostat(gym.Env):
    """Keep a room at 20 degrees with a heater that is on or off, while it leaks to a changing outside."""

    observation_space = gym.spaces.Box(-50.0, 50.0, (2,), np.float32)  # room, outside
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.room, self.outside = self.np_random.uniform(10, 25), self.np_random.uniform(-5, 10)
        return self._seen(), {}

    def step(self, action):
        self.outside += self.np_random.normal(0, 0.3)
        self.room += 0.05 * (self.outside - self.room) + (1.5 if action else 0.0)
        frozen = self.room < 0  # the pipes burst: a terminal state, after which nothing is earned
        return self._seen(), -abs(self.room - 20) / 10, bool(frozen), False, {}

    def _seen(self):
        return np.array([self.room, self.outside], np.float32)
