"""What Dreamer's networks say: categoricals with a floor, two-hot numbers, symlog, and the KLs between latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(|x| + 1): squashes large numbers, keeps small ones (arXiv 2301.04104, eq. 9)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(x.abs())


OneHots = tuple[int, int]  # (S, K): S categorical variables of K classes


def columns(classes: Tensor, width: int) -> Tensor:
    """Numbers of classes (..., S) -> the places (..., S) of their ones among one-hots (..., width = S * K)."""
    return classes.long() + torch.arange(0, width, width // classes.shape[-1], device=classes.device)


def ones_at(places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Places (N, S) -> rows (N, width) of zeros with ones there. (torch's scatter_ of bf16 costs ten times this.)"""
    N = places.shape[0]
    rows = torch.arange(0, N * width, width, device=places.device).unsqueeze(-1)
    flat = torch.zeros(N * width, dtype=dtype, device=places.device)
    return flat.index_fill_(0, (places + rows).flatten(), 1.0).view(N, width)


class Picked(torch.autograd.Function):
    """One-hots times a matrix, the sum of S of its columns: places (N, S), weight (out, S * K) -> (N, out).

    On a CPU an eighth to a fourteenth of the time of the product. The weights' gradient is that product's, or where
    that is large, of each column the sum of the gradients of the rows that picked it, which sorting brings together.
    """

    SORTED = 4096  # products a pick, from which on sorting costs less

    @staticmethod
    def forward(ctx: Any, places: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.width = weight.shape[1]
        return F.embedding_bag(places, weight.t().contiguous(), mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        if ctx.width // places.shape[1] * grad.shape[1] < Picked.SORTED:
            return None, grad.t() @ ones_at(places, ctx.width, grad.dtype)
        order = places.flatten().sort()
        begins = torch.searchsorted(order.values, torch.arange(ctx.width, device=grad.device))
        rows = order.indices // places.shape[1]
        return None, F.embedding_bag(rows, grad.contiguous(), begins, mode="sum").t()


class FeatureLinear(nn.Linear):
    """A linear layer on features (..., D + S * K), or on compact ones (..., D + S): see ``WorldModel.onehots``."""

    def __init__(self, features: int, outputs: int, onehots: OneHots):
        super().__init__(features, outputs, bias=False)
        self.onehots = onehots

    def forward(self, features: Tensor) -> Tensor:
        S, K = self.onehots
        D = self.in_features - S * K
        if features.shape[-1] != D + S:
            return super().forward(features)
        kind = features.device.type
        weight = self.weight.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype)
        places = columns(features[..., D:].reshape(-1, S), S * K)
        picked: Tensor = Picked.apply(places, weight[:, D:])
        return F.linear(features[..., :D], weight[:, :D]) + picked.unflatten(0, features.shape[:-1])


def norm_mlp(sizes: list[int], raw: bool = False, onehots: OneHots | None = None) -> nn.Sequential:
    """Linear, LayerNorm, SiLU for every step between sizes. `raw`: what comes in are the environment's numbers, whose
    size says something (see ``biased``). `onehots`: what comes in are features with these.

    DreamerV3 has RMSNorm; torch has no fused kernel of it for CPUs, where it costs five times a LayerNorm.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        linear = FeatureLinear(a, b, onehots) if onehots and i == 0 else nn.Linear(a, b, bias=raw and i == 0)
        layers += [linear, nn.LayerNorm(b), nn.SiLU()]
    return nn.Sequential(*layers)


def biased(layer: nn.Linear | nn.Conv2d) -> None:
    """Starts a bias before a norm like the weights of one more input, which is always 1.

    A norm behind a layer without bias sees no more than its input's direction: of a single number the sign, of a flat
    grey patch only whether it is light or dark. Nothing would come through from a bias of 0 until it is learned.
    """
    assert layer.bias is not None
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    nn.init.normal_(layer.bias, std=(2 / (fan_in + fan_out)) ** 0.5)


def initialise(module: nn.Module, scale: float = 1.0) -> None:
    """Weights by a truncated normal with variance scale / mean of fan-in and fan-out, biases 0 (DreamerV3's)."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(m.weight)
            std = (scale * 2 / (fan_in + fan_out)) ** 0.5 / 0.87962566103423978  # that of a normal cut at 2 std
            nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std) if std else nn.init.zeros_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Head(nn.Module):
    """Hidden layers and a linear output, whose weights start at `scale` times their usual variance (0: it says 0)."""

    def __init__(
        self,
        features: int,
        units: int,
        layers: int,
        outputs: int,
        scale: float = 1.0,
        onehots: OneHots | None = None,
    ):
        super().__init__()
        self.hidden = norm_mlp([features, *[units] * layers], onehots=onehots)
        self.out = nn.Linear(units, outputs)
        initialise(self.hidden)
        initialise(self.out, scale)

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., F), compact or not -> (..., outputs) float32"""
        return self.out(self.hidden(features)).float()


class TwoHot(nn.Module):
    """A number as a distribution over bins that lie evenly in symlog space (arXiv 2301.04104, section on the critic).

    ``bins`` (K,) from 0 to symexp(20), and then the same with the other sign: halves that are subtracted before they
    are weighted, so that their rounding cancels and even chances say exactly 0.
    """

    bins: Tensor

    def __init__(self, count: int = 255, limit: float = 20.0):
        super().__init__()
        if count % 2 == 0:
            raise ValueError(f"got {count} bins, expected an odd number: one of them is 0")
        self.middle = count // 2
        half = symexp(torch.linspace(0, limit, self.middle + 1, dtype=torch.float64)).float()
        self.register_buffer("bins", torch.cat([half, -half[1:]]), persistent=False)

    def mean(self, logits: Tensor) -> Tensor:
        """(..., K) -> (...)"""
        return self.mean_of(logits.softmax(-1))

    def mean_of(self, p: Tensor) -> Tensor:
        """Probabilities (..., K) -> (...), in fp32 under autocast too: bf16 has two digits of a value."""
        with torch.autocast(p.device.type, enabled=False):
            return (p[..., 1 : self.middle + 1] - p[..., self.middle + 1 :]) @ self.bins[1 : self.middle + 1]

    def loss(self, logits: Tensor, *targets: Tensor, log_p: Tensor | None = None) -> Tensor:
        """Cross-entropy (...) of logits (..., K) with the two bins around a target (...), by its nearness to each; the
        sum over targets. `log_p`: the logits' log-probabilities, without gradients, where they are known."""
        places, shares = [], []
        sizes = self.bins[: self.middle + 1]
        for target in targets:
            target = target.detach().float()
            size = target.abs().clamp(max=sizes[-1])
            above = torch.searchsorted(sizes, size.contiguous()).clamp(1, self.middle)
            low, high = sizes[above - 1], sizes[above]
            share = (size - low) / (high - low)
            negative = (target < 0) * self.middle  # where the bins of that sign are
            places += [above - 1 + negative * (above > 1), above + negative]
            shares += [1 - share, share]
        if log_p is None:
            log_p = logits.detach().log_softmax(-1)
        loss: Tensor = CrossEntropy.apply(logits, log_p, torch.stack(places, -1), torch.stack(shares, -1))
        return loss


class CrossEntropy(torch.autograd.Function):
    """-sum of share * log_p[place], of logits and their log-probabilities (..., K), places and shares (..., n).

    The gradient in one piece: by itself autograd makes and adds a tensor as large as the logits for each place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor, places: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(log_p, places, shares)
        return -(log_p.gather(-1, places) * shares).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        log_p, places, shares = ctx.saved_tensors
        scaled = -shares * grad.unsqueeze(-1)  # (..., n)
        return log_p.exp().mul_(-scaled.sum(-1, keepdim=True)).scatter_add_(-1, places, scaled), None, None, None


def mixed_probs(logits: Tensor, unimix: float) -> Tensor:
    """Softmax over the last axis with a share of the uniform distribution: no choice ever has probability 0."""
    p = logits.softmax(-1)
    return p if unimix == 0 else (1 - unimix) * p + unimix / logits.shape[-1]


def choose(logits: Tensor, uniform: Tensor, unimix: float = 0.0) -> Tensor:
    """Samples of ``mixed_probs(logits, unimix)``, (..., K), by one uniform number (...) each: numbers of classes (...).

    The inverse of the distribution, without its normalisation: torch's softmax over a few classes costs more than all
    of this. A number below `unimix` picks by its place there, others are stretched.
    """
    K = logits.shape[-1]
    # beyond +-80 there is no room in fp32; logits that far from 0 are as good as certain
    heap = logits.float().clamp(-80, 80).exp_().cumsum(-1)
    plain = (uniform - unimix) / (1 - unimix) if unimix else uniform
    chosen = torch.searchsorted(heap, plain.unsqueeze(-1) * heap[..., -1:], right=True)  # (..., 1)
    if unimix:
        mixed = (uniform * (K / unimix)).long().unsqueeze(-1)
        chosen = torch.where(uniform.unsqueeze(-1) < unimix, mixed, chosen)
    chosen = chosen.clamp_(max=K - 1)  # rounding may lead past the last one
    return chosen.squeeze(-1)


def draw(logits: Tensor, uniform: Tensor, unimix: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """What ``choose`` chooses as one-hots (..., K)."""
    chosen = choose(logits, uniform, unimix).unsqueeze(-1)
    if dtype == torch.bfloat16:
        return ones_at(chosen.view(-1, 1), logits.shape[-1], dtype).view(logits.shape)
    return torch.zeros(logits.shape, dtype=dtype, device=logits.device).scatter_(-1, chosen, 1.0)


class StraightThrough(torch.autograd.Function):
    """One-hot samples of logits (..., K) in `dtype`, whose gradients are those of their ``mixed_probs``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, uniform: Tensor, unimix: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.unimix = unimix
        return draw(logits, uniform, unimix, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        probs = ctx.saved_tensors[0].softmax(-1)
        scaled = probs * grad
        scaled = torch.addcmul(scaled, probs, scaled.sum(-1, keepdim=True), value=-1)
        return scaled.mul_(1 - ctx.unimix), None, None, None


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of independent categoricals, probabilities (..., S, K) -> (...)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians (..., S) -> (...)."""
    ratio = (std_p / std_q) ** 2
    return 0.5 * (ratio + ((mean_p - mean_q) / std_q) ** 2 - 1 - ratio.log()).sum(-1)


def bernoulli_loss(logit: Tensor, target: Tensor) -> Tensor:
    """-log p of targets in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")
