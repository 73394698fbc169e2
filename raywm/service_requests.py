"""What may be asked of ``raywm.service``: the types of requests, made from a run's spaces, and their checks."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from raywm.spaces import ActionCodec, is_image

Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
FORBID = ConfigDict(extra="forbid", strict=True)


class Refused(Exception):
    """A request that is the sender's to mend; `status` is the HTTP one."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def act_request(columns: Mapping[str, Any], rows: int, token: int) -> Any:
    """The type of a body of `/act`. Column names are the user's, so these are TypedDicts and not classes."""
    types = {name: _rows(_column_type(box), rows) for name, box in columns.items()}
    Obs = with_config(FORBID)(TypedDict("Obs", types))  # type: ignore[misc, operator]
    fields: Any = {
        "obs": Annotated[Obs, Field(description="Columns of n rows: one observation of n different episodes.")],
        "state": NotRequired[
            Annotated[
                _rows(_token_type(token) | None, rows) | None,
                Field(description="The states that the last answer gave; null or left out where an episode begins."),
            ]
        ],
        "is_first": NotRequired[
            Annotated[_rows(StrictBool, rows) | None, Field(description="By default: where there is no state.")]
        ],
        "seed": NotRequired[
            Annotated[
                _rows(Seed | None, rows) | None,
                Field(description="Of numpy.random.default_rng: a row's draws begin anew from it. Else they go on."),
            ]
        ],
        "sample": NotRequired[
            Annotated[StrictBool, Field(description="Sample actions instead of taking the most likely ones.")]
        ],
    }
    return with_config(FORBID)(TypedDict("ActRequest", fields))  # type: ignore[misc, operator]


def imagine_request(codec: ActionCodec, rows: int, horizon: int, token: int) -> Any:
    """The type of a body of `/imagine`."""
    action = _rows(_rows(_action_type(codec), horizon), rows)
    fields: Any = {
        "state": Annotated[_rows(_token_type(token), rows), Field(description="n states of /act or /imagine.")],
        "action": Annotated[action, Field(description="(n, H, *shape), as the environment takes them.")],
        "seed": Annotated[Seed, Field(description="Of torch.Generator: the same request has the same answer.")],
        "temperature": NotRequired[Annotated[Finite, Field(gt=0, le=10)]],
        "decode": NotRequired[Annotated[StrictBool, Field(description="Answer with observations, too.")]],
    }
    return with_config(FORBID)(TypedDict("ImagineRequest", fields))  # type: ignore[misc, operator]


def _rows(of: Any, most: int, least: int = 1) -> Any:
    return Annotated[list[of], Field(min_length=least, max_length=most)]


def _token_type(length: int) -> Any:
    # another model's token may be longer: it is to be refused as such
    return Annotated[str, Field(max_length=max(2**20, 2 * length))]


def _column_type(box: Any) -> Any:
    if is_image(box):
        size = encoded_size(box.shape)
        told = f"base64 of {'x'.join(map(str, box.shape))} uint8, row by row"
        return Annotated[str, Field(min_length=size, max_length=size, description=told)]
    return _rows(Finite, box.shape[0], box.shape[0])


def _action_type(codec: ActionCodec) -> Any:
    number: Any = Finite if codec.dtype.kind == "f" else StrictInt
    if codec.kind == "multi_binary":
        number = Annotated[StrictInt, Field(ge=0, le=1)]
    elif codec.kind == "box" and codec.dtype.kind != "f":
        bounds = np.iinfo(codec.dtype)
        number = Annotated[StrictInt, Field(ge=int(bounds.min), le=int(bounds.max))]
    elif codec.kind != "box" and codec.groups:
        return _choices(codec)
    for size in reversed(codec.shape):
        number = _rows(number, size, size)
    return number


def _choices(codec: ActionCodec) -> Any:
    """Whole numbers, each in the bounds of its own group."""
    low, sizes = codec.starts.tolist(), codec.groups
    each = [Annotated[StrictInt, Field(ge=a, lt=a + n)] for a, n in zip(low, sizes)]
    if codec.shape == ():
        return each[0]

    def nested(shape: Sequence[int], at: int) -> Any:
        if not shape:
            return each[at]
        step = math.prod(shape[1:])
        return tuple[tuple(nested(shape[1:], at + i * step) for i in range(shape[0]))]  # type: ignore[misc]

    return nested(codec.shape, 0)


def validated(adapter: TypeAdapter, body: bytes) -> Any:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        count, (first, *_) = error.error_count(), error.errors(include_url=False, include_context=False)
    where, got = ".".join(str(part) for part in first["loc"]), repr(first["input"])
    if first["type"] == "json_invalid":
        raise Refused(400, first["msg"][:200])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    more = f" (and {count - 1} more)" if count > 1 else ""
    got = "" if first["type"] == "missing" else f"got {got}: "
    raise Refused(422, f"{where[:200] or 'body'}: {got}{first['msg']}{more}")


def encoded_size(shape: Sequence[int]) -> int:
    """Characters of base64 of so many bytes."""
    return 4 * -(-math.prod(shape) // 3)


def image(where: str, text: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, f"{where}: got text that is not base64, expected base64 of uint8 {shape}") from None
    if len(raw) != math.prod(shape):
        raise Refused(422, f"{where}: got {len(raw)} bytes, expected {math.prod(shape)} of uint8 {shape}")
    return np.frombuffer(raw, np.uint8).reshape(shape)
