"""Checkpoints: everything a run needs to continue, written atomically and loaded without executing code.

    checkpoints/000012/state.json          format, the raywm that wrote it, step, crc32 and size of the other files,
                                           the caller's JSON
    checkpoints/000012/NAME.safetensors    tensors
    checkpoints/000012/NAME.npz            numpy arrays

A checkpoint is a directory that appears by one rename after its files have reached the disk: it is whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raywm import __version__

if TYPE_CHECKING:
    import torch

# 1: the same without "raywm", read as it is. Models' parameters have no number: they are held against the model that
# the run's config builds (``same_parameters``).
FORMAT = 2
OLDEST = "0.1.0 or older"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STEP = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, back from the disk."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    arrays: dict[str, dict[str, np.ndarray]]
    state: dict[str, Any]
    made_by: str  # the raywm that wrote it


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
    from safetensors import SafetensorError
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
        try:
            if file.endswith(".safetensors"):
                tensors[file.removesuffix(".safetensors")] = load_tensors(data)
            else:
                with open_npz(data) as columns:
                    arrays[file.removesuffix(".npz")] = {key: columns[key] for key in columns.files}
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{path / file} is none that raywm wrote: {error}") from None
    return Checkpoint(manifest["step"], tensors, arrays, manifest["state"], manifest["raywm"])


@contextlib.contextmanager
def open_npz(source: str | Path | bytes) -> Iterator[Any]:
    """An .npz file, or the bytes of one, as numpy opens it. Nothing pickled is ever loaded: that runs code of the
    file's choosing. Raises ValueError for pickled objects and for what is no .npz file."""
    with _plain_arrays():
        loaded: Any = np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False)
    if not hasattr(loaded, "files"):
        raise ValueError("it is a single array, expected an .npz file of named ones")
    with loaded:
        yield _Arrays(loaded)


class _Arrays:
    """An open .npz file whose every member is an array: numpy hands over what it does not know as bytes."""

    def __init__(self, opened: Any):
        self._opened, self.files = opened, list(opened.files)

    def __getitem__(self, name: str) -> np.ndarray:
        with _plain_arrays(name):
            array = self._opened[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"its member {name!r} is no array")
        return array


@contextlib.contextmanager
def _plain_arrays(member: str = "") -> Iterator[None]:
    """What a crafted or damaged file makes numpy and zipfile raise, as a ValueError."""
    try:
        yield
    except Exception as error:  # of the tokenizer, of each way to compress, of memory, ...
        if getattr(error, "errno", None) is not None:
            raise  # the operating system's, not the file's content's
        if "allow_pickle" in str(error):
            raise ValueError(
                "it is no .npz file of plain arrays: pickled objects could run any code and are never loaded"
            ) from None
        what = f"its member {member!r} is no plain array" if member else "it is no .npz file"
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from None


def same_parameters(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str | Path, made_by: str
) -> None:
    """Raise ValueError, in one line, unless the saved tensors have the names and shapes of those `expected`."""
    lacks = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    other = [k for k in expected if k in found and found[k].shape != expected[k].shape]
    said = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} others" if names[1:] else "")
        for what, names in (("it lacks", lacks), ("it has", more), ("of another shape is", other))
        if names
    ]
    if said:
        raise ValueError(
            f"{where}, written by raywm {made_by}, holds other parameters than raywm {__version__} builds from its "
            f"config.yaml: {', '.join(said)}; use the raywm that wrote it, or train anew in another directory"
        )


def latest(directory: str | Path) -> int | None:
    """The newest whole checkpoint's step, or None."""
    _tidy(Path(directory))
    return max(_steps(Path(directory)), default=None)


@contextlib.contextmanager
def hold(out: str | Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a directory against a second process, by its file ".lock". Raises ValueError where another one has it, after
    `patience` seconds: a killed owner's lock goes with its process, which may take a moment."""
    until = time.monotonic() + patience
    with open(Path(out) / ".lock", "w") as file:
        while not _locked(file):
            if time.monotonic() >= until:
                raise ValueError(f"{out} is being written by another process; wait for it, or give another --out")
            time.sleep(0.1)
        yield


def _locked(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


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
        text = json.dumps(
            {"format": FORMAT, "raywm": __version__, "step": step, "files": files, "state": state}, indent=1
        )
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
        manifest: dict[str, Any] = json.loads((path / "state.json").read_text())
        version, made_by = manifest["format"], manifest.setdefault("raywm", OLDEST)
        if version in range(1, FORMAT + 1):
            files = manifest["files"].items()
            if not all(_NAME.fullmatch(name) and {"bytes", "crc32"} <= file.keys() for name, file in files):
                raise ValueError
            if not isinstance(manifest["state"], dict) or not isinstance(manifest["step"], int):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}/state.json is damaged; remove {path} to continue from the one before") from None
    if version not in range(1, FORMAT + 1):
        raise ValueError(
            f"{path} has checkpoint format {version}, written by raywm {made_by}; this is raywm {__version__}, which "
            f"reads formats 1 to {FORMAT}; use the raywm that wrote it (pip install raywm=={made_by})"
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
