"""The judge of the evaluation: a small network that names what a picture shows.

It learns from drawn pictures alone, from its own seed, and takes no part in training the model. Train it with
python -m fastory.builtin.evaluation.classifier --minutes 20 --workdir DIR
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastory.builtin.training.autoencoder import to_tensor
from fastory.builtin.training.encoders import ABSENT, label
from fastory.builtin.training.loop import Batch, Objective, Plan, join, train
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import ACTIONS, COLOURS, HATS, PLACES, SCARVES, SPECIES, draw

FILE = Path(__file__).with_name("classifier.safetensors")
SEED = 90_210
SLOT = {"species": SPECIES, "action": ACTIONS, "colour": COLOURS, "hat": HATS, "scarf": SCARVES}


@dataclass(frozen=True)
class Seen:
    """What the judge sees in n pictures: indices as in the world's tuples.

    two (n): whether there are two characters; place (n); slots[name] (n, 2): left and right, the left one is the only
    one where two is False.
    """

    two: np.ndarray
    place: np.ndarray
    slots: dict[str, np.ndarray]


class Classifier(nn.Module):
    """Four strided convolutions on 64 x 64 pixels, then one layer that knows positions, then a head per question."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after, kernel, stride in (
            (3, 24, 5, 2),
            (24, 48, 3, 2),
            (48, 48, 3, 1),
            (48, 96, 3, 2),
            (96, 96, 3, 1),
        ):
            convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            blocks += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*blocks, nn.Conv2d(96, 48, 1), nn.Flatten(), nn.Dropout(0.1))
        self.hidden = nn.Sequential(nn.Linear(48 * 64, 384), nn.ReLU())
        self.sizes = [
            2,
            len(PLACES),
            *(len(options) for options in SLOT.values()),
            *(len(o) for o in SLOT.values()),
        ]
        self.heads = nn.Linear(384, sum(self.sizes))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures (B, 3, 128, 128) in -1..1 to logits: two characters?, place, five of the left, five of the right."""
        hidden = self.hidden(self.features(F.avg_pool2d(pictures, 2)))
        return list(self.heads(hidden).split(self.sizes, -1))

    @torch.no_grad()
    def see(self, pictures: np.ndarray) -> Seen:
        """Judge uint8 pictures (n, 128, 128, 3)."""
        parts = [self(part) for part in to_tensor(pictures).split(64)]
        answers = [torch.cat(column).argmax(-1).numpy() for column in zip(*parts, strict=True)]
        pairs = zip(SLOT, zip(answers[2:7], answers[7:], strict=True), strict=True)
        slots = {name: np.stack(pair, 1) for name, pair in pairs}
        return Seen(answers[0].astype(bool), answers[1], slots)


def load_classifier(file: Path = FILE) -> Classifier:
    """The trained judge, on the CPU, in evaluation mode."""
    classifier = Classifier()
    classifier.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()}
    )
    return classifier.eval()


def drawn_and_labelled(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawn pictures of all scenes, held-out ones too, and their answers (count, 12) in the order of the heads.

    The judge may see every scene: what is held out is held out from the model that is judged.
    """
    pictures: list[np.ndarray] = []
    answers: list[list[int]] = []
    while len(pictures) < count:
        held = rng.random() < 0.25
        tale = sample_tale(rng, 4, 1 + int(rng.random() < 0.6), held)
        for scene in tale.scenes:
            labels = label(tale, scene)
            pictures.append(np.asarray(draw(tale.cast, scene, rng)))
            answers.append([int(len(scene.roles) == 2), labels.place, *labels.slots[0], *labels.slots[1]])
    return np.stack(pictures[:count]), np.array(answers[:count])


class ClassifierObjective(Objective):
    """Cross-entropy of every question; noise, blur, brightness and tint as augmentation."""

    name = "classifier"
    learning_rate = 2e-3
    ema_decay = 0.995

    def __init__(self, pictures: int = 64) -> None:
        super().__init__()
        self.classifier = Classifier()
        self.pictures = pictures

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Drawn pictures and answers."""
        pictures, answers = drawn_and_labelled(rng, self.pictures)
        return {"pictures": to_tensor(pictures), "answers": torch.from_numpy(answers)}

    def forward(self, batch: Batch) -> Tensor:
        pictures, rows = batch["pictures"], len(batch["pictures"])
        blurred = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4, mode="bilinear")
        share = torch.rand(rows, 1, 1, 1) * (torch.rand(rows, 1, 1, 1) < 0.5)
        pictures = pictures + share.to(pictures.device) * (blurred - pictures)
        pictures = pictures * (0.9 + 0.2 * torch.rand(rows, 1, 1, 1, device=pictures.device))
        pictures = pictures + 0.1 * (torch.rand(rows, 3, 1, 1, device=pictures.device) - 0.5)
        pictures = pictures + 0.15 * torch.rand(rows, 1, 1, 1, device=pictures.device) * torch.randn_like(
            pictures
        )
        columns = zip(self.classifier(pictures), batch["answers"].unbind(1), strict=True)
        return torch.stack([F.cross_entropy(a.float(), w, ignore_index=ABSENT) for a, w in columns]).sum()

    def sample(self, folder: Path) -> None:
        """No pictures: prints accuracies. The averaged weights need the batch statistics as they are."""
        training = self.classifier.training
        print(
            f"classifier: {accuracies(self.classifier.eval(), *drawn_and_labelled(np.random.default_rng(6), 600))}"
        )
        self.classifier.train(training)

    def finish(self, folder: Path) -> None:
        """Write fp16 weights to folder/classifier.safetensors."""
        weights = {
            k: v.half() if v.is_floating_point() else v for k, v in self.classifier.state_dict().items()
        }
        save_file(weights, folder / FILE.name)


def accuracies(classifier: Classifier, pictures: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Share of right answers per question, for frames with one and with two characters: keys such as `hat 2`."""
    seen, found = classifier.see(pictures), {}
    for count, rows in ((1, answers[:, 0] == 0), (2, answers[:, 0] == 1)):
        found[f"count {count}"] = np.mean(seen.two[rows] == answers[rows, 0])
        found[f"place {count}"] = np.mean(seen.place[rows] == answers[rows, 1])
        for column, name in enumerate(SLOT):
            wanted = np.stack([answers[rows, 2 + column], answers[rows, 7 + column]], 1)
            right = seen.slots[name][rows] == wanted
            found[f"{name} {count}"] = np.mean(right[wanted != ABSENT])
    return {name: round(float(value), 4) for name, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train the judge and write it into --output."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.evaluation.classifier", description=__doc__
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workdir", type=Path, default=Path("builtin-training"))
    parser.add_argument("--output", type=Path, default=FILE.parent, help="a folder")
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    join(0, 1, options.workdir)
    torch.manual_seed(SEED)
    objective = ClassifierObjective()
    train(objective, Plan(options.workdir, options.minutes, seed=SEED, save_every=60))
    objective.sample(options.workdir)
    objective.finish(options.output)


if __name__ == "__main__":
    main()
