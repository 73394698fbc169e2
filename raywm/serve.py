"""A trained run behind Ray Serve: `/act`, `/imagine`, `/health`, `/schema` over HTTP.

Replicas remember nothing: the recurrent state and the random generator of every episode travel with its client
(``raywm.tokens``), so that any replica may answer any request, and a request that is repeated has the same answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from raywm.runtime.cluster import connect
from raywm.runtime.needs import Need
from raywm.service import HORIZON, ROWS, Service
from raywm.service_http import WAITING, Front, Receive, Send

TOKEN_VARIABLE = "RAYWM_SERVE_TOKEN"
TOKEN_LENGTH = 16  # characters, at least
REQUEST_SECONDS = 60.0  # for an answer
START_SECONDS = 120.0
NAME = "raywm"
# Of Serve's own processes. It kills a proxy that is not up within 5 s, which a busy machine may need.
SERVE_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raywm.serve:proxy_middlewares",
}
HEADERS = {b"host", b"authorization", b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"}
QUIET = {"log_level": "ERROR", "enable_access_log": False}


class KnownHeaders:
    """ASGI middleware of Serve's proxy: of a request's headers only those that are needed go in. Serve's own would let
    a client choose timeouts and replicas, and some are an error of the proxy if they are not UTF-8."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k.lower() in HEADERS]}
        await self.app(scope, receive, send)


def proxy_middlewares() -> list[Any]:
    """What Serve's proxy asks for by name (SERVE_ENV)."""
    from starlette.middleware import Middleware

    return [Middleware(KnownHeaders)]


class Replica:
    """One process that serves a run."""

    def __init__(self, run: str, rows: int, horizon: int, digest: bytes | None):
        import torch

        torch.set_num_threads(1)
        self.front = Front(Service(run, rows, horizon), digest)

    def __serve_build_asgi_app__(self) -> Any:
        return self.front


def application(
    run: str | Path, replicas: int = 1, token: str | None = None, rows: int = ROWS, horizon: int = HORIZON
) -> Any:
    """A Ray Serve application of a run, for ``serve.run`` and clusters where Serve runs already.

    Args:
        run: a run directory that every node of the cluster can read.
        token: what clients must send as a bearer token; None: nothing.

    Raises ValueError for a token that is too easily guessed.
    """
    if token is not None:
        check_token(token, "token")
    serve = _serve()
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=2 * WAITING,
        max_queued_requests=1024,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 1},
        logging_config=QUIET,
    )
    digest = None if token is None else hashlib.sha256(token.encode()).digest()
    return deployment.bind(str(Path(run).absolute()), rows, horizon, digest)


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError(f"Ray Serve is not installed ({error}); pip install 'raywm[serve]'") from None
    return serve


@contextlib.contextmanager
def serving(
    run: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    token: str | None = None,
    address: str | None = None,
    rows: int = ROWS,
    horizon: int = HORIZON,
) -> Iterator[str]:
    """Serve a run on Ray (started here, joined at `address`, or the one that is running) as long as the context lasts;
    yields the URL. Raises ValueError: no trained agent, the port in use, no token (or a poor one) where one is
    needed."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets others in, and there is no token; make one (openssl rand -hex 32 > token; chmod 600 "
            f"token) and give --token-file token, or set {TOKEN_VARIABLE}; or leave --host out"
        )
    check_port(host, port)
    app = application(run, replicas, token, rows, horizon)
    ours = not ray.is_initialized()
    connect(address, [Need("replica", count=replicas)])
    try:
        with _started(app, host, port, ours and address is None):
            shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
            _wait_for(url, token)
            yield url
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _started(app: Any, host: str, port: int, alone: bool) -> Iterator[None]:
    serve = _serve()
    if _runs_already():
        raise ValueError(
            "Ray Serve runs on this cluster already; deploy raywm.serve:application there, or stop it: serve shutdown"
        )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = {"host": host, "port": port, "request_timeout_s": REQUEST_SECONDS}
    options = {"runtime_env": {"env_vars": SERVE_ENV}}
    try:
        with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):  # a proxy that was slow is replaced
            serve.start("HeadOnly", http, logging_config=QUIET, controller_options=options)
        try:
            serve.run(app, name=NAME, route_prefix="/", logging_config=QUIET)
        except RuntimeError as error:
            raise ValueError(f"the service could not start: {' '.join(str(error).split())[:500]}") from error
        yield
    finally:
        if alone:  # the rest goes with Ray; Serve's own end makes a raylet complain on standard error
            serve.delete(NAME)
        else:
            serve.shutdown()


def _runs_already() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _wait_for(url: str, token: str | None) -> None:
    """Until the proxy answers, which may be later than the replicas are ready."""
    request = urllib.request.Request(f"{url}/health")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                answer.read()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(f"no answer at {url} within {START_SECONDS:g} s ({error})") from None
        time.sleep(0.1)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """Raises ValueError if nobody can listen there: Serve would try for minutes before it said so."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}); give another --port or --host") from None


def read_token(path: Path | None) -> str | None:
    """The token of a file, else of the environment, else None. Raises ValueError for one that is too easily guessed."""
    where = TOKEN_VARIABLE if path is None else f"--token-file {path}"
    try:
        token = os.environ.get(TOKEN_VARIABLE) if path is None else path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    if token is not None:
        check_token(token, where)
    return token


def check_token(token: str, where: str) -> None:
    """Raises ValueError for a token that is too easily guessed, or that no header can carry."""
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{where}: got {len(token)} characters, expected one word of at least {TOKEN_LENGTH}; e.g. of "
            "openssl rand -hex 32"
        )


def curl(url: str, body: str, token: str | None) -> str:
    """A command that asks the service: to act on `body`, or how to ask where that is too long for a line. `token`: what
    a shell makes the token of."""
    header = "" if token is None else f' -H "Authorization: Bearer {token}"'
    if len(body) > 2000:  # images
        return f"curl {url}/schema{header}"
    return f"curl {url}/act -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"


def main(
    run: Path,
    host: str,
    port: int,
    replicas: int,
    token_file: Path | None,
    address: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    token = read_token(token_file)
    service = Service(run)  # what is wrong with the run is said here, in one line, not by a replica
    body, health = json.dumps(service.example()), service.health()
    del service
    asked: list[int] = []

    def ask(number: int, *_: Any) -> None:
        asked.append(number)
        if len(asked) == 1:  # a second one does not interrupt the stopping
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with serving(run, host, port, replicas, token, address) as url:
            say(f"{url} serves {run}: {health['algorithm']} on {health['env']}, model {health['model']}")
            sent = None if token is None else f"${TOKEN_VARIABLE}"
            if token_file is not None:
                sent = f"$(cat {shlex.quote(str(token_file))})"
            say(f"try: {curl(url, body, sent)}")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
            say("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
