"""World models, one a file, behind the one interface of `base`."""

from __future__ import annotations

from typing import Any

from raywm.models.base import WorldModel
from raywm.models.rssm import RSSM
from raywm.models.vm import VM

MODELS: dict[str, type[WorldModel]] = {"vm": VM, "rssm": RSSM}


def build_model(kind: str, columns: dict[str, tuple[tuple[int, ...], bool]], act_dim: int, **sizes: Any) -> WorldModel:
    """The world model `kind` for observation columns (name -> (shape, is_image)) and encoded actions (A,)."""
    if kind not in MODELS:
        raise ValueError(f"got model {kind!r}, expected one of {sorted(MODELS)}")
    return MODELS[kind](columns, act_dim, **sizes)
