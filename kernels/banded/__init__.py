"""Local causal attention at the granularity of a frame's tokens (Causal-Story, ICASSP 2024)."""

from fastory.kernels.banded.api import banded_causal_attention
from fastory.kernels.banded.reference import banded_causal_attention_reference

__all__ = ["banded_causal_attention", "banded_causal_attention_reference"]
