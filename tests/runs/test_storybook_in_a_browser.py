"""The storybook is judged where it is read: in Chromium, at a desk's and a phone's width."""

import json
from pathlib import Path

import pytest
from chromium import needs_chromium, open_chromium, resize
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fastory.runs.storybook import Page, write_storybook

pytestmark = needs_chromium

COLOURS = ("red", "green", "blue")
HOSTILE = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">\' " &amp; {{ 7*7 }} \u202eשלום 🦊 '
)
CAPTIONS = ("A fox runs.", HOSTILE + "x" * 2000, "The end.")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Page]:
    """Three frames, three rounds; round k has the colour k; frame 1 has no picture in round 1."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (96, 64), colour).save(folder / f"{colour}.png")
    paths = tuple(folder / f"{colour}.png" for colour in COLOURS)
    pages = [Page(caption, paths, paths[-1]) for caption in CAPTIONS]
    pages[1] = Page(
        CAPTIONS[1], (paths[0], None, paths[2]), paths[2], "round 1: </style><script>window.hacked=1"
    )
    return pages


@pytest.fixture(scope="module")
def book(pages, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("book") / "storybook.html"
    write_storybook(pages, path, title=f"Title {HOSTILE}", settings={"<b>steps": "50</script>", "seed": "0"})
    return path


@pytest.fixture(scope="module")
def chromium():
    driver = open_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, book):
    resize(chromium, 1280, 900)
    chromium.get(book.as_uri())
    return chromium


def colour(driver, selector: str) -> str:
    """The colour of the middle of a shown picture, decoded by the browser; "none" where it is not visible."""
    script = """
        const [selector, done] = arguments, image = document.querySelector(selector);
        if (getComputedStyle(image).visibility === "hidden" || !image.getClientRects().length) return done("none");
        image.decode().then(() => {
            const context = document.createElement("canvas").getContext("2d");
            context.drawImage(image, 0, 0);
            done([...context.getImageData(5, 5, 1, 1).data.slice(0, 3)].join());
        });
    """
    names = {"255,0,0": "red", "0,128,0": "green", "0,0,255": "blue"}
    shown = driver.execute_async_script(script, selector)
    return names.get(shown, shown)


def colours(driver) -> list[str]:
    return [colour(driver, f"figure:nth-of-type({n}) img") for n in (1, 2, 3)]


def test_slider_goes_through_the_rounds(page):
    slider, label = page.find_element(By.ID, "round"), page.find_element(By.CSS_SELECTOR, "output")
    assert (colours(page), label.text) == (["blue"] * 3, "Round 2 of 2")
    slider.send_keys(Keys.ARROW_LEFT)
    assert (colours(page), label.text) == (["green", "none", "green"], "Round 1 of 2")
    assert slider.get_attribute("aria-valuetext") == "Round 1 of 2"
    assert "No picture in this round" in page.find_element(By.CSS_SELECTOR, "figure:nth-of-type(2)").text
    slider.send_keys(Keys.HOME)
    assert (colours(page), label.text) == (["red"] * 3, "Round 0 of 2")
    slider.send_keys(Keys.END)
    assert colours(page) == ["blue"] * 3


def test_click_enlarges_and_keys_go_on(page):
    dialog = page.find_element(By.TAG_NAME, "dialog")
    picture = page.find_element(By.CSS_SELECTOR, "figure:nth-of-type(1) .picture")
    small = picture.size["width"]
    picture.click()
    enlarged = page.find_element(By.CSS_SELECTOR, "dialog img")
    assert dialog.is_displayed() and enlarged.size["width"] > 2 * small
    assert CAPTIONS[0] in dialog.text and "Frame 0 (1 of 3)" in dialog.text
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert (colour(page, "dialog img"), "Round 1 of 2" in dialog.text) == ("green", True)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert colour(page, "dialog img") == "none"
    assert "No picture in this round" in dialog.text
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert (colour(page, "dialog img"), CAPTIONS[2] in dialog.text) == ("blue", True)
    page.find_element(By.CSS_SELECTOR, "dialog .previous").click()
    assert "Frame 1 (2 of 3)" in dialog.text
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    opened = page.find_element(By.CSS_SELECTOR, "figure:nth-of-type(2) .picture")
    # A dialog says that it is closed a moment after it is gone.
    WebDriverWait(page, 5).until(lambda driver: driver.switch_to.active_element == opened)


def test_enter_enlarges(page):
    page.find_element(By.CSS_SELECTOR, "figure:nth-of-type(3) .picture").send_keys(Keys.ENTER)
    dialog = page.find_element(By.TAG_NAME, "dialog")
    assert dialog.is_displayed() and CAPTIONS[2] in dialog.text
    page.find_element(By.CSS_SELECTOR, "dialog .close").click()
    assert not dialog.is_displayed()


@pytest.mark.parametrize("size", [(360, 740), (320, 568), (740, 360), (1280, 900)], ids=str)
def test_nothing_scrolls_sideways_or_hides(page, size):
    resize(page, *size)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.execute_script(wide) <= 0
    page.execute_script("document.querySelectorAll('.picture')[1].click()")
    assert page.execute_script(wide) <= 0
    for selector in ("dialog img", "dialog .close", "dialog .next", "dialog input"):
        box = page.find_element(By.CSS_SELECTOR, selector).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] + 1, selector
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1] + 1, selector
        assert box["width"] >= 40, selector
    assert page.find_element(By.CSS_SELECTOR, "dialog img").rect["height"] >= 160


def test_texts_stay_texts(page):
    assert page.execute_script("return window.hacked") is None
    texts = page.execute_script(
        "return [...document.querySelectorAll('figure .caption')].map(e => e.textContent)"
    )
    assert texts == list(CAPTIONS)
    alts = page.execute_script("return [...document.querySelectorAll('figure img')].map(e => e.alt)")
    assert alts == list(CAPTIONS)
    assert page.title == " ".join(f"Title {HOSTILE}".split())
    assert page.execute_script("return document.querySelector('dt').textContent") == "<b>steps"


def test_the_policy_stops_foreign_scripts_and_loads(page):
    """Even if a text got into the page as markup."""
    page.execute_script("""
        document.body.insertAdjacentHTML("beforeend", '<img src="x" onerror="window.hacked=2">');
        const script = document.createElement("script");
        script.textContent = "window.hacked = 3";
        document.body.append(script);
    """)
    blocked = page.execute_async_script(
        "fetch('https://example.invalid/').then(() => arguments[0]('sent'), error => arguments[0](error.name))"
    )
    assert blocked == "TypeError"
    assert page.execute_script("return window.hacked") is None
    refused = [
        entry["message"] for entry in page.get_log("browser") if "Content Security Policy" in entry["message"]
    ]
    for what in ("example.invalid", "/x", "inline script"):
        assert any(what in message for message in refused), (what, refused)


def test_nothing_else_is_requested_and_nothing_is_complained_of(page, book):
    page.get_log("performance"), page.get_log("browser")
    page.get(book.as_uri())
    page.find_element(By.CSS_SELECTOR, ".picture").click()
    page.find_element(By.ID, "enlarged-round").send_keys(Keys.HOME)
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert book.as_uri() in sent
    assert [url for url in sent if not url.startswith("data:") and url != book.as_uri()] == []
    assert page.get_log("browser") == []


def test_final_pictures_show_without_scripts(page, book):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(book.as_uri())
        figures = page.find_elements(By.TAG_NAME, "figure")
        assert [figure.is_displayed() for figure in figures] == [True] * 3
        assert figures[0].find_element(By.TAG_NAME, "img").size["width"] > 200
        assert CAPTIONS[1][-2000:] in figures[1].text
        assert not page.find_element(By.ID, "round").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_dark_mode(page):
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.documentElement).backgroundColor")

    light = background()
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert background() != light
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name(page):
    unnamed = page.execute_script("""
        return [...document.querySelectorAll("button, input, img, dialog")].filter((element) => !(
            element.ariaLabel || element.alt || element.textContent.trim() || element.labels?.length
            || element.closest("dialog") && element.matches("img"))).map((element) => element.outerHTML.slice(0, 80));
    """)
    assert unnamed == []


def test_one_round_has_no_slider(page, pages, tmp_path):
    path = tmp_path / "book.html"
    final = pages[0].final
    write_storybook([Page("Alone.", (final,), final)], path, title="One", settings={})
    page.get_log("browser")
    page.get(path.as_uri())
    assert page.find_elements(By.CSS_SELECTOR, "input") == []
    page.find_element(By.CSS_SELECTOR, ".picture").click()
    assert "Frame 0 (1 of 1)" in page.find_element(By.TAG_NAME, "dialog").text
    assert page.get_log("browser") == []
