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
SHAPES = 64  # that a function may be compiled for: rows of the scan, the context and the dream by widths and types
_fusing: ContextVar[bool] = ContextVar("fusing", default=False)


@contextlib.contextmanager
def fusing(on: bool = True) -> Iterator[None]:
    """Within, and in what runs backward from there, ``fusible`` functions are compiled ones."""
    before = _fusing.set(on)
    try:
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
        torch._dynamo.config.cache_size_limit = SHAPES
        return torch.compile(function, fullgraph=True, dynamic=False)

    return call  # type: ignore[return-value]


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where ``torch.compile`` cannot compile for a device."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # whatever its toolchain raises: no g++, no triton, no Python headers
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"dreamer.compile: got true, but torch.compile cannot compile for {device} here ({first}); expected false, "
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
    """A linear layer, a LayerNorm, a SiLU: the last two as one piece."""

    def forward(self, x: Tensor) -> Tensor:
        return activated(self[1], self[0](x))  # type: ignore[arg-type]
