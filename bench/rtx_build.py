"""Build an engine of a full-size SD1.5 UNet (random weights, float16) with TensorRT for RTX, on a machine without a GPU.

    python bench/rtx_build.py [--target sm89] [--folder FOLDER]

Prints seconds, memory and size of the export and of the engine, which takes 1 to 8 rows of 256 to 768 pixels a side, 77
to 308 caption tokens, and 1 to 100 references. Wants 12 GB of memory and 4 GB of disk. With --folder the export stays
there, and is used again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

SIZES = ["batch=1:8", "height=256:768", "width=256:768", "text=77:308", "references=1:100"]
UNET = {"sample_size": 64, "cross_attention_dim": 768}  # SD1.5; the rest is diffusers' default


def export(folder: Path) -> None:
    """unet.onnx, its weights and fastory.json; prints what it took. In a process of its own, whose memory goes back."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from fastory import StoryModel
    from fastory.export import unets
    from fastory.export.choices import Groups
    from fastory.export.onnx import export_component
    from fastory.models.export_folder import hashes_of, write_manifest
    from fastory.processors.projected import CrossAttentionLayers

    started = time.monotonic()
    model = StoryModel.open("builtin", device="cpu", dtype="float16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(**UNET).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    plain = CrossAttentionLayers(unet)
    adapter = (
        [layer.attn.to_k.weight for layer in plain.layers],
        [layer.attn.to_v.weight for layer in plain.layers],
    )
    model.unet, model.layers = unet, CrossAttentionLayers(unet, *adapter)
    component = unets.unet(model, Groups())
    folder.mkdir(parents=True, exist_ok=True)
    described = export_component(component, folder, 1, "ort")
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    manifest = {
        "schema": 1,
        "dtype": "float16",
        "groups": 1,
        "size_factor": model.size_factor,
        "vae_factor": model.vae_factor,
        "components": {
            "unet": {**described, "hot": {**described["hot"], "height": 8, "width": 8, "text": 77}}
        },
    }
    write_manifest(folder, {**manifest, "files": hashes_of(folder)})
    report("export", time.monotonic() - started, peak(), parameters=parameters)


def peak() -> int:
    """Bytes of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(step: str, seconds: float, memory: int | None, **more: object) -> None:
    """One line of JSON."""
    gib = round(memory / 2**30, 2) if memory else None
    print(json.dumps({"step": step, "seconds": round(seconds, 1), "peak_gib": gib, **more}), flush=True)


def main() -> None:
    """Export where there is no export yet, and build."""
    from fastory.export.choices import parse_sizes
    from fastory.export.tensorrt import build_rtx
    from fastory.models.tensorrt_packages import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(
        platform.machine(),
        "Python",
        platform.python_version(),
        "TensorRT for RTX",
        load("tensorrt_rtx").__version__,
    )
    with tempfile.TemporaryDirectory() as aside:
        folder = options.folder or Path(aside) / "sd15"
        if not (folder / "fastory.json").is_file():
            process = multiprocessing.get_context("spawn").Process(target=export, args=(folder,))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit("the export failed")
        for built in build_rtx(folder, options.target, sizes=parse_sizes(SIZES)):
            size = round(built.bytes / 1e9, 3)
            report("build", built.seconds, built.peak_memory, engine=built.engine.name, gb=size, sizes=SIZES)


if __name__ == "__main__":
    main()
