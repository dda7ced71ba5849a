"""Sampling: schedulers, noise, and the denoising of a micro-batch."""
