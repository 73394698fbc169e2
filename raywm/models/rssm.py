"""The recurrent state-space model (PlaNet, arXiv 1811.04551; DreamerV3, arXiv 2301.04104 and Nature 2025).

sequence model   deter[t] = core(deter[t-1], stoch[t-1], action[t])
posterior        stoch[t] ~ q(. | deter[t], obs[t])
prior            stoch[t] ~ p(. | deter[t])
features         [deter, stoch] -> observation, reward, continuation
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raywm.models.base import Fit, Noise, State, Step, WorldModel
from raywm.models.codecs import Columns, Decoder, Encoder
from raywm.models.fused import Activated, activated, fusible
from raywm.models.heads import (
    Head,
    StraightThrough,
    TwoHot,
    bernoulli_loss,
    biased,
    categorical_kl,
    choose,
    gaussian_kl,
    initialise,
    mixed_probs,
    norm_mlp,
    symexp,
)
from raywm.models.scan import ScanLinear, scanning

if TYPE_CHECKING:
    from raywm.data.batch import Batch

# The official widths. `layers`: of encoder and decoder MLPs and, cut at 2, of the prior. nano is ours, for laptops.
WIDTHS = ("deter", "stoch", "classes", "units", "hidden", "depth", "blocks", "layers")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(WIDTHS, widths))
    for name, widths in {
        "nano": (128, 16, 8, 64, 64, 8, 1, 1),
        "1M": (512, 32, 4, 64, 64, 4, 8, 3),
        "12M": (2048, 32, 16, 256, 256, 16, 8, 3),
        "25M": (3072, 32, 24, 384, 384, 24, 8, 3),
        "50M": (4096, 32, 32, 512, 512, 32, 8, 3),
        "100M": (6144, 32, 48, 768, 768, 48, 8, 3),
        "200M": (8192, 32, 64, 1024, 1024, 64, 8, 3),
        "400M": (12288, 32, 96, 1536, 1536, 96, 8, 3),
    }.items()
}
PLAIN_DETER = 1024  # up to which CPUs scan in fp32
MIN_STD = 0.1  # of Gaussian latents (PlaNet)
LEAST_STD = 0.01  # that standardised features count as having: what varies less stays small

Stats = dict[str, Tensor]  # of a distribution over stoch: "probs" (..., S, K), or "mean" and "std" (..., S)


class Categorical:
    """S categorical variables of K classes as one-hots, flattened, with straight-through gradients (DreamerV2)."""

    uniform = True  # what its noise is

    def __init__(self, stoch: int, classes: int, unimix: float):
        self.noise_dim = stoch
        self.shape, self.unimix = (stoch, classes), unimix
        self.size = self.outputs = stoch * classes

    def noise(self, lead: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return torch.rand(*lead, self.shape[0], generator=rng, device=rng.device)

    def central(self, lead: tuple[int, ...]) -> Tensor:
        return torch.full((*lead, self.shape[0]), 0.5)

    def _logits(self, out: Tensor, temperature: float) -> Tensor:
        logits = out.float().unflatten(-1, self.shape)
        return logits if temperature == 1 else logits / temperature

    def stats(self, out: Tensor) -> Stats:
        return {"probs": mixed_probs(self._logits(out, 1.0), self.unimix)}

    def sample(self, out: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """The network's outputs (..., S * K), uniform numbers (..., S) -> (..., S * K)"""
        return sampled(self._logits(out, temperature), noise, self.unimix, out.dtype)

    def choose(self, out: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """What ``sample`` gives as numbers of classes (..., S), without gradients."""
        return choose(self._logits(out, temperature), noise, self.unimix)

    def pack(self, stoch: Tensor) -> Tensor:
        """One-hots (..., S * K) -> the numbers of their classes (..., S)"""
        classes = stoch.unflatten(-1, self.shape).argmax(-1)
        return classes.to(torch.uint8 if self.shape[1] <= 256 else torch.int16)

    def unpack(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes.long(), self.shape[1]).flatten(-2).float()

    def kl(self, p: Stats, q: Stats) -> Tensor:
        return categorical_kl(p["probs"], q["probs"])

    def entropy(self, p: Stats) -> Tensor:
        return -(p["probs"] * p["probs"].log()).sum((-2, -1))


@fusible
def sampled(logits: Tensor, noise: Tensor, unimix: float, dtype: torch.dtype) -> Tensor:
    """Logits (..., S, K), uniform numbers (..., S) -> one-hots (..., S * K) in dtype, straight-through."""
    one_hots: Tensor = StraightThrough.apply(logits, noise, unimix, dtype)
    return one_hots.flatten(-2)


class Gaussian:
    """A diagonal Gaussian of S dimensions (PlaNet, Dreamer v1)."""

    uniform = False

    def __init__(self, stoch: int):
        self.size, self.outputs, self.noise_dim = stoch, 2 * stoch, stoch

    def noise(self, lead: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return torch.randn(*lead, self.size, generator=rng, device=rng.device)

    def central(self, lead: tuple[int, ...]) -> Tensor:
        return torch.zeros(*lead, self.size)

    def stats(self, out: Tensor) -> Stats:
        mean, spread = out.float().chunk(2, -1)
        return {"mean": mean, "std": F.softplus(spread) + MIN_STD}

    def sample(self, out: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """The network's outputs (..., 2 * S), normal numbers (..., S) -> (..., S)"""
        stats = self.stats(out)
        return stats["mean"] + stats["std"] * temperature**0.5 * noise

    def pack(self, stoch: Tensor) -> Tensor:
        return stoch.half()

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.float()

    def kl(self, p: Stats, q: Stats) -> Tensor:
        return gaussian_kl(p["mean"], p["std"], q["mean"], q["std"])

    def entropy(self, p: Stats) -> Tensor:
        return (p["std"].log() + 1.4189385332046727).sum(-1)


class GRU(nn.Module):
    """The recurrent cell up to DreamerV3's first version: one input layer, one GRU with a norm before its gates."""

    update_bias: Tensor

    def __init__(self, deter: int, stoch: int, act_dim: int, hidden: int, timescale: float | None = None):
        super().__init__()
        self.register_buffer("update_bias", update_bias(deter, timescale), persistent=False)
        self.from_action = nn.Linear(act_dim, hidden, bias=False)
        self.from_stoch = ScanLinear(stoch, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.gates = ScanLinear(hidden + deter, 3 * deter)
        self.gates_norm = nn.LayerNorm(3 * deter)
        initialise(self)

    def forward(self, deter: Tensor, stoch: Tensor, acted: Tensor) -> Tensor:
        x = activated(self.norm, self.from_stoch(stoch), acted)
        return gated(deter, self.gates_norm(self.gates(torch.cat([x, deter.to(x.dtype)], -1))), self.update_bias)


class BlockGRU(nn.Module):
    """The block-diagonal cell of the current DreamerV3: the recurrent matrix is `blocks` blocks, its inputs are dense.

    Its first layer applies one block to [deter of the block, inputs]: the same numbers as a block-diagonal matrix on
    deter plus a dense one on the inputs, which is how it is computed here.
    """

    update_bias: Tensor

    def __init__(self, deter: int, stoch: int, act_dim: int, hidden: int, blocks: int, timescale: float | None = None):
        super().__init__()
        if deter % blocks:
            raise ValueError(f"got rssm.deter={deter}, rssm.blocks={blocks}; expected blocks that divide deter")
        bias = update_bias(deter // blocks, timescale)
        self.register_buffer("update_bias", bias.repeat(blocks if len(bias) > 1 else 1), persistent=False)
        self.action_in = norm_mlp([act_dim, hidden], raw=True)
        self.stoch_in = Activated(ScanLinear(stoch, hidden), nn.LayerNorm(hidden))
        self.deter_in = Activated(ScanLinear(deter, hidden), nn.LayerNorm(hidden))
        self.dense = ScanLinear(3 * hidden, deter)
        self.block = ScanLinear(deter, deter, blocks)
        self.norm = nn.LayerNorm(deter)
        self.gates = ScanLinear(deter, deter, blocks, parts=3)
        initialise(self)
        biased(self.action_in[0])  # type: ignore[arg-type]

    def from_action(self, action: Tensor) -> Tensor:
        return self.action_in(action)

    def forward(self, deter: Tensor, stoch: Tensor, acted: Tensor) -> Tensor:
        was = deter.to(acted.dtype)
        inputs = torch.cat([self.deter_in(was), self.stoch_in(stoch), acted], -1)
        x = activated(self.norm, self.dense(inputs), self.block(was))
        return gated(deter, self.gates(x), self.update_bias)


def update_bias(deter: int, timescale: float | None) -> Tensor:
    """What is added to the update gates: -1 for all (1,) (DreamerV3), or evenly from -1 to -ln(timescale - 1) (deter,),
    so that units start out forgetting within 4 steps to `timescale`.

    After chrono initialisation (arXiv 1804.11188, section 3), which draws timescales evenly and not their logarithms.
    """
    if timescale is None:
        return torch.tensor([-1.0])
    if not 4 <= timescale < math.inf:
        raise ValueError(f"got rssm.timescale={timescale:g}, expected at least 4 steps, what units keep without it")
    return torch.linspace(-1.0, -math.log(timescale - 1), deter)


@fusible
def gated(deter: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """The GRU's update; a negative bias (D,) or (1,) on its update gate has it start by keeping."""
    reset, cand, update = gates.chunk(3, -1)
    update = torch.sigmoid(update + bias)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    return torch.lerp(deter, cand.to(deter.dtype), update.to(deter.dtype))


class RSSM(WorldModel):
    """State leaves: "deter" (B, D) and "stoch" (B, S * K) one-hots, or (B, S) Gaussian. Features: both.

    Args:
        columns: name -> (shape, is_image); act_dim: A of encoded actions.
        size: one of ``SIZES``; deter ... blocks replace its widths where given.
        latent: "categorical" or "gaussian"; symlog: vectors are squashed; bins: of the two-hot reward.
        free_nats, dyn_scale, rep_scale: of the KL, whose two sides train prior and posterior (DreamerV3, eq. 5).
        reward_scale: weight of the reward's loss; timescale: see ``update_bias``.
        standardise: features have deter by its running mean and deviation, which ``follow`` keeps. What units that
            keep for long remember are small differences, from which a head, or an actor, learns slowly.

    Raises ValueError for images that do not halve well, blocks that do not divide deter, a timescale below 4.
    """

    phases = ("model",)
    moments: Tensor | None

    def __init__(
        self,
        columns: Columns,
        act_dim: int,
        size: str = "nano",
        latent: str = "categorical",
        deter: int | None = None,
        stoch: int | None = None,
        classes: int | None = None,
        units: int | None = None,
        hidden: int | None = None,
        depth: int | None = None,
        blocks: int | None = None,
        symlog: bool = True,
        bins: int = 255,
        unimix: float = 0.01,
        free_nats: float = 1.0,
        dyn_scale: float = 1.0,
        rep_scale: float = 0.1,
        reward_scale: float = 1.0,
        timescale: float | None = None,
        standardise: bool = False,
    ):
        super().__init__()
        given = zip(WIDTHS, (deter, stoch, classes, units, hidden, depth, blocks))
        w = self.widths = SIZES[size] | {k: v for k, v in given if v is not None}
        self.act_dim, self.symlog = act_dim, symlog
        self.free_nats, self.dyn_scale, self.rep_scale = free_nats, dyn_scale, rep_scale
        self.reward_scale = reward_scale
        self.latent: Any = (
            Categorical(w["stoch"], w["classes"], unimix) if latent == "categorical" else Gaussian(w["stoch"])
        )
        D, S, H, U, layers = w["deter"], self.latent.size, w["hidden"], w["units"], w["layers"]
        self.feat_dim = D + S
        self.encoder = Encoder(columns, U, layers, w["depth"], symlog)
        self.core = (
            GRU(D, S, act_dim, H, timescale) if w["blocks"] == 1 else BlockGRU(D, S, act_dim, H, w["blocks"], timescale)
        )
        self.prior = norm_mlp([D, *[H] * min(layers, 2)])
        self.prior_out = nn.Linear(H, self.latent.outputs)
        self.post_deter = ScanLinear(D, H)
        self.post_tokens = nn.Linear(self.encoder.size, H, bias=False)
        self.post_norm = nn.LayerNorm(H)
        self.post_out = ScanLinear(H, self.latent.outputs, bias=True)
        for part in (self.prior, self.prior_out, self.post_tokens):
            initialise(part)
        self.decoder = Decoder(columns, self.feat_dim, U, layers, w["depth"])
        self.twohot = TwoHot(bins)
        if latent == "categorical" and w["classes"] <= 256:  # the numbers that bf16 holds exactly
            self.onehots = (w["stoch"], w["classes"])
        self.reward = Head(self.feat_dim, U, 1, bins, scale=0.0, onehots=self.onehots)
        self.cont = Head(self.feat_dim, U, 1, 1, onehots=self.onehots)
        self._shadow: list[RSSM] = []  # in a list: no submodule
        # running means of deter and of its square, (2, D)
        self.register_buffer("moments", torch.stack([torch.zeros(D), torch.ones(D)]) if standardise else None)

    # ------------------------------------------------------------------------------------------------ one step

    def initial(self, batch: int) -> State:
        at = self.post_norm.weight
        return {
            "deter": torch.zeros(batch, self.widths["deter"], device=at.device, dtype=at.dtype),
            "stoch": torch.zeros(batch, self.latent.size, device=at.device, dtype=at.dtype),
        }

    def noise(self, batch: int, rng: torch.Generator) -> Noise:
        return {"stoch": self.latent.noise((batch,), rng)}

    def zero_noise(self, batch: int) -> Noise:
        return {"stoch": self.latent.central((batch,)).to(self.post_norm.weight.device)}

    def posterior(
        self, state: State, prev_action: Tensor, obs: dict[str, Tensor], is_first: Tensor, noise: Noise
    ) -> State:
        """See `WorldModel.posterior`; one step of ``observe``."""
        keep = (~is_first).to(prev_action.dtype).unsqueeze(-1)
        told = self.post_tokens(self.encoder(obs))
        acted = self.core.from_action(prev_action * keep)
        deter, stoch, _ = self._observed(state["deter"], state["stoch"], keep, acted, told, noise["stoch"])
        return {"deter": deter, "stoch": stoch}

    def _observed(
        self, deter: Tensor, stoch: Tensor, keep: Tensor, acted: Tensor, told: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        deter = self.core(deter * keep, stoch * keep, acted)
        out = self.post_out(activated(self.post_norm, self.post_deter(deter.to(told.dtype)), told))
        return deter, self.latent.sample(out, noise), out

    @fusible
    def advance(
        self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0
    ) -> tuple[State, Tensor, Tensor | None]:
        """A step of the dream; its outcomes follow from the features, of all steps at once.

        deter keeps the type it has: in fp32 it sums small steps that bf16 would lose, whatever the layers are in."""
        own = self.post_norm.weight.dtype
        acted = self.core.from_action(action.to(own))
        deter = self.core(state["deter"], state["stoch"].to(own), acted)
        out = self.prior_out(self.prior(deter.to(own)))
        state = {"deter": deter, "stoch": self.latent.sample(out, noise["stoch"], temperature).to(own)}
        return state, self.features(state), None

    def outcomes(self, features: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.twohot.mean(self.reward(features)), self.cont(features).squeeze(-1).sigmoid()

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        state, features, _ = self.advance(state, action, noise, temperature)
        return Step(state, *self.outcomes(features))

    def pack(self, state: State) -> dict[str, Tensor]:
        """2 bytes a number of deter, 1 a categorical variable (its class, exact), 2 a Gaussian one: 272 for nano."""
        return {"deter": state["deter"].half(), "stoch": self.latent.pack(state["stoch"])}

    def unpack(self, packed: dict[str, Tensor]) -> State:
        return {"deter": packed["deter"].float(), "stoch": self.latent.unpack(packed["stoch"])}

    def features(self, state: State) -> Tensor:
        deter = self._seen(state["deter"], self.scaling())
        return torch.cat([deter, state["stoch"].to(deter.dtype)], -1)

    def _seen(self, deter: Tensor, scaling: tuple[Tensor, Tensor] | None) -> Tensor:
        """deter (..., D) as features have it, in the layers' type; see ``scaling``."""
        if scaling is not None:
            shift, scale = scaling
            deter = torch.addcmul(shift, deter, scale)
        return deter.to(self.post_norm.weight.dtype)

    def scaling(self) -> tuple[Tensor, Tensor] | None:
        """What is added to deter, and what it is multiplied by before, where features are standardised."""
        if self.moments is None:
            return None
        mean, square = self.moments
        scale = (square - mean * mean).clamp(min=0).add(LEAST_STD**2).rsqrt()
        return -mean * scale, scale

    def follow(self, moments: Tensor) -> None:
        """Bring what ``features`` are standardised by a hundredth nearer to ``moments_of`` some states."""
        if self.moments is not None:
            self.moments.lerp_(moments, 0.01)

    @staticmethod
    def moments_of(state: State) -> Tensor:
        """The means of deter (..., D) and of its square: (2, D)."""
        deter = state["deter"].detach().float().flatten(0, -2)
        return torch.stack([deter.mean(0), deter.square().mean(0)])

    def decode(self, state: State) -> dict[str, Tensor]:
        out = self.decoder(self.features(state))
        obs: dict[str, Tensor] = {}
        for name, value in out.items():
            if name in self.decoder.cnns:
                obs[name] = (value * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (N,C,H,W) -> (N,H,W,C)
            else:
                obs |= self.decoder.split(symexp(value) if self.symlog else value)
        return obs

    def dreamer(self, precision: str = "fp32") -> RSSM:
        """This model, or for bf16 a copy in it, which the next call brings up to date."""
        if precision == "fp32":
            return self
        if not self._shadow:
            shadow = copy.deepcopy(self).to(torch.bfloat16).requires_grad_(False)
            shadow.twohot, shadow.moments = self.twohot, self.moments  # which would lose their digits
            self._shadow.append(shadow)
        shadow = self._shadow[0]
        torch._foreach_copy_(list(shadow.parameters()), [p.detach() for p in self.parameters()])
        return shadow

    def compact(self) -> Compact:
        """This model, where ``onehots`` says so, as it dreams fastest on a CPU without gradients."""
        return Compact(self)

    # ------------------------------------------------------------------------------------------------ sequences

    def observe(
        self, obs: dict[str, Tensor], action: Tensor, is_first: Tensor, noise: Tensor, start: State | None = None
    ) -> tuple[State, Stats]:
        """The posterior over sequences: all that does not hang on the state before is computed for (B, T) at once.

        Args:
            obs: leaves (B, T, *); action (B, T, A), zero on first rows; is_first (B, T); noise (B, T, S);
            start: the state before row 0, leaves (B, *); none: the initial one.

        Returns:
            states, leaves (B, T, *), and the posterior's statistics, leaves (B, T, ...).
        """
        B, T = is_first.shape
        # a CPU multiplies a step's few rows as fast in fp32 where the weights are small, without the casts around
        plain = is_first.device.type == "cpu" and self.widths["deter"] <= PLAIN_DETER
        told = self.post_tokens(self.encoder({k: v.flatten(0, 1) for k, v in obs.items()})).unflatten(0, (B, T))
        acted = self.core.from_action(action)
        wide = told.dtype
        if plain:
            told, acted = told.float(), acted.float()
        keep = (~is_first).float().unsqueeze(-1)
        state = self.initial(B) if start is None else start
        deter, stoch = state["deter"], state["stoch"]
        deters, stochs, outs = [], [], []
        autocast = torch.autocast(
            is_first.device.type, enabled=not plain and torch.is_autocast_enabled(is_first.device.type)
        )
        with scanning(self, told.dtype, wide), autocast:
            for step in zip(*(x.unbind(1) for x in (keep, acted, told, noise))):
                deter, stoch, out = self._observed(deter, stoch, *step)
                deters.append(deter)
                stochs.append(stoch)
                outs.append(out)
        states = {"deter": torch.stack(deters, 1), "stoch": torch.stack(stochs, 1)}  # T x (B, *) -> (B, T, *)
        return states, self.latent.stats(torch.stack(outs, 1))

    def loss(self, batch: Batch, phase: str, noise: Noise | None = None, states: bool = True) -> Fit:
        """DreamerV3's world-model loss (eq. 4 and 5), a mean over the rows of each sequence.

        `noise`: {"stoch": (B, T, S)}. ``Fit.states`` keep their gradients: the critic's loss on replayed states may
        reach the model through them.
        """
        B, T = batch.is_first.shape
        if noise is None:
            rng = torch.Generator(batch.reward.device).manual_seed(torch.initial_seed())
            noise = {"stoch": self.latent.noise((B, T), rng)}
        state, post = self.observe(batch.obs, batch.action, batch.is_first, noise["stoch"], batch.start)
        flat = {k: v.flatten(0, 1) for k, v in state.items()}  # (B,T,*) -> (B*T,*)
        features = self.features(flat)
        prior = self.latent.stats(self.prior_out(self.prior(state["deter"])))
        dyn = self.latent.kl({k: v.detach() for k, v in post.items()}, prior)
        rep = self.latent.kl(post, {k: v.detach() for k, v in prior.items()})
        losses = {name: value.unflatten(0, (B, T)) for name, value in self._decoded(features, batch).items()}
        reward = self.twohot.loss(self.reward(features), batch.reward.flatten()).unflatten(0, (B, T))
        losses["reward"] = self.reward_scale * reward
        going = (~batch.is_terminal).float()
        losses["cont"] = bernoulli_loss(self.cont(features).view(B, T), going)
        losses["dyn"] = self.dyn_scale * dyn.clamp(min=self.free_nats)
        losses["rep"] = self.rep_scale * rep.clamp(min=self.free_nats)
        mask = batch.mask.float()
        rows = mask.sum().clamp(min=1)
        total = (sum(losses.values()) * mask).sum(1) / mask.sum(1).clamp(min=1)
        metrics = {f"{name}_loss": (value.detach() * mask).sum() / rows for name, value in losses.items()}
        with torch.no_grad():
            metrics["kl"] = (dyn * mask).sum() / rows
            metrics["prior_entropy"] = (self.latent.entropy(prior) * mask).sum() / rows
            metrics["posterior_entropy"] = (self.latent.entropy(post) * mask).sum() / rows
        valid = (batch.mask & ~batch.is_terminal).flatten()
        return Fit(total * batch.weight, metrics, flat if states else {}, valid)

    def _decoded(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Squared errors of the reconstruction (B*T,), summed over what an observation has."""
        losses: dict[str, Tensor] = {}
        for name, value in self.decoder(features).items():
            if name in self.decoder.cnns:
                truth = batch.obs[name].flatten(0, 1).permute(0, 3, 1, 2).float() / 255  # (B,T,H,W,C) -> (B*T,C,H,W)
            else:
                truth = self.encoder.vector({n: batch.obs[n].flatten(0, 1) for n in self.encoder.vectors})
            losses[name] = (value - truth).square().flatten(1).sum(1)
        return losses


class Compact:
    """An RSSM that dreams in numbers of classes in place of one-hots, without gradients.

    State leaves: "deter" (B, D) and "stoch" (B, S) int64. Features (B, D + S): both.
    """

    def __init__(self, model: RSSM):
        self.model = model
        self.noise, self.outcomes = model.noise, model.outcomes
        self.scaling = model.scaling()  # as it is now: a dream is short

    def begin(self, state: State) -> State:
        """A state of the model, leaves (B, *), as one of this."""
        return {"deter": state["deter"], "stoch": self.model.latent.pack(state["stoch"]).long()}

    def features(self, state: State) -> Tensor:
        deter = self.model._seen(state["deter"], self.scaling)
        return torch.cat([deter, state["stoch"].to(deter.dtype)], -1)

    @fusible
    def advance(
        self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0
    ) -> tuple[State, Tensor, Tensor | None]:
        model = self.model
        own = model.post_norm.weight.dtype
        deter = model.core(state["deter"], state["stoch"], model.core.from_action(action.to(own)))
        stoch = model.latent.choose(model.prior_out(model.prior(deter.to(own))), noise["stoch"], temperature)
        state = {"deter": deter, "stoch": stoch}
        return state, self.features(state), None

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        state, features, _ = self.advance(state, action, noise, temperature)
        return Step(state, *self.outcomes(features))
