"""A checkpoint that is incomplete, damaged, dangerous or not understood to its last key leaves nothing that looks finished."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from original_causal_layout import bert_tokenizer, weights, write_checkpoint, write_config
from torch import Tensor
from typer.testing import CliRunner

from fastory import InputError, StoryModel
from fastory.checkpoints import convert_checkpoint
from fastory.checkpoints.writing import RECORD
from fastory.cli import app
from fastory.files import MARK

QUERY = "vae.encoder.mid_block.attentions.0.query.bias"
LIMIT = 10_000_000  # bytes: the UNet's file is larger, all others are smaller


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    return weights()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("config"))


def refuse(wanted: str, *arguments: str) -> None:
    """Run `fastory convert`; exit code 2, one message that says `wanted`, and nothing written."""
    before = contents()
    run = CliRunner().invoke(app, ["convert", *(arguments or ("story.ckpt", "model", "--config", "config"))])
    message = re.sub(r"\s+", " ", run.stderr)
    assert run.exit_code == 2, run.output
    assert wanted in message, message
    assert "Traceback" not in run.output
    assert contents() == before


def contents() -> dict[Path, tuple[int, int]]:
    """Every file and folder here, with its size and the time of its last change."""
    found = {path: path.stat() for path in Path().rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


@pytest.mark.parametrize(
    ("lost", "wanted"),
    [
        (QUERY, f"1 key is missing ({QUERY})"),
        ("unet.mid_block.resnets.1.", "keys are missing (unet.mid_block.resnets.1.norm1.weight, "),
        ("unet.conv_in.weight", "the key unet.conv_in.weight is missing"),
        ("vae.", "the key vae.encoder.down_blocks.0.* is missing"),
        ("mm_encoder.visual_encoder.", "mm_encoder.visual_encoder.patch_embed.proj.weight is missing"),
        (
            "mm_encoder.visual_encoder.blocks.0.norm1.",
            "2 keys are missing (mm_encoder.visual_encoder.blocks.0",
        ),
        ("mm_encoder.text_encoder.encoder.layer.1.output.dense.bias", "1 key is missing (mm_encoder.text"),
        ("modal_type_embeddings.weight", "1 key is missing (modal_type_embeddings.weight)"),
        ("time_embeddings.weight", "the key time_embeddings.weight is missing"),
        (
            "text_encoder.text_model.final_layer_norm.weight",
            "1 key is missing (text_encoder.text_model.final",
        ),
    ],
)
def test_missing_keys(given: dict[str, Tensor], lost: str, wanted: str) -> None:
    left = {name: tensor for name, tensor in given.items() if not name.startswith(lost)}
    write_checkpoint(Path("story.ckpt"), left)
    refuse(wanted)


@pytest.mark.parametrize(
    "name",
    [
        "unet.mid_block.attentions.0.extra.weight",
        "mm_encoder.visual_encoder.head.weight",
        "mm_encoder.text_encoder.pooler.dense.weight",
        "text_null.projection.weight",
        "vae.encoder.mid_block.attentions.0.to_q.bias",  # there under its old name already
        "another.weight",
        "inception",
    ],
)
def test_unknown_keys(given: dict[str, Tensor], name: str) -> None:
    write_checkpoint(Path("story.ckpt"), given | {name: torch.zeros(3)})
    refuse(f"1 key is unknown ({name})")


def test_many_keys_are_counted_and_the_first_ones_named(given: dict[str, Tensor]) -> None:
    left = {name: tensor for name, tensor in given.items() if ".up_blocks." not in name[:15]}
    more = {f"ema.{n}": torch.zeros(1) for n in range(7)}
    odd = {"modal_type_embeddings.weight": torch.zeros(3, 128)}
    write_checkpoint(Path("story.ckpt"), {**given, **more, **odd})
    refuse("7 keys are unknown (ema.0, ema.1, ema.2, ema.3, ema.4, ...)")
    refuse("1 key is of another shape (modal_type_embeddings.weight (3, 128) for (2, 128))")
    write_checkpoint(Path("story.ckpt"), left)
    refuse("the key unet.up_blocks.0.* is missing")


class RunsWhenRead:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_program_in_a_checkpoint_is_refused_and_not_run(given: dict[str, Tensor], legacy: bool) -> None:
    held: dict[str, Any] = {"state_dict": given, "hyper_parameters": RunsWhenRead()}
    torch.save(held, "story.ckpt", _use_new_zipfile_serialization=not legacy)
    refuse("could run any program")
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint(given: dict[str, Tensor], share: float) -> None:
    path = write_checkpoint(Path("story.ckpt"), given)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuse("story.ckpt cannot be read")


def test_checkpoint_in_torchs_old_format(given: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": given}, "story.ckpt", _use_new_zipfile_serialization=False)
    assert StoryModel.open(
        str(convert_checkpoint(Path("story.ckpt"), config=Path("config")))
    ).checkpoint.history


def test_tokenizers_of_another_size(given: dict[str, Tensor]) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    embedding = "mm_encoder.text_encoder.embeddings.word_embeddings.weight"
    count = len(given[embedding])
    bert_tokenizer([]).save_pretrained("config/blip_tokenizer")
    refuse(f"blip_tokenizer has {count - 3} tokens, and the checkpoint's embedding {count}")
    write_config(Path("config"))
    words = "text_encoder.text_model.embeddings.token_embedding.weight"
    rows = len(given[words])
    write_checkpoint(Path("story.ckpt"), {**given, words: torch.zeros(rows + 4, 128)})
    refuse(f"tokenizer has {rows} tokens, and the checkpoint's embedding {rows + 4}")


def test_tokenizer_without_blips_own_token(given: dict[str, Tensor]) -> None:
    from transformers import BertTokenizer

    write_checkpoint(Path("story.ckpt"), given)
    words = list(bert_tokenizer().get_vocab().items())
    vocabulary = {("[OTHER]" if word == "[ENC]" else word): index for word, index in words}
    BertTokenizer(vocab=vocabulary).save_pretrained("config/blip_tokenizer")
    refuse("has no token [ENC]")


def test_what_is_there_is_kept_unless_asked(given: dict[str, Tensor]) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    Path("model").mkdir()
    Path("model/mine.txt").write_text("mine")
    refuse("model exists; give another output, or --overwrite")
    refuse("model has no fastory_converted.json", "story.ckpt", "model", "--config", "config", "--overwrite")
    refuse("OUT is model and --output other", "story.ckpt", "model", "-o", "other")
    refuse("becomes a folder, not a file", "story.ckpt", "model.safetensors", "--config", "config")
    refuse("cannot be written", "story.ckpt", "nowhere/model", "--config", "config")
    refuse("--config nothing is not a folder", "story.ckpt", "other", "--config", "nothing")
    first = convert_checkpoint(Path("story.ckpt"), Path("first"), config=Path("config"))
    (first / "mine.txt").write_text("mine")
    shift = {"time_embeddings.weight": given["time_embeddings.weight"] + 1}
    write_checkpoint(Path("story.ckpt"), given | shift)
    refuse("first holds mine.txt", "story.ckpt", "first", "--config", "config", "--overwrite")
    (first / "mine.txt").unlink()
    (first / RECORD).rename("kept")
    refuse("first has no fastory_converted.json", "story.ckpt", "first", "--config", "config", "--overwrite")
    Path("kept").rename(first / RECORD)
    convert_checkpoint(Path("story.ckpt"), first, config=Path("config"), overwrite=True)
    encoder = StoryModel.open("first").require_history().encoder
    assert torch.equal(encoder.time_embeddings.weight, shift["time_embeddings.weight"])
    assert sorted(path.name for path in Path().iterdir()) == ["config", "first", "model", "story.ckpt"]


def test_the_checkpoint_itself_is_never_overwritten(given: dict[str, Tensor]) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))
    Path("story.ckpt").rename("model/story.ckpt")
    refuse("story.ckpt lies in model", "model/story.ckpt", "model", "--config", "config", "--overwrite")


# Writing stops where a file grows over the limit: as a full disk would stop it, or dead on the spot.
LIMITED = """
import resource, signal, sys
if sys.argv[1] == "killed":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
from fastory.cli import app
app(["convert", "story.ckpt", "model", "--config", "config", "--overwrite"])
"""


def limited(how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, how, str(LIMIT)], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
@pytest.mark.parametrize(
    "there", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "overwrite"]
)
def test_a_disk_that_is_full(given: dict[str, Tensor], there: bool) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    if there:
        convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))
    before = contents()
    ended = limited("full")
    assert ended.returncode == 1, ended.stderr
    assert "model could not be written" in ended.stderr and "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
def test_killed_while_it_writes(given: dict[str, Tensor]) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    ended = limited("killed")
    assert ended.returncode < 0, ended.stderr
    assert not Path("model").exists()
    left = Path("model.unfinished")
    assert list(left.rglob("*.safetensors")), "it was to die half-way, not before"
    for folder in (left, left / "new"):
        with pytest.raises(InputError, match="not a diffusers model folder"):
            StoryModel.open(str(folder))
    StoryModel.open(str(convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))))
    assert sorted(path.name for path in Path().iterdir()) == ["config", "model", "story.ckpt"]


def test_killed_before_the_new_folder_took_the_old_ones_place(given: dict[str, Tensor]) -> None:
    """The old folder comes back, and is replaced only by who asks for it."""
    write_checkpoint(Path("story.ckpt"), given)
    convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))
    Path("model/mine.txt").write_text("mine")
    Path("model.unfinished/new").mkdir(parents=True)
    Path("model.unfinished", MARK).touch()
    Path("model").rename("model.unfinished/old")
    with pytest.raises(InputError, match="model exists; give another output, or --overwrite"):
        convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))
    assert Path("model/mine.txt").read_text() == "mine"
    assert not Path("model.unfinished").exists()
    Path("model/mine.txt").unlink()
    before = contents()
    convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))  # it is what it would become
    assert contents() == before


def test_converted_files_can_be_read_by_whom_the_umask_says(given: dict[str, Tensor]) -> None:
    write_checkpoint(Path("story.ckpt"), given)
    old = os.umask(0o027)
    try:
        folder = convert_checkpoint(Path("story.ckpt"), Path("model"), config=Path("config"))
    finally:
        os.umask(old)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o640)}
    assert folder.stat().st_mode & 0o777 == 0o750
