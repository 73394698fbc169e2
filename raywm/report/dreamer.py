"""RUN/report.html of a Dreamer run, and its dreams in numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raywm.report import dreamer_measure as measure
from raywm.report import dreamer_plots as charts
from raywm.report import page, plots
from raywm.report.dreamer_measure import AHEAD, CONTEXT
from raywm.report.dreamer_videos import difference, write_dreamer_videos
from raywm.report.load import DreamerRun
from raywm.report.page import clock, grid, missing, number, say
from raywm.report.videos import varying

DREAMS = 128
PANELS = 8  # components of a vector that are shown
SHOWN_AT = (0, 2, 4, 5, 6, 7, 9, 12, 15, 20, 26, 34, 44, 54)  # rows of a window, the first of them seen


def write_dreamer_report(run: str | Path) -> Path:
    """Write RUN/report.html (and RUN/videos for images); the agent plays new episodes for it."""
    of = DreamerRun(run)
    sections: list[tuple[str, Callable[[Any], str]]] = [
        ("Returns", returns),
        ("The dream gap", gap),
        ("Open loop: what the model imagines", open_loop),
        ("Videos", videos),
        ("The world model", world_model),
        ("Actor and critic", behaviour),
        ("The run at work", machinery),
        ("Config", page.settings),
    ]
    return page.publish(of, header(of), sections)


def dreamer_summary(run: str | Path, episodes: int, seed: int | None) -> dict[str, Any]:
    """See ``report.dream_summary``."""
    of = DreamerRun(run)
    dreams = measure.own_dreams(of, episodes, of.seed("dream") if seed is None else seed)
    real = measure.reality(of).returns
    mean = float(dreams.returns.mean())
    return {
        "dream_return_mean": mean,
        "dream_return_std": float(dreams.returns.std()),
        "dream_length_mean": float(dreams.lengths.mean()),
        "dream_episodes": episodes,
        "horizon": measure.steps(of),
        "real_return_mean": float(real.mean()),
        "real_return_std": float(real.std()),
        "real_episodes": len(real),
        "random_return_mean": (of.summary or {}).get("random_return_mean"),
        "dream_gap": mean - float(real.mean()),
    }


def compared(run: DreamerRun) -> tuple[measure.Dreams, measure.Dreams]:
    """New episodes and dreams of the agent, measured once a page. Raises what makes that impossible."""
    if "compared" not in run.__dict__:
        run.__dict__["compared"] = measure.reality(run), measure.own_dreams(run, DREAMS, run.seed("own dreams"))
    return run.__dict__["compared"]


# ------------------------------------------------------------------------------------------------ the top of the page


def amount(value: float | None) -> str:
    """A return: small ones with two digits."""
    return number(value, 2 if value is not None and abs(value) < 10 else 1)


def signed(value: float | None) -> str:
    return "–" if value is None else ("+" if value > 0 else "−" if value < 0 else "") + amount(abs(value))


def header(run: DreamerRun) -> str:
    summary, state, trials = run.summary or {}, run.state, run.kind("trial")
    finished = bool(summary) and state.get("phase", "done") == "done"
    if finished:
        status = f"Finished: {summary.get('stopped') or 'done'}."
    else:
        status = "Not finished." if state else "Not finished: stopped before its first checkpoint."
    measured = summary or ({f"real_{k}": v for k, v in trials[-1].items()} if trials else {})
    real, spread = measured.get("real_return_mean"), measured.get("real_return_std")
    count = measured.get("real_return_episodes", measured.get("real_episodes"))
    note = f"mean ± spread over {count} episodes" + ("" if summary else " of the last trial")
    random = summary.get("random_return_mean")
    if random is None and state.get("random"):
        random = float(np.mean(state["random"]))
    here: measure.Dreams | None = None
    dreamt: measure.Dreams | None = None
    try:
        here, dreamt = compared(run)
    except Exception:  # the section on the gap says what it was
        pass
    steps = f"over {measure.steps(run)} steps"
    played = None if here is None else float(here.returns.mean())
    imagined = None if dreamt is None else float(dreamt.returns.mean())
    distance = None if played is None or imagined is None else imagined - played
    last = run.rows[-1] if run.rows else {}
    tiles = [
        (
            "real return",
            amount(real) + ("" if spread is None else f" ±\u00a0{amount(spread)}"),
            note if real is not None else "no trial yet",
            "real",
        ),
        ("random policy", amount(random), f"the first episodes, {run.config.collect.policy} actions", ""),
        ("dream return", amount(imagined), f"{DREAMS} dreams of the agent, {steps}", "dream"),
        ("dream gap", signed(distance), f"to {amount(played)} in new episodes, {steps}", ""),
        ("real steps", number(summary.get("real_env_steps", last.get("real_env_steps"))), "that trained anything", ""),
        ("updates", number(summary.get("updates", state.get("updates"))), "of model, actor and critic", ""),
        ("train ratio", number(summary.get("train_ratio")), f"set: {run.config.online.train_ratio:g}", ""),
        (
            "time",
            clock(summary.get("wall_seconds", last.get("wall_seconds"))),
            f"{summary.get('worker_deaths', state.get('worker_deaths', 0))} workers died",
            "",
        ),
    ]
    size, latent = run.config.rssm.size, run.config.rssm.latent
    what = f"An RSSM ({size}, {latent}), an actor and a critic in one learner, trained while the actor plays"
    lines = [result(real, spread, count, random, run)]
    if played is None or imagined is None or distance is None:
        lines.append("Dream: no gap measured; the section on it says why.")
    else:
        assert here is not None
        scale = max(abs(played), abs(played - random) if random is not None else 0.0, float(here.returns.std()), 1e-9)
        lines.append(
            f"Dream: {steps} the agent gets {amount(imagined)} in its dream and {amount(played)} in reality. "
            + page.words(distance / scale, "The dream", "")
        )
    return page.masthead(run, "Dreamer", what, status, tiles, lines)


def result(real: float | None, spread: float | None, count: int | None, random: float | None, run: DreamerRun) -> str:
    if real is None or random is None:
        return "Result: none yet; there is no trial beside the first policy's episodes."
    first = [row["return"] for row in run.kind("episode") if row["version"] < 0]
    error = math.hypot((spread or 0) / math.sqrt(count or 1), np.std(first) / math.sqrt(len(first)) if first else 0.0)
    verdict = "no clear difference" if abs(real - random) <= 2 * error else "better" if real > random else "worse"
    return (
        f"Result: the agent gets {amount(real)} in reality, the first policy ({run.config.collect.policy}) "
        f"{amount(random)}: {verdict} (difference {signed(real - random)}, standard error {amount(error)})."
    )


# ------------------------------------------------------------------------------------------------ what was logged


def returns(run: DreamerRun) -> str:
    episodes, trials, final = run.kind("episode"), run.kind("trial"), run.kind("evaluate")
    if not episodes and not trials:
        return missing("Not there yet: no episode has ended.")
    levels = {
        "random policy": (run.summary or {}).get("random_return_mean"),
        "target": run.config.target.real_return,
    }
    longest = max(row["wall_seconds"] for row in [*episodes, *trials, *final])
    unit, name = (60.0, "minutes") if longest > 300 else (1.0, "seconds")
    many = f"; each point is a mean of {len(episodes) / charts.POINTS:.1f} episodes"
    out = say(
        "Thin: episodes that trained, with the actor's own randomness"
        + (many if len(episodes) > charts.POINTS else "")
        + ". Thick: greedy trials beside them, which train nothing; the band is the spread of their episodes."
    )
    out += grid(
        charts.returns("By real steps", "real steps", episodes, trials, final, levels, "real_env_steps", 1.0),
        charts.returns("By wall-clock", name, episodes, trials, final, levels, "wall_seconds", unit),
        wide=True,
    )
    if not trials:
        out += missing("No trial was made beside the run (online.evaluate_every).")
    return out


Line = tuple[str, str, str]  # a logged column, its label, its colour


def curves(run: DreamerRun, title: str, y: str, *columns: Line, level: float | None = None, name: str = "") -> str:
    """A chart of logged columns over updates; "" if none was logged. `level`: a line at a value, and its name."""
    rows, series = run.kind("train"), []
    x = plots.clean(row["updates"] for row in rows)
    for column, label, color in columns:
        values = plots.clean(row.get(column) for row in rows)
        there = np.isfinite(values)
        if there.any():
            marker = "o" if there.sum() < 40 else None
            line = {"x": x[there], "y": values[there], "color": color, "label": label, "marker": marker}
            series.append(line | {"markersize": 2.5})
    if not series:
        return ""
    if level is not None:
        ends = np.array([x.min(), x.max()])
        dotted = {"color": plots.MUTED, "linestyle": ":", "linewidth": 1.2, "label": name}
        series.append({"x": ends, "y": np.full(2, level)} | dotted)
    return plots.lines(title, "updates", y, series)


def world_model(run: DreamerRun) -> str:
    if not run.kind("train"):
        return missing("Not there yet: nothing has been trained.")
    real, dream, other = plots.REAL, plots.DREAM, plots.OTHER
    free = run.config.rssm.free_nats
    columns = (*(["vector"] if run.vectors else []), *run.images)
    out = say(
        "Means over the batches of each report. The KL is between the posterior, which has seen the row, and the "
        f"prior, which has not: what an observation still tells. Below {free:g} nats it costs nothing. A prior whose "
        "entropy is far above the posterior's is unsure of what comes."
    )
    return out + grid(
        curves(run, "Loss of the world model", "loss", ("model_loss", "", dream)),
        *(curves(run, f"Reconstruction: {n}", "squared error a row", (f"{n}_loss", "", dream)) for n in columns),
        curves(run, "KL of posterior and prior", "nats a row", ("kl", "KL", dream), level=free, name="free nats"),
        curves(
            run,
            "Entropies",
            "nats a row",
            ("prior_entropy", "prior", dream),
            ("posterior_entropy", "posterior", real),
        ),
        curves(run, "Reward", "cross-entropy, nats", ("reward_loss", "", dream)),
        curves(run, "Continuation", "cross-entropy, nats", ("cont_loss", "", dream)),
        curves(run, "Gradient", "norm", ("grad_norm", "", other)),
    )


def behaviour(run: DreamerRun) -> str:
    if not run.kind("train"):
        return missing("Not there yet: nothing has been trained.")
    dream, other = plots.DREAM, plots.OTHER
    out = say(
        f"In dreams of {run.config.dreamer.horizon} steps from replayed rows, discounted. Values above returns: the "
        "critic is too hopeful. An entropy that falls to 0 early: the actor has stopped trying anything else."
    )
    values = (("dream_return", "λ-return", dream), ("dream_value", "critic's value", other))
    losses = (("critic_loss", "dreamt rows", dream), ("replay_critic_loss", "replayed rows", plots.REAL))
    return out + grid(
        curves(run, "Imagined returns and values", "return", *values),
        curves(run, "The actor's entropy", "nats", ("entropy", "", dream)),
        curves(run, "Critic", "cross-entropy, nats", *losses),
        curves(run, "Range of returns", "95th − 5th percentile, at least 1", ("return_scale", "", dream)),
        curves(run, "Imagined reward", "a step", ("dream_reward", "", dream)),
        curves(run, "Actor's loss", "loss", ("actor_loss", "", dream)),
    )


def machinery(run: DreamerRun) -> str:
    if not run.kind("train"):
        return missing("Not there yet: nothing has been trained.")
    online, busy = run.config.online, (("collect", plots.REAL), ("learn", plots.DREAM), ("evaluate", plots.OTHER))
    out = say(
        "Busy is the share of the time in which a worker really works, neither waiting for orders nor for batches; a "
        "kind with several workers counts their mean. Staleness is how many updates the acting weights are behind."
    )
    stale = (("staleness_max", "most", plots.OTHER), ("staleness_mean", "mean", plots.DREAM))
    return out + grid(
        curves(
            run,
            "Train ratio",
            "rows replayed a real step",
            ("train_ratio", "so far", plots.DREAM),
            level=online.train_ratio,
            name="set",
        ),
        curves(run, "Staleness", "updates", *stale, level=online.staleness, name="bound"),
        curves(run, "Busy", "share of the time", *((f"busy_{kind}", kind, color) for kind, color in busy)),
        curves(run, "Updates", "a second", ("updates_per_second", "", plots.DREAM)),
        curves(run, "Real steps", "a second", ("steps_per_second", "", plots.REAL)),
    )


# ------------------------------------------------------------------------------------------------ what the model does


def new(run: DreamerRun) -> str:
    return f"{len(measure.play(run))} new episodes that the agent played for this page, on which nothing was trained"


def gap(run: DreamerRun) -> str:
    if not run.tensors:
        return missing(f"Not there yet: {run.why}.")
    real, dreamt = compared(run)
    steps, cut = measure.steps(run), measure.steps(run) < run.horizon
    out = say(
        f"The agent in reality: {new(run)}. The agent in its dream: {DREAMS} dreams from the first observations of "
        f"those episodes, where only the model says what is seen, received and whether it goes on. Both greedy, both "
        f"over at most {steps} steps"
        + (f" (of an episode's {run.horizon})." if cut else ", an episode's time limit.")
        + f" Learning dreams only {run.config.dreamer.horizon} steps at a time, so a gap over so many more is no fault "
        "by itself, but it says how far a dream can be trusted."
    )
    out += grid(
        charts.by_step(real.reward, dreamt.reward),
        charts.both_returns(real.returns, dreamt.returns),
        charts.going_on(real.alive, dreamt.alive),
        gap_table(run, real, dreamt),
    )
    return out


def gap_table(run: DreamerRun, real: measure.Dreams, dreamt: measure.Dreams) -> str:
    """Means after so many steps, as numbers."""
    most = max(len(real.reward), len(dreamt.reward))
    steps = [s for s in (run.config.dreamer.horizon, 50, 100, 200) if s < most] + [most]
    lines = ""
    for step in steps:
        here, there = (float(x.reward[:step].sum(0).mean()) for x in (real, dreamt))
        lines += f"<tr><td>{step}</td><td>{here:,.2f}</td><td>{there:,.2f}</td><td>{there - here:+,.2f}</td></tr>"
    lengths = [float(x.lengths.mean()) for x in (real, dreamt)]
    lines += f"<tr><td>length</td><td>{lengths[0]:,.1f}</td><td>{lengths[1]:,.1f}</td>"
    lines += f"<td>{lengths[1] - lengths[0]:+,.1f}</td></tr>"
    names = "".join(f"<th>{name}</th>" for name in ("steps", "reality", "dreams", "gap"))
    return f'<div class="scroll"><table><tr>{names}</tr>{lines}</table></div>'


def open_loop(run: DreamerRun) -> str:
    if not run.tensors:
        return missing(f"Not there yet: {run.why}.")
    episodes = measure.play(run)
    count, samples = (16, 4) if run.images else (64, 16)  # to decode a sample is to draw its image too
    chosen = measure.windows(episodes, count)
    if not chosen:
        return missing(f"No new episode is longer than the {CONTEXT} rows of context.")
    loop = measure.open_loop(run, chosen, CONTEXT + AHEAD, samples)
    out = say(
        f"From {new(run)}: the model sees {CONTEXT} rows, then imagines up to {AHEAD} more under the recorded actions. "
        f"The error is that of the mean of {samples} dreams, over {len(chosen)} windows; at 0 it is that of the "
        "reconstruction of the last row seen. 1 is no better than always guessing the mean of the data."
    )
    figures = [
        charts.open_loop(name, *measure.errors(loop, name, measure.spread_of(episodes, name)))
        for name in (*run.vectors, *run.images)
    ]
    out += grid(*figures)
    there = loop.exists.sum(1)
    if there[-1] < len(chosen):
        far = int(np.flatnonzero(there)[-1]) + 1 - CONTEXT
        out += missing(
            f"Episodes end: of {len(chosen)} windows {there[-1]} are whole, and the longest goes {far} steps ahead."
        )
    if run.images:
        out += say(f"Above the truth, then the model, then model − truth (grey: none); {CONTEXT} rows are context.")
        order = np.argsort(-loop.exists.sum(0), kind="stable")[:4]
        out += grid(*(film(run, loop, int(w), chosen[w]) for w in order), wide=True)
    if run.vectors:
        out += components(run)
    return out


def film(run: DreamerRun, loop: measure.OpenLoop, window: int, chosen: measure.Window) -> str:
    """An open loop as the papers show it: truth, model, difference."""
    name, rows = run.images[0], int(loop.exists[:, window].sum())
    at = np.array([t for t in SHOWN_AT if t < rows])
    truth, model = loop.truth[name][at, window], loop.model[name][at, window, 0]
    image = plots.strip([truth, model, difference(truth, model)])
    told = ", ".join(f"seen {t + 1}" if t < CONTEXT else f"+{t + 1 - CONTEXT}" for t in at)
    caption = f"{name}, {chosen[0].id} from step {chosen[1]}: {told}."
    return f"{page.picture(image, caption)}<figcaption>{html.escape(caption)}</figcaption>"


def components(run: DreamerRun) -> str:
    """Vectors over time, from the beginnings of the longest, the middle and the shortest episode."""
    episodes = sorted((e for e in measure.play(run) if len(e) > CONTEXT), key=len)
    out, samples, hidden = "", 16 if run.images else 48, 0
    for name in run.vectors:
        figures = []
        for episode in {e.id: e for e in (episodes[-1], episodes[len(episodes) // 2], episodes[0])}.values():
            rows = min(len(episode), page.ROWS)
            loop = measure.open_loop(run, [(episode, 0)], rows, samples)
            truth = loop.truth[name][:, 0].reshape(rows, -1)
            dreams = loop.model[name][:, 0].reshape(rows, samples, -1)
            moving = varying(truth) or [0]
            hidden = max(hidden, len(moving) - PANELS)
            dims = moving[:PANELS]
            end = rows - 1 if episode.is_terminal[-1] and rows == len(episode) else None
            label = f"{episode.id} ({episode.steps} steps)"
            names = [f"{name}[{d}]" for d in dims]
            alive = loop.alive[:, 0]
            figures.append(
                plots.trajectories(label, truth[:, dims], dreams[:, :, dims], alive, end, names, context=CONTEXT)
            )
        out += grid(*figures)
    text = f"Dreams from an episode's beginning under its actions. Shaded: the {CONTEXT} rows that the model sees."
    return say(text + (f" {hidden} more components are not shown." if hidden > 0 else "")) + out


def videos(run: DreamerRun) -> str:
    if not run.tensors:
        return missing(f"Not there yet: {run.why}.")
    folder = run.path / "videos"
    paths = write_dreamer_videos(run) if run.images else sorted(folder.glob("*.mp4"))
    if not paths:
        command = f"raywm dream {run.path} --video"
        return missing(f"None made: the observations are vectors. `{command}` draws them over time.")
    first = "Truth, model and difference, of new episodes" if run.images else "A new episode over dreams of it"
    captions = {
        "dream_vs_real": f"{first}: the model sees {CONTEXT} rows, then imagines under the recorded actions.",
        "dream": "The agent acting in its own dream, from a real first frame.",
    }
    return page.films(paths, captions)
