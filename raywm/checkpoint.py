"""Checkpoints: everything a run needs to continue, written atomically and loaded without executing code.

    checkpoints/000012/state.json          format, step, crc32 and size of the other files, the caller's JSON
    checkpoints/000012/NAME.safetensors    tensors
    checkpoints/000012/NAME.npz            numpy arrays

A checkpoint is a directory that appears by one rename after its files have reached the disk: it is whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STEP = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, back from the disk."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    arrays: dict[str, dict[str, np.ndarray]]
    state: dict[str, Any]


def save(
    directory: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    state: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write checkpoint `step`, then drop all but the newest `keep`. A step that exists is replaced.

    tensors: one safetensors file a name; arrays: one npz file a name; state: JSON.
    Raises ValueError for names that are no file names, object arrays and state that is not JSON; OSError when the disk
    is full, with the earlier checkpoints untouched.
    """
    directory = Path(directory)
    tensors, arrays = tensors or {}, arrays or {}
    for name in [*tensors, *arrays]:
        if not _NAME.fullmatch(name):
            raise ValueError(f"checkpoint part {name!r}: expected letters, digits, '_', '-' or '.'")
    for name, columns in arrays.items():
        for key, array in columns.items():
            if np.asarray(array).dtype.hasobject:
                raise ValueError(
                    f"checkpoint array {name}/{key} holds objects, expected numbers; put it into the state"
                )
    with clear_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _tidy(directory)
        final, temporary = directory / f"{step:06d}", directory / f".tmp-{step:06d}-{os.getpid()}"
        try:
            temporary.mkdir()
            _write(temporary, step, tensors, arrays, dict(state or {}))
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in _steps(directory)[:-keep]:
            shutil.rmtree(directory / f"{old:06d}", ignore_errors=True)
    return final


def load(directory: str | Path, step: int | None = None, read_only: bool = False) -> Checkpoint:
    """Checkpoint `step`, or the newest. Raises FileNotFoundError without one, ValueError if foreign or damaged.

    `read_only` changes nothing in the directory: for readers of a run that another process may be writing.
    """
    from safetensors.torch import load as load_tensors

    directory = Path(directory)
    if not read_only:
        _tidy(directory)
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}; the run was stopped before its first one")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint {step} in {directory}; there are {', '.join(map(str, steps))}")
    path = directory / f"{steps[-1] if step is None else step:06d}"
    manifest = _manifest(path)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for file, expected in manifest["files"].items():
        data = _checked(path / file, expected)
        if file.endswith(".safetensors"):
            tensors[file.removesuffix(".safetensors")] = load_tensors(data)
        else:
            with np.load(path / file, allow_pickle=False) as columns:
                arrays[file.removesuffix(".npz")] = {key: columns[key] for key in columns.files}
    return Checkpoint(manifest["step"], tensors, arrays, manifest["state"])


def latest(directory: str | Path) -> int | None:
    """The newest whole checkpoint's step, or None."""
    _tidy(Path(directory))
    return max(_steps(Path(directory)), default=None)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Whoever reads `path` finds the old text or the new one, never a part, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with clear_disk_errors(path):
        try:
            _write_bytes(temporary, text.encode())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def atomic_write_json(path: str | Path, data: Any) -> None:
    """Strict JSON (NaN and infinities become null), written like `atomic_write_text`."""
    atomic_write_text(path, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` as strict JSON knows it: numpy and torch scalars and arrays unpacked, NaN and infinities null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"got {type(value).__name__}, expected something that JSON can hold: numbers, text, lists, dicts")


@contextlib.contextmanager
def clear_disk_errors(path: str | Path) -> Iterator[None]:
    """A full disk (or quota) said in words that name the place and what to do."""
    try:
        yield
    except Exception as error:
        # safetensors and zipfile may wrap or chain the error of the operating system
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(
            errno.ENOSPC, f"the disk is full, could not write {path}; free some space and continue with --resume"
        ) from error


def _write(
    path: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    state: dict[str, Any],
) -> None:
    files: dict[str, dict[str, int]] = {}
    if tensors:
        from safetensors.torch import save as tensor_bytes
    for name, columns in tensors.items():
        # copies: safetensors refuses tensors that share memory, which tied weights and views do
        own = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in columns.items()}
        files[f"{name}.safetensors"] = _write_bytes(path / f"{name}.safetensors", tensor_bytes(own))
    for name, named in arrays.items():
        with open(path / f"{name}.npz", "wb") as file:
            np.savez(file, **{key: np.asarray(array) for key, array in named.items()})  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        data = (path / f"{name}.npz").read_bytes()
        files[f"{name}.npz"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    try:
        text = json.dumps({"format": FORMAT, "step": step, "files": files, "state": state}, indent=1)
    except TypeError as error:
        raise ValueError(f"checkpoint state: {error}; arrays and tensors have arguments of their own") from None
    _write_bytes(path / "state.json", text.encode())
    _sync(path)


def _write_bytes(path: Path, data: bytes) -> dict[str, int]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _publish(temporary: Path, final: Path) -> None:
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        os.replace(final, aside)  # a directory cannot be renamed over another; _tidy undoes this if we die here
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(directory: Path) -> None:
    """Clear what killed saves left behind."""
    if not directory.is_dir():
        return
    for left in directory.glob(".old-*"):
        final = left.with_name(left.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, final)
    for left in directory.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name) and (p / "state.json").is_file())


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "state.json").read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}/state.json is damaged; remove {path} to continue from the one before") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {version}, this raywm reads {FORMAT}; use the version that wrote it"
        )
    return manifest


def _checked(path: Path, expected: dict[str, int]) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    if len(data) != expected["bytes"] or zlib.crc32(data) != expected["crc32"]:
        raise ValueError(
            f"{path} is damaged (size or checksum differ from what was saved); "
            f"remove {path.parent} to continue from the one before"
        )
    return data


def _sync(directory: Path) -> None:
    """Make renames in `directory` durable where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
