"""Episodes of a finished run or of a dataset as another run's data: collected once, frozen, on the disk once.

Sealed segments never change, so a run that shares them has hard links to them in its own episodes/ (copies where the
file system has no links): it is a whole run directory like any other, and the page cache is common to all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from raywm import checkpoint
from raywm import config as configs
from raywm.config import RunConfig
from raywm.data.dataset import Dataset, read_card
from raywm.data.segment import NAME, DamagedError
from raywm.loops.parts import first_policy

FILE = "data.json"
TRIES = 20  # of listing segments that their owner seals meanwhile


def share(config: RunConfig, out: Path) -> None:
    """Give the run in `out` the episodes of `config.data`, if it has none yet: before anybody opens its store.

    data.json tells the loop of them: their ids, steps, and returns and lengths of those that the first policy played.
    Raises ValueError for what is no run or dataset on this machine, is empty, or is of another environment.
    """
    if config.data is None or (out / FILE).exists():
        return
    about = describe(config, Path(config.data).expanduser())
    with checkpoint.clear_disk_errors(out):
        for folder in about.pop("folders"):
            link(folder, out / "episodes")
    checkpoint.atomic_write_json(out / FILE, about)


def read_shared(out: Path) -> dict[str, Any]:
    """What `share` wrote."""
    shared: dict[str, Any] = json.loads((out / FILE).read_text())
    return shared


def link(folder: Path, to: Path) -> None:
    """Have the segments of the store in `folder` in `to` as well: links to sealed ones, a copy of an open one."""
    to.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(TRIES)):
        try:
            for path in sorted(folder.iterdir()):
                if NAME.fullmatch(path.name):
                    _link(path, to / path.name)
            return
        except FileNotFoundError:
            if not left:
                raise


def _link(path: Path, to: Path) -> None:
    if to.exists():
        return
    if ".open." not in path.name:
        with contextlib.suppress(OSError):
            os.link(path, to)
            return
    part = to.with_name(f"{to.name}.part")
    shutil.copyfile(path, part)
    os.replace(part, to)


def describe(config: RunConfig, source: Path) -> dict[str, Any]:
    """What `share` would give a run of `config`, and the folders of its segments. Raises ValueError as `share` does."""
    if "://" in str(config.data) or not source.is_dir():
        raise ValueError(f"data: got '{config.data}', expected the directory of a run or a dataset on this machine")
    is_run = (source / "config.yaml").is_file()
    if not is_run and not (source / "dataset.json").is_file():
        raise ValueError(f"data: {source} has no config.yaml and no dataset.json, expected a run or a dataset")
    with contextlib.closing(Dataset(source)) as dataset:
        ids, first, env = (_of_run if is_run else _of_dataset)(config, source, dataset)
        if env is not None and env != config.env.model_dump(mode="json"):
            raise ValueError(
                f"data: {source} is of the environment {env}, but this run's is {config.env.model_dump(mode='json')}; "
                "give the run the same env section"
            )
        try:
            steps = sum(_length(dataset, id)[1] for id in ids)
        except DamagedError as error:
            raise ValueError(f"data: {error}; raywm data verify {source} says more") from error
        folders = [store.path for store in dataset.shards.values()]
    if len(ids) < 2:
        raise ValueError(f"data: {source} holds {len(ids)} whole episodes, expected at least 2")
    about = {"source": str(source), "episodes": len(ids), "steps": steps, "ids": ids, "first_policy": first}
    return about | {"folders": folders}


def _of_run(config: RunConfig, source: Path, dataset: Dataset) -> tuple[list[str], list[tuple[float, int]], Any]:
    """What a run accepted; the first policy's are those of its first turn. (A Dreamer's are not told apart.)"""
    theirs = configs.load(source / "config.yaml")
    try:
        state = checkpoint.load(source / "checkpoints", read_only=True).state
    except FileNotFoundError as error:
        raise ValueError(f"data: {error}; continue it with --resume, then share its episodes") from None
    known = set(dataset.ids())
    accepted = state.get("accepted", dataset.ids())
    first: list[tuple[float, int]] = []
    if theirs.algorithm == "vmc" and first_policy(theirs.collect) == first_policy(config.collect):
        first = [_length(dataset, id) for id in accepted[: len(state["random"])] if id in known]
    return [id for id in accepted if id in known], first, theirs.env.model_dump(mode="json")


def _of_dataset(config: RunConfig, source: Path, dataset: Dataset) -> tuple[list[str], list[tuple[float, int]], Any]:
    card = read_card(source) or {}
    same = card.get("policy") == first_policy(config.collect)
    ids = dataset.ids()
    return ids, [_length(dataset, id) for id in ids] if same else [], card.get("env")


def _length(dataset: Dataset, id: str) -> tuple[float, int]:
    """(return, steps) of an episode."""
    for store in dataset.shards.values():
        with contextlib.suppress(KeyError):
            steps, ret = store.length(id)
            return ret, steps
    raise DamagedError(errno.EIO, f"episode {id!r} is gone")
