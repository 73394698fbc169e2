"""Charts of a Dreamer run."""

from __future__ import annotations

from typing import Any

import numpy as np

from raywm.report.plots import DREAM, INK, MUTED, OTHER, REAL, TRAIN, band, clean, figure, legend, svg

POINTS = 600  # of a line of training episodes: more would only make the page large

Row = dict[str, Any]


def thinned(values: np.ndarray, most: int = POINTS) -> np.ndarray:
    """At most so many values: means of neighbours."""
    if len(values) <= most:
        return values
    return np.array([part.mean() for part in np.array_split(values, most)])


def returns(
    title: str,
    label: str,
    episodes: list[Row],
    trials: list[Row],
    final: list[Row],
    levels: dict,
    key: str,
    unit: float,
) -> str:
    """Returns over `key` / unit: training episodes thin, trials thick with their spread, the last measurement a dot."""
    fig, ax = figure(title, label, "return", (9.6, 3.4))
    ordered = sorted(episodes, key=lambda row: row[key])
    x, y = (clean(row[name] for row in ordered) for name in (key, "return"))
    if len(x):
        options: Any = {"color": TRAIN, "linewidth": 0.8, "label": "training episodes"}
        ax.plot(thinned(x / unit), thinned(y), marker="." if len(x) < 60 else None, markersize=3, **options)
    if trials:
        x = clean(row[key] for row in trials) / unit
        mean, spread = (clean(row[name] for row in trials) for name in ("return_mean", "return_std"))
        band(ax, x, mean - spread, mean + spread, REAL, 0.2)
        ax.plot(x, mean, color=REAL, linewidth=2.6, marker="o", markersize=4, label="trials, greedy (mean, spread)")
    for row in final[-1:]:
        at, options = row[key] / unit, {"color": OTHER, "fmt": "D", "capsize": 4, "zorder": 5}
        count = f"{row['episodes']} episodes at the end"
        ax.errorbar([at], [row["return_mean"]], [row["return_std"]], label=count, **options)
    for (name, value), dash in zip(levels.items(), ("--", ":"), strict=False):
        if value is not None:
            ax.axhline(value, color=MUTED, linestyle=dash, linewidth=1.2, label=name)
    options = {"ncols": 5, "labelcolor": INK, "frameon": False, "fontsize": 8.5}
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper right", **options)
    ax.set_xlim(left=0)
    return svg(fig)


def by_step(real: np.ndarray, dreamt: np.ndarray) -> str:
    """Returns so far, (H, N) of real episodes and (H', N') of dreams; those that have ended keep theirs."""
    fig, ax = figure("Return so far", "step", "return")
    most = max(len(real), len(dreamt))
    for values, color, label in ((real, REAL, "reality"), (dreamt, DREAM, "dreams")):
        total = np.concatenate([np.cumsum(values, 0), np.repeat(values.sum(0)[None], most - len(values), 0)])
        x = np.arange(1, most + 1)
        low, high = np.quantile(total, [0.05, 0.95], axis=1)
        band(ax, x, low, high, color, 0.18)
        ax.plot(x, total.mean(1), color=color, label=f"{label}: mean, 90 %")
    legend(ax)
    return svg(fig)


def going_on(real: np.ndarray, dreamt: np.ndarray) -> str:
    """The share of real episodes and of dreams that still go on, (H, N) and (H', N')."""
    fig, ax = figure("Still going on", "step", "share")
    most = max(len(real), len(dreamt))
    for values, color, label in ((real, REAL, "reality"), (dreamt, DREAM, "dreams")):
        share = np.concatenate([values.mean(1), np.zeros(most - len(values))])
        ax.plot(np.arange(1, most + 1), share, color=color, label=label)
    ax.set_ylim(-0.03, 1.05)
    legend(ax)
    return svg(fig)


def both_returns(real: np.ndarray, dreamt: np.ndarray) -> str:
    """Histograms of returns, each of its own number."""
    fig, ax = figure("Returns", "return", "share")
    low, high = min(real.min(), dreamt.min()), max(real.max(), dreamt.max())
    edges = np.linspace(low, high if high > low else low + 1, 21)
    for values, color, label in ((real, REAL, "reality"), (dreamt, DREAM, "dreams")):
        weights = np.full(len(values), 1 / len(values))
        ax.hist(values, bins=edges, weights=weights, color=color, alpha=0.55, label=f"{label} ({len(values)})")
    legend(ax)
    return svg(fig)


def open_loop(title: str, model: np.ndarray, still: np.ndarray) -> str:
    """Error by steps ahead, 0 being the last row that was seen, against a guess that nothing changes."""
    fig, ax = figure(title, "steps ahead", "RMS error / spread of the data")
    x = np.arange(len(model))
    ax.plot(x, model, color=DREAM, marker="o", markersize=2.5, label="the model")
    ax.plot(x, still, color=MUTED, linestyle="--", label="“nothing changes”")
    ax.axhline(1, color=MUTED, linestyle=":", linewidth=1.2, label="the data's mean")
    ax.set_ylim(bottom=0)
    legend(ax)
    return svg(fig)
