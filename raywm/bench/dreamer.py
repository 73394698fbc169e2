"""`raywm bench dreamer`: how long a Dreamer update takes, beside RLlib's DreamerV3, and beside what is possible.

An update trains model, actor and critic on 16 sequences of 64 rows and dreams of 15 steps from every row. In one run,
in turns, each in a process of its own while the others wait, with as many threads as there are cores, on vectors (4
numbers) and on 64x64x3 images, 2 actions:

- RLlib XS: the whole `Learner.update` of RLlib's DreamerV3, model size XS, on a fixed batch;
- raywm, in fp32 and in bf16: `DreamerLearner.update`, with widths as RLlib's and no fewer parameters (without target
  copies, with actor and critic);
- raywm size1m, in fp32 and in bf16: the official smallest size, for which others' figures are known;
- matmul: the rate of a large square product in fp32 and in bf16. An update's FLOPs at that rate are its floor; its
  matrix products alone, in their own shapes, are what it would take with nothing between them.

A ratio is the median of the ratios of each turn. With --gpu, on a GPU: larger sizes on images, each update as it is
and as a CUDA graph, beside the same floors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from raywm import config as configs
from raywm.bench import rllib_dreamer
from raywm.bench.common import Group, Say, Work, cell, cores, cpu_seconds, finish, machine, ratio, spread
from raywm.bench.flops import Products, profile
from raywm.data.batch import Batch, blank
from raywm.learners.dreamer import DreamerLearner
from raywm.learners.memory import keep_memory
from raywm.loops.parts import dreamer_specification
from raywm.runtime.cluster import THREADS
from raywm.spaces import ActionCodec

SHAPE, HORIZON, ACTIONS = (16, 64), 15, 2
SPACES = {
    "vector": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8),
}
RLLIB, SQUARE = "RLlib XS", 2048
# RLlib XS is 256 wide everywhere, with a GRU and one hidden layer: on vectors the same number of parameters exactly.
# On images, with its convolutions (24 to 192 channels), raywm has fewer, for which a wider hidden layer makes up.
WIDTHS = ["rssm.deter=256", "rssm.units=256", "rssm.stoch=32", "rssm.classes=32", "rssm.blocks=1"]
LIKE_XS = {
    "vector": [*WIDTHS, "rssm.hidden=256", "dreamer.actor_layers=1"],
    "image": [*WIDTHS, "rssm.hidden=496", "rssm.depth=24", "dreamer.actor_layers=1"],
}
SIZE_1M = ["rssm.size=1M", "dreamer.actor_layers=3"]
TARGETS = {"vector": {"raywm fp32": 2.5, "raywm bf16": 4.0}, "image": {"raywm fp32": 4.0, "raywm bf16": 6.0}}
# Measured before on 2 cores of a like machine, fp32, size1m (0.64M parameters on vectors); not in this run.
KNOWN_S = {
    "vector": {"official JAX": 0.68, "TorchRL": 0.73, "r2dreamer": 0.90},
    "image": {"r2dreamer": 2.4, "official JAX": 4.5},
}
GPU_SIZES = ("12M", "25M", "100M")
GPU_UPDATES = 5  # between two waits for the device
GPU_SQUARE = 8192


def made(
    what: str, overrides: Sequence[str], shape: tuple[int, int] = SHAPE, device: str = "cpu"
) -> tuple[DreamerLearner, Batch]:
    """A learner of `LIKE_XS` or other overrides, and a fixed random batch for it."""
    columns, codec = {"obs": SPACES[what]}, ActionCodec(gym.spaces.Discrete(ACTIONS))
    data: dict[str, Any] = {"algorithm": "dreamer", "env": {"id": "CartPole-v1"}}
    for override in (f"dreamer.horizon={HORIZON}", *overrides):
        configs.apply_override(data, override)
    config = configs.parse(data)
    spec = dreamer_specification(config, columns, codec)
    return DreamerLearner(spec, 0, device), random_batch(what, shape[0], shape[1] + config.dreamer.context).to(device)


def random_batch(what: str, B: int, T: int) -> Batch:
    """Observations and rewards of noise; in every sequence an episode ends."""
    rng, space = np.random.default_rng(0), SPACES[what]
    image = space.dtype == np.uint8
    batch = blank(B, T, {"obs": (space.shape, torch.uint8 if image else torch.float32)}, ACTIONS)
    shape = (B, T, *space.shape)
    obs = rng.integers(256, size=shape, dtype=np.uint8) if image else rng.normal(size=shape).astype(np.float32)
    batch.obs["obs"].copy_(torch.from_numpy(obs))
    batch.reward.copy_(torch.from_numpy(rng.normal(size=(B, T)).astype(np.float32)))
    for flags in (batch.is_first, batch.is_last, batch.is_terminal):
        flags.zero_()
    end = T // 6
    batch.is_first[:, end + 1] = batch.is_last[:, end] = batch.is_terminal[:, end] = True
    batch.mask.fill_(True)
    batch.action.copy_(torch.from_numpy(np.eye(ACTIONS, dtype=np.float32)[rng.integers(ACTIONS, size=(B, T))]))
    batch.action[batch.is_first] = 0
    return batch


def parameters(learner: DreamerLearner) -> int:
    """Of model, actor and critic; the slow critic is not counted."""
    return sum(p.numel() for part in (learner.model, learner.actor, learner.critic) for p in part.parameters())


# ------------------------------------------------------------------------------------------------------ contenders


def raywm_works(what: str, overrides: Sequence[str], shape: tuple[int, int], device: str = "cpu") -> dict[str, Work]:
    """ "update", and "facts" once."""
    torch.set_num_threads(cores())
    keep_memory()  # as a run's learners do
    learner, batch = made(what, overrides, shape, device)
    compiled, learner.config["compile"] = learner.config["compile"], False
    with Products() as products:  # which sees no compiled calls
        losses = [float(learner.update(batch)["model_loss"])]
    learner.config["compile"] = compiled
    losses.append(float(learner.update(batch)["model_loss"]))
    learner.update(batch)  # which records it, where the next ones replay it
    facts = {
        "parameters": parameters(learner),
        "flop": products.flop,
        "losses": losses,
        "products_s": products.seconds(),
        "where": profile(learner, batch) if device == "cpu" else None,
    }
    updates = 1 if device == "cpu" else GPU_UPDATES

    def work() -> float:
        for _ in range(updates):
            learner.update(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        return float(updates)

    return {"facts": lambda: facts, "update": work}  # type: ignore[dict-item, return-value]


def rllib_works(what: str, shape: tuple[int, int]) -> dict[str, Work]:
    space = SPACES[what] if what == "vector" else gym.spaces.Box(-1.0, 1.0, SPACES[what].shape, np.float32)
    return rllib_dreamer.works(space, ACTIONS, shape, HORIZON)


def matmul_works(side: int, device: str = "cpu") -> dict[str, Work]:
    """FLOPs of a large square product, by precision."""
    torch.set_num_threads(cores())

    def multiply(dtype: torch.dtype) -> Work:
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))

        def work() -> float:
            torch.mm(a, b, out=out)
            if device != "cpu":
                torch.cuda.synchronize()
            return 2.0 * side**3

        return work

    return {"fp32": multiply(torch.float32), "bf16": multiply(torch.bfloat16)}


Made = tuple[Callable[..., dict[str, Work]], tuple[Any, ...]]


def contenders(what: str, shape: tuple[int, int]) -> dict[str, Made]:
    """Name -> what makes it and its arguments; those of raywm end in their precision."""
    found: dict[str, Made] = {RLLIB: (rllib_works, (what, shape))}
    for name, overrides in (("raywm", LIKE_XS[what]), ("raywm size1m", SIZE_1M)):
        for precision in ("fp32", "bf16"):
            found[f"{name} {precision}"] = (
                raywm_works,
                (what, [*overrides, f"dreamer.precision={precision}"], shape),
            )
    return found


# ------------------------------------------------------------------------------------------------------ measuring


def measure_case(
    found: dict[str, Made], matmul: Made, seconds: float, turns: int, say: Say, title: str
) -> dict[str, Any]:
    """Each contender in turn; see ``run``."""
    groups: dict[str, Group] = {}
    before = {k: os.environ.get(k) for k in THREADS}
    os.environ.update(THREADS)  # threads that wait must not spin while another contender is measured
    try:
        for name, (make, arguments) in {**found, "matmul": matmul}.items():
            say(f"starting {title}: {name}")
            groups[name] = Group(make, arguments)
        facts = {name: groups[name].ask("facts") for name in found}
        rates: dict[str, list[float]] = {name: [] for name in (*found, "fp32", "bf16")}
        cpu: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(turns):
            for name in found:
                say(f"{title}, turn {turn + 1} of {turns}: {name}")
                group, used, start = groups[name], cpu_seconds(groups[name].pids), time.perf_counter()
                rates[name].append(rate := group.measure("update", seconds))
                updates = rate * (time.perf_counter() - start)
                cpu[name].append((cpu_seconds(group.pids) - used) / updates)
            for precision in ("fp32", "bf16"):
                rates[precision].append(groups["matmul"].measure(precision, min(seconds, 2.0)))
    finally:
        for group in groups.values():
            group.stop()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return {
        "contenders": {
            name: {"cpu_s": spread(cpu[name]), **_one(rates[name], facts[name], rates[_precision(name)])}
            for name in found
        },
        "matmul_flop_per_second": {precision: spread(rates[precision]) for precision in ("fp32", "bf16")},
        "ratios": {name: ratio(rates[name], rates[RLLIB]) for name in found if RLLIB in found and name != RLLIB},
    }


def _precision(name: str) -> str:
    return "bf16" if "bf16" in name else "fp32"


def _one(rates: Sequence[float], facts: dict[str, Any], matmul: Sequence[float]) -> dict[str, Any]:
    update = spread([1 / r for r in rates])
    shares = spread([facts["flop"] * rate / full for rate, full in zip(rates, matmul, strict=True)])
    own = {"products_share": facts["products_s"] / update["median"]} if "products_s" in facts else {}
    return {"update_s": update, "floor_share": shares, **own, **facts}


def run(
    what: Sequence[str] = ("vector", "image"),
    seconds: float = 10.0,
    turns: int = 5,
    say: Say = lambda text: None,
    shape: tuple[int, int] = SHAPE,
) -> dict[str, Any]:
    """Measure; `seconds` or one update for each contender in each turn.

    Returns:
        "cases": for each of `what` "contenders": by name "update_s", "cpu_s" (CPU time of an update, which a busy
        machine changes less), "floor_share" (the update's FLOPs at the rate of
        the square product, over its time), "products_share" (the time of its matrix products alone, over its time),
        "parameters", "flop", "losses" of the first two updates, "where" (see ``flops.profile``); and "ratios" of
        updates/s, to RLlib's.
    """
    result: dict[str, Any] = {
        "machine": machine("torch", "ray"),
        "sizes": {"batch": shape[0], "sequence": shape[1], "horizon": HORIZON, "turns": turns},
        "targets": TARGETS,
        "known_s": KNOWN_S,
        "cases": {},
    }
    for case in what:
        found = contenders(case, shape)
        result["cases"][case] = measure_case(found, (matmul_works, (SQUARE,)), seconds, turns, say, case)
    return result


def run_gpu(seconds: float = 10.0, turns: int = 5, say: Say = lambda text: None) -> dict[str, Any]:
    """As ``run``, for images and `GPU_SIZES` on a GPU, size after size. Raises ValueError where torch sees none."""
    if not torch.cuda.is_available():
        raise ValueError("--gpu, but this torch sees no GPU; install a CUDA build of torch on a machine with one")
    result: dict[str, Any] = {
        "machine": {**machine("torch"), "gpu": torch.cuda.get_device_name()},
        "sizes": {"batch": SHAPE[0], "sequence": SHAPE[1], "horizon": HORIZON, "turns": turns},
        "targets": {},
        "known_s": {},
        "cases": {},
    }
    compiled, graph = ["dreamer.compile=true"], ["dreamer.num_gpus=1", "dreamer.cuda_graph=true"]
    ways = {"": [], " compiled": compiled, " graph": graph, " compiled graph": [*compiled, *graph]}
    for size in GPU_SIZES:
        for precision in ("fp32", "bf16"):  # one after the other: four learners at once fill a GPU enough
            plain = [f"rssm.size={size}", f"dreamer.precision={precision}"]
            found: dict[str, Made] = {
                f"raywm {size} {precision}{way}": (raywm_works, ("image", [*plain, *more], SHAPE, "cuda"))
                for way, more in ways.items()
            }
            matmul, case = (matmul_works, (GPU_SQUARE, "cuda")), f"{size} {precision}"
            result["cases"][f"image, {case}"] = measure_case(found, matmul, seconds, turns, say, case)
    return result


# ------------------------------------------------------------------------------------------------------ showing


def _show(result: dict[str, Any], console: Console) -> None:
    sizes = result["sizes"]
    for case, found in result["cases"].items():
        title = f"{case}: one update at {sizes['batch']} x {sizes['sequence']}, horizon {sizes['horizon']}"
        table = Table(title=f"{title}, median (min to max) of {sizes['turns']} turns")
        table.add_column("", min_width=9)
        for column in ("ms", f"x {RLLIB}", "CPU ms", "M weights", "GFLOP", "of the floor", "matmuls"):
            table.add_column(column, justify="right")
        for name, one in found["contenders"].items():
            products = one.get("products_share")
            table.add_row(
                name,
                cell(one["update_s"], 1e-3, 0),
                cell(found["ratios"][name], digits=2) if name in found["ratios"] else "",
                f"{one['cpu_s']['median'] * 1e3:,.0f}",
                f"{one['parameters'] / 1e6:.2f}",
                f"{one['flop'] / 1e9:,.0f}",
                cell(one["floor_share"], 0.01, 0, "%"),
                "" if products is None else f"{products:.0%}",
            )
        for name, known in result["known_s"].get(case, {}).items():
            table.add_row(f"{name} size1m, measured before", f"{known * 1e3:,.0f}", *[""] * 6)
        console.print(table)
        rates = [f"{p} {cell(rate, 1e9, 0)}" for p, rate in found["matmul_flop_per_second"].items()]
        console.print(f"floor: FLOPs of the update at the rate of a square product, GFLOP/s: {', '.join(rates)}")
        for name, least in result["targets"].get(case, {}).items():
            if name in found["ratios"]:
                console.print(f"{name} / {RLLIB}: {found['ratios'][name]['median']:.2f}, wanted {least:g}")
        _show_where(found["contenders"], console)


def _show_where(found: dict[str, Any], console: Console) -> None:
    shown = {name: one["where"] for name, one in found.items() if one.get("where")}
    for part in ("kinds", "phases"):
        if not shown:
            continue
        table = Table(title="Where the time of an update goes" if part == "kinds" else "The same by phase")
        table.add_column("")
        for name in shown:
            table.add_column(name, justify="right")
        for row in next(iter(shown.values()))[part]:
            table.add_row(row, *(f"{where[part].get(row, 0):.1%}" for where in shown.values()))
        console.print(table)


def _show_learnt(result: dict[str, Any], console: Console) -> None:
    best = "none" if result["best_mean_20"] is None else f"{result['best_mean_20']:.1f}"
    console.print(
        f"RLlib DreamerV3 {result['settings']['model_size']} on CartPole-v1, seed {result['settings']['seed']}: "
        f"{result['env_steps']:,} real steps and {result['updates']:,} updates in {result['seconds']:.0f} s; best mean "
        f"of 20 episodes {best}, last return {result['last_return']:g}"
    )


def main(
    what: str = "all",
    seconds: float = 10.0,
    turns: int = 5,
    gpu: bool = False,
    learn_rllib: float | None = None,
    seed: int = 0,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Measure and print tables, or JSON to standard output; `out` receives the JSON as well."""
    cases = list(SPACES) if what == "all" else [what]
    if what != "all" and what not in SPACES:
        raise ValueError(f"--what {what}, expected one of {', '.join(SPACES)} or all")
    if learn_rllib is not None:
        finish(lambda say: rllib_dreamer.learn(learn_rllib, seed, say), _show_learnt, as_json, out)
    elif gpu:
        finish(lambda say: run_gpu(seconds, turns, say), _show, as_json, out)
    else:
        finish(lambda say: run(cases, seconds, turns, say), _show, as_json, out)
