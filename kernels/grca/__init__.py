"""Global reference cross-attention in its grouped form (Story-Adapter, arXiv 2410.06244)."""

from fastory.kernels.grca.api import grca
from fastory.kernels.grca.ranges import visible_ranges
from fastory.kernels.grca.reference import grca_reference

__all__ = ["grca", "grca_reference", "visible_ranges"]
