"""``raywm.service`` over HTTP: an ASGI application with its limits, and batches across requests. Knows no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic_core import to_json

from raywm.service import Asked, Refused, Service

BODY_SECONDS = 20.0  # for the whole body of a request to arrive
WAITING = 128  # requests to act, and to imagine, that may wait in a replica

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
log = logging.getLogger(__name__)


class Batches:
    """Requests to act that wait while the agent is busy are then acted on together, in the order they came."""

    def __init__(self, service: Service):
        self.service = service
        self.thread = ThreadPoolExecutor(1, "act")
        self.waiting: deque[tuple[Asked, asyncio.Future[bytes | Refused]]] = deque()
        self.worker: asyncio.Task | None = None

    async def act(self, asked: Asked) -> bytes:
        if len(self.waiting) >= WAITING:
            raise Refused(429, f"{WAITING} requests are waiting; try again, or start more replicas")
        answer: asyncio.Future[bytes | Refused] = asyncio.get_running_loop().create_future()
        self.waiting.append((asked, answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        told = await answer
        if isinstance(told, Refused):
            raise told
        return told

    def _next(self) -> list[tuple[Asked, asyncio.Future[bytes | Refused]]]:
        """The first requests that fit into one batch; a batch is sampled or it is not."""
        batch: list[tuple[Asked, asyncio.Future[bytes | Refused]]] = []
        rows = 0
        while self.waiting:
            asked, answer = self.waiting[0]
            if answer.cancelled():
                self.waiting.popleft()
                continue
            if batch and (rows + len(asked) > self.service.rows or asked.sample != batch[0][0].sample):
                break
            batch.append(self.waiting.popleft())
            rows += len(asked)
        return batch

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            told: list[Any]
            try:
                told = await loop.run_in_executor(self.thread, self.service.act, [asked for asked, _ in batch])
            except Exception as error:
                told = [error] * len(batch)
            for (_, answer), one in zip(batch, told):
                if answer.done():
                    continue
                if isinstance(one, Refused) or not isinstance(one, Exception):
                    answer.set_result(one)
                else:
                    answer.set_exception(one)


class Front:
    """The ASGI application: routes, authorisation, limits; what a Service answers."""

    def __init__(self, service: Service, digest: bytes | None = None):
        self.service, self.digest = service, digest
        self.batches = Batches(service)
        self.dreams = ThreadPoolExecutor(1, "imagine")
        self.dreaming = 0
        self.routes: dict[str, tuple[str, int, Callable[[bytes], Awaitable[bytes]]]] = {
            "/act": ("POST", service.act_bytes, self._act),
            "/imagine": ("POST", service.imagine_bytes, self._imagine),
            "/health": ("GET", 0, self._health),
            "/schema": ("GET", 0, self._schema),
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":  # a websocket; closed before it is accepted it is a 403
            return await send({"type": "websocket.close", "code": 1008})
        try:
            status, body = 200, await self._answer(scope, receive)
        except Refused as error:
            status, body = error.status, to_json({"error": str(error)})
        except ConnectionResetError:
            return  # nobody is there to be told
        except Exception:
            log.exception("a request failed")
            status, body = 500, to_json({"error": "this is a fault of the server, see its log"})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status in (411, 413, 408):
            headers.append((b"connection", b"close"))  # the rest of the body will not be read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: dict[str, Any], receive: Receive) -> bytes:
        headers = {key.lower(): value for key, value in scope["headers"]}
        self._authorise(headers.get(b"authorization", b""))
        if scope["path"] not in self.routes:
            raise Refused(404, f"no {scope['path'][:100]!r} here, expected one of {', '.join(self.routes)}")
        method, most, handler = self.routes[scope["path"]]
        if scope["method"] != method:
            raise Refused(405, f"got {scope['method'][:20]}, expected {method}")
        return await handler(await _body(headers, most, receive) if method == "POST" else b"")

    def _authorise(self, given: bytes) -> None:
        if self.digest is None:
            return
        scheme, _, token = given.partition(b" ")
        # of the digests: a comparison that stops early would say how much of a token is right
        right = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self.digest)
        if not right or scheme.lower() != b"bearer":
            raise Refused(401, "expected the header Authorization: Bearer TOKEN with the token of this server")

    async def _act(self, body: bytes) -> bytes:
        return await self.batches.act(self.service.read_act(body))

    async def _imagine(self, body: bytes) -> bytes:
        asked = self.service.read_imagine(body)
        if self.dreaming >= WAITING:
            raise Refused(429, f"{WAITING} dreams are waiting; try again, or start more replicas")
        self.dreaming += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.dreams, self.service.imagine, asked)
        finally:
            self.dreaming -= 1

    async def _health(self, body: bytes) -> bytes:
        return to_json(self.service.health())

    async def _schema(self, body: bytes) -> bytes:
        return json.dumps(self.service.schema()).encode()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _body(headers: dict[bytes, bytes], most: int, receive: Receive) -> bytes:
    """The body of a request. Nothing of one that says it is too large is read, and one that does not say is refused:
    Serve's proxy would otherwise take in what is still to come."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refused(415, f"content-type: got {kind[:60].decode('latin-1')!r}, expected application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refused(415, "content-encoding: expected none")
    length = headers.get(b"content-length", b"")
    if not length.isdigit():
        raise Refused(411, "content-length: got none, expected the body's length")
    if len(length) > 12 or int(length) > most:
        raise Refused(413, f"body: got {length[:20].decode()} bytes, expected at most {most}")
    try:
        return await asyncio.wait_for(_read(receive), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"body: not there within {BODY_SECONDS:g} s") from None


async def _read(receive: Receive) -> bytes:
    parts = []  # together as long as content-length says: the HTTP parser takes care of that
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
