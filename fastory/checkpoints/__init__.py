"""Opening what users bring: folders, single files, hub models, IP-Adapters, image encoders and LoRAs."""

from fastory.checkpoints.libraries import imported

with imported():
    from fastory.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from fastory.checkpoints.convert import convert_checkpoint
    from fastory.checkpoints.hashes import model_hashes
    from fastory.checkpoints.ip_adapter import IPAdapter, attn2_layers
    from fastory.checkpoints.loaded_pipeline import checkpoint_of
    from fastory.checkpoints.pickles import convert_pickle

__all__ = [
    "Checkpoint",
    "IPAdapter",
    "attn2_layers",
    "checkpoint_of",
    "convert_checkpoint",
    "convert_pickle",
    "model_hashes",
    "open_checkpoint",
]
