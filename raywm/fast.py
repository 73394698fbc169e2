"""Collecting from environments that are vectorised natively: very fast, and not reproducible episode by episode.

Such an environment steps all its copies as one numpy batch and seeds them from one stream, so an episode depends on
those played beside it. Importing this module does not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pyarrow as pa
from gymnasium.vector import AutoresetMode

from raywm.agent import Agent, RandomAgent, _draw
from raywm.collect import BLOCK_S, Played
from raywm.config import EnvConfig
from raywm.data.episode import OBS, piece_header, to_block
from raywm.envs.make import DEFAULTS, _class, _settings, _spec
from raywm.recording import BLOCK_BYTES, Recording
from raywm.seeding import derive, rng
from raywm.spaces import ActionCodec, obs_columns

STRETCH = 512  # vector steps whose random actions are drawn at once
INSTEAD = "leave --fast out"  # what plays every environment


class FastCollector:
    """Plays `envs` copies in one native vector environment (``gymnasium.make_vec``), without an end.

    Episodes are numbered in the order of their ends and named ``fast{worker:04d}-{number:09d}``. Their info says
    "reproducible": False: the same seed, worker and `first` give the same episodes only all together. Columns, dtypes
    and rows are those of ``make_env`` and the seeded Collector.

    Raises ValueError where the environment has no native vector form, or not with these settings.
    """

    def __init__(self, env: EnvConfig | Mapping[str, Any], seed: int, envs: int = 64, worker: int = 0) -> None:
        if envs < 1:
            raise ValueError(f"envs is {envs}, expected at least 1")
        self.config, self.seed, self.envs, self.worker = _settings(env), seed, envs, worker
        self.id: str = self.config["id"]
        self.env, self.same_step = _make(self.config, envs)
        self.columns = obs_columns(self.env.single_observation_space)
        self.codec = ActionCodec(self.env.single_action_space)
        self.recording = Recording(self.columns, self.codec, envs)

    def blocks(
        self,
        agent: Agent,
        first: int = 0,
        common: dict[str, Any] | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
        block_s: float = BLOCK_S,
    ) -> Iterator[tuple[pa.Table, list[Played]]]:
        """Play for ever, from episode number `first` on; yield what has ended as blocks and as Played.

        The environments' seed depends on `first`: who goes on from there does not see the same episodes again.
        Raises ValueError, naming environment and step, when the environment raises or gives a NaN or a wrong shape.
        """
        play = _Play(self, agent, first)
        handed = time.monotonic()
        while True:
            full = play.full
            enough = play.rows * play.recording.row_bytes >= block_bytes
            if play.ended and (full or enough or time.monotonic() - handed >= block_s):
                handed = time.monotonic()
                yield play.hand_over(common)
            if full:
                play.make_room()
            play.step()

    def close(self) -> None:
        self.env.close()


class _Play:
    """The episodes of one call to ``blocks``, stepped together."""

    def __init__(self, collector: FastCollector, agent: Agent, first: int) -> None:
        self.env, self.columns, self.id = collector.env, collector.columns, collector.id
        self.name, self.next = f"fast{collector.worker:04d}", first
        self.same_step, self.recording = collector.same_step, collector.recording
        self.recording.restart()
        seed = derive(collector.seed, "fast", "env", collector.worker, first)
        made = {"policy": agent.name, "version": agent.version}
        self.made = {"seed": seed, "env": self.id, **made, "reproducible": False}
        self.acting = _actions(agent, collector.codec, collector.envs, rng(seed, "act"))
        self.begin = np.zeros(collector.envs, np.int64)  # times of the first rows of the episodes that are running
        self.is_first, self.resetting = np.ones(collector.envs, bool), np.zeros(collector.envs, bool)
        self.ended: list[_Ended] = []
        self.rows = 0  # of the ended episodes
        self.until = self.recording.room  # the time that would overwrite a row that is still needed
        try:
            obs, _ = self.env.reset(seed=seed)
            self._see(obs)
        except Exception as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error
        self._check()

    @property
    def full(self) -> bool:
        return self.recording.time + 1 >= self.until

    def make_room(self) -> None:
        """What has ended is gone; where the running episodes fill the recording, enlarge it."""
        recording, oldest = self.recording, int(self.begin.min())
        if recording.time + 1 - oldest >= recording.room:
            recording.grow(oldest)
        self.until = oldest + recording.room

    def step(self) -> None:
        """One step of all rows, which for those whose episode has ended may be a reset."""
        recording, begin = self.recording, self.begin
        action = self.acting(recording.now, self.is_first)
        recording.advance(action)
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self._see(obs)
            recording.reward[:] = reward
            done = np.logical_or(terminated, truncated)
        except Exception as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error
        self._check()
        begin[self.resetting] = recording.time
        self.is_first = self.resetting
        if done.any():
            which = done.nonzero()[0]
            last = self._final(info, which) if self.same_step else {}
            self.ended.append(_Ended(which, begin[which], recording.time, np.array(terminated)[which], last))
            self.rows += int((recording.time + 1 - begin[which]).sum())
        if self.same_step:
            self.is_first = done
            begin[done] = recording.time  # where the reset's observation is already
        else:
            self.resetting = done

    def hand_over(self, common: dict[str, Any] | None) -> tuple[pa.Table, list[Played]]:
        """What has ended, as a block."""
        ended, self.ended, self.rows = self.ended, [], 0
        row, begin, terminal = (
            np.concatenate([getattr(e, what) for e in ended]) for what in ("row", "begin", "terminal")
        )
        count = np.concatenate([e.time + 1 - e.begin for e in ended])
        every = np.ones(len(row), bool)
        columns = self.recording.gather(row, begin, count, every, every, terminal)
        stop = np.cumsum(count)
        if self.same_step:
            for name in self.columns:
                columns[OBS + name][stop - 1] = np.concatenate([e.last[name] for e in ended])
        reward, pieces, played = columns["reward"], [], []
        for number, end, rows in zip(range(self.next, self.next + len(row)), stop.tolist(), count.tolist()):
            ret = float(reward[end - rows : end].sum(dtype=np.float64))  # the very sum of Episode.ret
            info = {"number": number, **self.made, "return": ret}
            pieces.append(piece_header(f"{self.name}-{number:09d}", 0, rows, True, info))
            played.append(Played(number, ret, rows - 1, info))
        self.next += len(row)
        return to_block(columns, pieces, common), played

    def _see(self, obs: Any) -> None:
        for name, now in self.recording.now.items():
            part = obs[name] if isinstance(obs, Mapping) else obs
            now[...] = np.asarray(part, now.dtype).reshape(now.shape)

    def _final(self, info: dict[str, Any], which: np.ndarray) -> dict[str, np.ndarray]:
        """Last observations {column: (n, *)} of the rows `which`, where the environment has reset them already."""
        if "final_obs" not in info:
            raise self._broken("episodes ended without info['final_obs'], which autoreset in the same step has to give")
        final, last = info["final_obs"], {}
        for name, box in self.columns.items():
            part = final[name] if isinstance(final, Mapping) else final
            last[name] = np.stack([np.asarray(part[row], box.dtype).reshape(box.shape) for row in which])
            if last[name].dtype.kind == "f" and not np.isfinite(last[name]).all():
                raise self._broken(f"last observations {name!r} hold a NaN, expected finite numbers")
        return last

    def _check(self) -> None:
        if not self.recording.finite():
            for row in range(self.recording.rows):
                fault = self.recording.fault(row)
                if fault is not None:
                    raise self._broken(f"copy {row}: {fault}")

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"environment {self.id!r}, vector step {self.recording.time}: {what}; "
            f"natively vectorised copies cannot be restarted one by one: mend it, or {INSTEAD}"
        )


class _Ended(NamedTuple):
    """Episodes that ended with one vector step."""

    row: np.ndarray  # (n,)
    begin: np.ndarray  # (n,) times
    time: int  # of their last rows
    terminal: np.ndarray  # (n,) bool
    last: dict[str, np.ndarray]  # {column: (n, *)}, where it is not in the recording


def _actions(
    agent: Agent, codec: ActionCodec, envs: int, generator: np.random.Generator
) -> Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]:
    """(obs, is_first) -> actions (envs, *shape), all of them drawn from one generator."""
    if type(agent) is RandomAgent:  # what it draws depends on nothing, so it is drawn for many steps at once
        stretch = iter(np.empty((0, envs)))

        def draw(obs: dict[str, np.ndarray], is_first: np.ndarray) -> np.ndarray:
            nonlocal stretch
            action = next(stretch, None)
            if action is None:
                stretch = iter(_draw(codec, generator, STRETCH * envs).reshape(STRETCH, envs, *codec.shape))
                action = next(stretch)
            return action

        return draw

    state, rngs = agent.initial(envs), [generator] * envs

    def act(obs: dict[str, np.ndarray], is_first: np.ndarray) -> np.ndarray:
        nonlocal state
        try:
            action, state = agent.act(obs, state, is_first, rngs)
        except Exception as error:
            raise ValueError(f"agent {agent.name!r} failed in act: {type(error).__name__}: {error}") from error
        if np.shape(action) != (envs, *codec.shape):
            raise ValueError(f"agent {agent.name!r} acted {np.shape(action)}, expected {(envs, *codec.shape)}")
        return np.asarray(action, codec.dtype)

    return act


def _make(config: dict[str, Any], envs: int) -> tuple[gym.vector.VectorEnv, bool]:
    """The vector environment, and whether it resets in the step that ends an episode (or else in the next one)."""
    id, limit = config["id"], config["time_limit"]
    changed = [key for key in ("crop", "resize", "grayscale", "action_repeat") if config[key] != DEFAULTS[key]]
    if changed:
        raise ValueError(
            f"environment {id!r} with {changed[0]}={config[changed[0]]!r}: a native vector environment plays as it is; "
            f"remove {', '.join(changed)}, or {INSTEAD}"
        )
    spec = None if _class(id) is not None else _spec(id)
    if spec is None or spec.vector_entry_point is None:
        raise ValueError(
            f"environment {id!r} has no native vector form (a vector_entry_point in gymnasium's registry); {INSTEAD}"
        )
    limits = {} if limit is None else {"max_episode_steps": limit}
    try:
        env = gym.make_vec(spec, envs, vectorization_mode="vector_entry_point", **limits, **config["kwargs"])
    except Exception as error:
        raise ValueError(
            f"environment {id!r} cannot be made as a vector of {envs} with {limits | config['kwargs']}: "
            f"{type(error).__name__}: {error}; look at env.kwargs and env.time_limit, or {INSTEAD}"
        ) from error
    mode = env.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        raise ValueError(
            f"environment {id!r} says autoreset_mode={mode!r}, expected AutoresetMode.NEXT_STEP or SAME_STEP; {INSTEAD}"
        )
    return env, mode == AutoresetMode.SAME_STEP
