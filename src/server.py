"""The web server of explore.py: for this machine alone, and for those who know its address.

The address holds a secret token. Requests that name another host, or that the page of another
origin sends, are refused, so that no web site that is open in a browser can reach the server.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Iterator
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from src.files import parse_json

HOST = "127.0.0.1"
MAX_BODY = 65536  # bytes of a request
TOKEN_BYTES = 24
SAFE_HEADERS = {
    # The policy in the page cannot say that no other page may hold it in a frame.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address is a secret
    "Cache-Control": "no-store",
}


class Answers(Protocol):
    """What the server asks: src/explorer.py. ValueError is an error of the request;
    one with `busy` set says that the same request may succeed later."""

    def page(self, index: int) -> str: ...

    def read(self, text: Any) -> dict[str, Any]: ...

    def steer(self, index: Any, text: Any, operations: Any) -> Iterator[dict[str, Any]]: ...


class Guard:
    """Lets only those requests through that a page of this server makes."""

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        problem = self._problem(scope["path"], scope["method"], Headers(scope=scope))
        if problem:
            refusal = JSONResponse({"error": problem}, 403, SAFE_HEADERS)
            await refusal(scope, receive, send)
        else:
            path = "/" + scope["path"].split("/", 2)[2]
            await self.app(scope | {"path": path, "raw_path": path.encode()}, receive, send)

    def _problem(self, path: str, method: str, headers: Headers) -> str:
        """Return why a request is refused, or ''."""
        if headers.get("host", "") not in self.hosts:
            return "another host is named; open the address that explore.py printed"
        if headers.get("origin", min(self.origins)) not in self.origins:
            return "the page of another origin asks"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "another site asks"
        parts = path.split("/", 2)
        if len(parts) < 3 or not hmac.compare_digest(parts[1].encode(), self.token.encode()):
            return "the address has a wrong token; open the one that explore.py printed"
        is_json = headers.get("content-type", "").split(";")[0] == "application/json"
        if method == "POST" and not is_json:
            return "a request is JSON"
        return ""


async def _body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request. Raises ValueError if it is none, or too large."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:
            raise ValueError(f"a request has at most {MAX_BODY} bytes")
    try:
        body = parse_json(content.decode("utf-8", "replace"))
    except ValueError as error:
        raise ValueError(f"a request is JSON ({error})") from None
    if not isinstance(body, dict):
        raise ValueError("a request is a JSON object")
    return body


def _error(error: ValueError) -> dict[str, Any]:
    return {"error": str(error), "busy": getattr(error, "busy", False)}


def _refusal(error: ValueError) -> Response:
    content = _error(error)
    return JSONResponse(content, 503 if content["busy"] else 400, SAFE_HEADERS)


def _lines(steps: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Yield each step as one line of JSON; an error is the last line."""
    try:
        for step in steps:
            yield json.dumps(step) + "\n"
    except ValueError as error:
        yield json.dumps(_error(error)) + "\n"


def application(answers: Answers, token: str, port: int) -> Guard:
    """Return the ASGI application at http://127.0.0.1:port/token/."""

    async def page(request: Request) -> Response:
        index = request.query_params.get("sae", "0")
        try:
            number = int(index) if index.isascii() and index.isdecimal() else -1
            text = await run_in_threadpool(answers.page, number)
        except ValueError as error:
            return _refusal(error)
        return HTMLResponse(text, headers=SAFE_HEADERS)

    async def read(request: Request) -> Response:
        try:
            body = await _body(request)
            answer = await run_in_threadpool(answers.read, body.get("text"))
        except ValueError as error:
            return _refusal(error)
        return JSONResponse(answer, headers=SAFE_HEADERS)

    async def steer(request: Request) -> Response:
        try:
            body = await _body(request)
        except ValueError as error:
            return _refusal(error)
        steps = answers.steer(body.get("sae"), body.get("text"), body.get("edits"))
        return StreamingResponse(_lines(steps), 200, SAFE_HEADERS, "application/x-ndjson")

    routes = [
        Route("/", page),
        Route("/read", read, methods=["POST"]),
        Route("/steer", steer, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token, port)


def listening(port: int) -> socket.socket:
    """Return a socket of this machine alone; port 0 takes a free one."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--port {port} cannot be used ({error.strerror}); leave it out, or name another"
        ) from None
    return listener


def server(answers: Answers, listener: socket.socket) -> tuple[uvicorn.Server, str]:
    """Return (a server that can be run, its address)."""
    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(TOKEN_BYTES)
    config = uvicorn.Config(
        application(answers, token, port),
        log_level="warning",
        access_log=False,  # it would hold the token
        server_header=False,
    )
    return uvicorn.Server(config), f"http://{HOST}:{port}/{token}/"


def serve(answers: Answers, listener: socket.socket) -> None:
    """Print the address and serve until Ctrl-C."""
    with listener:
        runner, address = server(answers, listener)
        print(f"open {address} (Ctrl-C ends it)", flush=True)
        runner.run([listener])
