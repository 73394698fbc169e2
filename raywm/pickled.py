"""Pickles read as data: nothing that they name is imported or called.

Builtin values come as they are, NumPy arrays, scalars and gymnasium spaces are rebuilt from their bytes by the code
here, and whatever else a pickle names (a class, a function, an object of one) comes as a ``Named``: its name and what
it was given. So a crafted file runs no code; time and memory it can waste.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import gymnasium as gym
import numpy as np


class Named:
    """What a pickle made by calling something, or a class it names. ``name`` is "module.qualname", ``args`` what it
    was called with, ``state`` what was then set on it, ``items`` what a mapping was filled with."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Named:
        made = object.__new__(cls)
        made.args, made.kwargs, made.state, made.items = args, kwargs, None, {}
        return made

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: dict[Any, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return type("Named", (Named,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_pickle(path: str | Path) -> Any:
    """What a pickle file holds, as data. Raises ValueError where it cannot be read so, OSError where there is none."""
    with open(path, "rb") as file:
        try:
            return plain(_Reader(file).load())
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be read") from None
        except Exception as error:  # a crafted file may break the reader in any way
            raise ValueError(f"{path} cannot be read as data ({type(error).__name__}: {error})") from error


def plain(value: Any) -> Any:
    """`value` with NumPy's and gymnasium's objects rebuilt, wherever they stand in dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(one) for one in value)
    if isinstance(value, Named):
        build = BUILDERS.get(value.name)
        return value if build is None else build(value)
    return value


def _dtype(value: Named) -> np.dtype:
    """A plain numeric dtype: ("f4", ...) with the byte order in its state."""
    dtype = np.dtype(str(value.args[0]))
    order: Any = value.state[1] if value.state else "="
    if dtype.kind not in "biufc" or order not in ("<", ">", "|", "="):
        raise ValueError(f"arrays of {value.args[0]!r}, expected numbers")
    return dtype.newbyteorder(order) if order in "<>" else dtype


def _bytes(data: Any) -> bytes:
    """Bytes, which old protocols keep as a string."""
    if isinstance(data, Named) and data.name == "_codecs.encode":
        return str(data.args[0]).encode("latin1")
    if isinstance(data, Named) and data.name in ("__builtin__.bytes", "builtins.bytes") and not data.args:
        return b""
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError(f"an array's bytes are {data!r}")
    return bytes(data)


def _from_buffer(value: Named) -> np.ndarray:
    data, dtype, shape, order = value.args[:4]
    return np.frombuffer(_bytes(data), _dtype(dtype)).reshape(shape, order="F" if order == "F" else "C")


def _reconstructed(value: Named) -> np.ndarray:
    _, shape, dtype, fortran, data = value.state
    return np.frombuffer(_bytes(data), _dtype(dtype)).reshape(shape, order="F" if fortran else "C")


def _scalar(value: Named) -> Any:
    dtype, data = value.args
    return np.frombuffer(_bytes(data), _dtype(dtype))[0].item()


def _box(value: Named) -> gym.spaces.Box:
    state = plain(value.state)
    return gym.spaces.Box(state["low"], state["high"], tuple(state["_shape"]), np.dtype(state["dtype"]).type)


def _discrete(value: Named) -> gym.spaces.Discrete:
    state = plain(value.state)
    return gym.spaces.Discrete(int(state["n"]), start=int(state["start"]))


def _multi_discrete(value: Named) -> gym.spaces.MultiDiscrete:
    state = plain(value.state)
    return gym.spaces.MultiDiscrete(state["nvec"], dtype=np.dtype(state["dtype"]).type, start=state["start"])


def _path(value: Named) -> PurePath:
    return Path(*value.args)


BUILDERS = {
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,  # Python 3.13
    "numpy.dtype": _dtype,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.multiarray._reconstruct": _reconstructed,
    "numpy.core.multiarray._reconstruct": _reconstructed,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "gymnasium.spaces.box.Box": _box,
    "gymnasium.spaces.discrete.Discrete": _discrete,
    "gymnasium.spaces.multi_discrete.MultiDiscrete": _multi_discrete,
}
