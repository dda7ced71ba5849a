"""Triton operators of fastory and their oracles: pure functions of tensors (installed as fastory.kernels)."""
