"""Constraints at the oldest releases that setup.py admits, from the installed fastory's own metadata: a line each.

PyTorch and Triton are left out: the oldest PyTorch is published as a CUDA build of several GB alone, so the CPU build that the
rest of this script runs with stands in for it.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("fastory") or ()):
    extra = requirement.marker is not None and "extra" in str(requirement.marker)
    if requirement.name in ("torch", "triton") or (
        extra and 'extra == "onnx"' not in str(requirement.marker)
    ):
        continue
    lowest = [one.version for one in requirement.specifier if one.operator == ">="]
    print(f"{requirement.name}=={lowest[0]}" if lowest else f"# {requirement.name}: no lower bound")
