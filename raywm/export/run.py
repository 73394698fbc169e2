"""``raywm export``: a run's agent written to a folder, checked against the agent itself, with its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym

from raywm.checkpoint import atomic_write_json, atomic_write_text
from raywm.data.interchange import fresh
from raywm.envs import make_env
from raywm.export.card import make_card, markdown
from raywm.export.example import example
from raywm.export.formats import FORMATS as KINDS
from raywm.export.formats import format_named
from raywm.export.parity import Parity
from raywm.export.step import step_of
from raywm.loops.saved import open_run

FORMATS = tuple(KINDS)


def export_run(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    steps: int = 1000,
    command: str = "",
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Write the trained agent of a run directory as one step function: see ``raywm.export.step``.

    The folder `out` (RUN/export/FORMAT by default) gets step.pt2 or step.onnx, card.json, MODEL_CARD.md and
    example.py. Before that the file is opened and held against the agent over `steps` steps of the real environment;
    `progress(n)` hears of every n.

    Returns out, file, parity (the largest difference), steps.
    Raises ValueError: unknown format or missing package, no trained agent, an environment that cannot be made, a
    folder that is not empty, or a file that does not do what the agent does; then nothing is written.
    """
    kind = format_named(format)
    saved = open_run(run)
    agent = saved.agent()
    step = step_of(agent, saved.columns)
    out = Path(out or saved.path / "export" / format)
    with fresh(out) as folder:
        path = folder / kind.file
        kind.write(step, path)
        parity = Parity(step, agent, kind.load(step, path), saved.config.seed).play(saved.config.env, steps, progress)
        card = make_card(saved, step, kind.file, parity, command)
        atomic_write_json(folder / "card.json", card)
        atomic_write_text(folder / "MODEL_CARD.md", markdown(card))
        atomic_write_text(folder / "example.py", example(format, step, saved.config.env, _several(saved.config.env)))
    return {"out": str(out), "file": kind.file, "parity": parity["max_abs_difference"], "steps": parity["steps"]}


def _several(env: Any) -> bool:
    """Whether the environment itself observes a dict."""
    made = make_env(env)
    try:
        return isinstance(made.env.observation_space, gym.spaces.Dict)
    finally:
        made.close()
