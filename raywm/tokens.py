"""An acting row's memory as text that travels: the recurrent state and the random generator of one episode.

A server that gives these to its clients remembers nothing itself. Imports no ray.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAGIC = int.from_bytes(b"rws1", "little")  # the 1 is the version of this format
HEAD = 16  # bytes of the first three fields
MASK = 2**64 - 1


class WrongModel(ValueError):
    """A token of another model, or of the same model with other weights."""


class StateTokens:
    """Rows of a state, leaves (N, *), and their generators <-> N tokens of one fixed length.

    Args:
        initial: the state's leaves with any number of rows; float32.
        model: identifies model and weights, below 2**64; a token says which it is of.

    A token is base64 of little-endian fields: magic, CRC-32 of all that follows, model, a PCG64 generator, the leaves
    in the order of their names. The CRC is no signature: what is read back must be looked at like any other input.
    """

    def __init__(self, initial: Mapping[str, np.ndarray], model: int):
        self.model, self.leaves = model, sorted(initial)
        fields: list[Any] = [("magic", "<u4"), ("crc", "<u4"), ("model", "<u8"), ("rng", "<u8", 4), ("spare", "<u4", 2)]
        for name in self.leaves:
            leaf = initial[name]
            if leaf.dtype != np.float32:
                raise ValueError(f"state {name!r} is {leaf.dtype}, expected float32")
            fields.append((f"leaf.{name}", "<f4", leaf.shape[1:]))
        self.dtype = np.dtype(fields)
        self.length = 4 * -(-self.dtype.itemsize // 3)  # of one token, in characters

    def encode(self, state: Mapping[str, np.ndarray], rng: np.ndarray) -> list[str]:
        """Leaves (N, *) and generators (N,) of ``saved`` -> N tokens."""
        rows = np.zeros(len(rng), self.dtype)
        rows["magic"], rows["model"] = MAGIC, self.model
        rows["rng"], rows["spare"] = rng["rng"], rng["spare"]
        for name in self.leaves:
            rows[f"leaf.{name}"] = state[name]
        size, whole = self.dtype.itemsize, memoryview(rows.tobytes())
        rows["crc"] = [zlib.crc32(whole[at + 8 : at + size]) for at in range(0, len(whole), size)]
        whole = memoryview(rows.tobytes())
        return [base64.b64encode(whole[at : at + size]).decode() for at in range(0, len(whole), size)]

    def decode(self, tokens: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """N tokens -> leaves (N, *) and generators (N,). ValueError: damaged, or not finite; WrongModel."""
        rows = np.frombuffer(b"".join([self._checked(i, token) for i, token in enumerate(tokens)]), self.dtype)
        state = {name: rows[f"leaf.{name}"] for name in self.leaves}
        if not all(np.isfinite(leaf).all() for leaf in state.values()):
            raise ValueError("state holds numbers that are not finite; send states as they were received")
        return state, rows[["rng", "spare"]]

    def _checked(self, index: int, token: str) -> bytes:
        try:
            raw = base64.b64decode(token, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"state.{index}: got text that is not base64, expected a state as received") from None
        magic, crc = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")
        if len(raw) < HEAD or magic != MAGIC:
            raise ValueError(f"state.{index}: got {len(raw)} bytes that are no state, expected a state as received")
        model = int.from_bytes(raw[8:HEAD], "little")
        if zlib.crc32(memoryview(raw)[8:]) != crc:
            raise ValueError(f"state.{index}: got a damaged state (CRC), expected a state as received")
        if model != self.model:
            raise WrongModel(
                f"state.{index}: got a state of model {model:016x}, expected {self.model:016x}; begin the episode anew"
            )
        if len(raw) != self.dtype.itemsize:
            raise ValueError(f"state.{index}: got a state of {len(raw)} bytes, expected {self.dtype.itemsize}")
        return raw


GENERATOR = np.dtype([("rng", "<u8", 4), ("spare", "<u4", 2)])


def saved(generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Where PCG64 generators stand, as rows (N,)."""
    rows = np.zeros(len(generators), GENERATOR)
    for row, generator in zip(rows, generators):
        at: Any = generator.bit_generator.state
        state, inc = at["state"]["state"], at["state"]["inc"]
        row["rng"] = (state & MASK, state >> 64, inc & MASK, inc >> 64)
        row["spare"] = (at["has_uint32"], at["uinteger"])
    return rows


def restore(generator: np.random.Generator, row: np.void) -> None:
    """Put a PCG64 generator where ``saved`` found one."""
    a, b, c, d = row["rng"].tolist()
    has, spare = row["spare"].tolist()
    state = {"state": a | b << 64, "inc": c | d << 64}
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": state,
        "has_uint32": int(has > 0),
        "uinteger": spare,
    }
