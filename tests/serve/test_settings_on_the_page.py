"""Risk: a setting that came later cannot be set on the page, or shows a default that is not drawn with; a preset is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")

from fastory.presets import FAST, PRESETS
from fastory.serve.checks import check_story
from fastory.serve.pages import ELSEWHERE, defaults_of, settings_tables
from fastory.settings import MODES, Settings, foreign, resolve

BANKS = {
    "reference": 1,
    "consistent": 4,
}  # written out: the table that the page reads would agree with itself


@pytest.mark.parametrize("mode", MODES)
def test_every_setting_of_a_mode_is_offered_with_its_default(mode: str) -> None:
    rows = {row["name"]: row for row in settings_tables("builtin")["modes"][mode]}
    own = {field.name for field in fields(Settings)} - set(foreign(mode))
    assert {*rows, *ELSEWHERE} == own
    settings, _ = resolve({"mode": mode}, {}, None, defaults_of("builtin"))
    said = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(settings).items()}
    said["bank"] = BANKS.get(mode)
    assert {name: row["default"] for name, row in rows.items()} == {name: said[name] for name in rows}


@pytest.mark.parametrize("model", ["builtin", "some/checkpoint"])
def test_every_preset_that_is_offered_is_a_story_files_settings(model: str) -> None:
    offered = settings_tables(model)["presets"]
    for values in offered.values():
        story = check_story({"frames": ["a fox"], "settings": json.loads(json.dumps(values))})
        assert set(story.settings) == set(values)
    distilled = {name for name in offered if name.startswith("fast (")}
    assert len(distilled) == (0 if model == "builtin" else len(FAST))
    assert offered.keys() - distilled == PRESETS.keys() - {"fast"} - (
        {"story-iter-fast"} if model == "builtin" else set()
    )


def test_what_serves_the_page_imports_no_torch() -> None:
    """It would begin seconds later and hold 480 MiB more: the process that draws has it."""
    code = "import sys, fastory.serve.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
