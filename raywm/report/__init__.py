"""What a run looks like: one self-contained page, videos, and its dreams in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raywm.loops.saved import SavedRun
from raywm.report import page
from raywm.report.dreamer import dreamer_summary, write_dreamer_report
from raywm.report.videos import dream_video

__all__ = ["dream_summary", "dream_video", "write_report"]


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html (and RUN/videos for image environments); returns its path.

    What a run does not have yet is said on the page. Only the page and the videos are written.
    """
    dreamer = SavedRun(run).config.algorithm == "dreamer"
    return write_dreamer_report(run) if dreamer else page.write_report(run)


def dream_summary(run: str | Path, episodes: int = 100, seed: int | None = None) -> dict[str, Any]:
    """Dream `episodes` episodes with a run's controller, from real starts; beside them what reality gave.

    For a Dreamer run the agent plays new episodes, and both are over the same number of steps, the `horizon`.

    Returns:
        dream_return_mean, dream_return_std, dream_length_mean, dream_episodes, horizon; real_return_mean,
        real_return_std, random_return_mean (None while the run has no summary.json), dream_gap.
    Raises ValueError when there is no fitted model or no episode yet.
    """
    from raywm.report.load import Run
    from raywm.report.measure import own_dreams

    if SavedRun(run).config.algorithm == "dreamer":
        return dreamer_summary(run, episodes, seed)
    of = Run(run)
    if of.model is None:
        raise ValueError(of.why)
    dreams = own_dreams(of, episodes, of.seed("dream") if seed is None else seed)
    summary = of.summary or {}
    real, mean = summary.get("real_return_mean"), float(np.mean(dreams.returns))
    return {
        "dream_return_mean": mean,
        "dream_return_std": float(np.std(dreams.returns)),
        "dream_length_mean": float(np.mean(dreams.lengths)),
        "dream_episodes": episodes,
        "horizon": of.horizon,
        "real_return_mean": real,
        "real_return_std": summary.get("real_return_std"),
        "random_return_mean": summary.get("random_return_mean"),
        "dream_gap": None if real is None else mean - real,
    }
