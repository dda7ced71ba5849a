"""`fastory convert`: pickled checkpoints into safetensors. What a file is, its keys tell."""

from __future__ import annotations

from pathlib import Path

from fastory.checkpoints.ar_ldm import convert_ar_ldm, is_ar_ldm
from fastory.checkpoints.loading import enough_memory
from fastory.checkpoints.pickles import beside, read_pickle, write_tensors
from fastory.errors import InputError


def convert_checkpoint(
    path: Path,
    output: Path | None = None,
    *,
    config: Path | None = None,
    overwrite: bool = False,
    offline: bool = False,
) -> Path:
    """Converts a pickle and returns what was written: a model folder of an AR-LDM checkpoint, else one file.

    config: see convert_ar_ldm. The default output lies beside the input. Nothing in the file is executed. Raises
    InputError for what is not tensors alone, is damaged or incomplete, and for an existing output.
    """
    with enough_memory(str(path)):
        tensors = read_pickle(path)
        if is_ar_ldm(tensors):
            folder = output or path.with_suffix("")
            return convert_ar_ldm(path, tensors, folder, config=config, overwrite=overwrite, offline=offline)
        if config is not None:
            raise InputError(
                f"--config is for AR-LDM checkpoints, and {path} is none: no key of it begins with mm_encoder."
            )
        return write_tensors(tensors, output or beside(path), overwrite=overwrite)
