"""Dreamer's agent: the model's encoder and dynamics, and the actor, as they act in an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raywm.agent import Agent
from raywm.learners.actor import Actor
from raywm.models import build_model


class DreamerAgent(Agent):
    """Acts by the posterior state; draws its latents and actions from each row's generator, or, `greedy`, takes the
    most likely action for a drawn state.

    Args:
        spec: of ``parts.dreamer_specification``; policy: of ``DreamerLearner.policy``; version: updates it has seen.

    Raises ValueError for weights of another model.
    """

    name = "dreamer"

    def __init__(self, spec: dict[str, Any], policy: dict[str, torch.Tensor], version: int = 0, greedy: bool = False):
        self.spec, self.version, self.greedy, self.codec = spec, version, greedy, spec["codec"]
        self.model = build_model(**spec["model"]).eval().requires_grad_(False)
        self.actor = Actor(self.model.feat_dim, self.model.act_dim, **spec["actor"]).eval().requires_grad_(False)
        self._load(policy)

    def renewed(self, policy: dict[str, torch.Tensor], version: int) -> DreamerAgent:
        """An agent with other weights, at a fraction of the cost: they go into this one's modules, which then must not
        act any more."""
        agent = object.__new__(type(self))  # copy.copy would go through __reduce__ and build all anew
        agent.__dict__ |= self.__dict__ | {"version": version}
        agent._load(policy)
        return agent

    def acting(self, greedy: bool) -> DreamerAgent:
        """An agent with this one's modules that samples its actions, or is greedy."""
        agent = object.__new__(type(self))
        agent.__dict__ |= self.__dict__ | {"greedy": greedy}
        return agent

    def _load(self, policy: dict[str, torch.Tensor]) -> None:
        for name, module in (("model", self.model), ("actor", self.actor)):
            weights = {k.removeprefix(f"{name}."): v for k, v in policy.items() if k.startswith(f"{name}.")}
            try:
                module.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(f"weights do not fit this agent: {str(error).splitlines()[-1].strip()}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {"model": self.model, "actor": self.actor}
        policy = {f"{n}.{k}": v for n, m in parts.items() for k, v in m.state_dict().items()}
        return _rebuilt, (self.spec, {k: v.numpy() for k, v in policy.items()}, self.version, self.greedy)

    def initial(self, B: int) -> dict[str, torch.Tensor]:
        return {**self.model.initial(B), "action": torch.zeros(B, self.model.act_dim)}

    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        return self.step(obs, state, is_first, self.noise(rngs))

    def noise(self, rngs: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
        """What ``act`` gives ``step`` for one generator a row: "stoch" (B, S) and "action" (B, A')."""
        latent: Any = self.model.latent  # type: ignore[union-attr]
        uniform = latent.uniform
        S, A = latent.noise_dim, self.actor.noise_dim
        drawn = np.empty((len(rngs), S + A), np.float32)
        for row, rng in enumerate(rngs):
            drawn[row, :S] = rng.random(S, np.float32) if uniform else rng.standard_normal(S, np.float32)
            boxed = self.actor.kind == "box"
            drawn[row, S:] = rng.standard_normal(A, np.float32) if boxed else rng.random(A, np.float32)
        stoch, action = torch.from_numpy(drawn).split([S, A], -1)
        return {"stoch": stoch, "action": action}

    @torch.inference_mode()
    def step(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, noise: dict[str, torch.Tensor]
    ) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """``act`` with its randomness given; a greedy agent needs no "action" of it."""
        inputs = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in obs.items()}
        first = torch.from_numpy(is_first)
        now = self.model.posterior(state, state["action"], inputs, first, noise)
        action = self.actor.sample(self.model.features(now), None if self.greedy else noise["action"])
        taken = self.codec.decode(action.numpy())
        return taken, {**now, "action": torch.from_numpy(self.codec.encode(taken))}


def _rebuilt(spec: dict[str, Any], policy: dict[str, np.ndarray], version: int, greedy: bool) -> DreamerAgent:
    return DreamerAgent(spec, {k: torch.from_numpy(v) for k, v in policy.items()}, version, greedy)
