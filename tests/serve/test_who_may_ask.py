"""Risk: another site's page, another name for this machine, another user or a hostile upload reaches a user's stories."""

from __future__ import annotations

import io
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from served import Server

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "outside.txt").write_text("secret")
    (folder / "stories").mkdir()
    (folder / "stories" / "private").mkdir()
    (folder / "stories" / "private" / "diary.txt").write_text("secret")
    server = Server(folder / "stories")
    yield server
    said = server.close()
    assert "Traceback" not in said, said


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer x"}, 401),
        ({"Host": "rebound.example:80"}, 421),
        ({"Host": ""}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Length": "99999999999"}, 413),
    ],
    ids=str,
)
def test_only_its_own_page_may_ask(server: Server, headers: dict[str, str], status: int) -> None:
    answer = server.ask("GET", "/stories", headers=headers)
    assert answer.status == status
    if status != 200:
        assert set(answer.json) == {"error", "exit_code"}
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_token_becomes_a_cookie_of_this_site_alone(server: Server) -> None:
    answer = server.ask("GET", f"/?token={server.token}", headers={"Authorization": ""})
    cookie = answer.headers["set-cookie"]
    assert answer.status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    kept = {"Authorization": "", "Cookie": cookie.partition(";")[0]}
    assert server.ask("GET", "/stories", headers=kept).status == 200
    assert server.ask("GET", f"/stories?token={server.token}", headers={"Authorization": ""}).status == 401
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    ["..", "../outside.txt", "%2e%2e", "..%2foutside.txt", ".fastory", "private", "a%00b", "x" * 300, "*"],
)
def test_a_story_is_known_by_its_id_alone(server: Server, name: str) -> None:
    for path in (f"/stories/{name}", f"/stories/{name}/frames/0", f"/static/{name}"):
        answer = server.ask("GET", path)
        assert answer.status in (404, 405) and b"secret" not in answer.body
    assert server.ask("DELETE", f"/stories/{name}").status in (404, 405)
    assert (server.folder / "private" / "diary.txt").exists()


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (100_000).to_bytes(4, "big")
    header = size + size + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def png(side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        bomb(),
        png()[:-20],
        b"\x80\x04pickle",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"<svg onload=alert(1)>",
    ],
    ids=["empty", "text", "bomb", "cut", "pickle", "eps", "svg"],
)
def test_what_is_no_picture_is_not_kept(server: Server, data: bytes) -> None:
    story = server.create({"frames": ["a fox is sleeping in the snow"]}, draw=False)
    answer = server.ask("POST", f"/stories/{story}/pictures", data)
    assert answer.status == 422 and "wanted" in answer.json["error"]
    draft = server.folder / ".fastory" / "drafts" / story
    assert [path.name for path in draft.rglob("*")] == ["story.json"]


def test_a_picture_is_drawn_from_the_run_folders_own_copy(server: Server) -> None:
    story = server.create({"title": "Mia", "frames": ["Mia the fox is sleeping in the snow"]}, draw=False)
    name = server.ask("POST", f"/stories/{story}/pictures", png()).json["name"]
    said = {
        "title": "Mia",
        "frames": ["Mia the fox is sleeping in the snow"],
        "characters": {"Mia": {"references": [name]}},
        "settings": {"steps": 1, "iterations": 1},
    }
    assert server.ask("PUT", f"/stories/{story}", {"story": said}).status == 200
    assert server.ask("POST", f"/stories/{story}/draw", {}).status == 202
    server.until(story, "finished")
    (kept,) = (server.folder / story / "inputs").iterdir()
    assert kept.read_bytes()[:2] == b"BM"
    said["characters"]["Mia"]["references"] = ["../../../outside.txt"]  # type: ignore[index]
    other = server.create(said, draw=False)
    refused = server.ask("POST", f"/stories/{other}/draw", {})
    assert refused.status == 422 and "outside" in refused.json["error"]
    assert str(server.folder) not in refused.json["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'{"story": 7}',
        b'{"story": {}, "more": 1}',
        b"[" * 100_000,
        b'{"story": {"a": "\\ud800"}}',
    ],
)
def test_a_body_that_is_none_is_refused_in_words(server: Server, body: bytes) -> None:
    answer = server.ask("POST", "/stories", body)
    assert answer.status == 422 and answer.json["exit_code"] == 2 and answer.json["error"]


def test_a_story_that_cannot_be_drawn_is_refused_as_by_the_command_line(server: Server) -> None:
    for story, said in (
        ({"frames": []}, "wanted a list of at least one caption, got an empty list"),
        ({"frames": ["x"], "settings": {"stepz": 2}}, "did you mean 'steps'?"),
        ({"frames": ["x"], "stile": "comic"}, "stile: unknown key"),
    ):
        answer = server.ask("POST", "/stories", {"story": story, "draw": True})
        assert answer.status == 422 and said in answer.json["error"]
        assert server.ask("POST", "/check", {"story": story}).json["error"] == answer.json["error"]


def test_what_the_model_does_not_know_is_told_while_it_is_written(server: Server) -> None:
    story = {"frames": ["a foxx is sleeping in the snow", "a fox " * 60]}
    checked = server.ask("POST", "/check", {"story": story}).json
    assert checked["error"] is None
    assert "foxx (fox?)" in checked["notices"][0] and "frame 1" in checked["notices"][1]


def test_a_second_server_of_the_folder_is_refused(server: Server) -> None:
    with pytest.raises(AssertionError, match="another process serves"):
        Server(server.folder)


def test_nothing_of_the_users_was_touched(server: Server) -> None:
    assert (Path(server.folder).parent / "outside.txt").read_text() == "secret"
    assert (server.folder / "private" / "diary.txt").read_text() == "secret"


def test_a_body_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow client holds is freed: the answer is 408, and the application has read nothing whole."""
    import asyncio

    from fastory.serve import gate

    monkeypatch.setattr(gate, "READ_WITHIN", 0.05)
    sent: list[int] = []

    async def reads(_: object, receive: Callable[[], Awaitable[object]], __: object) -> None:
        try:
            await receive()
            await receive()
        except gate.BodyRefused as error:
            sent.append(error.status)

    async def slow() -> dict[str, object]:
        if sent or waited:
            await asyncio.sleep(3600)
        waited.append(1)
        return {"type": "http.request", "body": b"{", "more_body": True}

    waited: list[int] = []
    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer word")]
    scope = {"type": "http", "method": "POST", "path": "/stories", "query_string": b"", "headers": headers}
    asyncio.run(gate.Gate(reads, "word", "localhost", 1)(scope, slow, None))
    assert sent == [408]


def test_a_link_in_a_run_folder_leads_nowhere(server: Server) -> None:
    said = {"frames": ["a fox is sleeping in the snow"], "settings": {"steps": 1, "iterations": 0}}
    story = server.create(said)
    server.until(story, "finished")
    assert server.ask("GET", f"/stories/{story}/frames/0").status == 200
    assert server.ask("GET", f"/stories/{story}/take/story.yaml").status == 200
    outside = server.folder.parent / "outside.yaml"
    outside.write_text("title: secret\nframes: [secret]\n")
    for name in ("iteration-00/frame-000.png", "story.yaml"):
        (server.folder / story / name).unlink()
        (server.folder / story / name).symlink_to(outside)
    for path in ("frames/0", "take/story.yaml", "take/pages.pdf", "take/pictures.zip", ""):
        answer = server.ask("GET", f"/stories/{story}/{path}".rstrip("/"))
        assert answer.status < 500 and b"secret" not in answer.body, path
