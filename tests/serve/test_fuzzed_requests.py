"""Risk: some request ends in a traceback or a 500, blocks the others, or reads or writes outside the server's folder."""

from __future__ import annotations

import hashlib
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import STORY, Server

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")

SECRET = "a secret of the user's"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
NAMES = (
    *("..", ".", "%2e%2e", "..%2f..%2fsecret.txt", "%00", "%ff", ".fastory", "secret.txt", "con", "a" * 5000),
    *("-1", "0", "1", "9" * 400, "1e3", "0x1", "null", "story.yaml", "storybook.html", "{story}", "?", "#"),
    *("frames", "redraw", "events%0d%0aX: y", "<script>", "\u202e", "🦊", "pages.pdf", "%25%32%65"),
)
ROUTES = (
    *(
        "/",
        "/docs",
        "/openapi.json",
        "/choices",
        "/check",
        "/stories",
        "/static/{}",
        "/stories/{}",
        "/stories/{}/draw",
    ),
    *(
        "/stories/{}/redraw",
        "/stories/{}/cancel",
        "/stories/{}/duplicate",
        "/stories/{}/pictures",
        "/stories/{}/pictures/{}",
    ),
    *(
        "/stories/{}/frames/{}",
        "/stories/{}/frames/{}?round={}&take={}",
        "/stories/{}/take/{}",
        "/{}",
        "//{}",
        "/stories//{}",
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1.5,
        10**40,
        "",
        "x",
        "\u0000",
        "\u202e<b>",
        "x" * 5000,
        [],
        {},
        [[]],
        {"a": {"b": []}},
    ),
    *([0] * 1000, {"frames": ["x"]}, {"frames": [{"frame": 0}]}, ["x"], {"frame": 0, "caption": ""}),
)
KEYS = (
    "story",
    "draw",
    "frames",
    "seed",
    "name",
    "locked",
    "give_up_redraw",
    "frame",
    "caption",
    "boxes",
    "more",
)
RAW = (
    *(
        b"",
        b"{",
        b"[" * 50_000,
        b'{"a":' * 5000,
        b"\xff\xfe",
        b"NaN",
        b"1e999",
        b'{"story":{"frames":["\\ud800"]}}',
    ),
    *(
        b'{"story": 1, "story": 2}',
        b"--x\r\nContent-Disposition: form-data\r\n\r\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "stories" / "diary").mkdir(parents=True)
    (folder / "stories" / "diary" / "secret.txt").write_text(SECRET)
    (folder / "stories" / "link").symlink_to(folder)
    before = outside(folder)
    server = Server(folder / "stories")
    story = server.create({**STORY, "settings": {"steps": 1, "iterations": 0}})
    server.until(story, "finished")
    server.create({"frames": ["a fox"]}, draw=False)
    yield server
    said = server.close()
    assert "Traceback" not in said and "Error" not in said, said
    assert outside(folder) == before


def outside(folder: Path) -> dict[str, str]:
    """All that is not the server's, by its hash."""
    files = [folder / "secret.txt", folder / "stories" / "diary" / "secret.txt"]
    return {
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "there": ",".join(
            sorted(path.name for path in (*folder.iterdir(), *(folder / "stories" / "diary").iterdir()))
        ),
    }


def body(random_: random.Random) -> bytes | None:
    kind = random_.random()
    if kind < 0.2:
        return None
    if kind < 0.5:
        return random_.choice(RAW)
    said = {random_.choice(KEYS): random_.choice(VALUES) for _ in range(random_.randint(0, 4))}
    return json.dumps(random_.choice((said, random_.choice(VALUES)))).encode("utf-8", "surrogatepass")


def fuzz(server: Server, seed: int, count: int) -> None:
    chosen = random.Random(seed)
    for _ in range(count):
        ids = [row["id"] for row in server.ask("GET", "/stories").json]
        names = (*NAMES, *ids, *ids, *ids)
        route = chosen.choice(ROUTES)
        path = route.format(*(chosen.choice(names) for _ in range(route.count("{}"))))
        path = "".join(c if c.isascii() and c.isprintable() and c != " " else "%3F" for c in path)
        method, data = chosen.choice(METHODS), body(chosen)
        answer = server.ask(method, path, data)
        where = (method, path[:100], data[:100] if data else data, answer.body[:300])
        assert answer.status < 500, where
        assert SECRET.encode() not in answer.body, where
        if (
            answer.status >= 400
            and method != "HEAD"
            and answer.headers.get("content-type") == "application/json"
        ):
            assert set(answer.json) == {"error", "exit_code"}, where
            assert str(server.folder.parent) not in answer.json["error"], where


def test_no_request_fails_inside(server: Server) -> None:
    fuzz(server, 1, 150)


@pytest.mark.slow
def test_a_thousand_requests_fail_nowhere_inside(server: Server) -> None:
    fuzz(server, 2, 1000)


def raw(server: Server, data: bytes, *, wait: bool = True) -> bytes:
    """What comes for bytes that are sent as they are."""
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(data)
        if not wait:
            return b""
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536)


def head(server: Server, method: str, path: str, *more: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {server.host}",
        f"Authorization: Bearer {server.token}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_what_is_no_http_and_what_breaks_off_leaves_the_server_as_it_was(server: Server) -> None:
    story = server.create({"frames": ["a fox"]}, draw=False)
    upload = head(server, "POST", f"/stories/{story}/pictures", "Content-Length: 1000000")
    for data in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
        upload + bytes(500),
    ):
        raw(server, data)
    chunked = head(server, "POST", "/stories", "Transfer-Encoding: chunked") + b"ffffffff\r\n"
    raw(server, chunked, wait=False)
    long = raw(server, head(server, "GET", "/", "X: " + "y" * 100_000))
    assert long == b"" or b" 400 " in long.splitlines()[0]
    draft = server.folder / ".fastory" / "drafts" / story
    assert [path.name for path in draft.rglob("*")] == ["story.json"]
    assert server.ask("GET", "/stories").status == 200


def test_a_body_is_read_no_further_than_its_limit(server: Server) -> None:
    """Ten megabytes of JSON by their header, and in chunks that say nothing of a length."""
    assert server.ask("POST", "/stories", b"x" * 10_000_000).status == 413
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(head(server, "POST", "/check", "Transfer-Encoding: chunked"))
        try:
            for _ in range(160):
                connection.sendall(chunk)
        except (ConnectionError, TimeoutError):
            pass  # it is closed before all is sent
        answer = connection.recv(200)
    assert b" 413 " in answer
    assert server.ask("GET", "/stories").status == 200


def test_slow_clients_hold_nobody_up(server: Server) -> None:
    """Thirty that send a byte and wait."""
    waiting = [socket.create_connection((server.host, server.port)) for _ in range(30)]
    try:
        for connection in waiting:
            connection.sendall(head(server, "POST", "/stories", "Content-Length: 100") + b"{")
        assert server.ask("GET", "/stories").status == 200
    finally:
        for connection in waiting:
            connection.close()


@pytest.mark.slow
def test_schemathesis_finds_no_failure(server: Server) -> None:
    """Requests that its strategies make of the OpenAPI document; streams of events, which do not end, left out."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    from hypothesis import HealthCheck, given, settings

    document = server.ask("GET", "/openapi.json").json
    document["paths"] = {
        path: said for path, said in document["paths"].items() if not path.endswith("events")
    }
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {server.token}"}
    address = f"http://{server.host}:{server.port}"
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def no_failure(case: Any) -> None:
            answer = case.call(base_url=address, headers=headers)
            assert answer.status_code < 500
            case.validate_response(
                answer,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
                    schemathesis.checks.CHECKS.get_one("status_code_conformance"),
                ],
            )

        no_failure()
