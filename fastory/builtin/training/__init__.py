"""How the built-in model is trained: python -m fastory.builtin.training (see stages.py)."""
