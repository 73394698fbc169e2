"""V and M of World Models (Ha & Schmidhuber, arXiv 1803.10122): a vision and an MDN-RNN memory.

Vision is, for each observation column, nothing at all (`identity`: standardised vectors), an MLP-VAE or a convolutional
VAE; z is their latents side by side. Memory is an LSTM whose output gives a mixture of Gaussians for the next z, and
two heads for reward and continuation. The timing rule: (z[t], action[t+1]) -> (z[t+1], reward[t+1], cont[t+1]), and on
a first row the cell is not ticked, h is 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raywm.models.base import Fit, Noise, State, Step, WorldModel
from raywm.models.nets import MLPVAE, ConvVAE, Standardise, mlp
from raywm.models.packed import PackedVM

if TYPE_CHECKING:
    from raywm.data.batch import Batch

LOG_2PI = math.log(2 * math.pi)


def positive(std: Tensor) -> Tensor:
    """What does not vary keeps scale 1: dividing by its rounding noise would blow it up."""
    return torch.where(std > 1e-6, std, torch.ones_like(std))


class Vision(nn.Module):
    """All observation columns to one latent. `columns` maps each name to (shape, is_image)."""

    def __init__(self, columns: dict[str, tuple[tuple[int, ...], bool]], kind: str, latent: int):
        super().__init__()
        nets: Any = nn.ModuleDict()  # of Standardise, MLPVAE or ConvVAE
        self.nets = nets
        for name, (shape, image) in columns.items():
            if image:
                if kind not in ("auto", "conv"):
                    raise ValueError(f"got model.vision={kind} for the images of {name!r}; expected auto or conv")
                self.nets[name] = ConvVAE(shape, latent)
            elif kind == "mlp":
                self.nets[name] = MLPVAE(shape[0], latent)
            elif kind in ("auto", "identity") or any(i for _, i in columns.values()):
                self.nets[name] = Standardise(shape[0])
            else:
                raise ValueError(f"got model.vision={kind} for the vector {name!r}; expected auto, identity or mlp")
        self.latent = sum(net.latent for net in self.nets.values())
        self.learns = any(not isinstance(net, Standardise) for net in self.nets.values())

    def encode(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Leaves (N, *) -> mean and standard deviation of the posterior, (N, Z) each."""
        parts = [net(obs[name]) for name, net in self.nets.items()]
        return torch.cat([m for m, _ in parts], -1), torch.cat([s for _, s in parts], -1)

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        sizes = [net.latent for net in self.nets.values()]
        parts = z.split(sizes, -1)
        return {name: net.decode(part) for (name, net), part in zip(self.nets.items(), parts, strict=True)}


class MDNRNN(nn.Module):
    """LSTM -> mixture of K Gaussians for the next z: one a latent dimension (the paper) or one joint mixture."""

    def __init__(self, latent: int, act_dim: int, hidden: int, mixtures: int, joint: bool, head_hidden: int):
        super().__init__()
        self.latent, self.hidden, self.mixtures, self.joint = latent, hidden, mixtures, joint
        lstm: Any = nn.LSTM(latent + act_dim, hidden, batch_first=True)  # its type does not know its weights
        self.lstm = lstm
        nn.init.orthogonal_(self.lstm.weight_hh_l0)
        with torch.no_grad():
            self.lstm.bias_hh_l0.zero_()
            self.lstm.bias_ih_l0.zero_()[hidden : 2 * hidden] = 1.0  # remember at first
        logits = mixtures if joint else mixtures * latent
        self.head_sizes = [logits, mixtures * latent, mixtures * latent]
        # the mixture sees z and the action as well as h: what a step changes need not pass through the cell
        self.mixture = mlp([hidden + latent + act_dim, head_hidden, sum(self.head_sizes)])
        with torch.no_grad():  # components that begin alike learn alike, and one mode hides the other
            self.mixture[-1].get_parameter("bias")[logits : logits + mixtures * latent].normal_()
        self.reward = mlp([hidden + 2 * latent + act_dim, head_hidden, 1])
        self.end = mlp([hidden + 2 * latent + act_dim, head_hidden, 1])

    def cell(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One tick of the LSTM: (B, Z + A), (B, H), (B, H) -> h, c."""
        p = self.lstm
        return torch.lstm_cell(x, (h, c), p.weight_ih_l0, p.weight_hh_l0, p.bias_ih_l0, p.bias_hh_l0)

    def split(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Head output (..., *) -> logits (..., 1 or Z, K), mean and log std (..., Z, K)."""
        logits, mean, logstd = out.split(self.head_sizes, -1)
        mean = mean.unflatten(-1, (self.latent, self.mixtures))
        logstd = logstd.unflatten(-1, (self.latent, self.mixtures))
        logits = logits.unflatten(-1, (1 if self.joint else self.latent, self.mixtures))
        return logits, mean, logstd.clamp(-6.0, 4.0)

    def log_prob(self, out: Tensor, target: Tensor) -> Tensor:
        """log p(target) in nats: (..., *), (..., Z) -> (...,)."""
        logits, mean, logstd = self.split(out)
        log_normal = -0.5 * ((target.unsqueeze(-1) - mean) * (-logstd).exp()) ** 2 - logstd - 0.5 * LOG_2PI
        if self.joint:
            log_normal = log_normal.sum(-2, keepdim=True)  # (..., Z, K) -> (..., 1, K)
        return torch.logsumexp(F.log_softmax(logits, -1) + log_normal, -1).sum(-1)

    def sample(self, out: Tensor, noise: Noise, temperature: float) -> Tensor:
        """Temperature divides the mixture's logits and scales sigma by its square root."""
        logits, mean, logstd = self.split(out)
        weights = F.softmax(logits / temperature, -1)  # (B, 1 or Z, K)
        pick = (weights.cumsum(-1) < noise["pick"].unsqueeze(-1)).sum(-1).clamp_(max=self.mixtures - 1)
        pick = pick.unsqueeze(-1).expand(-1, self.latent, 1)  # (B, Z, 1)
        mean, logstd = mean.gather(-1, pick).squeeze(-1), logstd.gather(-1, pick).squeeze(-1)
        return mean + logstd.exp() * math.sqrt(temperature) * noise["z"]


class VM(WorldModel):
    """Vision and memory.

    Args:
        columns: observation columns, name -> (shape, is_image).
        act_dim: size of an encoded action.
        vision: auto | identity | mlp | conv.
        latent: size of a VAE's latent (identity keeps the vector's own size).
        beta, free_bits: weight of the KL term; nats a latent dimension that are free.
        hidden, mixtures, joint, head_hidden: the memory's sizes; one joint mixture or one a latent dimension.
        residual: M predicts z[t+1] - z[t] instead of z[t+1]; "auto": for vectors as they are, not for a VAE's latents,
            where a walk of differences leaves what the VAE knows and explodes.
        terminal_weight: weight of terminal rows in the continuation loss. The head's log-odds are corrected by it in
            `imagine`, so that `cont` stays a calibrated probability.
        features: what a controller sees: "zh", "zhc" or "z".
    """

    carry: Tensor
    z_low: Tensor
    z_high: Tensor
    target_mean: Tensor
    target_scale: Tensor
    reward_mean: Tensor
    reward_scale: Tensor
    reward_range: Tensor

    def __init__(
        self,
        columns: dict[str, tuple[tuple[int, ...], bool]],
        act_dim: int,
        *,
        vision: str = "auto",
        latent: int = 32,
        beta: float = 1.0,
        free_bits: float = 0.0,
        hidden: int = 256,
        mixtures: int = 5,
        joint: bool = True,
        residual: bool | str = "auto",
        terminal_weight: float = 10.0,
        head_hidden: int = 128,
        features: str = "zh",
    ):
        super().__init__()
        self.vision = Vision(columns, vision, latent)
        z = self.vision.latent
        self.memory = MDNRNN(z, act_dim, hidden, mixtures, joint, head_hidden)
        self.beta, self.free_bits = beta, free_bits
        self.end_shift = math.log(terminal_weight)
        self.latent, self.hidden, self.act_dim, self.feature_kind = z, hidden, act_dim, features
        self.feat_dim = {"z": z, "zh": z + hidden, "zhc": z + 2 * hidden}[features]
        self.phases = ("vision", "memory") if self.vision.learns else ("memory",)
        nets = list(self.vision.nets.values())
        carries = [isinstance(n, Standardise) if residual == "auto" else bool(residual) for n in nets]
        parts = [torch.full((n.latent,), float(c)) for n, c in zip(nets, carries, strict=True)]
        self.register_buffer("carry", torch.cat(parts))  # 1 where M predicts a difference
        self.register_buffer("z_low", torch.full((z,), -math.inf))
        self.register_buffer("z_high", torch.full((z,), math.inf))
        self.register_buffer("target_mean", torch.zeros(z))  # of M's targets, z[t+1] - carry * z[t]
        self.register_buffer("target_scale", torch.ones(z))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("reward_range", torch.tensor([-math.inf, math.inf]))

    # ------------------------------------------------------------------------------------------------ state

    def initial(self, batch: int) -> State:
        p = self.target_mean
        return {
            "z": p.new_zeros(batch, self.latent),
            "h": p.new_zeros(batch, self.hidden),
            "c": p.new_zeros(batch, self.hidden),
        }

    def noise(self, batch: int, rng: torch.Generator) -> Noise:
        dev = rng.device
        picks = (batch, 1) if self.memory.joint else (batch, self.latent)
        return {
            "z": torch.randn(batch, self.latent, generator=rng, device=dev),
            "pick": torch.rand(*picks, generator=rng, device=dev),
        }

    def zero_noise(self, batch: int) -> Noise:
        p = self.target_mean
        picks = 1 if self.memory.joint else self.latent
        return {"z": p.new_zeros(batch, self.latent), "pick": p.new_full((batch, picks), 0.5)}

    def features(self, state: State) -> Tensor:
        return state["z"] if self.feature_kind == "z" else torch.cat([state[k] for k in self.feature_kind], -1)

    def posterior(
        self, state: State, prev_action: Tensor, obs: dict[str, Tensor], is_first: Tensor, noise: Noise
    ) -> State:
        mean, std = self._encoded(obs)
        h, c = self.memory.cell(torch.cat([state["z"], prev_action], -1), state["h"], state["c"])
        keep = (~is_first).float().unsqueeze(-1)  # a first row does not tick the cell: h is 0 there
        return {"z": mean + std * noise["z"], "h": h * keep, "c": c * keep}

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        x = torch.cat([state["z"], action], -1)
        h, c = self.memory.cell(x, state["h"], state["c"])
        hx = torch.cat([h, x], -1)
        z = self.memory.sample(self.memory.mixture(hx), noise, temperature) * self.target_scale + self.target_mean
        z = torch.addcmul(z, state["z"], self.carry).clamp(self.z_low, self.z_high)
        hxz = torch.cat([hx, z], -1)
        reward = self.memory.reward(hxz).squeeze(-1) * self.reward_scale + self.reward_mean
        reward = reward.clamp(self.reward_range[0], self.reward_range[1])
        cont = torch.sigmoid(self.end_shift - self.memory.end(hxz).squeeze(-1))
        return Step({"z": z, "h": h, "c": c}, reward, cont)

    def dreamer(self, precision: str = "fp32") -> PackedVM:
        return PackedVM(self, precision)

    def decode(self, state: State) -> dict[str, Tensor]:
        return self.vision.decode(state["z"])

    def encode(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, std = self.vision.encode(obs)
        return {"z_mean": mean, "z_std": std}

    def _encoded(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Observations as they are, or as `encode` has left them."""
        return (obs["z_mean"], obs["z_std"]) if "z_mean" in obs else self.vision.encode(obs)

    def adapt(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Columns' {"mean", "std"} set the standardisation; those of "reward", and of "z" and "delta" once frames are
        encoded, set the scales of M's targets."""
        for name, net in self.vision.nets.items():
            if name in statistics and hasattr(net, "set_scale"):
                net.set_scale(statistics[name]["mean"], statistics[name]["std"])
        if "z" in statistics:
            z, delta, carry = statistics["z"], statistics["delta"], self.carry.bool()
            self.target_mean.copy_(torch.where(carry, delta["mean"], z["mean"]))
            self.target_scale.copy_(positive(torch.where(carry, delta["std"], z["std"])))
            width = z["max"] - z["min"]  # a dream may leave the data by its own width, not go to infinity
            self.z_low.copy_(z["min"] - width)
            self.z_high.copy_(z["max"] + width)
        if "reward" in statistics:
            self.reward_mean.copy_(statistics["reward"]["mean"])
            self.reward_scale.copy_(positive(statistics["reward"]["std"]))
            # a dream may promise what was received, not whatever the head extrapolates to: controllers go and find it
            self.reward_range.copy_(torch.stack([statistics["reward"]["min"], statistics["reward"]["max"]]))

    # ------------------------------------------------------------------------------------------------ losses

    def loss(self, batch: Batch, phase: str, noise: Noise | None = None, states: bool = True) -> Fit:
        """`noise`, if given: "z" (B, T, Z), or a column's name, standard normal draws that make samples of z.
        `states=False` leaves out the recurrent states, which cost a second pass over the gates."""
        if phase == "vision":
            return self._vision_loss(batch, noise)
        return self._memory_loss(batch, noise, states)

    def _vision_loss(self, batch: Batch, noise: Noise | None) -> Fit:
        """A VAE with the optimal Gaussian decoder variance (sigma-VAE, arXiv 2006.13202, eq. 8): D/2 log MSE + KL.

        With a fixed variance small moving things, which are what kills, are not worth their KL."""
        rows, steps = batch.reward.shape
        total = batch.reward.new_zeros(rows * steps)
        metrics: dict[str, Tensor] = {}
        latents = []
        for name, net in self.vision.nets.items():
            x = batch.obs[name].flatten(0, 1)  # (B, T, *) -> (B*T, *)
            mean, std = net(x)
            eps = torch.randn_like(mean) if noise is None else noise[name].flatten(0, 1)
            z = mean + std * eps
            latents.append(z)
            if isinstance(net, Standardise):
                continue
            error = (net.reconstruct(z) - net.target(x)).square().flatten(1)  # (N, D)
            mse = error.mean().detach().clamp(min=1e-6)
            kl = 0.5 * (mean.square() + std.square() - 1) - std.log()  # (N, Z)
            kl = (kl * (kl.mean(0) > self.free_bits)).sum(-1)  # a dimension below its free bits is not pulled at all
            # a Gaussian's log-likelihood with the batch's own MSE as its variance: the gradient of D/2 log MSE
            total = total + 0.5 * (error / mse + mse.log()).sum(-1) + self.beta * kl
            metrics |= {f"{name}_mse": mse, f"{name}_kl": kl.mean().detach()}
        states = self.initial(rows * steps) | {"z": torch.cat(latents, -1).detach()}
        valid = batch.mask.flatten() & ~batch.is_terminal.flatten()
        return Fit(total.unflatten(0, (rows, steps)).mean(1), metrics, states, valid)

    def _memory_loss(self, batch: Batch, noise: Noise | None, want_states: bool) -> Fit:
        rows, steps = batch.reward.shape
        mean, std = self._encoded({k: v.flatten(0, 1) for k, v in batch.obs.items()})
        eps = torch.randn_like(mean) if noise is None else noise["z"].flatten(0, 1)
        z = (mean + std * eps).unflatten(0, (rows, steps)).detach()  # M must not reshape V's latent
        x = torch.cat([z[:, :-1], batch.action[:, 1:]], -1)  # (B, T-1, Z+A)
        start = None if batch.start is None else (batch.start["h"].unsqueeze(0), batch.start["c"].unsqueeze(0))
        h, _ = self.memory.lstm(x, start)
        hx = torch.cat([h, x], -1)
        target = z[:, 1:] - self.carry * z[:, :-1]
        log_prob = self.memory.log_prob(self.memory.mixture(hx), (target - self.target_mean) / self.target_scale)
        nll = self.target_scale.log().sum() - log_prob  # (B, T-1), nats of z
        hxz = torch.cat([hx, z[:, 1:]], -1)
        reward = self.memory.reward(hxz).squeeze(-1)
        reward_error = reward - (batch.reward[:, 1:] - self.reward_mean) / self.reward_scale
        end = self.memory.end(hxz).squeeze(-1)
        terminal = batch.is_terminal[:, 1:]
        weight = 1 + terminal * (math.exp(self.end_shift) - 1)
        end_loss = F.binary_cross_entropy_with_logits(end, terminal.float(), reduction="none") * weight
        mask = batch.mask[:, 1:].float()  # a pair counts if its arrival row is real
        count = mask.sum().clamp(min=1)
        each = nll / self.latent + 0.5 * reward_error.square() + end_loss
        predicted = (end > self.end_shift) & batch.mask[:, 1:]
        real = terminal & batch.mask[:, 1:]
        hits = (predicted & real).sum()
        metrics = {
            "nll": (nll * mask).sum() / count / self.latent,
            "reward_mse": (reward_error.square() * mask).sum() / count * self.reward_scale.square(),
            "end_bce": (end_loss * mask).sum() / count,
            "terminal_hits": hits,
            "terminal_real": real.sum(),
            "terminal_predicted": predicted.sum(),
        }
        states = self._states(z, x, h, start) if want_states else {}
        valid = batch.mask.flatten() & ~batch.is_terminal.flatten()
        return Fit((each * mask).sum(1) * rows / count, {k: v.detach() for k, v in metrics.items()}, states, valid)

    @torch.no_grad()
    def _states(self, z: Tensor, x: Tensor, h: Tensor, start: tuple[Tensor, Tensor] | None) -> State:
        """The state at every row. nn.LSTM keeps only the last c, but with every h known all gates are one product."""
        zero = h.new_zeros(1, h.shape[0], self.hidden)
        h0, c = (zero, zero) if start is None else start
        h = torch.cat([h0.transpose(0, 1), h], 1)  # (B, T, H)
        p = self.memory.lstm
        gates = x @ p.weight_ih_l0.T + h[:, :-1] @ p.weight_hh_l0.T + p.bias_ih_l0 + p.bias_hh_l0
        i, f, g, _ = gates.chunk(4, -1)
        update, keep = i.sigmoid() * g.tanh(), f.sigmoid()
        cells = [c[0]]
        for t in range(x.shape[1]):
            cells.append(keep[:, t] * cells[-1] + update[:, t])
        return {"z": z.flatten(0, 1), "h": h.flatten(0, 1), "c": torch.stack(cells, 1).flatten(0, 1)}
