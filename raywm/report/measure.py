"""What a report shows of a model: reconstructions, predictions against what happened, dreams against reality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywm.controllers import PopulationPolicy
from raywm.data.episode import Episode
from raywm.evaluate import encoded_actions
from raywm.models.base import State, WorldModel, repeat, take
from raywm.report.load import Run

Obs = dict[str, np.ndarray]


@torch.inference_mode()
def encode(model: WorldModel, obs: Obs, chunk: int = 256) -> dict[str, Tensor]:
    """What vision makes of N rows, leaves (N, *)."""
    rows = len(next(iter(obs.values())))
    parts = [
        model.encode({k: torch.tensor(np.asarray(v[at : at + chunk])) for k, v in obs.items()})
        for at in range(0, rows, chunk)
    ]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


@torch.inference_mode()
def decode(model: WorldModel, states: State, chunk: int = 256) -> Obs:
    """States, leaves (N, *) -> observation columns (N, *)."""
    count = len(next(iter(states.values())))
    parts = [model.decode({k: v[at : at + chunk] for k, v in states.items()}) for at in range(0, count, chunk)]
    return {k: np.concatenate([p[k].numpy() for p in parts]) for k in parts[0]}


def decode_z(model: WorldModel, z: Tensor) -> Obs:
    """V's latents (N, Z) -> observation columns (N, *)."""
    return decode(model, model.initial(len(z)) | {"z": z})


def kept(run: Run, obs: Obs, name: str) -> np.ndarray | None:
    """What V keeps of a column (N, *) of observations; None for a model without V."""
    return decode_z(run.model, encode(run.model, obs)["z_mean"])[name] if run.vm else None


def shows(run: Run) -> bool:
    """Whether the model decodes what a page would show of the observations."""
    wanted = run.images or run.vectors[:1]
    return set(wanted) <= set(run.model.decode(run.model.initial(1)))


def spread_rows(episodes: Sequence[Episode], count: int, rng: np.random.Generator) -> list[tuple[Episode, np.ndarray]]:
    """About `count` rows, drawn uniformly over all episodes' rows: (episode, sorted rows) pairs."""
    lengths = np.array([len(e) for e in episodes])
    total = int(lengths.sum())
    flat = np.sort(rng.choice(total, min(count, total), replace=False))
    ends = np.cumsum(lengths)
    of = np.searchsorted(ends, flat, side="right")
    return [(episodes[i], flat[of == i] - (ends[i] - lengths[i])) for i in np.unique(of)]


def gather(picked: list[tuple[Episode, np.ndarray]]) -> Obs:
    """The observations of such rows, (N, *) a column."""
    return {k: np.concatenate([e.obs[k][rows] for e, rows in picked]) for k in picked[0][0].obs}


def posteriors(
    run: Run, episodes: Sequence[Episode], rows: int, rng: torch.Generator | None
) -> tuple[State, np.ndarray]:
    """States at rows 0..rows-1 of B episodes, leaves (T, B, *), and which rows exist (T, B); z is a sample of its
    posterior, as M was trained, or the mean without `rng`. Shorter episodes repeat their last row."""
    model, batch = run.model, len(episodes)
    index = [np.minimum(np.arange(rows), len(e) - 1) for e in episodes]
    obs = [encode(model, {k: v[:rows] for k, v in e.obs.items()}) for e in episodes]
    seen = {k: torch.stack([o[k][torch.from_numpy(i)] for o, i in zip(obs, index)], 1) for k in obs[0]}  # (T, B, *)
    action = torch.stack([torch.from_numpy(encoded_actions(e, run.codec)[i]) for e, i in zip(episodes, index)], 1)
    state, out = model.initial(batch), []
    with torch.inference_mode():
        for t in range(rows):
            noise = model.zero_noise(batch) if rng is None else model.noise(batch, rng)
            first = torch.full((batch,), t == 0)
            state = model.posterior(state, action[t], {k: v[t] for k, v in seen.items()}, first, noise)
            out.append(state)
    exists = np.arange(rows)[:, None] < np.array([len(e) for e in episodes])[None]
    return {k: torch.stack([s[k] for s in out]) for k in out[0]}, exists


@dataclass
class Predictions:
    """One-step predictions of N steps by samples: `samples` (N, S, Z) of what would come, `truth` (N, Z) what came."""

    samples: np.ndarray
    truth: np.ndarray

    @property
    def pit(self) -> np.ndarray:
        """(N, Z): the share of samples below the truth. Uniform on [0, 1] if predictions are calibrated."""
        return (self.samples < self.truth[:, None]).mean(1)


@torch.inference_mode()
def predictions(run: Run, episodes: Sequence[Episode], rows: int, samples: int, most: int, *path: Any) -> Predictions:
    """M's one-step predictions along real episodes, at temperature 1; at most `most` steps, in order of their rows."""
    model, rng = run.model, torch.Generator().manual_seed(run.seed("predictions", *path))
    states, exists = posteriors(run, episodes, rows, rng)
    steps, batch = np.nonzero(exists[1:])  # step t leads from row t to row t + 1
    if len(steps) > most:
        keep = np.sort(run.rng("steps", *path).choice(len(steps), most, replace=False))
        steps, batch = steps[keep], batch[keep]
    actions = [encoded_actions(e, run.codec) for e in episodes]
    action = torch.from_numpy(np.stack([actions[b][t + 1] for t, b in zip(steps, batch)]))
    begin = {k: v[steps, batch] for k, v in states.items()}
    drawn = []
    for at in range(0, len(steps), 256):
        part = {k: v[at : at + 256] for k, v in begin.items()}
        n = len(part["z"])
        many = model.imagine(
            repeat(part, samples), action[at : at + 256].repeat(samples, 1), model.noise(n * samples, rng)
        )
        drawn.append(many.state["z"].unflatten(0, (samples, n)).transpose(0, 1).numpy())  # (S*n, Z) -> (n, S, Z)
    return Predictions(np.concatenate(drawn), states["z"][steps + 1, batch].numpy())


@dataclass
class Replay:
    """S dreams from an episode's start under its own actions; T rows, the start included."""

    states: State  # leaves (T, S, *)
    reward: np.ndarray  # (T, S)
    alive: np.ndarray  # (T, S): the probability of having come so far

    def decoded(self, model: WorldModel) -> Obs:
        """Observation columns (T, S, *)."""
        rows, samples = self.alive.shape
        flat = decode(model, {k: v.flatten(0, 1) for k, v in self.states.items()})  # (T,S,*) -> (T*S,*)
        return {k: v.reshape(rows, samples, *v.shape[1:]) for k, v in flat.items()}


@torch.inference_mode()
def replay(run: Run, episode: Episode, rows: int, samples: int) -> Replay:
    """The dream from the episode's first row under the episode's actions, at the run's temperature."""
    model, rng = run.model, torch.Generator().manual_seed(run.seed("replay", episode.id))
    start, _ = posteriors(run, [episode] * samples, 1, rng)
    state = {k: v[0] for k, v in start.items()}
    action = torch.from_numpy(encoded_actions(episode, run.codec))
    kept, rewards, alive = [state], [torch.zeros(samples)], [torch.ones(samples)]
    for t in range(1, min(rows, len(episode))):
        noise = model.noise(samples, rng)
        state, reward, cont = model.imagine(state, action[t].expand(samples, -1), noise, run.config.dream.temperature)
        kept.append(state)
        rewards.append(reward)
        alive.append(alive[-1] * cont)
    states = {k: torch.stack([s[k] for s in kept]) for k in state}
    return Replay(states, torch.stack(rewards).numpy(), torch.stack(alive).numpy())


@dataclass
class OwnDreams:
    """The controller's dreams from real starts: returns and lengths (E,); the states of the first, leaves (T, *)."""

    returns: np.ndarray
    lengths: np.ndarray
    states: State
    reward: np.ndarray  # (T,), of the first dream
    alive: np.ndarray  # (T,)


@torch.inference_mode()
def own_dreams(run: Run, count: int, seed: int, most: int | None = None) -> OwnDreams:
    """Dream `count` episodes with the run's controller, each from a sample of a real episode's start."""
    if not run.snapshot.episodes:
        raise ValueError(f"{run.path} has no episodes, so its dreams have nothing to start from; continue the run")
    model, rng = run.model, torch.Generator().manual_seed(seed)
    pick = np.random.default_rng(seed).integers(len(run.snapshot), size=count)
    unique, back = np.unique(pick, return_inverse=True)
    firsts = gather([(run.snapshot.episodes[i], np.arange(1)) for i in unique])
    obs = take(encode(model, firsts), torch.from_numpy(back))
    state = model.posterior(
        model.initial(count),
        torch.zeros(count, run.codec.dim),
        obs,
        torch.ones(count, dtype=torch.bool),
        model.noise(count, rng),
    )
    theta = torch.tensor(np.asarray(run.theta)[None], dtype=torch.float32)
    policy = PopulationPolicy(run.controller, run.codec, theta)
    total, length, living = torch.zeros(count), torch.zeros(count), torch.ones(count)
    sampled = run.config.dream.sampled_ends
    kept, rewards, alive = [take(state, torch.tensor([0]))], [0.0], [1.0]
    for t in range(min(run.horizon, most or run.horizon)):
        action = policy(model.features(state), t)
        state, reward, cont = model.imagine(state, action, model.noise(count, rng), run.config.dream.temperature)
        total += living * reward
        length += living
        if living[0] > 0:
            kept.append(take(state, torch.tensor([0])))
            rewards.append(float(reward[0]))
        living = living * ((torch.rand(count, generator=rng) < cont).float() if sampled else cont)
        if len(alive) < len(kept):
            alive.append(float(living[0]))
        if not bool((living > 1e-3).any()):
            break
    states = {k: torch.cat([s[k] for s in kept]) for k in state}
    return OwnDreams(total.double().numpy(), length.double().numpy(), states, np.array(rewards), np.array(alive))


def principal(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, Z) -> the first two principal components (N, 2) and their shares of the variance (2,)."""
    centred = z - z.mean(0)
    _, s, v = np.linalg.svd(centred, full_matrices=False)
    share = s**2 / max(float((s**2).sum()), 1e-12)
    out, shares = np.zeros((len(z), 2)), np.zeros(2)
    k = min(2, len(s))
    out[:, :k], shares[:k] = centred @ v[:k].T, share[:k]
    return out, shares
