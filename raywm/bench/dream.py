"""`raywm bench dream`: how fast is a unit of dreams, beside what others do with the same model, and what is possible.

The model is V-M at latent 32, hidden 256, 5 components in one joint mixture, 3 discrete actions; a unit is 64 linear
controllers x 16 dreams of 50 steps (1024 rows, all of which live to the end). In one run, in turns:

- unit: `DreamWorker.evaluate`, what the DreamPool's workers run, in fp32 and in bf16;
- plain batch: the same model, straightforwardly in PyTorch, fp32, 1024 rows;
- one rollout a process: that plain model with a batch of 1, how most world-model code dreams;
- matmul: the fp32 rate of this machine, the higher of a large square product's and of the step's own shapes'; the FLOPs
  of a step's matrix products at that rate are the floor.

Each is measured with as many threads as there are cores and as two processes of one thread (one rollout a process only
so). Contenders live in processes of their own, so that none profits from what another did to the memory allocator. A
ratio is the median of the ratios of each turn, because both then met the same neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raywm.bench.common import Group, Work, cell, cores, finish, machine, ratio, spread
from raywm.controllers import Controller
from raywm.learners.fitness import DreamWorker
from raywm.models import build_model
from raywm.models.nets import mlp
from raywm.models.vm import VM
from raywm.runtime.cluster import THREADS
from raywm.spaces import ActionCodec

LATENT, HIDDEN, MIXTURES, ACTIONS, HEAD = 32, 256, 5, 3, 128
POPULATION, ROLLOUTS, HORIZON = 64, 16, 50
ROWS = POPULATION * ROLLOUTS
TURNS, PROCESSES = 7, 2
SINGLE = "one rollout a process"
MODEL: dict[str, Any] = {
    "kind": "vm",
    "columns": {"vector": ((LATENT,), False)},
    "act_dim": ACTIONS,
    "hidden": HIDDEN,
    "mixtures": MIXTURES,
    "head_hidden": HEAD,
}
TARGETS = {"plain": 1.2, "floor": 0.5}


class Plain(nn.Module):
    """V-M's step as one writes it down in PyTorch, with the weights of a VM."""

    def __init__(self, model: VM):
        super().__init__()
        self.cell = nn.LSTMCell(LATENT + ACTIONS, HIDDEN)
        self.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in model.memory.lstm.state_dict().items()})
        self.mixture = mlp([HIDDEN + LATENT + ACTIONS, HEAD, MIXTURES * (1 + 2 * LATENT)])
        self.reward = mlp([HIDDEN + 2 * LATENT + ACTIONS, HEAD, 1])
        self.end = mlp([HIDDEN + 2 * LATENT + ACTIONS, HEAD, 1])
        for name in ("mixture", "reward", "end"):
            getattr(self, name).load_state_dict(getattr(model.memory, name).state_dict())

    def forward(self, z: Tensor, h: Tensor, c: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """One step of (B, *) rows: z, h, c, reward (B,), cont (B,)."""
        x = torch.cat([z, action], -1)
        h, c = self.cell(x, (h, c))
        out = self.mixture(torch.cat([h, x], -1))
        logits, mean, logstd = out.split([MIXTURES, MIXTURES * LATENT, MIXTURES * LATENT], -1)
        pick = torch.multinomial(logits.softmax(-1), 1).unsqueeze(1).expand(-1, LATENT, 1)  # (B, Z, 1)
        mean = mean.unflatten(-1, (LATENT, MIXTURES)).gather(-1, pick).squeeze(-1)
        logstd = logstd.unflatten(-1, (LATENT, MIXTURES)).gather(-1, pick).squeeze(-1)
        z = z + mean + logstd.clamp(-6, 4).exp() * torch.randn_like(mean)
        seen = torch.cat([h, x, z], -1)
        return z, h, c, self.reward(seen).squeeze(-1), torch.sigmoid(-self.end(seen).squeeze(-1))

    @torch.inference_mode()
    def returns(self, weight: Tensor, bias: Tensor, rollouts: int) -> Tensor:
        """Returns (P * E,) of dreams under linear controllers (P, F, A), (P, 1, A)."""
        rows = len(weight) * rollouts
        z, h, c = torch.zeros(rows, LATENT), torch.zeros(rows, HIDDEN), torch.zeros(rows, HIDDEN)
        alive, total = torch.ones(rows), torch.zeros(rows)
        for _ in range(HORIZON):
            features = torch.cat([z, h], -1).view(len(weight), rollouts, -1)
            scores = torch.bmm(features, weight) + bias  # (P, E, A)
            action = F.one_hot(scores.argmax(-1).flatten(), ACTIONS).float()
            z, h, c, reward, cont = self(z, h, c, action)
            total += alive * reward
            alive = alive * (torch.rand(rows) < cont)
        return total


def _model() -> VM:
    """Random weights, and ends that never come, so that a unit always has the same work."""
    torch.manual_seed(0)
    model = build_model(**MODEL).eval()
    assert isinstance(model, VM)
    with torch.no_grad():
        model.memory.end[-1].get_parameter("bias").fill_(-30.0)
    return model


def _unit(precision: str, threads: int) -> Work:
    model = _model()
    controller: dict[str, Any] = {"feat_dim": model.feat_dim, "act_dim": ACTIONS}
    spec = {"model": MODEL, "controller": controller, "codec": ActionCodec(Discrete(ACTIONS))}
    worker = DreamWorker(spec, starts=ROLLOUTS, horizon=HORIZON, precision=precision, threads=threads)
    firsts = {name: torch.zeros(256, model.latent) for name in ("z_mean", "z_std")}  # as a vision encodes them
    worker.load(model.state_dict(), firsts)
    theta = np.random.default_rng(0).normal(size=(POPULATION, Controller(**controller).size)) * 0.1
    return lambda: float(worker.evaluate(theta, 0)[1].sum())


def _plain(population: int, rollouts: int, threads: int) -> Work:
    torch.set_num_threads(threads)
    model = _model()
    plain = Plain(model)
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(population, model.feat_dim, ACTIONS, generator=rng) * 0.1, torch.zeros(population, 1, 3)

    def work() -> float:
        plain.returns(weight, bias, rollouts)
        return population * rollouts * HORIZON

    return work


def _matmul(shapes: list[tuple[int, int, int]], threads: int) -> Work:
    """FLOPs of products (m, k) @ (k, n) into buffers that are there already."""
    torch.set_num_threads(threads)
    triples = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes]

    def work() -> float:
        for a, b, out in triples:
            torch.mm(a, b, out=out)
        return sum(2.0 * m * k * n for m, k, n in shapes)

    return work


def step_shapes() -> list[tuple[int, int, int]]:
    """A step's matrix products, those that share an input as one."""
    seen = HIDDEN + LATENT + ACTIONS
    return [
        (ROWS, seen, 4 * HIDDEN),
        (ROWS, seen, HEAD),
        (ROWS, HEAD, MIXTURES * (1 + 2 * LATENT)),
        (ROWS, seen + LATENT, 2 * HEAD),
        (ROWS, HEAD, 2),
    ]


def flop_per_step() -> float:
    """FLOPs of every matrix product of one row's step, the controller's among them, as torch counts them."""
    plain, controller = Plain(_model()), torch.zeros(1, LATENT + HIDDEN, ACTIONS)
    z, h = torch.zeros(ROWS, LATENT), torch.zeros(ROWS, HIDDEN)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(z, h, h, torch.zeros(ROWS, ACTIONS))
        torch.bmm(torch.cat([z, h], -1).unsqueeze(0), controller)
    return counter.get_total_flops() / ROWS


# Kinds of processes, and what each can measure.
WORKS: dict[str, dict[str, Callable[[int], Work]]] = {
    "unit fp32": {"unit fp32": lambda threads: _unit("fp32", threads)},
    "unit bf16": {"unit bf16": lambda threads: _unit("bf16", threads)},
    "plain batch": {"plain batch": lambda threads: _plain(POPULATION, ROLLOUTS, threads)},
    "others": {
        SINGLE: lambda threads: _plain(1, 1, threads),
        "matmul, square": lambda threads: _matmul([(2048, 2048, 2048)], threads),
        "matmul, a step's shapes": lambda threads: _matmul(step_shapes(), threads),
    },
}


def _works(kind: str, threads: int) -> dict[str, Work]:
    return {name: make(threads) for name, make in WORKS[kind].items()}


def run(seconds: float = 5.0, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure everything; `seconds` for each contender, in TURNS turns.

    Returns:
        "setups": for "threads" and "processes" a dict of name -> {"median", "min", "max"} in steps/s (matmul: FLOP/s),
        and "ratios" of the units against the plain batch, one rollout a process and the fp32 floor.
    """
    every = cores()
    flop = flop_per_step()
    result: dict[str, Any] = {
        "sizes": {
            **{"latent": LATENT, "hidden": HIDDEN, "mixtures": MIXTURES, "actions": ACTIONS, "head_hidden": HEAD},
            **{"population": POPULATION, "rollouts": ROLLOUTS, "horizon": HORIZON, "turns": TURNS},
        },
        "machine": machine("torch"),
        "flop_per_step": flop,
        "targets": TARGETS,
        "setups": {},
    }
    setups = {f"1 process x {every} threads": (1, every), f"{PROCESSES} processes x 1 thread": (PROCESSES, 1)}
    before = {k: os.environ.get(k) for k in THREADS}
    os.environ.update(THREADS)  # contenders wait for their threads as the pool's workers do
    groups: dict[tuple[str, str], Group] = {}
    try:
        for setup, (processes, threads) in setups.items():
            for kind in WORKS:
                progress(f"starting {kind}, {setup}")
                groups[setup, kind] = Group(_works, (kind, threads), processes)
        rates: dict[str, dict[str, list[float]]] = {s: {name: [] for w in WORKS.values() for name in w} for s in setups}
        for turn in range(TURNS):
            progress(f"turn {turn + 1} of {TURNS}")
            for (setup, kind), group in groups.items():
                for name in WORKS[kind]:
                    if name != SINGLE or len(group.pipes) == PROCESSES:
                        rates[setup][name].append(group.measure(name, seconds / TURNS))
    finally:
        for group in groups.values():
            group.stop()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    for setup, found in rates.items():
        square, shapes = found["matmul, square"], found["matmul, a step's shapes"]
        found[SINGLE] = rates[list(setups)[-1]][SINGLE]
        found["fp32 floor"] = [max(a, b) / flop for a, b in zip(square, shapes, strict=True)]
        ratios = {
            f"{unit} / {other}": ratio(found[unit], found[other])
            for unit in ("unit fp32", "unit bf16")
            for other in ("plain batch", SINGLE, "fp32 floor")
        }
        result["setups"][setup] = {**{name: spread(values) for name, values in found.items()}, "ratios": ratios}
    return result


def _show(result: dict[str, Any], console: Console) -> None:
    for setup, found in result["setups"].items():
        table = Table(title=f"Dream steps/s, {setup}: median (min to max) of {result['sizes']['turns']} turns")
        table.add_column("")
        for column in ("steps/s", "x plain batch", "x one rollout a process", "x fp32 floor"):
            table.add_column(column, justify="right")
        for name in ("unit fp32", "unit bf16", "plain batch", SINGLE, "fp32 floor"):
            others = ("plain batch", SINGLE, "fp32 floor")
            ratios = [found["ratios"].get(f"{name} / {other}") for other in others]
            cells = [cell(r, 1, 2) if r else "" for r in ratios]
            table.add_row(name, cell(found[name], 1e3, 1, "k"), *cells)
        console.print(table)
        square, shapes = (found[f"matmul, {k}"] for k in ("square", "a step's shapes"))
        better = "square" if square["median"] >= shapes["median"] else "a step's shapes"
        console.print(
            f"floor: {result['flop_per_step'] / 1e6:.3f} MFLOP a step at the higher fp32 rate ({better}); square "
            f"{cell(square, 1e9, 0)}, a step's shapes {cell(shapes, 1e9, 0)} GFLOP/s\n"
        )


def main(seconds: float = 5.0, as_json: bool = False, out: str | Path | None = None) -> None:
    """Measure and print a table, or JSON to standard output; `out` receives the JSON as well."""
    finish(lambda say: run(seconds, say), _show, as_json, out)
