"""A search over run configs, as its YAML file says: strict like a run's config, and without Ray.

A file names a preset, what is overridden in it, the space that is searched and how. Everything that a person can get
wrong is a `ValueError` of one line, before anything runs. Numbers are drawn by a fixed list of samplers: nothing in a
file is code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from raywm import config as configs
from raywm.config import Count, Fraction, Natural, NonNegative, Number, RunConfig, Section

# Samplers by name: how many numbers they take. Bounds are inclusive; the third number is the step.
NUMBERS = {
    "uniform": 2,
    "loguniform": 2,
    "quniform": 3,
    "qloguniform": 3,
    "randint": 2,
    "lograndint": 2,
    "qrandint": 3,
}
LISTS = ("choice", "grid")

# What population-based training may change in the middle of a run: nothing that decides the shape of what is saved.
MUTABLE = {
    "vmc": (
        "fit.lr",
        "fit.vision_lr",
        "fit.memory_steps",
        "fit.vision_steps",
        "fit.refit",
        "fit.batch",
        "fit.sequence",
        "model.beta",
        "model.free_bits",
        "model.terminal_weight",
        "evolve.sigma",
        "evolve.generations",
        "evolve.rollouts",
        "dream.temperature",
        "dream.horizon",
        "collect.episodes",
        "collect.explore",
    ),
    "dreamer": (
        "dreamer.lr",
        "dreamer.entropy",
        "dreamer.lam",
        "dreamer.horizon",
        "dreamer.discount_horizon",
        "dreamer.critic_decay",
        "dreamer.replay_value",
        "dreamer.return_decay",
        "dreamer.agc",
        "rssm.free_nats",
        "rssm.dyn_scale",
        "rssm.rep_scale",
    ),
}


@dataclass(frozen=True)
class Sampler:
    """One key's values: `kind` of ``NUMBERS`` or ``LISTS``, and its arguments."""

    kind: str
    args: tuple[Any, ...]

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values that a config must be able to take if it can take all of them: the ends, and no whole number."""
        if self.kind in LISTS or "randint" in self.kind:
            return self.args if self.kind in LISTS else self.args[:2]
        low, high = self.args[:2]
        return (low, high, low + (high - low) / math.pi)


def _sampler(value: Any) -> Any:
    names = ", ".join([*LISTS, *NUMBERS])
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"got {_show(value)}, expected one sampler, e.g. {{loguniform: [1.0e-4, 1.0e-2]}}; {names}")
    ((kind, args),) = value.items()
    if kind not in NUMBERS and kind not in LISTS:
        near = configs.nearest(str(kind), [*LISTS, *NUMBERS])
        raise ValueError(
            f"unknown sampler {_show(kind)}; " + (f"did you mean '{near}'?" if near else f"one of {names}")
        )
    if not isinstance(args, list) or not args:
        raise ValueError(f"{kind}: got {_show(args)}, expected a list of values")
    if kind in LISTS:
        return Sampler(kind, tuple(args))
    args = [configs.number(a) for a in args]
    numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool) and math.isfinite(a)]
    if len(numbers) != len(args) or len(args) != NUMBERS[kind]:
        wanted = "[low, high]" if NUMBERS[kind] == 2 else "[low, high, step]"
        raise ValueError(f"{kind}: got {_show(args)}, expected numbers {wanted}")
    low, high = args[:2]
    if "randint" in kind and not all(isinstance(a, int) for a in args):
        raise ValueError(f"{kind}: got {_show(args)}, expected whole numbers")
    if not low < high:
        raise ValueError(f"{kind}: got {_show(args)}, expected the low end below the high one")
    if "log" in kind and low <= 0:
        raise ValueError(f"{kind}: got {_show(args)}, expected a low end above 0")
    if len(args) == 3 and not 0 < args[2] <= high - low:
        raise ValueError(f"{kind}: got {_show(args)}, expected a step above 0 and at most the distance of the ends")
    if len(args) == 3 and not all(math.isclose(end / args[2], round(end / args[2])) for end in (low, high)):
        raise ValueError(
            f"{kind}: got {_show(args)}, expected ends that are multiples of the step, as what is drawn is"
        )
    return Sampler(kind, tuple(args))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class AshaConfig(Section):
    """Asynchronous successive halving: trials that are behind at a rung end there."""

    grace: Count = Field(1, description="Reports that every trial gets.")
    factor: int = Field(3, ge=2, description="One in so many goes on at a rung; rungs are as many times apart.")


class PbtConfig(Section):
    """Population-based training: the worst go on from where the best are, with their values changed."""

    interval: Count = Field(1, description="Reports between two exchanges.")
    quantile: float = Field(0.25, gt=0, le=0.5, description="Share that is replaced, by as large a share.")
    resample: Fraction = Field(0.25, description="Chance that a value is drawn anew instead of changed by a fifth.")


class SchedulerConfig(Section):
    """Who ends or replaces trials before their end; at most one."""

    asha: AshaConfig | None = None
    pbt: PbtConfig | None = None

    @property
    def name(self) -> str:
        return "asha" if self.asha else "pbt" if self.pbt else "none"


def _scheduler(value: Any) -> Any:
    if value in (None, "none", "random"):
        return {}
    if isinstance(value, str):
        if value not in SchedulerConfig.model_fields:
            raise ValueError(f"got '{value}', expected none, asha or pbt")
        return {value: {}}
    if isinstance(value, dict):
        value = {k: {} if v is None else v for k, v in value.items()}
        if len(value) > 1:
            raise ValueError(f"got {', '.join(map(str, value))}, expected one scheduler")
    return value


class ResourcesConfig(Section):
    """What a trial reserves, beside what its config says of its actors (collect.workers, dream.workers, fit.threads,
    fit.num_gpus, dreamer.learners, ...)."""

    in_process: bool = Field(False, description="A trial is one process on one CPU, without actors of its own.")
    driver_cpus: NonNegative = Field(0.0, description="CPUs of the process that runs a trial's loop.")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK"] = Field(
        "PACK", description="How a trial's actors lie on the nodes: on few, on many, or on one."
    )


METRICS = ("real_return", "model_quality")
Weights = Annotated[dict[Literal["real_return", "model_quality"], Number], Field(min_length=1)]


def _metric(value: Any) -> Any:
    return {value: 1.0} if isinstance(value, str) else value


class SearchConfig(Section):
    """Everything that decides what a search does. `space`: by dotted key of a run's config."""

    preset: str = Field(min_length=1, description="A preset or a run's YAML file.")
    overrides: dict[str, Any] = Field({}, description="Values of the run's config, nested or by dotted key.")
    data: str | None = Field(
        None,
        min_length=1,
        description="A run or dataset whose episodes all trials share; 'train': the preset is trained first, once.",
    )
    space: dict[str, Annotated[Any, BeforeValidator(_sampler)]] = Field(min_length=1)
    scheduler: Annotated[SchedulerConfig, BeforeValidator(_scheduler)] = SchedulerConfig()
    search: Literal["random", "optuna"] = Field("random", description="Who chooses; optuna needs raywm[optuna].")
    trials: Count | None = Field(None, description="Trials, of each point of a grid; none: 8, of a mere grid 1.")
    concurrent: Count = Field(2, description="Trials at once.")
    resources: ResourcesConfig = ResourcesConfig()
    metric: Annotated[Weights, BeforeValidator(_metric)] = Field(
        {"real_return": 1.0}, description="real_return, model_quality, or a weight for each: their sum is maximised."
    )
    seed: Natural = Field(0, description="Of the search. Trials have the seed of their config.")
    smoke: dict[str, Any] = Field({}, description="Keys of this file that make it a search of a minute, for --smoke.")

    @field_validator("overrides")
    @classmethod
    def _flat(cls, value: dict[str, Any]) -> dict[str, Any]:
        return configs.flat(value)

    @model_validator(mode="after")
    def _agree(self) -> SearchConfig:
        grid = [key for key, sampler in self.space.items() if sampler.kind == "grid"]
        if grid and (self.scheduler.pbt or self.search == "optuna"):
            raise ValueError(f"space.{grid[0]}: got a grid with {self._who()}, which draws values; use choice")
        if self.scheduler.pbt and self.search == "optuna":
            raise ValueError("search: got optuna with scheduler pbt, which changes values itself; leave one out")
        if len(grid) == len(self.space) and self.trials not in (None, 1):
            raise ValueError(f"trials: got {self.trials} for a mere grid of {self.total}, expected to be left out")
        if twice := sorted(set(self.space) & set(self.overrides)):
            raise ValueError(f"overrides.{twice[0]}: it is in the space as well; leave one out")
        if self.scheduler.pbt and self.total < 4:
            raise ValueError(f"trials: got {self.total} with scheduler pbt, expected a population of 4 or more")
        return self

    def _who(self) -> str:
        return "search optuna" if self.search == "optuna" else "scheduler pbt"

    @property
    def samples(self) -> int:
        """Trials of each point of the grid."""
        return self.trials or (1 if all(s.kind == "grid" for s in self.space.values()) else 8)

    @property
    def total(self) -> int:
        """Trials in all."""
        return self.samples * math.prod(len(s.args) for s in self.space.values() if s.kind == "grid")

    def run_config(self, values: Mapping[str, Any] | None = None, data: str | None = None) -> RunConfig:
        """The config of a run with these values of the space (none: the preset's own) and shared episodes."""
        fixed: dict[str, Any] = {"log.console": False, **self.overrides, **(values or {})}
        config = configs.load(self.preset, values=fixed if data is None else {**fixed, "data": data})
        # all cores of a machine, the default, are not a trial's
        section, threads = ("fit", config.fit) if config.algorithm == "vmc" else ("dreamer", config.dreamer)
        if threads.threads == 0:  # type: ignore[attr-defined]
            config = config.model_copy(update={section: threads.model_copy(update={"threads": 1})})
        return config


def reports(config: RunConfig) -> int:
    """How often a run tells how good it is: turns of V-M-C, evaluations beside of Dreamer."""
    if config.algorithm == "vmc":
        return config.iterations
    return max(1, config.online.steps // max(1, config.online.evaluate_every))


def names() -> list[str]:
    """Names of the searches that ship with the package."""
    folder = _folder()
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")) if folder.is_dir() else []


def _folder() -> Any:
    return resources.files("raywm").joinpath("tune_configs")


def load(name_or_file: str | Path, overrides: Sequence[str] = (), smoke: bool = False) -> SearchConfig:
    """The search of a file or a name, with ``key=value`` overrides of the file's keys; `smoke`: in its small form.

    Both forms are checked down to every value that the space can give. Raises ValueError.
    """
    source = str(name_or_file)
    data = _read(source)
    small = data.get("smoke") or {}
    if not isinstance(small, dict) or "smoke" in small:
        raise ValueError(f"{source}: smoke: got {_show(small)}, expected keys of a search file")
    if smoke and not small:
        raise ValueError(f"{source} has no smoke form; add a section smoke: with few trials and small overrides")
    forms = [(source, data)]
    if small:
        forms.append((f"{source}, smoke", _merged(data, small)))
    checked = []
    for where, form in forms:
        for override in overrides:
            configs.apply_override(form, override)
        checked.append(_check(_parse(form, where), where))
    return checked[1] if smoke else checked[0]


def _merged(data: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The small form: its overrides on top of the others, the rest in their place."""
    merged = {k: v for k, v in data.items() if k != "smoke"} | small
    merged["overrides"] = configs.flat(data.get("overrides") or {}) | configs.flat(small.get("overrides") or {})
    return merged


def _read(source: str) -> dict[str, Any]:
    known = names()
    if source.endswith((".yaml", ".yml")) or os.sep in source:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no search file {source}; give a YAML file or one of: {', '.join(known)}")
        text = path.read_text()
    elif source in known:
        text = _folder().joinpath(f"{source}.yaml").read_text()
    else:
        near = configs.nearest(source, known)
        hint = f"did you mean '{near}'? " if near else ""
        raise ValueError(f"unknown search '{source}'; {hint}searches: {', '.join(known)}; a file ends in .yaml")
    data = configs.read_yaml(text, source)
    if not isinstance(data, dict):
        raise ValueError(f"{source}: got {_show(data)}, expected a mapping of keys: {', '.join(_keys())}")
    return {k: {} if v is None and k in ("overrides", "resources", "smoke") else v for k, v in data.items()}


def _keys() -> list[str]:
    return list(SearchConfig.model_fields)


def _parse(data: dict[str, Any], source: str) -> SearchConfig:
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains what is missing
        lines = list(dict.fromkeys(_explain(e) for e in found))
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{source}: {lines[0]}{more}") from error


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        sections: list[tuple[str, type[Section]]] = [
            ("scheduler.asha", AshaConfig),
            ("scheduler.pbt", PbtConfig),
            ("resources", ResourcesConfig),
        ]
        all_keys = [*_keys(), *(f"{name}.{k}" for name, section in sections for k in section.model_fields)]
        near = configs.nearest(key, all_keys)
        return f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else f"; keys: {', '.join(_keys())}")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key}: got {_show(error['input'])}, expected: {error['msg']}"


def _check(search: SearchConfig, source: str) -> SearchConfig:
    """Every value at an end of the space makes a config; the scheduler can do what it is to do."""
    try:
        base = search.run_config()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if search.data is not None:
        if base.algorithm != "vmc":
            raise ValueError(
                f"{source}: data: got '{search.data}' for {base.algorithm}, expected null; only vmc shares"
            )
    if "data" in search.overrides or "data" in search.space:
        raise ValueError(f"{source}: the trials' episodes are given by data: of the search, not of the run's config")
    for key, sampler in search.space.items():
        if key in ("address", "algorithm") or key.startswith(("log.", "replay.")):
            raise ValueError(f"{source}: space.{key}: expected a key that decides what a run computes")
        for value in sampler.examples:
            try:
                search.run_config({key: value})
            except ValueError as error:
                whole = "; randint, qrandint and lograndint draw such" if "a whole number" in str(error) else ""
                raise ValueError(f"{source}: space.{key}: {error}{whole}") from error
        if search.scheduler.pbt and key not in MUTABLE[base.algorithm]:
            raise ValueError(
                f"{source}: space.{key} cannot change in the middle of a run, expected with pbt some of "
                f"{', '.join(MUTABLE[base.algorithm])}"
            )
    if base.algorithm == "dreamer" and not base.online.evaluate_every:
        raise ValueError(f"{source}: online.evaluate_every: got 0, expected steps between two reports to the search")
    if search.scheduler.asha and search.scheduler.asha.grace > reports(base):
        raise ValueError(
            f"{source}: scheduler.asha.grace: got {search.scheduler.asha.grace}, but a trial reports {reports(base)} "
            "times; expected at most that, and less to end any"
        )
    if base.replay.storage is not None:
        raise ValueError(
            f"{source}: replay.storage: got '{base.replay.storage}', expected null; it holds one run, not many trials"
        )
    if base.replay.shards != "driver" and search.scheduler.pbt:
        raise ValueError(f"{source}: replay.shards: got 'nodes', expected 'driver' with pbt, which links episodes")
    return search


def dumps(search: SearchConfig) -> str:
    """The search as YAML that `load` reads back, without its smoke form."""
    data = search.model_dump(mode="json", exclude={"smoke", "space"}, exclude_none=True)
    data["space"] = {key: {s.kind: list(s.args)} for key, s in search.space.items()}
    return yaml.safe_dump(data, sort_keys=False)


def parse_text(text: str, source: str) -> SearchConfig:
    """What `dumps` wrote."""
    return _parse(configs.read_yaml(text, source), source)
