"""Linear layers inside a scan over time, whose weights get their gradient once and not at every step.

Plain autograd multiplies the inputs and the output gradients of every step and adds the T products, each as large as
the weights: at 64 steps of 16 rows that costs more than all else of the scan. Here each step keeps the two on a tape,
and one product over all T * B rows makes the gradient when the last step's has come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raywm.models.heads import columns

LARGE = 2**17  # weights; the few rows of a step are multiplied as fast in fp32 by fewer, without the casts
# Of a scan under way: the weights as the steps use them, their inputs, and their output gradients, last step first.
Tape = tuple[Tensor, list[Tensor], list[Tensor]]


class _Weight(torch.autograd.Function):
    """The weights (in, out), or of blocks (G, in, out), for all steps; its backward runs after theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.grads = inputs, grads
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, g = torch.cat(ctx.inputs, -2), torch.cat(ctx.grads[::-1], -2)  # T x (G, B, *) -> (G, T*B, *)
        ctx.grads.clear()  # of this pass; the inputs stay for another one over a retained graph
        return torch.matmul(x.mT, g), None, None


class _Product(torch.autograd.Function):
    """(B, in) @ (in, out), or both by blocks (G, ...), with nothing for the weights yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.grads = grads
        inputs.append(x.detach())
        return torch.matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        ctx.grads.append(grad)
        return torch.matmul(grad, weight.mT), None, None, None


class ScanLinear(nn.Module):
    """(B, in) -> (B, out) by a block-diagonal matrix of `blocks` blocks (1: an ordinary one), weights (G, in/G, out/G).

    With `parts` each block gives so many outputs of out/G, and the result is all blocks' first, all blocks' second, ...
    Inside ``scanning`` the gradient of the weights is made once. Without blocks, x may also be what one-hots stand for:
    numbers of classes (B, S).
    """

    def __init__(self, inputs: int, outputs: int, blocks: int = 1, parts: int = 1, bias: bool = False):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"got {blocks} blocks for {inputs} inputs, {outputs} outputs; expected a common divisor")
        self.blocks, self.parts = blocks, parts
        i, o = inputs // blocks, parts * outputs // blocks
        self.weight = nn.Parameter(torch.empty(blocks, i, o))
        self.bias = nn.Parameter(torch.zeros(parts * outputs)) if bias else None
        std = (2 / (i + o // parts)) ** 0.5 / 0.87962566103423978  # of a normal cut at 2 std, by mean of the fans
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        self.tape: Tape | None = None

    def _used(self) -> Tensor:
        """The weights as they multiply: of one block, a matrix."""
        return self.weight.squeeze(0) if self.blocks == 1 else self.weight

    def forward(self, x: Tensor) -> Tensor:
        G, casts = self.blocks, torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point():
            return F.embedding_bag(columns(x, self.weight.shape[1]), self.weight[0], mode="sum")
        grouped = x if G == 1 else x.unflatten(-1, (G, -1)).transpose(0, 1)  # (B, in) -> (G, B, in/G)
        if self.tape is None:
            # autocast's cache knows parameters, not views of them
            y = torch.matmul(grouped, self.weight if casts else self._used().to(x.dtype))
            if casts and G == 1:
                y = y.squeeze(0)
        else:
            weight, inputs, grads = self.tape
            y = _Product.apply(grouped.to(weight.dtype), weight, inputs, grads)
            y = y if casts else y.to(x.dtype)
        if G > 1:
            y = y.unflatten(-1, (self.parts, -1)).permute(1, 2, 0, 3).flatten(1)  # (G, B, P*o) -> (B, P*G*o)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextlib.contextmanager
def scanning(module: nn.Module, dtype: torch.dtype, large: torch.dtype | None = None) -> Iterator[None]:
    """Within, the `ScanLinear`s of a module multiply in `dtype` and put off the gradients of their weights. `large`:
    the type for those of more than ``LARGE`` weights. Without gradients it does nothing."""
    layers = [m for m in module.modules() if isinstance(m, ScanLinear)] if torch.is_grad_enabled() else []
    try:
        for layer in layers:
            inputs: list[Tensor] = []
            grads: list[Tensor] = []
            own = large if large and layer.weight.numel() > LARGE else dtype
            layer.tape = _Weight.apply(layer._used().to(own), inputs, grads), inputs, grads
        yield
    finally:
        for layer in layers:
            layer.tape = None
