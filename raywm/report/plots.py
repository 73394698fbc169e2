"""Charts as inline SVG that take their colours from the page, so one file reads in light and in dark."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Matplotlib is given these placeholders; the page's CSS says what they are in light and in dark.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
REAL, DREAM, TRAIN, OTHER = "#050505", "#060606", "#070707", "#080808"
CSS = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}
CSS |= {REAL: "real", DREAM: "dream", TRAIN: "train", OTHER: "other"}
GROUPS = ("#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d", "#0e0e0e")  # of runs that are compared
CSS |= {placeholder: f"g{i}" for i, placeholder in enumerate(GROUPS)}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "figure.facecolor": "none",
}
MAP = LinearSegmentedColormap.from_list("raywm", ["#3b5bdb", "#1f9e89", "#f2b134"])  # readable on white and on black
_count = itertools.count()


def figure(
    title: str, x: str = "", y: str = "", size: tuple[float, float] = (4.7, 3.0), rows: int = 1
) -> tuple[Figure, Any]:
    """A chart of one panel (or `rows` under one another): the figure and its axes."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(size, layout="constrained")
        FigureCanvasSVG(fig)
        axes: Any = fig.subplots(rows, 1, sharex=True) if rows > 1 else fig.subplots()
        first, last = (axes[0], axes[-1]) if rows > 1 else (axes, axes)
        first.set_title(title)
        last.set_xlabel(x)
        first.set_ylabel(y)
    return fig, axes


def legend(ax: Axes, **options: Any) -> None:
    with matplotlib.rc_context(STYLE):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(**({"loc": "best"} | options))


def svg(fig: Figure) -> str:
    """The figure as an inline SVG whose ids are its own and whose colours are the page's."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, name in CSS.items():
        text = text.replace(placeholder, f"var(--{name})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font: (?:bold|700) ([\d.]+)px [^;\"]*", r"font-weight: 600; font-size: \1px", text)
    own = f"f{next(_count)}-"  # clip paths and markers of several figures share one page
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r"url\(#", f"url(#{own}", text)
    text = re.sub(r'href="#', f'href="#{own}', text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    return re.sub(r'<svg ([^>]*?)height="[\d.]+pt"', r"<svg \1", text, count=1)


def png(image: np.ndarray) -> str:
    """(H, W, 3) or (H, W, 1) or (H, W, 4) uint8 as a data address."""
    out = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def strip(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Rows of frames, each (N, H, W, C) uint8, as one picture with alpha: transparent gaps between the frames."""
    count, (h, w) = max(len(r) for r in rows), rows[0].shape[1:3]
    out = np.zeros((len(rows) * (h + gap) - gap, count * (w + gap) - gap, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            y, x = i * (h + gap), j * (w + gap)
            out[y : y + h, x : x + w, :3] = frame
            out[y : y + h, x : x + w, 3] = 255
    return out


def band(
    ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, alpha: float = 0.22, **options: Any
) -> None:
    ax.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0, **options)


def lines(title: str, x: str, y: str, series: Iterable[dict[str, Any]], marks: Sequence[float] = ()) -> str:
    """Lines {"x", "y", and matplotlib's options}; `marks`: thin vertical lines, e.g. between turns."""
    fig, ax = figure(title, x, y)
    for mark in marks:
        ax.axvline(mark, color=GRID, linewidth=1.2)
    for s in series:
        ax.plot(s.pop("x"), s.pop("y"), **s)
    if len(ax.lines) - len(marks) > 1:
        legend(ax)
    return svg(fig)


def clean(values: Iterable[Any]) -> np.ndarray:
    """Logged numbers, null as NaN."""
    return np.array([math.nan if v is None else float(v) for v in values])


# ------------------------------------------------------------------------------------------------ what is logged


def fitness(generations: list[dict], trials: dict[int, dict], lines_at: dict[str, float | None]) -> str:
    """Dream fitness by generation over all turns, with each turn's real trial at the turn's end."""
    fig, ax = figure("Fitness in the dream, returns in reality", "generation, over all turns", "return", (9.6, 3.6))
    at, ends = 0, {}
    for where, color, label in (("dream", DREAM, "in the dream"), ("real", REAL, "evolved in reality")):
        marked = False
        at = 0
        for turn in sorted({r["iteration"] for r in generations}):
            turn_rows = [r for r in generations if r["iteration"] == turn]
            x = np.array([at + i + 1 for i, r in enumerate(turn_rows) if r["where"] == where])
            rows = [r for r in turn_rows if r["where"] == where]
            at += len(turn_rows)
            ends[turn] = at
            if not rows:
                continue
            band(ax, x, clean(r.get("worst") for r in rows), clean(r.get("best") for r in rows), color)
            ax.plot(
                x,
                clean(r["mean"] for r in rows),
                color=color,
                label=None if marked else f"mean {label}",
                marker="." if len(x) == 1 else None,
            )
            marked = True
    for turn in sorted(ends)[:-1]:
        ax.axvline(ends[turn] + 0.5, color=GRID, linewidth=1.2)
    turns = [t for t in sorted(trials) if t in ends]
    if turns:
        ax.errorbar(
            [ends[t] for t in turns],
            clean(trials[t]["return_mean"] for t in turns),
            clean(trials[t]["return_std"] for t in turns),
            color=REAL,
            fmt="o",
            capsize=3,
            label="real trial (mean, spread)",
            zorder=5,
        )
    for (label, value), dash in zip(lines_at.items(), ("--", ":"), strict=False):
        if value is not None:
            ax.axhline(value, color=MUTED, linestyle=dash, linewidth=1.2, label=label)
    ax.set_xlim(0.5, max(at, 1) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    options = {"ncols": 4, "labelcolor": INK, "frameon": False, "fontsize": 8.5}
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper right", **options)
    return svg(fig)


def gaps(calibration: dict[int, float], controller: dict[int, float]) -> str:
    """Both dream gaps by turn."""
    fig, ax = figure("The dream gaps", "turn", "dream return − real return")
    ax.axhline(0, color=MUTED, linewidth=1.2)
    for values, color, label in (
        (controller, DREAM, "controller gap"),
        (calibration, OTHER, "calibration gap (first policy)"),
    ):
        turns = sorted(values)
        ax.plot(turns, [values[t] for t in turns], color=color, marker="o", label=label)
    turns = sorted({*calibration, *controller})
    ax.set_xlim(turns[0] - 0.5, turns[-1] + 0.5)
    ax.set_xticks(turns[:: math.ceil(len(turns) / 12)])
    legend(ax)
    return svg(fig)


def open_loop(rows: list[dict]) -> str:
    """Error by horizon, the turns from faint to strong, against the guess that nothing changes."""
    horizons = [int(k.removeprefix("open_loop_")) for k in rows[-1] if k.startswith("open_loop_")]
    x = np.arange(len(horizons))
    fig, ax = figure("Error of dreams under the real actions", "steps ahead", "RMS error / spread of the data")
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        label = f"M, turn {row['iteration']}" if last or i == 0 else None
        alpha = 1.0 if last else 0.25 + 0.4 * i / len(rows)
        y = clean(row[f"open_loop_{k}"] for k in horizons)
        ax.plot(x, y, color=DREAM, alpha=alpha, marker="o", markersize=4, label=label)
    y = clean(rows[-1].get(f"persist_{k}") for k in horizons)
    ax.plot(x, y, color=MUTED, linestyle="--", marker="s", markersize=4, label="“nothing changes”")
    ax.axhline(1, color=MUTED, linestyle=":", linewidth=1.2, label="the data's mean")
    ax.set_xticks(x, [str(k) for k in horizons])
    ax.set_ylim(bottom=0)
    legend(ax)
    return svg(fig)


def histogram_of_returns(returns: np.ndarray) -> str:
    fig, ax = figure("Returns of the episodes", "return", "episodes")
    ax.hist(returns, bins=min(30, max(5, len(returns) // 3)), color=REAL)
    return svg(fig)


# ------------------------------------------------------------------------------------------------ what the model sees


def scatter(title: str, points: np.ndarray, values: np.ndarray, shares: np.ndarray, label: str) -> str:
    """Latents in their first two principal components, coloured; NaN values grey."""
    fig, ax = figure(
        title, f"component 1 ({shares[0]:.0%} of the variance)", f"component 2 ({shares[1]:.0%})", (4.7, 3.6)
    )
    none = np.isnan(values)
    fig.set_dpi(200)
    options = {"s": 5, "linewidths": 0, "rasterized": True}
    ax.scatter(*points[none].T, color="#8a8f98", alpha=0.35, **options)
    order = np.flatnonzero(~none)
    if len(order):
        shown = ax.scatter(*points[order].T, c=values[order], cmap=MAP, alpha=0.8, **options)
        with matplotlib.rc_context(STYLE):
            bar: Any = fig.colorbar(shown, ax=ax, label=label)
            bar.outline.set_visible(False)
            bar.solids.set(alpha=1, rasterized=True)
    return svg(fig)


def kept(title: str, truth: np.ndarray, again: np.ndarray, names: Sequence[str]) -> str:
    """A vector's original and reconstructed values over an episode, a panel a dimension."""
    fig, axes = figure(title, "step", "", (4.7, 0.6 + 1.05 * len(names)), len(names))
    for i, (ax, name) in enumerate(zip(np.atleast_1d(axes), names, strict=True)):
        ax.plot(truth[:, i], color=REAL, label="original")
        ax.plot(again[:, i], color=DREAM, linestyle="--", label="reconstruction")
        ax.set_ylabel(name)
    legend(np.atleast_1d(axes)[0])
    return svg(fig)


def forecast(title: str, samples: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> str:
    """One-step predictions along an episode: (T, S, D) samples as bands, (T, D) what happened, a panel a dimension."""
    fig, axes = figure(title, "step", "", (9.6, 0.6 + 1.25 * len(names)), len(names))
    x = np.arange(1, len(truth) + 1)
    for i, (ax, name) in enumerate(zip(np.atleast_1d(axes), names, strict=True)):
        low, q1, q3, high = np.quantile(samples[:, :, i], [0.05, 0.25, 0.75, 0.95], axis=1)
        band(ax, x, low, high, DREAM, 0.22, label="90 % of the prediction")
        band(ax, x, q1, q3, DREAM, 0.45, label="50 %")
        ax.plot(x, truth[:, i], color=REAL, linewidth=1.2, label="what happened")
        ax.set_ylabel(name)
        ax.margins(x=0.01)
    fig.legend(
        *np.atleast_1d(axes)[0].get_legend_handles_labels(),
        loc="outside upper right",
        ncols=3,
        labelcolor=INK,
        frameon=False,
        fontsize=8.5,
    )
    return svg(fig)


def mixture(title: str, samples: np.ndarray, truth: float, name: str) -> str:
    """What M expected of one dimension at one step, against what happened."""
    fig, ax = figure(title, name, "density")
    low, high = np.quantile(samples, [0.002, 0.998])
    margin = 0.1 * max(high - low, 1e-6)
    edges = np.linspace(min(low, truth) - margin, max(high, truth) + margin, 45)
    ax.hist(samples, bins=edges, density=True, color=DREAM, alpha=0.55)
    ax.axvline(truth, color=REAL, linewidth=2.2, label="what happened")
    ax.set_yticks([])
    legend(ax)
    return svg(fig)


def calibration(pit: np.ndarray) -> str:
    """How often the truth fell where in the predicted distribution; flat is calibrated."""
    fig, ax = figure(
        "Where the truth fell in the prediction",
        "predicted probability of less than what happened",
        "share (1 = as predicted)",
    )
    bins = 20
    height, edges = np.histogram(pit, bins=bins, range=(0, 1))
    ax.bar(
        edges[:-1],
        height / max(height.sum(), 1) * bins,
        width=np.diff(edges) * 0.92,
        align="edge",
        color=DREAM,
        alpha=0.75,
    )
    ax.axhline(1, color=REAL, linewidth=1.8, label="calibrated")
    legend(ax)
    return svg(fig)


def trajectories(
    title: str,
    truth: np.ndarray,
    dreams: np.ndarray,
    alive: np.ndarray,
    end: int | None,
    names: Sequence[str],
    context: int = 1,
) -> str:
    """(T, D) reality, (T, S, D) dreams from the same start under the same actions, (T, S) their survival.

    A dream is shown while it is more likely alive than not, and the band while a tenth of them are. Where the model
    sees more `context` than the first row, that is shaded."""
    living = alive >= 0.5  # (T, S)
    living &= living.mean(1, keepdims=True) >= 0.1
    shown = np.where(living[..., None], dreams, np.nan)
    fig, axes = figure(title, "step", "", (4.7, 0.7 + 1.0 * (len(names) + 1)), len(names) + 1)
    x = np.arange(len(truth))
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        low, q1, middle, q3, high = np.nanquantile(shown[:, :, i], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        band(ax, x, low, high, DREAM, 0.2)
        band(ax, x, q1, q3, DREAM, 0.3)
        ax.plot(x, middle, color=DREAM, linewidth=1.2, label="dreams: median, 50 %, 90 %")
        ax.plot(x, truth[:, i], color=REAL, label="reality")
        ax.set_ylabel(name)
    if context > 1:
        for ax in axes:
            ax.axvspan(0, context - 1, color=MUTED, alpha=0.18, linewidth=0)
    last = axes[-1]
    last.plot(x, alive.mean(1), color=DREAM)
    last.set_ylim(-0.05, 1.08)
    last.set_ylabel("alive")
    if end is not None:
        last.axvline(end, color=REAL, linewidth=1.8)
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2,
        labelcolor=INK,
        frameon=False,
        fontsize=8.5,
    )
    return svg(fig)
