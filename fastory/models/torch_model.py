"""StoryModel: the parts of a checkpoint and what they compute, one frame at a time so that bytes never depend on neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastory.checkpoints import Checkpoint, IPAdapter, checkpoint_of, model_hashes, open_checkpoint
from fastory.checkpoints.checkpoint import world_of
from fastory.checkpoints.history import History
from fastory.conditioning.history import EncodedFrame
from fastory.errors import InputError
from fastory.models.copies import causal_copy, compiled_copy
from fastory.models.images import decoded, fit_square, scaled
from fastory.models.protocol import (
    Caption,
    Decoded,
    UnetInputs,
    UnetSizes,
    check_machine,
    check_size,
    distilled_as,
    runs_as,
)
from fastory.models.released import Released
from fastory.models.row_by_row import embed_row_by_row
from fastory.models.text import guidance_embedding, history_ids, lost_words, padding_of
from fastory.processors.compiled import CompiledBlocks
from fastory.processors.consistent import self_attention_levels
from fastory.processors.fused import fuse_self_attention
from fastory.processors.projected import CrossAttentionLayers, check_kernels
from fastory.processors.reused import DeepFeatures
from fastory.runtime import Placement, choose_placement
from fastory.settings import check_choice


class StoryModel:
    """A checkpoint on its device: encodes captions and references, projects them, decodes latents."""

    takes_masks = takes_biases = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        name: str,
        requested: Mapping[str, str] | None = None,
    ) -> None:
        """name: as shown to the user. requested: device, dtype and graphs where the user named them."""
        self.name = name
        self.requested = dict(requested or {})
        self.options: dict[str, Any] | None = None
        self.idle_samplers: list[Any] = []
        self.attending: dict[Any, Any] = {}  # copies, see models.copies
        self.checkpoint = checkpoint
        self.family, self.world = checkpoint.family, world_of(checkpoint.defaults)
        self.placement = placement
        self.device, self.dtype = placement.device, placement.dtype
        self.pipeline: Any = checkpoint.pipeline  # of either family, each with an encode_prompt of its own
        self.pipeline.to(self.device)  # open_checkpoint has loaded it in its type
        self.pipeline.set_progress_bar_config(disable=True)
        self.unet, self.vae = self.pipeline.unet, self.pipeline.vae
        vae_dtype = self.family.vae_dtype(self.dtype, self.vae)
        if self.vae.dtype != vae_dtype:
            self.vae.to(vae_dtype)
        if self.device.type == "cpu":
            embed_row_by_row(self.unet)
        else:
            fuse_self_attention(self.unet)
        self._place_references(checkpoint.adapter)
        if checkpoint.history is not None:
            checkpoint.history.encoder.to(self.device)

    @classmethod
    def open(
        cls,
        model: str | Path = "builtin",
        *,
        config: str | Path | None = None,
        ip_adapter: str | Path | None = None,
        image_encoder: str | Path | None = None,
        adapter: str | Path | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        device: str = "auto",
        dtype: str = "auto",
        graphs: str = "auto",
        compile: str = "auto",
        attention: str = "auto",
        distilled: str = "auto",
        offline: bool = False,
    ) -> StoryModel:
        """Open `builtin`, a diffusers folder, a .safetensors file (with `config`) or a hub id.

        sd15, sd15-plus, sdxl and sdxl-plus are the hub's base checkpoints with IP-Adapter, base or Plus, and its encoder.

        adapter: a file that `fastory tune` wrote, for causal mode.
        loras: (path, weight) pairs, in effect before any K and V are projected. device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, float16 or bfloat16. graphs: auto (CUDA graphs on CUDA) or off.
        compile: torch.compile of the UNet's blocks, auto (on CUDA, where a run is long enough), on or off.
        attention: auto (PyTorch's choice) or measured, self-attention by the backend that was quickest on this machine.
        distilled: for few steps; auto for what the files say, lcm-lora for weights that hold one, or none.
        Raises InputError for anything that cannot be used.
        """
        check_choice("compile", compile, "--compile")
        check_choice("attention", attention, "--attention")
        check_choice("distilled", distilled, "--distilled")
        placement = choose_placement(device, dtype, graphs)
        check_kernels(placement.device)
        options: dict[str, Any] = {
            "config": config,
            "ip_adapter": ip_adapter,
            "image_encoder": image_encoder,
            "adapter": adapter,
            "loras": loras,
            "distilled": distilled,
            "offline": offline,
        }
        checkpoint = open_checkpoint(model, dtype=placement.dtype, **options)
        named = {"device": device, "dtype": dtype, "graphs": graphs}
        named |= {"compile": compile, "attention": attention}
        requested = {name: value for name, value in named.items() if value != "auto"}
        opened = cls(checkpoint, placement, str(model), requested)
        opened.options = {"model": model, **options}
        return opened

    @classmethod
    def from_pipeline(cls, pipe: Any, *, graphs: str = "auto", distilled: str = "auto") -> StoryModel:
        """A model of a loaded StableDiffusionPipeline or StableDiffusionXLPipeline, with its LoRAs and IP-Adapter.

        It draws on the pipeline's device and in the type of its UNet, over the same memory; the pipeline itself never
        changes and can draw between stories. Copies are: weights under a LoRA, merged as it is weighted now, SDXL's VAE
        where the UNet is in float16, and on CUDA those of self-attention's Q, K and V. The scale of references is the
        settings', not that of set_ip_adapter_scale. While the model is in use, leave the pipeline's weights as they are.
        distilled: as of `open`. Raises InputError for what cannot be used.
        """
        check_choice("distilled", distilled, "distilled")
        checkpoint = replace(checkpoint_of(pipe), distilled=distilled)
        unet = checkpoint.pipeline.unet
        placement = choose_placement(str(unet.device), str(unet.dtype).removeprefix("torch."), graphs)
        check_kernels(placement.device)
        return cls(checkpoint, placement, str(pipe.config.get("_name_or_path") or type(pipe).__name__))

    def release(self) -> None:
        """Let go of every part, so that what from_pipeline had to copy is freed. The model cannot draw any more."""
        gone: Any = Released(self.name)
        self.idle_samplers.clear()
        self.attending.clear()
        self.pipeline = self.unet = self.vae = gone
        self.checkpoint = replace(
            self.checkpoint, pipeline=gone, image_encoder=None, adapter=None, history=None, weights={}
        )
        self.adapter = None
        del self.layers

    def _place_references(self, adapter: IPAdapter | None) -> None:
        self.adapter = adapter
        if adapter is None:
            self.layers = CrossAttentionLayers(self.unet)
            return
        encoder = self.checkpoint.image_encoder
        if encoder is None:
            raise InputError("the IP-Adapter has no image encoder; wanted: its folder by --image-encoder")
        encoder.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]  # a decorator hides Module.to
        adapter.image_projection.to(self.device, self.dtype)
        self.layers = CrossAttentionLayers(
            self.unet,
            [weight.to(self.device, self.dtype) for weight in adapter.key_weights],
            [weight.to(self.device, self.dtype) for weight in adapter.value_weights],
        )

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings of the folder's fastory_defaults.json, without the names of its files."""
        names = ("schema", "ip_adapter", "image_encoder", "adapter", "world")
        return {name: value for name, value in self.checkpoint.defaults.items() if name not in names}

    @property
    def distilled(self) -> str | None:
        """What the checkpoint was distilled for few steps as."""
        lcm_lora = any(lora.says_lcm for lora in self.checkpoint.loras)
        return distilled_as(self.sizes, self.pipeline.scheduler, lcm_lora, self.checkpoint.distilled)

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file that was opened, by name, and the weight of each LoRA."""
        return {**model_hashes(self.checkpoint.sources), **self.checkpoint.hashes}

    @property
    def requested_dtype(self) -> str | None:
        """The dtype the user named, or None where it was left to us."""
        return self.requested.get("dtype")

    def on(self, machine: Mapping[str, Any]) -> StoryModel:
        """This model where `machine` (a manifest's) says a run began: itself, or the checkpoint opened there.

        Raises InputError where the user named another device or type: the run's bytes could not go on.
        """
        if runs_as(self.placement, machine):
            return self
        if self.requested or self.options is None:
            check_machine(self.placement, machine)
        assert self.options is not None
        graphs = "auto" if machine["graphs"] else "off"
        where = {"device": machine["device"], "dtype": machine["dtype"], "graphs": graphs}
        return StoryModel.open(**self.options, **where, compile=self.compile, attention=self.attention)

    @property
    def compile(self) -> str:
        """Whether the UNet's blocks are compiled: auto, on or off."""
        return self.requested.get("compile", "auto")

    @property
    def attention(self) -> str:
        """What computes self-attention: auto or measured."""
        return self.requested.get("attention", "auto")

    @cached_property
    def compiled(self) -> StoryModel:
        """This model as it draws with compiled blocks."""
        return compiled_copy(self)

    def deep_features(self) -> DeepFeatures:
        """The deep features of the UNet."""
        return DeepFeatures(self.unet)

    def blocks(self) -> CompiledBlocks:
        """The blocks of the UNet that are compiled."""
        return CompiledBlocks(self.unet)

    @property
    def tokens_per_ref(self) -> int:
        """T: tokens of one reference picture."""
        return self.adapter.tokens if self.adapter else 4

    @property
    def most_rows(self) -> int | None:
        """None: memory alone bounds the rows of a UNet call."""
        return None

    @property
    def cross_attention_dim(self) -> int:
        """C_x: width of the tokens that cross-attention reads."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def sizes(self) -> UnetSizes:
        """Sizes of the UNet."""
        config = self.unet.config
        return UnetSizes(
            latent_channels=int(config.in_channels),
            first_channels=int(config.block_out_channels[0]),
            guidance_embedding=config.time_cond_proj_dim,
            pooled_width=self.family.pooled_width(self.pipeline),
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the first text encoder."""
        return self.pipeline.tokenizer

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The configuration of the checkpoint's own scheduler."""
        return self.pipeline.scheduler.config

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the UNet was trained for."""
        sample = self.unet.config.sample_size
        if sample is None:
            raise InputError(f"{self.name} does not say its size (sample_size); give --width and --height")
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.vae_factor, height * self.vae_factor

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_factor(self) -> int:
        """Width and height must be multiples of this many pixels: the VAE's factor times the UNet's."""
        return self.vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    def check_drawable(self, width: int, height: int, references: int, groups: int, rows: int) -> None:
        """InputError for a side, in pixels, that does not fit the UNet; any number of references and rows is drawn."""
        check_size(width, height, self.size_factor)

    def lost_words(self, prompt: str) -> str:
        """What the tokenizer's limit cuts off `prompt`; empty where it fits."""
        return lost_words(self.tokenizer, prompt)

    @torch.inference_mode()
    def encode_caption(self, prompt: str) -> Caption:
        """A caption as the text encoders see it, cut at the tokenizer's limit."""
        return Caption(*self.family.encode_prompt(self.pipeline, prompt, self.device))

    @torch.inference_mode()
    def encode_negative(self, negative_prompt: str) -> Caption:
        """The unconditional caption. SDXL without a negative prompt has zeros where its config says so."""
        encoded = self.encode_caption(negative_prompt)
        if encoded.pooled is None or negative_prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return encoded
        return Caption(torch.zeros_like(encoded.tokens), torch.zeros_like(encoded.pooled))

    @torch.inference_mode()
    def encode_reference(self, image: Image.Image, fit: str = "pad") -> Tensor:
        """An 8-bit RGB picture -> its reference tokens (1, T, C_x): CLIPVision, then the adapter's projection.

        fit: how a picture that is not square meets CLIP's square: pad, squash (to 256 x 256 first) or crop.
        """
        pixels = self.checkpoint.image_processor(fit_square(image, fit), return_tensors="pt").pixel_values
        return self._project_image(self._encode_image(pixels.to(self.device, self.dtype)))

    @torch.inference_mode()
    def encode_picture(self, image: Image.Image) -> Tensor:
        """An 8-bit RGB picture as the UNet's latents (1, c, h, w): the middle of the VAE's distribution."""
        pixels = self.pipeline.image_processor.preprocess(image).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return scaled(latents, self.vae.config).to(self.dtype)

    @torch.inference_mode()
    def null_reference(self) -> Tensor:
        """Tokens (1, T, C_x) of the unconditional reference: base: zeros; Plus: the encoder's view of all-zero pixels."""
        adapter, encoder = self._need_adapter(), self.checkpoint.image_encoder
        assert encoder is not None
        if adapter.embedding == "image_embeds":
            zeros = torch.zeros(1, encoder.config.projection_dim, device=self.device, dtype=self.dtype)
            return self._project_image(zeros)
        side = self.checkpoint.image_processor.crop_size["height"]
        return self._project_image(
            self._encode_image(torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype))
        )

    def _encode_image(self, pixels: Tensor) -> Tensor:
        encoder = self.checkpoint.image_encoder
        assert encoder is not None
        if self._need_adapter().embedding == "image_embeds":
            return encoder(pixels).image_embeds
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def _project_image(self, embeds: Tensor) -> Tensor:
        return self._need_adapter().image_projection(embeds).reshape(1, -1, self.cross_attention_dim)

    def _need_adapter(self) -> IPAdapter:
        if self.adapter is None:
            raise InputError(
                f"{self.name} has no IP-Adapter, and references need one; wanted: --ip-adapter FILE.safetensors "
                "(and --image-encoder FOLDER), or --iterations 0 without character references"
            )
        return self.adapter

    def require_references(self) -> None:
        """InputError where this model cannot take references."""
        self._need_adapter()

    def self_attention_levels(self) -> list[int]:
        """How often the latents' sides were halved where the UNet has self-attention, each once."""
        return self_attention_levels(self.unet)

    @cached_property
    def causal(self) -> StoryModel:
        """This model as causal mode draws with it: its low-rank updates in a UNet that shares all other weights."""
        return causal_copy(self)

    def require_history(self) -> History:
        """The history encoder. InputError where this model cannot draw frame after frame."""
        history = self.checkpoint.history
        if history is None:
            raise InputError(
                f"{self.name} has no history encoder, and causal mode needs one; wanted: --adapter FILE.safetensors "
                "(made by `fastory tune`), or a model folder that `fastory convert` made of an AR-LDM checkpoint"
            )
        self.family.require_causal(self.name)
        return history

    def caption_padding(self, prompt: str) -> Tensor:
        """(1, Lt) bool: True where the tokens of `prompt` are padding, which causal mode never looks at."""
        return padding_of(self.tokenizer, prompt).to(self.device)

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

    def added_conditions(self, pooled: Tensor, width: int, height: int) -> dict[str, Tensor]:
        """SDXL's text_embeds and time_ids of one row: original and target size are the picture's, nothing cropped."""
        size, pooled_width = (height, width), self.family.pooled_width(self.pipeline)
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, self.dtype, text_encoder_projection_dim=pooled_width
        )
        return {"text_embeds": pooled, "time_ids": ids.to(self.device)}

    def guidance_embedding(self, scale: float, rows: int) -> Tensor:
        """The guidance scale as an input (rows, D) of a UNet distilled with it (LCM)."""
        width = int(self.unet.config.time_cond_proj_dim)
        return guidance_embedding(scale, rows, width).to(self.device, self.dtype)

    def predict(self, inputs: UnetInputs) -> Tensor:
        """One UNet call -> (R, c, h, w)."""
        prediction: Tensor = self.unet(
            inputs.latents,
            inputs.timestep,
            encoder_hidden_states=None,
            timestep_cond=inputs.timestep_cond,
            added_cond_kwargs=inputs.added,
            cross_attention_kwargs={"context": inputs.context},
            return_dict=False,
        )[0]
        return prediction

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoded:
        """latents (1, c, h, w) -> an 8-bit RGB picture; black and marked where values are not finite or unsafe."""
        return decoded(
            latents.to(self.vae.dtype),
            lambda scaled: self.vae.decode(scaled, return_dict=False)[0],
            self.vae.config,
            self.vae_factor,
            self.pipeline.image_processor,
            self._is_unsafe,
        )

    def _is_unsafe(self, pixels: Tensor) -> bool:
        """What the pipeline's safety checker says, where it has one."""
        if getattr(self.pipeline, "safety_checker", None) is None:
            return False
        _, unsafe = self.pipeline.run_safety_checker(pixels, self.device, self.dtype)
        return bool(unsafe and unsafe[0])
