"""Serving: what is asked is checked, what is answered is what the local agent does, whoever else asks."""

from __future__ import annotations

import asyncio
import base64
import copy
import http.client
import json
import os
import shlex
import signal
import socket
import string
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raywm import config as configs
from raywm import serve, service_http
from raywm import service as service_module
from raywm.bench.serve import as_json, observations, untrained
from raywm.cli import app
from raywm.dream import dream
from raywm.loops.saved import open_run
from raywm.service import Refused, Service
from raywm.spaces import ActionCodec, is_image
from raywm.tokens import StateTokens, WrongModel, restore, saved

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # of Ray

VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
SIZES = {
    "vmc": ["model.hidden=16", "model.head_hidden=16"],
    "dreamer": [
        "algorithm=dreamer",
        "rssm={size: nano, deter: 16, stoch: 4, classes: 4, units: 16, hidden: 16, depth: 2}",
    ],
}


class Plain(gym.Env):
    """Never played: only its spaces are asked for."""

    observation_space: gym.Space = VECTOR
    action_space: gym.Space = gym.spaces.Discrete(3, start=-1)


class Boxed(Plain):
    action_space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))


class Odd(Plain):
    """Columns whose names no class could have, and actions of several choices."""

    observation_space = gym.spaces.Dict({"the/image": IMAGE, "class": VECTOR})
    action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 2]])


class Binary(Plain):
    action_space = gym.spaces.MultiBinary(3)


class Whole(Plain):
    action_space = gym.spaces.Box(-3, 3, (2,), np.int8)


RUNS = [
    ("vmc", Plain),
    ("vmc", Boxed),
    ("vmc", Binary),
    ("dreamer", Plain),
    ("dreamer", Boxed),
    ("dreamer", Odd),
    ("dreamer", Whole),
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(algorithm, environment class): a run directory, made once."""
    torch.set_num_threads(1)
    made = {}

    def get(algorithm, env):
        if (algorithm, env) not in made:
            data = {"env": {"id": f"{__name__}:{env.__name__}"}}
            for override in SIZES[algorithm]:
                configs.apply_override(data, override)
            made[algorithm, env] = untrained(tmp_path_factory.mktemp("runs") / algorithm, configs.parse(data))
        return made[algorithm, env]

    return get


@pytest.fixture(scope="module")
def service_of(run_of):
    made = {}

    def get(algorithm, env=Plain):
        if (algorithm, env) not in made:
            made[algorithm, env] = Service(run_of(algorithm, env), rows=16, horizon=8)
        return made[algorithm, env]

    return get


class Local:
    """A run's agent acting for n rows, on batches padded to `rows`; nothing here is of the service."""

    def __init__(self, run, seeds, rows=16, sample=False):
        saved = open_run(run)
        self.agent, self.n, self.rows = saved.agent(), len(seeds), rows
        if sample:
            self.agent = self.agent.acting(greedy=False)
        self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.rngs += [np.random.default_rng(99) for _ in range(rows - len(seeds))]
        self.state = self.agent.initial(rows)

    def act(self, obs, first=False):
        """obs (n, *) -> actions, rows of the state."""
        full = {k: np.concatenate([v, np.zeros((self.rows - self.n, *v.shape[1:]), v.dtype)]) for k, v in obs.items()}
        is_first = np.broadcast_to(
            np.concatenate([np.broadcast_to(first, self.n), [True] * (self.rows - self.n)]), self.rows
        )
        action, self.state = self.agent.act(full, self.state, np.array(is_first, bool), self.rngs)
        return action[: self.n], {k: v[: self.n].numpy() for k, v in self.state.items()}


def ask(service, body):
    """One request alone."""
    (told,) = service.act([service.read_act(json.dumps(body).encode())])
    if isinstance(told, Refused):
        raise told
    return json.loads(told)


def same(service, told, action, state):
    """An answer is the local agent's, to the last bit."""
    assert np.array_equal(np.array(told["action"], service.codec.dtype), action)
    leaves, _ = service.tokens.decode(told["state"])
    assert leaves.keys() == state.keys()
    for name, leaf in leaves.items():
        assert np.array_equal(leaf, state[name]), name


# ---------------------------------------------------------------------------------------------------- the service


@pytest.mark.parametrize("algorithm, env", RUNS)
@pytest.mark.parametrize("sample", [False, True])
def test_episodes_over_requests_are_those_of_the_local_agent(service_of, algorithm, env, sample):
    service, seeds = service_of(algorithm, env), [5, 6, 7]
    if sample and algorithm == "vmc":
        with pytest.raises(Refused, match="acts without randomness"):
            ask(service, {**service.example(), "sample": True})
        return
    local, rng, told = Local(service.run.path, seeds, sample=sample), np.random.default_rng(0), None
    alone = Local(service.run.path, seeds, rows=3, sample=sample)
    for t in range(6):
        obs = observations(service.columns, rng, 3)
        first = np.array([t == 0, t in (0, 4), t == 0])  # the second row's episode ends after four steps
        body = {"obs": as_json(obs), "sample": sample}
        body |= {"seed": seeds} if t == 0 else {"state": told["state"], "is_first": first.tolist()}
        told = ask(service, body)
        action, state = local.act(obs, first)
        same(service, told, action, state)
        # without the padding the same but for rounding
        other, other_state = alone.act(obs, first)
        assert np.allclose(other, action, atol=1e-5)
        assert all(np.allclose(other_state[k], state[k], atol=1e-5) for k in state)


@pytest.mark.parametrize("algorithm", ["vmc", "dreamer"])
def test_an_answer_does_not_depend_on_what_it_was_batched_with(service_of, algorithm):
    service, rng = service_of(algorithm), np.random.default_rng(1)
    bodies = [{"obs": as_json(observations(service.columns, rng, n)), "seed": list(range(n))} for n in (1, 3, 5, 7)]
    asked = [service.read_act(json.dumps(body).encode()) for body in bodies]
    alone = [service.act([one])[0] for one in asked]
    assert service.act(asked) == alone and service.act(asked[::-1]) == alone[::-1]
    first = json.loads(alone[2])
    again = json.dumps({"obs": bodies[2]["obs"], "state": first["state"]}).encode()
    one = service.read_act(again)
    assert service.act([asked[3], one, asked[1]])[1] == service.act([one])[0]


def test_rows_of_a_request_may_be_of_different_episodes(service_of):
    service = service_of("dreamer")
    obs = as_json(observations(service.columns, np.random.default_rng(2), 2))
    told = ask(service, {"obs": obs, "seed": [1, 2]})
    both = ask(service, {"obs": obs, "state": [told["state"][1], None], "seed": [None, 8]})
    old = ask(service, {"obs": {"vector": obs["vector"][:1]}, "state": told["state"][1:]})
    new = ask(service, {"obs": {"vector": obs["vector"][1:]}, "seed": [8]})
    assert both["state"] == old["state"] + new["state"] and both["action"] == old["action"] + new["action"]
    unseeded = [ask(service, {"obs": {"vector": obs["vector"][:1]}})["state"] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_what_a_row_cannot_bear_is_its_own_request_s_fault(service_of, monkeypatch):
    service = service_of("vmc")
    huge, fine = (service.read_act(json.dumps({**service.example(), "seed": [s]}).encode()) for s in (2, 3))
    expected, real = service.act([fine])[0], service.agent.act

    def overflowing(obs, state, first, rngs):
        action, after = real(obs, state, first, rngs)
        after["h"] = after["h"].clone()
        after["h"][0, 0] = np.inf
        return action, after

    monkeypatch.setattr(service.agent, "act", overflowing)
    bad, good = service.act([huge, fine])
    assert isinstance(bad, Refused) and bad.status == 422 and good == expected


@pytest.mark.parametrize("algorithm, env", RUNS)
def test_imagining_is_the_dream_of_the_model(service_of, algorithm, env, monkeypatch):
    monkeypatch.setattr(service_module, "DECODED_ROWS", 3)  # of 8
    service, codec = service_of(algorithm, env), service_of(algorithm, env).codec
    rng = np.random.default_rng(3)
    start = ask(service, {"obs": as_json(observations(service.columns, rng, 2)), "seed": [1, 2]})["state"]
    action = np.stack([[codec.sample(rng) for _ in range(4)] for _ in range(2)])
    body = {"state": start, "action": action.tolist(), "seed": 9, "temperature": 0.7, "decode": True}
    told = json.loads(service.imagine(service.read_imagine(json.dumps(body).encode())))
    leaves, _ = service.tokens.decode(start)
    state = {k: torch.from_numpy(v.copy()) for k, v in leaves.items() if k != "action"}
    encoded = torch.from_numpy(codec.encode(action))
    model = open_run(service.run.path).agent().model
    with torch.inference_mode():
        expected = dream(model, lambda _, t: encoded[:, t], state, 4, torch.Generator().manual_seed(9), 0.7)
    assert np.array_equal(np.array(told["reward"], np.float32), expected.reward.T)
    assert np.array_equal(np.array(told["cont"], np.float32), expected.cont.T)
    after, _ = service.tokens.decode(told["state"])
    assert all(np.array_equal(after[k], v[-1]) for k, v in expected.states.items())
    assert np.array_equal(after["action"], encoded[:, -1])
    for name, box in service.columns.items():
        shown = told["obs"][name]
        assert np.shape(shown)[:2] == (2, 4)
        if is_image(box):
            raw = np.frombuffer(base64.b64decode(shown[1][3]), np.uint8).reshape(box.shape)
            with torch.inference_mode():
                whole = model.decode({k: v[4, 1:] for k, v in expected.states.items()})[name][0].numpy()
            assert np.abs(raw.astype(int) - whole).max() <= 1
        else:
            assert np.shape(shown) == (2, 4, *box.shape)
    # and from there on
    ask(service, {"obs": as_json(observations(service.columns, rng, 2)), "state": told["state"]})


def test_a_dreamer_s_model_has_its_heads(run_of):
    run = open_run(run_of("dreamer", Plain))
    model = run.agent().model.state_dict()
    learned = {k.removeprefix("model."): v for k, v in run.tensors["learner"].items() if k.startswith("model.")}
    assert any(k.startswith("reward.") for k in model) and all(torch.equal(v, model[k]) for k, v in learned.items())


# ---------------------------------------------------------------------------------------------------- states


def test_tokens_say_whose_they_are(service_of, run_of):
    vmc, dreamer = service_of("vmc"), service_of("dreamer")
    told = ask(vmc, vmc.example())
    with pytest.raises(Refused, match="state of model") as refused:
        ask(dreamer, {**dreamer.example(), "state": told["state"]})
    assert refused.value.status == 409
    assert Service(run_of("vmc", Plain), rows=4).model == vmc.model != Service(run_of("vmc", Boxed)).model


def test_damaged_tokens_are_refused():
    tokens = StateTokens({"h": np.zeros((1, 3), np.float32)}, 7)
    (good,) = tokens.encode({"h": np.ones((1, 3), np.float32)}, saved([np.random.default_rng(0)]))
    assert len(good) == tokens.length and np.array_equal(tokens.decode([good])[0]["h"], np.ones((1, 3)))
    for at in range(len(good)):
        damaged = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
        with pytest.raises(ValueError):
            tokens.decode([damaged])
        with pytest.raises(ValueError):
            tokens.decode([good[:at]])
    (bad,) = tokens.encode({"h": np.full((1, 3), np.nan, np.float32)}, saved([np.random.default_rng(0)]))
    with pytest.raises(ValueError, match="not finite"):
        tokens.decode([bad])
    with pytest.raises(WrongModel):
        StateTokens({"h": np.zeros((1, 3), np.float32)}, 8).decode([good])


def test_generators_go_on_where_they_were():
    rng, other = np.random.default_rng(4), np.random.default_rng(0)
    rng.random(3, np.float32)  # half a word is left over
    restore(other, saved([rng])[0])
    assert np.array_equal(rng.random(5, np.float32), other.random(5, np.float32))
    assert rng.integers(1 << 40) == other.integers(1 << 40)


# ---------------------------------------------------------------------------------------------------- hostile requests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(value, at=()):
    """The path of every value inside a JSON value."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*at, key))


@st.composite
def mutated(draw, bodies):
    """A valid body with some of its parts replaced, removed, doubled or added."""
    body = {"body": copy.deepcopy(draw(st.sampled_from(bodies)))}
    for _ in range(draw(st.integers(1, 3))):
        spots = [at for at in places(body) if at]
        *path, key = draw(st.sampled_from(spots))
        parent = body
        for part in path:
            parent = parent[part]
        how = draw(st.sampled_from(["replace", "remove", "double", "add", "large"]))
        if how == "replace":
            parent[key] = draw(JSON)
        elif how == "large":
            parent[key] = draw(st.sampled_from([1e308, -1e39, 10**30, 2**63, "A" * 5000, [0] * 500, [[]] * 99]))
        elif how == "remove" and path:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, parent[key] if how == "double" else draw(JSON))
        elif path:
            parent[draw(st.sampled_from(["x", "", "obs", "seed"]) | st.text(string.printable, max_size=4))] = draw(JSON)
    return json.dumps(body["body"]).encode()


def valid(service):
    """Valid bodies of /act and of /imagine."""
    rng = np.random.default_rng(0)
    first = {"obs": as_json(observations(service.columns, rng, 2)), "seed": [1, 2]}
    told = ask(service, first)
    state, action = told["state"], [[np.asarray(a).tolist()] * 2 for a in told["action"]]
    acts = [first, {"obs": first["obs"], "state": state, "is_first": [False, True], "seed": [None, 3], "sample": False}]
    dreams = [
        {"state": state, "action": action, "seed": 1},
        {"state": state, "action": action, "seed": 0, "decode": True},
    ]
    return acts, dreams


@pytest.mark.parametrize("algorithm, env", [("vmc", Boxed), ("dreamer", Odd), ("vmc", Binary)])
def test_whatever_is_asked_is_answered_or_refused(service_of, algorithm, env):
    """Fuzzed from valid requests: an answer that is finite, or a refusal that says something; never another error."""
    service = service_of(algorithm, env)
    acts, dreams = valid(service)
    counts = {"answered": 0, "refused": 0}

    def judge(body, read, answer):
        try:
            told = answer(read(body))
            if isinstance(told, Refused):
                raise told
        except Refused as refused:
            assert 400 <= refused.status < 500 and 10 < len(str(refused)) < 800
            counts["refused"] += 1
            return
        counts["answered"] += 1
        json.loads(told, parse_constant=pytest.fail)  # a NaN

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(mutated(acts), mutated(dreams), st.binary(max_size=30))
    def fuzz(act, imagine, anything):
        judge(act, service.read_act, lambda asked: service.act([asked])[0])
        judge(imagine, service.read_imagine, service.imagine)
        judge(anything, service.read_act, lambda asked: service.act([asked])[0])

    fuzz()
    assert counts["answered"] > 5 and counts["refused"] > 200, counts
    # and after all that
    assert ask(service, acts[0]) == ask(service, acts[0])


@pytest.mark.parametrize(
    "change, status, said",
    [
        ({"obs": {}}, 422, "obs.vector: Field required"),
        ({"obs": {"vector": [[0, 0]]}}, 422, "obs.vector.0: got [0, 0]"),
        ({"obs": {"vector": [[0, 0, True]]}}, 422, "obs.vector.0.2: got True"),
        ({"obs": {"vector": [[0, 0, "1"]]}}, 422, "obs.vector.0.2: got '1'"),
        ({"obs": {"vector": [[0, 0, float("nan")]]}}, 422, "finite"),
        ({"obs": {"vector": [[0, 0, 1e39]]}}, 422, "beyond float32"),
        ({"obs": {"vector": []}}, 422, "at least 1"),
        ({"obs": {"vector": [[0, 0, 0]] * 17}}, 422, "at most 16"),
        ({"obs": {"vector": [[0, 0, 0]] * 2}}, 422, "equally many rows"),
        ({"obs": {"vector": [[0, 0, 0]], "image": []}}, 422, "obs.image"),
        ({"more": 1}, 422, "more: got 1"),
        ({"is_first": [False]}, 422, "state.0: got none"),
        ({"seed": [-1]}, 422, "seed.0: got -1"),
        ({"seed": [1.5]}, 422, "seed.0: got 1.5"),
        ({"state": ["AAAA"]}, 422, "state.0: got 3 bytes"),
        ({"state": ["é"]}, 422, "not base64"),
    ],
)
def test_refusals_say_what_is_wrong(service_of, change, status, said):
    service = service_of("vmc")
    with pytest.raises(Refused) as refused:
        ask(service, {**service.example(), **change})
    assert refused.value.status == status and said in str(refused.value), refused.value


def test_limits_hold_the_largest_valid_requests(service_of):
    for algorithm, env in RUNS:
        service = service_of(algorithm, env)
        obs = observations(service.columns, np.random.default_rng(0), 16)
        obs = {k: v if v.dtype == np.uint8 else v.astype(np.float64) * -1.23456789012345e-30 for k, v in obs.items()}
        told = ask(service, {"obs": as_json(obs), "seed": [2**62] * 16})
        body = {
            "obs": as_json(obs),
            "state": told["state"],
            "is_first": [False] * 16,
            "seed": [2**62] * 16,
            "sample": False,
        }
        assert len(json.dumps(body)) < service.act_bytes
        action = np.broadcast_to(service.codec.zero(), (16, 8, *service.codec.shape)).tolist()
        assert len(json.dumps({"state": told["state"], "action": action, "seed": 2**62})) < service.imagine_bytes


def test_the_schema_is_open_api_of_the_spaces(service_of):
    for algorithm, env in RUNS:
        schema = json.loads(json.dumps(service_of(algorithm, env).schema()))
        assert schema["openapi"].startswith("3.") and set(schema["paths"]) == {"/act", "/imagine", "/health", "/schema"}
        assert ActionCodec.from_json(schema["x-raywm"]["action"]).space == env.action_space
        assert "ActRequest" in schema["components"]["schemas"]


# ---------------------------------------------------------------------------------------------------- the front


def call(front, method="POST", path="/act", body=b"", headers=None, chunks=1, kind="http"):
    """One request to the ASGI application: status, JSON."""
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    scope = {"type": kind, "method": method, "path": path}
    scope["headers"] = [(k.encode(), str(v).encode()) for k, v in given.items() if v is not None]
    size = -(-len(body) // chunks) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else await asyncio.Future()

    async def send(message):
        sent.append(message)

    async def talk():
        await asyncio.wait_for(front(scope, receive, send), 20)

    asyncio.run(talk())
    return sent[0]["status"], json.loads(sent[1]["body"] or b"null"), len(messages)


@pytest.fixture
def front_of(service_of):
    return lambda **options: service_http.Front(service_of("vmc"), **options)


def test_the_front_answers_and_refuses(front_of, service_of):
    front, good = front_of(), json.dumps(service_of("vmc").example()).encode()
    status, told, _ = call(front, body=good, chunks=3)
    assert status == 200 and told == ask(service_of("vmc"), json.loads(good))
    assert call(front_of(), "GET", "/health")[1]["model"] == told["model"]
    refused = [
        (({"body": b"{"}), 400),
        (({"body": b"[" * 3000}), 400),
        (({"path": "/nothing"}), 404),
        (({"method": "GET"}), 405),
        (({"method": "DELETE", "path": "/health"}), 405),
        (({"body": good, "headers": {"content-length": None}}), 411),
        (({"body": good, "headers": {"content-length": "-1"}}), 411),
        (({"body": good, "headers": {"content-length": "9" * 30}}), 413),
        (({"body": b"x" * (service_of("vmc").act_bytes + 1), "chunks": 5}), 413),
        (({"body": good, "headers": {"content-type": "text/plain"}}), 415),
        (({"body": good, "headers": {"content-type": None}}), 415),
        (({"body": good, "headers": {"content-encoding": "gzip"}}), 415),
    ]
    for arguments, expected in refused:
        status, told, unread = call(front_of(), **arguments)
        assert status == expected and told["error"], (arguments, status, told)
        if status in (411, 413):
            assert unread  # nothing of it was taken in


def test_a_token_is_asked_for_everywhere(front_of):
    import hashlib

    digest = hashlib.sha256(b"secret-of-sixteen").digest()
    for path, method in (("/act", "POST"), ("/health", "GET"), ("/schema", "GET"), ("/nothing", "GET")):
        for sent in (None, "", "secret-of-sixteen", "Bearer", "Bearer wrong", "Basic secret-of-sixteen", "Bearer é"):
            assert call(front_of(digest=digest), method, path, headers={"authorization": sent})[0] == 401
    assert (
        call(front_of(digest=digest), "GET", "/health", headers={"authorization": "bearer secret-of-sixteen"})[0] == 200
    )


def test_a_body_that_does_not_come_is_given_up(front_of, monkeypatch):
    monkeypatch.setattr(service_http, "BODY_SECONDS", 0.05)
    assert call(front_of(), body=b"", headers={"content-length": "5"})[0] in (400, 408)
    front = front_of()

    async def never():
        await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": "/act"}
    scope["headers"] = [(b"content-type", b"application/json"), (b"content-length", b"5")]
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(front(scope, never, send))
    assert sent[0]["status"] == 408


def test_requests_that_wait_are_batched_and_too_many_are_refused(service_of, monkeypatch):
    service, sizes = service_of("dreamer"), []
    real = service.act

    def slow(asked):
        sizes.append(len(asked))
        assert len({a.sample for a in asked}) == 1
        time.sleep(0.02)
        return real(asked)

    monkeypatch.setattr(service, "act", slow)
    monkeypatch.setattr(service_http, "WAITING", 12)
    rng = np.random.default_rng(5)
    bodies = [
        {"obs": as_json(observations(service.columns, rng, 1 + i % 6)), "seed": [i] * (1 + i % 6), "sample": i > 8}
        for i in range(14)
    ]
    asked = [service.read_act(json.dumps(body).encode()) for body in bodies]

    async def all_at_once():
        batches = service_http.Batches(service)
        return await asyncio.gather(*[batches.act(one) for one in asked], return_exceptions=True)

    told = asyncio.run(all_at_once())
    refused = [t for t in told if isinstance(t, Refused)]
    assert len(refused) == 2 and {r.status for r in refused} == {429}
    assert sum(sizes) == 12 and len(sizes) < 8
    assert all(t == real([a])[0] for t, a in zip(told, asked) if not isinstance(t, Refused))


# ---------------------------------------------------------------------------------------------------- the command line


def test_only_this_machine_without_a_token(run_of, tmp_path, monkeypatch):
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    run, short, free = str(run_of("vmc", Plain)), tmp_path / "token", str(free_port())
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        done = CliRunner().invoke(app, ["serve", run, "--host", host, "--port", free])
        assert done.exit_code == 2 and "there is no token" in done.output and "Traceback" not in done.output
    for token in ("", "short", "two words that are long"):
        with pytest.raises(ValueError, match="expected one word of at least 16"):
            serve.application(run, token=token)
        with pytest.raises(ValueError, match="expected one word"), serve.serving(run, "0.0.0.0", int(free), 1, token):
            pass
    short.write_text("short\n")
    done = CliRunner().invoke(app, ["serve", run, "--token-file", str(short)])
    assert done.exit_code == 2 and "got 5 characters, expected one word of at least 16" in done.output
    done = CliRunner().invoke(app, ["serve", run, "--token-file", str(tmp_path / "none")])
    assert done.exit_code == 2 and "cannot be read" in done.output
    assert (
        serve.is_loopback("127.0.0.5") and serve.is_loopback("::1") and not serve.is_loopback("127.0.0.1.example.org")
    )


def test_a_port_in_use_and_no_run_are_one_line(run_of, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(run_of("vmc", Plain)), "--port", str(port)])
    assert done.exit_code == 2 and f"cannot listen on 127.0.0.1, port {port}" in done.output
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 2 and "no run in" in done.output and len(done.output.splitlines()) == 1


def test_the_command_to_try_can_be_tried(service_of, tmp_path):
    service = service_of("dreamer", Odd)
    assert serve.curl("http://h:1", json.dumps(service.example()), None).startswith("curl http://h:1/act -H ")
    (tmp_path / "a token").write_text("secret-of-sixteen\n")
    # images do not fit on a line; and the shell puts the token in
    command = serve.curl("http://h:1", "x" * 5000, f"$(cat {shlex.quote(str(tmp_path / 'a token'))})")
    told = subprocess.run(f'printf "%s\n" {command}', shell=True, capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[:4] == [
        "curl",
        "http://h:1/schema",
        "-H",
        "Authorization: Bearer secret-of-sixteen",
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------- on Ray Serve


class Client:
    """HTTP with one connection, made anew when it breaks."""

    def __init__(self, url, token=None):
        self.where = url.removeprefix("http://")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connection = None

    def send(self, method, path, body=None, **headers):
        self.connection = self.connection or http.client.HTTPConnection(self.where, timeout=60)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        try:
            self.connection.request(method, path, body, {**self.headers, **kind, **headers})
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise

    def ask(self, body, path="/act"):
        status, told = self.send("POST", path, json.dumps(body))
        assert status == 200, told
        return json.loads(told)


@pytest.fixture(scope="module")
def served(ray_session, run_of):
    run, token = run_of("dreamer", Plain), "a-token-of-the-tests"
    with serve.serving(run, port=free_port(), replicas=2, token=token, rows=16, horizon=8) as url:
        yield url, token


def episode(client, service, seed, steps, sample=False, retry=False):
    """One client's episodes of two rows, every answer compared with the local agent's; the number of tries over one."""
    rng, local, told, again = (
        np.random.default_rng(seed),
        Local(service.run.path, [seed, seed + 1], sample=sample),
        None,
        0,
    )
    for t in range(steps):
        obs = observations(service.columns, rng, 2)
        body = {"obs": as_json(obs), "sample": sample}
        body |= {"seed": [seed, seed + 1]} if t == 0 else {"state": told["state"]}
        while True:
            try:
                status, answer = client.send("POST", "/act", json.dumps(body))
            except (OSError, http.client.HTTPException):
                status, answer = 0, b"no answer"
            if status == 200 or not retry:
                break
            # 408: a body that the killed replica had read is not there for the one that the proxy tries next
            assert status in (0, 408, 500, 503), answer
            again += 1
            time.sleep(0.05)
        assert status == 200, answer
        told = json.loads(answer)
        same(service, told, *local.act(obs, t == 0))
    return again


def at_once(work, count):
    """work(i) in `count` threads; what they returned."""
    found, failed = [], []

    def run(i):
        try:
            found.append(work(i))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def test_served_answers_are_those_of_the_local_agent(served, service_of):
    at_once(lambda i: episode(Client(*served), service_of("dreamer"), 10 * i, 8, sample=i % 2 == 1), 4)


def test_served_dreams_health_and_schema(served, service_of):
    client, service = Client(*served), service_of("dreamer")
    health = json.loads(client.send("GET", "/health")[1])
    assert health["ready"] and health["model"] == service.model and health["env"] == service.run.config.env.id
    assert json.loads(client.send("GET", "/schema")[1]) == json.loads(json.dumps(service.schema()))
    state = client.ask({**service.example(), "seed": [4]})["state"]
    body = {"state": state, "action": [[0, 1, -1]], "seed": 5}
    assert client.ask(body, "/imagine") == json.loads(service.imagine(service.read_imagine(json.dumps(body).encode())))


def raw(url, data, seconds=20.0):
    """Bytes sent as they are; the status of the answer, None if the connection was closed without one."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # the server had heard enough
        try:
            told = connection.recv(65536)
        except ConnectionResetError:
            return None
    return int(told[9:12]) if told else None


def test_hostile_http_gets_4xx_and_nothing_else(served, service_of):
    url, token = served
    service = service_of("dreamer")
    head = (
        f"POST /act HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n".encode()
    )
    requests = {
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,
        b"GET\r\n\r\n": 400,
        b"POST /act HTTP/1.1\r\nContent-Length: -5\r\n\r\n": 400,
        b"POST /act HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n": 400,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n" + b"[" * 0xFFFF: 411,
        head + b"Content-Length: 99999999999\r\n\r\n" + b"[" * 10**6: 413,
        head + b"Content-Length: 100000\r\n\r\n" + b"[" * 100000: 413,
        head + b"Content-Length: 9000\r\n\r\n" + b"[" * 9000: 400,
        head + b"X-Request-Id: \xff\xfe\r\nServe_Multiplexed_Model_Id: \xff\r\nContent-Length: 2\r\n\r\n{}": 422,
        head + b"X-Request-Timeout-Seconds: 0.0001\r\nContent-Length: 2\r\n\r\n{}": 422,
        b"GET /%ff%00/../act HTTP/1.1\r\nHost: x\r\n\r\n": 401,
        head.replace(b"/act", b"/" + b"a" * 5000) + b"Content-Length: 0\r\n\r\n": 404,
        head.replace(b"POST", b"PUT") + b"Content-Length: 0\r\n\r\n": 405,
        head.replace(token.encode(), b"wrong") + b"Content-Length: 0\r\n\r\n": 401,
        b"GET /act HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n": 403,
    }
    for data, expected in requests.items():
        assert raw(url, data) == expected, data[:200]
    client, (acts, dreams) = Client(url, token), valid(service)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(mutated(acts), mutated(dreams))
    def fuzz(act, imagine):
        for path, body in (("/act", act), ("/imagine", imagine)):
            status, told = client.send("POST", path, body)
            assert status == 200 or (400 <= status < 500 and json.loads(told)["error"]), (status, told, body)

    fuzz()
    episode(client, service, 77, 3)


def replicas():
    import ray

    names = ray.util.list_named_actors(all_namespaces=True)
    return [n["name"] for n in names if n["namespace"] == "serve" and n["name"].startswith("SERVE_REPLICA")]


def test_a_replica_killed_under_load_costs_retries_and_no_wrong_answer(served, service_of, ray_session):
    stop = threading.Timer(1.0, lambda: ray_session.kill(ray_session.get_actor(replicas()[0], namespace="serve")))
    before = replicas()
    assert len(before) == 2
    stop.start()
    began, tries = time.monotonic(), []

    def work(i):
        seed = 1000 * i
        while time.monotonic() - began < 4:
            tries.append(episode(Client(*served), service_of("dreamer"), seed, 10, retry=True))
            seed += 2

    at_once(work, 4)
    stop.join()
    assert set(before) - set(replicas()), "none was killed"
    assert len(tries) >= 4


@pytest.mark.slow
def test_vmc_served_and_stopped_as_a_command(run_of, service_of, tmp_path):
    run, port = run_of("vmc", Boxed), free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "raywm.cli", "serve", str(run), "--port", str(port)]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        try:
            line, curl = process.stdout.readline(), process.stdout.readline()
            assert line.startswith(f"http://127.0.0.1:{port} serves {run}") and curl.startswith("try: curl "), line
            service = Service(run)
            tried = subprocess.run(curl.removeprefix("try: "), shell=True, capture_output=True, text=True, timeout=60)
            assert json.loads(tried.stdout) == ask(service, service.example())
            # on a batch of the served size
            client, rng = Client(f"http://127.0.0.1:{port}"), np.random.default_rng(0)
            local, told = Local(run, [1, 2], rows=64), None
            for t in range(20):
                obs = observations(service.columns, rng, 2)
                told = client.ask({"obs": as_json(obs), **({"seed": [1, 2]} if t == 0 else {"state": told["state"]})})
                same(service, told, *local.act(obs, t == 0))
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
            out, err = process.communicate(timeout=90)
            assert (process.returncode, out, err) == (0, "stopping\n", "")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
