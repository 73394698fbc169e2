"""`raywm bench replay --memory`: a buffer larger than memory, and one that is written to for a day.

- budget: frames of four times a memory budget are appended to a store and sampled from it. The process's anonymous and
  shared memory (RssAnon + RssShmem: not the page cache, which the system takes back when it wants to) is to stay within
  the budget and a fifth;
- cold: batches from that store when none of its pages is in memory, dropped before each batch, as a share of the rate at
  which this disk gives the same files from their beginnings to their ends, as cold; and warm ones;
- a day: rows of small observations go through a store with a capacity, which a prioritised replay follows, and memory
  and open files are counted on the way. By default as many as a thousand a second make in 24 hours.

Each part has a process of its own, so that the memory counted is its own. All of it needs Linux.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from rich.console import Console
from rich.table import Table

from raywm.bench.common import Say, cell, finish, machine, ratio, spread
from raywm.bench.replay import CODEC, COLUMNS, EPISODE, SHAPE, B, T, episodes
from raywm.data.episode import piece_header, to_block
from raywm.data.replay import Replay
from raywm.data.store import EpisodeStore
from raywm.spaces import ActionCodec

BUDGET_MB, TIMES, SLACK = 256, 4, 0.2
DAY = 24 * 3600 * 1000  # rows
PIECES, ROWS = 100, 200  # of a block of the day: episodes, and rows of each
POINTS = 10
COLD_BATCHES = 32  # a turn
MB = 2**20


def used() -> dict[str, float]:
    """MB of this process by kind: "anon", "shmem", "file"; and how many files it has open."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {kind: int(lines[f"Rss{kind.title()}"].split()[0]) / 1024 for kind in ("anon", "shmem", "file")}
    return sizes | {"fds": float(len(os.listdir("/proc/self/fd")))}


def own() -> float:
    """MB that the system cannot take back."""
    now = used()
    return now["anon"] + now["shmem"]


def within_budget(directory: str, budget_mb: float, seconds: float) -> dict[str, float]:
    """Append TIMES `budget_mb` of frames, then sample for `seconds`; the most memory each took, in MB."""
    frames = int(TIMES * budget_mb * MB / np.prod(SHAPE))
    before = appending = sampling = own()
    with EpisodeStore(directory, COLUMNS, CODEC) as store:
        replay, rng = Replay(store, CODEC), np.random.default_rng(0)
        for episode in episodes(frames):
            store.add(episode)
            appending = max(appending, own())
        began, batch = time.perf_counter(), None
        while time.perf_counter() - began < seconds or batch is None:
            batch = replay.sample(B, T, rng, out=batch)
            sampling = max(sampling, own())
        return {
            **{"budget_mb": budget_mb, "limit_mb": (1 + SLACK) * budget_mb, "stored_mb": store.bytes / MB},
            **{"before_mb": before, "appending_mb": appending, "sampling_mb": sampling},
            "mapped_mb": used()["file"],
        }


# Pages that are not in memory

_libc = ctypes.CDLL(None, use_errno=True)


def drop(paths: Iterable[Path]) -> None:
    """Have the system forget what it keeps of these files; what this process maps of them stays mapped."""
    names = {str(path.resolve()) for path in paths}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            # pages that a process has in its tables are not dropped; those of a file come back when they are touched
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
    for name in names:
        fd = os.open(name, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(paths: Iterable[Path]) -> float:
    """Share of the files' pages that is in memory."""
    here = pages = 0
    for path in paths:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            address = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
            seen = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
            if _libc.mincore(
                ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), ctypes.c_void_p(seen.ctypes.data)
            ):
                raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", str(path))
        here, pages = here + int((seen & 1).sum()), pages + len(seen)
    return here / max(pages, 1)


def read_through(paths: Iterable[Path]) -> float:
    """Bytes/s of reading files from their beginnings to their ends, in order."""
    buffer, total, began = bytearray(MB), 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                total += size
    return total / (time.perf_counter() - began)


def cold(directory: str, seconds: float, turns: int) -> dict[str, Any]:
    """Warm and cold sampling and cold sequential reading, in turns, in bytes of frames a second."""
    rates: dict[str, list[float]] = {"sequential": [], "cold": [], "warm": []}
    size = float(B * T * np.prod(SHAPE))
    with EpisodeStore(directory, codec=CODEC, read_only=True) as store:
        paths, ids = store.segments(), store.ids()
        replay, rng = Replay(store, CODEC), np.random.default_rng(0)
        for id in ids:
            store.parts(id)  # the CRCs are held against once, not by every batch
        batch, left = replay.sample(B, T, rng), 0.0
        for _ in range(turns):
            drop(paths)
            left = max(left, resident(paths))
            rates["sequential"].append(read_through(paths))
            spent = 0.0
            for _ in range(COLD_BATCHES):
                drop(paths)
                began = time.perf_counter()
                replay.sample(B, T, rng, out=batch)
                spent += time.perf_counter() - began
            rates["cold"].append(COLD_BATCHES * size / spent)
            read_through(paths)
            for _ in range(64):  # maps what it touches, and stops asking for what is here
                replay.sample(B, T, rng, out=batch)
            done, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds or not done:
                replay.sample(B, T, rng, out=batch)
                done += 1
            rates["warm"].append(done * size / spent)
    return {
        "bytes_per_second": {name: spread(found) for name, found in rates.items()},
        "cold_share_of_sequential": ratio(rates["cold"], rates["sequential"]),
        "cold_sequences_per_second": spread([rate * B / size for rate in rates["cold"]]),
        "warm_sequences_per_second": spread([rate * B / size for rate in rates["warm"]]),
        "resident_after_drop": left,  # of the pages: what "cold" did not have to read
    }


# A day


def day(directory: str, rows: int, capacity_mb: float) -> list[dict[str, float]]:
    """Append at least `rows` rows to a store of `capacity_mb` under a prioritised replay; what is used, at POINTS."""
    codec, rng = ActionCodec(Discrete(2)), np.random.default_rng(0)
    columns = {"vector": Box(-np.inf, np.inf, (4,), np.float32)}
    n = PIECES * ROWS
    first, last = np.arange(n) % ROWS == 0, np.arange(n) % ROWS == ROWS - 1
    stored = {"obs.vector": rng.standard_normal((n, 4), np.float32), "action": np.zeros(n, codec.dtype)}
    stored |= {"reward": (~first).astype(np.float32), "is_first": first, "is_last": last, "is_terminal": last}
    points: list[dict[str, float]] = []
    blocks, capacity = max(POINTS, -(-rows // n)), int(capacity_mb * MB)
    with EpisodeStore(directory, columns, codec, capacity_bytes=capacity) as store:
        replay, batch, began = Replay(store, codec, mode="prioritized"), None, time.perf_counter()
        for number in range(blocks):
            names = range(number * PIECES, (number + 1) * PIECES)
            infos = [{"number": name, "return": ROWS - 1.0} for name in names]
            heads = [piece_header(f"day-{name:09d}", 0, ROWS, True, info) for name, info in zip(names, infos)]
            store.add(to_block(stored, heads, {"collector": "bench"}))
            batch = replay.sample(B, T, rng, out=batch)
            assert batch.keys is not None
            replay.update(batch.keys, rng.random(B))
            if (number + 1) * POINTS // blocks > len(points):
                held = {"rows": float((number + 1) * n), "held_rows": float(store.rows), "stored_mb": store.bytes / MB}
                points.append({**held, "seconds": time.perf_counter() - began, **used()})
    return points


def growth(points: list[dict[str, float]]) -> dict[str, float]:
    """What was used more at the end than at the middle, when a store has long been full."""
    middle, end = points[len(points) // 2 - 1], points[-1]
    return {
        "mb": end["anon"] + end["shmem"] - middle["anon"] - middle["shmem"],
        "mb_per_million_rows": (end["anon"] + end["shmem"] - middle["anon"] - middle["shmem"])
        / ((end["rows"] - middle["rows"]) / 1e6),
        "fds": end["fds"] - middle["fds"],
    }


def run(
    budget_mb: float = BUDGET_MB,
    rows: int = DAY,
    seconds: float = 3.0,
    turns: int = 5,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure all three parts; the store of the day has `budget_mb` of capacity. Raises ValueError but on Linux."""
    if sys.platform != "linux":
        raise ValueError(f"--memory reads /proc and drops pages, got {sys.platform}, expected linux")
    result: dict[str, Any] = {"machine": machine("raywm", "numpy", "pyarrow", "torch"), "turns": turns}
    with tempfile.TemporaryDirectory(prefix="raywm-bench-") as directory:
        say(f"appending and sampling {TIMES * budget_mb:g} MB of frames")
        result["budget"] = _apart(within_budget, f"{directory}/frames", budget_mb, seconds)
        say("sampling with and without a warm page cache")
        result["cold"] = _apart(cold, f"{directory}/frames", seconds, turns)
    with tempfile.TemporaryDirectory(prefix="raywm-bench-") as directory:
        say(f"appending {rows / 1e6:g} million rows")
        points = _apart(day, directory, rows, budget_mb)
        result["day"] = {"capacity_mb": budget_mb, "points": points, "growth": growth(points)}
    return result


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns (or raises) in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _show(result: dict[str, Any], console: Console) -> None:
    b = result["budget"]
    most = max(b["appending_mb"], b["sampling_mb"])
    console.print(
        f"{b['stored_mb']:,.0f} MB stored with a budget of {b['budget_mb']:g} MB: anonymous and shared memory at most "
        f"{b['appending_mb']:.0f} MB appending, {b['sampling_mb']:.0f} MB sampling ({b['before_mb']:.0f} MB of it before "
        f"the first row): {100 * most / b['limit_mb']:.0f}% of what it may ({b['limit_mb']:.0f} MB)"
    )
    found, turns = result["cold"], result["turns"]
    table = Table(title=f"Frames read, median (min to max) of {turns} turns")
    for column in ("", "MB/s", "sequences/s", "x sequential"):
        table.add_column(column, justify="right" if column else "left")
    rates = found["bytes_per_second"]
    share = cell(found["cold_share_of_sequential"], digits=2)
    table.add_row("sampling, warm", cell(rates["warm"], 1e6, 0), cell(found["warm_sequences_per_second"], digits=0), "")
    cold_sequences = cell(found["cold_sequences_per_second"], digits=0)
    table.add_row("sampling, cold", cell(rates["cold"], 1e6, 0), cold_sequences, share)
    table.add_row("sequential read, cold", cell(rates["sequential"], 1e6, 0), "", "")
    console.print(table)
    if found["resident_after_drop"] > 0.01:
        console.print(f"note: {100 * found['resident_after_drop']:.0f}% of the pages stayed in memory: not quite cold")
    table = Table(title=f"A day of appends into {result['day']['capacity_mb']:g} MB")
    columns = ("million rows", "seconds", "rows held", "stored MB", "anonymous MB", "shared MB", "open files")
    for column in columns:
        table.add_column(column, justify="right")
    for p in result["day"]["points"]:
        cells = [f"{p['rows'] / 1e6:.1f}", f"{p['seconds']:.0f}", f"{p['held_rows']:,.0f}", f"{p['stored_mb']:.0f}"]
        table.add_row(*cells, f"{p['anon']:.1f}", f"{p['shmem']:.1f}", f"{p['fds']:.0f}")
    console.print(table)
    g = result["day"]["growth"]
    console.print(
        f"in its second half: {g['mb']:+.1f} MB ({g['mb_per_million_rows']:+.3f} MB a million rows), "
        f"{g['fds']:+.0f} open files"
    )


def main(
    budget_mb: float = BUDGET_MB,
    rows: int = DAY,
    seconds: float = 3.0,
    turns: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Measure and print tables, or JSON to standard output; `out` receives the JSON as well."""
    finish(lambda say: run(budget_mb, rows, seconds, turns, say), _show, as_json, out)
