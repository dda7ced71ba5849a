"""The pictures of the README, drawn anew: `python bench/gallery.py [--out fastory/builtin/gallery]`.

sheet.png and storybook.png are the bundled story's, page.png is `fastory serve` with a bundled story of two characters, one
frame of it locked; all with the shipped weights and their defaults. Chromium, chromedriver and .[test] are needed. The
pictures are saved with 256 colours: a repository keeps every version of them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from selenium import webdriver

from fastory import Story, generate
from fastory.builtin import EXAMPLES

GALLERY = Path(__file__).parents[1] / "fastory" / "builtin" / "gallery"
WIDTH = 1280  # CSS pixels of both pages
PAGE_HEIGHT, ROUNDS = 628, 4


def browser() -> Any:
    """Chromium without a screen."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def screenshot(driver: Any, height: int | None) -> Image.Image:
    """The page as it is, or all of it."""
    size = {"width": WIDTH, "height": height or 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    if height is None:
        size["height"] = driver.execute_script("return document.documentElement.scrollHeight")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(1)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png()))


def save(picture: Image.Image, path: Path, colours: int) -> None:
    """As a PNG with a palette."""
    picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes")


def bundled(folder: Path, out: Path, driver: Any) -> None:
    """The contact sheet and the storybook of the story that `fastory generate` draws."""
    list(generate(Story.read(EXAMPLES["flag"]), output=folder / "run", progress=True))
    sheet = Image.open(folder / "run" / "sheet.png")
    sheet.thumbnail((1104, 8192), Image.Resampling.LANCZOS)
    save(sheet, out / "sheet.png", 256)
    driver.get((folder / "run" / "storybook.html").as_uri())
    save(screenshot(driver, None), out / "storybook.png", 256)


def served(folder: Path, out: Path, driver: Any) -> None:
    """The page of `fastory serve`."""
    command = [sys.executable, "-m", "fastory", "serve", str(folder / "stories"), "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            parts = urlsplit(address)
            token = parse_qs(parts.query)["token"][0]

            def ask(method: str, path: str, body: Any = None) -> Any:
                data = None if body is None else json.dumps(body).encode()
                request = urllib.request.Request(f"http://{parts.netloc}{path}", data, method=method)
                request.add_header("Authorization", f"Bearer {token}")
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)

            read = Story.read(EXAMPLES["friends"])
            said = {
                "title": read.title,
                "characters": {character.name: {"prompt": character.prompt} for character in read.characters},
                "frames": [frame.caption for frame in read.frames],
                "settings": {"iterations": ROUNDS},
            }
            story = ask("POST", "/stories", {"story": said, "draw": True})["id"]
            while (state := ask("GET", f"/stories/{story}"))["state"] != "finished":
                if state["error"]:
                    raise RuntimeError(state["error"])
                time.sleep(1)
            ask("PATCH", f"/stories/{story}", {"locked": [0]})
            driver.get(address)
            driver.get(f"http://{parts.netloc}/#/{story}")
            time.sleep(2)
            save(screenshot(driver, PAGE_HEIGHT), out / "page.png", 256)
            driver.get("about:blank")  # its stream of events ends before the server does
        finally:
            process.terminate()


def main() -> int:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=GALLERY)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    driver = browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundled(Path(folder), options.out, driver)
            served(Path(folder), options.out, driver)
    finally:
        driver.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
