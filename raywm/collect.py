"""Playing episodes in real environments: many at once in one process, the same bits however they are shared out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from raywm.agent import Agent
from raywm.config import EnvConfig
from raywm.data.episode import Episode
from raywm.envs.make import make_env
from raywm.seeding import derive, rng
from raywm.spaces import ActionCodec, obs_columns

START_STEPS = 512  # vector steps that a recording has room for at first


class Played(NamedTuple):
    """What evaluation needs of an episode."""

    number: int
    ret: float
    steps: int
    info: dict[str, Any]


class Collector:
    """Plays numbered episodes in `envs` environments at once.

    Episode n is always played in row n % envs, its environment and its agent seeded by (seed, stream, n), and the agent
    acts on a batch of always `envs` rows (idle ones hold zeros): so an episode has the same bits whichever collector
    plays it and whatever is played beside it. An episode longer than `max_steps` is an error, not a hang.
    """

    def __init__(self, env: EnvConfig | Mapping[str, Any], seed: int, envs: int = 8, max_steps: int = 100_000) -> None:
        if envs < 1:
            raise ValueError(f"envs is {envs}, expected at least 1")
        self.config, self.seed, self.envs, self.max_steps = env, seed, envs, max_steps
        self.id: str = env["id"] if isinstance(env, Mapping) else env.id
        self._rows: dict[int, _Row] = {}
        self._turn = 0
        first = self._row(0).env
        self.columns = obs_columns(first.observation_space)
        self.codec = ActionCodec(first.action_space)

    def collect(self, agent: Agent, numbers: Sequence[int], stream: str = "collect") -> Iterator[Episode]:
        """Play the episodes `numbers` and yield each as it ends.

        Raises ValueError, naming environment, episode and step, when the environment raises, gives a NaN or a wrong
        shape, or does not end.
        """
        for row, recording in self._play(agent, numbers, stream, keep=True):
            obs, action = recording.cut(row.index, row.begin)
            action[0] = self.codec.zero()
            flags = np.zeros((3, len(row.rewards)), bool)
            flags[0, 0] = flags[1, -1] = True
            flags[2, -1] = row.terminated
            reward = np.array(row.rewards, np.float32)
            first, last, terminal = flags
            info = self._info(row, agent)
            yield Episode(f"{stream}-{row.number:09d}", obs, action, reward, first, last, terminal, info)

    def play(
        self,
        agent: Agent,
        numbers: Sequence[int],
        stream: str = "evaluate",
        progress: Callable[[int], Any] | None = None,
    ) -> list[Played]:
        """Play the episodes `numbers` without keeping what was seen; in the order of `numbers`.

        `progress`, where given, is called with 1 as an episode ends.
        """
        played = {}
        for row, _ in self._play(agent, numbers, stream, keep=False):
            ret = float(np.array(row.rewards, np.float32).sum(dtype=np.float64))  # the very sum of Episode.ret
            played[row.number] = Played(row.number, ret, len(row.rewards) - 1, self._info(row, agent))
            if progress is not None:
                progress(1)
        return [played[number] for number in numbers]

    def close(self) -> None:
        for row in self._rows.values():
            row.env.close()
        self._rows.clear()

    def _play(self, agent: Agent, numbers: Sequence[int], stream: str, keep: bool) -> Iterator[tuple[_Row, _Recording]]:
        """Step all rows together; yield a row when its episode has ended, before its environment is used again."""
        self._turn += 1
        turn = self._turn
        waiting: list[deque[int]] = [deque() for _ in range(self.envs)]
        for number in numbers:
            waiting[number % self.envs].append(number)
        recording = _Recording(self.columns, self.codec, self.envs, keep)
        nobody = rng(self.seed, "idle")  # idle rows must draw from something, and nobody sees what
        rngs = [nobody] * self.envs
        active = [self._row(index) for index in range(self.envs) if waiting[index]]
        for row in active:
            rngs[row.index] = self._begin(row, waiting[row.index].popleft(), stream, recording)
        recording.idle = [index for index in range(self.envs) if rngs[index] is nobody]
        is_first = np.ones(self.envs, bool)
        state = agent.initial(self.envs)
        shape = (self.envs, *self.codec.shape)
        while active:
            action, state = agent.act(recording.now, state, is_first, rngs)
            if getattr(action, "shape", None) != shape:
                raise ValueError(f"agent {agent.name!r} acted {np.shape(action)}, expected {shape}: an action a row")
            recording.advance(action, active)
            ended = [row for row in active if self._step(row, action[row.index], recording)]
            if not recording.finite():
                raise self._not_finite(active, recording)
            is_first = np.zeros(self.envs, bool)
            for row in ended:
                yield row, recording
                if turn != self._turn:
                    raise RuntimeError("another collect or play began before this one ended; close() this one first")
                is_first[row.index] = True
                if waiting[row.index]:
                    rngs[row.index] = self._begin(row, waiting[row.index].popleft(), stream, recording)
                else:
                    rngs[row.index] = nobody
                    active.remove(row)
                    recording.rest(row.index)

    def _step(self, row: _Row, action: np.ndarray, recording: _Recording) -> bool:
        """One step of one environment; whether its episode has ended."""
        steps = len(row.rewards)
        try:
            obs, reward, terminated, truncated, _ = row.step(action)
            recording.put(row.index, obs)
            reward = float(reward)
        except Exception as error:
            raise self._broken(row, steps, f"{type(error).__name__}: {error}") from error
        if not math.isfinite(reward):
            raise self._broken(row, steps, f"reward {reward}, expected a finite number")
        row.rewards.append(reward)
        row.terminated = bool(terminated)
        if terminated or truncated:
            return True
        if steps >= self.max_steps:
            raise self._broken(row, steps, "still no end of the episode; set env.time_limit")
        return False

    def _begin(self, row: _Row, number: int, stream: str, recording: _Recording) -> np.random.Generator:
        """Start episode `number` in a row; returns the generator its actions are drawn from."""
        row.number, row.seed = number, derive(self.seed, stream, "env", number)
        row.begin, row.rewards = recording.time, [0.0]
        try:
            obs, _ = row.env.reset(seed=row.seed)
            recording.put(row.index, obs)
        except Exception as error:
            raise self._broken(row, 0, f"{type(error).__name__}: {error}") from error
        if not recording.finite():
            raise self._not_finite([row], recording)
        return rng(self.seed, stream, "act", number)

    def _row(self, index: int) -> _Row:
        if index not in self._rows:
            self._rows[index] = _Row(index, make_env(self.config))
        return self._rows[index]

    def _info(self, row: _Row, agent: Agent) -> dict[str, Any]:
        # Nothing that differs between two plays of one episode (times, hosts) may enter: duplicates are equal bits.
        made = {"policy": agent.name, "version": agent.version}
        return {"number": row.number, "seed": row.seed, "env": self.id, **made}

    def _broken(self, row: _Row, step: int, what: str) -> ValueError:
        return ValueError(f"environment {self.id!r}, episode {row.number}, step {step}: {what}")

    def _not_finite(self, rows: Sequence[_Row], recording: _Recording) -> ValueError:
        for row in rows:
            for name, column in recording.now.items():
                if column.dtype.kind == "f" and not np.isfinite(column[row.index]).all():
                    got = f"observation {name!r} is {column[row.index]}, expected finite numbers"
                    return self._broken(row, len(row.rewards) - 1, got)
        raise AssertionError("a row that is not being played holds a NaN")


class _Row:
    """One environment and the episode that is being played in it."""

    def __init__(self, index: int, env: gym.Env) -> None:
        self.index, self.env, self.step = index, env, env.step
        self.number, self.seed = -1, 0
        self.begin = 0  # the recording's time of its first observation
        self.rewards: list[float] = []  # with row 0's zero
        self.terminated = False


class _Recording:
    """What all rows see and do, time by time: the batch that the agent acts on is the place it is recorded in.

    One array (time, rows, *) a column. Without `keep` there is only the present.
    """

    def __init__(self, columns: Mapping[str, gym.spaces.Box], codec: ActionCodec, rows: int, keep: bool) -> None:
        self.time = 0  # of `now`, counted from the beginning of the recording
        self.idle: list[int] = []
        self._from = 0  # the time of the arrays' first entry
        self._keep = keep
        room = START_STEPS if keep else 1
        self._obs = {name: np.zeros((room, rows, *box.shape), box.dtype) for name, box in columns.items()}
        self._action = np.zeros((room, rows, *codec.shape), codec.dtype)
        self._look()

    def _look(self) -> None:
        at = self.time - self._from
        self.now = {name: column[at] for name, column in self._obs.items()}  # {column: (B, *)}
        self._slots = [(name, now, now.shape[1:], now.dtype) for name, now in self.now.items()]
        self._floats = [now for now in self.now.values() if now.dtype.kind == "f"]

    def put(self, index: int, obs: Mapping[str, np.ndarray]) -> None:
        """Row `index` sees `obs` now."""
        for name, now, shape, dtype in self._slots:
            value = obs[name]
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"observation {name!r} is {value.dtype} {value.shape}, expected {dtype} {shape}")
            now[index] = value

    def finite(self) -> bool:
        return all(np.isfinite(now).all() for now in self._floats)

    def rest(self, index: int) -> None:
        """Row `index` has nothing more to play and holds zeros."""
        self.idle.append(index)
        for now in self.now.values():
            now[index] = 0

    def advance(self, action: np.ndarray, active: Sequence[_Row]) -> None:
        """The next time begins: what is put from now on was arrived at by `action`."""
        if not self._keep:
            return
        self.time += 1
        if self.time - self._from == len(self._action):
            self._make_room(min(row.begin for row in active))
        self._look()
        self._action[self.time - self._from] = action
        for now in self.now.values():
            now[self.idle] = 0

    def _make_room(self, oldest: int) -> None:
        """Forget the times before `oldest`; where that frees less than half, double the arrays."""
        forget, size = oldest - self._from, len(self._action)
        room = size if forget >= size // 2 else 2 * size

        def move(column: np.ndarray) -> np.ndarray:
            moved = np.zeros((room, *column.shape[1:]), column.dtype)
            moved[: size - forget] = column[forget:]
            return moved

        self._obs = {name: move(column) for name, column in self._obs.items()}
        self._action = move(self._action)
        self._from = oldest

    def cut(self, index: int, begin: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Copies of what row `index` has seen and done since `begin`: {column: (T, *)}, (T, *shape)."""
        span = slice(begin - self._from, self.time - self._from + 1)
        return {name: column[span, index].copy() for name, column in self._obs.items()}, self._action[
            span, index
        ].copy()
