"""Ray, started on this machine or joined, with what a run needs checked before it begins."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import raywm
from raywm.config import RunConfig
from raywm.runtime.needs import Need, missing

OBJECT_STORE_BYTES = 512 * 2**20  # local runs: weights and pieces of episodes in flight; the episodes are on disk
VERSION_TIMEOUT_S = 120.0  # the first task on a node may have to unpack raywm there
SAME_BITS = ("torch", "numpy", "gymnasium")  # other versions of these work, and may round or behave differently

# Ray gives an actor as many OpenMP threads as it reserves CPUs (at least one). Waiting threads must not spin: beside a
# busy neighbour that costs most of a batched dream's speed.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def connect(
    address: str | None = None,
    needs: float | Sequence[Need] = 1,
    *,
    modules: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Start a private Ray on this machine (address None or "local") or join the cluster at `address`.

    `needs`: what will be started, or a number of CPUs. `modules` are names of modules that the work imports: raywm and
    the user's own ones (of "module:EnvClass" environments) travel to a cluster, installed ones must be there. Returns
    the cluster's resources. Does nothing but check when Ray is already running.
    Raises ValueError when the cluster lacks what is needed, refuses this process, or has nodes with another raywm,
    Python or Ray, or without a module: one error that says which node has what.
    """
    needs = [Need("worker", count=math.ceil(needs))] if isinstance(needs, (int, float)) else list(needs)
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of abandoned work: what matters is raised
    if ray.is_initialized():
        return _check(needs, "the running Ray")
    if address in (None, "", "local"):
        _start_local(sum(need.count * need.cpus for need in needs), modules)
        return _check(needs, "this machine", memory=False)  # it has swap, and nobody to ask for another machine
    if address.startswith("ray://"):
        raise ValueError(
            f"address {address}: got a Ray client, expected a driver on a node of the cluster, where the run directory "
            "can be written; log in there and use --address auto, or submit the command with ray job submit"
        )
    _check_reachable(address)
    modules = list(modules)
    _join(address, modules)
    try:
        resources = _check(needs, f"the cluster at {address}")
        _check_nodes(modules, say)
    except BaseException:
        ray.shutdown()
        raise
    say(f"joined Ray at {address}: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
    return resources


def _join(address: str, modules: Sequence[str]) -> None:
    """`ray.init`, with what a cluster may have against this process said in one line."""
    try:
        _init(address=address, runtime_env=_runtime_env(modules))
    except ray.exceptions.AuthenticationError as error:
        raise ValueError(
            f"the cluster at {address} refuses this process: {error.message}. Its nodes and this process must hold the "
            "same token, in ~/.ray/auth_token or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token everywhere"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Version mismatch"):
            raise
        there = " ".join(str(error).split()).removeprefix("Version mismatch: ")
        raise ValueError(f"{there}. Install the same Ray and Python on every node and here") from error


def spread(labels: Mapping[str, str]) -> dict[str, Any]:
    """Options of actors whose cores are what is asked for: on as many nodes with these labels as have any."""
    return {} if _in_group() else {"scheduling_strategy": "SPREAD", **on(labels)}


def on(labels: Mapping[str, str]) -> dict[str, Any]:
    """Options of actors that belong on nodes with these labels."""
    return {"label_selector": dict(labels)} if labels and not _in_group() else {}


def beside(node: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Options of actors that are best on a node, if that has these labels and room, else on any with the labels."""
    if _in_group():
        return {}
    return {
        "label_selector": {"ray.io/node-id": node, **labels},
        "fallback_strategy": [{"label_selector": dict(labels)}],
    }


_seats: dict[tuple[Any, str], int] = {}  # (placement group, actor's name): its bundle


def seat(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that put an actor with these `options` into a bundle of its own, where this is a Tune trial.

    Ray alone puts it into any bundle with room for it: two actors of one CPU in that of an actor of six, which then
    waits for ever beside two free bundles. A replacement takes the seat of whoever had its name. In a group that has no
    bundle of just this size free, Ray chooses.
    """
    group = ray.util.get_current_placement_group()
    if group is None:
        return {}
    if (group.id, name) not in _seats:
        wanted = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0)}
        own = ray.get_runtime_context().get_assigned_resources()
        taken = {index for (which, _), index in _seats.items() if which == group.id}
        taken |= {0} if own.get("CPU") or own.get("GPU") else set()  # the trial itself sits in the first
        for index, bundle in enumerate(group.bundle_specs):
            if index not in taken and bundle == {kind: amount for kind, amount in wanted.items() if amount}:
                _seats[group.id, name] = index
                break
        else:
            return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, _seats[group.id, name], True)}


def _in_group() -> bool:
    """Whether this is a Tune trial: its placement group places its actors, and options that do would leave it."""
    return ray.util.get_current_placement_group() is not None


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
    paths = [str(path.parent) for path in _sources(modules)]
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
    except Exception as error:
        if type(error) is not Exception or "timed out during startup" not in str(error):
            raise
        raise ValueError(
            "Ray did not start within its 30 seconds: this machine is too busy, or its disk or memory is full. Try "
            "again when it is free"
        ) from error
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


def _sources(modules: Iterable[str]) -> list[Path]:
    """raywm's own directory, and the user's modules: those that nobody has installed."""
    paths = [path for path in map(_module_path, modules) if "site-packages" not in path.parts]
    return list(dict.fromkeys([Path(raywm.__file__).parent, *paths]))


def _runtime_env(modules: Iterable[str]) -> dict[str, Any]:
    return {"py_modules": [str(path) for path in _sources(modules)], "env_vars": THREADS}


def _check(needs: Sequence[Need], where: str, memory: bool = True) -> dict[str, float]:
    """What the cluster has; actors that need more than there is would wait for ever."""
    nodes = [dict(node) for node in ray.nodes() if node["Alive"]]
    if not memory:
        for node in nodes:
            node["Resources"] = {k: v for k, v in node["Resources"].items() if k != "memory"}
    if lacking := missing(needs, nodes):
        raise ValueError(f"{where} is too small: {'; '.join(lacking)}. Ask for less, or add nodes")
    return ray.cluster_resources()


def environment_modules(id: str) -> list[str]:
    """The modules that an environment of this gymnasium id or "module:EnvClass" comes from."""
    if ":" in id:
        return [id.split(":")[0]]
    import gymnasium

    spec = gymnasium.registry.get(id)
    entry = getattr(spec, "entry_point", None)
    return [entry.split(":")[0]] if isinstance(entry, str) else []


def user_modules(config: RunConfig) -> list[str]:
    """The modules that a run imports beside raywm: its environment's, and its world model's if that is the user's."""
    own = [config.model.kind.split(":")[0]] if ":" in config.model.kind else []
    return [*environment_modules(config.env.id), *own]


def _what_is_here(modules: Sequence[str]) -> dict[str, str]:
    """Versions, and why those of `modules` that cannot be imported cannot."""
    import raywm as here

    found = {"raywm": here.__version__, "Python": platform.python_version(), "Ray": ray.__version__}
    for package in SAME_BITS:
        try:
            found[package] = importlib.metadata.version(package).split("+")[0]  # "+cpu" and "+cu128" are builds of one
        except importlib.metadata.PackageNotFoundError:
            found[f"no {package}"] = "it is not installed"
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module's own code raises
            found[f"no {module}"] = f"{type(error).__name__}: {error}"
    return found


def _check_nodes(modules: Sequence[str], say: Callable[[str], None]) -> None:
    """One tiny task on every node: what the work will import must be there, in the versions of this process."""
    here = _what_is_here([])
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0, max_retries=0)(_what_is_here)
    refs = {
        task.options(scheduling_strategy=strategy(node, soft=False)).remote(modules): ip for node, ip in nodes.items()
    }
    _, late = ray.wait(list(refs), num_returns=len(refs), timeout=VERSION_TIMEOUT_S)
    wrong = {refs[ref]: [f"did not answer within {VERSION_TIMEOUT_S:g} s (see its runtime_env logs)"] for ref in late}
    others: dict[str, list[str]] = {}
    for ref, ip in refs.items():
        if ref in late:
            continue
        try:
            there = ray.get(ref)
        except ray.exceptions.RayError as error:
            wrong[ip] = [f"cannot run raywm ({str(error).strip().splitlines()[-1]})"]
            continue
        texts = wrong.setdefault(ip, [])
        texts += [f"has {name} {there[name]}" for name in ("raywm", "Ray") if there[name] != here[name]]
        if there["Python"].split(".")[:2] != here["Python"].split(".")[:2]:
            texts.append(f"has Python {there['Python']}")
        texts += [f"has {name} ({why})" for name, why in there.items() if name.startswith("no ")]
        differ = [f"{name} {there[name]}" for name in SAME_BITS if there.get(name, here[name]) != here[name]]
        if differ:
            others.setdefault(", ".join(differ), []).append(ip)
    if texts := [f"{ip} {', '.join(what)}" for ip, what in wrong.items() if what]:
        raise ValueError(
            f"not every node of the cluster has what this process has (raywm {here['raywm']}, Python {here['Python']}, "
            f"Ray {here['Ray']}): {'; '.join(texts)}. Install the same everywhere, or take those nodes out"
        )
    for what, ips in others.items():
        say(
            f"{', '.join(ips)}: {what}, here {', '.join(f'{n} {here[n]}' for n in SAME_BITS)}; the same seed may give "
            "other bits there"
        )
