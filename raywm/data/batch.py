"""What a model is fitted on: B sequences of T rows as torch tensors."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("action", "reward", "is_first", "is_last", "is_terminal", "mask", "weight")


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
    ids: list[str]  # the episode of each sequence; of one that crosses into others, its first row's
    start: dict[str, Tensor] | None = None  # the State before row 0, or None for a model's initial one
    keys: np.ndarray | None = None  # (B,) int64, of a prioritised replay: names the sequences in ``Replay.update``
    # of a replay with a context of K rows:
    rows: np.ndarray | None = None  # (B, T) int64: names the rows in ``Replay.write``; -1 on padding
    stored: dict[str, Tensor] | None = None  # (B, *) what was written of row K - 1; None where nothing ever was
    known: Tensor | None = None  # (B,) bool: whether there was something

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, np.ndarray],
        ids: list[str],
        keys: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        stored: tuple[dict[str, np.ndarray], np.ndarray] | None = None,
    ) -> Batch:
        """A batch from arrays by the names of ``tensors``; of read-only ones, which it must then not be filled into.
        `stored`: with what is known."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            states = {name: torch.from_numpy(array) for name, array in stored[0].items()} if stored else None
            known = torch.from_numpy(stored[1]) if stored else None
        obs = {name.removeprefix("obs."): column for name, column in tensors.items() if name.startswith("obs.")}
        rest: dict[str, Any] = {name: tensors[name] for name in NAMES}
        return cls(obs=obs, ids=ids, keys=keys, rows=rows, stored=states, known=known, **rest)

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self) -> Batch:
        return self._mapped(torch.clone)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{f.name: _mapped(getattr(self, f.name), function) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but those of states by name, observation columns as "obs.NAME"."""
        return {f"obs.{name}": column for name, column in self.obs.items()} | {n: getattr(self, n) for n in NAMES}

    def leaves(self) -> dict[str, Tensor]:
        """All tensors there are by name, those of states as "start.NAME" and "stored.NAME"."""
        states = {"start": self.start or {}, "stored": self.stored or {}}
        rest = {f"{of}.{name}": value for of, state in states.items() for name, value in state.items()}
        return self.tensors() | rest | ({} if self.known is None else {"known": self.known})

    def flat(self) -> dict[str, np.ndarray]:
        """Views of ``tensors()`` in numpy, (B*T, *) but for the weight: made once, for it costs as much as filling
        the small ones."""
        small = (self.action, self.reward, self.is_first, self.is_last, self.is_terminal, self.mask, self.weight)
        now, kept = [*self.obs.values(), *small], self.__dict__.get("_flat")
        if kept is None or any(map(operator.is_not, now, kept[0])):
            arrays = {n: (t.view(-1, *t.shape[2:]) if t.ndim > 1 else t).numpy() for n, t in self.tensors().items()}
            kept = self.__dict__["_flat"] = (now, arrays)
        return kept[1]

    def like(self, pin: bool = False) -> Batch:
        """A batch of the same shapes in host memory, to be filled; `pin`: in page-locked memory, for fast copies."""
        (B, T, A), like = self.action.shape, {n: (tuple(c.shape[2:]), c.dtype) for n, c in self.obs.items()}
        return blank(B, T, like, A, pin)


def blank(B: int, T: int, obs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], A: int, pin: bool = False) -> Batch:
    """A batch to be filled, with observation columns of these row shapes and dtypes and weights of 1."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        if pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        # numpy asks for huge pages, which torch does not: 5% of the time to fill a batch of images
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))

    return Batch(
        obs={name: empty(B, T, *shape, dtype=dtype) for name, (shape, dtype) in obs.items()},
        action=empty(B, T, A, dtype=torch.float32),
        reward=empty(B, T, dtype=torch.float32),
        is_first=empty(B, T, dtype=torch.bool),
        is_last=empty(B, T, dtype=torch.bool),
        is_terminal=empty(B, T, dtype=torch.bool),
        mask=empty(B, T, dtype=torch.bool),
        weight=empty(B, dtype=torch.float32).fill_(1),
        ids=[""] * B,
    )


def joined(batches: Sequence[Batch], out: Batch | None = None) -> Batch:
    """Batches of sequences one after another: into `out`'s tensors where given, else into new ones."""
    if not batches:
        raise ValueError("no batches to join, expected at least one")
    first = batches[0]
    if out is None:
        A, T = first.action.shape[-1], first.action.shape[1]
        like = {n: (tuple(c.shape[2:]), c.dtype) for n, c in first.obs.items()}
        out = blank(sum(len(batch.ids) for batch in batches), T, like, A)
    B, parts = sum(len(batch.ids) for batch in batches), [batch.tensors() for batch in batches]
    for name, to in out.tensors().items():
        if to.shape != (B, *parts[0][name].shape[1:]):
            raise ValueError(f"out.{name} is {tuple(to.shape)}, expected {(B, *parts[0][name].shape[1:])}")
        torch.cat([part[name] for part in parts], out=to)
    out.ids = [id for batch in batches for id in batch.ids]
    keys, rows = ([found for batch in batches if (found := getattr(batch, n)) is not None] for n in ("keys", "rows"))
    out.keys = np.concatenate(keys) if len(keys) == len(batches) else None
    out.rows = np.concatenate(rows) if len(rows) == len(batches) else None
    out.stored, out.known = _joined_states(batches)
    return out


def _joined_states(batches: Sequence[Batch]) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """What is stored for the sequences of all: unknown for batches that come from where nothing was written yet."""
    like = next((batch.stored for batch in batches if batch.stored is not None), None)
    if like is None:
        return None, None
    B, at = sum(len(batch.ids) for batch in batches), 0
    stored, known = {name: v.new_zeros(B, *v.shape[1:]) for name, v in like.items()}, torch.zeros(B, dtype=torch.bool)
    for batch in batches:
        here = slice(at, at := at + len(batch.ids))
        if batch.stored is not None and batch.known is not None:
            known[here] = batch.known
            for name, value in batch.stored.items():
                stored[name][here] = value
    return stored, known


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return value
