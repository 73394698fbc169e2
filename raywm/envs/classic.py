"""Small environments whose truth is known: for tests of models, of learners, and of the path of a transition."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raywm.data.episode import Episode
from raywm.seeding import rng as seeded

UNLIMITED = np.inf


class BifurcationEnv(gym.Env):
    """A point that must go left or right, where a model that predicts the mean goes to neither.

    z = (x, y), initially N(0, 0.25 I); z' = z + 0.3 tanh(a) + b + N(0, 0.05^2 I), with b = (0, +-0.4), either with
    equal chance, where x > 0.5, and 0 elsewhere. Reward 0, never terminal; 20 steps under its registered id.
    """

    STEPS = 20
    GAIN, JUMP, EDGE, NOISE, START = 0.3, 0.4, 0.5, 0.05, 0.5

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-UNLIMITED, UNLIMITED, (2,), np.float32)
        self.action_space = gym.spaces.Box(-4, 4, (2,), np.float32)
        self.z = np.zeros(2)

    @classmethod
    def start(cls, rng: np.random.Generator, n: int | None = None) -> np.ndarray:
        return cls.START * rng.standard_normal(2 if n is None else (n, 2))

    @classmethod
    def move(cls, z: np.ndarray, action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(..., 2), (..., 2) -> (..., 2)"""
        z = np.asarray(z, np.float64)
        side = np.where(rng.random(z.shape[:-1]) < 0.5, cls.JUMP, -cls.JUMP)
        jump = np.stack([np.zeros_like(side), np.where(z[..., 0] > cls.EDGE, side, 0)], -1)
        return z + cls.GAIN * np.tanh(action) + jump + cls.NOISE * rng.standard_normal(z.shape)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.z = self.start(self.np_random)
        return self.z.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.z = self.move(self.z, np.asarray(action, np.float64), self.np_random)
        return self.z.astype(np.float32), 0.0, False, False, {}


def bifurcation_episodes(n: int, seed: int, steps: int = BifurcationEnv.STEPS) -> list[Episode]:
    """n episodes of BifurcationEnv under the action law a ~ N(0, 0.25 I) (standard deviation 0.5)."""
    rng = seeded(seed, "bifurcation")
    z = [BifurcationEnv.start(rng, n)]
    action = np.zeros((steps + 1, n, 2))
    action[1:] = np.clip(0.5 * rng.standard_normal((steps, n, 2)), -4, 4)
    for t in range(steps):
        z.append(BifurcationEnv.move(z[-1], action[t + 1], rng))
    obs = np.stack(z, 1).astype(np.float32)  # T+1 x (n, 2) -> (n, T+1, 2)
    row = np.arange(steps + 1)
    return [
        Episode(
            id=f"bifurcation-{i:09d}",
            obs={"vector": obs[i]},
            action=action[:, i].astype(np.float32),
            reward=np.zeros(steps + 1, np.float32),
            is_first=row == 0,
            is_last=row == steps,
            is_terminal=np.zeros(steps + 1, bool),
        )
        for i in range(n)
    ]


class CountingEnv(gym.Env):
    """An environment whose every observation tells its whole past, so that one episode proves its own integrity.

    Observation: (identity, step, last action, hash of the past), all whole numbers below 2^24, exact in float32. The
    identity comes from the reset's seed; the length (uniform in `lengths`) and whether the end is terminal (or
    truncated) come from the identity; the reward is a function of the step. ``check_counting`` holds an Episode
    against all of it. `image` adds an (8, 8, 3) frame filled with the last bytes of the identity, step and hash.
    """

    LIMIT = 2**24

    def __init__(self, lengths: tuple[int, int] = (5, 40), actions: int = 5, image: bool = False):
        self.lengths, self.image = (int(lengths[0]), int(lengths[1])), image
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths are {lengths}, expected (least, most) with 1 <= least <= most")
        vector = gym.spaces.Box(0, self.LIMIT, (4,), np.float32)
        frame = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        self.observation_space = gym.spaces.Dict({"vector": vector, "image": frame}) if image else vector
        self.action_space = gym.spaces.Discrete(actions)
        self.state = (0, 0, 0, 0)

    @classmethod
    def identity(cls, seed: int) -> int:
        """The identity of the episode played after reset(seed=seed)."""
        return int(gym.utils.seeding.np_random(seed)[0].integers(cls.LIMIT))

    @classmethod
    def first(cls, identity: int) -> tuple[int, int, int, int]:
        return identity, 0, 0, (identity * 40503 + 1) % cls.LIMIT

    @classmethod
    def next(cls, state: tuple[int, int, int, int], action: int) -> tuple[int, int, int, int]:
        identity, step, _, past = state
        return identity, step + 1, action, (past * 31 + action * 7919 + step + 1) % cls.LIMIT

    @staticmethod
    def reward(step: int) -> float:
        """Received on arriving at `step`; never 0, exact in float32, with no period that a test is likely to use."""
        return (step * 37 % 101 + 1) / 8

    @staticmethod
    def end(identity: int, lengths: tuple[int, int] = (5, 40)) -> tuple[int, bool]:
        """(length in steps, whether the last one is terminal)"""
        draw = identity * 2654435761 % 2**32
        return lengths[0] + (draw >> 8) % (lengths[1] - lengths[0] + 1), bool(draw >> 31)

    @staticmethod
    def frame(state: tuple[int, int, int, int]) -> np.ndarray:
        return np.broadcast_to(np.array([state[0], state[1], state[3]]) % 256, (8, 8, 3)).astype(np.uint8)

    def _observe(self) -> Any:
        vector = np.array(self.state, np.float32)
        return {"vector": vector, "image": self.frame(self.state)} if self.image else vector

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.state = self.first(int(self.np_random.integers(self.LIMIT)))
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.state = self.next(self.state, int(action))
        length, terminal = self.end(self.state[0], self.lengths)
        last = self.state[1] >= length
        return self._observe(), self.reward(self.state[1]), last and terminal, last and not terminal, {}


def check_counting(episode: Episode, lengths: tuple[int, int] = (5, 40)) -> None:
    """Raise ValueError unless every transition of a CountingEnv episode is there once, in its place and unshifted."""
    vector = episode.obs["vector"]
    state = CountingEnv.first(int(vector[0, 0]))
    length, terminal = CountingEnv.end(state[0], lengths)
    for row in range(len(episode)):
        if row:
            state = CountingEnv.next(state, int(episode.action[row]))
        got = (tuple(vector[row].tolist()), float(episode.reward[row]))
        expected = (tuple(map(float, state)), CountingEnv.reward(row) if row else 0.0)
        if got != expected:
            raise ValueError(f"episode {episode.id!r}, row {row}: (vector, reward) is {got}, expected {expected}")
        if "image" in episode.obs and not np.array_equal(episode.obs["image"][row], CountingEnv.frame(state)):
            raise ValueError(f"episode {episode.id!r}, row {row}: the image is not that of {state}")
        flags = tuple(bool(f[row]) for f in (episode.is_first, episode.is_last, episode.is_terminal))
        if flags != (row == 0, row == length, row == length and terminal):
            raise ValueError(f"episode {episode.id!r}, row {row} of {length}: (first, last, terminal) is {flags}")
    if len(episode) != length + 1:
        raise ValueError(f"episode {episode.id!r} has {len(episode)} rows, expected {length + 1}")


class LinearWorldEnv(gym.Env):
    """x' = A x + B u + N(0, NOISE^2 I) with reward -(x' Q x' + u R u) on arriving, truncated after `steps`.

    A point pushed along a line, x = (position, speed). Its optimum is the finite-horizon linear-quadratic regulator,
    so learners and models can be held against ``optimal`` and ``expected_return``. The action's bounds are so wide
    that the optimal controller does not meet them.
    """

    STEPS = 50
    A = np.array([[1.0, 0.2], [0.0, 0.95]])
    B = np.array([[0.02], [0.2]])
    Q = np.diag([1.0, 0.1])
    R = np.array([[0.5]])
    NOISE, START, BOUND = 0.02, 0.5, 5.0

    def __init__(self, steps: int = STEPS):
        self.steps, self.t = steps, 0
        self.observation_space = gym.spaces.Box(-UNLIMITED, UNLIMITED, (2,), np.float32)
        self.action_space = gym.spaces.Box(-self.BOUND, self.BOUND, (1,), np.float32)
        self.x = np.zeros(2)

    @classmethod
    def optimal(cls, steps: int = STEPS) -> tuple[np.ndarray, float]:
        """(gains (steps, 1, 2) of the optimal controller u[t] = -gains[t] @ x[t], its expected return)."""
        cost_to_go, gains = np.zeros((2, 2)), []
        for _ in range(steps):  # backwards in time: the Riccati recursion
            S = cls.Q + cost_to_go
            gain = np.linalg.solve(cls.R + cls.B.T @ S @ cls.B, cls.B.T @ S @ cls.A)
            cost_to_go = cls.A.T @ S @ (cls.A - cls.B @ gain)
            gains.append(gain)
        ordered = np.stack(gains[::-1])
        return ordered, cls.expected_return(ordered)

    @classmethod
    def expected_return(cls, gains: np.ndarray) -> float:
        """The expected return of u[t] = -gains[t] @ x[t], gains (steps, 1, 2), over starts and noise."""
        cost_to_go, constant = np.zeros((2, 2)), 0.0
        for gain in gains[::-1]:
            S, closed = cls.Q + cost_to_go, cls.A - cls.B @ gain
            constant += cls.NOISE**2 * np.trace(S)
            cost_to_go = closed.T @ S @ closed + gain.T @ cls.R @ gain
        return -float(cls.START**2 * np.trace(cost_to_go) + constant)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.t = self.START * self.np_random.standard_normal(2), 0
        return self.x.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        u = np.clip(np.asarray(action, np.float64), -self.BOUND, self.BOUND)
        self.x = self.A @ self.x + self.B @ u + self.NOISE * self.np_random.standard_normal(2)
        self.t += 1
        reward = -float(self.x @ self.Q @ self.x + u @ self.R @ u)
        return self.x.astype(np.float32), reward, False, self.t >= self.steps, {}


class FaultyEnv(gym.Env):
    """A random walk of 20 steps that fails on purpose at step `at` (0 is the reset), for tests of what survives it.

    `fault`: None, "nan_obs", "nan_reward", "raise", "stall" (sleeps `seconds`) or "kill" (SIGKILL to its own process).
    `once`: a file that the first failure creates, and that prevents any further one, in whatever process; "{seed}" in
    its name stands for the reset's seed, and then every episode fails once.
    `every`: only episodes whose reset's seed is a multiple of it fail.
    """

    FAULTS = (None, "nan_obs", "nan_reward", "raise", "stall", "kill")

    def __init__(
        self,
        fault: str | None = "raise",
        at: int = 5,
        seconds: float = 3600.0,
        once: str | None = None,
        steps: int = 20,
        every: int = 1,
    ):
        if fault not in self.FAULTS:
            raise ValueError(f"fault is {fault!r}, expected one of {self.FAULTS}")
        self.fault, self.at, self.seconds, self.once, self.steps = fault, at, seconds, once, steps
        self.every, self.seed = every, 0
        self.observation_space = gym.spaces.Box(-UNLIMITED, UNLIMITED, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.t, self.x = 0, np.zeros(3)

    def _strikes(self) -> bool:
        if self.fault is None or self.t != self.at or self.seed % self.every:
            return False
        if self.once is not None:
            try:
                Path(self.once.replace("{seed}", str(self.seed))).touch(exist_ok=False)
            except FileExistsError:
                return False
        return True

    def _fail(self, obs: np.ndarray, reward: float) -> tuple[np.ndarray, float]:
        if not self._strikes():
            return obs, reward
        if self.fault == "raise":
            raise RuntimeError(f"raywm/Faulty-v0 was told to fail at step {self.at}")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stall":
            time.sleep(self.seconds)
        if self.fault == "nan_obs":
            obs = np.full_like(obs, np.nan)
        return obs, float("nan") if self.fault == "nan_reward" else reward

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.x, self.seed = 0, self.np_random.standard_normal(3), seed or 0
        return self._fail(self.x.astype(np.float32), 0.0)[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.x = self.x + 0.1 * (2 * int(action) - 1) + 0.1 * self.np_random.standard_normal(3)
        obs, reward = self._fail(self.x.astype(np.float32), 1.0)
        return obs, reward, False, self.t >= self.steps, {}


class MemoryEnv(gym.Env):
    """See a cue, sit through noise, then choose: nothing but what is remembered from step 0 tells the right action.

    Observation, (cues + 1 + noise,) float32: the cue as one-hot, at step 0 only; whether the next action is the
    choice; `noise` numbers from N(0, 1) at every step. The first `steps` actions do nothing; the one after them, on
    the last of `steps` rows of noise, is the choice: reward 1 where it is the cue's number, else -1, and the end. All
    other rewards are 0. The optimal return is 1; that of any policy without a memory is 2 / cues - 1 in expectation
    (0 for two cues), because the cue is independent of everything after it.
    """

    def __init__(self, steps: int = 20, cues: int = 2, noise: int = 4):
        if steps < 1 or cues < 2 or noise < 0:
            raise ValueError(
                f"got steps={steps}, cues={cues}, noise={noise}; expected steps >= 1, cues >= 2, noise >= 0"
            )
        self.steps, self.cues, self.noise = steps, cues, noise
        self.observation_space = gym.spaces.Box(-UNLIMITED, UNLIMITED, (cues + 1 + noise,), np.float32)
        self.action_space = gym.spaces.Discrete(cues)
        self.t, self.cue = 0, 0

    def _observe(self) -> np.ndarray:
        obs = np.zeros(self.cues + 1 + self.noise, np.float32)
        obs[self.cue] = self.t == 0
        obs[self.cues] = self.t == self.steps
        obs[self.cues + 1 :] = self.np_random.standard_normal(self.noise)
        return obs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(self.cues))
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        choice = self.t == self.steps
        reward = (1.0 if int(action) == self.cue else -1.0) if choice else 0.0
        self.t += 1
        return self._observe(), reward, choice, False, {}


class SleepEnv(gym.Env):
    """An environment that costs time and nothing else: `length` steps of `seconds` each, then truncated.

    It sees how much of the episode is over. What one sleep took too long (the operating system's timer slack) the
    process's next one is shorter by, so that it does not add up; what goes on between two steps costs what it costs.
    """

    _slack = 0.0  # seconds slept too long so far, by all such environments of the process

    def __init__(self, seconds: float = 0.0025, length: int = 200):
        if seconds < 0 or length < 1:
            raise ValueError(f"got seconds={seconds}, length={length}; expected seconds >= 0 and at least 1 step")
        self.seconds, self.length, self.t = seconds, length, 0
        self.observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def _observe(self) -> np.ndarray:
        return np.array([self.t / self.length], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        began, wanted = time.monotonic(), self.seconds - SleepEnv._slack
        time.sleep(max(0.0, wanted))
        SleepEnv._slack = min(time.monotonic() - began - wanted, self.seconds)
        return self._observe(), 1.0, False, self.t >= self.length, {}


def _register(id: str, env_class: type[gym.Env], limit: int | None = None) -> None:
    if id not in gym.registry:  # a module may be imported under a second name, by a pickled class for one
        gym.register(id, entry_point=f"raywm.envs.classic:{env_class.__name__}", max_episode_steps=limit)


_register("raywm/Bifurcation-v0", BifurcationEnv, limit=BifurcationEnv.STEPS)
_register("raywm/Counting-v0", CountingEnv)
_register("raywm/LinearWorld-v0", LinearWorldEnv)
_register("raywm/Faulty-v0", FaultyEnv)
_register("raywm/Memory-v0", MemoryEnv)
_register("raywm/Sleep-v0", SleepEnv)
