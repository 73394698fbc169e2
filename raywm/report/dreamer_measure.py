"""What a report shows of a Dreamer: episodes newly played by its agent, and its model's dreams of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raywm.collect import Collector
from raywm.data.episode import Episode
from raywm.evaluate import encoded_actions
from raywm.models.base import State, take
from raywm.report.load import DreamerRun

EPISODES = 16  # newly played
STEPS = 500  # of an episode, at most: all of CartPole's, and minutes rather than hours for the slowest
CONTEXT, AHEAD = 5, 50  # rows of an open loop that the model sees, and those that it imagines after them

Obs = dict[str, np.ndarray]


def steps(run: DreamerRun) -> int:
    """Over how many steps reality and dreams are compared."""
    return min(run.horizon, STEPS)


def play(run: DreamerRun) -> list[Episode]:
    """New episodes of the greedy agent, the same at every call: nothing was ever trained on them. They are cut after
    ``steps(run)``. Raises ValueError when there is no agent yet or the environment cannot be made."""
    if "played" not in run.__dict__:
        env = run.config.env
        if steps(run) < run.horizon:
            env = env.model_copy(update={"time_limit": steps(run) * env.action_repeat})
        collector = Collector(env, run.config.seed, EPISODES)
        try:
            episodes = list(collector.collect(run.trained, range(EPISODES), "report"))
        finally:
            collector.close()
        run.__dict__["played"] = sorted(episodes, key=lambda e: e.id)
    return run.__dict__["played"]


# ---------------------------------------------------------------------------------------------- the agent's own dreams


@dataclass
class Dreams:
    """N dreams of the agent, or N episodes in the same form; nothing is received after an end."""

    reward: np.ndarray  # (H, N)
    alive: np.ndarray  # (H, N) bool: whether the step was taken
    first: State  # of the first dream, leaves (h, *), its start included

    @property
    def returns(self) -> np.ndarray:
        return self.reward.sum(0)

    @property
    def lengths(self) -> np.ndarray:
        return self.alive.sum(0)


def own_dreams(run: DreamerRun, count: int, seed: int) -> Dreams:
    """The greedy agent acts in its dream, from the first observations of `play`'s episodes in turn, over ``steps(run)``
    steps; a dream ends by a draw of the model's chance that it goes on."""
    episodes = play(run)
    model, actor = run.trained.model, run.trained.actor
    rng = torch.Generator().manual_seed(seed)
    index = np.arange(count) % len(episodes)
    obs = {k: torch.from_numpy(np.stack([episodes[i].obs[k][0] for i in index])) for k in episodes[0].obs}
    rewards, living, kept = [], [], []
    with torch.inference_mode():
        first = torch.ones(count, dtype=torch.bool)
        still = first
        begin = torch.zeros(count, model.act_dim)
        state = model.posterior(model.initial(count), begin, obs, first, model.noise(count, rng))
        for _ in range(steps(run)):
            if still[0]:
                kept.append(take(state, torch.tensor([0])))
            action = actor.sample(model.features(state), None)
            state, reward, cont = model.imagine(state, action, model.noise(count, rng))
            rewards.append(reward * still)
            living.append(still)
            still = still & (torch.rand(count, generator=rng) < cont)
            if not bool(still.any()):
                break
        kept.append(take(state, torch.tensor([0])))
    states = {k: torch.cat([s[k] for s in kept]) for k in kept[0]}
    return Dreams(torch.stack(rewards).double().numpy(), torch.stack(living).numpy(), states)


def reality(run: DreamerRun) -> Dreams:
    """The episodes of `play` as ``own_dreams`` gives dreams."""
    episodes = play(run)
    most = max(e.steps for e in episodes)
    reward, alive = np.zeros((most, len(episodes))), np.zeros((most, len(episodes)), bool)
    for i, e in enumerate(episodes):
        reward[: e.steps, i], alive[: e.steps, i] = e.reward[1:], True
    return Dreams(reward, alive, {})


@torch.inference_mode()
def decoded(run: DreamerRun, states: State, chunk: int = 256) -> Obs:
    """States (N, *) -> observation columns (N, *)."""
    model, count = run.trained.model, len(next(iter(states.values())))
    parts = [model.decode({k: v[at : at + chunk] for k, v in states.items()}) for at in range(0, count, chunk)]
    return {k: np.concatenate([p[k].numpy() for p in parts]) for k in parts[0]}


# ------------------------------------------------------------------------------------------------ open loop


@dataclass
class OpenLoop:
    """W windows of T rows: the posterior sees the first CONTEXT of them, then S dreams follow the recorded actions."""

    truth: Obs  # leaves (T, W, *)
    model: Obs  # leaves (T, W, S, *): decoded
    exists: np.ndarray  # (T, W) bool: rows that the episode has; others repeat its last
    alive: np.ndarray  # (T, W, S): the model's chance of having come so far


Window = tuple[Episode, int]  # and its first row


def windows(episodes: Sequence[Episode], count: int, rows: int = CONTEXT + AHEAD) -> list[Window]:
    """About `count` windows spread over the episodes that go on after the context, whole where there is room."""
    long = sorted((e for e in episodes if len(e) > CONTEXT), key=lambda e: e.id)
    out: dict[tuple[str, int], Window] = {}  # short episodes come round to the same window
    for w in range(min(count, sum(max(1, len(e) - rows + 1) for e in long))):
        episode = long[w % len(long)]
        start = int((w * 0.618 % 1) * (max(0, len(episode) - rows) + 1))
        out[episode.id, start] = episode, start
    return list(out.values())


@torch.inference_mode()
def open_loop(run: DreamerRun, chosen: Sequence[Window], rows: int, samples: int) -> OpenLoop:
    """What the model makes of `chosen` windows of `rows` rows. Raises ValueError for no windows."""
    if not chosen:
        raise ValueError(f"no new episode is longer than the context of {CONTEXT} rows")
    model, count = run.trained.model, len(chosen) * samples
    rng = torch.Generator().manual_seed(run.seed("open loop"))
    index = [np.minimum(start + np.arange(rows), len(e) - 1) for e, start in chosen]
    truth = {k: np.stack([e.obs[k][i] for (e, _), i in zip(chosen, index)], 1) for k in chosen[0][0].obs}
    action = np.stack([encoded_actions(e, run.codec)[i] for (e, _), i in zip(chosen, index)], 1)  # (T, W, A)
    acted = torch.from_numpy(action).repeat_interleave(samples, 1)  # (T, W, A) -> (T, W*S, A)
    state, survived = model.initial(count), torch.ones(count)
    decoded: dict[str, list[np.ndarray]] = {k: [] for k in truth}
    alive: list[Tensor] = []
    for t in range(rows):
        noise = model.noise(count, rng)
        if t < CONTEXT:
            obs = {k: torch.from_numpy(v[t]).repeat_interleave(samples, 0) for k, v in truth.items()}
            state = model.posterior(state, acted[t], obs, torch.full((count,), t == 0), noise)
        else:
            state, _, cont = model.imagine(state, acted[t], noise)
            survived = survived * cont
        for k, v in model.decode(state).items():
            decoded[k].append(v.numpy().reshape(len(chosen), samples, *v.shape[1:]))
        alive.append(survived.view(len(chosen), samples))
    exists = np.stack([start + np.arange(rows) < len(e) for e, start in chosen], 1)
    return OpenLoop(truth, {k: np.stack(v) for k, v in decoded.items()}, exists, torch.stack(alive).numpy())


def errors(loop: OpenLoop, name: str, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By steps ahead (0, the last row of the context, to the last): the root mean square error of the mean of the
    dreams, and of a guess that nothing changes, in units of the data's spread (``spread_of``); nan where no window is
    so long. A vector's dimensions count alike, an image's pixels as they are."""
    scale = spread.ravel().astype(np.float64)
    if spread.ndim > 1:  # an image: pixels that hardly change must not outweigh those that do
        scale = np.full_like(scale, np.sqrt(np.mean(scale**2)))
    varies = scale > 1e-4 * max(float(scale.max()), 1e-9)
    rows = len(loop.exists)
    truth = loop.truth[name].astype(np.float32).reshape(rows, loop.exists.shape[1], -1)
    still = truth[CONTEXT - 1]
    out = np.full((2, rows - CONTEXT + 1), np.nan)
    for k in range(rows - CONTEXT + 1):
        t = CONTEXT - 1 + k
        there = loop.exists[t]
        if not there.any() or not varies.any():
            continue
        dreamt = loop.model[name][t].astype(np.float32).mean(1).reshape(len(there), -1)
        for i, guess in enumerate((dreamt, still)):
            wrong = ((guess - truth[t])[there][:, varies] / scale[varies]) ** 2
            out[i, k] = np.sqrt(wrong.mean())
    return out[0], out[1]


def spread_of(episodes: Sequence[Episode], name: str) -> np.ndarray:
    """The standard deviation of a column over all rows, in its shape."""
    total = sum(len(e) for e in episodes)
    sums = [np.sum([e.obs[name].astype(np.float64).sum(0) for e in episodes], axis=0)]
    mean = sums[0] / total
    square = np.sum([((e.obs[name].astype(np.float64) - mean) ** 2).sum(0) for e in episodes], axis=0)
    return np.sqrt(square / total)
