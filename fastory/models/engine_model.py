"""EngineModel: a StoryModel whose parts are exported components on ONNX Runtime or TensorRT.

Modes, sampler and run folder do not know the difference: the inputs of a UNet call are the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import CLIPImageProcessorPil

from fastory.checkpoints.configs import (
    check_tokenizer,
    check_values,
    open_processor,
    open_scheduler,
    open_tokenizer,
)
from fastory.checkpoints.history import History, image_processor
from fastory.checkpoints.weights import is_there, load_finite
from fastory.conditioning.history import HistoryConfig
from fastory.errors import InputError
from fastory.export.graphs import factored
from fastory.export.tensorrt import engine_name
from fastory.model_names import local_path
from fastory.models.export_folder import MANIFEST, DrawableManifest, ExportFolder
from fastory.models.onnx_session import OrtSession, Session
from fastory.models.tensorrt_session import TensorRtSession
from fastory.models.torch_model import Caption, StoryModel
from fastory.processors.projected import HistoryContext, ReferenceContext
from fastory.runtime import Placement, place
from fastory.wording import counted


class EngineModel(StoryModel):
    """Encodes, projects, predicts and decodes by the components of an export folder."""

    def __init__(
        self, folder: ExportFolder, placement: Placement, session_of: Callable[[str], Session]
    ) -> None:
        """session_of: makes the session of a component; each is made once, when it is first needed."""
        manifest = folder.manifest
        self.folder, self.manifest = folder, manifest
        self.name, self.family = manifest["name"], manifest["family"]
        self.asked, self.options = {}, None
        self.placement = placement
        self.device, self.dtype = placement.device, placement.dtype
        self.session_of = session_of
        self.sessions: dict[str, Session] = {}
        self.constants = {
            name: tensor.to(self.device, self.dtype)
            for name, tensor in load_finite(folder.path / "constants.safetensors").items()
        }
        self._check_constants()
        self.pipeline = self._pipeline()
        history = None if manifest["history"] is None else self._history()
        self.checkpoint = cast(
            Any, SimpleNamespace(image_processor=self._feature_extractor(), history=history)
        )
        config = SimpleNamespace(**manifest["unet"])
        self.unet = EngineUnet(self, "unet", config)
        self.vae = EngineVae(self)
        self.layers = cast(Any, EngineLayers(self, "text_projector"))
        self.adapter = cast(Any, SimpleNamespace(tokens=manifest["tokens_per_ref"]))

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
        placed = place(device, own, "off")
        return cls(folder, placed, sessions_for(folder, placed.device, trust_cache))

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
        return dict(self.manifest["defaults"])

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the graphs and weights in use, by file."""
        files = self.manifest["files"]
        return {name: files[name] for name in sorted(files) if ".onnx" in name or ".safetensors" in name}

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

    def check_drawable(self, width: int, height: int, references: int, groups: int, rows: int) -> None:
        """As StoryModel.check_drawable; and InputError for what the graphs were not exported for."""
        super().check_drawable(width, height, references, groups, rows)
        name = "unet" if self.has("unet") else "unet_causal"
        ranges = self.folder.components[name]["ranges"]
        sizes = {
            "width": (width // self.size_factor, self.size_factor, "pixels"),
            "height": (height // self.size_factor, self.size_factor, "pixels"),
            "references": (max(1, references), 1, "references"),
            "batch": (rows, 1, "rows of a UNet call (two a frame with guidance)"),
        }
        for key, (value, factor, what) in sizes.items():
            low, high = ranges.get(key, (value, value))
            if not low <= value <= high:
                raise InputError(
                    f"{self.folder.path} was exported for a {key} of {low * factor} to {high * factor} {what}, and this story "
                    f"needs {value * factor}; draw it smaller, with a smaller --batch-size, or export with wider ranges"
                )
        if groups > self.folder.groups:
            raise InputError(
                f"{self.folder.path} was exported for {counted(self.folder.groups, 'group')} of references, "
                f"and this story has {groups} (the frames, and every character with pictures); export it with --groups {groups}"
            )

    def encode_caption(self, prompt: str) -> Caption:
        """A caption as the text encoders see it, cut at the tokenizer's limit."""
        tokens = self.run("text_encoder", {"ids": self._ids(self.pipeline.tokenizer, prompt)})["tokens"]
        if self.family != "sdxl":
            return Caption(tokens, None)
        second = self.run("text_encoder_2", {"ids": self._ids(self.pipeline.tokenizer_2, prompt)})
        return Caption(torch.cat([tokens, second["tokens"]], -1), second["pooled"])

    def _ids(self, tokenizer: Any, prompt: str) -> Tensor:
        text = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return text.input_ids.to(self.device)

    def null_reference(self) -> Tensor:
        """Tokens (1, T, C_x) of the unconditional reference."""
        self.require_references()
        return self.constants["null_reference"]

    def _encode_image(self, pixels: Tensor) -> Tensor:
        self.require_references()
        return self.run("image_encoder", {"pixels": pixels})["tokens"]

    def _project_image(self, embeds: Tensor) -> Tensor:
        return embeds  # the component's projection has made tokens of them

    def require_references(self) -> None:
        """InputError where the exported model cannot take references."""
        if not self.has("image_encoder"):
            raise InputError(
                f"{self.folder.path} was exported without an IP-Adapter, and references need one; "
                "export the model with --ip-adapter, or draw with --iterations 0"
            )

    @cached_property
    def causal(self) -> StoryModel:
        """This model as causal mode draws with it: the UNet and the projections of that mode."""
        twin = copy.copy(self)
        twin.unet = EngineUnet(self, "unet_causal", self.unet.config)
        twin.layers = cast(Any, EngineLayers(self, "text_projector_causal"))
        return twin

    def added_conditions(self, pooled: Tensor, width: int, height: int) -> dict[str, Tensor]:
        """SDXL's text_embeds and time_ids of one row."""
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device)
        return {"text_embeds": pooled, "time_ids": ids}

    def _pipeline(self) -> Any:
        """What is read of a pipeline: tokenizers, the scheduler's configuration, the making of pictures."""
        path, pooled = self.folder.path, self.manifest["pooled_width"]
        read = SimpleNamespace(
            tokenizer=self._tokenizer("tokenizer", "text_encoder"),
            scheduler=open_scheduler(path / "scheduler", self.manifest["scheduler"]),
            image_processor=VaeImageProcessor(vae_scale_factor=self.vae_factor),
            config=SimpleNamespace(
                force_zeros_for_empty_prompt=self.manifest["force_zeros_for_empty_prompt"]
            ),
            get_guidance_scale_embedding=_guidance_embedding,
        )
        if pooled is not None:
            read.tokenizer_2 = self._tokenizer("tokenizer_2", "text_encoder_2")
            read.text_encoder_2 = SimpleNamespace(config=SimpleNamespace(projection_dim=pooled))
        return read

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

    def _history(self) -> History:
        config = HistoryConfig.read(self.manifest["history"], str(self.folder.path))
        sizes = {"frame_tokens": config.frame_tokens, "image_size": config.vision["image_size"]}
        check_values(sizes, self.folder.path / MANIFEST)
        tokenizer = open_tokenizer(self.folder.path / "history_tokenizer")
        return History(cast(Any, EngineHistory(self, config)), tokenizer, image_processor(config), {}, ())


def _guidance_embedding(weights: Tensor, embedding_dim: int) -> Tensor:
    """diffusers' embedding of the guidance scale, which reads nothing of its pipeline."""
    make: Any = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    return make(None, weights, embedding_dim=embedding_dim)


def check_ports(session: Any, described: Mapping[str, Any], where: str) -> None:
    """InputError for a graph that takes or gives other tensors than fastory.json says."""
    other = {*session.types} - {*described["inputs"]} or {*described["outputs"]} - {*session.outputs}
    if other:
        raise InputError(
            f"{where}: its graph and fastory.json differ in {min(other)[:60]}; export the model anew"
        )


def sessions_for(
    folder: ExportFolder, device: torch.device, trust_cache: bool = False
) -> Callable[[str], Session]:
    """What runs the components of `folder` on `device`: on CUDA the engines that were built for it, else ONNX Runtime.

    Raises InputError where only TensorRT could, and there is no engine.
    """
    engines = engines_for(folder, device)
    if len(engines) < len(folder.components):
        refuse_onnxruntime(folder)

    def session(name: str) -> Session:
        if name in engines:
            return TensorRtSession(folder.path, engines[name], device, trust_cache=trust_cache)
        return OrtSession(folder.path / folder.components[name]["file"], device)

    return session


def engines_for(folder: ExportFolder, device: torch.device) -> dict[str, str]:
    """The engine file of every component that has one: TensorRT's, else that of TensorRT for RTX for this GPU."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        component: file
        for component in folder.components
        for file in (engine_name(component, f"sm{major}{minor}"), engine_name(component))
        if (folder.path / file).is_file()
    }


def refuse_onnxruntime(folder: ExportFolder) -> None:
    """InputError for a type or a binding that ONNX Runtime cannot run."""
    if folder.dtype == torch.bfloat16:
        raise InputError(
            f"{folder.path} was exported in bfloat16, which ONNX Runtime does not compute; export it in float32 or "
            "float16, or build engines on a machine with an NVIDIA GPU: fastory export --trt"
        )
    if folder.manifest["binding"] == "trt":
        raise InputError(
            f"{folder.path} is bound for TensorRT, and ONNX Runtime cannot run that; "
            "run the same `fastory export --onnx` with --bind ort, which changes the small graph files alone"
        )


def check_sizes(name: str, component: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """InputError for the first size outside the ranges of a component, or that contradicts another."""
    sizes: dict[str, int] = {}
    for key, one in component["inputs"].items():
        got, wanted = tuple(inputs[key].shape), one["shape"]
        fits = len(got) == len(wanted)
        for length, axis in zip(got, wanted, strict=False):
            if isinstance(axis, int):
                fits = fits and length == axis
                continue
            factor, size = factored(axis)
            low, high = component["ranges"][size]
            fits = fits and length % factor == 0 and low <= length // factor <= high
            fits = fits and sizes.setdefault(size, length // factor) == length // factor
        if not fits:
            ranges = ", ".join(f"{k} {low} to {high}" for k, (low, high) in component["ranges"].items())
            raise InputError(
                f"{name}: {key}: wanted {tuple(wanted)} with {ranges}, got {got}; export the model for these sizes"
            )


class EngineUnet:
    """Called as diffusers' UNet is called by the sampler; the context's tensors are its inputs."""

    def __init__(self, model: EngineModel, component: str, config: Any) -> None:
        self.model, self.component, self.config = model, component, config

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        cross_attention_kwargs: Mapping[str, Any],
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_hidden_states: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """sample (B, c, h, w) -> (prediction,)."""
        if not self.model.has(self.component):
            mode = "iterative" if self.component == "unet" else "causal"
            raise InputError(f"{self.model.folder.path} was exported without what --mode {mode} needs")
        inputs = {"sample": sample, "timestep": timestep.float(), **(added_cond_kwargs or {})}
        if timestep_cond is not None:
            inputs["timestep_cond"] = timestep_cond
        context = cross_attention_kwargs["context"]
        if isinstance(context, ReferenceContext):
            inputs |= self._references(context)
        else:
            assert isinstance(context, HistoryContext)
            inputs |= {"kv": context.kv, "padding": context.padding}
        return (self.model.run(self.component, inputs)["prediction"],)

    def _references(self, context: ReferenceContext) -> dict[str, Tensor]:
        """The exported number of groups, the further ones empty; without references one that nobody sees."""
        size, groups = context.tokens_per_ref, self.model.folder.groups
        ref_kv, visible = context.ref_kv, context.ref_visible
        if ref_kv.shape[1] == 0:
            ref_kv = ref_kv.new_zeros(1, size, ref_kv.shape[2])
            visible = visible.new_zeros(visible.shape[0], 1)
        missing = groups + 1 - len(context.ref_offsets)
        offsets = torch.cat([context.ref_offsets, context.ref_offsets[-1:].expand(missing)])
        scale = torch.cat([context.scale, context.scale.new_zeros(groups - len(context.scale))])
        return {
            "text_kv": context.text_kv,
            "ref_kv": ref_kv,
            "ref_visible": visible,
            "ref_offsets": offsets,
            "scale": scale,
        }


class EngineLayers:
    """The projections of CrossAttentionLayers. width: W."""

    def __init__(self, model: EngineModel, text_projector: str) -> None:
        self.model, self.text_projector = model, text_projector
        self.width = int(model.manifest["width"])

    def project_text(self, tokens: Tensor) -> Tensor:
        """tokens (B, Lt, C_x) -> (B, Lt, W)."""
        return self.model.run(self.text_projector, {"tokens": tokens})["kv"]

    def project_references(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W)."""
        return self.model.run("reference_projector", {"tokens": tokens})["kv"]


class EngineVae:
    """The decoding half of the autoencoder."""

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        self.config = SimpleNamespace(**model.manifest["vae"])
        self.dtype = getattr(torch, model.manifest["vae"]["dtype"])

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """latents (B, c, h, w) -> (pixels (B, 3, H, W),)."""
        return (self.model.run("vae_decoder", {"latents": latents})["pixels"],)


class EngineHistory:
    """The history encoder: what Ring and StoryModel.encode_frame call of HistoryEncoder."""

    def __init__(self, model: EngineModel, config: HistoryConfig) -> None:
        self.model, self.config = model, config
        self.type_embeddings = SimpleNamespace(weight=model.constants["history_types"])
        self.times = model.constants["history_times"]
        self.local_attention = EngineLocalAttention(model) if config.local_heads else None
        self.adapter = self._adapt if config.bottleneck else None

    def multimodal(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """m_n (B, S, C_x) of captions and pictures."""
        return self.model.run("history_encoder", {"ids": ids, "mask": mask, "pixels": pixels})["tokens"]

    def _adapt(self, tokens: Tensor) -> Tensor:
        return self.model.run("history_adapter", {"tokens": tokens})["history"]

    def positions(self) -> Tensor:
        """type_1 + time_p for every position p of a window: (P, C_x)."""
        return self.type_embeddings.weight[1] + self.times


class EngineLocalAttention:
    """The local causal attention of the newest frame among those of its ring."""

    def __init__(self, model: EngineModel) -> None:
        self.model = model

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, S, C_x) -> K and V (B, S, H, d)."""
        out = self.model.run("history_keys_values", {"tokens": tokens})
        return out["keys"], out["values"]

    def __call__(
        self,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        padding: Tensor,
        *,
        frame_tokens: int,
        window: int,
        first_frame: int = 0,
    ) -> Tensor:
        """(B, S, C_x) of the newest frame; the ring has dropped what stands before the window."""
        inputs = {"tokens": tokens, "keys": keys, "values": values, "padding": padding}
        return self.model.run("history_attention", inputs)["history"]
