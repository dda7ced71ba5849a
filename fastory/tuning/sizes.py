"""What a tuning is asked for, and the sizes of a history encoder that is made new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastory.errors import InputError

if TYPE_CHECKING:  # what is asked for is checked before PyTorch is imported
    from fastory.checkpoints.history_encoder import HistoryConfig

# vision: width, layers, heads, picture's side, patch; text: layers. The text width is always the base's.
SIZES: Mapping[str, tuple[tuple[int, int, int, int, int], int]] = {
    "small": ((128, 4, 4, 96, 12), 3),
    "medium": ((384, 6, 6, 160, 16), 4),
    "base": ((768, 12, 12, 224, 16), 12),
}
_LEAST: Mapping[str, float] = {
    "steps": 1,
    "batch_size": 1,
    "frames": 2,
    "save_every": 1,
    "validate_every": 0,
    "imitate": 0,
    "contrast": 0,
    "preserve": 0,
    "seed": 0,
}
_SHARES = ("dropout", "high_noise", "first_frames", "patches", "ema_decay")


@dataclass(frozen=True)
class Tuning:
    """How a tuning runs. The same values, stories and base give the same weights on the CPU.

    batch_size: stories a step. frames: most consecutive frames that a step takes of each, all of them trained.
    window: L_M of a step: `random` draws it from 1 .. the most that fits, `all` is unlimited, or a number.
    rank: of the low-rank updates, 0 for none, None for the starting adapter's or else 8. self_attention: such updates of the
    self-attentions too, not of the cross-attentions alone. freeze_encoder: of the history encoder only what comes behind the
    Blip classes learns. dropout: share of frames
    trained as the unconditional row. high_noise: share of frames whose noise is drawn from the upper half.
    imitate: steps at the beginning that learn from the base's IP-Adapter (imitation.py; its second term wants two stories a
    step), where its references have the weight imitate_scale.
    contrast: where stories share their captions and show other characters, weight of the second term of paired_stories.py.
    patches: share of frames that are seen with patches of such a story, to be removed (paired_stories.py).
    first_frames: share of frames trained without their history, as the first one of a story.
    preserve: weight of staying with the base where there is no history (preservation.py), 0 for the noise loss there as well.
    ema_decay: of the averaged weights, which are the result. clip: most of the gradient's norm. warmup: steps.
    """

    steps: int = 1000
    batch_size: int = 4
    frames: int = 8
    learning_rate: float = 1e-4
    warmup: int = 100
    rank: int | None = None
    self_attention: bool = False
    freeze_encoder: bool = False
    window: int | str = "random"
    dropout: float = 0.1
    high_noise: float = 0.0
    imitate: int = 0
    imitate_scale: float = 0.5
    contrast: float = 0.0
    patches: float = 0.0
    first_frames: float = 0.0
    preserve: float = 0.0
    ema_decay: float = 0.999
    clip: float = 1.0
    save_every: int = 100
    validate_every: int = 500
    seed: int = 0
    width: int | None = None
    height: int | None = None

    def check(self) -> None:
        """InputError for a value that cannot be used."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{_flag(name)}: wanted {least} or more, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{_flag(name)}: wanted 0 or more and less than 1, got {getattr(self, name)}"
                )
        if self.contrast and self.batch_size % 2:
            raise InputError(
                f"--batch-size: with --contrast stories come in pairs; wanted an even number, got {self.batch_size}"
            )
        if not 0 < self.imitate_scale <= 2:
            raise InputError(f"--imitate-scale: wanted more than 0 and at most 2, got {self.imitate_scale}")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"--learning-rate: wanted more than 0 and at most 1, got {self.learning_rate}")
        if self.rank is not None and self.rank < 0:
            raise InputError(f"--rank: wanted 0 (no low-rank updates) or more, got {self.rank}")
        if self.window not in ("random", "all") and not (isinstance(self.window, int) and self.window >= 1):
            raise InputError(
                f"--window: wanted random, all, or a number of frames from 1 on, got {self.window!r}"
            )


@dataclass(frozen=True)
class HistorySizes:
    """Sizes of the history encoder; None is the base's own, or a sensible value where it is made new.

    size: a name in SIZES: make it new even where the base has one. frame_tokens: S. positions: frames of the longest
    window. local_heads, bottleneck: of the local causal attention and of the adapter behind it, 0 for none.
    """

    size: str | None = None
    frame_tokens: int | None = None
    positions: int | None = None
    local_heads: int | None = None
    bottleneck: int | None = None

    def check(self) -> None:
        """InputError for a name that no size has, and for numbers that no encoder has."""
        if self.size is not None and self.size not in SIZES:
            raise InputError(f"--history-size: wanted one of {', '.join(SIZES)}, got {self.size!r}")
        for name, least in (("frame_tokens", 1), ("positions", 1), ("local_heads", 0), ("bottleneck", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{_flag(name)}: wanted {least} or more, got {value}")

    def new(self, width: int, vocabulary: int, text_limit: int, longest: int) -> HistoryConfig:
        """The configuration of a new encoder for text width C_x. longest: frames of the longest window trained."""
        from fastory.checkpoints.history_encoder import HistoryConfig

        self.check()
        name = self.size or "small"
        (hidden, layers, heads, side, patch), text_layers = SIZES[name]
        tokens = self.frame_tokens or text_limit
        vision = {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": side,
            "patch_size": patch,
        }
        text = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "encoder_hidden_size": hidden,
            "intermediate_size": 4 * width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": heads_of(width),
            "max_position_embeddings": tokens,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")),
        }
        parts = self.local_heads, self.bottleneck
        heads, bottleneck = (d if p is None else p for p, d in zip(parts, _parts(width), strict=True))
        return checked(HistoryConfig(vision, text, tokens, self.positions or longest, heads, bottleneck))

    def over(self, config: HistoryConfig) -> HistoryConfig:
        """The base's own encoder, with a local causal attention and an adapter added where it has none."""
        from fastory.checkpoints.history_encoder import HistoryConfig

        for name in ("frame_tokens", "positions"):
            wanted, own = getattr(self, name), getattr(config, name)
            if wanted not in (None, own):
                raise InputError(
                    f"{_flag(name)}: the base's history encoder has {own}, got {wanted}; give --history-size for a new one"
                )
        values: dict[str, Any] = config.as_dict()
        for name, default in zip(("local_heads", "bottleneck"), _parts(config.width), strict=True):
            wanted, own = getattr(self, name), getattr(config, name)
            if own and wanted not in (None, own):
                raise InputError(f"{_flag(name)}: the base's history encoder has {own}, got {wanted}")
            values[name] = own or (default if wanted is None else wanted)
        return HistoryConfig.read(values, "the sizes asked for")


def tuning_folder(output: Path) -> Path:
    """Where a tuning that writes `output` is kept. Raises InputError for a name that is no adapter's."""
    if output.suffix != ".safetensors":
        raise InputError(f"--output: wanted a file ADAPTER.safetensors, got {output}")
    return output.with_suffix(".tuning")


def heads_of(width: int) -> int:
    """Attention heads for a width: of 64 in wide models, four in small ones."""
    return width // 64 if width >= 512 else 4


def checked(config: HistoryConfig) -> HistoryConfig:
    """`config`, or InputError for sizes that the kernels and the Blip classes cannot have."""
    from fastory.checkpoints.history_encoder import HistoryConfig

    if config.width % config.text["num_attention_heads"]:
        raise InputError(
            f"the base's text width {config.width} is not a multiple of 4: it cannot have a history encoder"
        )
    return HistoryConfig.read(config.as_dict(), "the sizes asked for")


def _parts(width: int) -> tuple[int, int]:
    """Default heads of the local causal attention and width of the adapter."""
    return (heads_of(width) if width % (8 * heads_of(width)) == 0 else 0), width // 2


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
