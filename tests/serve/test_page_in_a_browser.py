"""The page is judged where it is used: in Chromium, at a desk's and a phone's width, against a real server that draws."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import needs_chromium, open_chromium, resize
from PIL import Image
from run_folders import contents
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from served import STORY, Server

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")
pytestmark = needs_chromium

HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">\' " &amp; \u202eשלום 🦊'
WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    said = server.close()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Any]:
    driver = open_chromium()
    driver.get(server.address)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: Server) -> Any:
    resize(browser, 1280, 900)
    browser.get_log("browser")
    return browser


@pytest.fixture(scope="module")
def drawn(server: Server) -> str:
    story = server.create({**STORY, "frames": [HOSTILE, *STORY["frames"][1:]], "title": HOSTILE})
    server.until(story, "finished")
    return story


def go(page: Any, server: Server, story: str = "") -> None:
    home = f"http://{server.host}:{server.port}/"
    there = page.current_url.startswith(home)
    page.get(f"{home}#/{story}")
    # What is behind # alone loads nothing; in a new tab a refresh is at times aborted by what it repeats.
    if there:
        page.refresh()
    until(lambda: page.find_elements(By.CSS_SELECTOR, "main h1, main .title"))


def until(found: Callable[[], Any], within: float = 60) -> Any:
    """What `found` returns, once it is something; an element that is gone meanwhile is looked for again."""
    from selenium.common.exceptions import WebDriverException

    end, last = time.monotonic() + within, None
    while time.monotonic() < end:
        try:
            if last := found():
                return last
        except WebDriverException as error:
            last = error
        time.sleep(0.05)
    raise AssertionError(f"nothing came of it in {within} s: {last!r}")


def state(page: Any) -> str:
    return str(page.find_element(By.CSS_SELECTOR, ".state").get_attribute("data-state"))


def shown(page: Any) -> list[str]:
    """The addresses of the pictures in the grid that are loaded."""
    script = "return [...document.querySelectorAll('.frame img')].filter(i => i.naturalWidth).map(i => i.getAttribute('src'))"
    return list(page.execute_script(script))


def button(page: Any, text: str, within: str = "main") -> Any:
    return next(b for b in page.find_elements(By.CSS_SELECTOR, f"{within} button") if b.text == text)


def test_a_story_is_written_drawn_locked_and_redrawn(page: Any, server: Server) -> None:
    go(page, server)
    button(page, "New story").click()
    until(lambda: page.find_element(By.ID, "draw"))
    page.find_element(By.CSS_SELECTOR, ".title").send_keys("Snow")
    for caption in STORY["frames"][:2]:
        page.find_elements(By.CSS_SELECTOR, ".captions textarea")[-1].send_keys(caption)
        page.find_element(By.ID, "add").click()
    for name, value in (("iterations", "1"), ("steps", "2")):
        label = next(e for e in page.find_elements(By.TAG_NAME, "label") if e.text.lower() == name)
        label.find_element(By.TAG_NAME, "input").send_keys(value)
    page.find_element(By.CSS_SELECTOR, ".captions textarea").send_keys(" foxx")
    until(lambda: "foxx (fox?)" in page.find_element(By.CSS_SELECTOR, ".checks").text)
    page.find_element(By.CSS_SELECTOR, ".captions textarea").send_keys(Keys.BACKSPACE * 5)
    page.find_element(By.ID, "draw").click()
    until(lambda: state(page) == "finished")
    until(lambda: len(shown(page)) == 2)
    story = page.current_url.rpartition("/")[2]
    before = contents(server.folder / story)
    first = page.find_element(By.CSS_SELECTOR, ".frame .open")
    first.click()
    page.switch_to.active_element.send_keys("l")
    until(lambda: server.ask("GET", f"/stories/{story}").json["locked"] == [0])
    until(lambda: not page.find_element(By.ID, "take").is_enabled())
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    text = page.find_element(By.CSS_SELECTOR, "dialog textarea")
    text.clear()
    text.send_keys("a cat is sleeping in the house")
    page.find_element(By.ID, "redraw").click()
    until(lambda: "001" in server.ask("GET", f"/stories/{story}").json["history"])
    server.until(story, "finished")
    after = contents(server.folder / story)
    assert after["frames/frame-000.png"] == before["frames/frame-000.png"]
    assert after["frames/frame-001.png"] != before["frames/frame-001.png"]
    from selenium.webdriver.support.ui import Select

    until(lambda: len(Select(page.find_elements(By.CSS_SELECTOR, "dialog select")[-1]).options) == 2)
    Select(page.find_elements(By.CSS_SELECTOR, "dialog select")[-1]).select_by_value("001")
    until(lambda: page.find_element(By.CSS_SELECTOR, "dialog .before").is_displayed())
    assert page.find_element(By.ID, "take-back").is_enabled()
    page.find_element(By.CSS_SELECTOR, "dialog").send_keys(Keys.ESCAPE)
    until(lambda: "a cat is sleeping" in page.find_elements(By.CSS_SELECTOR, ".frame")[1].text)
    until(
        lambda: page.find_elements(By.CSS_SELECTOR, ".frame img")[1].get_attribute("alt").startswith("a cat")
    )
    assert [e for e in page.get_log("browser") if e["level"] == "SEVERE"] == []


DROPPED = """
    const [zone, bytes] = arguments, transfer = new DataTransfer();
    const file = new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], "<b>x.png", { type: "image/png" });
    transfer.items.add(file);
    const event = (kind) => new DragEvent(kind, { dataTransfer: transfer, cancelable: true });
    for (const kind of ["dragover", "drop"]) zone.dispatchEvent(event(kind));
"""


def test_captions_are_dragged_deleted_and_had_again_and_a_picture_is_dropped(
    page: Any, server: Server
) -> None:
    captions = STORY["frames"]
    story = server.create({"frames": captions, "characters": {"Mia": {"prompt": "a fox"}}}, draw=False)
    go(page, server, story)

    def written() -> list[str]:
        return [e.get_attribute("value") for e in page.find_elements(By.CSS_SELECTOR, ".captions textarea")]

    grip = page.find_elements(By.CSS_SELECTOR, ".grip")[2]
    first = page.find_element(By.CSS_SELECTOR, ".caption-card")
    ActionChains(page).click_and_hold(grip).move_to_element(first).pause(0.1).release().perform()
    until(lambda: written() == [captions[2], captions[0], captions[1]])
    button(page, "Delete").click()
    page.find_element(By.CSS_SELECTOR, ".captions textarea").send_keys("!")
    assert written() == [captions[0] + "!", captions[1]]
    for left in ([captions[0], captions[1]], [captions[2], captions[0], captions[1]], captions):
        page.find_element(By.ID, "undo").click()
        assert written() == left
    assert not page.find_element(By.ID, "undo").is_enabled()
    zone = page.find_element(By.CSS_SELECTOR, ".person .drop")
    page.execute_script(DROPPED, zone, png("red"))
    until(lambda: page.find_elements(By.CSS_SELECTOR, ".person .drop img"))
    shown = until(
        lambda: server.ask("GET", f"/stories/{story}").json["story"]["characters"]["Mia"].get("references")
    )
    assert len(shown) == 1 and server.ask("GET", f"/stories/{story}").json["story"]["frames"] == captions


def png(colour: str) -> str:
    """A small picture, as base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.slow
def test_a_frame_is_redrawn_with_a_drawn_box_and_with_a_dropped_picture(page: Any, server: Server) -> None:
    captions = ["Mia is sleeping in the snow", "Bo is jumping in the forest"]
    characters = {"Mia": {"prompt": "a cat"}, "Bo": {"prompt": "a bear"}}
    story = server.create({**STORY, "frames": captions, "characters": characters})
    server.until(story, "finished")
    before = contents(server.folder / story)
    go(page, server, story)
    until(lambda: len(shown(page)) == 2)
    page.find_element(By.CSS_SELECTOR, ".frame .open").click()
    sheet = until(lambda: page.find_element(By.CSS_SELECTOR, "dialog .boxing"))
    width, height = sheet.size["width"], sheet.size["height"]
    drag = ActionChains(page).move_to_element_with_offset(sheet, -width // 4, -height // 4).click_and_hold()
    drag.move_by_offset(width // 2, height // 4).release().perform()
    assert page.find_element(By.CSS_SELECTOR, "dialog .names").text == "Mia"
    until(lambda: page.find_element(By.ID, "redraw").is_enabled())
    page.find_element(By.ID, "redraw").click()
    until(lambda: "001" in server.ask("GET", f"/stories/{story}").json["history"])
    said = server.until(story, "finished")["story"]["frames"]
    assert said[1] == captions[1] and said[0]["caption"] == captions[0]
    assert said[0]["boxes"]["Mia"] == pytest.approx([0.25, 0.25, 0.75, 0.5], abs=0.02)
    boxed = contents(server.folder / story)
    assert boxed["frames/frame-000.png"] != before["frames/frame-000.png"]
    assert boxed["frames/frame-001.png"] == before["frames/frame-001.png"]

    page.find_element(By.CSS_SELECTOR, "dialog").send_keys(Keys.ESCAPE)
    zone = until(lambda: page.find_element(By.CSS_SELECTOR, "#given .drop:not([inert])"))
    page.execute_script(DROPPED, zone, png("blue"))
    until(lambda: "Frame 0 was drawn" in page.find_element(By.ID, "given").text)
    page.refresh()
    until(lambda: page.find_element(By.ID, "redraw-given").text == "Redraw frame 0")
    page.find_element(By.ID, "redraw-given").click()
    until(lambda: "002" in server.ask("GET", f"/stories/{story}").json["history"])
    server.until(story, "finished")
    given = contents(server.folder / story)
    assert given["frames/frame-000.png"] != boxed["frames/frame-000.png"]
    assert given["frames/frame-001.png"] == before["frames/frame-001.png"]
    until(lambda: not page.find_elements(By.ID, "redraw-given"))
    picture = page.find_element(By.CSS_SELECTOR, "#given .drop img")
    until(lambda: page.execute_script("return arguments[0].naturalWidth", picture) == 40)
    assert [e for e in page.get_log("browser") if e["level"] == "SEVERE"] == []


def test_nothing_moves_as_frames_arrive(page: Any, server: Server) -> None:
    """By the Layout Instability API, from a story that waits in the queue to its last picture, and one that is appended."""
    server.create({**STORY, "settings": {"steps": 8, "iterations": 1}})
    story = server.create({**STORY, "frames": [*STORY["frames"], "a foxx is standing in the snow"]})
    go(page, server, story)
    observe = """
        window.shifts = [];
        new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
        }).observe({ type: "layout-shift" });
    """
    page.execute_script(observe)
    server.until(story, "finished")
    until(lambda: state(page) == "finished" and len(shown(page)) == 4)
    assert page.execute_script("return window.shifts") == []
    assert page.find_element(By.CSS_SELECTOR, ".pace button").is_displayed(), "its note is told"
    page.find_element(By.ID, "next").send_keys("a fox is sleeping in the house")
    page.find_element(By.ID, "append").click()
    until(lambda: len(shown(page)) == 5)
    server.until(story, "finished")
    back = "#appended button:enabled"
    until(lambda: page.find_element(By.CSS_SELECTOR, back).text == "Take frame 4 back")
    page.find_element(By.CSS_SELECTOR, back).click()
    until(lambda: page.find_element(By.CSS_SELECTOR, back).text == "Bring frame 4 back")
    until(lambda: len(shown(page)) == 4)
    assert len(server.ask("GET", f"/stories/{story}").json["story"]["frames"]) == 4


def test_reload_and_a_second_tab_show_the_same_state(page: Any, server: Server) -> None:
    # Long enough that it is not drawn to its end before a slow browser has two tabs open.
    story = server.create({**STORY, "settings": {"steps": 60, "inner_steps": 60, "iterations": 6}})
    go(page, server, story)
    until(lambda: shown(page))
    page.refresh()
    until(lambda: state(page) == "drawing" and shown(page))
    boxes = "return [...document.querySelectorAll('.frame .picture')].map(e => JSON.stringify(e.getBoundingClientRect()))"
    before = page.execute_script(boxes)
    page.switch_to.new_window("tab")
    go(page, server, story)
    button(page, "Pause").click()
    until(lambda: state(page) == "paused")
    page.close()
    page.switch_to.window(page.window_handles[0])
    until(lambda: state(page) == "paused")
    assert page.execute_script(boxes) == before
    button(page, "Go on").click()
    until(lambda: state(page) == "finished", within=240)
    assert page.execute_script(boxes) == before
    assert len(shown(page)) == 3


def test_texts_stay_texts(page: Any, server: Server, drawn: str) -> None:
    go(page, server, drawn)
    until(lambda: len(shown(page)) == 3)
    title, caption = (" ".join(text.split()) for text in (HOSTILE, HOSTILE))
    assert page.execute_script("return document.querySelector('h1').textContent") == title
    assert page.execute_script("return document.querySelector('.frame .caption').textContent") == caption
    assert page.execute_script("return document.querySelector('.frame img').alt") == caption
    go(page, server)
    until(lambda: page.find_elements(By.CSS_SELECTOR, ".story"))
    copy = server.ask("POST", f"/stories/{drawn}/duplicate").json["id"]
    go(page, server, copy)
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, ".captions textarea").get_attribute("value")
    assert page.execute_script("return window.hacked") is None


@pytest.mark.parametrize("size", [(390, 844), (320, 568), (2000, 1000)], ids=str)
def test_nothing_scrolls_sideways(page: Any, server: Server, drawn: str, size: tuple[int, int]) -> None:
    resize(page, *size)
    draft = server.create({"title": "x" * 300, "frames": ["y" * 400]}, draw=False)
    for story in ("", drawn, draft):
        go(page, server, story)
        assert page.execute_script(WIDE) <= 0, story
    go(page, server, drawn)
    until(lambda: shown(page))
    page.find_element(By.CSS_SELECTOR, ".frame .open").click()
    assert page.execute_script(WIDE) <= 0
    for name in ("lock", "take", "redraw"):
        element = page.find_element(By.ID, name)
        page.execute_script("arguments[0].scrollIntoView()", element)
        assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= size[0] + 1
        assert element.rect["height"] >= 40


def test_keys_alone_are_enough(page: Any, server: Server, drawn: str) -> None:
    go(page, server, drawn)
    until(lambda: len(shown(page)) == 3)
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("aria-label") == "Frame 1, large"
    page.switch_to.active_element.send_keys("l")
    until(lambda: server.ask("GET", f"/stories/{drawn}").json["locked"] == [1])
    page.switch_to.active_element.send_keys("l")
    until(lambda: server.ask("GET", f"/stories/{drawn}").json["locked"] == [])
    page.switch_to.active_element.send_keys(Keys.ENTER)
    dialog = page.find_element(By.TAG_NAME, "dialog")
    assert "Frame 1 (2 of 3)" in dialog.text
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    assert "Frame 0 (1 of 3)" in dialog.text and "0 of 1" in dialog.find_element(By.TAG_NAME, "dl").text
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_every_control_has_a_name_and_no_picture_is_without_text(
    page: Any, server: Server, drawn: str
) -> None:
    script = """
        return [...document.querySelectorAll("button, input:not([hidden]), select, textarea, a")].filter((e) => !(
            e.ariaLabel || e.textContent.trim() || e.labels?.length || e.hidden || e.closest("[hidden], [aria-hidden]")
        )).map((e) => e.outerHTML.slice(0, 90));
    """
    draft = server.create({"frames": ["a fox"], "characters": {"Mia": {"prompt": "a fox"}}}, draw=False)
    for story in ("", drawn, draft):
        go(page, server, story)
        assert page.execute_script(script) == []
    go(page, server, drawn)
    until(lambda: shown(page))
    assert "" not in page.execute_script(
        "return [...document.querySelectorAll('.frame img')].map(i => i.alt)"
    )


def test_nothing_is_asked_of_others_and_nothing_is_complained_of(
    page: Any, server: Server, drawn: str
) -> None:
    page.get_log("performance")
    for story in ("", drawn):
        go(page, server, story)
    page.get(f"http://{server.host}:{server.port}/docs")
    until(lambda: page.find_elements(By.CSS_SELECTOR, ".route"))
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = f"http://{server.host}:{server.port}/"
    assert sent and [url for url in sent if not url.startswith(own)] == []
    assert page.get_log("browser") == []
