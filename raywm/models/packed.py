"""A V-M for dreams alone: the same step as `VM.imagine`, without gradients, packed for speed.

At 1024 rows (latent 32, hidden 256) the matrix products of a step take 5 ms in fp32 on one core with AVX-512 and 0.6 ms
in bf16 with AMX, so what lies around them decides. A plain step casts its weights again at every call, concatenates
the input of every layer, copies every bias into an output of 4 MB and walks the gates eight times. Here

- weights are cast and laid out once, biases being a row of their matrices;
- a step's input [z, h, a, 1, z'] is one buffer, which h' and z' enter in place: nothing is concatenated;
- the four gates are one product into a buffer that stays; three sigmoids and two tanhs are each one contiguous walk;
- only the picked component's mean and log std are read;
- the reward's and the end's heads are one two-layer network.

State and pointwise arithmetic stay in fp32 (tanh and sigmoid are no faster in bf16 on a CPU, and a residual z would lose
its small changes); precision is that of the matrix products only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raywm.models.base import Noise, State, Step

if TYPE_CHECKING:
    from raywm.models.vm import VM

BLOCK = 256  # rows whose gates fit a core's own cache: pointwise passes over all of them are bound by memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PackedVM:
    """Dreams like the VM it was built from, whose weights it copies. States are the VM's with one more leaf, "zh",
    of which "z" and "h" are views; states without it are taken as well.

    Not to be shared between threads: a step's widest tensors are kept for the next.
    """

    def __init__(self, model: VM, precision: str = "fp32"):
        if precision not in DTYPES:
            raise ValueError(f"got dream.precision={precision!r}, expected one of {sorted(DTYPES)}")
        self.model, self.dtype = model, DTYPES[precision]
        self.feat_dim, self.act_dim, self.initial, self.noise = model.feat_dim, model.act_dim, model.initial, model.noise
        self.latent, self.hidden = model.latent, model.hidden
        self.groups = 1 if model.memory.joint else model.latent  # mixtures a step
        self.mixtures = model.memory.mixtures
        self.scratch: dict[str, Tensor] = {}
        with torch.no_grad():
            self._pack()

    def _pack(self) -> None:
        """The VM's weights as matrices from rows [z, h, a, 1, z'] or from hidden rows."""
        m, model = self.model.memory, self.model
        z, h, a, k = self.latent, self.hidden, self.act_dim, self.mixtures
        p = m.lstm
        x = p.weight_ih_l0  # (4H, Z + A), gates i, f, g, o
        gates = torch.cat([x[:, :z], p.weight_hh_l0, x[:, z:], (p.bias_ih_l0 + p.bias_hh_l0).unsqueeze(1)], 1)
        i, f, g, o = gates.chunk(4)
        self.gates, self.update = self._matrix(torch.cat([i, f, o])), self._matrix(g)

        def first(layer: nn.Linear) -> Tensor:
            """A head's first layer sees [h, z, a] and perhaps z'."""
            w = layer.weight
            return torch.cat([w[:, h : h + z], w[:, :h], w[:, h + z : h + z + a], layer.bias.unsqueeze(1), w[:, h + z + a :]], 1)

        one, _, two = m.mixture
        self.mixture = self._matrix(first(one))
        logits, mean, logstd = two.weight.split(m.head_sizes)
        bias_logits, bias_mean, bias_logstd = two.bias.split(m.head_sizes)
        # one row of 2Z (or, a mixture each, 2) numbers a component: mean, then log std
        order = lambda w: w.view(self.groups, -1, k, *w.shape[1:]).transpose(1, 2)  # noqa: E731  (G, Z/G, K) -> (G, K, Z/G)
        self.logits = self._matrix(logits), bias_logits.detach().to(self.dtype)
        self.normals = (
            self._matrix(torch.stack([order(mean), order(logstd)], 2).flatten(0, 3)),
            torch.stack([order(bias_mean), order(bias_logstd)], 2).flatten().to(self.dtype),
        )
        self.arrive = self._matrix(torch.cat([first(m.reward[0]), first(m.end[0])]))
        self.outcome = (
            self._matrix(torch.block_diag(m.reward[2].weight, m.end[2].weight)),
            torch.cat([m.reward[2].bias, m.end[2].bias]).to(self.dtype),
        )
        self.width, self.seen = z + h + a + 1 + z, z + h + a + 1
        self.scales = model.target_mean, model.target_scale, model.reward_mean, model.reward_scale

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().t().to(self.dtype).contiguous()  # (out, in) -> (in, out)

    def _kept(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A buffer that outlives the step: fresh megabytes cost their page faults, every time."""
        buffer = self.scratch.get(name)
        if buffer is None or len(buffer) < rows:
            buffer = self.scratch[name] = torch.empty(rows, columns, dtype=dtype, device=self.gates.device)
        return buffer[:rows]

    def features(self, state: State) -> Tensor:
        if self.model.feature_kind == "zh" and "zh" in state:
            return state["zh"]
        return self.model.features(state)

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        z, c = state["z"], state["c"]
        rows, zs, seen = z.shape[0], self.latent, self.seen
        row = self._kept("row", rows, self.width, self.dtype)  # [z, h, a, 1, z']
        row[:, : zs + self.hidden] = state["zh"] if "zh" in state else torch.cat([z, state["h"]], -1)
        row[:, zs + self.hidden : seen - 1] = action
        row[:, seen - 1] = 1.0
        zh = torch.empty(rows, zs + self.hidden, device=z.device)
        h, c = self._tick(row[:, :seen], c, zh[:, zs:])
        row[:, zs : zs + self.hidden] = h
        after = self._sample(row[:, :seen], noise, temperature)
        target_mean, target_scale, reward_mean, reward_scale = self.scales
        after = torch.addcmul(target_mean, after, target_scale)
        after = torch.add(z, after, out=zh[:, :zs]) if self.model.residual else zh[:, :zs].copy_(after)
        row[:, seen:] = after
        hidden = nn.functional.silu(row @ self.arrive, inplace=True)
        reward, end = torch.addmm(self.outcome[1], hidden, self.outcome[0]).float().unbind(1)
        reward = torch.addcmul(reward_mean, reward, reward_scale)
        return Step({"z": after, "h": h, "c": c, "zh": zh}, reward, torch.sigmoid(self.model.end_shift - end))

    def _tick(self, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM: input rows and c (B, H) -> h, written where it belongs, and c."""
        n, after = self.hidden, torch.empty_like(c)
        gates, updates = self._product("gates", x, self.gates), self._product("update", x, self.update)
        for at in range(0, len(x), BLOCK):
            rows = slice(at, at + BLOCK)
            gate, update = self._fp32("gates", gates[rows]).sigmoid_(), self._fp32("update", updates[rows]).tanh_()
            i, f, o = gate[:, :n], gate[:, n : 2 * n], gate[:, 2 * n :]
            torch.mul(c[rows], f, out=after[rows]).addcmul_(i, update)
            torch.mul(o, torch.tanh(after[rows], out=update), out=h[rows])
        return h, after

    def _product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight, out=self._kept(name, len(x), weight.shape[1], self.dtype))

    def _fp32(self, name: str, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return x
        return self._kept(name + " fp32", *x.shape, torch.float32).copy_(x)

    def _sample(self, x: Tensor, noise: Noise, temperature: float) -> Tensor:
        """A draw from the mixture (B, Z), in units of the target. See `MDNRNN.sample`."""
        hidden = nn.functional.silu(x @ self.mixture, inplace=True)
        logits = torch.addmm(self.logits[1], hidden, self.logits[0]).float().view(-1, self.mixtures)  # (B*G, K)
        normals = torch.addmm(self.normals[1], hidden, self.normals[0])  # (B, G*K*2*Z/G)
        mass = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_().cumsum(-1)
        pick = (mass < noise["pick"].view(-1, 1) * mass[:, -1:]).sum(-1)
        pick += torch.arange(0, len(mass) * self.mixtures, self.mixtures, device=pick.device)
        picked = normals.view(len(mass) * self.mixtures, -1).index_select(0, pick).float()  # (B*G, 2*Z/G)
        mean, logstd = picked.chunk(2, -1)
        std = logstd.clamp(-6.0, 4.0).exp_().mul_(math.sqrt(temperature))
        return torch.addcmul(mean, std, noise["z"].view_as(std)).view(len(x), -1)
