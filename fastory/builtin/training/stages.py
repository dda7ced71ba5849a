"""Train the built-in model: python -m fastory.builtin.training --stage all --workdir DIR

Stages follow one another: vae, clip, unet, adapter, history. Each writes its networks to DIR/model in diffusers layout,
float32, and its resumable state to DIR/state-STAGE; `pack` writes the folder that ships, fp16 files. Interrupted, the same
command goes on. On CPU two processes with one thread each average their gradients. Causal mode's history is then tuned from
DIR/model/history-start.safetensors (see drawn_stories).
"""

import argparse
import hashlib
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from fastory.builtin.training.adapter import AdapterObjective, load_adapter
from fastory.builtin.training.autoencoder import VaeObjective
from fastory.builtin.training.denoiser import Corpus, UnetObjective
from fastory.builtin.training.encoders import ClipObjective
from fastory.builtin.training.loop import Objective, Plan, join, train
from fastory.builtin.training.networks import LARGE, SMALL, Network
from fastory.builtin.training.pack import pack
from fastory.builtin.training.remembering import HistoryObjective
from fastory.builtin.training.tokenizer import grown_tokenizer

STAGES = ("vae", "clip", "unet", "adapter", "history")
MINUTES = {  # by device; the shares are those of the plan of 20 minutes on an H100
    "cpu": {"vae": 45.0, "clip": 25.0, "unet": 120.0, "adapter": 60.0, "history": 15.0},
    "cuda": {"vae": 4.0, "clip": 3.0, "unet": 7.0, "adapter": 6.0, "history": 2.0},
}
STORIES = {"cpu": 2000, "cuda": 30_000}
WORKERS = {"cpu": 0, "cuda": 12}
BATCHES = {  # pictures in a batch and process
    "cpu": {"vae": 4, "clip": 40, "unet": 32, "adapter": 32, "history": 40},
    "cuda": {"vae": 48, "clip": 256, "unet": 512, "adapter": 512, "history": 256},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastory.builtin.training", description=__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "pack", "all"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="of the stage; with `all`, of all stages together")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage, instead of minutes")
    parser.add_argument("--init-from", type=Path, help="a model folder whose networks the stages start from")
    parser.add_argument("--workdir", type=Path, default=Path("builtin-training"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="two on CPU, one on a GPU unless given")
    parser.add_argument("--stories", type=int, help="drawn stories whose latents are cached")
    parser.add_argument("--batch", type=int, help="pictures in a batch and process")
    parser.add_argument("--learning-rate", type=float, help="the stage's own unless given")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="stages unet and adapter: products in bfloat16 (a CPU with AMX)",
    )
    parser.add_argument("--large", action="store_true", help="the larger networks, for a GPU")
    return parser.parse_args(arguments)


def kind_of(options: argparse.Namespace) -> str:
    """`cpu` or `cuda`, for the tables above."""
    return "cuda" if options.device.startswith("cuda") else "cpu"


def minutes_of(stage: str, options: argparse.Namespace) -> float:
    """A stage's minutes: given, its share of those given for all, or the device's usual ones."""
    usual = MINUTES[kind_of(options)]
    if options.minutes is None:
        return usual[stage]
    return options.minutes * usual[stage] / sum(usual.values()) if options.stage == "all" else options.minutes


def build_objective(stage: str, options: argparse.Namespace, part: int, parts: int) -> Objective:
    """The networks and the loss of a stage; encodes the corpus first where the stage needs it."""
    torch.manual_seed(options.seed)
    model, sizes = options.workdir / "model", LARGE if options.large else SMALL
    batch = options.batch or BATCHES[kind_of(options)][stage]
    if stage == "vae":
        return VaeObjective(sizes, batch)
    vae: Network = AutoencoderKL.from_pretrained(model / "vae") if (model / "vae").exists() else None
    if stage == "clip" and not (model / "unet").exists():
        if options.init_from:
            return _with_new_words(options.init_from, vae, batch)
        return ClipObjective(vae, None, batch)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    if stage == "clip":
        return ClipObjective(vae, _text_encoder(model), batch, tokenizer)
    if stage == "history":
        seen: Network = CLIPVisionModelWithProjection.from_pretrained(model / "image_encoder")
        return HistoryObjective(vae, _text_encoder(model), seen.float(), tokenizer, batch)
    corpus = _corpus(options, vae, part, parts)
    shared = (corpus, tokenizer, _text_encoder(model), vae, sizes, batch)
    if stage == "unet":
        return UnetObjective(*shared)
    image_encoder: Network = CLIPVisionModelWithProjection.from_pretrained(model / "image_encoder").float()
    corpus.embed_references(vae, image_encoder, part, parts, options.device)
    _meet()
    return AdapterObjective(UNet2DConditionModel.from_pretrained(model / "unet"), image_encoder, *shared)


def _with_new_words(folder: Path, vae: Network, batch: int) -> ClipObjective:
    """The clip stage on a model folder's encoders: the grammar's words that its tokenizer splits get tokens of their own."""
    tokenizer = grown_tokenizer(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    text_encoder = _text_encoder(folder)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return ClipObjective(vae, text_encoder, batch, tokenizer, new_words=True)


def _text_encoder(model: Path) -> Network:
    encoder: Network = CLIPTextModel.from_pretrained(model / "text_encoder", attn_implementation="eager")
    return encoder.float()


def _corpus(options: argparse.Namespace, vae: Network, part: int, parts: int) -> Corpus:
    """The corpus with its latents; every process encodes its part."""
    model = options.workdir / "model"
    marks = [_mark(file) for file in (model / "vae", model / "image_encoder") if file.exists()]
    stories = options.stories or STORIES[kind_of(options)]
    corpus = Corpus(options.workdir / "corpus", options.seed, stories, WORKERS[kind_of(options)])
    if part == 0:
        corpus.open_tables(*marks)  # makes the empty files that every process then opens
    _meet()
    corpus.open_tables(*marks)
    corpus.encode_latents(vae, part, parts, options.device)
    _meet()
    return corpus


def _mark(folder: Path) -> str:
    """Eight hex digits that change with a network's weights."""
    (file,) = folder.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def start_from(objective: Objective, folder: Path) -> None:
    """Load the networks of a stage from a model folder. Raises what from_pretrained raises if one does not fit.

    The clip stage has its text encoder already, with rows for words that the folder's does not know.
    """
    children: list[tuple[str, Network]] = list(objective.named_children())
    for name, network in children:
        if (folder / name).exists() and not (objective.name == "clip" and name == "text_encoder"):
            network.load_state_dict(
                type(network).from_pretrained(folder / name).float().state_dict(), strict=False
            )
    if objective.name == "adapter":
        load_adapter(dict(children)["unet"], folder / "ip_adapter" / "ip_adapter.safetensors")


def run_stage(rank: int, stage: str, options: argparse.Namespace, processes: int, store: Path) -> None:
    """One process of one stage."""
    join(rank, processes, store)
    objective = build_objective(stage, options, rank, processes)
    if options.init_from:
        start_from(objective, options.init_from)
    if options.learning_rate:
        objective.learning_rate = options.learning_rate
    plan = Plan(
        options.workdir,
        minutes_of(stage, options),
        options.steps,
        options.seed,
        options.device,
        WORKERS[kind_of(options)],
        bf16=options.bf16,
    )
    if options.bf16:
        objective.hasten()
    train(objective, plan)
    if rank == 0:
        (options.workdir / "samples").mkdir(exist_ok=True)
        with torch.no_grad():
            objective.sample(options.workdir / "samples")
        objective.finish(options.workdir / "model")
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that the command line asks for."""
    options = parse(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    processes = options.processes or (1 if options.device.startswith("cuda") else 2)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        if stage == "pack":
            continue
        store = Path(tempfile.mkdtemp()) / "store"
        if processes == 1:
            run_stage(0, stage, options, 1, store)
        else:
            mp.spawn(run_stage, (stage, options, processes, store), processes)
        shutil.rmtree(store.parent)
    if options.stage in ("pack", "all"):
        pack(options.workdir / "model", options.workdir / "packed")


if __name__ == "__main__":
    main()
