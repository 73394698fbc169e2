"""`raywm data`: the command line of ``raywm.data.commands``."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated, Any

import typer

data = typer.Typer(no_args_is_help=True, help="Look at, check, export and import collected episodes.")

PathArg = Annotated[
    str, typer.Argument(metavar="DATASET", help="A dataset's or a run's directory, or a URI.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@data.callback()
def _data() -> None:
    """Look at, check, export and import collected episodes."""


@data.command()
def info(
    path: PathArg,
    episode: Annotated[str | None, typer.Option(help="Show this one episode.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a dataset.

    \b
    Example: raywm data info runs/cartpole-seed0 --episode collect-000000003
    """
    from raywm.cli import _errors

    with _errors():
        from raywm.data import commands

        _show(commands.info(path, _console(), episode), as_json)


@data.command()
def verify(path: PathArg, as_json: JsonOption = False) -> None:
    """Check every byte and every episode.

    The exit code is 1 if anything is damaged, missing, doubled or against the timing rule.

    \b
    Example: raywm data verify s3://bucket/cartpole
    """
    from raywm.cli import _errors

    with _errors():
        from raywm.data import commands

        report = commands.verify(path, _console())
        typer.echo(json.dumps(report) if as_json else "\n".join(commands.lines(report)))
        if not report["ok"]:
            raise typer.Exit(1)


@data.command()
def export(
    path: PathArg,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A new directory; for minari also an id, e.g. cartpole/random-v0.")
    ],
    format: Annotated[str, typer.Option(help="parquet, minari or rllib.", show_default=False)],
    column: Annotated[
        str | None, typer.Option(help="rllib: the one observation column to write.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a dataset for other tools.

    parquet: for Ray Data, pandas and DuckDB. minari: a Minari dataset. rllib: transitions for RLlib's offline_data.

    \b
    Example: raywm data export runs/cartpole-seed0 /tmp/cartpole --format parquet
    """
    from raywm.cli import _errors

    with _errors():
        from raywm.data import commands

        _show(commands.export(path, out, format, _console(), column), as_json)


@data.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A directory, or the id of a Minari dataset.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new dataset's directory.")],
    format: Annotated[str, typer.Option(help="minari, world-models or parquet.", show_default=False)],
    env: Annotated[
        str | None, typer.Option(metavar="ID", help="The environment it was collected in.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset from another tool's files.

    world-models: folders of .npz files of ctallec/world-models or hardmaru/WorldModelsExperiments. parquet: what raywm
    data export wrote.

    \b
    Example: raywm data import cartpole/random-v0 data/cartpole --format minari
    """
    from raywm.cli import _errors

    with _errors():
        from raywm.data import commands

        made_with = shlex.join(["raywm", *sys.argv[1:]])
        about = None if env is None else _environment(env)
        _show(commands.import_(source, out, format, _console(), made_with, about), as_json)


def _environment(id: str) -> dict[str, Any]:
    from raywm.envs import make_env
    from raywm.spaces import ActionCodec, obs_columns

    env = make_env({"id": id})
    try:
        limit = getattr(env.spec, "max_episode_steps", None)
        columns, codec = obs_columns(env.observation_space), ActionCodec(env.action_space)
        return {"config": {"id": id}, "columns": columns, "codec": codec, "limit": limit}
    finally:
        env.close()


def _console() -> Any:
    from raywm.log import Console

    return Console(stream=sys.stderr)


def _show(result: dict[str, Any], as_json: bool) -> None:
    """JSON, or one line a key: what is nested in indented lines."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for inner, what in value.items():
                typer.echo(f"  {inner}  {what}")
        elif value not in (None, ""):
            typer.echo(f"{key}  {value}")
