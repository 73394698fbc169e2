"""One page that compares runs of any algorithm: configs that differ, results with their spread over seeds, curves."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import raywm
from raywm import config as configs
from raywm.report import page, plots
from raywm.report.dreamer import amount, dreamer_summary, signed
from raywm.report.load import Logged
from raywm.report.page import clock, grid, missing, number, say

NAMES = {"vmc": "V-M-C", "dreamer": "Dreamer"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
APART = ("seed", "address", "log.")  # keys that make no other kind of run
SHOWN = 3  # differing keys in the name of a group; the table has them all


class Result(Logged):
    """What a comparison says of one run.

    Attributes: real, spread, episodes: the final measurement, or the last trial's; gap: dream return - real return,
        or None and `why`; points: (P, 3) real steps, seconds and return of the first policy, every trial and the end.
    """

    def __init__(self, run: str | Path):
        super().__init__(run)
        self.leaves = configs.leaves(self.config)
        trials, last = self.kind("trial"), self.rows[-1] if self.rows else {}
        summary = self.summary or ({f"real_{k}": v for k, v in trials[-1].items()} if trials else {})
        self.finished = self.summary is not None
        self.real, self.spread = summary.get("real_return_mean"), summary.get("real_return_std")
        self.tried = summary.get("real_return_episodes", summary.get("real_episodes"))
        self.random = self._random()
        self.steps = (self.summary or last).get("real_env_steps")
        self.start = self._start()
        self.seconds = (self.summary or {}).get("wall_seconds") or (self._seconds(last) if last else None)
        self.gap: float | None = None
        self.why = ""
        self.points = self._points()

    def measure(self) -> None:
        """The dream gap: logged by V-M-C; a Dreamer plays new episodes for it."""
        try:
            if self.config.algorithm == "dreamer":
                self.gap = dreamer_summary(self.path, 128, None)["dream_gap"]
            else:
                trials = self.kind("trial")
                self.gap = (self.summary or (trials[-1] if trials else {})).get("dream_gap")
        except Exception as error:  # an environment that is not installed here must not cost the page
            self.why = f"{type(error).__name__}: {error}"

    def _random(self) -> float | None:
        """The mean return of the policy that played first."""
        if (value := (self.summary or {}).get("random_return_mean")) is not None:
            return value
        if self.config.algorithm == "dreamer":
            first = [row["return"] for row in self.kind("episode") if row["version"] < 0]
            return float(np.mean(first)) if first else None
        return next((row["return_mean"] for row in self.kind("collect")), None)

    def _start(self) -> float:
        """When the run began, for logs that do not say how long it has gone on."""
        if not self.rows:
            return 0.0
        end, wall = self.rows[-1]["time"], (self.summary or {}).get("wall_seconds")
        return self.rows[0]["time"] if wall is None else end - wall

    def _seconds(self, row: dict[str, Any]) -> float:
        return row["wall_seconds"] if "wall_seconds" in row else max(0.0, row["time"] - self.start)

    def _points(self) -> np.ndarray:
        rows = [row for row in self.kind("trial", "evaluate") if row.get("return_mean") is not None]
        points = [(row["real_env_steps"], self._seconds(row), row["return_mean"]) for row in rows]
        if points and self.random is not None:
            points.insert(0, (0, 0.0, self.random))
        return np.array(sorted(points), float).reshape(-1, 3)


@dataclass
class Group:
    """Runs that differ by nothing but their seeds."""

    letter: str
    runs: list[Result]
    color: str = plots.INK
    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # of the keys that differ between groups

    @property
    def label(self) -> str:
        return f"{self.letter}: {self.name}" if self.name else self.letter

    @property
    def algorithm(self) -> str:
        return self.runs[0].config.algorithm

    def of(self, figure: str) -> list[float]:
        """A figure of all runs that have it."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]


def write_comparison(
    runs: Sequence[str | Path], out: str | Path, progress: Callable[[int], Any] = lambda n: None
) -> Path:
    """Write one page about several runs to the file `out`; returns its path. A Dreamer's agent plays new episodes.

    Raises ValueError: fewer than two runs, one of them twice, no run directory, `out` is a directory.
    """
    out, paths = Path(out), [Path(run).resolve() for run in runs]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ValueError(
            f"got {', '.join(map(str, runs)) or 'nothing'}; expected two or more different runs to compare"
        )
    if out.is_dir():
        raise ValueError(f"--out {out}: got a directory, expected the file of a page, e.g. {out / 'comparison.html'}")
    results = []
    for run in runs:
        results.append(Result(run))
        results[-1].measure()
        progress(1)
    groups = grouped(results)
    sections = [
        ("Results", results_table(groups) + notes(groups)),
        ("Curves", curves(groups)),
        ("What differs", differences(groups)),
        ("Runs", runs_table(groups, out)),
        ("The same again", again(groups, runs, out)),
    ]
    head = header(groups).replace(page.CONTENTS, page.contents([title for title, _ in sections]))
    body = [head, *(f'<section id="s{i}"><h2>{t}</h2>{inside}</section>' for i, (t, inside) in enumerate(sections))]
    out.parent.mkdir(parents=True, exist_ok=True)
    page.write_page(out, f"{len(results)} runs compared", body)
    return out


# ------------------------------------------------------------------------------------------------ groups


def grouped(results: Sequence[Result]) -> list[Group]:
    """Groups in the order of their first runs, with the values that tell them apart."""
    found: dict[str, list[Result]] = {}
    for result in results:
        kind = {k: v for k, v in result.leaves.items() if not k.startswith(APART)}
        found.setdefault(json.dumps(kind), []).append(result)
    letters = [LETTERS[i % 26] * (1 + i // 26) for i in range(len(found))]
    groups = [Group(letter, sorted(runs, key=lambda r: r.config.seed)) for letter, runs in zip(letters, found.values())]
    for i, group in enumerate(groups):
        group.color = plots.GROUPS[i % len(plots.GROUPS)]
        group.values = {key: group.runs[0].leaves[key] for key in differing(groups) if used(key, group)}
        same = differing([g for g in groups if g.algorithm == group.algorithm])
        shown = [k for k in group.values if k == "algorithm" or k in same]  # what the algorithm's name says already
        group.name = ", ".join(_short(k, group.values[k]) for k in shown[:SHOWN]) + ", ..." * (len(shown) > SHOWN)
    return groups


def differing(groups: Sequence[Group]) -> list[str]:
    """Keys whose values differ among the groups that use them."""
    keys = [key for key in groups[0].runs[0].leaves if not key.startswith(APART)]
    values = {key: {json.dumps(g.runs[0].leaves[key]) for g in groups if used(key, g)} for key in keys}
    return [key for key in keys if len(values[key]) > 1]


def used(key: str, group: Group) -> bool:
    """Whether a run's algorithm reads a key."""
    section = key.partition(".")[0]
    return all(section not in parts for name, parts in configs.OF.items() if name != group.algorithm)


def _short(key: str, value: Any) -> str:
    return NAMES[value] if key == "algorithm" else f"{key}={_text(value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ------------------------------------------------------------------------------------------------ the page


def header(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    envs = list(dict.fromkeys(run.config.env.id for run in runs))
    out = f"<header><p class='kicker'>raywm {raywm.__version__}, comparison</p>"
    out += f"<h1>{html.escape(', '.join(envs))} <small>{len(runs)} runs</small></h1><h2>What happened</h2>"
    if len(envs) > 1:
        out += missing("The runs are of different environments: their returns cannot be compared.")
    for line in verdicts(groups) if len(envs) == 1 else []:
        out += f"<p>{html.escape(line)}</p>"
    return out + f"{key(groups)}{page.CONTENTS}</header>"


def verdicts(groups: Sequence[Group]) -> list[str]:
    """What the results say, and what so few seeds cannot say."""
    ranked = sorted((g for g in groups if g.of("real")), key=lambda g: -np.mean(g.of("real")))
    if not ranked:
        return ["No run has been tried in reality yet."]
    best = ranked[0]
    lines = [f"{best.label} gets {over(best.of('real'))} in reality, " + _seeds(best) + "."]
    if len(ranked) > 1:
        second = ranked[1]
        apart = min(best.of("real")) > max(second.of("real"))
        lines.append(
            f"Next is {second.label} with {over(second.of('real'))}, {_seeds(second)}. "
            + ("The two do not overlap" if apart else "The two overlap: no clear difference")
            + ("; with one run of either, the difference may be the seed's." if _few(best, second) else ".")
        )
    return lines


def _few(*groups: Group) -> bool:
    return any(len(group.of("real")) < 2 for group in groups)


def _seeds(group: Group) -> str:
    count = len(group.of("real"))
    return "one run" if count == 1 else f"mean and range of {count} runs"


def over(values: Sequence[float], text: Callable[[float], str] = amount) -> str:
    """A mean, and the range where there are several."""
    if not values:
        return "–"
    several = len(values) > 1
    spread = f" ({text(min(values))} to {text(max(values))})".replace(" to ", "\u00a0to\u00a0") if several else ""
    return text(float(np.mean(values))) + spread


def key(groups: Sequence[Group]) -> str:
    """The colours of the groups."""
    marks = (
        f'<span><i class="group" style="background:var(--{plots.CSS[g.color]})"></i>{html.escape(g.label)}</span> '
        for g in groups
    )
    return f'<p class="key groups">{"".join(marks)}</p>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; the first of a row is its name."""
    name = '<th class="name">{}</th>'
    head = name.format(heads[0]) + "".join(f"<th>{h}</th>" for h in heads[1:])
    lines = (f'<td class="name">{row[0]}</td>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def results_table(groups: Sequence[Group]) -> str:
    heads = ("", "runs", "real return", "first policy", "dream gap", "real steps", "time")
    rows = [
        (
            html.escape(g.label),
            str(len(g.runs)),
            over(g.of("real")),
            over(g.of("random")),
            over(g.of("gap"), signed),
            over(g.of("steps"), lambda v: number(round(v))),
            over(g.of("seconds"), clock),
        )
        for g in groups
    ]
    text = "Means over the runs of a row, which differ only by their seeds, and the range from the least to the most. "
    return say(text + "A dream gap near 0 means that returns in the dream are worth what they say.") + table(
        heads, rows
    )


def notes(groups: Sequence[Group]) -> str:
    """What keeps the numbers from saying more."""
    runs = [run for group in groups for run in group.runs]
    out = ""
    for why in dict.fromkeys(run.why for run in runs if run.why):
        out += missing(f"No dream gap of {', '.join(str(run.path) for run in runs if run.why == why)}: {why}")
    going = [str(run.path) for run in runs if not run.finished]
    if going:
        out += missing(f"Not finished, shown as far as they are: {', '.join(going)}.")
    if len({run.tried for run in runs if run.tried}) > 1:
        out += missing("The returns are means over different numbers of episodes; the table of the runs says how many.")
    return out


def differences(groups: Sequence[Group]) -> str:
    keys = differing(groups)
    if not keys:
        return say("Nothing but the seeds.")
    cells = [(k, *(html.escape(_text(g.values[k])) if k in g.values else "" for g in groups)) for k in keys]
    return say("Empty: the algorithm does not use it.") + table(("key", *(g.letter for g in groups)), cells)


def runs_table(groups: Sequence[Group], out: Path) -> str:
    rows = []
    for group in groups:
        for run in group.runs:
            name, there = html.escape(str(run.path)), run.path / "report.html"
            if there.is_file():
                link = Path(os.path.relpath(there, out.parent)).as_posix()
                name = f'<a href="{html.escape(link)}">{name}</a>'
            real = f"{amount(run.real)}" + ("" if run.spread is None else f" ±\u00a0{amount(run.spread)}")
            status = "finished" if run.finished else "not finished"
            cells = (group.letter, str(run.config.seed), real, number(run.tried), signed(run.gap))
            rows.append((name, *cells, number(run.steps), clock(run.seconds), status))
    heads = ("run", "", "seed", "real return", "episodes", "dream gap", "real steps", "time", "")
    return table(heads, rows)


def again(groups: Sequence[Group], runs: Sequence[str | Path], out: Path) -> str:
    lines = [
        shlex.join(["raywm", "train", *configs.command(run.config), "--out", f"{run.path}-again"])
        for group in groups
        for run in group.runs
    ]
    lines.append(shlex.join(["raywm", "report", *map(str, runs), "--out", str(out)]))
    return page.commands(lines)


# ------------------------------------------------------------------------------------------------ curves


def curves(groups: Sequence[Group]) -> str:
    shown = [g for g in groups if any(len(run.points) for run in g.runs)]
    if not shown:
        return missing("Not there yet: no run has been tried in reality.")
    text = "Every dot is a trial without exploration; the diamond is the last measurement. "
    if any(len(g.runs) > 1 for g in groups):
        text += (
            "Thick: the mean over seeds as far as all of them go, in the band from the least to the most; thin: each."
        )
    longest = max(run.points[-1, 1] for g in shown for run in g.runs if len(run.points))
    unit, name = (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 300 else (1.0, "seconds")
    charts = chart(shown, "By real steps", "real steps", 0, 1.0), chart(shown, "By wall-clock", name, 1, unit)
    return say(text) + key(groups) + grid(*charts)


def chart(groups: Sequence[Group], title: str, label: str, column: int, unit: float) -> str:
    """Returns of all groups over one column of their runs' points."""
    fig, ax = plots.figure(title, label, "return", (5.2, 3.6))
    for group in groups:
        lines = [run.points for run in group.runs if len(run.points)]
        several = len(lines) > 1
        for points in lines:
            thin: Any = {"linewidth": 0.8, "alpha": 0.5, "markersize": 2} if several else {"markersize": 3}
            ax.plot(points[:, column] / unit, points[:, 2], color=group.color, marker="o", **thin)
            ax.plot(points[-1:, column] / unit, points[-1:, 2], "D", color=group.color, markersize=4)
        begin, end = max(p[0, column] for p in lines), min(p[-1, column] for p in lines)
        if several and begin < end:  # as far as all of them have been tried
            x = np.linspace(begin, end, 200)
            all_y = np.stack([np.interp(x, points[:, column], points[:, 2]) for points in lines])
            plots.band(ax, x / unit, all_y.min(0), all_y.max(0), group.color, 0.15)
            ax.plot(x / unit, all_y.mean(0), color=group.color, linewidth=2.4)
    targets = {run.config.target.real_return for g in groups for run in g.runs}
    if len(targets) == 1 and (target := targets.pop()) is not None:
        ax.axhline(target, color=plots.MUTED, linestyle=":", linewidth=1.2, label="target")
        plots.legend(ax, loc="lower right")
    ax.set_xlim(left=0)
    return plots.svg(fig)
