"""A V-M for dreams alone: the same step as `VM.imagine`, without gradients, packed for speed.

At 1024 rows (latent 32, hidden 256) the matrix products of a step take 5 ms in fp32 on one core with AVX-512 but 0.8 ms
in bf16 with AMX, so what lies around them decides: a plain step casts its weights at every call, concatenates the input
of every layer, copies every bias over a whole output and walks outputs of 4 MB a dozen times, with page faults. Here

- weights are cast and laid out once; the first layers' biases are a row of their matrices;
- a step's input [z, h, a, 1, z'] is one buffer, which h' and z' enter in place: nothing is concatenated;
- the gates' products go to buffers that stay, and are finished block by block inside a core's own cache;
- only the picked component's mean and log std are read, and only there is their bias added;
- the reward's and the end's heads are one network of two layers.

What remains of a bf16 step: a third matrix products, a third the gates' pointwise work, the rest the mixture's draw,
the controllers and copies. States and pointwise arithmetic stay in fp32 (tanh and sigmoid are slower in bf16 on a CPU,
and a residual z would lose its small changes); the precision is that of the matrix products only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raywm.models.base import Noise, State, Step, Stepping

if TYPE_CHECKING:
    from raywm.models.vm import VM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 256  # rows a thread whose gates fit a core's own cache


class PackedVM(Stepping):
    """Dreams like the VM it was built from, whose weights it copies. A state has one more leaf than the VM's, "zh", of
    which "z" and "h" are views; states without it are taken as well. Not to be shared between threads."""

    def __init__(self, model: VM, precision: str = "fp32"):
        if precision not in DTYPES:
            raise ValueError(f"got dream.precision={precision!r}, expected one of {sorted(DTYPES)}")
        self.model, self.dtype = model, DTYPES[precision]
        self.feat_dim, self.act_dim, self.initial, self.noise = (
            model.feat_dim,
            model.act_dim,
            model.initial,
            model.noise,
        )
        self.latent, self.hidden, self.mixtures = model.latent, model.hidden, model.memory.mixtures
        self.groups = 1 if model.memory.joint else model.latent  # mixtures a step
        self.buffers: _Buffers | None = None
        with torch.no_grad():
            self._pack()

    def _pack(self) -> None:
        """The VM's weights as matrices (in, out) over columns [z, h, a, 1, z'], or over a hidden layer."""
        vm, m = self.model, self.model.memory
        lstm: Any = m.lstm
        mixture, reward, end = (
            [layer for layer in net if isinstance(layer, nn.Linear)] for net in (m.mixture, m.reward, m.end)
        )
        z, h, a, k = self.latent, self.hidden, self.act_dim, self.mixtures

        def matrix(weight: Tensor) -> Tensor:
            return weight.t().to(self.dtype).contiguous()

        def head(layer: nn.Linear) -> Tensor:
            """A head's first layer, which sees [h, z, a] and perhaps z'."""
            of_h, of_z, of_a, of_after = layer.weight.tensor_split([h, h + z, h + z + a], 1)
            return torch.cat([of_z, of_h, of_a, layer.bias.unsqueeze(1), of_after], 1)

        def components(normal: Tensor) -> Tensor:
            """(Z*K, *) -> (G, K, Z/G, *): a component's numbers side by side; G mixtures, of Z/G dimensions each."""
            return normal.view(self.groups, z // self.groups, k, *normal.shape[1:]).transpose(1, 2)

        of_z, of_a = lstm.weight_ih_l0.split([z, a], 1)
        bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).unsqueeze(1)
        i, f, g, o = torch.cat([of_z, lstm.weight_hh_l0, of_a, bias], 1).chunk(4)
        self.gates, self.update = matrix(torch.cat([i, f, o])), matrix(g)
        self.mixture = matrix(head(mixture[0]))
        logits, mean, logstd = mixture[1].weight.split(m.head_sizes)
        logits_bias, mean_bias, logstd_bias = mixture[1].bias.split(m.head_sizes)
        self.logits, self.logits_bias = matrix(logits), logits_bias.clone()
        self.normals = matrix(torch.stack([components(mean), components(logstd)], 2).flatten(0, 3))
        self.normals_bias = torch.stack([components(mean_bias), components(logstd_bias)], 2).flatten(0, 1).flatten(1)
        self.arrival = matrix(torch.cat([head(reward[0]), head(end[0])]))
        self.outcome = matrix(torch.block_diag(reward[1].weight, end[1].weight))
        self.reward_mean = vm.reward_mean + reward[1].bias * vm.reward_scale
        self.end_shift = vm.end_shift - end[1].bias
        self.reward_scale, self.reward_range = vm.reward_scale.clone(), vm.reward_range.clone()
        self.target_mean, self.target_scale = vm.target_mean.clone(), vm.target_scale.clone()
        self.carry, self.z_low, self.z_high = vm.carry.clone(), vm.z_low.clone(), vm.z_high.clone()

    def features(self, state: State) -> Tensor:
        return state["zh"] if self.model.feature_kind == "zh" and "zh" in state else self.model.features(state)

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        rows, device = len(action), action.device
        b = self.buffers
        if b is None or b.rows != rows:
            b = self.buffers = _Buffers(self, rows, device)
        b.zh.copy_(state["zh"] if "zh" in state else torch.cat([state["z"], state["h"]], -1))
        b.action.copy_(action)
        zh = torch.empty(rows, self.latent + self.hidden, device=device)
        z, h = zh.split([self.latent, self.hidden], -1)
        c = self._tick(b, state["c"], h)
        b.h.copy_(h)
        draw = self._draw(b, noise, temperature)
        torch.addcmul(draw, state["z"], self.carry, out=z).clamp_(self.z_low, self.z_high)
        b.after.copy_(z)
        hidden = F.silu(b.row @ self.arrival, inplace=True)
        reward, end = (hidden @ self.outcome).float().unbind(1)
        reward = torch.addcmul(self.reward_mean, reward, self.reward_scale).clamp_(*self.reward_range)
        return Step({"z": z, "h": h, "c": c, "zh": zh}, reward, torch.sigmoid(self.end_shift - end))

    def _tick(self, b: _Buffers, c: Tensor, h: Tensor) -> Tensor:
        """The LSTM: c (B, H) -> c, and h (B, H) where it belongs."""
        torch.mm(b.seen, self.gates, out=b.gates)
        torch.mm(b.seen, self.update, out=b.update)
        after = torch.empty_like(c)
        parts = (x.split(b.block) for x in (b.gates, b.update, c, after, h))
        for gates, update, before, now, out in zip(*parts, strict=True):
            gates, update = b.fp32(gates, update)
            i, f, o = gates.sigmoid_().chunk(3, -1)
            torch.mul(before, f, out=now).addcmul_(i, update.tanh_())
            torch.mul(o, torch.tanh(now, out=update), out=out)
        return after

    def _draw(self, b: _Buffers, noise: Noise, temperature: float) -> Tensor:
        """A draw from the mixture, (B, Z) in units of z. See `MDNRNN.sample`."""
        hidden = F.silu(b.seen @ self.mixture, inplace=True)
        logits = ((hidden @ self.logits).float() + self.logits_bias).view(-1, self.mixtures)  # (B*G, K)
        mass = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_().cumsum(-1)
        pick = (mass < noise["pick"].view(-1, 1) * mass[:, -1:]).sum(-1)  # (B*G,)
        normals = (hidden @ self.normals).view(len(mass) * self.mixtures, -1)  # (B*G*K, 2*Z/G)
        picked = normals.index_select(0, pick + b.mixture).float() + self.normals_bias.index_select(0, pick + b.group)
        mean, logstd = picked.chunk(2, -1)
        std = logstd.clamp(-6.0, 4.0).exp_().mul_(math.sqrt(temperature))
        draw = torch.addcmul(mean, std, noise["z"].view_as(std)).view(-1, self.latent)
        return torch.addcmul(self.target_mean, draw, self.target_scale)


class _Buffers:
    """What a step of `rows` rows writes and the next may overwrite, and its parts: fresh megabytes cost page faults,
    and a view as much time as a small operation."""

    def __init__(self, model: PackedVM, rows: int, device: torch.device):
        z, h, a = model.latent, model.hidden, model.act_dim
        self.rows, self.block = rows, BLOCK * torch.get_num_threads()
        self.row = torch.ones(rows, z + h + a + 1 + z, dtype=model.dtype, device=device)
        self.zh, self.action, _, self.after = self.row.split([z + h, a, 1, z], -1)
        self.h, self.seen = self.zh[:, z:], self.row[:, : z + h + a + 1]
        self.gates = self.row.new_empty(rows, 3 * h)
        self.update = self.row.new_empty(rows, h)
        self.wide = torch.empty(min(rows, self.block), 4 * h, device=device)
        mixtures = torch.arange(rows * model.groups, device=device)
        self.mixture, self.group = mixtures * model.mixtures, mixtures % model.groups * model.mixtures

    def fp32(self, gates: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """A block of gates to work on: itself, or a copy if it is narrower."""
        if gates.dtype == torch.float32:
            return gates, update
        n = gates.shape[1]
        wide = self.wide[: len(gates)]
        return wide[:, :n].copy_(gates), wide[:, n:].copy_(update)
