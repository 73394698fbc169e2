"""Dreamer's actor: a distribution over encoded actions for every kind of action space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywm.models.fused import fusible
from raywm.models.heads import Head, OneHots, draw, mixed_probs

MIN_STD, MAX_STD = 0.1, 1.0


class Actor(nn.Module):
    """Features (..., F) -> a distribution over actions (..., A) as ``ActionCodec`` encodes them.

    Discrete and multi-discrete spaces: categoricals with a share of the uniform distribution. MultiBinary: coins. Box:
    a normal with mean tanh(.) and a bounded std (DreamerV3, Nature 2025), whose draws dreams and environments clip to
    [-1, 1] and the estimator does not.

    Args:
        kind, groups: of the codec; act_dim: A; onehots: of the world model whose features these are.
    """

    def __init__(
        self,
        features: int,
        act_dim: int,
        kind: str,
        groups: tuple[int, ...],
        units: int,
        layers: int,
        unimix: float,
        onehots: OneHots | None = None,
    ):
        super().__init__()
        self.kind, self.groups, self.act_dim, self.unimix = kind, tuple(groups), act_dim, unimix
        self.net = Head(features, units, layers, 2 * act_dim if kind == "box" else act_dim, 0.01, onehots)

    @property
    def noise_dim(self) -> int:
        """Numbers of one action's noise: uniform ones, but standard normal ones for a Box."""
        return len(self.groups) or self.act_dim

    def noise(self, batch: int, rng: torch.Generator) -> Tensor:
        """(B, noise_dim): the randomness of one action."""
        if self.kind == "box":
            return torch.randn(batch, self.noise_dim, generator=rng, device=rng.device)
        return torch.rand(batch, self.noise_dim, generator=rng, device=rng.device)

    def _probs(self, out: Tensor) -> list[Tensor]:
        return [mixed_probs(part, self.unimix) for part in out.split(self.groups, -1)]

    def _draws(self, out: Tensor, noise: Tensor) -> list[Tensor]:
        return [draw(part, noise[..., g], self.unimix) for g, part in enumerate(out.detach().split(self.groups, -1))]

    def _chances(self, out: Tensor) -> Tensor:
        return (1 - self.unimix) * out.sigmoid() + self.unimix / 2

    def _normal(self, out: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = out.chunk(2, -1)
        return mean.tanh(), (MAX_STD - MIN_STD) * torch.sigmoid(spread + 2) + MIN_STD

    @fusible
    def sample(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """An action (..., A) for noise (..., noise_dim); the most likely one without."""
        out = self.net(features)
        if self.kind == "box":
            mean, std = self._normal(out)
            return mean if noise is None else mean + std * noise
        if self.kind == "multi_binary":
            chance = self._chances(out)
            return ((0.5 if noise is None else noise) < chance).float()
        if noise is not None:
            return torch.cat(self._draws(out, noise), -1)
        choices = [(part, part.argmax(-1, keepdim=True)) for part in out.split(self.groups, -1)]
        return torch.cat([torch.zeros_like(part).scatter_(-1, choice, 1.0) for part, choice in choices], -1)

    def judge(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability (...) of actions (..., A) that ``sample`` gave, and the entropy (...)."""
        out = self.net(features)
        if self.kind == "box":
            mean, std = self._normal(out)
            log_prob = -0.5 * ((action - mean) / std).square() - std.log() - 0.9189385332046727
            return log_prob.sum(-1), (std.log() + 1.4189385332046727).sum(-1)
        if self.kind == "multi_binary":
            p = self._chances(out)
            log_prob = torch.where(action > 0.5, p, 1 - p).log()
            return log_prob.sum(-1), -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1)
        log_prob = torch.zeros(out.shape[:-1], device=out.device)
        entropy = torch.zeros_like(log_prob)
        for probs, taken in zip(self._probs(out), action.split(self.groups, -1)):
            logs = probs.log()
            log_prob = log_prob + (logs * taken).sum(-1)
            entropy = entropy - (probs * logs).sum(-1)
        return log_prob, entropy


def reparametrised(actor: Actor, features: Tensor, noise: Tensor) -> Tensor:
    """An action whose gradients reach the actor: Dreamer v1's, for a Box; straight through the choice for others."""
    if actor.kind == "box":
        return actor.sample(features, noise)
    if actor.kind == "multi_binary":
        chance = actor._chances(actor.net(features))
        return (noise < chance).float() + chance - chance.detach()
    out = actor.net(features)
    return torch.cat([d + p - p.detach() for d, p in zip(actor._draws(out, noise), actor._probs(out))], -1)
