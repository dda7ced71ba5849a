"""The CLIP pair of the evaluation: a text and an image encoder of the drawn world that were trained to be compared.

They learn from drawn pictures and their captions alone, from a seed of their own, and take no part in training the model: CLIP
(arXiv 2103.00020) at a small size. Every picture has, beside its own caption, another that says a single thing of it wrong.
Train them with python -m fastory.builtin.evaluation.pair --minutes 11 --workdir DIR, measure them with --minutes 0
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from fastory.builtin.training.encoders import (
    ABSENT,
    FREE,
    ClipObjective,
    build_feature_extractor,
    label,
    pixel_values,
)
from fastory.builtin.training.loop import Batch, Objective, Plan, join, stream, train
from fastory.builtin.training.networks import PATCH_SIZE, REFERENCE_SIZE, Network
from fastory.builtin.training.tokenizer import build_tokenizer
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import ACTIONS, COLOURS, HATS, PLACES, SCARVES, SPECIES, Scene, Tale, draw
from fastory.builtin.world.looks import Said, sample_said

FOLDER = Path(__file__).with_name("pair")
SEED = 61_803
VISION, TEXT, JOINT, HEADS = 96, 64, 64, 4
SAID_SHARE = 0.6  # of captions that say something of a look
UNSAID = -1  # in a caption's labels: what it leaves open
MOST_SCALE = 100.0  # of the cosines, as in CLIP
KINDS = ("species", "place", "action", "sides", *FREE)
SLOT_SIZES = (len(SPECIES), len(ACTIONS), len(COLOURS), len(HATS), len(SCARVES))
SIZES = (2, len(PLACES), *SLOT_SIZES, *SLOT_SIZES)  # two characters?, the place, the left one, the right one


def build_pair(tokenizer: CLIPTokenizer) -> Network:
    """The untrained pair: captions of up to 40 tokens and pictures of 96 x 96 to 64 features."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=3 * TEXT,
        projection_dim=JOINT,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=TOKEN_LIMIT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=2 * VISION,
        projection_dim=JOINT,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=REFERENCE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=JOINT)
    )


@dataclass(frozen=True)
class Captioned:
    """A scene of a story as a caption tells it. said: of each member of the cast."""

    tale: Tale
    scene: Scene
    said: tuple[Said, ...]

    def labels(self) -> np.ndarray:
        """(12), in the order of SIZES; UNSAID where the caption says nothing, ABSENT for a second character that is none."""
        shown = label(self.tale, self.scene)
        slots = shown.slots.copy()
        for slot, role in enumerate(self.scene.roles):
            for column, name in enumerate(FREE, start=2):
                if name not in self.said[role.member]:
                    slots[slot, column] = UNSAID
        return np.concatenate([[len(self.scene.roles) - 1, shown.place], *slots])

    def everything(self) -> np.ndarray:
        """(12), what the picture shows: nothing is left open."""
        return replace(self, said=(frozenset(FREE),) * len(self.tale.cast)).labels()


def with_an_error(rng: np.random.Generator, frame: Captioned, kind: str) -> Captioned:
    """The same with one thing wrong. kind: one of KINDS, `sides` of two characters alone; a look that is wrong is said."""
    roles, cast = list(frame.scene.roles), list(frame.tale.cast)
    at = int(rng.integers(len(roles)))
    member = roles[at].member
    if kind == "place":
        return replace(frame, scene=replace(frame.scene, place=_other(rng, PLACES, frame.scene.place)))
    if kind == "sides":
        return replace(frame, scene=replace(frame.scene, roles=tuple(reversed(roles))))
    if kind == "action":
        roles[at] = replace(roles[at], action=_other(rng, ACTIONS, roles[at].action))
        return replace(frame, scene=replace(frame.scene, roles=tuple(roles)))
    options = SPECIES if kind == "species" else FREE[kind]
    among = [who.species for who in cast] if kind == "species" else [getattr(cast[member], kind)]
    cast[member] = replace(cast[member], **{kind: _other(rng, options, *among)})
    said = list(frame.said)
    if kind in FREE:
        said[member] = frozenset({kind, *sorted(said[member])[:1]})  # all of a look may be more than fits
    return Captioned(replace(frame.tale, cast=tuple(cast)), frame.scene, tuple(said))


def _other(rng: np.random.Generator, options: Sequence[str], *known: str) -> str:
    left = [option for option in options if option not in known]
    return left[rng.integers(len(left))]


def captioned_frames(rng: np.random.Generator, held: bool, share: float = SAID_SHARE) -> list[Captioned]:
    """Four frames of a story. held: of held-out scenes. share: of captions that say something of a look."""
    tale = sample_tale(rng, 4, 1 + int(rng.random() < 0.8), held)
    return [
        Captioned(tale, scene, sample_said(rng, len(tale.cast), share, named=True)) for scene in tale.scenes
    ]


def sentence(rng: np.random.Generator, frame: Captioned, names: tuple[str | None, ...] | None = None) -> str:
    """A caption in the grammar's words."""
    return caption(rng, frame.tale.cast, frame.scene, names, frame.said)


def is_true(captions: Tensor, pictures: Tensor) -> Tensor:
    """(P, T), whether each of T captions holds of each of P pictures, by their labels (T, 12) and (P, 12)."""
    said, shown = captions[None], pictures[:, None]
    return ((said == shown) | (said == UNSAID)).all(-1)


class PairObjective(Objective):
    """CLIP's loss, and heads on both sides that name what is there and are thrown away.

    Without them the encoders learn who stands where last of all. Captions that hold of another picture too are no
    negatives of it; the wrong captions are negatives of all pictures.
    """

    name = "pair"
    learning_rate = 2e-3
    ema_decay = 0.995

    def __init__(self, pictures: int = 64) -> None:
        super().__init__()
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        self.pair = build_pair(self.tokenizer)
        self.picture_heads, self.caption_heads = nn.Linear(VISION, sum(SIZES)), nn.Linear(TEXT, sum(SIZES))
        self.half_heads = nn.Linear(VISION, sum(SLOT_SIZES))
        self.pictures = pictures

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Pictures, a true and a wrong caption of each, and labels. As many held-out scenes as the judge learns from."""
        frames: list[Captioned] = []
        texts: list[str] = []
        wrong: list[Captioned] = []
        while len(frames) < self.pictures:
            for frame in captioned_frames(rng, held=rng.random() < 0.25):
                names = sample_names(rng, len(frame.tale.cast))
                kinds = KINDS if len(frame.scene.roles) == 2 else [kind for kind in KINDS if kind != "sides"]
                frames.append(frame)
                wrong.append(with_an_error(rng, frame, kinds[rng.integers(len(kinds))]))
                texts += [sentence(rng, frames[-1], names), sentence(rng, wrong[-1], names)]
        return {
            "pixels": pixel_values(drawn(rng, frames)),
            "ids": self._ids(texts[::2] + texts[1::2]),
            "shown": torch.from_numpy(np.stack([frame.everything() for frame in frames])),
            "said": torch.from_numpy(np.stack([frame.labels() for frame in [*frames, *wrong]])),
        }

    def _ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts, padding="longest", truncation=True, max_length=TOKEN_LIMIT, return_tensors="pt"
        )["input_ids"]

    def forward(self, batch: Batch) -> Tensor:
        seen = self.pair.vision_model(self._spoiled(batch["pixels"]), output_hidden_states=True)
        read = self.pair.text_model(batch["ids"])
        features = [
            F.normalize(project(state.pooler_output).float(), dim=-1)
            for project, state in ((self.pair.visual_projection, seen), (self.pair.text_projection, read))
        ]
        cosines = features[0] @ features[1].T
        loss = self._contrast(cosines, is_true(batch["said"], batch["shown"]))
        loss = loss + 0.3 * _named(self.picture_heads(seen.pooler_output), batch["shown"], SIZES)
        loss = loss + 0.3 * _named(self.caption_heads(read.pooler_output), batch["said"], SIZES)
        return loss + 0.3 * self._halves(seen.hidden_states[2][:, 1:], batch["shown"])

    @staticmethod
    def _spoiled(pixels: Tensor) -> Tensor:
        """Half of them between sharp and blurred; brightness and noise of all: what draws is not Pillow."""
        blurred = F.interpolate(F.avg_pool2d(pixels, 3), scale_factor=3, mode="bilinear")
        share = torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
        share = share * (torch.rand_like(share) < 0.5)
        return ClipObjective.spoiled(pixels + share * (blurred - pixels))

    def _contrast(self, cosines: Tensor, true: Tensor) -> Tensor:
        """Cross-entropy of each picture's caption among all, and of each true caption's picture."""
        count = len(cosines)
        own = torch.eye(count, cosines.shape[1], dtype=torch.bool, device=cosines.device)
        scale = self.pair.logit_scale.exp().clamp(max=MOST_SCALE)
        logits = (scale * cosines).masked_fill(true & ~own, -torch.inf)
        wanted = torch.arange(count, device=cosines.device)
        return F.cross_entropy(logits, wanted) + F.cross_entropy(logits[:, :count].T, wanted)

    def _halves(self, patches: Tensor, shown: Tensor) -> Tensor:
        """After two layers each half of a picture knows its character; a single character stands in both."""
        side = REFERENCE_SIZE // PATCH_SIZE
        patches = patches.unflatten(1, (side, side))
        left, right = shown[:, 2:7], shown[:, 7:]
        right = torch.where(right == ABSENT, left, right)
        halves = patches[:, :, : side // 2].mean((1, 2)), patches[:, :, side // 2 :].mean((1, 2))
        return torch.stack(
            [
                _named(self.half_heads(half), wanted, SLOT_SIZES)
                for half, wanted in zip(halves, (left, right), strict=True)
            ]
        ).sum()

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """(n, 64) normalised features of captions."""
        return F.normalize(
            self.pair.text_projection(self.pair.text_model(self._ids(list(texts))).pooler_output), dim=-1
        )

    @torch.no_grad()
    def pictures_seen(self, pictures: np.ndarray) -> Tensor:
        """(n, 64) normalised features of uint8 pictures (n, 128, 128, 3)."""
        pooled = [self.pair.vision_model(part).pooler_output for part in pixel_values(pictures).split(50)]
        return F.normalize(self.pair.visual_projection(torch.cat(pooled)), dim=-1)

    def sample(self, folder: Path) -> None:
        """No pictures: prints accuracies."""
        print(f"pair: {accuracies(self, pairs=100)}", flush=True)

    def finish(self, folder: Path) -> None:
        """Write the pair, its tokenizer and picture preparation as transformers reads them, fp16 files."""
        self.pair.logit_scale.data.clamp_(max=float(np.log(MOST_SCALE)))
        self.pair.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        build_feature_extractor().save_pretrained(folder)


def distinct_scenes(rng: np.random.Generator, count: int, held: bool) -> list[Captioned]:
    """Frames of as many stories, none of whose captions, which say nothing of looks, holds of another one's picture."""
    found: list[Captioned] = []
    labels: list[np.ndarray] = []
    while len(found) < count:
        frame = captioned_frames(rng, held, share=0.0)[0]
        if not any(np.array_equal(frame.labels(), other) for other in labels):
            found.append(frame)
            labels.append(frame.labels())
    return found


def accuracies(objective: PairObjective, pictures: int = 100, pairs: int = 300) -> dict[str, float]:
    """On stories of a seed of their own, as they are drawn.

    Retrieved: the share of captions (of pictures) whose nearest of so many pictures (captions) is their own. The others:
    how often a picture is nearer to a true caption than to one that has this one thing wrong; chance is 0.5.
    """
    found: dict[str, float] = {}
    rng = stream("pair, measured", SEED + 1, 0, 0)
    for name, held in (("any", False), ("held out", True)):
        frames = distinct_scenes(rng, pictures, held)
        cosines = (
            objective.pictures_seen(drawn(rng, frames))
            @ objective.captions([sentence(rng, t) for t in frames]).T
        )
        own = torch.arange(pictures, device=cosines.device)
        found[f"captions retrieved, {name}"] = (cosines.argmax(1) == own).double().mean().item()
        found[f"pictures retrieved, {name}"] = (cosines.argmax(0) == own).double().mean().item()
    for kind in KINDS:
        right: list[Captioned] = []
        wrong: list[Captioned] = []
        while len(right) < pairs:
            frame = captioned_frames(rng, held=rng.random() < 0.25, share=0.0)[0]
            if kind != "sides" or len(frame.scene.roles) == 2:
                wrong.append(with_an_error(rng, frame, kind))
                right.append(replace(frame, said=wrong[-1].said))
        seen = objective.pictures_seen(drawn(rng, right))
        near, far = (
            (seen * objective.captions([sentence(rng, t) for t in frames])).sum(1)
            for frames in (right, wrong)
        )
        found[kind] = (near > far).double().mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def drawn(rng: np.random.Generator, frames: Sequence[Captioned]) -> np.ndarray:
    """uint8 (n, 128, 128, 3)."""
    return np.stack([np.asarray(draw(frame.tale.cast, frame.scene, rng)) for frame in frames])


def _named(logits: Tensor, wanted: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cross-entropy of every question that has an answer, summed."""
    wanted = wanted.masked_fill(wanted == UNSAID, ABSENT)
    losses = [
        F.cross_entropy(part.float(), answer, ignore_index=ABSENT)
        for part, answer in zip(logits.split(tuple(sizes), -1), wanted.unbind(-1), strict=True)
        if bool((answer != ABSENT).any())
    ]
    return torch.stack(losses).sum()


def load_pair(folder: Path = FOLDER) -> PairObjective:
    """The trained pair, on the CPU."""
    objective = PairObjective()
    objective.pair = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
    return objective.eval()


def main(arguments: list[str] | None = None) -> None:
    """Train the pair and write it into --output."""
    parser = argparse.ArgumentParser(prog="python -m fastory.builtin.evaluation.pair", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=11.0, help="of processor time; 0 measures --output alone"
    )
    parser.add_argument("--workdir", type=Path, default=Path("builtin-training"))
    parser.add_argument("--output", type=Path, default=FOLDER, help="a folder")
    options = parser.parse_args(arguments)
    join(0, 1, options.workdir)
    if options.minutes:
        options.workdir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        objective = PairObjective()
        train(objective, Plan(options.workdir, options.minutes, seed=SEED, save_every=120))
        objective.finish(options.output)
    for name, value in accuracies(load_pair(options.output), pictures=200, pairs=1000).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
