"""`raywm bench replay`: batches of 16 sequences of 64 frames (64x64x3), beside a plain copy and beside RLlib's buffer.

In one run and in turns, from 100,000 frames in episodes of 500:

- gather: numpy copies the frames of such sequences, and nothing else, from one contiguous array into a preallocated
  one, by slices or by `take`, whichever was faster in that turn; that is the floor;
- raywm: `Replay.sample(out=...)` from an EpisodeStore on disk whose pages are in memory: frames, actions, rewards and
  flags; uniform over steps, prioritised (with the update of the priorities), and across the ends of episodes;
- RLlib: `EpisodeReplayBuffer.sample` as its DreamerV3 calls it, from the same episodes;
- through a Ray shard: the same batches by `ShardedReplay`, one after another; and as a training step of 50 ms (a sleep)
  sees them behind a `Prefetch`: how long it waits.

Contenders live in processes of their own, and only one is at work at a time. A ratio is the median of the ratios of each
turn. `--memory` is in ``raywm.bench.memory``.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from gymnasium.spaces import Box, Discrete
from rich.console import Console
from rich.table import Table

from raywm.bench.common import Group, Say, Work, cell, finish, machine, ratio, spread
from raywm.data.episode import Episode
from raywm.data.prefetch import Prefetch
from raywm.data.replay import Replay
from raywm.data.store import EpisodeStore
from raywm.runtime.cluster import connect
from raywm.runtime.shards import ShardedReplay, Shards, place
from raywm.spaces import ActionCodec

B, T = 16, 64
SHAPE, ACTIONS = (64, 64, 3), 6
FRAMES, EPISODE = 100_000, 500
TRAIN_S = 0.05  # a training step
COLUMNS, CODEC = {"image": Box(0, 255, SHAPE, np.uint8)}, ActionCodec(Discrete(ACTIONS))
LAWS: dict[str, dict[str, Any]] = {
    "raywm": {},
    "raywm, prioritised": {"mode": "prioritized"},
    "raywm, cross": {"cross": True},
}
GATHER, RLLIB, SHARD = "gather", "RLlib EpisodeReplayBuffer", "raywm, through a Ray shard"
TARGETS = {f"raywm / {GATHER}": 0.9, f"raywm / {RLLIB}": 2.0}
WAIT_TARGET = 0.1  # of a training step, at most


def episodes(frames: int) -> Iterator[Episode]:
    """Synthetic episodes of `EPISODE` rows, the same at every call; together at least `frames` rows."""
    for number in range(-(-frames // EPISODE)):
        rng = np.random.default_rng(number)
        image = np.frombuffer(rng.bytes(EPISODE * int(np.prod(SHAPE))), np.uint8).reshape(EPISODE, *SHAPE)
        reward = rng.random(EPISODE, np.float32)
        action = rng.integers(ACTIONS, size=EPISODE).astype(CODEC.dtype)
        flags = np.zeros((3, EPISODE), bool)
        reward[0], action[0], flags[0, 0], flags[1:, -1] = 0, CODEC.zero(), True, True
        yield Episode(f"bench-{number:09d}", {"image": image}, action, reward, *flags)


# What each process can measure, in sequences; `directory` holds the store, of `frames` rows.


def gather_works(frames: int) -> dict[str, Work]:
    """Plain copies of frames."""
    whole = np.concatenate([episode.obs["image"] for episode in episodes(frames)])  # (N,H,W,C)
    out, rng, rows = np.empty((B, T, *SHAPE), np.uint8), np.random.default_rng(0), np.arange(T)

    def slices() -> float:
        for b, start in enumerate(rng.integers(len(whole) - T + 1, size=B).tolist()):
            out[b] = whole[start : start + T]
        return float(B)

    def take() -> float:
        start = rng.integers(len(whole) - T + 1, size=(B, 1))
        # mode: with the default one numpy copies into a buffer first, to leave `out` alone after an error
        np.take(whole, start + rows, axis=0, out=out, mode="clip")
        return float(B)

    return {"slices": slices, "take": take}


def raywm_works(directory: str) -> dict[str, Work]:
    """`Replay.sample` under each law."""
    store = EpisodeStore(directory, codec=CODEC, read_only=True)
    for id in store.ids():
        store.parts(id)  # reads every page, for its CRC

    def work_of(law: dict[str, Any]) -> Work:
        replay, rng = Replay(store, CODEC, **law), np.random.default_rng(0)
        batch = replay.sample(B, T, rng)
        priorities = rng.random((64, B))

        def work() -> float:
            nonlocal batch
            batch = replay.sample(B, T, rng, out=batch)
            if batch.keys is not None:
                replay.update(batch.keys, priorities[rng.integers(64)])
            return float(B)

        return work

    return {name: work_of(law) for name, law in LAWS.items()}


def rllib_works(frames: int) -> dict[str, Work]:
    """RLlib's buffer, filled with finished episodes as its EnvRunners hand them over: as numpy arrays."""
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer

    buffer = EpisodeReplayBuffer(capacity=frames + EPISODE, batch_size_B=B, batch_length_T=T)
    for episode in episodes(frames):
        theirs = SingleAgentEpisode(
            id_=episode.id,
            observations=list(episode.obs["image"]),
            actions=list(episode.action[1:]),  # row t's led to observation t
            rewards=episode.reward[1:].tolist(),
            terminated=True,
            len_lookback_buffer=0,
        )
        buffer.add(theirs.to_numpy())

    def work() -> float:
        batch = buffer.sample(batch_size_B=B, batch_length_T=T)
        return float(len(batch["obs"]))

    return {RLLIB: work}


def through_shard(replay: ShardedReplay, seconds: float, rng: np.random.Generator) -> float:
    """Sequences/s, one batch asked for after another."""
    done, began, batch = 0, time.perf_counter(), None
    while (spent := time.perf_counter() - began) < seconds or not done:
        batch = replay.sample(B, T, rng, out=batch)
        done += B
    return done / spent


def waits(replay: ShardedReplay, seconds: float, rng: np.random.Generator) -> list[float]:
    """Seconds that each training step has waited for its batch, once the first batches are there."""
    found: list[float] = []
    with Prefetch(replay, B, T, rng) as batches:
        batches.next()
        time.sleep(5 * TRAIN_S)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(found) < 5:
            before = batches.waited
            batches.next()
            found.append(batches.waited - before)
            time.sleep(TRAIN_S)
    return found


def run(seconds: float = 3.0, turns: int = 7, frames: int = FRAMES, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure everything, each contender for `seconds` in each of `turns` turns."""
    names = [GATHER, *LAWS, RLLIB, SHARD]
    rates: dict[str, list[float]] = {name: [] for name in names}
    gathered: dict[str, list[float]] = {"slices": [], "take": []}
    mean_wait, longest_wait = [], []
    facts = machine("raywm", "ray", "numpy", "pyarrow", "torch")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raywm-bench-")))
        say(f"storing {frames} frames")
        with EpisodeStore(directory, COLUMNS, CODEC) as store:
            for episode in episodes(frames):
                store.add(episode)
            rows = store.rows
        groups = {}
        for who, make, argument in (
            (GATHER, gather_works, frames),
            ("raywm", raywm_works, str(directory)),
            (RLLIB, rllib_works, frames),
        ):
            say(f"starting {who}")
            groups[who] = Group(make, (argument,))
            stack.callback(groups[who].stop)
        say("starting a Ray shard")
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
        connect(None, 1)
        shards = stack.enter_context(contextlib.closing(Shards(directory, COLUMNS, CODEC, place(directory, False))))
        sharded, rng = ShardedReplay(shards), np.random.default_rng(0)
        through_shard(sharded, 0.5, rng)
        for turn in range(turns):
            say(f"turn {turn + 1} of {turns}")
            for way, found in gathered.items():
                found.append(groups[GATHER].measure(way, seconds))
            rates[GATHER].append(max(found[-1] for found in gathered.values()))
            for law in LAWS:
                rates[law].append(groups["raywm"].measure(law, seconds))
            rates[RLLIB].append(groups[RLLIB].measure(RLLIB, seconds))
            rates[SHARD].append(through_shard(sharded, seconds, rng))
            waited = waits(sharded, seconds, rng)
            mean_wait.append(sum(waited) / len(waited))
            longest_wait.append(max(waited))
    return {
        "machine": facts,
        **{"batch": [B, T], "shape": SHAPE, "frames": rows, "episode": EPISODE, "seconds": seconds, "turns": turns},
        "sequences_per_second": {name: spread(values) for name, values in rates.items()},
        "gather": {way: spread(found) for way, found in gathered.items()},
        "ratios": {f"{a} / {b}": ratio(rates[a], rates[b]) for a in (*LAWS, SHARD) for b in (GATHER, RLLIB)},
        "targets": TARGETS,
        "prefetched": {
            "train_step_s": TRAIN_S,
            "wait_s": spread(mean_wait),
            "longest_wait_s": spread(longest_wait),
            "wait_share": spread([wait / TRAIN_S for wait in mean_wait]),
            "target": WAIT_TARGET,
        },
    }


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"Sequences/s, batches of {B} x {T} of {'x'.join(map(str, SHAPE))} from {result['frames']} frames: "
        f"median (min to max) of {result['turns']} turns"
    )
    table.add_column("")
    for column in ("sequences/s", "GB/s of frames", f"x {GATHER}", f"x {RLLIB}"):
        table.add_column(column, justify="right")
    frames = T * float(np.prod(SHAPE)) / 1e9
    for name, value in result["sequences_per_second"].items():
        ratios = [result["ratios"].get(f"{name} / {other}") for other in (GATHER, RLLIB)]
        cells = [cell(r, digits=2) if r else "" for r in ratios]
        table.add_row(name, cell(value, digits=0), f"{value['median'] * frames:.2f}", *cells)
    console.print(table)
    for pair, least in result["targets"].items():
        console.print(f"{pair}: {result['ratios'][pair]['median']:.2f}, wanted {least:g}")
    wait = result["prefetched"]
    console.print(
        f"through a Ray shard with prefetch, a training step of {1e3 * wait['train_step_s']:.0f} ms waits "
        f"{cell(wait['wait_s'], 1e-3, 2)} ms for its batch: {100 * wait['wait_share']['median']:.1f}% of it, wanted "
        f"below {100 * wait['target']:.0f}%; the longest wait {cell(wait['longest_wait_s'], 1e-3, 1)} ms"
    )


def main(seconds: float = 3.0, turns: int = 7, as_json: bool = False, out: str | Path | None = None) -> None:
    """Measure and print a table, or JSON to standard output; `out` receives the JSON as well."""
    finish(lambda say: run(seconds, turns, say=say), _show, as_json, out)
