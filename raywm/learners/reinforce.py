"""REINFORCE (Williams 1992) in dreams: gradients through the log-probabilities of sampled actions only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raywm.controllers import Controller
from raywm.models.base import Dreamer, State, repeat
from raywm.spaces import ActionCodec


class Reinforce:
    """A stochastic controller trained by likelihood-ratio gradients with a leave-one-out baseline.

    Discrete groups are categorical in the scores, binary actions Bernoulli, Box actions Gaussian around the score
    (before tanh) with standard deviation `std`. The state is flat arrays: parameters and Adam's two moments.

    Args:
        lr: Adam's step; repeats: dreams a start (the baseline is their mean); std: exploration of Box actions;
        gamma: discount of the returns to go; entropy: weight of the entropy bonus of one-hot groups.
    """

    def __init__(
        self,
        controller: Controller,
        codec: ActionCodec,
        *,
        lr: float = 0.05,
        repeats: int = 16,
        std: float = 0.5,
        gamma: float = 0.99,
        entropy: float = 0.003,
    ):
        self.controller, self.codec = controller, codec
        self.lr, self.repeats, self.std, self.gamma, self.entropy = lr, repeats, std, gamma, entropy
        self.load({"theta": controller.start()})

    def state(self) -> dict[str, np.ndarray]:
        return {"theta": self.theta.numpy(), "m": self.m.numpy(), "v": self.v.numpy(), "t": np.array(self.t)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        zero = np.zeros(self.controller.size)
        self.theta = torch.tensor(state["theta"], dtype=torch.float64)
        self.m, self.v = torch.tensor(state.get("m", zero)), torch.tensor(state.get("v", zero))
        self.t = int(state.get("t", 0))

    def update(
        self, model: Dreamer, start: State, horizon: int, rng: torch.Generator, temperature: float = 1.0
    ) -> dict[str, float]:
        """One step of Adam up the gradient of the expected dream return from `start` (E, ...).

        Returns:
            "return_mean", "length_mean" of the dreams and the dream "steps" lived.
        """
        features, chosen, reward, alive = self._rollout(model, start, horizon, rng, temperature)
        to_go = torch.zeros_like(reward)
        running = torch.zeros_like(reward[0])
        for t in range(len(reward) - 1, -1, -1):
            running = alive[t] * (reward[t] + self.gamma * running)
            to_go[t] = running
        # leave-one-out over the dreams of one start, step by step: luck common to them cancels
        groups = to_go.view(len(reward), self.repeats, -1)
        others = (groups.sum(1, keepdim=True) - groups) / max(1, self.repeats - 1)
        advantage = (groups - others).flatten(1) * alive
        advantage = advantage / (advantage.square().sum() / alive.sum().clamp(min=1)).sqrt().clamp(min=1e-6)

        theta = self.theta.float().requires_grad_()
        scores = self.controller.scores(theta.unsqueeze(0), features.flatten(0, 1).unsqueeze(0)).squeeze(0)
        log_prob, entropy = self._log_prob(scores, chosen.flatten(0, 1))
        gain = (log_prob * advantage.flatten() + self.entropy * entropy * alive.flatten()).sum() / alive.sum()
        (gradient,) = torch.autograd.grad(gain, theta)
        self._adam(gradient.double())
        return {
            "return_mean": float((reward * alive).sum(0).mean()),
            "length_mean": float(alive.sum(0).mean()),
            "steps": int(alive.sum()),
        }

    @torch.no_grad()
    def _rollout(
        self, model: Dreamer, start: State, horizon: int, rng: torch.Generator, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = repeat(start, self.repeats)
        rows = next(iter(state.values())).shape[0]
        living = torch.ones(rows, device=rng.device)
        theta = self.theta.float().unsqueeze(0).to(rng.device)
        features: list[Tensor] = []
        chosen: list[Tensor] = []
        rewards: list[Tensor] = []
        alive: list[Tensor] = []
        for _ in range(horizon):
            seen = model.features(state)
            scores = self.controller.scores(theta, seen.unsqueeze(0)).squeeze(0)
            raw = self._sample(scores, rng)
            state, reward, cont = model.imagine(state, self.codec.squash(raw), model.noise(rows, rng), temperature)
            for kept, value in ((features, seen), (chosen, raw), (rewards, reward), (alive, living)):
                kept.append(value.cpu())
            living = living * (torch.rand(rows, generator=rng, device=rng.device) < cont)
            if not bool(living.any()):
                break
        return torch.stack(features), torch.stack(chosen), torch.stack(rewards), torch.stack(alive)

    def _sample(self, scores: Tensor, rng: torch.Generator) -> Tensor:
        """Raw scores of a sampled action: `squash` of them is the action itself."""
        if self.codec.kind == "box":
            return scores + self.std * torch.randn(scores.shape, generator=rng, device=rng.device)
        uniform = torch.rand(scores.shape, generator=rng, device=rng.device).clamp(1e-6, 1 - 1e-6)
        if self.codec.groups:
            return scores - torch.log(-torch.log(uniform))  # Gumbel: the argmax is a categorical draw
        return scores + torch.log(uniform) - torch.log1p(-uniform)  # logistic: the sign is a Bernoulli draw

    def _log_prob(self, scores: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(action) and entropy, (N,) each, of the actions that `raw` stands for."""
        if self.codec.kind == "box":
            return -0.5 * ((raw - scores) / self.std).square().sum(-1), torch.zeros(len(raw))
        action = self.codec.squash(raw)
        if not self.codec.groups:
            probs = torch.distributions.Bernoulli(logits=scores)
            return probs.log_prob(action).sum(-1), probs.entropy().sum(-1)
        log_prob, entropy = torch.zeros(len(raw)), torch.zeros(len(raw))
        groups = list(self.codec.groups)
        for score, choice in zip(scores.split(groups, -1), action.split(groups, -1), strict=True):
            logits = torch.log_softmax(score, -1)
            log_prob = log_prob + (logits * choice).sum(-1)
            entropy = entropy - (logits.exp() * logits).sum(-1)
        return log_prob, entropy

    def _adam(self, gradient: Tensor) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient.square()
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.theta = self.theta + self.lr * m / (v.sqrt() + 1e-8)
