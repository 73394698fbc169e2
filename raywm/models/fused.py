"""Chains of small calls between matrix products, compiled into few kernels where a learner asks for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])
SHAPES = 64  # and types that one function may be compiled for, in place of torch's 8: the scan's, the dream's, ...
_fusing: ContextVar[bool] = ContextVar("fusing", default=False)


@contextlib.contextmanager
def fusing(on: bool = True) -> Iterator[None]:
    """Within, ``fusible`` functions are compiled ones, and so are their gradients."""
    before = _fusing.set(on)
    try:
        with torch._dynamo.config.patch(cache_size_limit=SHAPES) if on else contextlib.nullcontext():
            yield
    finally:
        _fusing.reset(before)


def fusible(function: Function) -> Function:
    """A function of tensors that ``torch.compile`` makes one piece of inside ``fusing``: an error where it cannot."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _fusing.get():  # within a larger piece it is part of that
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    @functools.cache
    def compiled() -> Callable[..., Any]:  # not before it is asked for: the compiler takes seconds to import
        return torch.compile(function, fullgraph=True, dynamic=False)

    return call  # type: ignore[return-value]


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where ``torch.compile`` cannot compile for a device."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # whatever its toolchain raises: no g++, no triton, no Python headers
        lines = [line.strip() for line in str(error).splitlines()]
        what = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        raise ValueError(
            f"dreamer.compile: got true, but torch.compile cannot compile for {device} here ({what}); expected false, "
            "or a C++ compiler for CPUs and triton for GPUs"
        ) from error


@fusible
def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, also: Tensor | None = None) -> Tensor:
    """SiLU of the LayerNorm of x (..., D), or of x + also."""
    return F.silu(F.layer_norm(x if also is None else x + also, weight.shape, weight, bias, eps))


def activated(norm: nn.LayerNorm, x: Tensor, also: Tensor | None = None) -> Tensor:
    """``normed`` by a layer."""
    return normed(x, norm.weight, norm.bias, norm.eps, also)


class Activated(nn.Sequential):
    """A linear layer and a LayerNorm, and ``activated`` by it."""

    def forward(self, x: Tensor) -> Tensor:
        return activated(self[1], self[0](x))  # type: ignore[arg-type]
