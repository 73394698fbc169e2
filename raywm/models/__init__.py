"""World models, one a file, behind the one interface of `base`."""

from __future__ import annotations

import importlib
from typing import Any

from raywm.models.base import WorldModel
from raywm.models.rssm import RSSM
from raywm.models.vm import VM

MODELS: dict[str, type[WorldModel]] = {"vm": VM, "rssm": RSSM}


def model_class(kind: str) -> type[WorldModel]:
    """The world model `kind`: a name in `MODELS`, or "module:Class", a WorldModel of the user's own.

    Raises ValueError: no such name, module or class; or a class that is no WorldModel.
    """
    if kind in MODELS:
        return MODELS[kind]
    module, colon, name = kind.partition(":")
    if not colon:
        raise ValueError(f"got model {kind!r}, expected one of {sorted(MODELS)}, or 'module:Class'")
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ValueError(f"model {kind!r}: {module} has no {name!r}; give the name of a class in it") from None
    except Exception as error:
        raise ValueError(
            f"model {kind!r}: {module} cannot be imported: {type(error).__name__}: {error}; put it on PYTHONPATH, or "
            "mend it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, WorldModel)):
        raise ValueError(f"model {kind!r}: got {found!r}, expected a subclass of raywm.models.base.WorldModel")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"model {kind!r} lacks {', '.join(missing)}; see raywm.models.base.WorldModel")
    return found


def build_model(kind: str, columns: dict[str, tuple[tuple[int, ...], bool]], act_dim: int, **sizes: Any) -> WorldModel:
    """The world model `kind` for observation columns (name -> (shape, is_image)) and encoded actions (A,).

    A class of the user's own is called as those of `MODELS` are: ``Class(columns, act_dim, **sizes)``. Raises
    ValueError as ``model_class`` does, or where the class does not take these arguments or sets no ``feat_dim``.
    """
    found = model_class(kind)
    if kind in MODELS:
        return found(columns, act_dim, **sizes)
    try:
        model = found(columns, act_dim, **sizes)
    except TypeError as error:
        raise ValueError(f"model {kind!r}: {error}; it is called with columns, act_dim and model.kwargs") from error
    for name, example in (("feat_dim", "the F of features()"), ("act_dim", act_dim), ("phases", ("model",))):
        if not hasattr(model, name):
            raise ValueError(f"model {kind!r} sets no {name}, expected {example}; set it in __init__")
    return model
