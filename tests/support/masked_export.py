"""An export with masks, from the one without that the suite shares: other UNets and the VAE's encoder beside its graphs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fastory import StoryModel
from fastory.export.choices import Groups
from fastory.export.graphs import components
from fastory.export.onnx import export_component
from fastory.models.export_folder import MANIFEST, hashes_of, write_manifest

OTHERS = ("unet", "unet_causal", "vae_encoder")


def with_masks(export: Path, model: StoryModel, groups: Groups, folder: Path) -> Path:
    """A copy of `export`, of `model`, in `folder` as if it had been exported for these groups. Weights are linked."""
    shutil.copytree(
        export,
        folder,
        copy_function=os.link,
        ignore=shutil.ignore_patterns("unet.onnx*", "unet_causal.onnx*"),
    )
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).unlink()
    others = {
        component.name: export_component(component, folder, groups.count, "ort")
        for component in components(model, groups)
        if component.name in OTHERS
    }
    manifest |= {"groups": groups.count, **groups.noted()}
    manifest["components"] |= others
    write_manifest(folder, {**manifest, "files": hashes_of(folder)})
    return folder
