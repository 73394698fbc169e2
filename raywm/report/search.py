"""The page of a search: its trials as a table and as parallel coordinates, and what it played in reality."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from raywm.checkpoint import atomic_write_text
from raywm.report import plots
from raywm.search import SearchConfig, dumps
from raywm.standings import SOURCE, Trial

SEED = 1_000_000  # of an evaluation whose episodes no trial has played


def write_search_report(search: SearchConfig, out: Path, trials: Sequence[Trial], steps: dict[str, int]) -> Path:
    """Write OUT/report.html from ``standings`` and ``spent``; returns its path."""
    best = best_of(trials)
    name = f"<h1>{html.escape(search.preset)} <small>{len(trials)} trials</small></h1>"
    head = f'<header><p class="kicker">raywm tune</p>{name}'
    if best is not None:
        head += f"<p>Best: trial {best.path.name}, score {_number(best.score)}.</p>"
        head += f"<pre>{html.escape(chr(10).join(commands(out, best)))}</pre>"
    head += f"<p>{html.escape(steps_text(search, steps))}</p></header>"
    sections = [("Parallel coordinates", _chart(search, trials)), ("Trials", _table(search, trials))]
    sections.append(("Search", f"<pre>{html.escape(dumps(search))}</pre>"))
    body = [head, *(f"<section><h2>{title}</h2>{inside}</section>" for title, inside in sections)]
    template = resources.files("raywm.report").joinpath("page.html").read_text()
    title = f"search: {search.preset}"
    page = template.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body))
    atomic_write_text(out / "report.html", page)
    return out / "report.html"


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The first of the standings, if it has a score."""
    return trials[0] if trials and trials[0].status != "failed" and trials[0].score is not None else None


def commands(out: Path, best: Trial) -> list[str]:
    """How to measure the best trial, and the default where it was trained as well, on episodes that none has seen."""
    runs = [best.path, *([out / SOURCE] if (out / SOURCE / "summary.json").is_file() else [])]
    return [f"raywm evaluate {shlex.quote(str(run))} --episodes 100 --seed {SEED}" for run in runs]


def steps_text(search: SearchConfig, steps: dict[str, int]) -> str:
    """What was played in reality, in a sentence."""
    kinds = {"collected": "to train on", "trials": "to decide", "evaluated": "in final evaluations"}
    played = ", ".join(f"{steps[kind]:,} {words}" for kind, words in kinds.items())
    if not steps["shared"]:
        return f"Real steps of the trials: {played}."
    source = "the default, trained first" if search.data == "train" else search.data
    return f"Real steps: {steps['shared']:,} shared, collected once ({source}); of the trials: {played}."


def cells(search: SearchConfig, trial: Trial) -> list[str]:
    """A trial as a row: name, status, reports, the space's values, real return, model quality, score."""
    last = trial.last
    values = [_number(trial.values.get(key)) for key in search.space]
    told = [last.real_return, last.model_quality, last.score] if last else [None] * 3
    return [trial.path.name, trial.status, str(last.turn if last else 0), *values, *map(_number, told)]


def heads(search: SearchConfig) -> list[str]:
    """Names of the cells."""
    return ["trial", "status", "reports", *search.space, "real return", "model quality", "score"]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(search: SearchConfig, trials: Sequence[Trial]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads(search))
    lines = []
    for trial in trials:
        tds = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(search, trial))
        lines.append(f"<tr>{tds}</tr>")
        if trial.error:
            lines.append(f'<tr><td colspan="{len(heads(search))}">{html.escape(trial.error)}</td></tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _chart(search: SearchConfig, trials: Sequence[Trial]) -> str:
    shown = [trial for trial in reversed(trials) if trial.last and trial.score is not None and trial.status != "failed"]
    if not shown:
        return '<p class="missing">No trial has reported yet.</p>'
    axes = [_Axis(key, [t.values.get(key) for t in shown], "log" in search.space[key].kind) for key in search.space]
    for name, values in (
        ("real return", [t.last.real_return if t.last else None for t in shown]),
        ("model quality", [t.last.model_quality if t.last else None for t in shown]),
        ("score", [t.score for t in shown]),
    ):
        if any(v is not None for v in values):
            axes.append(_Axis(name, values))
    width = max(6.0, 1.5 * len(axes))
    fig, ax = plots.figure("", size=(width, 3.6))
    lines = np.array([axis.places for axis in axes]).T  # (trials, axes)
    for index, line in enumerate(lines):
        top = index == len(lines) - 1
        color = plots.MAP(axes[-1].places[index])
        ax.plot(range(len(axes)), line, color=color, linewidth=3.0 if top else 1.3, alpha=1.0 if top else 0.75)
    for at, axis in enumerate(axes):
        ax.axvline(at, color=plots.GRID, linewidth=1.2, zorder=0)
        for place, label in axis.labels:
            ax.annotate(
                label, (at, place), (3, 0), textcoords="offset points", fontsize=8, color=plots.INK, va="center"
            )
    ax.set_xticks(range(len(axes)), [axis.name for axis in axes], rotation=12, fontsize=8.5)
    ax.set_yticks([])
    ax.set_xlim(-0.1, len(axes) - 0.5)
    ax.set_ylim(-0.06, 1.06)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    note = (
        '<p class="how">A line is a trial, from its values on the left to what it reached on the right; the thick one '
        "is the best.</p>"
    )
    return f'{note}<div class="grid wide"><figure>{plots.svg(fig)}</figure></div>'


class _Axis:
    """One axis: where each value is on it, from 0 to 1, and what is written beside it."""

    def __init__(self, name: str, values: Sequence[Any], log: bool = False):
        self.name = name
        numeric = all(v is None or isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if not numeric:
            kinds = list(dict.fromkeys(str(v) for v in values))
            step = 1 / max(1, len(kinds) - 1)
            self.places = [kinds.index(str(v)) * step if len(kinds) > 1 else 0.5 for v in values]
            self.labels = [(i * step if len(kinds) > 1 else 0.5, kind) for i, kind in enumerate(kinds)]
            return
        numbers = [math.nan if v is None else math.log10(v) if log else float(v) for v in values]
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        self.places = [0.5 if high == low else (n - low) / (high - low) for n in numbers]
        ends = sorted({float(low), float(high)})
        self.labels = [(0.5 if high == low else i, f"{10**end if log else end:.3g}") for i, end in enumerate(ends)]
