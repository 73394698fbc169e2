"""What `raywm data ...` does: datasets looked at, checked, written out and read in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raywm.data import interchange, minari_io, rollouts
from raywm.data.dataset import Dataset
from raywm.data.episode import Episode
from raywm.log import Console

EXPORTS = ("parquet", "minari", "rllib")
IMPORTS = ("parquet", "minari", "world-models")
SHOWN = 5  # of a list of troubles, in lines for people


def info(path: str, console: Console, episode: str | None = None) -> dict[str, Any]:
    """A dataset, or one of its episodes."""
    with Dataset(path, say=console.say) as dataset:
        if episode is None:
            return dataset.info()
        try:
            return describe(dataset.get(episode))
        except KeyError as error:
            raise ValueError(f"{error.args[0]}; it begins with {', '.join(dataset.ids()[:3]) or 'none'}") from None


def describe(episode: Episode) -> dict[str, Any]:
    columns = {name: f"{c.dtype} {c.shape}" for name, c in episode.columns().items()}
    ended = {"return": episode.ret, "terminated": bool(episode.is_terminal[-1])}
    return {"id": episode.id, "steps": episode.steps, **ended, "info": episode.info, "columns": columns}


def verify(path: str, console: Console) -> dict[str, Any]:
    """See ``Dataset.verify``."""
    with Dataset(path, say=console.say) as dataset:
        with console.progress("verifying", len(dataset)) as bar:
            return dataset.verify(bar.advance)


def export(path: str, out: str, format: str, console: Console, column: str | None = None) -> dict[str, Any]:
    """Write a dataset in another form; says how to open it."""
    if format not in EXPORTS:
        raise ValueError(f"--format {format}: expected one of {', '.join(EXPORTS)}")
    if column is not None and format != "rllib":
        raise ValueError(f"--column is for --format rllib, got {format}")
    with Dataset(path, say=console.say) as dataset:
        with console.progress("exporting", len(dataset)) as bar:
            if format == "minari":
                place, id = minari_io.export_minari(dataset, out, bar.advance)
                by_id = minari_io.ID.fullmatch(out)
                opens = f'minari.load_dataset("{id}")' if by_id else f'minari.MinariDataset("{place / "data"}")'
                written, out = int(bar.done), str(place)
            elif format == "rllib":
                written = interchange.export_rllib(dataset, out, column, bar.advance)
                opens = f'config.offline_data(input_=["{Path(out).absolute()}"])'
            else:
                written = interchange.export_parquet(dataset, out, bar.advance)
                opens = f'pandas.read_parquet("{out}")'
        if written < len(dataset):
            console.say(f"warning: {len(dataset) - written} of {len(dataset)} episodes are damaged and left out")
        return {"out": out, "format": format, "episodes": written, "open": opens}


def import_(
    source: str, out: str, format: str, console: Console, made_with: str = "", env: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read another form as a dataset. `env`: config, columns, codec and time limit of the environment it is of."""
    if format not in IMPORTS:
        raise ValueError(f"--format {format}: expected one of {', '.join(IMPORTS)}")
    env = env or {}
    spaces = {"columns": env.get("columns"), "codec": env.get("codec")}
    if format == "parquet":
        found = interchange.import_parquet(source)
        if env:
            raise ValueError("--env is not for --format parquet, whose files know their spaces")
    elif format == "minari":
        found = minari_io.import_minari(source, **spaces)
        found.about["env"] = env.get("config") or found.about["env"]
    else:
        found = rollouts.import_rollouts(source, limit=env.get("limit"), env=env.get("config"), **spaces)
    for note in found.notes:
        console.say(f"note: {note}")
    with console.progress("importing", found.total) as bar:
        count = interchange.write_dataset(found, out, made_with, bar.advance)
    return {"out": out, "episodes": count}


def lines(report: dict[str, Any]) -> list[str]:
    """A report of ``verify`` for people: one line a trouble, long lists cut."""
    told = [f"{report['path']}: {report['episodes']} episodes, {report['steps']} steps, {report['bytes']} bytes"]
    for name in ("damaged", "doubled", "invalid", "missing", "set_aside", "broken"):
        found = report[name]
        if found:
            items: Sequence[str] = [f"{k} ({v})" for k, v in found.items()] if isinstance(found, dict) else found
            more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            told.append(f"{name.replace('_', ' ')}: {', '.join(items[:SHOWN])}{more}")
    if report["incomplete"]:
        told.append(f"incomplete: {report['incomplete']} episodes whose end has not come")
    return [*told, "whole" if report["ok"] else "NOT whole"]
