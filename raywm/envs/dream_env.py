"""A finished run's dream as a gymnasium environment: what learns in environments can learn in a world model.

>>> envs = gymnasium.make_vec("raywm/Dream-v0", num_envs=64, run="runs/cartpole-seed0")

Importing this module imports torch; ``raywm.envs`` only registers its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from raywm.data.episode import Episode
from raywm.evaluate import encoded_actions
from raywm.models.base import State, WorldModel, take
from raywm.spaces import ActionCodec

STARTS = ("first", "any")
OBSERVE = ("features", "decoded")
FIRSTS = 4096  # first observations that dreams begin at, at most
STATES, FOLDED = 4096, 64  # states amid episodes that dreams begin at, and episodes that they are of, at most


class DreamSource(NamedTuple):
    """What a dream is made of. ``of`` takes it from a run, and nothing that the run does later changes it."""

    model: WorldModel
    codec: ActionCodec
    columns: Mapping[str, gym.spaces.Box]
    episodes: Sequence[Episode]  # real ones, which dreams begin at
    horizon: int
    temperature: float = 1.0

    @classmethod
    def of(cls, run: str | Path) -> DreamSource:
        """The model, episodes, time limit and temperature of the run in a directory, as they are now.

        Raises ValueError where there is no run, no fitted model or no episode yet."""
        from raywm.loops.saved import open_run  # on demand: loops are above environments

        saved = open_run(run)
        model, episodes = saved.world_model(), saved.episodes()
        temperature = saved.config.dream.temperature
        return cls(model, saved.codec, saved.columns, episodes, saved.horizon, temperature)


class DreamVectorEnv(gym.vector.VectorEnv):
    """N dreams of one world model, stepped as one batch.

    An action is what the real environment takes. The reward and the chance of going on are the model's; an episode is
    terminated by a draw of that chance (World Models' way, as ``dream_returns``), truncated after `horizon` steps.

    Args:
        run: a run's directory, or a ``DreamSource``.
        num_envs: dreams.
        starts: "first": a dream begins at the posterior of a real first observation; "any": at that of any row of a
            real episode that is not terminal, folded from the episode's first row on.
        observe: "features": what the model's controllers see, Box (F,), for agents that act through the model;
            "decoded": the observation that the model makes of its state, of the real environment's space, for agents
            that act without it. Dict columns stay a Dict.
        horizon, temperature: of the run where None.

    Seeds: ``reset(seed=s)`` fixes all that follows; without a seed a reset goes on with the streams it has. Dreams that
    end begin anew with the next step (NEXT_STEP), whose action and reward (0) they ignore. Draws of a step are made for
    all N whether they begin anew or not, starts come from a stream of their own: so the first episodes are those of
    ``dream_returns`` with the same generator.

    Raises ValueError for arguments that make no dream, for actions of another shape, for choices that the space does
    not have and for numbers that are not finite; numbers beyond a Box's bounds are clipped.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        run: str | Path | DreamSource,
        num_envs: int = 1,
        *,
        starts: str = "first",
        observe: str = "features",
        horizon: int | None = None,
        temperature: float | None = None,
    ):
        for name, got, known in (("starts", starts, STARTS), ("observe", observe, OBSERVE)):
            if got not in known:
                raise ValueError(f"{name} is {got!r}, expected one of {', '.join(known)}")
        source = run if isinstance(run, DreamSource) else DreamSource.of(run)
        self.horizon = source.horizon if horizon is None else horizon
        self.temperature = source.temperature if temperature is None else temperature
        if num_envs < 1 or self.horizon < 1 or not self.temperature > 0:
            raise ValueError(
                f"got num_envs={num_envs}, horizon={self.horizon}, temperature={self.temperature}; expected at least 1 "
                "dream of at least 1 step, and a temperature above 0"
            )
        if not source.episodes:
            raise ValueError(f"{run} has no episodes, so its dreams have nothing to start from; continue the run")
        self.num_envs, self.codec, self.observe = num_envs, source.codec, observe
        self.model = source.model.eval()
        self.dreamer = self.model.dreamer()
        self.columns: dict[str, Any] = dict(source.columns)
        self._first = starts == "first"
        rng = np.random.default_rng(0)  # the choice among very many starts is the same in every process
        make = first_observations if self._first else posterior_states
        with torch.inference_mode():
            self._pool = make(self.model, self.codec, source.episodes, rng)
        self.single_action_space = self.codec.space
        self.single_observation_space = self._space()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._steps_rng, self._starts_rng = torch.Generator(), torch.Generator()
        self._state: State | None = None
        self._ended = np.zeros(num_envs, bool)
        self._age = np.zeros(num_envs, np.int64)  # steps of the present episodes

    def _space(self) -> gym.Space:
        if self.observe == "features":
            return gym.spaces.Box(-np.inf, np.inf, (self.model.feat_dim,), np.float32)
        if not self.model.decode(self.model.initial(1)):
            raise ValueError(f"observe is 'decoded', but {type(self.model).__name__} has no decoder; take 'features'")
        return next(iter(self.columns.values())) if len(self.columns) == 1 else gym.spaces.Dict(self.columns)

    @torch.inference_mode()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin N new dreams: observations (N, *), {}."""
        super().reset(seed=seed)
        if seed is not None or self._state is None:
            for generator in (self._steps_rng, self._starts_rng):
                generator.manual_seed(int(self.np_random.integers(2**63)))
        self._state = self._start(self.num_envs)
        self._ended[:], self._age[:] = False, 0
        return self._observation(), {}

    @torch.inference_mode()
    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Actions (N, *shape) -> observations (N, *), rewards, terminated and truncated (N,), {}."""
        if self._state is None:
            raise gym.error.ResetNeeded("step before reset; call reset() first")
        encoded = self.codec.encode(np.asarray(actions))
        if encoded.shape != (self.num_envs, self.codec.dim) or not np.isfinite(encoded).all():
            raise ValueError(f"got actions {np.shape(actions)}, expected {self.num_envs} members of {self.codec.space}")
        noise = self.dreamer.noise(self.num_envs, self._steps_rng)
        ends = torch.rand(self.num_envs, generator=self._steps_rng)
        state, reward, cont = self.dreamer.imagine(self._state, torch.from_numpy(encoded), noise, self.temperature)
        rewards, terminated = reward.numpy().astype(np.float64), (ends >= cont).numpy()
        self._age += 1
        if again := int(self._ended.sum()):
            rows = torch.from_numpy(self._ended.nonzero()[0])
            begun = self._start(again)
            # only the leaves that a start has: some models' dreams carry more, which follows from them
            state = {name: state[name].index_copy(0, rows, leaf) for name, leaf in begun.items()}
            rewards[self._ended], terminated[self._ended], self._age[self._ended] = 0, False, 0
        truncated = (self._age >= self.horizon) & ~terminated
        self._state, self._ended = state, terminated | truncated
        return self._observation(), rewards, terminated, truncated, {}

    def _start(self, count: int) -> State:
        size = len(next(iter(self._pool.values())))
        chosen = take(self._pool, torch.randint(size, (count,), generator=self._starts_rng))
        if not self._first:
            return chosen
        nothing, first = torch.zeros(count, self.codec.dim), torch.ones(count, dtype=torch.bool)
        noise = self.model.noise(count, self._starts_rng)
        return self.model.posterior(self.model.initial(count), nothing, chosen, first, noise)

    def _observation(self) -> Any:
        assert self._state is not None
        if self.observe == "features":
            return self.dreamer.features(self._state).float().numpy().copy()  # it may be a view of the state
        seen = self.model.decode({name: self._state[name] for name in self.model.initial(1)})
        boxed = {
            name: np.clip(seen[name].numpy(), box.low, box.high).astype(box.dtype) for name, box in self.columns.items()
        }
        return next(iter(boxed.values())) if len(boxed) == 1 else boxed


class DreamEnv(gym.Env):
    """One dream: a ``DreamVectorEnv`` of one, with the same arguments, that must be reset when it has ended."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, run: str | Path | DreamSource, **settings: Any):
        self.dreams = DreamVectorEnv(run, 1, **settings)
        self.observation_space: gym.Space = self.dreams.single_observation_space
        self.action_space = self.dreams.single_action_space
        self._ended = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self.dreams.reset(seed=seed)
        self._ended = False
        return _only(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._ended:
            raise gym.error.ResetNeeded("the dream has not begun or has ended; call reset() first")
        obs, reward, terminated, truncated, info = self.dreams.step(np.asarray(action)[None])
        self._ended = bool(terminated[0] or truncated[0])
        return _only(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


def _only(obs: Any) -> Any:
    return {name: column[0] for name, column in obs.items()} if isinstance(obs, dict) else obs[0]


def first_observations(
    model: WorldModel, codec: ActionCodec, episodes: Sequence[Episode], rng: np.random.Generator
) -> dict[str, Tensor]:
    """The episodes' first observations as the model encodes them, leaves (N, *); N is at most ``FIRSTS``."""
    chosen = np.sort(rng.permutation(len(episodes))[:FIRSTS])
    parts = []
    for at in range(0, len(chosen), 256):  # images by the thousand would fill the memory
        some = [episodes[i].obs for i in chosen[at : at + 256]]
        parts.append(model.encode({k: torch.from_numpy(np.stack([obs[k][0] for obs in some])) for k in some[0]}))
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def posterior_states(
    model: WorldModel, codec: ActionCodec, episodes: Sequence[Episode], rng: np.random.Generator
) -> State:
    """States along real episodes, leaves (N, *): samples of the posterior, folded from the first rows on, at N rows
    drawn uniformly over those that are not terminal, of at most ``FOLDED`` episodes; N is at most ``STATES``."""
    kept = [episodes[i] for i in np.sort(rng.permutation(len(episodes))[:FOLDED])]
    rows = [(b, t) for b, episode in enumerate(kept) for t in (~episode.is_terminal).nonzero()[0]]
    if len(rows) > STATES:
        rows = [rows[i] for i in np.sort(rng.permutation(len(rows))[:STATES])]
    wanted: dict[int, list[int]] = {}
    for b, t in rows:
        wanted.setdefault(int(t), []).append(b)
    batch, actions = len(kept), [torch.from_numpy(encoded_actions(episode, codec)) for episode in kept]
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    state, found = model.initial(batch), []
    for t in range(max(wanted) + 1):
        at = [min(t, len(episode) - 1) for episode in kept]  # an episode that has ended repeats its last row
        obs = {k: torch.from_numpy(np.stack([e.obs[k][i] for e, i in zip(kept, at)])) for k in kept[0].obs}
        action = torch.stack([a[i] for a, i in zip(actions, at)])
        first = torch.full((batch,), t == 0)
        state = model.posterior(state, action, obs, first, model.noise(batch, generator))
        if t in wanted:
            found.append(take(state, torch.tensor(wanted[t])))
    return {k: torch.cat([part[k] for part in found]) for k in found[0]}
