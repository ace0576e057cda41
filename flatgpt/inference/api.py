"""OpenAI's completion API over HTTP, for app.py: POST /v1/completions, GET /v1/models; and the checks of clients.

Clients that are not browsers, such as curl, the openai package and lm-evaluation-harness's local-completions, use it
beside the page, with the page's queue and limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from config import AppConfig, InferConfig, UserError
from flatgpt.inference.completions import Completion, body_limit, parse_request
from flatgpt.inference.model_queue import ModelQueue, Place
from flatgpt.inference.sampling import NonFiniteLogitsError
from flatgpt.inference.writer import Writer
from flatgpt.runtime.device import note

KEY_VARIABLE = "FLATGPT_API_KEY"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class RefusedError(UserError):
    """A request that is refused for its client, size or path.

    Attributes:
        status: the status of the answer.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def error_body(error: UserError) -> tuple[dict, int]:
    """Return an error in OpenAI's format, and its HTTP status."""
    status, message = getattr(error, "status", 400), str(error).replace("--", "")
    if isinstance(error, NonFiniteLogitsError):
        note(f"error: {error}")  # it names the model's folder
        status, message = 500, "the model's logits are NaN or infinite"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "invalid_api_key" if status == 401 else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}, status


def read_key(config: AppConfig) -> str | None:
    """Return the key that clients of the API must send; None: none.

    Raises:
        UserError: it is empty, or has characters that a header cannot contain.
    """
    name, key = "api_key", config.api_key
    if key is None:
        name, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        problem = "is empty" if not key else "has blanks, or characters that are not printable ASCII"
        raise UserError(f"{name}: the key {problem}; give another one, or leave it out")
    return key


class CompletionAPI:
    """Answers requests below /v1.

    Args:
        name: the model's, in answers. A request may name any model.
        make_writer: returns a Writer for the settings of a request.
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
    """

    def __init__(
        self,
        config: AppConfig,
        queue: ModelQueue,
        make_writer: Callable[[InferConfig], Writer],
        name: str,
        key: str | None,
    ):
        self._config, self._queue, self._make_writer, self._key = config, queue, make_writer, key
        self._model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "flatgpt"}

    def arguments(self) -> dict:
        """Return arguments of the application that serves the page: the routes below /v1, and the check of names.

        A Space has the routes only if it has a key: it is public.
        """
        route = Route("/v1/{path:path}", self._respond, methods=METHODS)
        served, names = self._key is not None or not os.environ.get("SPACE_ID"), server_names(self._config)
        if names - {"localhost", "127.0.0.1"}:
            known = "any name" if "*" in names else ", ".join(["any IP address", *sorted(names)])
            note(f"requests are accepted that are sent to {known}; for other names: --allowed_hosts NAME")
        return {"routes": [route] * served, "middleware": [Middleware(HostCheck, names=names)]}

    async def _respond(self, request: Request) -> Response:
        try:
            self._check_client(request)
            path = request.path_params["path"].rstrip("/")
            if (request.method, path) == ("POST", "completions"):
                return await self._complete(request)
            if (request.method, path) == ("GET", "models"):
                return JSONResponse({"object": "list", "data": [self._model]})
            if (request.method, path) == ("GET", f"models/{self._model['id']}"):
                return JSONResponse(self._model)
            served = "served are POST /v1/completions and GET /v1/models"
            raise RefusedError(404, f"{request.method} /v1/{path[:100]}: not found; {served}")
        except UserError as error:
            body, status = error_body(error)
            return JSONResponse(body, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
        except ClientDisconnect:
            return Response(status_code=499)

    def _check_client(self, request: Request) -> None:
        """Refuse pages of other sites, whose browser would send what its user may send, and clients without the key."""
        headers = request.headers
        origins = (None, *(f"{scheme}://{headers.get('host')}" for scheme in ("http", "https")))
        if headers.get("origin") not in origins or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RefusedError(403, "requests of other sites' pages are not answered")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._key is not None:
            same = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not same:
                raise RefusedError(401, "the API key is wrong or missing: send the header Authorization: Bearer KEY")

    async def _complete(self, request: Request) -> Response:
        body, limit = b"", body_limit(self._config)
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise RefusedError(413, f"the body is larger than {limit:,} bytes")
        prepare = lambda: Completion(parse_request(body, self._config), self._make_writer)  # noqa: E731
        completion = await asyncio.to_thread(prepare)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = self._model["id"]
        updates = self._queue.stream(completion.steps)
        await anext(updates)  # its place, or an error that a stream could not report as a status
        if completion.request.stream:
            events = stream_events(request, completion, head, updates)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices: list[dict] = []
        async with contextlib.aclosing(updates):
            async for update in updates:
                if await request.is_disconnected():
                    raise ClientDisconnect
                choices = choices if isinstance(update, Place) else update
        return JSONResponse({**head, "choices": choices, "usage": completion.usage()})


async def stream_events(
    request: Request, completion: Completion, head: dict, updates: AsyncIterator
) -> AsyncIterator[str]:
    """Yield server-sent events: one for each part of a text. Ends the work when the client is gone."""
    no_usage = {"usage": None} if completion.request.include_usage else {}
    try:
        async with contextlib.aclosing(updates):
            async for update in updates:
                if await request.is_disconnected():
                    return
                if isinstance(update, Place):
                    yield f": {update.ahead} ahead\n\n"  # a comment, which keeps the connection open
                    continue
                for choice in update:
                    yield f"data: {json.dumps({**head, 'choices': [choice], **no_usage})}\n\n"
        if completion.request.include_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': completion.usage()})}\n\n"
    except UserError as error:
        yield f"data: {json.dumps(error_body(error)[0])}\n\n"
    yield "data: [DONE]\n\n"


# ---------------------------------------------------------------------------------------------------------------------
# names of the server


class HostCheck:
    """ASGI middleware that answers only requests that were sent to a name of this server.

    A page of another site can let its own name point to this machine (DNS rebinding), and would then be of the same
    origin. It cannot do so with an address in digits, or with localhost.

    Args:
        names: names of the server, in lower case; "*": any.
    """

    def __init__(self, app: ASGIApp, names: set[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and "*" not in self._names:
            host = hostname(Headers(scope=scope).get("host", ""))
            if host not in self._names and not is_address(host) and not host.endswith(".localhost"):
                message = f"{host[:100] or 'no name'} is not a name of this server: start it with --allowed_hosts NAME"
                await JSONResponse({"error": {"message": message}}, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def hostname(host: str) -> str:
    """Return the name or address in a Host header, without port and brackets."""
    if is_address(host):
        return host
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def server_names(config: AppConfig) -> set[str]:
    """Return the names with which this server can be addressed, beside IP addresses. "*": any name."""
    address = hostname(config.server_name or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1")
    names = {"localhost", address, *map(hostname, config.allowed_hosts)}
    if address != "localhost" and not (is_address(address) and ipaddress.ip_address(address).is_loopback):
        machine = socket.gethostname().lower()
        names |= {machine, f"{machine.partition('.')[0]}.local"}
    return names | ({"*"} if os.environ.get("SPACE_ID") else set())  # a Space is public, behind a proxy
