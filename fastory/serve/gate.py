"""Who may ask, and how much may be sent: token, Host, Origin, size and time of a request; what every answer says of itself.

A page of another site must not reach the server through its visitor's browser. It has no token; a name that it rebinds to
127.0.0.1 is no Host of ours (https://en.wikipedia.org/wiki/DNS_rebinding); and its Origin is another.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

MOST_JSON = 2 * 2**20  # bytes of a request's body
MOST_PICTURE = 32 * 2**20
MOST_PIXELS = 40_000_000
READ_WITHIN = 30.0  # seconds for a whole body
MOST_DRAINED = 64 * 2**20  # bytes of a body that is refused, read so that its sender reads why
DRAIN_WITHIN = 2.0

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}

Receive = Any
Send = Any
Scope = Mapping[str, Any]


class Gate:
    """ASGI middleware: refuses what may not be asked, before anything of it is read."""

    def __init__(self, app: Any, token: str, host: str, port: int) -> None:
        """host: what the server was told to listen on, a name that is a Host of ours beside localhost and addresses."""
        self.app, self.token = app, token
        self.names = {"localhost", host.lower()}
        self.cookie = f"fastory-{port}"

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            if refusal[0] == 413:
                await drain(receive)
            await self._refuse(send, *refusal)
            return
        limited = _Limited(receive, _most(scope))
        await self.app(scope, limited, self._with_headers(send, scope, limited))

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return (
                421,
                "the Host of this request is not this server's: open the address that fastory serve printed",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "this request comes from another site's page, which may not use this server"
        if not self._knows_token(scope, headers):
            return 401, "this request has no token: open the address that fastory serve printed"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > _most(scope):
            return 413, f"the body: wanted at most {_most(scope)} bytes, got more"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
            return True  # nobody can rebind an address
        except ValueError:
            return name in self.names

    def _knows_token(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        shown = [bearer] if kind.lower() == "bearer" else []
        try:
            cookies: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if self.cookie in cookies:
            shown.append(cookies[self.cookie].value)
        shown += asked_token(scope)
        return any(hmac.compare_digest(text.encode(), self.token.encode()) for text in shown)

    def _with_headers(self, send: Send, scope: Scope, limited: _Limited) -> Send:
        async def sending(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                limited.answered = True
                there = {name.lower() for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in there]
                if b"cache-control" not in there:
                    extra.append((b"cache-control", b"no-store"))
                if asked_token(scope):
                    cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    extra.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        return sending

    async def _refuse(self, send: Send, status: int, said: str) -> None:
        body = json.dumps({"error": said, "exit_code": 2}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        headers.append((b"connection", b"close"))  # what is left of the body is not read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def asked_token(scope: Scope) -> list[str]:
    """The token in the address of the page itself; it is taken nowhere else, as addresses are written down."""
    if scope["path"] != "/" or scope["method"] != "GET":
        return []
    return (
        parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [])[:1]
        if len(scope["query_string"]) < 2000
        else []
    )


def _most(scope: Scope) -> int:
    return MOST_PICTURE if scope["path"].endswith("/pictures") else MOST_JSON


async def drain(receive: Receive) -> None:
    """Read what is sent on and keep nothing of it, a while: whoever is cut off while it sends does not read the answer."""
    read = 0
    try:
        async with asyncio.timeout(DRAIN_WITHIN):
            while read < MOST_DRAINED:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return  # it is slow, and gets the answer now


class BodyRefused(Exception):
    """A body is larger than its header said it may be, or comes too slowly, or breaks off. status: of the answer."""

    def __init__(self, status: int, said: str) -> None:
        """said: for the user."""
        super().__init__(said)
        self.status = status


class _Limited:
    """What `receive` is: counts bytes, and waits for the body no longer than READ_WITHIN."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._read, self._until, self._whole = 0, 0.0, False
        self.answered = False

    async def __call__(self) -> Any:
        if self._whole or self.answered:
            return await self._receive()  # waits for the client to leave
        now = asyncio.get_running_loop().time()
        self._until = self._until or now + READ_WITHIN
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - now))
        except TimeoutError:
            if self.answered:
                return await self._receive()
            raise BodyRefused(408, f"the body did not come within {READ_WITHIN:.0f} seconds") from None
        if self.answered:
            return message
        if message["type"] == "http.disconnect":
            raise BodyRefused(400, "the body broke off")
        self._read += len(message.get("body", b""))
        if self._read > self._most:
            await drain(self._receive)
            raise BodyRefused(413, f"the body: wanted at most {self._most} bytes, got more")
        self._whole = not message.get("more_body", False)
        return message
