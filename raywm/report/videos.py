"""Videos of reality beside the dream, and of the controller in its own dream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raywm.data.episode import Episode
from raywm.loops.saved import SavedRun
from raywm.report import measure
from raywm.report.load import DreamerRun, Run, is_trial

FPS = 15
MOST = 450  # frames of a video: half a minute
SIDE = 256  # pixels of a panel's longer side, about
HEAD, FOOT = 26, 26
GROUND, INK, REAL, DREAM = (20, 22, 26), (235, 236, 240), (64, 192, 160), (240, 150, 80)


def dream_video(run: str | Path) -> Path:
    """Write RUN/videos/dream_vs_real.mp4 (and dream.mp4 for images); returns the first's path. For a Dreamer run the
    agent plays new episodes for it.

    Raises ValueError when there is no fitted model or no episode yet.
    """
    if SavedRun(run).config.algorithm == "dreamer":
        from raywm.report.dreamer_videos import write_dreamer_videos  # on demand: it imports this module

        return write_dreamer_videos(DreamerRun(run))[0]
    of = Run(run)
    if of.model is None:
        raise ValueError(of.why)
    if not measure.shows(of):
        raise ValueError(f"{of.path}: its world model decodes no observation, so there is nothing to film")
    if not of.held_out:
        raise ValueError(f"{of.path} has no episodes to compare its dream with; continue the run with --resume")
    return write_videos(of)[0]


def write_videos(run: Run) -> list[Path]:
    """All videos of a run that has a model and episodes."""
    folder = run.path / "videos"
    folder.mkdir(exist_ok=True)
    first = folder / "dream_vs_real.mp4"
    if not run.images:
        write(first, vector_frames(run, shown_episode(run)))
        return [first]
    write(first, side_by_side(run, shown_episode(run)))
    second = folder / "dream.mp4"
    write(second, own_dream(run))
    return [first, second]


def shown_episode(run: Run) -> Episode:
    """Of the held-out episodes, one the controller played if there is one, and of those the longest."""
    return max(run.held_out, key=lambda e: (is_trial(e), len(e)))


def side_by_side(run: Run, episode: Episode) -> Iterator[np.ndarray]:
    """Reality, what V keeps of it, and the dream from the same start under the same actions."""
    name, rows = run.images[0], min(len(episode), MOST)
    real = np.asarray(episode.obs[name][:rows])
    kept = measure.kept(run, {k: v[:rows] for k, v in episode.obs.items()}, name)
    replay = measure.replay(run, episode, rows, 1)
    dreamt = replay.decoded(run.model)[name][:, 0]
    ret, dream_ret = np.cumsum(episode.reward[:rows]), np.cumsum(replay.reward[:, 0])
    heads = [("reality", REAL), ("what V keeps of it", INK), ("dream: same start, same actions", DREAM)]
    for t in range(rows):
        ends = ", it ends here" if episode.is_terminal[t] else ""
        feet = (
            f"step {t}   return {ret[t]:.0f}{ends}",
            "",
            f"return {dream_ret[t]:.0f}   still alive: {replay.alive[t, 0]:.0%}",
        )
        shown = list(zip((real[t], None if kept is None else kept[t], dreamt[t]), heads, feet))
        yield panels(*zip(*(part for part in shown if part[0] is not None)))


def own_dream(run: Run) -> Iterator[np.ndarray]:
    """The controller acting in its own dream, until the dream ends."""
    dream = measure.own_dreams(run, 1, run.seed("video"), MOST)
    frames = measure.decode(run.model, dream.states)[run.images[0]]
    ret = np.cumsum(dream.reward)
    for t, frame in enumerate(frames):
        over = t == len(frames) - 1 and len(frames) < MOST
        yield panels(
            (frame,),
            (("the controller in its dream", DREAM),),
            (f"step {t}   return {ret[t]:.0f}" + ("   the end" if over else ""),),
        )


def panels(frames: Sequence[np.ndarray], heads: Sequence[tuple[str, tuple]], feet: Sequence[str]) -> np.ndarray:
    """Frames side by side with a line above and a line below each; even sides, as the codec wants them."""
    height, width = frames[0].shape[:2]
    scale = max(1, round(SIDE / max(height, width)))
    gap, w, h = 8, width * scale, height * scale
    canvas = Image.new("RGB", (len(frames) * (w + gap) + gap, h + HEAD + FOOT), GROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for i, (frame, (head, color), foot) in enumerate(zip(frames, heads, feet, strict=True)):
        x = gap + i * (w + gap)
        picture = Image.fromarray(np.broadcast_to(frame, (height, width, 3)).copy())
        canvas.paste(picture.resize((w, h), Image.Resampling.NEAREST), (x, HEAD))
        draw.text((x, 5), head, color, font)
        draw.text((x, HEAD + h + 5), foot, INK, font)
    out = np.asarray(canvas)
    return out[: len(out) // 2 * 2, : out.shape[1] // 2 * 2]


def vector_frames(run: Run, episode: Episode, samples: int = 24) -> Iterator[np.ndarray]:
    """Reality's numbers as they come, over dreams of them from the same start under the same actions."""
    name, rows = run.vectors[0], min(len(episode), MOST // 2)
    replay = measure.replay(run, episode, rows, samples)
    dreams = replay.decoded(run.model)[name]  # (T, S, D)
    head = f"{samples} dreams from the same start under the same actions"
    truth = np.asarray(episode.obs[name][:rows])
    return drawn_vectors(name, truth, dreams, replay.alive, head)


def drawn_vectors(
    name: str, truth: np.ndarray, dreams: np.ndarray, alive: np.ndarray, head: str
) -> Iterator[np.ndarray]:
    """Frames of (T, D) reality over (T, S, D) dreams that are alive with chance (T, S), as time goes on."""
    rows, samples = dreams.shape[:2]
    dims = varying(truth)[:4] or [0]
    width, each, left = 640, 110, 70
    font = ImageFont.load_default(size=14)
    ranges = [
        (
            min(truth[:, d].min(), np.quantile(dreams[:, :, d], 0.02)),
            max(truth[:, d].max(), np.quantile(dreams[:, :, d], 0.98)),
        )
        for d in dims
    ]
    x = left + np.arange(rows) / max(rows - 1, 1) * (width - left - 12)

    def points(values: np.ndarray, panel: int, until: int) -> list[tuple[float, float]]:
        low, high = ranges[panel]
        y = HEAD + panel * each + (each - 16) * (1 - np.clip((values - low) / max(high - low, 1e-9), -0.05, 1.05)) + 8
        return list(zip(x[:until], y[:until], strict=True))

    faint = Image.new("RGB", (width, HEAD + each * len(dims) + FOOT), GROUND)
    draw = ImageDraw.Draw(faint)
    draw.text((8, 5), "reality", REAL, font)
    draw.text((80, 5), head, DREAM, font)
    for panel, d in enumerate(dims):
        draw.text((8, HEAD + panel * each + each // 2 - 8), f"{name}[{d}]", INK, font)
    for t in range(1, rows):
        frame = faint.copy()
        draw = ImageDraw.Draw(frame)
        for panel, d in enumerate(dims):
            for s in range(samples):
                draw.line(points(dreams[:, s, d], panel, t + 1), (120, 82, 52), 1)
            draw.line(points(truth[:, d], panel, t + 1), REAL, 3)
        draw.text((8, frame.height - FOOT + 5), f"step {t}   dreams still alive: {alive[t].mean():.0%}", INK, font)
        yield np.asarray(frame)


def varying(values: np.ndarray) -> list[int]:
    """The dimensions of (T, D) that move at all."""
    spread = values.std(0)
    return [d for d in range(values.shape[1]) if spread[d] > 1e-6]


def write(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Encode an H.264 file that browsers play; whoever reads `path` finds it whole."""
    import imageio.v2 as imageio

    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}.mp4")
    try:
        options: Any = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2, "quality": 6}
        options |= {"format": "FFMPEG", "ffmpeg_params": ["-movflags", "+faststart"]}
        out: Any = imageio.get_writer(temporary, fps=FPS, **options)
        with out:
            for frame in frames:
                out.append_data(frame)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
