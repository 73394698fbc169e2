"""The command line: collect, train, evaluate, dream, report, export, serve, bench, data.

Commands import what they run, so that ``--help`` and a typo in a key cost a fraction of a second.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from raywm import __version__
from raywm import config as configs
from raywm import search as searches
from raywm.config import RunConfig
from raywm.data_cli import data

app = typer.Typer(
    help="World models and the agents that learn inside them, on Ray.",
    epilog="First steps: raywm train cartpole",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(no_args_is_help=True, help="Measure raywm on this machine.")
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")

PresetArg = Annotated[
    str, typer.Argument(metavar="PRESET|FILE", help=f"A YAML file, or one of: {', '.join(configs.presets())}.")
]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Config values, e.g. seed=1 collect.workers=4.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="The run's directory.", show_default="runs/PRESET-seedSEED")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; start it if there is none.")]
AddressOption = Annotated[
    str | None, typer.Option(help="A running Ray cluster to join.", show_default="a private local Ray")
]
InProcessOption = Annotated[bool, typer.Option("--in-process", hidden=True, help="One process, without Ray.")]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
BenchOutOption = Annotated[Path | None, typer.Option("--out", "-o", help="A file that gets the JSON.")]
TurnSecondsOption = Annotated[float, typer.Option("--seconds", min=0.1, help="Time for each measurement of a turn.")]
TurnsOption = Annotated[int, typer.Option("--turns", min=1, help="Turns, of which medians are taken.")]


class _State:
    debug = False


def main() -> None:
    """The `raywm` command."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raywm {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", envvar="RAYWM_DEBUG", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    _State.debug = debug


@app.command()
def collect(
    environment: Annotated[
        str, typer.Argument(metavar="ENV|PRESET|FILE", help="A gymnasium id, module:EnvClass, a preset or a YAML file.")
    ],
    overrides: OverridesArg = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="A directory or a URI (s3://...).", show_default="data/ENV-seedSEED"),
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes in all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Environment steps in all, at least.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="random, sticky, mixed, a RUN's directory, rllib:CHECKPOINT or module:AgentClass.",
            show_default="collect.policy",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out; start if there is nothing.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="The environment's own vectorised form; not reproducible one by one.")
    ] = False,
    address: AddressOption = None,
    in_process: InProcessOption = False,
    as_json: JsonOption = False,
) -> None:
    """Collect a dataset of real episodes.

    Plays --episodes or --steps of any environment under any policy into --out, and checks every byte of it in the end.
    Stopped or killed, it goes on with --resume. raywm data shows, checks and exports what is there.

    \b
    Examples:
      raywm collect CartPole-v1 --episodes 1000
      raywm collect doom-take-cover --steps 1000000 --out s3://bucket/doom --address auto collect.workers=200
    """
    with _errors() as fixes:
        config = configs.load_environment(environment, overrides or [])
        if address is not None:
            config = config.model_copy(update={"address": address})
        out = out or f"data/{config.env.id.replace('/', '-').replace(':', '-')}-seed{config.seed}"
        command = ["raywm", "collect", environment, *(overrides or []), "--out", out]
        for name, value in (("episodes", episodes), ("steps", steps), ("policy", policy), ("address", address)):
            command += [] if value is None else [f"--{name}", str(value)]
        command += [*(["--fast"] if fast else []), *(["--in-process"] if in_process else [])]
        from raywm.runtime.collect import collect_dataset

        with _interruptible([*command, "--resume"]):
            result = collect_dataset(
                config,
                out,
                episodes=episodes,
                steps=steps,
                policy=policy,
                resume=resume,
                fast=fast,
                in_process=in_process,
                made_with=shlex.join(command),
                fixes=fixes,
            )
        _print_result(result, as_json, quiet=not config.log.console)


@app.command()
def train(
    preset: PresetArg,
    overrides: OverridesArg = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    address: AddressOption = None,
    in_process: InProcessOption = False,
) -> None:
    """Train an agent in the dreams of a world model.

    V-M-C collects real episodes, fits the model to them, evolves a controller in its dreams, measures it in reality,
    and repeats until target.real_return, budget.real_steps or iterations is reached. Dreamer (algorithm: dreamer)
    collects and trains at the same time until target.real_return or online.steps. A stopped or killed run continues
    with --resume. At a resume only how far and where it goes may change: steps, workers, timeouts, target, log.

    \b
    Examples:
      raywm train cartpole
      raywm train cartpole env.id=Acrobot-v1 seed=3 collect.workers=4 --out runs/acrobot --resume
    """
    _run(preset, overrides or [], out, resume, address, in_process)


@app.command()
def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN|rllib:CHECKPOINT", help="A run's directory, or what an RLlib algorithm saved.")
    ],
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Real episodes.", show_default="of the run, or 100")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds the episodes.", show_default="of the run")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a run's controller, or an RLlib policy, in the real environment.

    \b
    Example: raywm evaluate runs/cartpole-seed0 --episodes 100
    """
    with _errors():
        if run.startswith("rllib:"):
            from raywm.rllib import SavedPolicy

            saved = SavedPolicy(run.removeprefix("rllib:"))
            agent: Any = saved.agent()
            env, own_seed, count = saved.env, saved.seed, episodes or 100
        else:
            config = _config_of(Path(run))
            from raywm.agent import load_agent

            agent, env, own_seed = load_agent(run).agent, config.env, config.seed
            count = episodes or config.evaluate.episodes
        from raywm.evaluate import evaluate as measure
        from raywm.log import Console

        with Console(stream=sys.stderr).progress("evaluating", count) as bar:
            result = measure(agent, env, own_seed if seed is None else seed, count, progress=bar.advance)
        _print_result(result, as_json)


@app.command()
def dream(
    run: RunArg,
    video: Annotated[bool, typer.Option("--video", help="Write a video of reality beside the dream.")] = False,
    episodes: Annotated[int, typer.Option(min=1, help="Dreams.")] = 100,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds the dreams.", show_default="of the run")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a run's controller in its own dream.

    Prints its dream returns beside the real ones, or makes a video of both with --video.

    \b
    Example: raywm dream runs/doom --video
    """
    with _errors():
        config = _config_of(run)
        from raywm.log import Console

        with Console(stream=sys.stderr).progress("dreaming"):
            if video:
                from raywm.report import dream_video

                result: dict[str, Any] = {"video": str(dream_video(run))}
            else:
                from raywm.report import dream_summary

                result = dream_summary(run, episodes, config.seed if seed is None else seed)
        _print_result(result, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="With several runs: the page's file.", show_default="comparison.html"),
    ] = None,
) -> None:
    """Write a run's report, or compare runs, as one self-contained page.

    RUN/report.html holds everything there is to see about a run. Of several runs, the page holds what differs between
    their configs, their results with the spread over seeds, and their curves.

    \b
    Examples:
      raywm report runs/cartpole-seed0
      raywm report runs/cartpole-seed0 runs/cartpole-seed1 runs/dreamer-cartpole-seed0 --out comparison.html
    """
    with _errors():
        for run in runs:
            _config_of(run)
        if len(runs) == 1 and out is not None:
            raise ValueError(
                f"--out {out}: got one run, whose page is {runs[0] / 'report.html'}; give more, or no --out"
            )
        from raywm.log import Console

        console = Console(stream=sys.stderr)
        if len(runs) == 1:
            from raywm.report import write_report

            with console.progress("writing the report"):
                path = write_report(runs[0])
        else:
            from raywm.report.compare import write_comparison

            with console.progress("comparing", len(runs)) as bar:
                path = write_comparison(runs, out or Path("comparison.html"), bar.advance)
        typer.echo(f"report: {path}")


@app.command()
def export(
    run: RunArg,
    format: Annotated[str, typer.Option(metavar="torch-export|onnx", help="The file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder.", show_default="RUN/export/FORMAT")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Real steps to check it over.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Write a run's agent as one function that runs without raywm.

    Encoder, memory and policy as (obs, state, is_first, noise) -> (action, state) for batches of any size, with a
    model card and an example. What was written is held against the agent in the real environment: where they differ
    by more than 1e-4, or in an action, it is an error and nothing stays.

    \b
    Example: raywm export runs/cartpole-seed0 --format onnx
    """
    with _errors():
        _config_of(run)
        from raywm.export import export_run
        from raywm.log import Console

        command = ["raywm", "export", str(run), "--format", format, *(["--out", str(out)] if out else [])]
        command += [] if steps == 1000 else ["--steps", str(steps)]
        with Console(stream=sys.stderr).progress("checking the export", steps) as bar:
            result = export_run(run, format, out, steps, shlex.join(command), bar.advance)
        _print_result(result, as_json)


@app.command()
def serve(
    run: RunArg,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    host: Annotated[str, typer.Option(help="Wider than this machine needs a token.")] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file with the token that clients must send.", show_default="RAYWM_SERVE_TOKEN"),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Serve a run's agent and its dreams over HTTP.

    POST /act takes observations and the states of the last answer, and gives actions and states; POST /imagine rolls
    the world model forward under given actions; GET /health and GET /schema say what is served and how to ask.

    \b
    Examples:
      raywm serve runs/cartpole-seed0
      raywm serve runs/doom --host 0.0.0.0 --token-file token --replicas 4 --address auto
    """
    with _errors():
        _config_of(run)
        from raywm.serve import main as serve_run

        serve_run(run, host, port, replicas, token_file, address, typer.echo)


@app.command("tune")
def tune_command(
    search: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help=f"A search's YAML file, or one of: {', '.join(searches.names())}."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys of the file, e.g. trials=4 seed=1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The search's directory.", show_default="runs/tune-NAME-seedSEED")
    ] = None,
    data_from: Annotated[
        str | None,
        typer.Option("--data", metavar="RUN|DATASET", help="Whose episodes all trials share.", show_default="data"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the search in --out; start if there is none.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The file's small form: a minute or so, and worthless results.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """Search a run's config with Ray Tune.

    Trials are run directories in OUT/trials, each with actors of its own; with --data (or data: in the file) they learn
    from one run's or dataset's episodes, collected once. The table and OUT/report.html name the best trial.

    \b
    Examples:
      raywm tune vmc_cartpole_asha
      raywm tune vmc_cartpole_asha --data runs/cartpole-seed0 trials=16 --out runs/search --resume
    """
    with _errors() as fixes:
        given = [*(overrides or []), *([] if data_from is None else [f"data={json.dumps(data_from)}"])]
        wanted = searches.load(search, given, smoke)
        out = out or Path("runs") / f"tune-{Path(search).stem}-seed{wanted.seed}"
        command = ["raywm", "tune", search, *given, "--out", str(out), *(["--smoke"] if smoke else [])]
        command += [*(["--address", address] if address else []), "--resume"]
        _parts(wanted.run_config())  # an environment or a model that cannot be built must not leave a directory behind
        from raywm.tune import open_search, run_search

        with open_search(wanted, out, resume), _interruptible(command):
            fixes.append("what is done is kept: mend it, and continue with --resume")
            run_search(wanted, out, address)
            fixes.clear()
            _print_search(wanted, out)


def _print_search(search: searches.SearchConfig, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from raywm.report.search import best_of, cells, commands, heads, steps_text, write_search_report
    from raywm.standings import spent, standings

    trials, steps = standings(search, out), spent(out)
    table = Table(*heads(search), box=None)
    for trial in trials:
        table.add_row(*cells(search, trial))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    for trial in trials:
        if trial.error:
            typer.echo(f"trial {trial.name} failed: {trial.error}")
    typer.echo(steps_text(search, steps))
    typer.echo(f"report: {write_search_report(search, out, trials, steps)}")
    if best := best_of(trials):
        typer.echo(f"best: trial {best.path.name}; on episodes that no trial has played:")
        for line in commands(out, best):
            typer.echo(f"  {line}")


@bench.callback()
def _bench() -> None:
    """Measure raywm on this machine."""


@bench.command("dream")
def bench_dream(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each measurement.")] = 5.0,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure dream steps per second.

    One unit of the DreamPool, against one rollout a process, a plain batch, and the floor of the model's matmuls.

    \b
    Example: raywm bench dream --seconds 10
    """
    with _errors():
        from raywm.bench.dream import main as measure

        measure(seconds=seconds, as_json=as_json, out=out)


@bench.command("dreamer")
def bench_dreamer(
    what: Annotated[str, typer.Option(metavar="vector|image|all", help="Observations.")] = "all",
    gpu: Annotated[bool, typer.Option("--gpu", help="Instead: sizes 12M, 25M and 100M on a GPU.")] = False,
    learn_rllib: Annotated[
        float | None,
        typer.Option(min=1, metavar="SECONDS", help="Instead: let RLlib's DreamerV3 learn CartPole-v1 for so long."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --learn-rllib.")] = 0,
    seconds: TurnSecondsOption = 10.0,
    turns: TurnsOption = 5,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure how long a Dreamer update takes.

    Model, actor and critic on 16 sequences of 64 rows, against RLlib's DreamerV3 XS, known figures of others, and the
    floor of the update's matrix products; and where its time goes.

    \b
    Example: raywm bench dreamer --what vector --out dreamer.json
    """
    with _errors():
        from raywm.bench.dreamer import main as measure

        measure(what, seconds, turns, gpu, learn_rllib, seed, as_json=as_json, out=out)


@bench.command("collect")
def bench_collect(
    environments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENV|PRESET]...",
            help="What to play.",
            show_default="CartPole-v1, CarRacing-v3 and doom-take-cover-small",
        ),
    ] = None,
    seconds: TurnSecondsOption = 10.0,
    turns: TurnsOption = 5,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure environment steps per second.

    Two collectors and a shard on Ray, against two bare processes that only step, and against RLlib's EnvRunners.

    \b
    Example: raywm bench collect CarRacing-v3 --seconds 20
    """
    with _errors():
        from raywm.bench.collect import main as measure

        measure(environments, seconds=seconds, turns=turns, as_json=as_json, out=out)


@bench.command("replay")
def bench_replay(
    memory: Annotated[
        bool, typer.Option("--memory", help="Instead: memory used, a cold page cache, and a day of appends.")
    ] = False,
    budget_mb: Annotated[float, typer.Option("--budget", min=1, help="With --memory: the budget in MB.")] = 256.0,
    rows: Annotated[int, typer.Option(min=1, help="With --memory: rows of the day.")] = 86_400_000,
    seconds: TurnSecondsOption = 3.0,
    turns: TurnsOption = 7,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure sequences per second out of a replay.

    Batches of 16 x 64 images, against a plain copy in memory and RLlib's buffer, and through a Ray shard; or, with
    --memory, what a buffer of four times a memory budget takes.

    \b
    Example: raywm bench replay --memory --out memory.json
    """
    with _errors():
        if memory:
            from raywm.bench.memory import main as measure_memory

            measure_memory(budget_mb, rows, seconds=seconds, turns=turns, as_json=as_json, out=out)
        else:
            from raywm.bench.replay import main as measure

            measure(seconds=seconds, turns=turns, as_json=as_json, out=out)


@bench.command("rllib")
def bench_rllib(
    environment: Annotated[
        str | None,
        typer.Argument(metavar="[ENV|PRESET|FILE]", help="What to learn.", show_default="the environment of --run"),
    ] = None,
    algorithms: Annotated[
        str,
        typer.Option(
            "--algorithms", metavar="NAME[,NAME]...", help="ppo and dreamer in reality, dream: ppo in --run's dream."
        ),
    ] = "ppo,dreamer",
    run: Annotated[str | None, typer.Option("--run", help="A finished run's directory, for dream.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for each to learn, at most.")] = 120.0,
    target: Annotated[float | None, typer.Option(help="Mean return at which one stops.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Real episodes to try a PPO policy in.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the algorithms.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="A directory that keeps PPO's checkpoints.", show_default="they go")
    ] = None,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Let RLlib's algorithms learn.

    Returns by steps and by seconds, of PPO and DreamerV3 in the real environment, and of PPO in the dream of a run,
    with what that earns in reality.

    \b
    Example: raywm bench rllib --algorithms dream,ppo --run runs/cartpole-seed0 --target 475
    """
    with _errors():
        from raywm.bench.rllib import main as measure

        measure(environment, algorithms, run, seconds, target, episodes, seed, save, as_json=as_json, out=out)


@bench.command("scale")
def bench_scale(
    collectors: Annotated[
        str, typer.Option(metavar="N[,N]...", help="Numbers of collectors, each a process.")
    ] = "8,16,32",
    seconds: TurnSecondsOption = 10.0,
    turns: TurnsOption = 5,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure how many collectors one driver bears.

    Collectors of environments that only sleep, against the ideal; and the driver's share of a core. --out also gets
    the curve, as a PNG beside the JSON.

    \b
    Example: raywm bench scale --collectors 8,16 --out scale.json
    """
    with _errors():
        try:
            counts = [int(count) for count in collectors.split(",")]
        except ValueError:
            raise ValueError(f"--collectors {collectors!r}, expected numbers like 8,16,32") from None
        from raywm.bench.scale import main as measure

        measure(counts, seconds=seconds, turns=turns, as_json=as_json, out=out)


@bench.command("serve")
def bench_serve(
    presets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PRESET]...", help="Sizes of agents.", show_default="cartpole, dreamer-cartpole"),
    ] = None,
    seconds: TurnSecondsOption = 5.0,
    turns: TurnsOption = 5,
    as_json: JsonOption = False,
    out: BenchOutOption = None,
) -> None:
    """Measure decisions per second over HTTP.

    One replica and 16 clients with 16 observations or one a request, against the agent alone and against Ray Serve
    answering as many bytes. Every answer is checked against a local agent.

    \b
    Example: raywm bench serve --seconds 10 --out serve.json
    """
    with _errors():
        from raywm.bench.serve import main as measure

        measure(presets, seconds=seconds, turns=turns, as_json=as_json, out=out)


def _run(
    preset: str,
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
    address: str | None,
    in_process: bool,
) -> None:
    with _errors() as fixes:
        config = configs.load(preset, overrides)
        if address is not None:
            config = config.model_copy(update={"address": address})
        out = out or Path("runs") / f"{Path(preset).stem}-seed{config.seed}"
        if "://" in str(out) or re.match(r"[a-z0-9]+:/[^/]", str(out)):
            raise ValueError(
                f"--out {out}: got a URI, expected a directory here; replay.storage=URI keeps a copy of it there"
            )
        command = ["raywm", "train", preset, *overrides, "--out", str(out)]
        command += [*(["--address", address] if address else []), *(["--in-process"] if in_process else []), "--resume"]
        _parts(config)  # an environment or a model that cannot be built must not leave a run directory behind
        from raywm.sinks import check_sinks

        check_sinks(config)
        copy = _copy_of(out, config, in_process)
        with _open_run(out, config, resume, copy), copy or contextlib.nullcontext(), _interruptible(command):
            from raywm.log import RunLog
            from raywm.loops.shared import share

            share(config, out)
            if config.algorithm == "dreamer":
                from raywm.loops.online import train as loop
            else:
                from raywm.loops.vmc import train as loop
            sinks = _sinks(config, out, in_process)
            with RunLog(out, config.log.tensorboard, config.log.console, sinks=sinks) as log:
                log.say(f"{out}: {config.env.id}, seed {config.seed}")
                with _executor(config, out, in_process) as executor:
                    fixes.append("what is done is kept: mend it, and continue with --resume")
                    result = loop(config, out, executor, log)
                    log.finish(result)
                _print_result(result, as_json=False, quiet=not config.log.console)
                from raywm.report import write_report  # type: ignore[attr-defined]

                with log.progress("writing the report"):
                    path = write_report(out)
                log.say(f"report: {path}")


def _sinks(config: RunConfig, out: Path, in_process: bool) -> list[Any]:
    """Who hears of the run beside its own log."""
    from raywm.sinks import open_sinks

    sinks = open_sinks(config, out)
    if not in_process:
        from raywm.runtime.metrics import RayMetrics

        sinks.append(RayMetrics(config, out))
    return sinks


def _parts(config: RunConfig) -> Any:
    if config.algorithm == "dreamer":
        from raywm.loops.online_work import OnlineParts

        return OnlineParts(config)
    from raywm.loops.parts import Parts

    return Parts(config)


def _executor(config: RunConfig, out: Path, in_process: bool) -> Any:
    if config.algorithm == "dreamer" and in_process:
        from raywm.loops.online_work import LocalOnline

        return LocalOnline(config, out)
    if config.algorithm == "dreamer":
        from raywm.runtime.online import RayOnline

        return RayOnline(config, out, config.address)
    if in_process:
        from raywm.loops.executor import InProcess

        return InProcess(config, out)
    from raywm.runtime.executor import RayExecutor

    return RayExecutor(config, out, config.address)


def _copy_of(out: Path, config: RunConfig, in_process: bool) -> Any:
    """The `RunCopy` of a run that has a storage."""
    if config.replay.storage is None or in_process:
        return None
    from raywm.run_copy import RunCopy

    return RunCopy(out, config.replay.storage, typer.echo)


@contextlib.contextmanager
def _open_run(out: Path, config: RunConfig, resume: bool, copy: Any = None) -> Iterator[None]:
    """Start the run directory `out`, or reopen it, and hold it against a second process.

    Where the run in `copy` is further, it goes on with that one."""
    from raywm.checkpoint import clear_disk_errors, hold

    path = out / "config.yaml"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: got a file, expected a directory")
    if copy is not None and copy.ahead():
        if not resume:
            raise ValueError(
                f"{copy.uri} already holds a run; continue it with --resume, or give another replay.storage"
            )
        typer.echo(f"{out}: going on with the run that {copy.uri} keeps")
        out.mkdir(parents=True, exist_ok=True)
        with hold(out):
            copy.fetch()
    if path.exists() and not _nothing_yet(out):
        if not resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or give another --out")
        configs.diff_for_resume(configs.load(path), config)
    elif not path.exists() and out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run (no config.yaml); give another --out")
    try:
        with clear_disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write in it")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ValueError(f"--out {out} cannot be written: {error.strerror}; give another --out") from error
    with hold(out):
        with clear_disk_errors(path):
            configs.save(config, path)
        yield


def _nothing_yet(out: Path) -> bool:
    """Whether `out` holds only what a run leaves that failed before its first episode: it may be started anew."""
    made = {"config.yaml", "spaces.json", "metrics.jsonl", "tensorboard", "episodes", "starts.json"}
    made |= {"sinks.json", "wandb"}
    if {p.name for p in out.iterdir() if not p.name.startswith(".")} - made or any(out.glob("episodes/[!.]*")):
        return False
    try:
        return bool(configs.load(out / "config.yaml"))
    except ValueError:
        return False


@contextlib.contextmanager
def _interruptible(command: Sequence[str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run alike: what is open is closed, and how to continue is said."""
    code = 130

    def terminate(*_: Any) -> None:
        nonlocal code
        code = 128 + signal.SIGTERM
        raise KeyboardInterrupt  # Ray makes this of whatever a handler raises while it is waited for

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except KeyboardInterrupt:
        if _State.debug:
            traceback.print_exc()
        typer.echo(f"\nstopped; continue with: {shlex.join(command)}", err=True)
        raise typer.Exit(code) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _errors() -> Iterator[list[str]]:
    """What the user can mend in one line; bugs keep their traceback. `fixes`, what is yielded, end that line."""
    fixes: list[str] = []
    try:
        yield fixes
    except (ValueError, OSError) as error:
        if _State.debug:
            traceback.print_exc()
        # an error raised on a Ray worker comes with the worker's traceback around it: the line is in its cause
        cause = getattr(error, "cause", None)
        shown = cause if isinstance(cause, Exception) else error
        text = str(shown)
        if isinstance(shown, OSError) and shown.strerror:  # without "[Errno 28]"
            text = shown.strerror if shown.filename is None else f"{shown.strerror}: {shown.filename}"
        line = " ".join("; ".join([text, *(fix for fix in fixes if "continue" not in text)]).split())
        typer.secho(f"error: {line}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _config_of(run: Path) -> RunConfig:
    """The config of an existing run."""
    if not (run / "config.yaml").is_file():
        parent = run.parent if run.parent.is_dir() else Path()
        runs = sorted(str(p.parent) for p in [*parent.glob("*/config.yaml"), *Path("runs").glob("*/config.yaml")])
        near = difflib.get_close_matches(str(run), runs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"runs: {', '.join(runs[:8])}" if runs else "start one first"
        raise ValueError(f"no run in {run} (no config.yaml); {hint}")
    config = configs.load(run / "config.yaml")
    if ":" in config.model.kind:  # as its environment's is: whoever runs a command on a run trusts its config
        from raywm.models import model_class

        model_class(config.model.kind)
    return config


def _print_result(result: dict[str, Any], as_json: bool, quiet: bool = False) -> None:
    from raywm.checkpoint import plain

    result = plain(result)
    if as_json:
        typer.echo(json.dumps(result))
    elif not quiet:
        from rich.console import Console
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for key, value in result.items():
            if not isinstance(value, (dict, list)):
                table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
