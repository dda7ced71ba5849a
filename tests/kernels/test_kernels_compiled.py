"""Every shipped launch setting compiles for sm_80, 89, 90 and 100: no spills, wide loads, matrix instructions."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from fastory.kernels.banded import triton as banded  # noqa: E402
from fastory.kernels.configs import lookup  # noqa: E402
from fastory.kernels.grca import triton as grca  # noqa: E402
from fastory.kernels.offline import ARCHITECTURES, SHARED_LIMIT, Compiled, compile_for  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="TRITON_INTERPRET=1: nothing is compiled in this process",
)
WIDTHS = (8, 40, 64, 72, 80, 128, 160, 256)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_grca(
    capability: int,
    dtype: torch.dtype,
    width: int,
    references: int,
    groups: int,
    queries: int = 1024,
    launch: dict[str, Any] | None = None,
) -> Compiled:
    """As the UNet calls it: K and V as views of one wide tensor, visibility, and for several groups their masks."""
    heads = 8
    q = _meta(2, queries, heads, width, dtype=dtype)
    kt, vt, kr, vr = (
        x.unflatten(-1, (heads, width))
        for tokens in (77, references)
        for x in _meta(2, tokens, 4 * heads * width, dtype=dtype).chunk(4, -1)[1:3]
    )
    offsets = _meta(groups + 1, dtype=torch.int64) if groups > 1 else None
    mask = _meta(1, groups, queries, dtype=torch.float32) if groups > 1 else None
    visible = _meta(2, references // 4, dtype=torch.bool)
    scale = _meta(groups, dtype=torch.float32)
    ranges = _meta(2, groups, 4, dtype=torch.int32)
    arguments, piece = grca.arguments(q, kt, vt, kr, vr, scale, offsets, visible, ranges, mask, q)
    launch = launch or grca.settings(capability, 8 * dtype.itemsize, width, queries, groups)
    slots = grca.slots(groups, dtype, launch["BLOCK_N"])
    fixed = grca.constants(width, 4, dtype, piece, slots)
    return compile_for(capability, grca.grca_kernel, arguments, fixed | launch)


def compile_banded(capability: int, dtype: torch.dtype, width: int, one_group: bool) -> Compiled:
    """As the UNet calls it (one group, a caption before the history) or the history module."""
    q = _meta(2, 1024, 8, width, dtype=dtype)
    k, v = (x.unflatten(-1, (8, width)) for x in _meta(2, 455, 4 * 8 * width, dtype=dtype).chunk(4, -1)[1:3])
    padding = _meta(2, 455, dtype=torch.bool)
    arguments, piece = banded.arguments(q, k, v, 91, 4, 3, 0 if one_group else None, padding, 91, q)
    launch = banded.settings(capability, 8 * dtype.itemsize, width, 1024)
    fixed = banded.constants(width, one_group, dtype, piece)
    return compile_for(capability, banded.banded_kernel, arguments, fixed | launch)


def assert_fit(built: Compiled, dtype: torch.dtype, width: int = 64) -> None:
    assert built.spilled_bytes == 0
    assert built.shared_bytes <= SHARED_LIMIT[built.capability]
    assert built.blocks_per_multiprocessor >= 1
    widest = 16 if width > 8 else 8  # a tile of 16 columns is 8 bytes a thread
    assert sum(n for size, n in built.global_loads().items() if size >= widest) >= 3, (
        "q, k and v in wide loads"
    )
    # Lost alignment would show as hundreds of loads of one element. The last 16 keys times the 16 columns of a split
    # head are 2 bytes a thread where a program has 256: twice for k and v, in two loops.
    assert built.global_loads().get(2, 0) <= 4
    if dtype != torch.float32:
        assert built.matrix_instructions >= 2


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize(
    ("width", "references", "groups"), [(40, 4, 1), (64, 160, 20), (160, 400, 1)], ids=str
)
def test_grca_compiles_for_the_unets_shapes(
    capability: int, width: int, references: int, groups: int
) -> None:
    assert_fit(compile_grca(capability, torch.float16, width, references, groups), torch.float16)


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda c: f"sm_{c}")
def test_banded_compiles_for_the_unets_shape(capability: int) -> None:
    assert_fit(compile_banded(capability, torch.float16, 80, True), torch.float16)


def _everything() -> list[tuple[int, torch.dtype, int]]:
    types = (torch.float16, torch.bfloat16, torch.float32)
    return [
        (capability, dtype, width)
        for capability, dtype, width in itertools.product((*ARCHITECTURES, 86), types, WIDTHS)
        if dtype != torch.float32 or width <= 160
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "width"), _everything(), ids=str)
@pytest.mark.parametrize("groups", [1, 4, 20], ids=lambda groups: f"G{groups}")
def test_grca_compiles_for_every_setting(
    capability: int, dtype: torch.dtype, width: int, groups: int
) -> None:
    """sm_86 has no file of its own: the settings of default.json. The number of references is not compiled in."""
    assert_fit(compile_grca(capability, dtype, width, 400, groups), dtype, width)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "width"), _everything(), ids=str)
@pytest.mark.parametrize("one_group", [True, False], ids=["unet", "history"])
def test_banded_compiles_for_every_setting(
    capability: int, dtype: torch.dtype, width: int, one_group: bool
) -> None:
    assert_fit(compile_banded(capability, dtype, width, one_group), dtype, width)


def test_bfloat16_compiles_to_matrix_instructions() -> None:
    """The interpreter's upcast must not reach the GPU."""
    built = compile_grca(90, torch.bfloat16, 64, 4, 1)
    assert_fit(built, torch.bfloat16)
    assert "bf16" in built.ptx


def test_a_limit_of_registers_is_a_setting(tmp_path: Path) -> None:
    """As a rule names it, and as the compiler keeps it: two blocks of 8 warps on a multiprocessor in place of one."""
    rule = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    (tmp_path / "default.json").write_text(
        json.dumps({"rules": [{"bits": 16, **rule}, {**rule, "maxnreg": 64}]})
    )
    assert lookup(tmp_path, 90, 16, 64, 1024)["maxnreg"] == 128
    launch = lookup(tmp_path, 90, 16, 64, 1024)
    built = compile_grca(90, torch.float16, 64, 80, 1, launch=launch)
    assert built.registers <= 128 and built.blocks_per_multiprocessor == 2
    assert "maxnreg" not in grca.settings(90, 16, 64, 1024)


def _runtime_integers(kernel: Any) -> set[str]:
    """Arguments that are neither constants nor pointers: the sizes, the strides and the band."""
    pointers = {
        "q",
        "k",
        "v",
        "k_text",
        "v_text",
        "k_ref",
        "v_ref",
        "scale",
        "ref_offsets",
        "ref_visible",
        "ref_ranges",
        "mask",
    }
    names = {parameter.name for parameter in kernel.params if not parameter.is_constexpr}
    return names - pointers - {"out", "key_padding"}


@pytest.mark.parametrize("module", [grca, banded], ids=["grca", "banded"])
def test_no_size_or_window_makes_a_new_binary(module: Any) -> None:
    """Triton compiles anew for 1, for multiples of 16 and for constants: none of the sizes may be one of these."""
    kernel = getattr(module, f"{module.__name__.split('.')[-2]}_kernel")
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert _runtime_integers(kernel) == free
