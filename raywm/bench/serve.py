"""`raywm bench serve`: decisions per second over HTTP, every answer checked.

16 concurrent clients play episodes of random observations against one replica of ``raywm.serve`` on a private Ray, all
on this machine: 16 observations a request, then one. In the same run and in turns:

- local: the agent's `act` alone in one process, for batches of as many observations: what there is to compute;
- echo: Ray Serve answering with as many bytes, which it was given at its start, after reading the request: what HTTP
  and Ray cost.

Agents have the sizes of a preset and their first weights: speed does not depend on what was learned. Clients send the
states of the answer before; afterwards a local agent acts on the same observations, on batches padded as the service
pads them, and each action and each state must be the same to the last bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pydantic_core import from_json, to_json
from rich.console import Console
from rich.table import Table

from raywm import checkpoint
from raywm import config as configs
from raywm.bench.common import Group, Say, Work, cell, finish, machine, ratio, spread
from raywm.config import RunConfig
from raywm.runtime.cluster import connect
from raywm.serve import QUIET, serving
from raywm.service import Service
from raywm.spaces import is_image
from raywm.tokens import saved

PRESETS = ("cartpole", "dreamer-cartpole")
CLIENTS, MANY = 16, 16
EPISODE = 50  # requests after which a client's episodes begin anew
PORT = 8123
RAYWM, ECHO, LOCAL = WHO = ("raywm", "bare Serve echo", "local agent")
TARGET = 2000.0  # decisions/s at MANY observations a request


def untrained(out: str | Path, config: RunConfig) -> Path:
    """A run directory as training leaves it, of a model and a policy that have learned nothing yet."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if config.algorithm == "dreamer":
        from raywm.learners.dreamer import DreamerLearner
        from raywm.loops.online_work import OnlineParts

        online = OnlineParts(config)
        learner = DreamerLearner(online.spec, config.seed)
        spaces, tensors, arrays = online.spaces(), {"learner": learner.tensors(), "policy": learner.policy()}, {}
    else:
        from raywm.loops.parts import Parts

        parts = Parts(config)
        theta = np.random.default_rng(config.seed).normal(size=parts.controller.size)
        spaces, tensors = parts.spaces(), {"model": parts.weights, "starts": {"z": torch.zeros(1, 1)}}
        arrays = {"controller": {"theta": theta, "best": theta}}
    configs.save(config, out / "config.yaml")
    checkpoint.atomic_write_json(out / "spaces.json", spaces)
    checkpoint.save(out / "checkpoints", 1, tensors=tensors, arrays=arrays, state={})
    return out


def observations(columns: dict[str, Any], rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """n random observations."""
    return {
        name: rng.integers(0, 256, (n, *box.shape), np.uint8)
        if is_image(box)
        else rng.standard_normal((n, *box.shape), np.float32)
        for name, box in columns.items()
    }


def as_json(obs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Observations as a request has them."""
    return {
        name: [b64encode(row).decode() for row in column] if column.dtype == np.uint8 else column.tolist()
        for name, column in obs.items()
    }


@dataclass
class Client:
    """One client's requests, made beforehand, and the answers it got."""

    number: int
    bodies: list[bytes]  # of an episode, as JSON without its closing brace: the state is what an answer gave
    answers: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds

    async def play(self, path: bytes, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        state = b""
        while time.perf_counter() < until:
            at = len(self.answers) % len(self.bodies)
            state = b"" if at == 0 else state
            began = time.perf_counter()
            status, answer = await post(reader, writer, path, self.bodies[at] + state + b"}")
            self.times.append(time.perf_counter() - began)
            if status != 200:
                raise RuntimeError(f"got {status}: {answer[:300]!r}")
            self.answers.append(answer)
            # cut out as text: reading JSON would take from the cores what is measured
            begin = answer.find(b'"state":')
            state = b"," + answer[begin : answer.find(b"]", begin) + 1] if begin >= 0 else b""
        writer.close()


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: bytes, body: bytes
) -> tuple[int, bytes]:
    """One request over an open connection: the status and the body of its answer."""
    head = b"POST %b HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % (path, len(body)) + body)
    told = await reader.readuntil(b"\r\n\r\n")
    begin = told.lower().index(b"content-length:") + 15
    return int(told[9:12]), await reader.readexactly(int(told[begin : told.index(b"\r", begin)]))


def clients_of(columns: dict[str, Any], rows: int) -> list[Client]:
    """The clients, each with an episode of requests for `rows` rows."""
    clients = []
    for number in range(CLIENTS):
        rng, bodies = np.random.default_rng(number), []
        for t in range(EPISODE):
            body: dict[str, Any] = {"obs": as_json(observations(columns, rng, rows))}
            if t == 0:
                body["seed"] = [1000 * number + row for row in range(rows)]
            bodies.append(to_json(body)[:-1])
        clients.append(Client(number, bodies))
    return clients


@dataclass
class Load:
    """What a while under load gave: decisions/s, and quantiles of the seconds that a request took."""

    rate: float
    p50: float = 0.0
    p99: float = 0.0


def load(clients: list[Client], rows: int, seconds: float, path: str = "/act") -> Load:
    """All clients at once for `seconds`."""
    for client in clients:
        client.answers, client.times = [], []

    async def play() -> float:
        began = time.perf_counter()
        await asyncio.gather(*[client.play(path.encode(), began + seconds) for client in clients])
        return time.perf_counter() - began

    spent = asyncio.run(play())
    times = [t for client in clients for t in client.times]
    return Load(rows * len(times) / spent, *np.quantile(times, (0.5, 0.99)).tolist())


def wrong(service: Service, clients: list[Client], rows: int) -> int:
    """How many of the clients' answers are not those of the local agent, to the last bit of the state."""
    bad = 0
    for client in clients:
        expected = local_answers(service, client, rows)
        for at, answer in enumerate(client.answers):
            told = from_json(answer)
            action, tokens = expected[at % EPISODE]
            bad += told["action"] != action or told["state"] != tokens
    return bad


def local_answers(service: Service, client: Client, rows: int) -> list[tuple[Any, list[str]]]:
    """What the run's agent does in a client's episode, without anything of the service but its way to write states."""
    agent = service.run.agent()
    rngs = [np.random.default_rng(1000 * client.number + row) for row in range(rows)]
    rngs += [np.random.default_rng(0) for _ in range(service.rows - rows)]
    source, state, answers = np.random.default_rng(client.number), agent.initial(service.rows), []
    for t in range(min(EPISODE, len(client.answers))):
        obs = {}
        for name, column in observations(service.columns, source, rows).items():
            obs[name] = np.zeros((service.rows, *column.shape[1:]), column.dtype)
            obs[name][:rows] = column
        first = np.full(service.rows, t == 0)
        action, state = agent.act(obs, state, first, rngs)
        leaves = {k: v[:rows].numpy() for k, v in state.items()}
        answers.append((action[:rows].tolist(), service.tokens.encode(leaves, saved(rngs[:rows]))))
    return answers


def local_works(run: str) -> dict[str, Work]:
    """The agent alone, in its own process."""
    torch.set_num_threads(1)
    service = Service(run)
    agent, rng = service.run.agent(), np.random.default_rng(0)

    def work_of(rows: int) -> Work:
        obs, rngs = observations(service.columns, rng, rows), [np.random.default_rng(i) for i in range(rows)]
        state = agent.initial(rows)
        first = np.ones(rows, bool)

        def work() -> float:
            nonlocal state, first
            _, state = agent.act(obs, state, first, rngs)
            first = np.zeros(rows, bool)
            return float(rows)

        return work

    return {str(rows): work_of(rows) for rows in (MANY, 1)}


class Echo:
    """Reads a request and answers with what it was given for its path."""

    def __init__(self, answers: dict[str, bytes]):
        self.answers = answers

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        await request.body()
        return Response(self.answers[request.url.path], media_type="application/json")


@contextlib.contextmanager
def contenders(run: Path, clients: dict[int, list[Client]], checked: Callable[[int], None]) -> Iterator[dict[int, str]]:
    """raywm and the echo behind one Ray Serve; yields the echo's path by rows a request."""
    from ray import serve

    with serving(run, port=PORT):
        paths = {}
        for rows, these in clients.items():
            load(these, rows, 1.0)
            checked(rows)
            paths[rows] = f"/echo/{rows}", these[0].answers[-1]
        build: Any = serve.deployment(Echo)
        deployment = build.options(max_ongoing_requests=256, logging_config=QUIET)
        serve.run(deployment.bind(dict(paths.values())), name="echo", route_prefix="/echo", logging_config=QUIET)
        for rows, these in clients.items():
            load(these, rows, 1.0, paths[rows][0])
        yield {rows: path for rows, (path, _) in paths.items()}


def measure(preset: str, seconds: float, turns: int, say: Say) -> dict[str, Any]:
    """One preset's agent: rates, latencies, ratios, by rows a request."""
    seen: dict[int, dict[str, list[Load]]] = {rows: {who: [] for who in WHO} for rows in (MANY, 1)}
    counts = dict.fromkeys(seen, 0)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="raywm-bench-"))
        say(f"{preset}: starting")
        run = untrained(Path(directory) / preset, configs.load(preset))
        service = Service(run)
        local = Group(local_works, (str(run),))
        stack.callback(local.stop)
        clients = {rows: clients_of(service.columns, rows) for rows in seen}

        def check(rows: int) -> None:
            counts[rows] += sum(len(client.answers) for client in clients[rows])
            if bad := wrong(service, clients[rows], rows):
                raise RuntimeError(f"{bad} answers of {preset} are not those of the local agent")

        echo = stack.enter_context(contenders(run, clients, check))
        for turn in range(turns):
            say(f"{preset}: turn {turn + 1} of {turns}")
            for rows, found in seen.items():
                found[RAYWM].append(load(clients[rows], rows, seconds))
                check(rows)
                found[ECHO].append(load(clients[rows], rows, seconds, echo[rows]))
                found[LOCAL].append(Load(local.measure(str(rows), seconds)))
    return {str(rows): _told(found, counts[rows]) for rows, found in seen.items()}


def _told(found: dict[str, list[Load]], count: int) -> dict[str, Any]:
    rates = {who: [one.rate for one in many] for who, many in found.items()}
    http = {who: {q: spread([getattr(one, q) for one in found[who]]) for q in ("p50", "p99")} for who in (RAYWM, ECHO)}
    return {
        "decisions_per_second": {who: spread(values) for who, values in rates.items()},
        "ratios": {f"{RAYWM} / {who}": ratio(rates[RAYWM], rates[who]) for who in (LOCAL, ECHO)},
        "seconds_a_request": http,
        "answers_checked": count,
    }


def run(presets: Sequence[str], seconds: float = 5.0, turns: int = 5, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure agents of the sizes of `presets`, each contender for `seconds` in each of `turns` turns."""
    facts = machine("raywm", "ray", "torch", "uvicorn", "uvloop")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
        connect(None, 2)
        found = {preset: measure(preset, seconds, turns, say) for preset in presets}
    return {
        "benchmark": "serve",
        "machine": facts,
        "seconds": seconds,
        "turns": turns,
        "clients": CLIENTS,
        "target": TARGET,
        "presets": found,
    }


def _show(result: dict[str, Any], console: Console) -> None:
    for preset, kinds in result["presets"].items():
        table = Table(title=f"{preset}: {result['clients']} clients: median (min to max) of {result['turns']} turns")
        table.add_column("")
        for column in ("decisions/s", "raywm / this", "p50 ms", "p99 ms"):
            table.add_column(column, justify="right")
        for rows, found in kinds.items():
            for who, rate in found["decisions_per_second"].items():
                times = found["seconds_a_request"].get(who)
                against = found["ratios"].get(f"{RAYWM} / {who}")
                table.add_row(
                    f"{who}, {rows} a request",
                    cell(rate, digits=0),
                    cell(against, digits=3) if against else "",
                    *([cell(times[q], 1e-3) for q in ("p50", "p99")] if times else ["", ""]),
                )
        console.print(table)
        checked = sum(found["answers_checked"] for found in kinds.values())
        many = kinds[str(MANY)]["decisions_per_second"][RAYWM]["median"]
        console.print(
            f"{checked:,} answers, each that of the local agent to the last bit; {many:,.0f} decisions/s at {MANY} "
            f"observations a request, wanted {result['target']:,.0f}"
        )


def main(
    presets: Sequence[str] | None = None,
    seconds: float = 5.0,
    turns: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Measure and print a table, or JSON to standard output; `out` receives the JSON as well."""
    finish(lambda say: run(presets or PRESETS, seconds, turns, say), _show, as_json, out)
