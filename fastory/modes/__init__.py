"""Algorithms of the papers: one generator a mode."""
