"""The adapter stage: references beside the text, the UNet trained on with them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastory.builtin.training.characters import GROUPS, GroupedAdapter, masks_of, whole_picture
from fastory.builtin.training.denoiser import FRAMES, Corpus, Drawn, UnetObjective
from fastory.builtin.training.encoders import pixel_values
from fastory.builtin.training.loop import Batch, stream
from fastory.builtin.training.networks import REFERENCE_TOKENS, WIDTH, Network
from fastory.builtin.world.captions import caption
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import Character, Tale
from fastory.builtin.world.looks import ATTRIBUTES, Said

REFERENCES = 6  # slots of a group; fewer references are repeated, which leaves a softmax over them unchanged
TEXT_ALONE = 0.35  # of the batches
WEIGHTS = 0.6, 1.5  # of references, in units of TRAINED_SCALE: the schedules that ship use 0.6 to 1.4
CONTRADICTED = (
    0.3  # of the characters of which a caption says something: their references show another look there
)
BY_CHARACTER = 0.6  # of the frames of two species: references in a group for each character
Place = tuple[int, ...]
"""A story, a frame of it and, where a character is meant, its slot."""
TRAINED_SCALE = 0.5  # the weight of references at which the adapter was trained, in the files


class AdapterObjective(UnetObjective):
    """References beside the text, the UNet trained on with them.

    The adapter has the standard layout and the standard place in the computation; unlike a plug-in adapter it does not
    meet a frozen UNet, because every third batch has text alone (weight 0), which keeps round 0 as it was.
    References are other frames of the story, some from the autoencoder as in a run. In half of the larger sets a
    minority are strangers of the same species: the adapter must learn to follow the majority. In most frames they are a
    group for each character, which reaches its own part of the picture, as in a run with regions. Where a caption says
    something of a look, references may all show something else there: what is said is drawn, the rest is theirs.
    """

    name = "adapter"
    learning_rate = 8e-4
    high_noise = 0.5

    def __init__(self, unet: Network, image_encoder: Network, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.unet._load_ip_adapter_weights([fresh_adapter(unet)])
        for processor in adapter_processors(self.unet):
            processor.__class__ = GroupedAdapter
        self.unet.requires_grad_(True)
        self._frozen.append(image_encoder.eval().requires_grad_(False))
        self.alike, self.members = _frames_by_species(self.corpus), _members_by_species(self.corpus)
        self.kin = {
            species: [place for _, places in members for place in places]
            for species, members in self.members.items()
        }

    def _references(self, rng: np.random.Generator, drawn: Drawn) -> Batch:
        """Embeddings (B, 3 * 6, 128) of three groups, zeros where references are dropped, where each group reaches
        (B, 3, 16, 16), and the batch's weight: near 0 is text alone.

        Not 0 itself: the adapter's parameters would miss their gradients.
        """
        rows, masks = zip(
            *(
                self._grouped(rng, int(story), int(frame), said)
                for story, frame, said in zip(drawn.stories, drawn.frames, drawn.looks, strict=True)
            ),
            strict=True,
        )
        embeddings = np.stack(rows).astype(np.float32).reshape(len(rows), -1, WIDTH)
        # Half of the frames without references are also without caption: guidance's empty half sees both missing.
        embeddings[(drawn.dropped > 0.04) & (drawn.dropped < 0.16)] = 0
        weight = 1e-6 if rng.random() < TEXT_ALONE else rng.uniform(*WEIGHTS)
        return {
            "references": torch.from_numpy(embeddings),
            "masks": torch.stack(masks),
            "weight": torch.tensor(weight, dtype=torch.float32),
        }

    def _grouped(
        self, rng: np.random.Generator, story: int, frame: int, said: tuple[Said, ...]
    ) -> tuple[np.ndarray, Tensor]:
        """References of a frame, (3, 6, 128), and where they reach, (3, 16, 16): its story's, or one group a character."""
        tale, groups = self.corpus.tales[story], np.zeros((GROUPS, REFERENCES, WIDTH), np.float32)
        roles = tale.scenes[frame].roles
        groups[0] = self._reference_row(rng, story, frame, said)
        if not tale.alike and rng.random() > BY_CHARACTER:
            return groups, whole_picture(0)
        for number, role in enumerate(roles, 1):
            groups[number] = self._own_row(rng, story, frame, role.member, said[role.member])
        if len(roles) == 1:
            return groups, whole_picture(1)
        boxes = [tuple(box) for box in self.corpus.boxes[story, frame].astype(float)]
        return groups, masks_of(rng, boxes)

    def _own_row(
        self, rng: np.random.Generator, story: int, frame: int, member: int, said: Said
    ) -> np.ndarray:
        """A character's appearances in other frames, (6, 128); zeros if there are none. A minority may be strangers.

        said: of the character, in which another whose appearances these are may differ from it.
        """
        tale = self.corpus.tales[story]
        if shown := self._contradicting(rng, tale.cast[member], said):
            return _repeated(self.corpus.own, _some(rng, shown))
        others = [place for place in _appearances(tale, member) if place[0] != frame]
        if not others:
            return np.zeros((REFERENCES, WIDTH), np.float32)
        count = int(rng.choice([n for n in (1, 2, 3, 6, 6) if n <= len(others)]))
        chosen: list[Place] = [(story, *others[i]) for i in rng.permutation(len(others))[:count]]
        if count >= 3 and rng.random() < 0.5:
            for position in range(1 if count == 3 else int(rng.integers(1, 3))):
                chosen[position] = _elsewhere(rng, self.kin[tale.cast[member].species], chosen[position])
        return _repeated(self.corpus.own, chosen)

    def _contradicting(self, rng: np.random.Generator, character: Character, said: Said) -> list[Place]:
        """Now and then where another of the species is, that looks as `character` but for something of what is said."""
        if not said or rng.random() >= CONTRADICTED:
            return []
        unsaid = [name for name in ATTRIBUTES if name not in said]
        found = [
            places
            for body, places in self.members[character.species]
            if body != character and all(getattr(body, name) == getattr(character, name) for name in unsaid)
        ]
        return found[rng.integers(len(found))] if found else []

    def _reference_row(
        self, rng: np.random.Generator, story: int, frame: int, said: tuple[Said, ...]
    ) -> np.ndarray:
        tale = self.corpus.tales[story]
        if len(tale.cast) == 1:
            shown = self._contradicting(rng, tale.cast[0], said[0])
            alone = [(s, f) for s, f, _ in shown if len(self.corpus.tales[s].scenes[f].roles) == 1]
            if alone:
                return _repeated(self.corpus.embeddings, _some(rng, alone))
        count = int(rng.choice((1, 2, 3, 6, 6)))
        chosen = rng.permutation([other for other in range(FRAMES) if other != frame])[:count]
        places: list[Place] = [(story, int(other)) for other in chosen]
        if count >= 3 and rng.random() < 0.5:
            for position in range(1 if count == 3 else int(rng.integers(1, 3))):
                places[position] = self._stranger(rng, *places[position])
        return _repeated(self.corpus.embeddings, places)

    def _stranger(self, rng: np.random.Generator, story: int, frame: int) -> Place:
        """A frame of another story with the same species, and only them."""
        return _elsewhere(rng, self.alike[_species_of(self.corpus.tales[story], frame)], (story, frame))

    def _conditions(self, batch: Batch) -> dict[str, object]:
        self._set_weight(batch["weight"].item())
        return {
            "added_cond_kwargs": {"image_embeds": [batch["references"]]},
            "cross_attention_kwargs": {"ip_adapter_masks": batch["masks"]},
        }

    def _set_weight(self, weight: float) -> None:
        """The weight of references in every cross-attention, in units of the trained one."""
        for processor in adapter_processors(self.unet):
            processor.scale = [weight]

    def _guided_references(
        self, references: Tensor | None, rows: int, scale: float, device: torch.device
    ) -> dict:
        if references is None:
            references, scale = torch.zeros(rows, 1, WIDTH), 0.0
        self._set_weight(scale / TRAINED_SCALE)
        both = torch.cat([torch.zeros_like(references), references]).to(device)
        return {"added_cond_kwargs": {"image_embeds": [both]}}

    def sample(self, folder: Path) -> None:
        """Stories drawn in three rounds with the frames of the round before as references, adapter.png."""
        rng = np.random.default_rng(4)
        rows: list[np.ndarray] = []
        for index in range(4):
            tale = sample_training_tale(stream("sample", 2, 0, index), FRAMES)
            texts = [caption(rng, tale.cast, scene) for scene in tale.scenes]
            pictures = self.denoise(texts, seed=index)
            rows.append(np.concatenate(list(pictures), 1))
            for scale in (0.4, 0.5):
                embeddings = (
                    self._frozen[1]
                    .to(self.unet.device)(pixel_values(pictures).to(self.unet.device))
                    .image_embeds
                )
                others = [torch.cat([embeddings[:i], embeddings[i + 1 :]]) for i in range(FRAMES)]
                pictures = self.denoise(texts, index, torch.stack(others).cpu(), scale)
            rows.append(np.concatenate(list(pictures), 1))
        Image.fromarray(np.concatenate(rows)).save(folder / "adapter.png")

    def finish(self, folder: Path) -> None:
        """Write what the unet stage does, and the adapter with its weight folded into to_v_ip."""
        super().finish(folder)
        adapter = {
            f"{part}.{k}": v for part, tensors in self._adapter_state().items() for k, v in tensors.items()
        }
        for key in adapter:
            # to_v_ip has no bias, so a factor on it is a factor on the weight of the references.
            adapter[key] = (
                (adapter[key] / (TRAINED_SCALE if "to_v_ip" in key else 1)).detach().cpu().contiguous()
            )
        (folder / "ip_adapter").mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / "ip_adapter" / "ip_adapter.safetensors")

    def _plain_unet(self) -> Network:
        plain = UNet2DConditionModel.from_config({**self.unet.config, "encoder_hid_dim_type": None})
        plain.load_state_dict({k: v for k, v in self.unet.state_dict().items() if not _of_adapter(k)})
        return plain

    def _adapter_state(self) -> dict[str, dict[str, Tensor]]:
        layer = self.unet.encoder_hid_proj.image_projection_layers[0]
        projection = {"proj.weight": layer.image_embeds.weight, "proj.bias": layer.image_embeds.bias}
        projection |= {"norm.weight": layer.norm.weight, "norm.bias": layer.norm.bias}
        attention: dict[str, Tensor] = {}
        for number, processor in enumerate(adapter_processors(self.unet)):
            attention[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            attention[f"{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
        return {"image_proj": projection, "ip_adapter": attention}


def _some(rng: np.random.Generator, places: Sequence[Place]) -> list[Place]:
    """One, two, three or six of `places`, in any order."""
    count = int(rng.choice([n for n in (1, 2, 3, 6) if n <= len(places)]))
    return [places[i] for i in rng.permutation(len(places))[:count]]


def _repeated(table: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """The rows of `places`, repeated to fill a group, (6, 128)."""
    return np.tile(np.stack([table[place] for place in places]), (REFERENCES // len(places), 1))


def _elsewhere(rng: np.random.Generator, pool: list[Place], place: Place) -> Place:
    """One of `pool` from another story than `place`; `place` itself where there is hardly any."""
    found = (pool[rng.integers(len(pool))] for _ in range(8))
    return next((other for other in found if other[0] != place[0]), place)


def _of_adapter(key: str) -> bool:
    return "encoder_hid_proj" in key or "_ip." in key


def adapter_processors(unet: Network) -> Iterator[Network]:
    """The processors of the cross-attention layers, in the order of the adapter file's numbers."""
    return (processor for processor in unet.attn_processors.values() if hasattr(processor, "to_k_ip"))


def fresh_adapter(unet: Network) -> dict[str, dict[str, Tensor]]:
    """The start: text's own K and V projections, V made small so that the references begin as a whisper."""
    weights = unet.state_dict()
    attention: dict[str, Tensor] = {}
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for number, layer in enumerate(layers):
        attention[f"{2 * number + 1}.to_k_ip.weight"] = weights[f"{layer}.to_k.weight"].clone()
        attention[f"{2 * number + 1}.to_v_ip.weight"] = weights[f"{layer}.to_v.weight"].clone() * 0.1
    projection = {
        "proj.weight": torch.randn(REFERENCE_TOKENS * WIDTH, WIDTH) * WIDTH**-0.5,
        "proj.bias": torch.zeros(REFERENCE_TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def _species_of(tale: Tale, frame: int) -> frozenset[str]:
    return frozenset(tale.cast[role.member].species for role in tale.scenes[frame].roles)


def _appearances(tale: Tale, member: int) -> list[tuple[int, int]]:
    """(frame, slot) of a member of the cast."""
    return [
        (frame, slot)
        for frame, scene in enumerate(tale.scenes)
        for slot, role in enumerate(scene.roles)
        if role.member == member
    ]


def _members_by_species(corpus: Corpus) -> dict[str, list[tuple[Character, list[Place]]]]:
    """Everybody that a story shows, with each (story, frame, slot), by species."""
    found: dict[str, list[tuple[Character, list[Place]]]] = {}
    for story, tale in enumerate(corpus.tales):
        for member, character in enumerate(tale.cast):
            places: list[Place] = [(story, *place) for place in _appearances(tale, member)]
            if places:
                found.setdefault(character.species, []).append((character, places))
    return found


def _frames_by_species(corpus: Corpus) -> dict[frozenset[str], list[Place]]:
    """All (story, frame) by the set of species that the frame shows."""
    found: dict[frozenset[str], list[Place]] = {}
    for story, tale in enumerate(corpus.tales):
        for frame in range(FRAMES):
            found.setdefault(_species_of(tale, frame), []).append((story, frame))
    return found


def load_adapter(unet: Network, file: Path) -> None:
    """Put a trained IP-Adapter file into a UNet that carries one, undoing the factor that its file folds in."""
    tensors = load_file(file)
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    with torch.no_grad():
        layer.image_embeds.weight.copy_(tensors["image_proj.proj.weight"])
        layer.image_embeds.bias.copy_(tensors["image_proj.proj.bias"])
        layer.norm.weight.copy_(tensors["image_proj.norm.weight"])
        layer.norm.bias.copy_(tensors["image_proj.norm.bias"])
        for number, processor in enumerate(adapter_processors(unet)):
            processor.to_k_ip[0].weight.copy_(tensors[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"])
            processor.to_v_ip[0].weight.copy_(
                tensors[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] * TRAINED_SCALE
            )
