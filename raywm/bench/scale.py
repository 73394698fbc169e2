"""`raywm bench scale`: how the driver and one shard bear many collectors, beyond the cores of this machine.

Collectors of 4 environments that only sleep (raywm/Sleep-v0, 2.5 ms a step: 10 ms a vector step), RandomAgent and one
local shard. For each number of collectors, in windows of one continuous run: the steps that the shard has acknowledged
against the ideal of 400 a second and collector, and what the driver's process used of a core meanwhile. What each
further unit of work costs the driver, and each block the shard, is what docs/scale.md computes larger clusters from.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console
from rich.table import Table

from raywm.bench.collect import OnRay, rate, steps_of
from raywm.bench.common import Say, cell, cpu_seconds, finish, machine, spread
from raywm.config import EnvConfig
from raywm.runtime.cluster import connect

COLLECTORS = (8, 16, 32)
ENVS, SECONDS_A_STEP = 4, 0.0025
IDEAL = 1 / SECONDS_A_STEP  # steps/s of one collector: its environments sleep one after another
TARGETS = {"share_of_ideal": 0.9, "driver_cores": 0.1}
NODES = (10, 100, 1000)


def measure(collectors: int, seconds: float, turns: int, say: Say) -> dict[str, Any]:
    """One number of collectors on the running Ray: rates, and what the driver and the shard used for them."""
    env = EnvConfig(id="raywm/Sleep-v0", kwargs={"seconds": SECONDS_A_STEP})
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raywm-bench-")))
        say(f"{collectors} collectors: starting them (each is a process: half a minute for 32 on two cores)")
        ours = stack.enter_context(contextlib.closing(OnRay(env, ENVS, directory, collectors)))
        torch = sum(_maps(pid, "libtorch") for pid in ours.pids)
        shard = _holders(directory / ".lock")
        # numbers without an end, as of `raywm collect --steps`
        answers: Any = ours.rollouts.collect(itertools.count(), "scale", lambda: math.inf)
        stack.enter_context(contextlib.closing(answers))
        say(f"{collectors} collectors: waiting until each has answered")
        while len({h.worker for h in ours.heard}) < collectors:
            next(answers)
        windows = []
        for turn in range(turns):
            say(f"{collectors} collectors: turn {turn + 1} of {turns}")
            windows.append(_window(ours, answers, shard, seconds))
        deaths = ours.rollouts.deaths
        answers.close()
        ours.rollouts.pool.drain()
        ours.rollouts.settle()
        stored = _stored(directory)
        units = len(ours.heard)
    return {
        "collectors": collectors,
        "ideal": IDEAL * collectors,
        **{key: spread([w[key] for w in windows]) for key in windows[0]},
        "share_of_ideal": spread([w["steps_per_second"] / (IDEAL * collectors) for w in windows]),
        "collectors_with_torch": torch,
        "worker_deaths": deaths,
        "blocks_per_unit": stored["blocks"] / units,
        "stored": stored,
    }


def _window(ours: OnRay, answers: Any, shard: list[int], seconds: float) -> dict[str, float]:
    """Figures of some seconds. Each worker's rate is from its last answer before to its last one in them."""
    before = [next(h for h in reversed(ours.heard) if h.worker == worker) for worker in {h.worker for h in ours.heard}]
    at, began = len(ours.heard), time.monotonic()
    used, at_shard, at_workers = _own_seconds(), cpu_seconds(shard), cpu_seconds(ours.pids)
    while time.monotonic() - began < seconds:
        next(answers)
    spent = time.monotonic() - began
    heard = ours.heard[at:]
    units = len(heard) / spent
    return {
        "steps_per_second": rate([*before, *heard]),
        "driver_cores": (_own_seconds() - used) / spent,
        "units_per_second": units,
        "driver_messages_per_second": 2 * units,  # an order and its answer
        "driver_bytes_per_second": sum(len(pickle.dumps(h.answer)) for h in heard) / spent,
        "steps_per_unit": sum(steps_of(h.answer) for h in heard) / max(len(heard), 1),
        "shard_cores": (cpu_seconds(shard) - at_shard) / spent,
        "collector_cores": (cpu_seconds(ours.pids) - at_workers) / spent / len(before),
    }


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _maps(pid: int, library: str) -> bool:
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def _holders(path: Path) -> list[int]:
    """Processes that have a file open; none where there is no /proc."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path.resolve()):
                found.append(int(link.parts[2]))
    return sorted(set(found))


def _stored(directory: Path) -> dict[str, float]:
    """Blocks, rows and bytes of what a store holds, from its segments as any Arrow reader sees them."""
    blocks = rows = size = 0
    for path in sorted(directory.glob("segment-*.arrows")):
        size += path.stat().st_size
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                blocks, rows = blocks + 1, rows + batch.num_rows
    return {"blocks": blocks, "rows": rows, "bytes": size}


def per_unit(measured: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What driver and shard use at rest, and for each unit or block a second more: lines through what was measured.

    Where no line rises (one number of collectors, noise) all that was used counts as the units' and blocks'.
    """
    found: dict[str, float] = {}
    for who, of in (("driver", "units"), ("shard", "blocks")):
        work = [m["units_per_second"]["median"] * (1 if of == "units" else m["blocks_per_unit"]) for m in measured]
        used = [m[f"{who}_cores"]["median"] for m in measured]
        slope, rest = np.polyfit(work, used, 1) if len(work) > 1 else (0.0, 0.0)
        if slope <= 0:
            slope, rest = used[-1] / work[-1], 0.0
        found |= {f"{who}_ms_per_{of[:-1]}": 1e3 * float(slope), f"{who}_cores_at_rest": float(rest)}
    return found


def project(measured: Sequence[dict[str, Any]], nodes: Sequence[int] = NODES) -> dict[str, Any]:
    """What each process would see on `nodes` nodes, each of a shard and as many collectors as the most measured.

    What a unit costs the driver does not depend on the number of workers (tests/test_pool.py), so it is what was
    measured.
    """
    most, costs = max(measured, key=lambda m: m["collectors"]), per_unit(measured)
    collectors, units, per = most["collectors"], most["units_per_second"]["median"], most["stored"]  # of one node
    blocks, steps = units * most["blocks_per_unit"], most["steps_per_second"]["median"]
    node = {
        "collectors": collectors,
        "shard_messages_per_second": 2 * blocks,
        "shard_bytes_per_second": steps * per["bytes"] / per["rows"],
        "shard_cores": costs["shard_cores_at_rest"] + blocks * costs["shard_ms_per_block"] / 1e3,
        "collector_messages_per_second": 2 * (units + blocks) / collectors,
    }
    cluster = []
    of_driver = units * costs["driver_ms_per_unit"] / 1e3  # cores for each node
    for count in nodes:
        cluster.append(
            {
                "nodes": count,
                "driver_messages_per_second": 2 * units * count,
                "driver_bytes_per_second": most["driver_bytes_per_second"]["median"] * count,
                "driver_cores": costs["driver_cores_at_rest"] + of_driver * count,
                "storage_bytes_per_second": node["shard_bytes_per_second"] * count,
            }
        )
    full = (1 - costs["driver_cores_at_rest"]) / of_driver
    return {"costs": costs, "node": node, "cluster": cluster, "nodes_at_a_full_driver_core": full}


def run(
    collectors: Sequence[int] = COLLECTORS, seconds: float = 10.0, turns: int = 5, say: Say = lambda text: None
) -> dict[str, Any]:
    """Measure each number of `collectors` over `turns` windows of `seconds`.

    Raises ValueError for numbers below 1.
    """
    if not collectors or min(collectors) < 1:
        raise ValueError(f"collectors are {list(collectors)}, expected numbers of at least 1")
    result: dict[str, Any] = {
        "machine": machine("raywm", "ray", "gymnasium", "numpy"),
        **{"seconds": seconds, "turns": turns, "envs": ENVS, "seconds_a_step": SECONDS_A_STEP, "targets": TARGETS},
    }
    measured: list[dict[str, Any]] = []
    started = not ray.is_initialized()
    connect(None, max(collectors))
    try:
        for count in sorted(set(collectors)):
            measured.append(measure(count, seconds, turns, say))
    finally:
        if started:
            ray.shutdown()
    return {**result, "measured": measured, "projection": project(measured)}


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Measured and ideal steps/s, and the driver's share of a core, over the number of collectors; a PNG."""
    from matplotlib.figure import Figure

    measured = result["measured"]
    counts = [m["collectors"] for m in measured]
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, counts[-1]], [0, IDEAL * counts[-1]], color="0.6", label="ideal")
    for axes, key, label in ((left, "steps_per_second", "measured"), (right, "driver_cores", "driver")):
        middle = [m[key]["median"] for m in measured]
        low = [m[key]["median"] - m[key]["min"] for m in measured]
        high = [m[key]["max"] - m[key]["median"] for m in measured]
        axes.errorbar(counts, middle, (low, high), marker="o", capsize=4, label=label)
        axes.set_xlabel("collectors of 4 environments, 10 ms a vector step")
        axes.set_xticks(counts)
    left.set_ylabel("acknowledged environment steps/s")
    right.axhline(TARGETS["driver_cores"], color="0.6", linestyle="--", label="wanted: below")
    right.set_ylabel("cores used by the driver")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path)


def _show(result: dict[str, Any], console: Console) -> None:
    turns, seconds = result["turns"], result["seconds"]
    table = Table(title=f"Collectors of sleeping environments: median (min to max) of {turns} windows of {seconds:g} s")
    columns = ("collectors", "steps/s", "x ideal", "driver, cores", "units/s", "shard, cores")
    for column in columns:
        table.add_column(column, justify="right")
    for m in result["measured"]:
        table.add_row(
            str(m["collectors"]),
            cell(m["steps_per_second"], digits=0),
            cell(m["share_of_ideal"], digits=3),
            cell(m["driver_cores"], digits=3),
            cell(m["units_per_second"]),
            cell(m["shard_cores"], digits=3),
        )
    console.print(table)
    with_torch = sum(m["collectors_with_torch"] for m in result["measured"])
    console.print(f"collectors that have loaded torch: {with_torch}, wanted 0")
    if deaths := sum(m["worker_deaths"] for m in result["measured"]):
        console.print(f"note: {deaths} collectors died and were replaced; measure again")
    costs, node = result["projection"]["costs"], result["projection"]["node"]
    console.print(
        f"each unit of work costs the driver {costs['driver_ms_per_unit']:.2f} ms, each block the shard "
        f"{costs['shard_ms_per_block']:.2f} ms"
    )
    table = Table(title=f"Projected to nodes of {node['collectors']} such collectors and a shard (docs/scale.md)")
    for column in ("nodes", "driver: messages/s", "driver: kB/s", "driver: cores", "all shards: MB/s"):
        table.add_column(column, justify="right")
    for p in result["projection"]["cluster"]:
        kb, mb = p["driver_bytes_per_second"] / 1e3, p["storage_bytes_per_second"] / 1e6
        cells = [p["driver_messages_per_second"], kb, p["driver_cores"], mb]
        table.add_row(str(p["nodes"]), *(f"{value:,.2f}" for value in cells))
    console.print(table)
    full = result["projection"]["nodes_at_a_full_driver_core"]
    console.print(f"a core of the driver is full with {full:,.0f} such nodes")


def main(
    collectors: Sequence[int] | None = None,
    seconds: float = 10.0,
    turns: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Measure and print tables, or JSON to standard output; `out` gets the JSON, and a PNG beside it the curve."""
    result = finish(lambda say: run(collectors or COLLECTORS, seconds, turns, say), _show, as_json, out)
    if out is not None:
        plot(result, Path(out).with_suffix(".png"))
