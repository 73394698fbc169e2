"""Agents: what acts in an environment. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raywm.seeding import rng
from raywm.spaces import ActionCodec

BLOCK = 64  # random actions drawn at once: numpy's cost is per call


class Agent:
    """Acts for a batch of B rows, each a different episode.

    Whatever an agent remembers is in `state`, and all its randomness comes from `rngs`, one generator a row: what a
    row does depends on that row alone, and may not depend on what its neighbours are doing.
    """

    name: str = "agent"
    version: int = 0

    def initial(self, B: int) -> Any:
        """The state before any observation; rows are started again by `is_first`."""
        return None

    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, Any]:
        """obs {column: (B, *)}, is_first (B,) bool -> environment actions (B, *shape), the next state."""
        raise NotImplementedError


class RandomAgent(Agent):
    """A new uniform action every step."""

    name = "random"

    def __init__(self, codec: ActionCodec) -> None:
        self.codec = codec

    def initial(self, B: int) -> dict[str, Any]:
        drawn = np.zeros((BLOCK, B, *self.codec.shape), self.codec.dtype)
        return {"drawn": drawn, "left": np.zeros(B, np.int64), "at": 0, "until": 0}

    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, Any]:
        if state["until"] == 0 or np.count_nonzero(is_first):
            state = self._refill(state, is_first, rngs)
        at = state["at"]
        return state["drawn"][at], state | {"at": at + 1, "until": state["until"] - 1}

    def _refill(self, state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """The state with what was drawn and not used in front: `left` (B,) of it, the least of them `until`."""
        at, drawn = state["at"], np.empty_like(state["drawn"])  # (BLOCK, B, *shape)
        drawn[: BLOCK - at] = state["drawn"][at:]
        left = np.where(is_first, 0, state["left"] - at)
        for row in (left == 0).nonzero()[0].tolist():
            drawn[:, row] = _draw(self.codec, rngs[row], BLOCK)
            left[row] = BLOCK
        return {"drawn": drawn, "left": left, "at": 0, "until": int(left.min())}


class StickyAgent(Agent):
    """Uniform actions, each held for 1 to `hold` steps (uniform): a random walk that gets somewhere."""

    name = "sticky"

    def __init__(self, codec: ActionCodec, hold: int = 10) -> None:
        if hold < 1:
            raise ValueError(f"hold is {hold}, expected at least 1 step")
        self.codec, self.hold = codec, hold

    def initial(self, B: int) -> dict[str, np.ndarray]:
        held = np.zeros((B, *self.codec.shape), self.codec.dtype)
        return {"held": held, "left": np.zeros(B, np.int64), "longest": np.full(B, self.hold)}

    def longest(self, rng: np.random.Generator) -> int:
        """The longest hold of an episode that begins."""
        return self.hold

    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, Any]:
        held, left, longest = state["held"], np.where(is_first, 0, state["left"]), state["longest"]
        if is_first.any():
            longest = longest.copy()  # a state is a value: what the caller kept must not change under him
            for row in is_first.nonzero()[0].tolist():
                longest[row] = self.longest(rngs[row])
        over = (left == 0).nonzero()[0]
        if over.size:
            held = held.copy()
            for row in over:
                left[row] = rngs[row].integers(1, longest[row], endpoint=True)
                held[row] = self.codec.sample(rngs[row])
        return held, {"held": held, "left": left - 1, "longest": longest}


class MixedAgent(StickyAgent):
    """Uniform actions held for 1 to h steps, where each episode draws its own h between 1 and `hold`, log-uniformly.

    Which time scale gets somewhere is not known beforehand: a pole falls within a second, a car on a hill needs one
    direction for many. This tries them all.
    """

    name = "mixed"

    def longest(self, rng: np.random.Generator) -> int:
        return round(self.hold ** rng.random())


class Exploring(Agent):
    """Another agent, interrupted: each step begins, with probability `chance`, a random action held 1 to `hold` steps.

    The inner agent sees every observation all the while, so a recurrent one keeps its memory.
    """

    def __init__(self, agent: Agent, codec: ActionCodec, chance: float, hold: int = 4) -> None:
        if not 0 <= chance <= 1 or hold < 1:
            raise ValueError(f"got chance={chance}, hold={hold}; expected a probability and at least 1 step")
        self.agent, self.codec, self.chance, self.hold = agent, codec, chance, hold
        self.name, self.version = f"{agent.name}+explore", agent.version

    def initial(self, B: int) -> dict[str, Any]:
        held = np.zeros((B, *self.codec.shape), self.codec.dtype)
        return {"inner": self.agent.initial(B), "held": held, "left": np.zeros(B, np.int64)}

    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, Any]:
        action, inner = self.agent.act(obs, state["inner"], is_first, rngs)
        held, left = state["held"], np.where(is_first, 0, state["left"])
        begin = [row for row in (left == 0).nonzero()[0] if rngs[row].random() < self.chance]
        if begin:
            held = held.copy()
            for row in begin:
                left[row] = rngs[row].integers(1, self.hold, endpoint=True)
                held[row] = self.codec.sample(rngs[row])
        holding = left > 0
        if holding.any():
            action = np.array(action, self.codec.dtype)
            action[holding] = held[holding]
        return action, {"inner": inner, "held": held, "left": np.maximum(left - 1, 0)}


def _draw(codec: ActionCodec, rng: np.random.Generator, n: int) -> np.ndarray:
    """n uniform actions (n, *shape) in one go: the largest of k uniform numbers is each of them equally often."""
    if codec.kind == "box" and codec.dtype.kind != "f":
        return np.stack([codec.sample(rng) for _ in range(n)])
    draws = rng.random((n, codec.dim))
    if codec.kind == "discrete":
        # What decode does, at a fifth of its cost.
        return (draws.argmax(-1) + codec.starts).astype(codec.dtype, copy=False)
    return codec.decode(2 * draws - 1 if codec.kind == "box" else draws)


class LiveAgent:
    """An agent for people's own loops: it remembers its state, and takes one observation or N at once.

    >>> obs, _ = env.reset()
    >>> live.reset()
    >>> action = live.act(obs)  # one action, as env.step takes it

    For N environments: ``live.reset(N)``, then ``live.act(obs, is_first)`` with columns (N, *) and, where some of them
    began anew, a bool (N,). An observation is a dict of columns, or a plain array where there is only one column.
    """

    def __init__(self, agent: Agent, codec: ActionCodec, columns: Mapping[str, gym.spaces.Box], seed: int = 0) -> None:
        self.agent, self.codec, self.columns, self.seed = agent, codec, dict(columns), seed
        self._resets = 0
        self._n: int | None = None
        self._state: Any = None
        self._first: np.ndarray | None = None
        self._rngs: list[np.random.Generator] = []

    def reset(self, n: int | None = None) -> None:
        """Forget everything; from now on act for one episode (n None) or for n at once."""
        if n is not None and n < 1:
            raise ValueError(f"reset(n={n}), expected n >= 1, or nothing for one observation at a time")
        rows = n or 1
        self._n, self._state, self._first = n, self.agent.initial(rows), np.ones(rows, bool)
        self._rngs = [rng(self.seed, "live", self._resets, row) for row in range(rows)]
        self._resets += 1

    def act(self, obs: Any, is_first: np.ndarray | None = None) -> np.ndarray:
        """The action (*shape) for one observation, or (N, *shape) for N. Raises ValueError for a wrong observation."""
        if self._first is None:
            self.reset()
        first = self._first
        assert first is not None
        if is_first is not None:
            given = np.asarray(is_first, bool).reshape(-1)
            if given.shape != first.shape:
                raise ValueError(f"is_first of shape {given.shape}, expected {first.shape} as given to reset()")
            first = first | given
        action, self._state = self.agent.act(self._batch(obs), self._state, first, self._rngs)
        self._first = np.zeros(len(first), bool)
        return action[0] if self._n is None else action

    def _batch(self, obs: Any) -> dict[str, np.ndarray]:
        if not isinstance(obs, Mapping):
            if len(self.columns) != 1:
                raise ValueError(f"got a plain {type(obs).__name__}, expected a dict of {sorted(self.columns)}")
            obs = dict.fromkeys(self.columns, obs)
        missing = sorted(set(self.columns) - set(obs))
        if missing:
            raise ValueError(f"observation lacks {missing}, got {sorted(obs)}; expected {sorted(self.columns)}")
        lead = () if self._n is None else (self._n,)
        batch = {}
        for name, box in self.columns.items():
            value, expected = np.asarray(obs[name]), (*lead, *box.shape)
            if value.shape != expected:
                how = (
                    "reset() is for one, reset(N) for N at once"
                    if value.shape[-len(box.shape) :] == box.shape
                    else "see make_env"
                )
                raise ValueError(f"observation {name!r} has shape {value.shape}, expected {expected}; {how}")
            if box.dtype == np.uint8 and value.dtype != np.uint8:
                raise ValueError(f"observation {name!r} is {value.dtype}, expected uint8 pixels 0..255, not scaled")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ValueError(
                    f"observation {name!r} is {value}, expected finite numbers; a NaN would stay in memory"
                )
            batch[name] = value.astype(box.dtype, copy=False).reshape(self._n or 1, *box.shape)
        return batch


def load_agent(run: str | Path) -> LiveAgent:
    """The trained agent in a run directory: V-M-C's controller that did best in reality with its world model, or
    Dreamer's greedy policy as it was last saved. "rllib:CHECKPOINT" is what an RLlib algorithm has learned (see
    ``raywm.rllib``).

    A run's agent needs neither Ray nor the environment. Raises ValueError for what holds no trained agent (yet).
    """
    if str(run).startswith("rllib:"):
        from raywm.rllib import SavedPolicy  # it needs Ray

        return SavedPolicy(str(run).removeprefix("rllib:")).live()
    from raywm.loops.saved import open_run  # on demand: it needs torch

    return open_run(run).live()
