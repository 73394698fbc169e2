"""Ray, started on this machine or joined, with what a run needs checked before it begins."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray

import raywm

OBJECT_STORE_BYTES = 512 * 2**20  # local runs: weights and pieces of episodes in flight; the episodes are on disk
VERSION_TIMEOUT_S = 120.0  # the first task on a node may have to unpack raywm there

# Ray gives an actor as many OpenMP threads as it reserves CPUs (at least one). Waiting threads must not spin: beside a
# busy neighbour that costs most of a batched dream's speed.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def connect(
    address: str | None = None,
    needed_cpus: float = 1,
    needed_gpus: float = 0,
    *,
    modules: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Start a private Ray on this machine (address None or "local") or join the cluster at `address`.

    `modules` are the names of the user's own modules (those of "module:EnvClass" environments); on a cluster they
    and raywm travel along. Returns the cluster's resources. Does nothing but check when Ray is already running.
    Raises ValueError when the cluster lacks what is needed or its nodes run another raywm or Python.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of abandoned work: what matters is raised
    if ray.is_initialized():
        return _check(needed_cpus, needed_gpus, "the running Ray")
    if address in (None, "", "local"):
        _start_local(needed_cpus, modules)
        return _check(needed_cpus, needed_gpus, "this machine")
    if address.startswith("ray://"):
        raise ValueError(
            f"address {address}: got a Ray client, expected a driver on a node of the cluster, where the run directory "
            "can be written; log in there and use --address auto, or submit the command with ray job submit"
        )
    _check_reachable(address)
    _init(address=address, runtime_env=_runtime_env(modules))
    try:
        resources = _check(needed_cpus, needed_gpus, f"the cluster at {address}")
        _check_versions()
    except BaseException:
        ray.shutdown()
        raise
    say(f"joined Ray at {address}: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
    return resources


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like are Ray's to find
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster at {address!r} ({error}). Check the address, start one with `ray up` or "
            "`ray start --head`, or leave the address out to run on this machine"
        ) from error


def _start_local(needed_cpus: float, modules: Iterable[str]) -> None:
    # Workers inherit this process's environment: put first on their path what this process imports from, or a raywm run
    # from a checkout would not be found (or another, installed one would be).
    paths = [str(path.parent) for path in (Path(raywm.__file__).parent, *map(_module_path, modules))]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    before = dict(os.environ)
    os.environ.update(THREADS, PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))
    try:
        _init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(needed_cpus)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    finally:
        for key in ("PYTHONPATH", *THREADS):
            os.environ.pop(key, None)
            if key in before:
                os.environ[key] = before[key]


def _init(**options: Any) -> None:
    """`ray.init`, quiet, and without its handler of SIGTERM where this process has one of its own."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    finally:
        if callable(own) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


def _module_path(name: str) -> Path:
    """The file or package directory of a user's top-level module."""
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec is None or spec.origin is None:
        raise ValueError(f"module {name!r} cannot be found from {os.getcwd()}; put its directory on PYTHONPATH")
    return Path(spec.origin)


def _runtime_env(modules: Iterable[str]) -> dict[str, Any]:
    paths = [Path(raywm.__file__).parent, *map(_module_path, modules)]
    paths = [path for path in paths if path.name == "raywm" or "site-packages" not in path.parts]
    return {"py_modules": [str(path) for path in dict.fromkeys(paths)], "env_vars": THREADS}


def _check(needed_cpus: float, needed_gpus: float, where: str) -> dict[str, float]:
    """What the cluster has; actors that need more than there is would wait for ever."""
    have = ray.cluster_resources()
    lacking = [
        f"{needed:g} {kind}s needed, {have.get(kind, 0):g} there"
        for kind, needed in (("CPU", needed_cpus), ("GPU", needed_gpus))
        if have.get(kind, 0) < needed
    ]
    if lacking:
        raise ValueError(f"{where} is too small: {'; '.join(lacking)}. Ask for fewer workers, or add nodes")
    return have


def _versions() -> tuple[str, str]:
    import raywm as there

    return there.__version__, platform.python_version()


def _check_versions() -> None:
    """One tiny task on every node: it must run the raywm and the Python (major.minor) of this process."""
    here = _versions()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0, max_retries=0)(_versions)
    refs = {task.options(scheduling_strategy=strategy(node, soft=False)).remote(): ip for node, ip in nodes.items()}
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=VERSION_TIMEOUT_S)
    if late:
        raise ValueError(
            f"no answer within {VERSION_TIMEOUT_S:g} s from {', '.join(refs[ref] for ref in late)}; "
            "look at the node's runtime_env logs, or take it out of the cluster"
        )
    for ref in done:
        try:
            there = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"node {refs[ref]} cannot run raywm: {str(error).strip().splitlines()[-1]}. Install raywm's "
                "dependencies there"
            ) from error
        if there[0] != here[0] or there[1].split(".")[:2] != here[1].split(".")[:2]:
            raise ValueError(
                f"node {refs[ref]} has raywm {there[0]} on Python {there[1]}, this process raywm {here[0]} on Python "
                f"{here[1]}; install the same on every node"
            )
