"""Any gymnasium action space as a float vector, and any supported observation space as named columns.

Actions are stored as the environment takes them and encoded only when a batch is made, so what is on disk never
depends on how a model likes its inputs. Importing this module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Some environments write "unbounded" as the largest float (ViZDoom's delta buttons): no controller can span that.
UNBOUNDED = 1e30


class ActionCodec:
    """An action space and its float vectors: ``encode`` for models, ``decode`` for environments.

    | space | vector |
    |---|---|
    | Box | [-1, 1] by its bounds, flattened |
    | Discrete, MultiDiscrete | one one-hot group per choice, concatenated |
    | MultiBinary | {0, 1}, flattened |

    Attributes: ``space``, ``kind``, ``dim`` (A, the vector's length), ``shape`` and ``dtype`` of one environment
    action, ``groups`` (sizes of the one-hot groups; empty for Box and MultiBinary).
    Raises ValueError for any other space, and for a Box without finite bounds.
    """

    def __init__(self, space: gym.Space):
        self.space = space
        self.groups: tuple[int, ...] = ()
        if isinstance(space, gym.spaces.Box):
            self.kind = "box"
            self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
            if not space.is_bounded() or max(np.abs(self.low).max(), np.abs(self.high).max()) >= UNBOUNDED:
                raise ValueError(
                    f"action space {space} is unbounded, expected finite bounds; "
                    "wrap the environment (gymnasium.wrappers.TransformAction), or give its Box finite low and high"
                )
            self.dim = int(np.prod(space.shape))
        elif isinstance(space, gym.spaces.Discrete):
            self.kind = "discrete"
            self.groups = (int(space.n),)
            self.starts = np.array([int(space.start)])
            self.dim = int(space.n)
        elif isinstance(space, gym.spaces.MultiDiscrete):
            self.kind = "multi_discrete"
            self.groups = tuple(int(n) for n in space.nvec.flatten())
            self.starts = np.asarray(space.start).flatten().astype(np.int64)
            self.dim = sum(self.groups)
        elif isinstance(space, gym.spaces.MultiBinary):
            self.kind = "multi_binary"
            self.dim = int(np.prod(space.shape))
        else:
            raise ValueError(
                f"action space {space} is not supported, expected Box, Discrete, MultiDiscrete or MultiBinary; "
                "wrap the environment to one of these (gymnasium.wrappers.TransformAction) in a class of your module"
            )
        if self.dim == 0:
            raise ValueError(f"action space {space} is empty, expected at least one number or choice")
        assert space.shape is not None and space.dtype is not None
        self.shape: tuple[int, ...] = tuple(space.shape)
        self.dtype = np.dtype(space.dtype)
        self._eyes = [np.eye(n, dtype=np.float32) for n in self.groups]  # one-hot rows, made once
        self._sizes = np.array(self.groups, np.uint64)
        self._shifted = bool(self.groups) and bool(self.starts.any())

    def __repr__(self) -> str:
        return f"ActionCodec({self.space})"

    def _lead(self, action: np.ndarray) -> tuple[int, ...]:
        """The batch axes in front of one action's own shape."""
        lead = action.ndim - len(self.shape)
        if lead < 0 or action.shape[lead:] != self.shape:
            raise ValueError(f"action of shape {action.shape}, expected (..., {self.shape}) for {self.space}")
        return action.shape[:lead]

    def encode(self, action: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Environment actions (..., *shape) -> float32 (..., A), into `out` where given.

        A Box action outside its bounds is clipped. Raises ValueError for a choice that the space does not have.
        """
        action = np.asarray(action)
        lead = self._lead(action)
        if out is None:
            out = np.empty((*lead, self.dim), np.float32)
        if self.kind == "box":
            span = self.high - self.low
            unit = 2 * (action - self.low) / np.where(span > 0, span, 1) - 1
            unit = np.where(span > 0, np.clip(unit, -1, 1), 0)  # a fixed number carries nothing
            out[...] = unit.reshape(*lead, self.dim)
            return out
        if self.kind == "multi_binary":
            out[...] = action.reshape(*lead, self.dim) != 0
            return out
        choice = action.reshape(*lead, len(self.groups)).astype(np.int64, copy=False)
        if self._shifted:
            choice = choice - self.starts
        if (choice.view(np.uint64) >= self._sizes).any():  # a negative one is huge as unsigned
            raise ValueError(f"actions range from {action.min()} to {action.max()}, expected members of {self.space}")
        at = 0
        for g, eye in enumerate(self._eyes):  # G x (..., n_g) -> (..., A)
            eye.take(choice[..., g], axis=0, out=out[..., at : at + len(eye)], mode="clip")  # other modes copy `out`
            at += len(eye)
        return out

    def decode(self, vector: Any) -> np.ndarray:
        """Float vectors (..., A) -> environment actions (..., *shape) of the space's dtype.

        Box values are clipped to [-1, 1] and so into the bounds; one-hot groups go by argmax, binaries by > 0.5.
        """
        vector = np.asarray(vector)
        if vector.ndim == 0 or vector.shape[-1] != self.dim:
            raise ValueError(f"encoded action of shape {vector.shape}, expected (..., {self.dim}) for {self.space}")
        lead = vector.shape[:-1]
        if self.kind == "box":
            unit = np.clip(vector.astype(np.float64).reshape(*lead, *self.shape), -1, 1)
            action = self.low + (unit + 1) / 2 * (self.high - self.low)
            if self.dtype.kind in "iu":
                action = np.rint(action)
            # The cast may round a bound outwards, and environments check `contains`.
            return np.clip(action.astype(self.dtype), self.space.low, self.space.high)  # type: ignore[attr-defined]
        if self.kind == "multi_binary":
            return (vector > 0.5).reshape(*lead, *self.shape).astype(self.dtype)
        ends = np.cumsum(self.groups)
        choice = [vector[..., end - n : end].argmax(-1) for n, end in zip(self.groups, ends)]
        return (np.stack(choice, -1) + self.starts).reshape((*lead, *self.shape)).astype(self.dtype)[()]

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """One environment action, uniform over the space, from the caller's generator."""
        if self.kind == "box":
            if self.dtype.kind in "iu":
                low, high = self.low.astype(np.int64), self.high.astype(np.int64)
                return rng.integers(low, high, size=self.shape, endpoint=True).astype(self.dtype)
            draw = rng.uniform(self.low, self.high, size=self.shape).astype(self.dtype)
            return np.clip(draw, self.space.low, self.space.high)  # type: ignore[attr-defined]
        if self.kind == "multi_binary":
            return rng.integers(0, 2, size=self.shape).astype(self.dtype)
        choice = rng.integers(0, np.array(self.groups)) + self.starts
        return choice.reshape(self.shape).astype(self.dtype)[()]  # [()]: one Discrete action is a scalar, not 0-d

    def zero(self) -> np.ndarray:
        """The action stored on row 0: zeros, or the member of the space nearest to them so that it always encodes."""
        if self.kind == "box":
            return np.clip(np.zeros(self.shape), self.low, self.high).astype(self.dtype)
        if self.kind == "multi_binary":
            return np.zeros(self.shape, self.dtype)
        return np.clip(0, self.starts, self.starts + np.array(self.groups) - 1).reshape(self.shape).astype(self.dtype)

    def squash(self, raw: Tensor) -> Tensor:
        """A controller's unbounded scores (..., A) -> encoded actions (..., A): tanh | one-hot of argmax | raw > 0."""
        import torch

        if raw.shape[-1] != self.dim:
            raise ValueError(f"scores of shape {tuple(raw.shape)}, expected (..., {self.dim}) for {self.space}")
        if self.kind == "box":
            return torch.tanh(raw)
        if self.kind == "multi_binary":
            return (raw > 0).to(raw.dtype)
        hot = [torch.nn.functional.one_hot(g.argmax(-1), g.shape[-1]) for g in raw.split(self.groups, dim=-1)]
        return torch.cat(hot, -1).to(raw.dtype)  # G x (..., n_g) -> (..., A)

    def to_json(self) -> dict:
        return space_to_json(self.space)

    @classmethod
    def from_json(cls, data: Mapping | str) -> ActionCodec:
        return cls(space_from_json(data))


def is_image(box: gym.spaces.Box) -> bool:
    """Whether a column holds frames: uint8 (H, W, C)."""
    return box.dtype == np.uint8 and len(box.shape) == 3


def obs_columns(space: gym.Space) -> dict[str, gym.spaces.Box]:
    """The named columns an observation space is stored as; ``to_columns`` converts one observation.

    A float Box becomes a flat float32 ``vector``, a uint8 (H, W, C) or (H, W) Box an ``image``, a Dict of those keeps
    its own names. Raises ValueError for anything else.
    """
    if isinstance(space, gym.spaces.Dict):
        if not space.spaces:
            raise ValueError("observation space Dict() is empty, expected at least one Box")
        return {name: _column(sub, f"observation {name!r}") for name, sub in space.spaces.items()}
    column = _column(space, "observation")
    return {"image" if is_image(column) else "vector": column}


def _column(space: gym.Space, what: str) -> gym.spaces.Box:
    if isinstance(space, gym.spaces.Box) and int(np.prod(space.shape)) > 0:
        if space.dtype == np.uint8 and len(space.shape) in (2, 3):
            shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
            return gym.spaces.Box(space.low.reshape(shape), space.high.reshape(shape), dtype=np.uint8)
        if np.dtype(space.dtype).kind == "f":
            with np.errstate(over="ignore"):  # float64 bounds beyond float32 are "unbounded", and inf says so
                low, high = space.low.flatten().astype(np.float32), space.high.flatten().astype(np.float32)
            return gym.spaces.Box(low, high, dtype=np.float32)
    raise ValueError(
        f"{what} space {space} is not supported, expected a float Box, a uint8 (H, W, C) Box or a Dict of those; "
        "wrap the environment to one of these (gymnasium.wrappers.TransformObservation) in a class of your module"
    )


def to_columns(columns: Mapping[str, gym.spaces.Box], obs: Any) -> dict[str, np.ndarray]:
    """One observation of the space that gave `columns`, as arrays of the columns' shapes and dtypes."""
    parts = obs if isinstance(obs, Mapping) else dict.fromkeys(columns, obs)
    return {name: np.asarray(parts[name], box.dtype).reshape(box.shape) for name, box in columns.items()}


def space_to_json(space: gym.Space) -> dict:
    """A space as a JSON value; ``space_from_json`` gives an equal space back."""
    if isinstance(space, gym.spaces.Box):
        bounds = {"low": _bounds(space.low), "high": _bounds(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(np.dtype(space.dtype)), **bounds}
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, gym.spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), np.asarray(space.start).tolist()
        return {"type": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": str(space.dtype)}
    if isinstance(space, gym.spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, gym.spaces.Dict):
        return {"type": "Dict", "spaces": columns_to_json(space.spaces)}
    raise ValueError(f"space {space} cannot be saved, expected Box, Discrete, MultiDiscrete, MultiBinary or Dict")


def space_from_json(data: Mapping | str) -> gym.Space:
    value: Mapping = json.loads(data) if isinstance(data, str) else data
    kind = value.get("type")
    if kind == "Box":
        dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
        low, high = (np.broadcast_to(np.array(value[k], dtype=np.float64), shape) for k in ("low", "high"))
        return gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)
    if kind == "Discrete":
        return gym.spaces.Discrete(value["n"], start=value["start"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(value["dtype"])
        return gym.spaces.MultiDiscrete(np.array(value["nvec"]), dtype=dtype.type, start=np.array(value["start"]))
    if kind == "MultiBinary":
        shape = value["shape"]
        return gym.spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "Dict":
        return gym.spaces.Dict({name: space_from_json(sub) for name, sub in value["spaces"].items()})
    raise ValueError(f"space of type {kind!r}, expected Box, Discrete, MultiDiscrete, MultiBinary or Dict")


def columns_to_json(columns: Mapping[str, gym.Space]) -> dict:
    return {name: space_to_json(box) for name, box in columns.items()}


def columns_from_json(data: Mapping | str) -> dict[str, gym.spaces.Box]:
    value: Mapping = json.loads(data) if isinstance(data, str) else data
    return {name: space_from_json(box) for name, box in value.items()}  # type: ignore[misc]


def _bounds(bound: np.ndarray) -> Any:
    """Bounds as JSON: one number where all are equal (an image's 36,864 bounds are one 0), infinities by name."""
    values: Any = bound.astype(np.float64)
    if (values == values.flat[0]).all():
        values = values.flat[0]
    return np.vectorize(lambda v: v if np.isfinite(v) else str(v), otypes=[object])(values).tolist()
