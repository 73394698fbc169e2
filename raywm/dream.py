"""The imagination loop: a policy acts in a world model's own predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from raywm.models.base import Dreamer, Noise, State, repeat

Policy = Callable[[Tensor, int], Tensor]  # features (B, F), t -> encoded action (B, A)


class Dream(NamedTuple):
    """A dream of H steps from B starts, with gradients. Row t of `reward` and `cont` was received on arriving in
    `states[t + 1]`; `action[t]` led there."""

    states: State  # leaves (H + 1, B, ...); empty where they were not asked for
    features: Tensor  # (H + 1, B, F)
    action: Tensor  # (H, B, A)
    reward: Tensor  # (H, B)
    cont: Tensor  # (H, B)


def dream(
    model: Dreamer,
    policy: Policy,
    start: State,
    horizon: int,
    rng: torch.Generator,
    temperature: float = 1.0,
    *,
    states: bool = True,
) -> Dream:
    """Imagine `horizon` steps from `start` (leaves (B, ...)), keeping everything, gradients included.

    `states=False` leaves them out of what is returned, for learners that look at features only."""
    state = start
    batch = next(iter(start.values())).shape[0]
    now = model.features(state)
    # with gradients a list, stacked in the end; without, each step is put in its place while it is in the caches
    place = None if torch.is_grad_enabled() else now.new_empty(horizon + 1, *now.shape)
    kept, features, actions, told = [state], [], [], []
    for t in range(horizon + 1):
        features.append(now if place is None else place[t].copy_(now))
        if t == horizon:
            break
        action = policy(features[-1], t)
        state, now, said = model.advance(state, action, model.noise(batch, rng), temperature)
        if states:
            kept.append(state)
        actions.append(action)
        told.append(said)
    stacked = torch.stack(features) if place is None else place  # (H+1, B, F)
    whole = None if told[0] is None else torch.stack(told)  # type: ignore[arg-type]
    reward, cont = model.outcomes(stacked[1:], whole)
    leaves = {k: torch.stack([s[k] for s in kept]) for k in start} if states else {}
    return Dream(leaves, stacked, torch.stack(actions), reward, cont)


@torch.inference_mode()
def dream_returns(
    model: Dreamer,
    policy: Policy,
    start: State,
    horizon: int,
    rng: torch.Generator,
    temperature: float = 1.0,
    *,
    candidates: int = 1,
    sampled_ends: bool = True,
) -> tuple[Tensor, Tensor]:
    """Undiscounted returns of dreams, in memory that does not grow with the horizon, without gradients.

    Args:
        start: E starts, leaves (E, ...). Each is dreamt from by every one of `candidates` P, candidate-major: the
            policy sees (P * E, F). Candidates share the noise of their start (common random numbers).
        sampled_ends: a dream ends when a uniform draw exceeds its continuation (World Models), else each reward is
            weighted by the probability of having come so far.

    Returns:
        returns (P * E,) and the expected or sampled lengths in steps (P * E,). A dream ends early once no row lives.
    """
    starts = next(iter(start.values())).shape[0]
    state = repeat(start, candidates)
    alive = torch.ones(candidates * starts, device=rng.device)
    total, length = torch.zeros_like(alive), torch.zeros_like(alive)
    for t in range(horizon):
        action = policy(model.features(state), t)
        noise = shared(model.noise(starts, rng), candidates)
        ends = torch.rand(starts, generator=rng, device=rng.device).repeat(candidates) if sampled_ends else None
        state, reward, cont = model.imagine(state, action, noise, temperature)
        total += alive * reward
        length += alive
        alive = alive * (cont if ends is None else ends < cont)
        if t % 16 == 15 and not bool(alive.any()):  # a look costs a synchronisation on a GPU
            break
    return total, length


def shared(noise: Noise, candidates: int) -> Noise:
    """Noise drawn for E starts, for P x E rows: every candidate meets the same luck."""
    return repeat(noise, candidates)
