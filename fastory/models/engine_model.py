"""EngineModel: a story model whose parts are exported components on ONNX Runtime or TensorRT.

Modes, sampler and run folder do not know the difference: the inputs of a UNet call are the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from fastory.checkpoints.checkpoint import world_of
from fastory.checkpoints.configs import (
    check_tokenizer,
    check_values,
    open_processor,
    open_scheduler,
    open_tokenizer,
)
from fastory.checkpoints.history import image_processor
from fastory.checkpoints.history_encoder import HistoryConfig
from fastory.checkpoints.weights import is_there, load_finite
from fastory.conditioning.history import EncodedFrame
from fastory.errors import InputError
from fastory.model_names import local_path
from fastory.models.engine_history import EngineHistory, ExportedHistory
from fastory.models.engine_inputs import HISTORY_BIAS, unet_inputs
from fastory.models.engine_sessions import (
    bounded_by_engines,
    check_ports,
    check_sizes,
    engines_for,
    refuse_groups,
    sessions_for,
)
from fastory.models.export_folder import MANIFEST, DrawableManifest, ExportFolder
from fastory.models.images import decoded, fit_square, scaled
from fastory.models.onnx_session import Session
from fastory.models.protocol import (
    Caption,
    Decoded,
    UnetInputs,
    UnetSizes,
    check_machine,
    check_size,
    distilled_as,
)
from fastory.models.text import filled, guidance_embedding, history_ids, lost_words, padding_of
from fastory.processors.projected import value_columns
from fastory.runtime import Placement, choose_placement


class EngineModel:
    """Encodes, projects, predicts and decodes by the components of an export folder."""

    def __init__(
        self, folder: ExportFolder, placement: Placement, session_of: Callable[[str], Session]
    ) -> None:
        """session_of: makes the session of a component; each is made once, when it is first needed."""
        manifest = folder.manifest
        self.folder, self.manifest = folder, manifest
        self.name, self.family, self.world = (
            manifest["name"],
            manifest["family"],
            world_of(manifest["defaults"]),
        )
        self.placement = placement
        self.device, self.dtype = placement.device, placement.dtype
        self.session_of = session_of
        self.sessions: dict[str, Session] = {}
        self.idle_samplers: list[Any] = []
        self.constants: Mapping[str, Tensor] = {
            name: tensor.to(self.device, self.dtype)
            for name, tensor in load_finite(folder.path / "constants.safetensors").items()
        }
        self._check_constants()
        self.tokenizer = self._tokenizer("tokenizer", "text_encoder")
        self.tokenizer_2 = (
            None if manifest["pooled_width"] is None else self._tokenizer("tokenizer_2", "text_encoder_2")
        )
        scheduler = open_scheduler(folder.path / "scheduler", manifest["scheduler"])
        self.scheduler_config: Mapping[str, Any] = scheduler.config
        self.distilled = distilled_as(self.sizes, scheduler, said=manifest.get("distilled") or "auto")
        self.vae_image_processor = VaeImageProcessor(vae_scale_factor=self.vae_factor)
        self.history = None if manifest["history"] is None else self._history()
        self.image_processor = self._feature_extractor()
        self.unet = "unet"
        self.layers = EngineLayers(self, "text_projector")

    @classmethod
    def open_engine(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto", trust_cache: bool = False
    ) -> EngineModel:
        """Open an export folder; every file is read and compared with its hash.

        device: auto, cpu, cuda or cuda:N. trust_cache: a file that has the size, inode and times of its last hashing is
        not read again, which saves seconds per gigabyte. Raises InputError for a folder that cannot be used, another dtype
        than it was exported in, and bfloat16 on ONNX Runtime.
        """
        folder_path = local_path(path, "--engine")
        if folder_path is None:
            raise InputError(
                f"{path} holds no {MANIFEST}, there is no such folder; wanted one that `fastory export` finished"
            )
        folder = ExportFolder.open(folder_path, trust_cache=trust_cache, schema=DrawableManifest)
        own = folder.manifest["dtype"]
        if dtype not in ("auto", own):
            raise InputError(
                f"--dtype {dtype}: {path} was exported in {own}; export it in {dtype}, or leave --dtype out"
            )
        placement = choose_placement(device, own, "off")
        folder = bounded_by_engines(folder, engines_for(folder, placement.device))
        return cls(folder, placement, sessions_for(folder, placement.device, trust_cache))

    def run(self, component: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One call of a component. Raises InputError for sizes that it was not exported for."""
        if not self.has(component):
            raise InputError(f"{self.folder.path} was exported without {component}; export the model anew")
        described = self.folder.components[component]
        check_sizes(component, described, inputs)
        if component not in self.sessions:
            session = self.session_of(component)
            check_ports(session, described, f"{self.folder.path}: {component}")
            self.sessions[component] = session
        return self.sessions[component].run(inputs)

    def has(self, component: str) -> bool:
        """Whether the export holds a component."""
        return component in self.folder.components

    def _check_constants(self) -> None:
        """InputError for tensors beside the graphs that a run would miss, or of other sizes."""
        width, history = self.cross_attention_dim, self.manifest["history"]
        wanted: dict[str, tuple[int, ...]] = {}
        if self.has("image_encoder"):
            wanted["null_reference"] = (1, self.tokens_per_ref, width)
        if history is not None:
            positions = HistoryConfig.read(history, str(self.folder.path)).positions
            wanted |= {"history_types": (2, width), "history_times": (positions, width)}
        for name, shape in wanted.items():
            found = tuple(self.constants[name].shape) if name in self.constants else "none"
            if found != shape:
                raise InputError(
                    f"{self.folder.path / 'constants.safetensors'}: {name}: wanted {shape}, got {found}; "
                    "export the model anew"
                )

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings of the exported model's folder."""
        return {name: value for name, value in self.manifest["defaults"].items() if name != "world"}

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the graphs and weights in use, by file."""
        files = self.manifest["files"]
        return {name: files[name] for name in sorted(files) if ".onnx" in name or ".safetensors" in name}

    @property
    def requested_dtype(self) -> str | None:
        """None: the type of an export is its own."""
        return None

    def on(self, machine: Mapping[str, Any]) -> EngineModel:
        """This model, where a run began as it computes. Raises InputError otherwise."""
        check_machine(self.placement, machine)
        return self

    @property
    def sizes(self) -> UnetSizes:
        """Sizes of the UNet."""
        unet = self.manifest["unet"]
        return UnetSizes(
            latent_channels=int(unet["in_channels"]),
            first_channels=int(unet["block_out_channels"][0]),
            guidance_embedding=unet["time_cond_proj_dim"],
            pooled_width=self.manifest["pooled_width"],
        )

    @property
    def tokens_per_ref(self) -> int:
        """T: tokens of one reference picture."""
        return int(self.manifest["tokens_per_ref"])

    @property
    def cross_attention_dim(self) -> int:
        """C_x: width of the tokens that cross-attention reads."""
        return int(self.manifest["unet"]["cross_attention_dim"])

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the UNet was trained for."""
        width, height = self.manifest["native_size"]
        return width, height

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, a side."""
        return int(self.manifest["vae_factor"])

    @property
    def size_factor(self) -> int:
        """Width and height must be multiples of this many pixels."""
        return int(self.manifest["size_factor"])

    @property
    def compile(self) -> str:
        """What an export is was decided when it was made."""
        return "off"

    @property
    def attention(self) -> str:
        """As of compile."""
        return "auto"

    @property
    def compiled(self) -> EngineModel:
        """Never asked for."""
        raise InputError("an export cannot be compiled")

    def deep_features(self) -> Any:
        """Raises InputError: a graph computes the whole UNet."""
        raise InputError(
            "--cache-interval wants a model of PyTorch: an exported graph always computes the whole UNet; wanted 1"
        )

    def blocks(self) -> Any:
        """Never asked for."""
        raise InputError("an export has no blocks that could be compiled")

    @property
    def most_rows(self) -> int | None:
        """Most rows that a UNet call takes."""
        most: int | None = self._unet_ranges.get("batch", (1, None))[1]
        return most

    @property
    def _unet_ranges(self) -> Mapping[str, Any]:
        name = "unet" if self.has("unet") else "unet_causal"
        ranges: Mapping[str, Any] = self.folder.components[name]["ranges"]
        return ranges

    def check_drawable(self, width: int, height: int, references: int, groups: int, rows: int) -> None:
        """InputError for sides that do not fit the UNet, and for what the graphs were not exported for."""
        check_size(width, height, self.size_factor)
        sizes = {
            "width": (width // self.size_factor, self.size_factor, "pixels"),
            "height": (height // self.size_factor, self.size_factor, "pixels"),
            "references": (max(1, references), 1, "references"),
            "batch": (rows, 1, "rows of a UNet call (two a frame with guidance)"),
        }
        for key, (value, factor, what) in sizes.items():
            low, high = self._unet_ranges.get(key, (value, value))
            if not low <= value <= high:
                raise InputError(
                    f"{self.folder.path} takes {key} of {low * factor} to {high * factor} {what}, and this story "
                    f"needs {value * factor}; draw it smaller, with a smaller --batch-size, or export with wider ranges"
                )
        if groups > self.folder.groups:
            refuse_groups(self.folder, groups)

    @property
    def takes_masks(self) -> bool:
        """Whether it was exported for characters' own references."""
        return self.folder.characters > 0

    @property
    def takes_biases(self) -> bool:
        """Whether it was exported for boxes; one of before causal mode read them has no inputs for them there."""
        if self.unet == "unet" or not self.has(self.unet):
            return bool(self.manifest.get("boxes"))
        inputs = self.folder.components[self.unet]["inputs"]
        return any(name.startswith(HISTORY_BIAS) for name in inputs)

    @torch.inference_mode()
    def encode_picture(self, image: Image.Image) -> Tensor:
        """An 8-bit RGB picture as the UNet's latents (1, c, h, w). InputError for an export without the VAE's encoder."""
        vae = self.manifest["vae"]
        pixels = self.vae_image_processor.preprocess(image).to(self.device, getattr(torch, vae["dtype"]))
        return scaled(self.run("vae_encoder", {"pixels": pixels})["latents"], vae).to(self.dtype)

    def lost_words(self, prompt: str) -> str:
        """What the tokenizer's limit cuts off `prompt`; empty where it fits."""
        return lost_words(self.tokenizer, prompt)

    @torch.inference_mode()
    def encode_caption(self, prompt: str) -> Caption:
        """A caption as the text encoders see it, cut at the tokenizer's limit."""
        tokens = self.run("text_encoder", {"ids": self._ids(self.tokenizer, prompt)})["tokens"]
        if self.tokenizer_2 is None:
            return Caption(tokens, None)
        second = self.run("text_encoder_2", {"ids": self._ids(self.tokenizer_2, prompt)})
        return Caption(torch.cat([tokens, second["tokens"]], -1), second["pooled"])

    def _ids(self, tokenizer: Any, prompt: str) -> Tensor:
        ids: Tensor = filled(tokenizer, prompt, tokenizer.model_max_length).input_ids
        return ids.to(self.device)

    @torch.inference_mode()
    def encode_negative(self, negative_prompt: str) -> Caption:
        """The unconditional caption. SDXL without a negative prompt has zeros where its config says so."""
        encoded = self.encode_caption(negative_prompt)
        if encoded.pooled is None or negative_prompt or not self.manifest["force_zeros_for_empty_prompt"]:
            return encoded
        return Caption(torch.zeros_like(encoded.tokens), torch.zeros_like(encoded.pooled))

    def caption_padding(self, prompt: str) -> Tensor:
        """(1, Lt) bool: True where the tokens of `prompt` are padding, which causal mode never looks at."""
        return padding_of(self.tokenizer, prompt).to(self.device)

    @torch.inference_mode()
    def encode_reference(self, image: Image.Image, fit: str = "pad") -> Tensor:
        """An 8-bit RGB picture -> its reference tokens (1, T, C_x). fit: as StoryModel.encode_reference."""
        self.require_references()
        assert self.image_processor is not None
        pixels = self.image_processor(fit_square(image, fit), return_tensors="pt").pixel_values
        tokens = self.run("image_encoder", {"pixels": pixels.to(self.device, self.dtype)})["tokens"]
        return tokens.reshape(1, -1, self.cross_attention_dim)

    def null_reference(self) -> Tensor:
        """Tokens (1, T, C_x) of the unconditional reference."""
        self.require_references()
        return self.constants["null_reference"]

    @torch.inference_mode()
    def encode_frame(self, prompt: str, image: Image.Image) -> EncodedFrame:
        """A caption and its 8-bit RGB picture as the history takes them: m_n (1, S, C_x) and its padding."""
        history = self.require_history()
        ids, mask = history_ids(history.tokenizer, prompt, history.encoder.config.frame_tokens)
        pixels = history.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values
        mask = mask.to(self.device)
        tokens = history.encoder.multimodal(ids.to(self.device), mask, pixels.to(self.device, self.dtype))
        return EncodedFrame(tokens, mask == 0)

    def null_frame(self) -> EncodedFrame:
        """What the unconditional row has in place of every frame: an empty caption and a black picture (AR-LDM)."""
        side = self.require_history().encoder.config.vision["image_size"]
        return self.encode_frame("", Image.new("RGB", (side, side)))

    def require_history(self) -> ExportedHistory:
        """The history encoder. InputError where this export cannot draw frame after frame."""
        if self.history is None:
            raise InputError(
                f"{self.name} has no history encoder, and causal mode needs one; wanted: an export of a model with one "
                "(--adapter FILE.safetensors made by `fastory tune`, or a folder that `fastory convert` made of an AR-LDM "
                "checkpoint)"
            )
        return self.history

    def require_references(self) -> None:
        """InputError where the exported model cannot take references."""
        if not self.has("image_encoder"):
            raise InputError(
                f"{self.folder.path} was exported without an IP-Adapter, and references need one; "
                "export the model with --ip-adapter, or draw with --iterations 0"
            )

    def self_attention_levels(self) -> list[int]:
        """Raises InputError: the exported graphs hold self-attention as it is, each frame alone."""
        raise InputError(
            f"{self.folder.path}: frames cannot see each other in the self-attention of an export; wanted --model, the model "
            "it was exported from"
        )

    @cached_property
    def causal(self) -> EngineModel:
        """This model as causal mode draws with it: the UNet and the projections of that mode."""
        made = copy.copy(self)
        made.unet = "unet_causal"
        made.layers = EngineLayers(self, "text_projector_causal")
        return made

    def predict(self, inputs: UnetInputs) -> Tensor:
        """One UNet call -> (R, c, h, w)."""
        if not self.has(self.unet):
            mode = "iterative" if self.unet == "unet" else "causal"
            raise InputError(f"{self.folder.path} was exported without what --mode {mode} needs")
        wanted = self.folder.components[self.unet]["inputs"]
        return self.run(self.unet, unet_inputs(inputs, self.folder.groups, wanted))["prediction"]

    def guidance_embedding(self, scale: float, rows: int) -> Tensor:
        """The guidance scale as an input (rows, D) of a UNet distilled with it (LCM)."""
        width = int(self.manifest["unet"]["time_cond_proj_dim"])
        return guidance_embedding(scale, rows, width).to(self.device, self.dtype)

    def added_conditions(self, pooled: Tensor, width: int, height: int) -> dict[str, Tensor]:
        """SDXL's text_embeds and time_ids of one row."""
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device)
        return {"text_embeds": pooled, "time_ids": ids}

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoded:
        """latents (1, c, h, w) -> an 8-bit RGB picture; black and marked where values are not finite."""
        vae = self.manifest["vae"]
        return decoded(
            latents.to(getattr(torch, vae["dtype"])),
            lambda scaled: self.run("vae_decoder", {"latents": scaled})["pixels"],
            vae,
            self.vae_factor,
            self.vae_image_processor,
            lambda pixels: False,
        )

    def _tokenizer(self, name: str, encoder: str) -> Any:
        """A tokenizer that makes as many tokens as its text encoder was exported for."""
        folder = self.folder.path / name
        ports = self.folder.components.get(encoder, {}).get("inputs", {})
        length = ports["ids"]["shape"][-1] if "ids" in ports and ports["ids"]["shape"] else None
        if not isinstance(length, int):
            raise InputError(f"{self.folder.path} was exported without {encoder}; export the model anew")
        tokenizer = open_tokenizer(folder)
        check_tokenizer(tokenizer, folder, None, length)
        return tokenizer

    def _feature_extractor(self) -> Any:
        folder = self.folder.path / "feature_extractor"
        return open_processor(folder, CLIPImageProcessorPil) if is_there(folder) else None

    def _history(self) -> ExportedHistory:
        config = HistoryConfig.read(self.manifest["history"], str(self.folder.path))
        sizes = {"frame_tokens": config.frame_tokens, "image_size": config.vision["image_size"]}
        check_values(sizes, self.folder.path / MANIFEST)
        tokenizer = open_tokenizer(self.folder.path / "history_tokenizer")
        return ExportedHistory(EngineHistory(self, config), tokenizer, image_processor(config))


class EngineLayers:
    """The projections of CrossAttentionLayers. width: W."""

    def __init__(self, model: EngineModel, text_projector: str) -> None:
        self.model, self.text_projector = model, text_projector
        self.width = int(model.manifest["width"])
        channels = model.manifest.get("layer_channels")
        self.value_columns = None if channels is None else value_columns(channels)

    def project_text(self, tokens: Tensor) -> Tensor:
        """tokens (B, Lt, C_x) -> (B, Lt, W)."""
        return self.model.run(self.text_projector, {"tokens": tokens})["kv"]

    def project_references(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W)."""
        return self.model.run("reference_projector", {"tokens": tokens})["kv"]
