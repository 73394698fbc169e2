"""A trained run that answers requests: what is asked is checked against its spaces, what is answered depends on that
request alone. Knows neither HTTP nor Ray: ``raywm.serve`` puts it behind Ray Serve.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from pydantic_core import to_json

from raywm import __version__
from raywm.agent import Agent
from raywm.dream import dream
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.loops.saved import open_run
from raywm.service_requests import Refused, act_request, encoded_size, image, imagine_request, validated
from raywm.spaces import ActionCodec, columns_to_json, is_image
from raywm.tokens import GENERATOR, StateTokens, WrongModel, restore, saved

ROWS, HORIZON = 64, 256
NUMBER = 32  # bytes that one JSON number may take, its comma included
DECODED_BYTES = 64 * 2**20  # of the observations that one answer of `imagine` may hold
DECODED_ROWS = 256  # at once: what a decoder needs on its way is many times what it gives


@dataclass
class Asked:
    """A valid request to act: n rows."""

    obs: dict[str, np.ndarray]  # (n, *)
    state: dict[str, np.ndarray]  # (n, *)
    rng: np.ndarray  # (n,) of tokens.GENERATOR
    is_first: np.ndarray  # (n,) bool
    sample: bool

    def __len__(self) -> int:
        return len(self.is_first)


@dataclass
class Imagining:
    """A valid request to imagine: n rows of H actions."""

    state: dict[str, np.ndarray]  # (n, *)
    rng: np.ndarray  # (n,)
    action: np.ndarray  # (n, H, *shape)
    seed: int
    temperature: float
    decode: bool


class Service:
    """The agent of a run directory and its world model.

    Args:
        run: a run directory, V-M-C's or Dreamer's.
        rows: the most rows of a request. Agents always act on a batch of exactly so many rows, the empty ones filled
            with zeros, so that an answer does not depend on what else was asked (another batch shape may round
            differently).
        horizon: the most steps that `imagine` takes.

    Attributes: model (16 hex digits: of the weights and spaces), act_bytes and imagine_bytes (limits of bodies).
    Raises ValueError for a directory without a trained agent.
    """

    def __init__(self, run: str | Path, rows: int = ROWS, horizon: int = HORIZON):
        if rows < 1 or horizon < 1:
            raise ValueError(f"got rows={rows}, horizon={horizon}; expected at least 1 of each")
        self.run = open_run(run)
        self.rows, self.horizon = rows, horizon
        self.agent: Any = self.run.agent()  # of ControllerAgent or DreamerAgent: both have a `model`
        self.codec, self.columns = self.run.codec, self.run.columns
        self.agents: dict[bool, Agent] = {False: self.agent}  # by whether actions are sampled
        if isinstance(self.agent, DreamerAgent):
            self.agents[True] = self.agent.acting(greedy=False)
        self._blank = {k: v.numpy() for k, v in self.agent.initial(1).items()}
        number = fingerprint(self.agent, self.codec, self.columns)
        self.model = f"{number:016x}"
        self.tokens = StateTokens(self._blank, number)
        self._generators = [np.random.default_rng(0) for _ in range(rows)]
        self._act = TypeAdapter(act_request(self.columns, rows, self.tokens.length))
        self._imagine = TypeAdapter(imagine_request(self.codec, rows, horizon, self.tokens.length))
        row = sum(encoded_size(box.shape) if is_image(box) else NUMBER * box.shape[0] for box in self.columns.values())
        self.act_bytes = 4096 + rows * (row + self.tokens.length + 128)
        steps = horizon * (NUMBER * max(1, math.prod(self.codec.shape)))
        self.imagine_bytes = 4096 + rows * (steps + self.tokens.length + 128)

    # ------------------------------------------------------------------------------------------------ act

    def read_act(self, body: bytes) -> Asked:
        """Check a body of `/act`. Raises Refused, which says what was got and what is expected."""
        data = validated(self._act, body)
        lengths = {f"obs.{name}": len(column) for name, column in data["obs"].items()}
        lengths |= {k: len(data[k]) for k in ("state", "is_first", "seed") if data.get(k) is not None}
        rows = next(iter(lengths.values()))
        if set(lengths.values()) != {rows}:
            raise Refused(422, f"got {lengths}, expected equally many rows of each")
        sample = data.get("sample", False)
        if sample not in self.agents:
            raise Refused(422, "sample: got true, but this agent acts without randomness; leave it out")
        obs = {name: self._column(name, box, data["obs"][name]) for name, box in self.columns.items()}
        tokens, seeds = data.get("state") or [None] * rows, data.get("seed") or [None] * rows
        known = [i for i, token in enumerate(tokens) if token is not None]
        first: np.ndarray = np.array([token is None for token in tokens])
        if data.get("is_first") is not None:
            lost = [i for i in range(rows) if first[i] and not data["is_first"][i]]
            if lost:
                raise Refused(422, f"state.{lost[0]}: got none, expected the last one, or is_first true")
            first = np.array(data["is_first"])
        state = {k: np.repeat(v, rows, 0) for k, v in self._blank.items()}
        rng = np.zeros(rows, GENERATOR)
        if known:
            leaves, rng[known] = self._decoded([tokens[i] for i in known])
            for name, leaf in leaves.items():
                state[name][known] = leaf
        fresh = [i for i in range(rows) if seeds[i] is not None or tokens[i] is None]
        rng[fresh] = saved([np.random.default_rng(seeds[i]) for i in fresh])
        return Asked(obs, state, rng, first, sample)

    def act(self, asked: Sequence[Asked]) -> list[bytes | Refused]:
        """Answers to requests of the same `sample`, of `rows` rows at most together, as JSON."""
        sizes = [len(a) for a in asked]
        rows, agent = sum(sizes), self.agents[asked[0].sample]
        if rows > self.rows or len({a.sample for a in asked}) > 1:
            raise ValueError(f"got {rows} rows, expected at most {self.rows}, all sampled or none")
        obs = {name: self._filled([a.obs[name] for a in asked]) for name in self.columns}
        state = {name: torch.from_numpy(self._filled([a.state[name] for a in asked])) for name in self._blank}
        first = np.ones(self.rows, bool)
        first[:rows] = np.concatenate([a.is_first for a in asked])
        for generator, row in zip(self._generators, np.concatenate([a.rng for a in asked])):
            restore(generator, row)
        with np.errstate(all="ignore"):  # rows that are not finite are refused below
            action, after = agent.act(obs, state, first, self._generators)
        leaves = {k: v[:rows].numpy() for k, v in after.items()}
        good = np.ones(rows, bool)
        good &= np.isfinite(np.asarray(action[:rows], np.float64)).reshape(rows, -1).all(1)
        for leaf in leaves.values():
            good &= np.isfinite(leaf).reshape(rows, -1).all(1)
        tokens = self.tokens.encode(leaves, saved(self._generators[:rows]))
        answers: list[bytes | Refused] = []
        at = 0
        for size in sizes:
            part = slice(at, at + size)
            at += size
            if not good[part].all():
                row = int(good[part].argmin())
                answers.append(Refused(422, f"row {row}: its numbers are too large for the model to act on"))
                continue
            told = {"action": action[part].tolist(), "state": tokens[part]}
            answers.append(to_json({**told, "model": self.model, "version": agent.version}))
        return answers

    def _filled(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Parts (n, *) -> (rows, *), the rest zeros."""
        whole = np.zeros((self.rows, *parts[0].shape[1:]), parts[0].dtype)
        np.concatenate(parts, out=whole[: sum(map(len, parts))])
        return whole

    def _column(self, name: str, box: Any, rows: list[Any]) -> np.ndarray:
        if is_image(box):
            return np.stack([image(f"obs.{name}.{i}", text, box.shape) for i, text in enumerate(rows)])
        with np.errstate(over="ignore"):
            column = np.array(rows, np.float64).astype(np.float32)
        if not np.isfinite(column).all():
            raise Refused(422, f"obs.{name}: got a number beyond float32, expected one of float32")
        return column

    def _decoded(self, tokens: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        try:
            return self.tokens.decode(tokens)
        except WrongModel as error:
            raise Refused(409, str(error)) from None
        except ValueError as error:
            raise Refused(422, str(error)) from None

    # ------------------------------------------------------------------------------------------------ imagine

    def read_imagine(self, body: bytes) -> Imagining:
        """Check a body of `/imagine`. Raises Refused."""
        data = validated(self._imagine, body)
        given, rows = data["action"], len(data["state"])
        lengths = {len(row) for row in given}
        if len(given) != rows or len(lengths) != 1:
            raise Refused(
                422,
                f"action: got {len(given)} rows of {sorted(lengths)} steps for {rows} states, expected a row of H each",
            )
        (steps,) = lengths
        size = sum(math.prod(box.shape) * np.dtype(box.dtype).itemsize for box in self.columns.values())
        decode = data.get("decode", False)
        if decode and rows * steps * size > DECODED_BYTES:
            most = DECODED_BYTES // size
            raise Refused(422, f"decode: got {rows} rows x {steps} steps, expected at most {most} observations")
        with np.errstate(over="ignore", invalid="ignore"):
            action = np.array(given, self.codec.dtype).reshape(rows, steps, *self.codec.shape)
        if self.codec.kind == "box":
            space: Any = self.codec.space
            if not ((action >= space.low) & (action <= space.high)).all():
                raise Refused(422, f"action: got one from {action.min()} to {action.max()}, expected {space}")
        state, rng = self._decoded(data["state"])
        return Imagining(state, rng, action, data["seed"], data.get("temperature", 1.0), decode)

    @torch.inference_mode()
    def imagine(self, asked: Imagining) -> bytes:
        """The answer as JSON: `dream` under the given actions. Raises Refused where that leaves the finite numbers."""
        encoded = torch.from_numpy(self.codec.encode(asked.action))  # (B,H,*shape) -> (B,H,A)
        start = {k: torch.from_numpy(v.copy()) for k, v in asked.state.items() if k != "action"}
        rng = torch.Generator().manual_seed(asked.seed)
        steps = encoded.shape[1]
        dreamed = dream(self.agent.model, lambda _, t: encoded[:, t], start, steps, rng, asked.temperature)
        reward, cont = dreamed.reward.T.numpy(), dreamed.cont.T.numpy()  # (H,B) -> (B,H)
        last = {k: v[-1].numpy() for k, v in dreamed.states.items()} | {"action": encoded[:, -1].numpy()}
        if not all(np.isfinite(v).all() for v in (reward, cont, *last.values())):
            raise Refused(422, "state: its numbers are too large for the model to imagine from")
        told = {"reward": reward.tolist(), "cont": cont.tolist(), "state": self.tokens.encode(last, asked.rng)}
        if asked.decode:
            arrived = {k: v[1:].transpose(0, 1).flatten(0, 1) for k, v in dreamed.states.items()}  # (B*H,*)
            rows = {k: v.split(DECODED_ROWS) for k, v in arrived.items()}
            parts = [self.agent.model.decode(dict(zip(rows, part))) for part in zip(*rows.values())]
            decoded = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
            if not all(v.isfinite().all() for v in decoded.values()):
                raise Refused(422, "decode: what the model sees there is not finite; imagine fewer steps")
            told["obs"] = {k: _shown(v.unflatten(0, (-1, steps)).numpy()) for k, v in decoded.items()}
        return to_json({**told, "model": self.model, "version": self.agent.version})

    # ------------------------------------------------------------------------------------------------ about itself

    def health(self) -> dict[str, Any]:
        return {
            "ready": True,
            "run": self.run.path.name,
            "algorithm": self.run.config.algorithm,
            "env": self.run.config.env.id,
            "model": self.model,
            "version": self.agent.version,
            "raywm": __version__,
        }

    def example(self) -> dict[str, Any]:
        """The body of a valid request to act: zeros."""
        obs: dict[str, Any] = {}
        for name, box in self.columns.items():
            zeros = np.zeros((1, *box.shape), box.dtype)
            obs[name] = [_text(zeros)] if is_image(box) else zeros.tolist()
        return {"obs": obs, "seed": [0]}

    def schema(self) -> dict[str, Any]:
        """An OpenAPI document of the service, with the spaces in full under "x-raywm"."""
        requests = {"/act": self._act, "/imagine": self._imagine}
        shapes: dict[str, Any] = {}
        paths: dict[str, Any] = {}
        for path, adapter in requests.items():
            name = path[1:].capitalize() + "Request"
            schema = adapter.json_schema(ref_template="#/components/schemas/{model}")
            shapes |= schema.pop("$defs", {}) | {name: schema}
            reference = {"schema": {"$ref": f"#/components/schemas/{name}"}}
            paths[path] = {"post": {"requestBody": {"required": True, "content": {"application/json": reference}}}}
        for path in ("/health", "/schema"):
            paths[path] = {"get": {}}
        for path, told in ANSWERS.items():
            (operation,) = paths[path].values()
            operation["summary"] = told
            operation["responses"] = {"200": {"description": told}, "4XX": {"description": '{"error": what and why}'}}
        return {
            "openapi": "3.1.0",
            "info": {"title": f"raywm serve {self.run.path.name}", "version": __version__},
            "paths": paths,
            "components": {"schemas": shapes},
            "x-raywm": {
                "model": self.model,
                "observation": columns_to_json(self.columns),
                "action": self.codec.to_json(),
                "samples": True in self.agents,
                "limits": {
                    "rows": self.rows,
                    "horizon": self.horizon,
                    "act_bytes": self.act_bytes,
                    "imagine_bytes": self.imagine_bytes,
                },
            },
        }


ANSWERS = {
    "/act": "action (n, *shape) as the environment takes it; state: n texts to send with the next observations",
    "/imagine": "reward (n, H), cont (n, H) probabilities of going on, state after the last step; obs where decoded",
    "/health": "model, run, version",
    "/schema": "this document",
}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _shown(column: np.ndarray) -> list[Any]:
    """A decoded column (B, H, *) as requests have it: images as base64."""
    if column.dtype == np.uint8:
        return [[_text(frame) for frame in row] for row in column]
    return column.tolist()


def fingerprint(agent: Any, codec: ActionCodec, columns: Mapping[str, Any]) -> int:
    """64 bits of an agent's weights and spaces: states of one agent are nothing to another."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(to_json([type(agent).__name__, codec.to_json(), columns_to_json(columns)]))
    modules = {"model": agent.model, "actor": getattr(agent, "actor", None)}
    for part, module in modules.items():
        for name, tensor in (module.state_dict() if module is not None else {}).items():
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if hasattr(agent, "theta"):
        digest.update(np.ascontiguousarray(agent.theta).tobytes())
    return int.from_bytes(digest.digest(), "little")
