"""How good is an agent in reality, and how far is its dream from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywm.data.episode import Episode
from raywm.models.base import State, WorldModel, repeat
from raywm.spaces import ActionCodec

HORIZONS = (1, 5, 15, 50)


def summarise(returns: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """Mean, standard deviation and extremes of episode returns, and their mean length."""
    r = np.asarray(returns, float)
    return {
        "return_mean": float(r.mean()),
        "return_std": float(r.std()),
        "return_min": float(r.min()),
        "return_max": float(r.max()),
        "length_mean": float(np.mean(lengths)),
        "episodes": len(r),
    }


def evaluate(
    agent: Any, env: Any, seed: int, episodes: int, envs: int = 8, progress: Callable[[int], Any] = lambda n: None
) -> dict[str, Any]:
    """Play `episodes` episodes of `env` in this process; `progress(n)` hears of every n that have ended.

    Returns:
        `summarise`'s numbers, "returns" in the order of the episodes' numbers, and "steps".
    """
    from raywm.collect import Collector

    collector = Collector(env, seed, envs)
    try:
        played = collector.play(agent, range(episodes), "evaluate", progress)
    finally:
        collector.close()
    out: dict[str, Any] = summarise([p.ret for p in played], [p.steps for p in played])
    return out | {"returns": [p.ret for p in played], "steps": sum(p.steps for p in played)}


def scripted_actions(agent: Any, codec: ActionCodec, starts: int, horizon: int, rngs: Sequence[Any]) -> np.ndarray:
    """The encoded actions (H, E, A) of an agent that does not look, for playing it in a dream."""
    state = agent.initial(starts)
    first = np.ones(starts, bool)
    out = np.zeros((horizon, starts, codec.dim), np.float32)
    for t in range(horizon):
        action, state = agent.act({}, state, first, rngs)
        out[t] = codec.encode(np.asarray(action))
        first = np.zeros(starts, bool)
    return out


@torch.inference_mode()
def open_loop_error(
    model: WorldModel,
    codec: ActionCodec,
    episodes: Sequence[Episode],
    latents: Sequence[dict[str, np.ndarray]],
    rng: torch.Generator,
    *,
    context: int = 5,
    windows: int = 64,
    samples: int = 8,
) -> dict[str, float]:
    """k-step open-loop error: from a posterior over `context` rows the model imagines under the real actions.

    Returns:
        {"open_loop_k": error}: root mean square over windows and latent dimensions of the mean of `samples` dreams
        against what happened, in units of each dimension's spread (1 is no better than the mean of the data); nan
        where no episode is long enough. Also "persist_k": the same for a guess that nothing changes. Of a model
        without a latent z the dimensions are those of its decoded vectors; {} where it decodes none.
    """
    seen, imagined = _measured(model, episodes, latents)
    if seen is None:
        return {}
    spread = np.concatenate(seen).std(0)
    varies = spread > 1e-4  # what never changes has no scale to measure errors in
    spread = spread[varies]
    out: dict[str, float] = {}
    for k in HORIZONS:
        fits = [i for i, e in enumerate(episodes) if len(e.reward) >= k + 2]
        if not fits:
            out |= {f"open_loop_{k}": math.nan, f"persist_{k}": math.nan}
            continue
        order = np.linspace(0, len(fits) - 1, min(windows, 4 * len(fits))).astype(int)
        chosen = [fits[i] for i in order]
        errors, still = [], []
        for w, i in enumerate(chosen):
            z, e = latents[i], episodes[i]
            rows = len(e.reward)
            start = int((w * 0.618 % 1) * (rows - k - 1))  # spread over the episode, the same at every look
            action = torch.from_numpy(encoded_actions(e, codec))
            state = fold(model, {n: torch.from_numpy(v) for n, v in z.items()}, action, max(0, start - context), start)
            state = repeat(state, samples)
            for t in range(start + 1, start + k + 1):
                state = model.imagine(state, action[t].expand(samples, -1), model.noise(samples, rng)).state
            truth = seen[i][start + k, varies]
            errors.append(((imagined(state).mean(0)[varies] - truth) / spread) ** 2)
            still.append(((seen[i][start, varies] - truth) / spread) ** 2)
        out |= {f"open_loop_{k}": float(np.sqrt(np.mean(errors))), f"persist_{k}": float(np.sqrt(np.mean(still)))}
    return out


def _measured(
    model: WorldModel, episodes: Sequence[Episode], latents: Sequence[dict[str, np.ndarray]]
) -> tuple[list[np.ndarray] | None, Callable[[State], np.ndarray]]:
    """What predictions are held against, (T, D) an episode, and what of a state (S, *) is held against it, (S, D)."""
    if "z_mean" in latents[0]:
        return [z["z_mean"] for z in latents], lambda state: state["z"].numpy()
    decoded = model.decode(model.initial(1))
    names = [name for name, column in decoded.items() if column.dtype != torch.uint8]
    flat = lambda columns: np.concatenate([np.asarray(columns[n]).reshape(len(columns[n]), -1) for n in names], 1)  # noqa: E731
    return [flat(e.obs) for e in episodes] if names else None, lambda state: flat(model.decode(state))


def encoded_actions(episode: Episode, codec: ActionCodec) -> np.ndarray:
    """(T, A) float32 as a model sees them: zero on the first row."""
    action = np.array(codec.encode(episode.action), np.float32)
    action[episode.is_first] = 0
    return action


def fold(model: WorldModel, obs: dict[str, Tensor], action: Tensor, first: int, last: int) -> State:
    """The posterior at row `last` of one episode, from rows `first`..`last`, as a state of batch 1."""
    state = model.initial(1)
    for t in range(first, last + 1):
        state = model.posterior(
            state,
            action[t : t + 1],
            {k: v[t : t + 1] for k, v in obs.items()},
            torch.tensor([t == first]),
            model.zero_noise(1),
        )
    return state
