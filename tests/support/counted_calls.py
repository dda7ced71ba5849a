"""Forward calls of modules, counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def calls(modules: dict[str, torch.nn.Module]) -> Iterator[Counter[str]]:
    """Counts forward calls of the named modules."""
    counter: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counter.update([name]))
        for name, module in modules.items()
    ]
    yield counter
    for handle in handles:
        handle.remove()
