"""Risk: aCCS, aFID, FID, KID or CIDS is not what the papers define: a miss counts as nothing, frame 10 comes before frame 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastory.evaluation.characters import CharacterMeasure
from fastory.evaluation.choices import BUILTIN
from fastory.evaluation.clip import Dino, open_encoder
from fastory.evaluation.detectors import THEATERGEN, GivenBoxes, GroundingDino, JudgeDetector, Thresholds
from fastory.evaluation.measures import DinoMeasure, Opened, measure
from fastory.evaluation.rows import Measured
from fastory.evaluation.stories import DrawnCharacter, DrawnStory
from fastory.evaluation.vistory import VistoryMeasure

pytest.importorskip("torchmetrics", reason="the distances: pip install .[eval]")
sqrtm = pytest.importorskip("scipy.linalg", reason="the oracle: pip install .[eval]").sqrtm

from fastory.evaluation.distances import (  # noqa: E402
    EncoderFeatures,
    SetDistance,
    features_of,
    fid_of,
    fid_to,
    kid_of,
    kid_to,
    prepared,
)

RED, GREEN, YELLOW = (255, 0, 0), (0, 255, 0), (255, 255, 0)  # cosines: red, green 0; red, yellow 1 / sqrt(2)
HALF = 0.5**0.5


class MeanColour:
    """An encoder whose features are known: the direction of a picture's mean colour."""

    name, sha256 = "mean colour", "0" * 64

    def captions(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        means = np.stack([np.asarray(image.convert("RGB"), np.float64).mean((0, 1)) for image in images])
        return torch.from_numpy(
            means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
        ).float()


def story(tmp_path: Path, colours: Sequence[tuple[int, int, int]], *cast: DrawnCharacter) -> DrawnStory:
    """Frames whose left half has a colour and whose right half is white; the cast's boxes are the left half."""
    paths = []
    for i, colour in enumerate(colours):
        picture = Image.new("RGB", (40, 20), "white")
        picture.paste(colour, (0, 0, 20, 20))
        paths.append(tmp_path / f"frame-{i:03d}.png")
        picture.save(paths[-1])
    return DrawnStory(tmp_path, "s", ("-",) * len(colours), tuple(paths), ("-",) * len(colours), tuple(cast))


def annotated(name: str, frames: Sequence[int], seen: Sequence[int], **more: Any) -> DrawnCharacter:
    return DrawnCharacter(name, name, tuple(frames), dict.fromkeys(seen, (0.0, 0.0, 0.5, 1.0)), **more)


def by_metric(rows: Sequence[Measured]) -> dict[str, Measured]:
    return {row.metric: row for row in rows if row.kind == "story"}


# Twelve frames; A is missed in 0, 1 and 7, so frame 2 is the reference; frames 10 and 11 come after it, not before.
COLOURS = [GREEN, GREEN, RED, RED, GREEN, YELLOW, RED, GREEN, RED, RED, YELLOW, GREEN]
SEEN = [2, 3, 4, 5, 6, 8, 9, 10, 11]
LATER = [0.0, 0.0, 1.0, 0.0, HALF, 1.0, 0.0, 1.0, 1.0, HALF, 0.0]  # of all frames but 2, 0 for misses


@pytest.fixture
def three(tmp_path: Path) -> Opened:
    """A as above; B has one frame; C is never detected."""
    cast = (annotated("A", range(12), SEEN), annotated("B", [3], [3]), annotated("C", [0, 1], []))
    return Opened.of(story(tmp_path, COLOURS, *cast))


def test_accs_by_hand(three: Opened) -> None:
    """A's mean over 11 comparisons, C's 0; B has no comparison, and the row says so."""
    (row,) = CharacterMeasure(MeanColour(), GivenBoxes(), None).rows(three)
    assert row.value == pytest.approx((sum(LATER) / 11 + 0.0) / 2, abs=1e-6)
    assert row.notes == {"crops": 10, "expected": 15, "misses": 5, "characters seen once": 1}


def test_one_crop_only_is_said_and_is_no_score(tmp_path: Path) -> None:
    alone = Opened.of(story(tmp_path, [RED, RED], annotated("B", [1], [1])))
    rows = list(CharacterMeasure(MeanColour(), GivenBoxes(), EncoderFeatures(MeanColour())).rows(alone))
    assert [row.value for row in rows] == [None, None]
    assert "two annotated frames" in str(rows[0].missing) and rows[0].notes["characters seen once"] == 1
    assert "fewer than two" in str(rows[1].missing)
    nobody = Opened.of(replace(alone.story, characters=()))
    (row,) = CharacterMeasure(MeanColour(), GivenBoxes(), None).rows(nobody)
    assert row.value is None and "characters:" in str(row.missing)


def test_a_picture_that_cannot_be_read_is_no_miss(three: Opened) -> None:
    """It is told elsewhere; of A the comparisons of the other frames stay."""
    three.story.pictures[4].write_bytes(b"no picture")
    one = replace(three.story, characters=three.story.characters[:1])
    (row,) = CharacterMeasure(MeanColour(), GivenBoxes(), None).rows(Opened.of(one))
    assert row.value == pytest.approx(sum(LATER) / 10, abs=1e-6) and row.notes["expected"] == 11


def scipy_fid(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1])
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    )


def test_afid_by_hand(three: Opened) -> None:
    """The later crops' colours, black (no direction) for the three misses, against red eleven times; C is left out and told."""
    _, row = CharacterMeasure(MeanColour(), GivenBoxes(), EncoderFeatures(MeanColour())).rows(three)
    direction = {RED: (1, 0, 0), GREEN: (0, 1, 0), YELLOW: (HALF, HALF, 0)}
    later = [direction[COLOURS[i]] if i in SEEN else (0, 0, 0) for i in range(12) if i != 2]
    reference = np.array([direction[RED]] * 11, float)
    # all references are equal: their covariance is zero, and so is the root of the product
    wanted = ((np.array(later) - reference).mean(0) ** 2).sum() + np.trace(
        np.cov(np.array(later), rowvar=False)
    )
    assert row.value == pytest.approx(wanted, abs=1e-5)
    assert row.notes == {"crops compared": 11, "characters never detected": 1}


def random_pictures(seed: int, count: int) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((48, 48)) for pixels in noise]


def test_fid_is_torchmetrics_with_the_module_and_scipy_s_formula() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = EncoderFeatures(open_encoder(BUILTIN))
    a, b = random_pictures(0, 9), random_pictures(1, 7)
    oracle = FrechetInceptionDistance(feature=features)
    oracle.update(prepared(a), real=False)
    oracle.update(prepared(b), real=True)
    pair = features_of(features, a), features_of(features, b)
    assert fid_of(*pair) == pytest.approx(float(oracle.compute()), rel=1e-4)
    assert features.num_features == pair[0].shape[1] == 64
    wide = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
    few, many = 2 * wide[40:] + 1, wide[:40]
    assert fid_of(many, few) == pytest.approx(scipy_fid(many.numpy(), few.numpy()), rel=1e-6)


def test_kid_is_the_unbiased_kernel_distance_of_its_subset() -> None:
    """With as many pictures in each set as in a subset, every subset is the whole set (Binkowski et al., equation 4)."""
    a, b = (torch.randn(8, 4, generator=torch.Generator().manual_seed(n)).double().numpy() for n in (0, 1))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 4 + 1) ** 3

    off = [(k.sum() - np.trace(k)) / (8 * 7) for k in (kernel(a, a), kernel(b, b))]
    wanted = sum(off) - 2 * kernel(a, b).mean()
    before = torch.random.get_rng_state()
    assert kid_of(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert kid_to(torch.from_numpy(b))(torch.from_numpy(a)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("count", "true", "width"), [(40, 30, 5), (4, 9, 16), (30, 6, 16)])
def test_what_the_jackknife_leaves_out_has_the_distance_of_torchmetrics(
    count: int, true: int, width: int
) -> None:
    """Of more and of fewer pictures than features, where the root of a covariance has fewer rows."""
    noise = torch.Generator().manual_seed(count)
    generated, real = (
        torch.randn(count, width, generator=noise),
        2 * torch.randn(true, width, generator=noise) + 1,
    )
    # torchmetrics takes the root of eigenvalues that are zero but for rounding: half of the digits
    assert fid_to(real)(generated) == pytest.approx(fid_of(generated, real), rel=1e-6)


def test_an_interval_of_fid_and_kid_is_over_stories(tmp_path: Path) -> None:
    """By hand: each of three stories left out in turn. Pictures of one story alone say nothing of another one."""

    def save(name: str, images: list[Image.Image]) -> list[Path]:
        files = [tmp_path / f"{name}-{i}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            image.save(file)
        return files

    features, real = EncoderFeatures(MeanColour()), random_pictures(9, 6)
    stories = [random_pictures(seed, count) for seed, count in ((0, 3), (1, 4), (2, 2))]
    truth, paths = save("true", real), [save(f"story-{n}", images) for n, images in enumerate(stories)]
    for metric, distance in (("fid", fid_of), ("kid", lambda a, b: kid_to(b)(a))):
        (row,) = SetDistance(features, truth, metric).rows(paths)
        others = [[image for m, story in enumerate(stories) if m != n for image in story] for n in range(3)]
        left_out = [distance(features_of(features, images), features_of(features, real)) for images in others]
        # Student's t of two degrees of freedom, and the variance's 2 (n - 1) / n of n = 3
        reach = 4.302653 * (2 / 3 * sum((one - sum(left_out) / 3) ** 2 for one in left_out)) ** 0.5
        assert row.value is not None and row.low is not None and row.high is not None
        assert row.high - row.value == pytest.approx(reach, rel=1e-5) and row.count == row.of == 9
        assert row.low == pytest.approx(
            max(0, row.value - reach) if metric == "fid" else row.value - reach, rel=1e-5
        )
        assert "jackknife" in str(row.notes["interval"])
        (alone,) = SetDistance(features, truth, metric).rows(paths[:1])
        assert alone.value is not None and alone.low is None and alone.high is None


def test_cids_occm_and_copy_paste_by_hand(tmp_path: Path) -> None:
    """Two characters in two frames: red stands left twice, green once where it should twice."""
    for name, colour in (("red", RED), ("green", GREEN)):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    cast = (
        DrawnCharacter("green", "green", (0, 1), {0: right}, (tmp_path / "green.png",)),
        DrawnCharacter("red", "red", (0, 1), {0: left, 1: left}, (tmp_path / "red.png",)),
    )
    drawn = story(tmp_path, [RED, YELLOW], *cast)
    first = Image.open(drawn.pictures[0]).convert("RGB")
    first.paste(GREEN, (20, 0, 40, 20))
    first.save(drawn.pictures[0])
    # frame 0: crops (green, red) fit; frame 1: one yellow crop, as near to both; the matching takes the first, green
    rows = by_metric(list(VistoryMeasure(MeanColour(), GivenBoxes()).rows(Opened.of(drawn))))
    assert rows["cids_cross"].value == pytest.approx(((1 + HALF) / 2 + 1) / 2, abs=1e-6)
    assert rows["cids_self"].value == pytest.approx((HALF + 1.0) / 2, abs=1e-6)
    assert rows["cids_self"].notes == {"crops": 3, "expected": 4, "single crops": 1}
    assert rows["occm"].value == pytest.approx((100 + 100 * np.exp(-1 / 2)) / 2, abs=1e-3)
    assert rows["copy_paste"].value == pytest.approx(0.5)  # one colour is its own mirror image
    none = replace(drawn, characters=tuple(replace(c, references=()) for c in cast))
    rows = by_metric(list(VistoryMeasure(MeanColour(), GivenBoxes()).rows(Opened.of(none))))
    assert rows["cids_self"].value is None and "reference pictures" in str(rows["cids_self"].missing)
    assert rows["occm"].value is not None


def test_a_copy_is_told_from_its_mirror_image(tmp_path: Path, builtin_folder: Path) -> None:
    """The reference itself, drawn again: nearer to it than to its mirror image."""
    reference = Image.linear_gradient("L").rotate(90).convert("RGB")
    reference.save(tmp_path / "reference.png")
    reference.save(tmp_path / "frame-000.png")
    whole = DrawnCharacter("x", "x", (0,), {0: (0, 0, 1, 1)}, (tmp_path / "reference.png",))
    drawn = DrawnStory(tmp_path, "s", ("-",), (tmp_path / "frame-000.png",), ("-",), (whole,))
    rows = by_metric(list(VistoryMeasure(open_encoder(BUILTIN), GivenBoxes()).rows(Opened.of(drawn))))
    assert (rows["copy_paste"].value or 0) > 0.9 and rows["cids_cross"].value == pytest.approx(1, abs=1e-5)


def test_the_judge_finds_who_is_there() -> None:
    from fastory.builtin.world.drawing import Character, Role, Scene, draw

    cast = (Character("fox", "red", "none", "none"), Character("bear", "blue", "crown", "none"))
    both = draw(cast, Scene("snow", (Role(1, "standing"), Role(0, "ball"))), np.random.default_rng(0))
    fox, bear, cat = (DrawnCharacter(n, p, (0,)) for n, p in (("f", "a vixen"), ("b", "bear"), ("c", "cat")))
    detector = JudgeDetector()
    assert detector.find(both, 0, [bear], THEATERGEN) == [(0, 0, 64, 128)]
    assert detector.find(both, 0, [fox], THEATERGEN) == [(64, 0, 128, 128)]
    assert detector.find(both, 0, [cat], THEATERGEN) == []
    assert len(detector.find(both, 0, [fox, bear], THEATERGEN)) == 2


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Grounding DINO."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "fox", "bear"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=7,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_feature_levels=4,
        max_text_len=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def test_grounding_dino_gives_the_boxes_over_both_thresholds_in_its_queries_order(
    grounding_dino: Path,
) -> None:
    """Against the model's own outputs: the sigmoid of a query's best word, and its box as centre and size."""
    detector = GroundingDino(str(grounding_dino), offline=True)
    image = random_pictures(3, 1)[0].resize((60, 40))
    seen = [DrawnCharacter("a", "a red fox", (0,)), DrawnCharacter("b", "Bear", (0,))]
    inputs = detector.processor(images=image, text="fox. bear.", return_tensors="pt")
    with torch.no_grad():
        out = detector.model(**inputs)
    scores = out.logits[0].sigmoid().max(-1).values
    middle = float(scores.sort().values[3])
    found = detector.find(image, 0, seen, Thresholds(middle, 0.0))
    kept = (scores > middle).nonzero()[:, 0].tolist()
    assert len(found) == len(kept) == 3
    for box, query in zip(found, kept, strict=True):
        x, y, w, h = out.pred_boxes[0, query].tolist()
        wanted = [(x - w / 2) * 60, (y - h / 2) * 40, (x + w / 2) * 60, (y + h / 2) * 40]
        clipped = [min(max(v, 0), side) for v, side in zip(wanted, (60, 40, 60, 40), strict=True)]
        np.testing.assert_allclose(box, clipped, atol=1)
    assert detector.find(image, 0, seen, Thresholds(1.0, 1.0)) == []
    assert len(detector.sha256) == 64


def test_dino_is_the_mean_cosine_of_class_tokens(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    size = {"shortest_edge": 28}
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    processor = BitImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    drawn = story(tmp_path, [RED, GREEN, YELLOW])
    images = [Image.open(path).convert("RGB") for path in drawn.pictures]
    with torch.no_grad():
        tokens = model(processor(images, return_tensors="pt").pixel_values).last_hidden_state[:, 0]
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    wanted = np.mean([float(tokens[i] @ tokens[j]) for i in range(3) for j in range(3) if i != j])
    rows = list(measure([drawn], [DinoMeasure(Dino(str(tmp_path / "dino")))]))
    assert by_metric(rows)["dino"].value == pytest.approx(wanted, abs=1e-5)
