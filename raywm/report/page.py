"""RUN/report.html: one self-contained page that works offline, on a desk and on a phone, in light and in dark."""

from __future__ import annotations

import base64
import html
import math
import shlex
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raywm
from raywm import config as configs
from raywm.checkpoint import atomic_write_text
from raywm.data.episode import Episode
from raywm.report import measure, plots
from raywm.report.load import Run, is_trial
from raywm.report.videos import varying, write_videos

EMBED_BYTES = 8 * 2**20  # a larger video is linked, not put into the page
DIMS = 4  # dimensions shown where each has a panel of its own
CONTENTS = "<!-- contents -->"  # where a masthead wants the links to the sections
ROWS = 200  # of an episode, in charts along time


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html (and RUN/videos for image environments); returns its path.

    What a run does not have yet is said on the page. Only the page and the videos are written.
    """
    of = Run(run)
    sections: list[tuple[str, Callable[[Run], str]]] = [
        ("Fitness and reality", fitness),
        ("The dream, step by step", open_loop),
        ("Dream and reality side by side", trajectories),
        ("What M predicts, and what happened", mixtures),
        ("What V keeps", reconstructions),
        ("The latent space", latents),
        ("Training V and M", training),
        ("Videos", videos),
        ("Config", settings),
    ]
    return publish(of, header(of), sections)


def publish(of: Any, head: str, sections: list[tuple[str, Callable[[Any], str]]]) -> Path:
    """The page of a run from its header and what draws its sections, at RUN/report.html."""
    body = [head.replace(CONTENTS, contents([title for title, _ in sections]))]
    for i, (title, draw) in enumerate(sections):
        body.append(f'<section id="s{i}"><h2>{title}</h2>{_drawn(draw, of)}</section>')
    path = of.path / "report.html"
    write_page(path, f"{of.config.env.id}, seed {of.config.seed}", body)
    return path


def write_page(path: Path, title: str, body: list[str]) -> None:
    """A page of these pieces of HTML, with the one style that all pages have."""
    template = resources.files("raywm.report").joinpath("page.html").read_text()
    atomic_write_text(path, template.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body)))


def contents(titles: list[str]) -> str:
    """Links to the sections of a page: it is long on a phone."""
    links = "".join(f'<a href="#s{i}">{html.escape(title)}</a>' for i, title in enumerate(titles))
    return f"<nav>{links}</nav>"


def _drawn(draw: Callable[[Any], str], run: Any) -> str:
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # empty slices: parts of a chart without data stay empty
            return draw(run)
    except Exception as error:  # a long run's page must not be lost to one broken picture
        return missing(f"This part could not be drawn: {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ pieces of a page


def say(text: str) -> str:
    return f'<p class="how">{html.escape(text)}</p>'


def missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'


def commands(lines: list[str]) -> str:
    """Command lines, each as long as it is: broken where the screen ends."""
    inside = "".join(f"<code>{html.escape(line)}</code>" for line in lines)
    return f'<pre class="commands">{inside}</pre>'


def grid(*figures: str, wide: bool = False) -> str:
    inside = "".join(f"<figure>{f}</figure>" for f in figures if f)
    return f'<div class="grid{" wide" if wide else ""}">{inside}</div>'


def picture(image: np.ndarray, alt: str) -> str:
    width, height = image.shape[1], image.shape[0]
    return f'<img src="{plots.png(image)}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


def number(value: float | None, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 100_000:
        return f"{value / 1e6:.2f} M" if abs(value) >= 1e6 else f"{value / 1e3:.0f} k"
    return f"{value:,.{digits}f}" if value != int(value) else f"{int(value):,}"


def needs_model(run: Run) -> str:
    """Why there is nothing to draw, or nothing."""
    if run.model is None:
        return missing(f"Not there yet: {run.why}.")
    if not run.held_out:
        return missing("Not there: the run has no episodes on this machine.")
    return ""


def needs_vm(run: Run) -> str:
    """As ``needs_model``, for what only V and M have."""
    why = f"Not drawn: {run.config.model.kind} is a model of its own, without V's latent z and M's mixtures."
    return needs_model(run) if run.vm else missing(why)


# ------------------------------------------------------------------------------------------------ the top of the page


def header(run: Run) -> str:
    summary, state = run.summary or {}, run.state
    figures = outcome(run)
    finished = bool(summary) and state.get("phase", "done") == "done"
    if finished:
        status = f"Finished: {summary.get('stopped') or 'done'}."
    elif state:
        status = f"Not finished: turn {state.get('iteration', 0)}, next is “{state.get('phase')}”."
    else:
        status = "Not finished: stopped before its first checkpoint."
    real, spread = figures["real"], figures["real_std"]
    tiles = [
        (
            "real return",
            number(real) + plus_minus(spread),
            figures["real_note"],
            "real",
        ),
        ("random policy", number(figures["random"]), f"the same environment, {run.config.collect.policy} actions", ""),
        ("dream return", number(figures["dream"]), "the same controller in its dream", "dream"),
        ("dream gap", signed(figures["gap"]), "dream return − real return", ""),
        ("calibration gap", signed(figures["calibration"]), "the same for the first policy", ""),
        ("real steps", number(figures["steps"]), "that trained or decided anything", ""),
        ("dream steps", number(figures["dream_steps"]), "imagined", ""),
        (
            "time",
            clock(figures["seconds"]),
            f"{summary.get('worker_deaths', state.get('worker_deaths', 0))} workers died",
            "",
        ),
    ]
    kind = run.config.evolve.learner.upper().replace("CMAES", "CMA-ES")
    model = "V and M" if run.vm else f"the world model {run.config.model.kind}"
    what = f"A {run.config.controller.kind} controller on {model}, trained by {kind} in the {run.config.evolve.where}"
    what = what.replace("in the both", "in the dream, then in reality").replace(
        "in the real", "in the real environment"
    )
    return masthead(run, "V-M-C", what, status, tiles, trust(run, figures))


Tile = tuple[str, str, str, str]  # what, its value, a note, its colour: "", "real" or "dream"


def masthead(run: Any, algorithm: str, what: str, status: str, tiles: list[Tile], trusted: list[str]) -> str:
    """The top of any run's page."""
    cells = "".join(
        f'<div class="tile {kind}"><span>{name}</span><b>{html.escape(value)}</b>'
        f"<small>{html.escape(note)}</small></div>"
        for name, value, note, kind in tiles
    )
    again = shlex.join(["raywm", "train", *configs.command(run.config), "--out", f"{run.path}-again"])
    verdict = "".join(f"<p>{html.escape(line)}</p>" for line in trusted)
    return (
        f"<header><p class='kicker'>raywm {raywm.__version__}, {algorithm}</p>"
        f"<h1>{html.escape(run.config.env.id)} <small>seed {run.config.seed}</small></h1>"
        f"<h2>What happened</h2>"
        f"<p>{html.escape(what)}. <strong>{html.escape(status)}</strong></p><div class='tiles'>{cells}</div>"
        f"<h2>How far to trust this dream</h2>{verdict}"
        f"<h2>The same run again</h2>{commands([again])}{CONTENTS}"
        "<p class='key'><i class='real'></i> reality <i class='dream'></i> dream, "
        "in every chart of this page</p></header>"
    )


def outcome(run: Run) -> dict[str, Any]:
    """The run's figures: of its summary, or as far as it has come."""
    summary, state = run.summary or {}, run.state
    trials, collected, calibrations = run.kind("trial"), run.kind("collect"), run.kind("calibration")
    figures: dict[str, Any] = {
        "real": summary.get("real_return_mean"),
        "real_std": summary.get("real_return_std"),
        "real_note": f"mean ± spread over {summary.get('real_return_episodes', 0)} new episodes",
        "real_episodes": summary.get("real_return_episodes"),
        "random": summary.get("random_return_mean"),
        "dream": summary.get("dream_return_mean"),
        "gap": summary.get("dream_gap"),
        "calibration": summary.get("calibration_gap", state.get("calibration_gap")),
        "steps": summary.get("real_env_steps", state.get("real_env_steps")),
        "dream_steps": summary.get("dream_steps", state.get("dream_steps")),
        "seconds": summary.get("wall_seconds", state.get("wall_seconds")),
    }
    if not summary:
        if trials:
            best = max(trials, key=lambda row: row["return_mean"])
            figures |= {"real": best["return_mean"], "real_std": best["return_std"], "gap": best.get("dream_gap")}
            figures["dream"] = None if best.get("dream_gap") is None else best["return_mean"] + best["dream_gap"]
            figures["real_note"] = f"best trial so far, {best['episodes']} episodes"
            figures["real_episodes"] = best["episodes"]
        else:
            figures["real_note"] = "no trial yet"
        if collected:
            figures["random"] = collected[0]["return_mean"]
    figures["random_std"] = collected[0]["return_std"] if collected else None
    if figures["calibration"] is None and calibrations:
        figures["calibration"] = calibrations[-1]["calibration_gap"]
    return figures


def plus_minus(spread: float | None, digits: int = 1) -> str:
    """What follows a mean; a line may break before the sign, not after it."""
    return "" if spread is None else f" ±\u00a0{number(spread, digits)}"


def signed(value: float | None) -> str:
    return "–" if value is None else ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return text.replace(" ", "\u00a0")  # on one line, however narrow its tile


def trust(run: Run, figures: dict[str, Any]) -> list[str]:
    """Both gaps in plain words. A gap is held against how far returns spread or how large they are."""
    lines = [result(run, figures)]
    calibration, random = figures["calibration"], figures["random"]
    first = f"the first policy ({run.config.collect.policy})"
    if calibration is None or random is None:
        lines.append("Calibration: not measured yet; it needs a fitted model.")
    else:
        dreamt = random + calibration
        scale = max(abs(random), figures["random_std"] or 0.0, 1e-9)
        lines.append(
            f"Calibration: {first} gets {number(dreamt)} in the dream and "
            f"{number(random)} in reality. " + words(calibration / scale, "On what it was fitted to, the dream", "")
        )
    real, dream, gap = figures["real"], figures["dream"], figures["gap"]
    if gap is None or dream is None or real is None:
        reason = "the controller was evolved in reality only" if run.config.evolve.where == "real" else "no trial yet"
        lines.append(f"Controller: no dream gap ({reason}).")
    else:
        scale = max(abs(real), abs(real - (random if random is not None else 0.0)), 1e-9)
        lines.append(
            f"Controller: it gets {number(dream)} in its dream and {number(real)} in reality. "
            + words(gap / scale, "For the controller the dream", "; it has learned what pays only in the dream")
        )
    quality = [row for row in run.kind("quality") if row.get("open_loop_15") is not None and row.get("persist_15")]
    if quality:
        row = quality[-1]
        ratio = row["open_loop_15"] / row["persist_15"]
        better = "better" if ratio < 1 else "worse"
        lines.append(
            f"Prediction: 15 steps ahead M is off by {row['open_loop_15']:.2f} of the data's spread, "
            f"{better} than “nothing changes” ({row['persist_15']:.2f})."
        )
    if run.config.dream.horizon is not None:
        lines.append(
            f"Dreams last at most {run.config.dream.horizon} steps (dream.horizon); longer real episodes widen the gap."
        )
    return lines


def result(run: Run, figures: dict[str, Any]) -> str:
    """The controller against the policy that collected first, with their standard errors."""
    real, random, collected = figures["real"], figures["random"], run.kind("collect")
    if real is None or random is None or not collected:
        return "Result: none yet; the controller has not been tried in reality."
    error = math.hypot(
        (figures["real_std"] or 0.0) / math.sqrt(max(figures["real_episodes"] or 1, 1)),
        collected[0]["return_std"] / math.sqrt(collected[0]["episodes"]),
    )
    distance = real - random
    verdict = "no clear difference" if abs(distance) <= 2 * error else "better" if distance > 0 else "worse"
    return (
        f"Result: the controller gets {number(real)} in reality, the first policy ({run.config.collect.policy}) "
        f"{number(random)}: {verdict} (difference {signed(distance)}, standard error {number(error)})."
    )


def words(share: float, who: str, cheat: str) -> str:
    size = abs(share)
    if size < 0.1:
        return f"{who} is close to reality ({size:.0%} off)."
    side = "flatters" if share > 0 else "is too gloomy"
    if size < 0.35:
        return f"{who} {side} by {size:.0%}: trust its ranking more than its numbers."
    return f"{who} {side} by {size:.0%}: do not trust its numbers{cheat if share > 0 else ''}."


# ------------------------------------------------------------------------------------------------ what was logged


def fitness(run: Run) -> str:
    generations = run.kind("generation")
    if not generations:
        return missing("Not there yet: no generation of controllers has been evaluated.")
    trials = {row["iteration"]: row for row in run.kind("trial")}
    figures = outcome(run)
    levels = {"random policy": figures["random"], "target": run.config.target.real_return}
    calibration = {row["iteration"]: row["calibration_gap"] for row in run.kind("calibration")}
    controller = {t: row["dream_gap"] for t, row in trials.items() if row.get("dream_gap") is not None}
    out = say(
        "The band runs from a generation's worst candidate to its best, the line is its mean; dots are the controller "
        "tried in the real environment at the end of a turn. Dots far below the line: the dream is being cheated."
    )
    out += grid(plots.fitness(generations, trials, levels), wide=True)
    if not trials:
        out += missing("No real trial yet.")
    if calibration or controller:
        out += say("Gaps near 0 mean that returns in the dream are worth what they say; above 0 the dream flatters.")
        out += grid(plots.gaps(calibration, controller), turns_table(run))
    return out


def turns_table(run: Run) -> str:
    """The turns as numbers, for those who would rather read than look."""
    by: dict[int, dict[str, float | None]] = {}
    for row in run.rows:
        cells = by.setdefault(row["iteration"], {})
        if row["kind"] == "trial":
            cells |= {"real": row["return_mean"], "gap": row.get("dream_gap"), "steps": row["real_env_steps"]}
        elif row["kind"] == "dream":
            cells["dream"] = row["return_mean"]
        elif row["kind"] == "calibration":
            cells["calibration"] = row["calibration_gap"]
    lines = "".join(
        f"<tr><td>{turn}</td><td>{number(c.get('steps'))}</td><td>{number(c.get('real'))}</td><td>{number(c.get('dream'))}</td>"
        f"<td>{signed(c.get('gap'))}</td><td>{signed(c.get('calibration'))}</td></tr>"
        for turn, c in sorted(by.items())
    )
    names = ("turn", "real steps", "real trial", "dream", "dream gap", "calibration gap")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f'<div class="scroll"><table>{head}{lines}</table></div>'


def open_loop(run: Run) -> str:
    rows = [row for row in run.kind("quality") if row.get("open_loop_1") is not None]
    if not rows:
        return missing("Not there yet: no model has been measured on held-out episodes.")
    out = say(
        "From real situations of held-out episodes the model imagines 1, 5, 15 and 50 steps under the real actions. "
        "1 is no better than always guessing the mean of the data; M should stay below “nothing changes”."
    )
    out += grid(plots.open_loop(rows))
    if any(rows[-1].get(f"open_loop_{k}") is None for k in (5, 15, 50)):
        out += missing("Horizons without a point: no held-out episode was long enough.")
    return out


def training(run: Run) -> str:
    rows = run.kind("fit")
    if not rows:
        return missing("Not there yet: nothing has been fitted.")
    vision, memory = ([row for row in rows if (row["phase"] == "vision") == wanted] for wanted in (True, False))
    both = (("train_loss", "one training batch", plots.TRAIN), ("loss", "held-out episodes", plots.DREAM))
    charts = [curves(vision, "V's loss", "loss", *both)]
    for name in run.learned:
        mse, kl = (f"{name}_mse", "", plots.DREAM), (f"{name}_kl", "", plots.DREAM)
        charts.append(curves(vision, f"V's reconstruction error, {name}", "root mean square, held-out", mse, root=True))
        charts.append(curves(vision, f"What z says of the {name}", "KL in nats a frame, held-out", kl))
    ends = (("terminal_recall", "recall", plots.REAL), ("terminal_precision", "precision", plots.OTHER))
    mse, nll = ("reward_mse", "", plots.DREAM), ("nll", "", plots.DREAM)
    charts += [
        curves(memory, "M's loss", "loss", *both),
        curves(memory, "M's surprise about the next z", "nats a latent dimension, held-out", nll),
        curves(memory, "M's reward error", "root mean square, held-out", mse, root=True),
        curves(memory, "Ends of episodes that M foresees", "share, held-out", *ends),
    ]
    out = say(
        "Lower is better, but for recall (ends foreseen) and precision (warnings that were right), where 1 is perfect. "
        "Held-out curves that rise while training falls mean overfitting; the fit keeps the best held-out weights. "
        "Vertical lines separate turns."
    )
    out += grid(*charts)
    if not any(row.get("terminal_recall") is not None for row in rows):
        out += missing("No held-out episode was ended by the environment itself: there is no terminal recall to show.")
    return out


def curves(rows: list[dict[str, Any]], title: str, y: str, *columns: tuple[str, str, str], root: bool = False) -> str:
    """A chart of logged columns (name, label, colour) over the gradient steps of all turns; "" if none was logged."""
    series = []
    for column, label, color in columns:
        values = plots.clean(row.get(column) for row in rows)
        if np.isfinite(values).any():
            marker = "o" if len(values) < 3 else None
            values = np.sqrt(values) if root else values
            series.append({"y": values, "color": color, "label": label, "marker": marker, "markersize": 4})
    if not series:
        return ""
    x, marks = cumulative(rows)
    return plots.lines(title, "gradient steps", y, [{"x": x, **s} for s in series], marks)


def cumulative(rows: list[dict[str, Any]]) -> tuple[np.ndarray, list[float]]:
    """Gradient steps counted over all turns, and where turns begin."""
    x, marks, base, last = [], [], 0, None
    for row in rows:
        if last is not None and row["iteration"] != last["iteration"]:
            base = x[-1]
            marks.append(float(base))
        x.append(base + row["step"])
        last = row
    return np.array(x), marks


# ------------------------------------------------------------------------------------------------ what the model does


def reconstructions(run: Run) -> str:
    if why := needs_vm(run):
        return why
    if not run.learned:
        return say("Vision is “identity”: observations are only standardised, so z keeps everything.")
    out = say(
        "Above what was seen, below what is left of it after V: whatever is missing below, the controller cannot know."
    )
    picked = measure.spread_rows(run.held_out, 512, run.rng("frames"))
    obs = measure.gather(picked)
    again = measure.decode_z(run.model, measure.encode(run.model, obs)["z_mean"])
    for name in run.images:
        error = np.square(obs[name].astype(np.float32) / 255 - again[name].astype(np.float32) / 255).mean((1, 2, 3))
        order = np.argsort(error)
        middle = len(order) // 2
        typical, worst = order[max(0, middle - 5) : middle + 5], order[::-1][:10]
        figures = []
        for title, rows in (("typical frames", typical), ("the worst frames", worst)):
            image = plots.strip([obs[name][rows], again[name][rows]])
            caption = f"{title} of {len(order)} held-out ones: root mean square error {np.sqrt(error[rows].mean()):.3f}"
            figures.append(f"{picture(image, title)}<figcaption>{html.escape(caption)}</figcaption>")
        out += grid(*figures, wide=True)
    for name in (n for n in run.vectors if n in run.learned):
        episode = max(run.held_out, key=len)
        truth = np.asarray(episode.obs[name][:ROWS])
        back = measure.decode_z(
            run.model, measure.encode(run.model, {k: v[:ROWS] for k, v in episode.obs.items()})["z_mean"]
        )
        dims = varying(truth)[:DIMS] or [0]
        out += grid(
            plots.kept(f"{name}, held-out episode", truth[:, dims], back[name][:, dims], [f"[{d}]" for d in dims])
        )
    exact = [n for n in run.vectors if n not in run.learned]
    if exact:
        out += say(f"Not shown: {', '.join(exact)}, which is only standardised, so that nothing of it is lost.")
    return out


def latents(run: Run) -> str:
    if why := needs_vm(run):
        return why
    picked = measure.spread_rows(run.snapshot.episodes, 3000, run.rng("latents"))
    z = measure.encode(run.model, measure.gather(picked))["z_mean"].numpy()
    points, shares = measure.principal(z)
    to_go = np.concatenate([reward_to_go(e)[rows] for e, rows in picked])
    to_end = np.concatenate(
        [(len(e) - 1 - rows) if e.is_terminal[-1] else np.full(len(rows), np.nan) for e, rows in picked]
    )
    limit = np.nanquantile(to_end, 0.9) if np.isfinite(to_end).any() else np.nan
    out = say(
        "Each dot is one observation in z's two widest directions. Colours that lie in order mean that z holds what "
        "the controller needs; grey dots belong to episodes that no termination ended."
    )
    charts = [plots.scatter("By reward still to come", points, to_go, shares, "return to go")]
    if np.isfinite(limit):
        charts.append(
            plots.scatter(
                "By steps to the end", points, np.minimum(to_end, limit), shares, f"steps, capped at {limit:.0f}"
            )
        )
    out += grid(*charts)
    if not np.isfinite(limit):
        out += missing("No episode was ended by the environment itself, so there is no picture by steps to the end.")
    return out


def reward_to_go(episode: Episode) -> np.ndarray:
    """The sum of rewards after each row (T,)."""
    total = np.cumsum(episode.reward[::-1].astype(np.float64))[::-1]
    return total - episode.reward


def mixtures(run: Run) -> str:
    if why := needs_vm(run):
        return why
    episode = max(run.held_out, key=len)
    along = measure.predictions(run, [episode], min(ROWS, len(episode)), 200, 10**9, "along")
    some = sorted(run.held_out, key=lambda e: e.id)[:24]
    overall = measure.predictions(run, some, min(300, max(len(e) for e in some)), 100, 1500, "overall")
    # a dimension whose mean hardly moves holds nothing but the posterior's noise
    seen = measure.gather(measure.spread_rows(run.held_out, 512, run.rng("spread")))
    spread = measure.encode(run.model, seen)["z_mean"].numpy().std(0)
    dims = sorted(np.argsort(-spread, kind="stable")[:DIMS].tolist())
    used = spread > 0.1 * spread.max()
    names = [f"z[{d}]" for d in dims]
    out = say(
        "At each step of a held-out episode M says what it expects one step later (bands, at temperature 1), then "
        "reality comes (line). A calibrated M has about 90 % of reality inside the wide band, and a flat histogram: a "
        "hill means that it is too unsure, a valley with high ends that it is too sure, a slope that it is biased."
    )
    out += grid(
        plots.forecast("Expected and real z, one step ahead", along.samples[:, :, dims], along.truth[:, dims], names),
        wide=True,
    )
    pit = overall.pit[:, used]
    inside = float(((pit > 0.05) & (pit < 0.95)).mean())
    charts = [plots.calibration(pit.ravel())]
    # where M was least sure: there the shape of the mixture shows
    width = along.samples.std(1)[:, dims] / np.maximum(spread[dims], 1e-9)
    for flat in [int(np.argmax(width[:, i])) * len(dims) + i for i in np.argsort(-width.max(0))[:2]]:
        t, i = divmod(flat, len(dims))
        charts.append(
            plots.mixture(
                f"Least sure of {names[i]}: step {t + 1}",
                along.samples[t, :, dims[i]],
                along.truth[t, dims[i]],
                names[i],
            )
        )
    out += grid(*charts)
    over = f"{len(overall.truth):,} held-out steps, the {used.sum()} dimensions of z that hold something"
    return out + f"<p>{inside:.0%} of what happened lay inside the predicted 90 % ({over}).</p>"


def trajectories(run: Run) -> str:
    if why := needs_model(run):
        return why
    if not measure.shows(run):
        return missing("Not drawn: this world model decodes no observation.")
    ordered = sorted(run.held_out, key=lambda e: (is_trial(e), len(e)))
    chosen = {e.id: e for e in (ordered[-1], ordered[len(ordered) // 2], ordered[0])}
    out = say(
        "Dreams begin where a held-out episode began and take the actions it took; they never see it again. Where "
        f"reality leaves the band of dreams, they are wrong. Temperature {run.config.dream.temperature:g}, "
        "as the controller's dreams have."
    )
    charts, films = [], []
    for episode in chosen.values():
        who = (
            "the controller's"
            if is_trial(episode) and run.config.data is None
            else f"{episode.info.get('policy', episode.info.get('agent', ''))}".strip()
        )
        label = f"{episode.id} ({who or 'exploring'}, {episode.steps} steps)"
        rows = min(len(episode), ROWS)
        if run.images:
            films.append(film(run, episode, rows, label))
        if run.vectors and varying(episode.obs[run.vectors[0]]):
            charts.append(trajectory(run, episode, rows, label))
    return out + (grid(*films, wide=True) if films else "") + (grid(*charts) if charts else "")


def trajectory(run: Run, episode: Episode, rows: int, label: str) -> str:
    name, samples = run.vectors[0], 16 if run.images else 60  # to decode a sample is to draw its image too
    replay = measure.replay(run, episode, rows, samples)
    dreams = replay.decoded(run.model)[name]  # (T, S, D)
    truth = np.asarray(episode.obs[name][:rows])
    dims = varying(truth)[:DIMS] or [0]
    end = rows - 1 if episode.is_terminal[-1] and rows == len(episode) else None
    return plots.trajectories(
        label, truth[:, dims], dreams[:, :, dims], replay.alive, end, [f"{name}[{d}]" for d in dims]
    )


def film(run: Run, episode: Episode, rows: int, label: str) -> str:
    name = run.images[0]
    replay = measure.replay(run, episode, rows, 1)
    at = np.unique(np.minimum(np.array([0, 1, 2, 4, 7, 11, 16, 24, 35, 50, 75, 110, 160]), rows - 1))
    real = {k: np.asarray(v[:rows])[at] for k, v in episode.obs.items()}
    kept = measure.kept(run, real, name)
    dreamt = measure.decode(run.model, {k: v[at, 0] for k, v in replay.states.items()})[name]
    image = plots.strip([real[name], *([] if kept is None else [kept]), dreamt])
    steps = ", ".join(str(a) for a in at)
    alive = f"{replay.alive[at[-1], 0]:.0%}"
    between = "" if kept is None else " its reconstruction,"
    caption = f"{label}. Rows: reality,{between} the dream. Steps {steps}. Alive in the dream then: {alive}."
    return f"{picture(image, label)}<figcaption>{html.escape(caption)}</figcaption>"


def videos(run: Run) -> str:
    folder = run.path / "videos"
    if run.images and run.model is not None and run.held_out and measure.shows(run):
        paths = write_videos(run)
    else:
        paths = sorted(folder.glob("*.mp4")) if folder.is_dir() else []
    if not paths:
        if run.images:
            return needs_model(run)
        return missing(
            f"None made: the observations are vectors. `raywm dream {run.path} --video` draws them over time."
        )
    captions = {
        "dream_vs_real": "Reality, what V keeps of it, and the dream from the same start under the same actions.",
        "dream": "The controller acting in its own dream.",
    }
    said = "The dream never sees the episode after its first frame; it should move like reality, and end when it ends."
    own = captions if run.images else dict.fromkeys(captions, "Reality over dreams from the same start.")
    return say(said) + films(paths, own)


def films(paths: list[Path], captions: dict[str, str]) -> str:
    """Videos of a run's folder "videos", in the page where they are small; captions by their stem."""
    figures = []
    for path in paths:
        data = path.read_bytes()
        small = len(data) < EMBED_BYTES
        source = "data:video/mp4;base64," + base64.b64encode(data).decode() if small else f"videos/{path.name}"
        caption = captions.get(path.stem, path.stem)
        figures.append(
            f'<video controls loop muted playsinline src="{source}"></video><figcaption>{html.escape(caption)} '
            f'<a href="videos/{path.name}">videos/{path.name}</a></figcaption>'
        )
    return grid(*figures, wide=True)


def settings(run: Any) -> str:
    text = configs.dumps(run.config)
    return f"<details><summary>config.yaml, as it ran</summary><pre><code>{html.escape(text)}</code></pre></details>"
