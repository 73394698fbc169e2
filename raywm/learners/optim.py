"""One optimiser for all of a Dreamer: adaptive gradient clipping, then LaProp or Adam, on one flat vector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

PMIN = 1e-3  # the least norm that a tensor counts as having in its clipping


class Optimiser:
    """Steps all parameters of `modules`, which it moves into one flat vector, as their gradients: a step is a dozen
    calls however many tensors there are, and several learners average one tensor.

    Each tensor's gradient is scaled down to `agc` times its weights' norm (Brock et al., arXiv 2102.06171, by tensor
    as DreamerV3 does); "laprop" (Ziyin et al., arXiv 2002.04839) normalises it by its running second moment before
    the momentum, "adam" after. The rate rises over `warmup` steps.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        lr: float,
        warmup: int = 1000,
        agc: float = 0.3,
        kind: str = "laprop",
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.lr, self.warmup, self.agc, self.kind, self.betas = lr, warmup, agc, kind, betas
        self.eps = 1e-20 if kind == "laprop" else 1e-8
        self.flat = torch.cat([p.detach().flatten() for p in parameters])
        self.grad = torch.zeros_like(self.flat)
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = 0
        # what changes from step to step, on the device: a CUDA graph repeats all else as it was
        self._debias, self._rate = self.flat.new_zeros(()), self.flat.new_zeros(())
        sizes = [p.numel() for p in parameters]
        self._weights, self._grads = list(self.flat.split(sizes)), list(self.grad.split(sizes))
        for p, weight, grad in zip(parameters, self._weights, self._grads):
            p.data, p.grad = weight.view_as(p), grad.view_as(p)  # from now on views of the flat ones

    def zero(self) -> None:
        self.grad.zero_()

    def step(self) -> Tensor:
        """One step along the gradients; returns their norm before the clipping."""
        self.count(self.steps + 1)
        return self.move()

    def count(self, steps: int) -> None:
        """The half of a step that depends on the number it has, from 1."""
        self.steps = steps
        b1, b2 = self.betas
        lr = self.lr * min(1.0, self.steps / max(1, self.warmup))
        self._debias.fill_(1 / (1 - b2**self.steps))
        self._rate.fill_(-lr / (1 - b1**self.steps))

    def move(self) -> Tensor:
        """The other half, the same calls on the same tensors every time."""
        norms = torch.stack(torch._foreach_norm(self._grads))
        if self.agc:
            most = self.agc * torch.stack(torch._foreach_norm(self._weights)).clamp(min=PMIN)
            scale = (most / norms.clamp(min=1e-20)).clamp(max=1.0)
            torch._foreach_mul_(self._grads, list(scale.unbind()))
        (b1, b2), grad = self.betas, self.grad
        self.second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = (self.second * self._debias).sqrt_().add_(self.eps)
        if self.kind == "laprop":
            self.first.lerp_(grad.div_(root), 1 - b1)
            self.flat.addcmul_(self.first, self._rate)
        else:
            self.first.lerp_(grad, 1 - b1)
            self.flat.addcdiv_(self.first * self._rate, root)
        return norms.norm()

    def tensors(self) -> dict[str, Tensor]:
        """What a step depends on besides the weights."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError for the tensors of another model."""
        if tensors["first"].shape != self.first.shape:
            raise ValueError(f"optimiser state of {tuple(tensors['first'].shape)}, expected {tuple(self.first.shape)}")
        self.first.copy_(tensors["first"])
        self.second.copy_(tensors["second"])
        self.steps = int(tensors["steps"])
