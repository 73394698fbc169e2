"""What the benchmarks share: contenders in processes of their own, medians with their spread, tables and JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from raywm.checkpoint import plain

Work = Callable[[], float]  # does a piece of work and says how much it was
Spread = dict[str, float]
Say = Callable[[str], None]

PLATFORM_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def spread(values: Sequence[float]) -> Spread:
    """{"median", "min", "max"} of what was measured in several turns."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the ratios of each turn, because both then met the same neighbours."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def cell(value: Spread, unit: float = 1.0, digits: int = 1, suffix: str = "") -> str:
    """A spread as "median (min to max)", in `unit`s."""
    median, low, high = (f"{value[k] / unit:,.{digits}f}{suffix}" for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*packages: str) -> dict[str, Any]:
    """What figures depend on; with the versions of `packages`."""
    facts: dict[str, Any] = {"cores": cores(), "processor": _processor(), "system": platform.platform()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        facts["load_before"] = round(os.getloadavg()[0], 2)
    facts["python"] = platform.python_version()
    for name in packages:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that these processes have used so far, user and system; those that are gone count as none."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / PLATFORM_TICKS


class Group:
    """Processes that measure the same at the same time; their rates add up.

    `make(*arguments)` gives each process its works by name; it and its arguments must be picklable. A process that dies
    is an EOFError in the call that waits for it.
    """

    def __init__(self, make: Callable[..., dict[str, Work]], arguments: Sequence[Any] = (), processes: int = 1):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, (*arguments,)), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is an end of file here
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def measure(self, name: str, seconds: float) -> float:
        """Amount of work a second of work `name`, over at least `seconds` and one piece of it."""
        for pipe in self.pipes:
            pipe.send((name, seconds))
        return sum(pipe.recv() for pipe in self.pipes)

    def ask(self, name: str) -> Any:
        """What work `name` returns in the first process."""
        self.pipes[0].send((name, None))
        return self.pipes[0].recv()

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def _serve(pipe: Connection, make: Callable[..., dict[str, Work]], arguments: Sequence[Any]) -> None:
    """A contender's process: told a name and seconds, answers with amount of work a second; with what it is without."""
    works = make(*arguments)
    for work in works.values():
        work()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, seconds = order
        if seconds is None:
            pipe.send(works[name]())
            continue
        done, start = 0.0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not done:
            done += works[name]()
        pipe.send(done / spent)


def finish(
    measure: Callable[[Say], dict[str, Any]],
    show: Callable[[dict[str, Any], Console], None],
    as_json: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, with progress on standard error; then a table, or JSON, on standard output. `out` gets the JSON too."""
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    live = sys.stderr.isatty()

    def say(text: str) -> None:  # no spinner: it would take a share of a core from what is measured
        print(f"\r\x1b[K{text}" if live else text, file=sys.stderr, end="" if live else "\n", flush=True)

    result = measure(say)
    if live:
        say("")
    text = json.dumps(plain(result), indent=2, allow_nan=False)
    if out is not None:
        Path(out).write_text(text + "\n")
    if as_json:
        print(text)
    else:
        # a table in a log is as wide as its cells
        show(result, Console(width=None if sys.stdout.isatty() else 200))
    return result
