"""Attention processors that join diffusers' UNets and the kernels."""
