"""What a model is fitted on: B sequences of T rows as torch tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """B sequences of T rows, under the timing rule of ``raywm.data.episode``; padding has ``mask`` False."""

    obs: dict[str, Tensor]  # (B, T, *): images uint8 (H, W, C), vectors float32
    action: Tensor  # (B, T, A) float32, encoded; zero on first rows and padding
    reward: Tensor  # (B, T) float32
    is_first: Tensor  # (B, T) bool
    is_last: Tensor
    is_terminal: Tensor
    mask: Tensor  # (B, T) bool: False on padding
    weight: Tensor  # (B,) float32: the weight of a sequence in the loss
    ids: list[str]  # the episode of each sequence
    start: dict[str, Tensor] | None = None  # a stored State for row 0 (online loops), or None

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        return Batch(**{f.name: _to(getattr(self, f.name), device, non_blocking) for f in fields(self)})


def _to(value: Any, device: str | torch.device, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {k: _to(v, device, non_blocking) for k, v in value.items()}
    return value
