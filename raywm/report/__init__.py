"""What a run looks like: one self-contained page, videos, and its dreams in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raywm.report.page import write_report
from raywm.report.videos import dream_video

__all__ = ["dream_summary", "dream_video", "write_report"]


def dream_summary(run: str | Path, episodes: int = 100, seed: int | None = None) -> dict[str, Any]:
    """Dream `episodes` episodes with a run's controller, from real starts; beside them what reality gave.

    Returns:
        dream_return_mean, dream_return_std, dream_length_mean, dream_episodes, horizon; real_return_mean,
        real_return_std, random_return_mean (None while the run has no summary.json), dream_gap.
    Raises ValueError when there is no fitted model or no episode yet.
    """
    from raywm.report.load import Run
    from raywm.report.measure import own_dreams

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
