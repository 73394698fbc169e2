"""Videos of what a Dreamer's model imagines: beside the truth, and with the agent acting in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raywm.report import dreamer_measure as measure
from raywm.report.load import DreamerRun
from raywm.report.videos import DREAM, INK, MOST, REAL, drawn_vectors, panels, write

CONTEXT = measure.CONTEXT
SHOWN = 4  # windows of the open-loop video, one after the other


def write_dreamer_videos(run: DreamerRun) -> list[Path]:
    """RUN/videos/dream_vs_real.mp4, and dream.mp4 for images. Raises ValueError where there is no agent yet."""
    episodes = measure.play(run)
    folder = run.path / "videos"
    folder.mkdir(exist_ok=True)
    first = folder / "dream_vs_real.mp4"
    if not run.images:
        write(first, vector_frames(run))
        return [first]
    write(first, open_loop_frames(run, measure.windows(episodes, SHOWN)))
    second = folder / "dream.mp4"
    write(second, own_dream(run))
    return [first, second]


def difference(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Images as grey where they agree, brighter where the model is (uint8)."""
    return ((model.astype(np.int16) - truth.astype(np.int16) + 255) // 2).astype(np.uint8)


def open_loop_frames(run: DreamerRun, chosen: list[measure.Window]) -> Iterator[np.ndarray]:
    """Truth, model and difference: a few frames of context, then imagination under the recorded actions."""
    loop = measure.open_loop(run, chosen, CONTEXT + measure.AHEAD, 1)
    name = run.images[0]
    for w, (_, start) in enumerate(chosen):
        for t in range(int(loop.exists[:, w].sum())):
            truth, model = loop.truth[name][t, w], loop.model[name][t, w, 0]
            seeing = t < CONTEXT
            heads = (("truth", REAL), ("model: sees" if seeing else "model: imagines", INK if seeing else DREAM))
            foot = f"seen: {t + 1} of {CONTEXT}" if seeing else f"{t + 1 - CONTEXT} steps ahead"
            feet = (f"{w + 1} of {len(chosen)}, step {start + t}", f"{foot}   alive {loop.alive[t, w, 0]:.0%}", "")
            yield panels((truth, model, difference(truth, model)), (*heads, ("model - truth", INK)), feet)


def own_dream(run: DreamerRun) -> Iterator[np.ndarray]:
    """The agent acting in its own dream, from a real first frame, until the dream ends."""
    dream = measure.own_dreams(run, 1, run.seed("video"))
    states = {k: v[:MOST] for k, v in dream.first.items()}
    frames = measure.decoded(run, states)[run.images[0]]
    total = np.concatenate([[0.0], np.cumsum(dream.reward[:, 0])])
    for t, frame in enumerate(frames):
        over = "   the end" if t == len(frames) - 1 and len(frames) < MOST else ""
        yield panels((frame,), (("the agent in its dream", DREAM),), (f"step {t}   return {total[t]:.2f}{over}",))


def vector_frames(run: DreamerRun, samples: int = 24) -> Iterator[np.ndarray]:
    """The numbers of the longest new episode as they come, over dreams of them."""
    episode = max(measure.play(run), key=len)
    name, rows = run.vectors[0], min(len(episode), MOST // 2)
    loop = measure.open_loop(run, [(episode, 0)], rows, samples)
    dreams = loop.model[name][:, 0].reshape(rows, samples, -1)
    head = f"{samples} dreams under the same actions, blind after {CONTEXT} rows"
    return drawn_vectors(name, loop.truth[name][:, 0].reshape(rows, -1), dreams, loop.alive[:, 0], head)
