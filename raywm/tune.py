"""`raywm tune`: a search over run configs on Ray Tune. Every trial is a run directory like any other.

    OUT/search.yaml        the search, itself a FILE for raywm tune
    OUT/preset.yaml        its preset's config as it was at the start, from which all trials are made
    OUT/source/            where data is "train": the run whose episodes all trials share
    OUT/trials/00000/      a trial; 00000-1: the same trial after it went on as a copy of a better one (pbt)
    OUT/tune/              Ray Tune's own state, from which --resume goes on
    OUT/report.html        table and parallel coordinates

A trial reports after a checkpoint of its own, and what Tune keeps as its checkpoint is only the name of its directory:
whatever ends or pauses it, it goes on there as `raywm train --resume` would.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from raywm import checkpoint
from raywm import config as configs
from raywm.config import RunConfig
from raywm.log import Console, RunLog, read_rows
from raywm.loops.online import Online
from raywm.loops.shared import FILE as SHARED
from raywm.loops.shared import describe, link, share
from raywm.loops.vmc import VMC
from raywm.runtime.needs import Need
from raywm.search import LISTS, Sampler, SearchConfig, dumps, parse_text, reports
from raywm.sinks import check_sinks, open_sinks
from raywm.standings import FAILED, SOURCE, TRIAL, TRIALS, Scores, directories, real_steps, standings

STATE = "tune"  # Tune's directory
PRESET = "preset.yaml"
RETRIES = 2  # of a trial whose process or node died
LOCK_PATIENCE = 20.0  # seconds: a trial that was stopped may still be closing its files
COPY_TRIES = 20  # of a checkpoint that its owner replaces meanwhile

# A trial's paths are the user's; Tune's own logs, its handler of Ctrl-C and its warnings are not wanted.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_search(search: SearchConfig, out: Path, address: str | None = None, console: Console | None = None) -> None:
    """Run a search in `out`, or go on with the one that is there; its trials and its report are there afterwards.

    Raises ValueError for what the machine, the cluster or the search lacks, and where every trial failed.
    """
    import ray

    from raywm.runtime.cluster import connect

    console = console or Console()
    out = out.resolve()
    os.environ.update(ENVIRONMENT)
    if not (out / PRESET).exists():
        configs.save(configs.load(search.preset), out / PRESET)
    search = search.model_copy(update={"preset": str(out / PRESET)})
    base = search.run_config()
    check_sinks(base)
    local = address in (None, "", "local") and base.address in (None, "", "local")
    times = min(search.concurrent, search.total) if local else 1  # logical CPUs may exceed the cores of a laptop
    algorithm = _searcher(search)
    started = not ray.is_initialized()
    connect(address or base.address, needs_of(search, base, times), modules=modules_of(search), say=console.say)
    try:
        setup = {"search": dumps(search), "out": str(out), "data": _data(search, base, out, console)}
        trainable = tune.with_resources(tune.with_parameters(run_trial, setup=setup), _group(search, base))
        if any((out / STATE).glob("experiment_state-*.json")):
            console.say(f"going on with the search in {out}")
            tuner = tune.Tuner.restore(str(out / STATE), trainable, resume_unfinished=True, resume_errored=True)
        else:
            for left in (STATE, TRIALS):  # of a start that was killed before Tune knew of any trial
                shutil.rmtree(out / left, ignore_errors=True)
            tuner = tune.Tuner(
                trainable,
                param_space={key: domain(sampler) for key, sampler in search.space.items()},
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    num_samples=search.samples,
                    search_alg=algorithm,
                    scheduler=scheduler(search, base),
                    trial_dirname_creator=_name,
                    trial_name_creator=_name,
                ),
                run_config=tune.RunConfig(
                    name=STATE,
                    storage_path=str(out),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    callbacks=[Teller(out, search.total)],
                ),
            )
        mark_dead(out, tuner.fit())
    finally:
        if started:
            ray.shutdown()
    trials = standings(search, out)
    if trials and all(trial.status == "failed" for trial in trials):
        raise ValueError(f"all {len(trials)} trials failed, the first one with: {trials[0].error}")


# ------------------------------------------------------------------------------------------------ what Tune is told


def domain(sampler: Sampler) -> Any:
    """Tune's form of a sampler; bounds are inclusive."""
    if sampler.kind == "grid":
        return tune.grid_search(list(sampler.args))
    if sampler.kind == "choice":
        return tune.choice(list(sampler.args))
    low, high, *step = sampler.args
    if sampler.kind in ("randint", "lograndint"):
        high += 1  # which Tune excludes
    return getattr(tune, sampler.kind)(low, high, *step)


def scheduler(search: SearchConfig, base: RunConfig) -> TrialScheduler | None:
    """Tune's form of the scheduler, over reports."""
    asha, pbt = search.scheduler.asha, search.scheduler.pbt
    if asha is not None:
        # one more than there are: whoever reaches the last report comes to its own end
        return ASHAScheduler(
            time_attr="turn", max_t=reports(base) + 1, grace_period=asha.grace, reduction_factor=asha.factor
        )
    if pbt is not None:
        return PopulationBasedTraining(
            time_attr="turn",
            perturbation_interval=pbt.interval,
            quantile_fraction=pbt.quantile,
            resample_probability=pbt.resample,
            hyperparam_mutations={k: list(s.args) if s.kind in LISTS else domain(s) for k, s in search.space.items()},
            custom_explore_fn=partial(_bounded, search.space),
            log_config=False,
            require_attrs=False,  # a trial that fails before its first report has none
        )
    return None


def _bounded(space: Mapping[str, Sampler], values: dict[str, Any]) -> dict[str, Any]:
    """Changed values, back inside their bounds and on their steps."""
    for key, sampler in space.items():
        if sampler.kind in LISTS:
            continue
        low, high, *step = sampler.args
        value = values[key]
        if step:
            value = low + round((value - low) / step[0]) * step[0]
        value = min(max(value, low), high)
        values[key] = round(value) if "randint" in sampler.kind else value
    return values


def _searcher(search: SearchConfig) -> Any:
    if search.search == "random":
        return BasicVariantGenerator(max_concurrent=search.concurrent, random_state=search.seed)
    try:
        import optuna
    except ImportError:
        raise ValueError("search: optuna needs optuna, which is not installed; pip install 'raywm[optuna]'") from None
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return ConcurrencyLimiter(OptunaSearch(metric="score", mode="max", seed=search.seed), search.concurrent)


def bundles(search: SearchConfig, base: RunConfig) -> list[dict[str, float]]:
    """What a trial's placement group holds: its own process first, then each of its actors."""
    head = {"CPU": search.resources.driver_cpus} if search.resources.driver_cpus else {}
    if base.algorithm == "vmc":
        gpus, fit = base.fit.num_gpus, {"CPU": float(base.fit.threads)}
        actors = [{"CPU": 1.0}] * base.collect.workers + [{"CPU": float(base.dream.threads)}] * base.dream.workers
    else:
        gpus, fit = base.dreamer.num_gpus, {"CPU": float(base.dreamer.threads)}
        actors = [{"CPU": 1.0}] * (base.collect.workers + 1) + [fit] * (base.dreamer.learners - 1)
    if gpus:
        fit |= {"GPU": gpus}
    if search.resources.in_process:
        return [{"CPU": max(1.0, search.resources.driver_cpus), **({"GPU": gpus} if gpus else {})}]
    return [head, fit, *actors]


def _group(search: SearchConfig, base: RunConfig) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory(bundles(search, base), strategy=search.resources.strategy)


def needs_of(search: SearchConfig, base: RunConfig, times: int) -> list[Need]:
    """What so many trials at once take: each of their processes has its place, or with STRICT_PACK all of them one."""
    parts, who = bundles(search, base), "process of a trial"
    if search.resources.strategy == "STRICT_PACK":
        parts = [{kind: sum(part.get(kind, 0) for part in parts) for kind in ("CPU", "GPU")}]
        who = "trial"
    return [Need(who, "concurrent", times, part.get("CPU", 0), part.get("GPU", 0)) for part in parts]


def modules_of(search: SearchConfig) -> list[str]:
    """The user's modules that any trial may import."""
    from raywm.runtime.cluster import user_modules

    examples = [{key: value} for key, sampler in search.space.items() for value in sampler.examples]
    return list(dict.fromkeys(m for values in [{}, *examples] for m in user_modules(search.run_config(values))))


def _name(trial: Any) -> str:
    return trial.trial_id.rpartition("_")[2]


class Teller(tune.Callback):
    """Says what happens; kept by Tune with its state, so it holds nothing else."""

    def __init__(self, out: Path, total: int):
        self.out, self.total = out, total

    def _say(self, trial: Any, text: str) -> None:
        Console().say(f"trial {_name(trial)} (of {self.total}): {text}")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, ", ".join(f"{k} {shown(v)}" for k, v in trial.config.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        quality = result["model_quality"]
        self._say(
            trial,
            f"report {result['turn']}: real return {result['real_return']:.4g}"
            + ("" if quality is None else f", model quality {quality:.3g}")
            + f", score {result['score']:.4g}, {result['real_env_steps']} real steps",
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if why := self._why(trial):
            self._say(trial, f"failed: {why}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, f"failed: {self._why(trial) or 'its process died'}; --resume tries it again")

    def _why(self, trial: Any) -> str | None:
        """What a trial's directory says of its failure, if it failed."""
        path = _present(self.out, _name(trial)) / FAILED
        return str(json.loads(path.read_text())["error"]) if path.is_file() else None


def _present(out: Path, name: str) -> Path:
    """The directory that a trial is in now."""
    own = [path for path in directories(out) if path.name.partition("-")[0] == name]
    return own[-1] if own else out / TRIALS / name


def mark_dead(out: Path, results: tune.ResultGrid) -> None:
    """Have the directories of trials say that they failed where they could not: their processes died."""
    for index in range(len(results)):
        result = results[index]
        name = Path(result.path).name
        run = _present(out, name)
        if result.error is None or (run / FAILED).is_file():
            continue
        lines = str(result.error).strip().splitlines() or ["nobody knows why"]
        # a traceback comes before the line that says what it was
        why = lines[0 if isinstance(result.error, OutOfMemoryError) else -1].strip()
        _failed(run, name, result.config or {}, f"its process died: {why}")


def _failed(run: Path, name: str, values: Mapping[str, Any], why: str) -> None:
    """Leave in a trial's directory that it failed."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / TRIAL).exists():
        checkpoint.atomic_write_json(run / TRIAL, {"trial": name, "values": dict(values)})
    checkpoint.atomic_write_json(run / FAILED, {"error": why})


def shown(value: Any) -> str:
    """A value of the space, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ the shared episodes


def _data(search: SearchConfig, base: RunConfig, out: Path, console: Console) -> str | None:
    """Where the common episodes are; those of "train" are there once this returns."""
    if search.data is None:
        return None
    if search.data != "train":
        source = Path(search.data).expanduser().resolve()
        with tempfile.TemporaryDirectory(dir=out, prefix=".try-") as trial:  # an error of it is no trial's
            share(search.run_config(data=str(source)), Path(trial))
        return str(source)
    source = out / SOURCE
    if not (source / "summary.json").is_file():
        console.say(f"training the default in {source}, whose episodes all trials will share")
        source.mkdir(exist_ok=True)
        with checkpoint.hold(source, LOCK_PATIENCE):
            configs.save(base, source / "config.yaml")
            sinks = open_sinks(base, source, out.name)
            with RunLog(source, base.log.tensorboard, False, sinks=sinks) as log:
                with _executor(search, base, source) as executor:
                    summary = VMC(base, source, executor, log).run()
                    log.finish(summary)
        console.say(
            f"the default: real return {summary['real_return_mean']:.4g}, {summary['real_env_steps']} real steps"
        )
    return str(source)


def _executor(search: SearchConfig, config: RunConfig, run: Path) -> Any:
    """Who does a trial's work."""
    if search.resources.in_process:
        from raywm.loops.executor import InProcess
        from raywm.loops.online_work import LocalOnline

        return InProcess(config, run) if config.algorithm == "vmc" else LocalOnline(config, run)
    from raywm.runtime.executor import RayExecutor
    from raywm.runtime.online import RayOnline

    return (RayExecutor if config.algorithm == "vmc" else RayOnline)(config, run, None, _silent)


def _silent(text: str) -> None:
    """A trial's own words are in its metrics."""


# ------------------------------------------------------------------------------------------------ a trial


def run_trial(values: dict[str, Any], setup: dict[str, Any]) -> None:
    """One trial, from wherever it is: what Tune calls. Its error is kept in its directory, in one line.

    A ValueError (a config that cannot be built, an environment that breaks) would come again and fails it for good;
    Tune tries again after anything else.
    """
    search, out = parse_text(setup["search"], "search.yaml"), Path(setup["out"])
    name = tune.get_context().get_trial_id().rpartition("_")[2]
    values = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
    run = out / TRIALS / name
    try:
        config = search.run_config(values, setup["data"])
        run = _directory(out, name, values)
        (run / FAILED).unlink(missing_ok=True)
        _Trial(search, config, run).run()
    except Exception as error:
        _failed(run, name, values, " ".join(f"{type(error).__name__}: {error}".split()))
        if not isinstance(error, ValueError):
            raise


def _directory(out: Path, name: str, values: dict[str, Any]) -> Path:
    """Where a trial goes on: in its own directory, or in a new copy of that of another which is better."""
    pointer: dict[str, str] = {"trial": name, "run": name}
    if (kept := tune.get_checkpoint()) is not None:
        with kept.as_directory() as directory:
            pointer = json.loads((Path(directory) / "run.json").read_text())
    run = out / TRIALS / pointer["run"]
    about: dict[str, Any] = {"trial": name, "values": values}
    if pointer["trial"] != name:
        number = 1
        while (out / TRIALS / f"{name}-{number}").exists():
            number += 1
        donor, run = run, out / TRIALS / f"{name}-{number}"
        copy_run(donor, run)
        about |= {"from": donor.name, "inherited": real_steps(run)}
    elif (run / TRIAL).is_file():
        if json.loads((run / TRIAL).read_text())["values"] == values:
            return run
        shutil.rmtree(run)  # of a trial that Tune's state had not heard of when the search was killed
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.atomic_write_json(run / TRIAL, about)
    return run


def copy_run(donor: Path, to: Path) -> None:
    """Have a run, which may be going on, in another directory as it was at its last checkpoint or a moment later."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for left in reversed(range(COPY_TRIES)):
        try:
            shutil.copytree(donor / "checkpoints", part / "checkpoints", ignore=shutil.ignore_patterns(".*"))
            checkpoint.load(part / "checkpoints")
            break
        except (shutil.Error, FileNotFoundError, ValueError):  # replaced by the next one
            shutil.rmtree(part, ignore_errors=True)
            if not left:
                raise
    for file in ("config.yaml", "metrics.jsonl", "spaces.json", "starts.json", SHARED):
        if (donor / file).exists():
            shutil.copyfile(donor / file, part / file)
    link(donor / "episodes", part / "episodes")  # after the checkpoint, which counts on them
    os.replace(part, to)


class _Trial:
    """A run that reports to Tune, each time once its checkpoint holds what it reports."""

    def __init__(self, search: SearchConfig, config: RunConfig, run: Path):
        self.search, self.config, self.run_dir = search, config, run
        self.hear([])

    def hear(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin with what a log holds. What of it was reported when Tune last saved its state is not known."""
        self.scores = Scores(self.search.metric, self.config.algorithm)
        self.pending = False
        for row in rows:
            self.pending |= self.scores.take(row)

    def run(self) -> None:
        with checkpoint.hold(self.run_dir, LOCK_PATIENCE):
            configs.save(self.config, self.run_dir / "config.yaml")
            if (self.run_dir / "summary.json").is_file():
                self.hear(read_rows(self.run_dir / "metrics.jsonl"))
                return self.report()
            share(self.config, self.run_dir)
            loop = _VMC if self.config.algorithm == "vmc" else _Online
            sinks = open_sinks(self.config, self.run_dir, self.run_dir.parents[1].name)
            with _TrialLog(self, self.run_dir, self.config.log.tensorboard, sinks) as log:
                with _executor(self.search, self.config, self.run_dir) as executor:
                    log.finish(loop(self.config, self.run_dir, executor, log).run())
                    self.report()

    def report(self) -> None:
        """Tell Tune, if there is something new; does not return where it ends the trial."""
        last = self.scores.report()
        if not self.pending or last is None:
            return
        if last.score is None and self.config.algorithm == "dreamer":
            return  # it has not told of its losses yet: with the next checkpoint
        self.pending = False
        if last.score is None:
            raise ValueError(
                "metric: got a weight for model_quality, but this run measures none: no held-out episode is long enough"
            )
        told = {**vars(last), "real_env_steps": self.scores.real_env_steps, "run": self.run_dir.name}
        trial = json.loads((self.run_dir / TRIAL).read_text())["trial"]
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.atomic_write_json(Path(directory) / "run.json", {"trial": trial, "run": self.run_dir.name})
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(directory))


class _TrialLog(RunLog):
    def __init__(self, trial: _Trial, out: Path, tensorboard: bool, sinks: Sequence[Any]):
        super().__init__(out, tensorboard, console=False, sinks=sinks)
        self.trial = trial

    def write(self, kind: str, **fields: Any) -> None:
        super().write(kind, **fields)
        self.trial.pending |= self.trial.scores.take({"kind": kind, **checkpoint.plain(fields)})

    def truncate(self, rows: int) -> None:
        """Where a loop goes on: what it logged after its checkpoint comes again, and counts then."""
        super().truncate(rows)
        self.trial.hear(self.read())

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        super().__exit__(None if kind is SystemExit else kind, *exc)  # Tune ends a trial so that is behind


class _VMC(VMC):
    log: _TrialLog

    def save(self) -> None:
        super().save()
        self.log.trial.report()


class _Online(Online):
    log: _TrialLog

    def _hear_play(self, answer: Any) -> None:
        super()._hear_play(answer)
        self.save_due |= self.log.trial.pending

    def _hear_save(self, answer: Any) -> None:
        super()._hear_save(answer)
        if self.log.trial.pending:
            self.writing.result()  # on the disk
            self.log.trial.report()


@contextlib.contextmanager
def open_search(search: SearchConfig, out: Path, resume: bool) -> Iterator[None]:
    """Start the directory `out`, or reopen it, and hold it against a second process. Raises ValueError."""
    path = out / "search.yaml"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: got a file, expected a directory")
    if not path.exists() and out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no search (no search.yaml); give another --out")
    if not path.exists():
        _check_start(search)
    out.mkdir(parents=True, exist_ok=True)
    with checkpoint.hold(out):
        if path.exists():
            if not resume:
                raise ValueError(f"{out} already holds a search; continue it with --resume, or give another --out")
            old = parse_text(path.read_text(), str(path))
            changed = [key for key in type(search).model_fields if getattr(old, key) != getattr(search, key)]
            if changed := [key for key in changed if key != "smoke"]:
                raise ValueError(
                    f"{changed[0]}: got {getattr(search, changed[0])}, but the search was started with "
                    f"{getattr(old, changed[0])}; restore it, or start a new search in another directory"
                )
        else:
            checkpoint.atomic_write_text(path, dumps(search))
        yield


def _check_start(search: SearchConfig) -> None:
    """Raise ValueError for what a search's file cannot say of itself: before it has a directory, where nothing but the
    address may change."""
    _searcher(search)
    if search.data not in (None, "train"):
        source = Path(search.data).expanduser().resolve()
        describe(search.run_config(data=str(source)), source)
