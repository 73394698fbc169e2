"""A run's configuration: strict typed sections, YAML presets shipped in the package, ``key=value`` overrides.

Everything that a person can get wrong is a `ValueError` of one line that names the key, what it got and what it
expected. Objects are frozen: a run's config does not change while it runs. This module imports nothing of raywm.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

# What YAML 1.2 calls a float and PyYAML (YAML 1.1) hands over as a string: 1e-4, 2E3, 1.5e-3.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


def number(value: Any) -> Any:
    """A float where YAML 1.1 left a string like 1e-4; anything else as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(number), Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]


# Ray's syntax of a label's value, without the operators (in(...), !value) that its selectors know.
Labels = dict[
    Annotated[str, Field(min_length=1)], Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$")]
]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class EnvConfig(Section):
    """The environment, and what is done to it before anyone sees it."""

    id: str = Field(min_length=1, description="A gymnasium id, or 'module:EnvClass'.")
    kwargs: dict[str, Any] = Field({}, description="Arguments of the environment's constructor.")
    crop: Annotated[tuple[Natural, Natural, Natural, Natural], BeforeValidator(_tuple)] | None = Field(
        None, description="Pixels cut off images at the [top, bottom, left, right]."
    )
    resize: Annotated[tuple[Count, Count], BeforeValidator(_tuple)] | None = Field(
        None, description="Images are scaled to [height, width], after the crop."
    )
    grayscale: bool = Field(False, description="Images lose their colour.")
    action_repeat: Count = Field(1, description="Times that an action is applied; one step of the run is all of them.")
    time_limit: Count | None = Field(None, description="Steps after which an episode is truncated.")


class BudgetConfig(Section):
    """When to stop spending."""

    real_steps: Count | None = Field(None, description="Real environment steps after which the run ends.")


class TargetConfig(Section):
    """When to stop because it is good enough."""

    real_return: Number | None = Field(None, description="Mean return of a turn's greedy trial episodes to stop at.")
    episodes: Count = Field(5, description="Greedy trial episodes a turn.")


class CollectConfig(Section):
    """Playing in the real environment."""

    workers: Count = Field(2, description="Collector actors.")
    envs: Count = Field(8, description="Environments an actor plays at once.")
    policy: Literal["mixed", "random", "sticky"] = Field(
        "mixed", description="Who plays first: a new action every step, held ones, or a time scale an episode."
    )
    hold: Count = Field(30, description="The sticky policy holds an action for 1 to this many steps.")
    initial_steps: Count = Field(4000, description="Real steps before the first fit.")
    episodes: Count = Field(10, description="Episodes a turn, played with the controller.")
    explore: Fraction = Field(0.1, description="Chance a step of a random action, in episodes that are no trials.")
    timeout_s: Positive = Field(300.0, description="Seconds after which a collector's answer counts as lost.")
    piece_rows: Count | None = Field(
        None, description="Episodes are handed over in pieces of this many rows, while they are played."
    )
    stall_s: Positive = Field(
        60.0, description="Seconds an environment's step or reset may take before it is restarted; below timeout_s."
    )
    labels: Labels = Field({}, description="Ray labels of the nodes that collect, and keep shards=nodes.")

    @model_validator(mode="after")
    def _agree(self) -> CollectConfig:
        if self.stall_s >= self.timeout_s:
            raise ValueError(
                f"collect.stall_s: got {self.stall_s:g}, expected less than collect.timeout_s={self.timeout_s:g}, "
                "after which a collector's whole answer is given up; lower stall_s, or raise timeout_s"
            )
        return self


class ReplayConfig(Section):
    """Where real episodes are kept."""

    shards: Literal["driver", "nodes"] = Field(
        "driver", description="One shard on the driver's node, in the run's directory; or one on each node."
    )
    storage: str | None = Field(
        None, description="Path or URI (s3://...) that sealed segments, and what a run must keep, are copied to."
    )
    segment_mb: Positive = Field(64.0, description="A segment is sealed when it is this large,")
    seal_s: Positive = Field(60.0, description="or after this many seconds.")
    capacity_mb: Positive | None = Field(
        None, description="The oldest segments are dropped beyond this, over all shards."
    )


class ModelConfig(Section):
    """The world model: vision (V) and memory (M), or one of your own."""

    kind: str = Field("vm", description="vm, or 'module:Class': a raywm.models.base.WorldModel of your own.")
    kwargs: dict[str, Any] = Field({}, description="Arguments of such a class; the other keys are vm's.")
    vision: Literal["auto", "identity", "mlp", "conv"] = Field(
        "auto", description="V; auto is identity for vectors and conv for images."
    )
    latent: Count = Field(32, description="Size of z (mlp, conv).")
    beta: NonNegative = Field(1.0, description="Weight of V's KL term.")
    free_bits: NonNegative = Field(0.0, description="Nats a latent dimension below which the KL costs nothing.")
    hidden: Count = Field(128, description="Size of the LSTM's h.")
    mixtures: Count = Field(5, description="Gaussians in M's mixture.")
    joint: bool = Field(True, description="One mixture over all of z; false: one a dimension, as in the paper.")
    residual: Literal["auto"] | bool = Field(
        "auto", description="M predicts z' - z rather than z'; auto: for vectors, not for a VAE's latents."
    )
    terminal_weight: Positive = Field(10.0, description="Weight of terminal rows in the continuation loss.")
    head_hidden: Count = Field(128, description="Hidden units of the reward and continuation heads.")

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        if self.kind == "vm":
            if self.kwargs:
                raise ValueError(
                    f"model.kwargs: got {self.kwargs} with model.kind=vm, expected {{}}; use model.latent=..."
                )
            return self
        module, colon, name = self.kind.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
            raise ValueError(f"model.kind: got '{self.kind}', expected vm, or module:Class as import names it")
        for key, field in type(self).model_fields.items():
            if key not in ("kind", "kwargs") and getattr(self, key) != field.default:
                raise ValueError(
                    f"model.{key}: got a value with model.kind={self.kind}, which only vm uses; pass arguments of your "
                    "class as model.kwargs"
                )
        return self


class FitConfig(Section):
    """Fitting the world model to the episodes."""

    vision_steps: Count = Field(2000, description="Gradient steps of V a turn, at most.")
    vision_batch: Count = Field(128, description="Frames a batch of V.")
    memory_steps: Count = Field(1500, description="Gradient steps of M a turn, at most.")
    refit: Annotated[float, BeforeValidator(number)] = Field(
        0.5, gt=0, le=1, description="Share of these steps in the turns after the first, which start from its weights."
    )
    batch: Count = Field(32, description="Sequences a batch of M.")
    sequence: int = Field(32, ge=2, description="Rows a sequence.")
    lr: Positive = Field(3e-3, description="Adam's learning rate for M.")
    vision_lr: Positive = Field(1e-3, description="Adam's learning rate for V.")
    held_out: Annotated[float, BeforeValidator(number)] = Field(
        0.1, gt=0, lt=1, description="Share of the episodes kept for evaluating fits."
    )
    patience: Count = Field(5, description="Evaluations without improvement before a fit stops.")
    evaluate_every: Count = Field(100, description="Gradient steps between two evaluations on held-out episodes.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of V's convolutions; auto: bf16 where the hardware is faster in it."
    )
    threads: Natural = Field(0, description="CPU threads of a trainer; 0 takes all cores.")
    num_gpus: NonNegative = Field(0.0, description="GPUs that the trainer actor reserves.")
    labels: Labels = Field({}, description="Ray labels of the nodes that fit.")


class ControllerConfig(Section):
    """The controller (C)."""

    kind: Literal["linear", "mlp"] = Field("linear", description="How scores follow from features.")
    hidden: Count = Field(16, description="Hidden units (mlp).")
    features: Literal["z", "zh", "zhc"] = Field("zh", description="What the controller sees of the model's state.")


class EvolveConfig(Section):
    """Training the controller."""

    learner: Literal["cmaes", "reinforce"] = Field("cmaes", description="The algorithm.")
    where: Literal["dream", "real", "both"] = Field(
        "dream", description="Where it learns; both: in the dream, then in the real environment."
    )
    population: int = Field(32, ge=4, description="Candidates a generation.")
    rollouts: Count = Field(16, description="Dreams a candidate, the same starts for all.")
    generations: Count = Field(30, description="Generations a turn in the dream.")
    sigma: Positive = Field(0.5, description="CMA-ES's first step size.")
    separable: Literal["auto"] | bool = Field(
        "auto", description="Diagonal covariance only; auto: for large controllers."
    )
    real_rollouts: Count = Field(2, description="Real episodes a candidate.")
    real_generations: Count = Field(10, description="Generations a turn in the real environment.")


class DreamConfig(Section):
    """Dreaming."""

    workers: Count = Field(2, description="Dream actors.")
    horizon: Count | None = Field(None, description="Steps of a dream, at most; none: the environment's time limit.")
    temperature: Positive = Field(1.0, description="Of M's mixture: divides the logits, scales sigma by its root.")
    unit: Count = Field(16, description="Controllers evaluated as one batch.")
    threads: Count = Field(1, description="CPU threads of a dream worker.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the dream's matrix products.")
    sampled_ends: bool = Field(True, description="Dreams end by a draw; false: returns weighted by survival.")
    timeout_s: Positive = Field(300.0, description="Seconds after which a dream worker's answer counts as lost.")
    labels: Labels = Field({}, description="Ray labels of the nodes that dream.")


class RSSMConfig(Section):
    """The recurrent state-space model of a Dreamer run. A size names all widths; those given beside it replace its."""

    size: Literal["nano", "1M", "12M", "25M", "50M", "100M", "200M", "400M"] = Field(
        "nano", description="Widths of the official sizes (Nature 2025); nano is for laptops."
    )
    latent: Literal["categorical", "gaussian"] = Field(
        "categorical", description="Stochastic state: Dreamer v2 and v3's, or PlaNet's and Dreamer v1's."
    )
    deter: Count | None = Field(None, description="Size of the deterministic state.")
    stoch: Count | None = Field(None, description="Categorical variables, or Gaussian dimensions.")
    classes: Count | None = Field(None, description="Classes of each variable (categorical).")
    units: Count | None = Field(None, description="Hidden units of encoders, decoders, heads, actor and critic.")
    hidden: Count | None = Field(None, description="Hidden units inside the dynamics.")
    depth: Count | None = Field(None, description="Channels of the first convolution.")
    blocks: Count | None = Field(None, description="Blocks of the recurrent matrix; 1 is a plain GRU.")
    symlog: bool = Field(True, description="Vectors are squashed by symlog, encoded and decoded.")
    bins: int = Field(255, ge=3, description="Of two-hot rewards and values.")
    unimix: Fraction = Field(0.01, description="Share of the uniform distribution in every categorical.")
    free_nats: NonNegative = Field(1.0, description="The KL below which neither side of it costs anything.")
    dyn_scale: NonNegative = Field(1.0, description="Weight of the KL that trains the prior.")
    rep_scale: NonNegative = Field(0.1, description="Weight of the KL that trains the posterior.")
    reward_scale: NonNegative = Field(
        1.0, description="Weight of the reward's loss; more where rewards are rare and all that says what to remember."
    )
    timescale: Annotated[Positive, Field(ge=4)] | None = Field(
        None,
        description="Units of deter start out forgetting within 4 to so many steps, after chrono initialisation; none: "
        "all within 4, as in DreamerV3. For tasks that need a memory, about as long as it must last, or longer.",
    )
    standardise: bool = Field(
        False,
        description="Heads, decoder, actor and critic see deter by its running mean and deviation: for what is "
        "remembered in small differences, with a timescale.",
    )


class DreamerConfig(Section):
    """The Dreamer learner: world model, actor and critic in one update."""

    batch: Count = Field(16, description="Sequences a batch, over all learners.")
    sequence: int = Field(64, ge=2, description="Rows a sequence.")
    context: Natural = Field(
        1,
        description="Rows in front of a sequence that only bring the model into its state: the one that was last known "
        "after them, or else the one they lead to from nothing. 0: every sequence begins from nothing.",
    )
    horizon: Count = Field(15, description="Steps of a dream.")
    dream_last: Natural = Field(
        0,
        description="Rows at each sequence's end that dreams start from and the critic replays, at most; 0: all.",
    )
    discount_horizon: Positive = Field(333.0, description="The discount is 1 - 1 / this.")
    lam: Fraction = Field(0.95, description="Of the lambda-return.")
    entropy: NonNegative = Field(3e-4, description="Weight of the actor's entropy.")
    actor_grad: Literal["reinforce", "dynamics"] = Field(
        "reinforce", description="Dreamer v3's estimator, or v1's through the dynamics (continuous actions)."
    )
    critic_decay: Fraction = Field(0.98, description="Of the slow critic that the critic is held to.")
    replay_value: NonNegative = Field(0.3, description="Weight of the critic's loss on replayed states.")
    return_decay: Fraction = Field(0.99, description="Of the percentiles that returns are normalised by.")
    actor_layers: Count = Field(3, description="Hidden layers of actor and critic.")
    optimiser: Literal["laprop", "adam"] = Field("laprop", description="With adaptive gradient clipping.")
    lr: Positive = Field(4e-5, description="Learning rate of everything; with rssm.size=nano by default 1e-3.")
    warmup: Natural = Field(
        1000, description="Updates over which the learning rate rises to its value; with rssm.size=nano by default 100."
    )
    agc: NonNegative = Field(0.3, description="A tensor's gradient is at most this share of its norm; 0: unbounded.")
    accumulate: Count = Field(1, description="Parts that a batch is worked through in, for models that need memory.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of matrix products; auto: the fastest.")
    compile: bool = Field(
        False,
        description="Compile the small calls between matrix products into few kernels, by torch.compile; it takes half "
        "a minute, and is for GPUs.",
    )
    cuda_graph: bool = Field(
        False, description="Record an update once and replay it as one CUDA graph; for one learner on a GPU."
    )
    learners: Count = Field(1, description="Learner actors, which share each batch.")
    num_gpus: NonNegative = Field(0.0, description="GPUs that a learner actor reserves.")
    threads: Natural = Field(0, description="CPU threads of a learner; 0 takes all cores.")
    labels: Labels = Field({}, description="Ray labels of the nodes that learn.")


class OnlineConfig(Section):
    """Collecting and training at the same time."""

    steps: Count = Field(100_000, description="Real environment steps of the run.")
    prefill: Natural = Field(1000, description="Steps of the first policy before the training begins.")
    train_ratio: Positive = Field(256.0, description="Rows replayed per step collected.")
    unit: Count = Field(32, description="Steps an environment takes between two words with the driver, at most.")
    publish: Count = Field(4, description="Updates between two versions of the weights that collectors get.")
    staleness: Count = Field(64, description="Updates that a collector's weights may be behind before it waits.")
    evaluate_every: Natural = Field(5000, description="Real steps between two evaluations beside; 0: none.")
    evaluate_episodes: Count = Field(10, description="Episodes of such an evaluation.")
    checkpoint_s: Positive = Field(60.0, description="Seconds between two checkpoints.")


class EvaluateConfig(Section):
    """The final measurement, which decides nothing."""

    episodes: Count = Field(100, description="Real episodes.")


class LogConfig(Section):
    """Where metrics go, beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="Write TensorBoard events.")
    console: bool = Field(True, description="Show progress and results.")
    wandb: str | None = Field(None, min_length=1, description="A Weights & Biases project that gets them too.")
    mlflow: str | None = Field(None, min_length=1, description="An MLflow experiment that gets them too.")


class RunConfig(Section):
    """Everything that decides what a run does."""

    algorithm: Literal["vmc", "dreamer"] = Field(
        "vmc", description="V-M-C evolved in dreams turn by turn, or Dreamer online."
    )
    seed: Natural = Field(0, description="The one seed that every random stream derives from.")
    iterations: Count = Field(10, description="Turns of the loop, at most.")
    address: str | None = Field(None, description="Ray cluster to join; without one a private local Ray starts.")
    data: str | None = Field(
        None, min_length=1, description="A run or dataset whose episodes are the data; none is collected (vmc)."
    )
    env: EnvConfig
    budget: BudgetConfig = BudgetConfig()
    target: TargetConfig = TargetConfig()
    collect: CollectConfig = CollectConfig()
    replay: ReplayConfig = ReplayConfig()
    model: ModelConfig = ModelConfig()
    fit: FitConfig = FitConfig()
    controller: ControllerConfig = ControllerConfig()
    evolve: EvolveConfig = EvolveConfig()
    dream: DreamConfig = DreamConfig()
    rssm: RSSMConfig = RSSMConfig()
    dreamer: DreamerConfig = DreamerConfig()
    online: OnlineConfig = OnlineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        # "model:" with nothing below it is None in YAML and means the defaults
        if isinstance(data, dict):
            return {k: {} if v is None and k in SECTIONS else v for k, v in data.items()}
        return data

    @model_validator(mode="before")
    @classmethod
    def _small_model(cls, data: Any) -> Any:
        # which takes larger steps than the paper's
        if isinstance(data, dict) and data.get("algorithm") == "dreamer":
            rssm, dreamer = data.get("rssm") or {}, data.get("dreamer") or {}
            if isinstance(rssm, dict) and isinstance(dreamer, dict) and rssm.get("size", "nano") == "nano":
                return {**data, "dreamer": {"lr": 1e-3, "warmup": 100, **dreamer}}
        return data

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        for section in (s for name, parts in OF.items() if name != self.algorithm for s in parts):
            if getattr(self, section) != type(getattr(self, section))():
                other = next(name for name, parts in OF.items() if section in parts)
                raise ValueError(
                    f"{section}: got values for algorithm={other} with algorithm={self.algorithm}, which does not use "
                    f"them; expected some of {', '.join(OF[self.algorithm])}"
                )
        if self.model.kind != "vm" and self.controller.features != "zh":
            raise ValueError(
                f"controller.features: got '{self.controller.features}' with model.kind={self.model.kind}, whose own "
                "features() says what a controller sees; leave it out"
            )
        if self.data is not None and self.algorithm != "vmc":
            raise ValueError(
                f"data: got '{self.data}' with algorithm={self.algorithm}, expected null; only vmc learns from "
                "episodes that are there"
            )
        if self.data is not None and self.replay.shards != "driver":
            raise ValueError("replay.shards: got 'nodes', expected 'driver' with data, whose episodes are linked there")
        if self.dreamer.dream_last == 1:  # a row and what follows it
            raise ValueError("dreamer.dream_last: got 1, expected 0 for all rows, or at least 2")
        if self.dreamer.cuda_graph and (self.dreamer.num_gpus == 0 or self.dreamer.learners > 1):
            raise ValueError(
                f"dreamer.cuda_graph: got true with dreamer.num_gpus={self.dreamer.num_gpus:g} and "
                f"dreamer.learners={self.dreamer.learners}, expected false, or one learner with a GPU"
            )
        if self.evolve.learner == "reinforce" and self.evolve.where != "dream":
            raise ValueError(
                f"evolve.where: got '{self.evolve.where}', expected 'dream' with evolve.learner=reinforce; "
                "only cmaes evolves in the real environment"
            )
        return self


# Sections that only one algorithm reads: values for the other one are an error.
OF = {"vmc": ("model", "fit", "controller", "evolve", "dream"), "dreamer": ("rssm", "dreamer", "online")}

# What may differ when a run is resumed: where and how far it runs, never what it computes.
RESUMABLE = (
    "iterations",
    "address",
    "collect.workers",
    "collect.timeout_s",
    "collect.stall_s",
    "collect.labels.*",
    "replay.storage",
    "replay.segment_mb",
    "replay.seal_s",
    "replay.capacity_mb",
    "dream.workers",
    "dream.timeout_s",
    "dream.labels.*",
    "fit.labels.*",
    "dreamer.learners",
    "dreamer.threads",
    "dreamer.compile",
    "dreamer.cuda_graph",
    "dreamer.labels.*",
    "online.steps",
    "online.evaluate_every",
    "online.evaluate_episodes",
    "online.checkpoint_s",
    "budget.*",
    "target.*",
    "evaluate.*",
    "log.*",
)


def keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, e.g. 'collect.workers'."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


SECTIONS = sorted({key.partition(".")[0] for key in keys() if "." in key})


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(p.name[:-5] for p in _preset_dir().iterdir() if p.name.endswith(".yaml"))


def load(
    preset_or_file: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """The config of a preset or a YAML file, with ``key=value`` overrides in order, then `values` by dotted key.

    Raises ValueError: unknown preset or key (with the nearest right one), wrong type or value, bad YAML.
    """
    source = str(preset_or_file)
    data = _read(preset_or_file)
    for override in overrides:
        apply_override(data, override)
    for key, value in (values or {}).items():
        _set(data, key, value)
    return parse(data, source)


def load_environment(environment: str, overrides: Sequence[str] = ()) -> RunConfig:
    """As ``load``, where the name of an environment will do: a gymnasium id or "module:EnvClass"."""
    if environment in presets() or environment.endswith((".yaml", ".yml")):
        return load(environment, overrides)
    data: dict[str, Any] = {"env": {"id": environment}}
    for override in overrides:
        apply_override(data, override)
    return parse(data, environment)


def parse(data: dict[str, Any], source: str = "config") -> RunConfig:
    """A RunConfig from nested dicts, errors in one line."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains what is missing
        lines = list(dict.fromkeys(_explain(e, data) for e in found))
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{source}: {lines[0]}{more}") from error


def dumps(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def command(config: RunConfig) -> list[str]:
    """The arguments of `raywm train` that give this config: the nearest preset and what differs from it."""
    wanted, best = leaves(config), []  # type: dict[str, Any], list[str]
    for name in presets():
        there = leaves(load(name))
        if there["algorithm"] != wanted["algorithm"]:
            continue
        values = {k: v for k, v in wanted.items() if v != there[k]}
        given = [name, *(f"{k}={_flow(v)}" for k, v in values.items())]
        if not best or len(given) < len(best):
            best = given
    return best


def leaves(config: RunConfig) -> dict[str, Any]:
    """Every dotted key and its value as YAML has it."""
    data = config.model_dump(mode="json")
    return {key: functools.reduce(lambda part, name: part[name], key.split("."), data) for key in keys()}


def _flow(value: Any) -> str:
    """A value as it stands behind the = of an override."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def save(config: RunConfig, path: str | Path) -> None:
    """Write the resolved config; whoever reads the file finds the old or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(dumps(config))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def diff_for_resume(old: RunConfig, new: RunConfig) -> None:
    """Raise ValueError, naming the key, if `new` changes anything that a resumed run may not change."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k) and not _resumable(k)]
    if changed:
        key = changed[0]
        more = f" (also changed: {', '.join(changed[1:])})" if changed[1:] else ""
        raise ValueError(
            f"{key}: got {_show(after.get(key))}, but the run was started with {_show(before.get(key))}{more}; only "
            f"{', '.join(RESUMABLE)} may change at a resume: restore it, or start a new run in another directory"
        )


def _resumable(key: str) -> bool:
    return any(key == r or (r.endswith(".*") and key.startswith(r[:-1])) for r in RESUMABLE)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted key; empty ones are left out."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _preset_dir() -> Any:
    # beside this file, found through the package's loader: zip-safe, and no import of raywm
    return resources.files(__package__ or "raywm").joinpath("presets")


def _read(preset_or_file: str | Path) -> dict[str, Any]:
    name = str(preset_or_file)
    if isinstance(preset_or_file, Path) or name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(preset_or_file)
        if path.is_dir():
            raise ValueError(f"config {name}: got a directory, expected a YAML file or one of: {', '.join(presets())}")
        try:
            text = path.read_text()
        except FileNotFoundError:
            raise ValueError(f"no config file {name}; give a YAML file or one of: {', '.join(presets())}") from None
        except (UnicodeDecodeError, PermissionError) as error:
            raise ValueError(f"config {name} cannot be read: {error}") from None
    elif name in presets():
        text = _preset_dir().joinpath(f"{name}.yaml").read_text()
    else:
        near = nearest(name, presets())
        hint = f"did you mean '{near}'? " if near else ""
        raise ValueError(f"unknown preset '{name}'; {hint}presets: {', '.join(presets())}; a file ends in .yaml")
    data = read_yaml(text, name)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ValueError(f"{name}: got {_show(data)}, expected a mapping of config keys")
    return data


def read_yaml(text: str, source: str) -> Any:
    """What a YAML text holds: plain data only. Raises ValueError that names `source` and the line."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ValueError(f"{source}: bad YAML{where}: {' '.join(str(problem).split())}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set what ``key=value`` says in nested dicts."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override: got '{override}', expected key=value, e.g. collect.workers=4")
    if not all(key.split(".")):
        raise ValueError(f"override: got '{override}', expected a key like collect.workers")
    _set(data, key, read_yaml(text, f"override '{override}'"))


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        if data.get(part) is None:
            data[part] = {}
        elif not isinstance(data[part], dict):
            raise ValueError(_unknown(key, f"; '{'.'.join(path[: depth + 1])}' is a value, not a section"))
        data = data[part]
    data[last] = value


def nearest(name: str, choices: Sequence[str]) -> str | None:
    """The choice that a mistyped name most likely means, if any."""
    exact_leaf = [c for c in choices if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if exact_leaf:
        return max(exact_leaf, key=lambda c: difflib.SequenceMatcher(None, name, c).ratio())
    if matches:
        return matches[0]
    # a typo of the last part alone: 'workerz' is near 'collect.workers' only by its leaf
    leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], [c.rsplit(".", 1)[-1] for c in choices], n=1)
    return next((c for c in choices if leaf and c.rsplit(".", 1)[-1] == leaf[0]), None)


def _unknown(key: str, note: str = "") -> str:
    near = nearest(key, [*keys(), *RunConfig.model_fields])
    return f"unknown key '{key}'{note}" + (f"; did you mean '{near}'?" if near else "; see config.yaml of any run")


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _field(path: Sequence[str]) -> tuple[list[str], Any]:
    """The config key that an error's location belongs to (union members and indices cut off), and its annotation."""
    annotation: Any = RunConfig
    for i, part in enumerate(path):
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(path[:i]), annotation
        if part not in annotation.model_fields:
            return list(path), None
        annotation = annotation.model_fields[part].annotation
    return list(path), annotation


_EXPECTED = {
    "string_pattern_mismatch": "letters, digits, '-', '_' and '.', beginning and ending with a letter or digit",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


# Keys of several shapes, where the location of an error points inside a list or at one member of a union.
_SHAPES = {
    "env.crop": "[top, bottom, left, right] in pixels, or null",
    "env.resize": "[height, width] in pixels, or null",
    "evolve.separable": "auto, true or false",
}


def _explain(error: Any, data: Any) -> str:
    path, annotation = _field([str(p) for p in error["loc"]])
    key, kind, context, got = ".".join(path), error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return _unknown(key)
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if not key:
        return f"got {_show(got)}, expected a mapping of config keys"
    if key in _SHAPES:
        section, name = path
        return f"{key}: got {_show(data[section][name])}, expected {_SHAPES[key]}"
    if kind == "missing":
        return "env.id is missing; set it, e.g. env.id=CartPole-v1" if path[0] == "env" else f"{key} is missing"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        expected = f"{words} {context[bound]}"
    elif kind == "literal_error":
        expected = f"one of {context['expected']}"
    else:
        expected = _EXPECTED.get(kind, error["msg"])
    if types.NoneType in get_args(annotation):
        expected += ", or null"
    return f"{key}: got {_show(got)}, expected {expected}"
