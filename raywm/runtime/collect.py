"""`raywm collect`: a dataset directory or URI, opened, filled and checked."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from raywm.agent import Agent, load_agent
from raywm.checkpoint import atomic_write_json
from raywm.config import RunConfig
from raywm.data.dataset import CARD, read_card, write_card
from raywm.data.mirror import Mirror
from raywm.envs import make_env
from raywm.fast import FastCollector
from raywm.log import Console
from raywm.loops.dataset import STREAM, Collection
from raywm.loops.executor import LocalRollouts
from raywm.loops.parts import first_agent, first_policy
from raywm.spaces import ActionCodec, columns_to_json

FIXED = ("env", "spaces", "policy", "seed", "stream", "envs")  # of the card: what decides the episodes


def collect_dataset(
    config: RunConfig,
    out: str,
    *,
    episodes: int | None = None,
    steps: int | None = None,
    policy: str | None = None,
    resume: bool = False,
    fast: bool = False,
    in_process: bool = False,
    made_with: str = "",
    fixes: list[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Collect episodes into the directory or URI `out`; what is there in the end (see `Collection.run`).

    Args:
        config: its env, seed, collect and replay sections count.
        episodes, steps: how much there shall be in all; neither: 100 episodes.
        policy: "random", "sticky", "mixed", a run's directory, "rllib:CHECKPOINT" or "module:AgentClass"; None:
            `config.collect.policy`.
        fast: in the environment's own vectorised form; its episodes are not reproducible one by one.
        made_with: the command, for the card; fixes: gets what to do about errors once something may be kept.
        resume: go on in a dataset that is there; it must be of the same environment, seed and policy.
    Raises ValueError for what does not fit together, before anything is written.
    """
    console = console or Console(config.log.console)
    if episodes is not None and steps is not None:
        raise ValueError(f"got --episodes {episodes} and --steps {steps}, expected one of them")
    if episodes is None and steps is None:
        episodes = 100
    if config.replay.capacity_mb is not None:
        raise ValueError("replay.capacity_mb drops the oldest episodes, which a dataset keeps; leave it out")
    env = make_env(config.env)
    try:
        columns, codec = dict(env.observation_space.spaces), ActionCodec(env.action_space)  # type: ignore[attr-defined]
    finally:
        env.close()
    agent, name, config = _agent(policy, config, columns, codec)
    if fast:
        FastCollector(config.env, config.seed, 1).close()  # it has a native form, or says so here
        console.say("--fast: episodes share one random stream, so they are not reproducible one by one")
    place = _Place(out)
    card = {
        **{"env": config.env.model_dump(mode="json"), "policy": name, "seed": config.seed},
        **{"stream": "fast" if fast else STREAM, "envs": config.collect.envs, "made_with": made_with},
    }
    spaces = {"action": codec.to_json(), "columns": columns_to_json(columns)}
    place.open({**card, "spaces": spaces}, resume)
    if place.uri is not None:
        config = config.model_copy(update={"replay": config.replay.model_copy(update={"storage": place.uri})})
    modules = [module for module in [type(agent).__module__] if module.split(".")[0] not in ("raywm", "__main__")]
    where = columns, codec, in_process, console, place.known, modules
    with _rollouts(config, place.directory, *where) as rollouts:
        place.write(columns, codec, card)
        if fixes is not None:
            fixes.append("what is collected is kept: mend it, and go on with --resume")
        console.say(f"{out}: {config.env.id}, {name}, seed {config.seed}")
        result = Collection(rollouts, agent, episodes=episodes, steps=steps, console=console, fast=fast).run()
    place.count(result["episodes"] + result.get("broken", 0))
    place.finish()
    return {"dataset": out, "env_id": config.env.id, "policy": name, **result}


def _agent(
    policy: str | None, config: RunConfig, columns: dict[str, Any], codec: ActionCodec
) -> tuple[Agent, str, RunConfig]:
    """Who plays, how the card calls them, and the config that says so."""
    policy = policy or config.collect.policy
    if policy in ("random", "sticky", "mixed"):
        config = config.model_copy(update={"collect": config.collect.model_copy(update={"policy": policy})})
        return first_agent(config.collect, codec), first_policy(config.collect), config
    if policy.startswith("rllib:") or Path(policy).is_dir():
        live = load_agent(policy)
        theirs = columns_to_json(live.columns), live.codec.to_json()
        if theirs != (columns_to_json(columns), codec.to_json()):
            raise ValueError(
                f"--policy {policy} acts on {theirs[0]} with {theirs[1]}, but {config.env.id} gives "
                f"{columns_to_json(columns)} and takes {codec.to_json()}; collect with its config.yaml as FILE"
            )
        return live.agent, f"{policy} version {live.agent.version}", config
    module, colon, cls = policy.partition(":")
    if not colon:
        raise ValueError(
            f"--policy {policy!r}: expected random, sticky, mixed, the directory of a run, rllib:CHECKPOINT, or "
            "module:AgentClass"
        )
    try:
        found = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise ValueError(f"--policy {policy!r}: {error}; put its directory on PYTHONPATH") from error
    except AttributeError as error:
        raise ValueError(f"--policy {policy!r}: {error}; give the name of a class in it") from error
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ValueError(f"--policy {policy!r} is {found!r}, expected a subclass of raywm.agent.Agent")
    try:
        return found(codec), policy, config  # type: ignore[call-arg]
    except TypeError as error:
        raise ValueError(f"--policy {policy!r}: {error}; its constructor is called with an ActionCodec") from error


class _Place:
    """Where a dataset is: a directory; or a URI, with a directory that work is done in."""

    def __init__(self, out: str):
        files = pafs.FileSystem.from_uri(out)[0] if "://" in out else None
        self.out = out
        self.known = False  # whether the URI holds this dataset already
        self.uri: str | None = None if files is None or isinstance(files, pafs.LocalFileSystem) else out.rstrip("/")
        if self.uri is not None:
            cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
            self.directory = cache / "raywm" / "collect" / hashlib.sha1(self.uri.encode()).hexdigest()[:16]
        else:
            self.directory = Path(pafs.FileSystem.from_uri(out)[1] if files is not None else out)

    def open(self, card: dict[str, Any], resume: bool) -> None:
        """Hold what is there against what is to come."""
        if self.uri is None and self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"--out {self.out} is a file, expected a directory")
        old = self._card()
        self.known = self.uri is not None and old is not None
        if old is None:
            if self.uri is not None:
                shutil.rmtree(self.directory, ignore_errors=True)  # of a dataset that was there before
            if self.uri is None and self.directory.exists():
                if any(not path.name.startswith(".") for path in self.directory.iterdir()):
                    raise ValueError(f"--out {self.out} is not empty and holds no dataset (no {CARD}); give another")
            return
        if not resume:
            raise ValueError(f"{self.out} already holds a dataset; add to it with --resume, or give another --out")
        for key in FIXED:
            if old.get(key) != card[key]:
                raise ValueError(
                    f"{self.out} was collected with {key} {old.get(key)}, got {card[key]}; restore it, or give another "
                    "--out"
                )

    def _card(self) -> dict[str, Any] | None:
        if self.uri is None:
            return read_card(self.directory)
        mirror = Mirror(self.uri)
        if mirror.files.get_file_info(f"{mirror.path}/{CARD}").type == pafs.FileType.NotFound:
            return None
        with mirror.files.open_input_stream(f"{mirror.path}/{CARD}") as file:
            card: dict[str, Any] = json.loads(file.read())
            return card

    def write(self, columns: dict[str, Any], codec: ActionCodec, card: dict[str, Any]) -> None:
        """The card, before the first episode; at a resume, which command it was."""
        if self._card() is not None:
            if card["made_with"]:
                self._update(made_with=card["made_with"])
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_card(self.directory, columns, codec, **card)
        if self.uri is not None:
            mirror = Mirror(self.uri)
            mirror.files.create_dir(mirror.path, recursive=True)
            with mirror.files.open_output_stream(f"{mirror.path}/{CARD}") as file:
                file.write((self.directory / CARD).read_bytes())

    def count(self, episodes: int) -> None:
        """How many there are, in the card: what is lost from the end of a dataset leaves no gap."""
        self._update(episodes=episodes)

    def _update(self, **changes: Any) -> None:
        card = {**(self._card() or {}), **changes}
        if self.uri is None:
            atomic_write_json(self.directory / CARD, card)
        else:
            mirror = Mirror(self.uri)
            with mirror.files.open_output_stream(f"{mirror.path}/{CARD}") as file:
                file.write(json.dumps(card).encode())

    def finish(self) -> None:
        """Everything is where it belongs."""
        if self.uri is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def _rollouts(
    config: RunConfig,
    directory: Path,
    columns: Any,
    codec: Any,
    in_process: bool,
    console: Console,
    adopt: bool,
    modules: list[str],
) -> Iterator[Any]:
    sections = config.env, config.collect, config.replay, config.seed, directory, columns, codec
    if in_process:
        with contextlib.closing(LocalRollouts(*sections)) as rollouts:
            yield rollouts
        return
    import ray

    from raywm.runtime.cluster import connect, environment_modules
    from raywm.runtime.needs import Need
    from raywm.runtime.rollouts import Rollouts

    started = not ray.is_initialized()
    needs = [Need("collector", "collect.workers", config.collect.workers, labels=config.collect.labels)]
    connect(config.address, needs, modules=[*modules, *environment_modules(config.env.id)], say=console.say)
    try:
        with contextlib.closing(
            Rollouts(
                *sections,
                say=console.say,
                on_death=lambda pool, reason: console.say(f"{pool}: {reason}"),
                adopt=adopt,
            )
        ) as rollouts:
            yield rollouts
    finally:
        if started:
            ray.shutdown()
