"""What only a GPU can show: graphs, no synchronisation, no new binaries, extents beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import assert_within, banded_oracle, grca_oracle
from torch import Tensor

from fastory.kernels import backends
from fastory.kernels.banded import banded_causal_attention
from fastory.kernels.grca import grca

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device in this machine"),
]
SPREAD = [(77, 4), (77, 80), (77, 400)]


def call(
    rows: int, text: int, refs: int, width: int = 64, dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    keys = [draw(n, tokens, 8, width) for n, tokens in ((rows, text), (1, refs)) for _ in "kv"]
    return [draw(rows, 1024, 8, width), *keys, torch.tensor(0.3, device="cuda")]


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize(("text", "refs"), SPREAD)
def test_graph_replays_with_a_new_scale_and_new_references(text: int, refs: int) -> None:
    """The scale changes every round and the references too: a captured graph must read both anew."""
    tensors = call(2, text, refs)
    seen = torch.rand(2, refs // 4, device="cuda") > 0.3
    graph, out = captured(lambda: grca(*tensors, ref_visible=seen))
    tensors[5].fill_(0.9)
    tensors[3].normal_()
    seen.logical_not_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, grca(*tensors, ref_visible=seen))
    assert_within(out, *grca_oracle(tensors, {"ref_visible": seen}))


def test_graph_of_the_band_replays_with_a_moved_ring() -> None:
    """One graph serves every frame: empty slots are padded, and which ones changes."""
    q = torch.randn(2, 1024, 8, 80, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(2, 91 + 4 * 91, 8, 80, device="cuda", dtype=torch.float16) for _ in "kv")
    padding = torch.zeros(2, k.shape[1], device="cuda", dtype=torch.bool)
    padding[:, 182:] = True
    options = {"group_size": 91, "window": 4, "query_group": 3, "query_group_size": 0, "prefix": 91}
    graph, out = captured(lambda: banded_causal_attention(q, k, v, key_padding=padding, **options))
    padding[:, 182:273] = False
    graph.replay()
    torch.cuda.synchronize()
    assert_within(out, *banded_oracle([q, k, v], options | {"key_padding": padding}))


def test_no_call_waits_for_the_device() -> None:
    tensors = call(2, 77, 80)
    options = {
        "ref_offsets": torch.tensor([0, 40, 80], device="cuda"),
        "mask": torch.rand(1, 2, 1024, device="cuda"),
    }
    tensors[5] = torch.rand(2, 2, device="cuda")
    grca(*tensors, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grca(*tensors, **options)
        banded_causal_attention(tensors[0], tensors[1], tensors[2], group_size=7, window=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    torch.cuda.is_available() and backends.choose(torch.device("cuda", 0)).implementation != "triton",
    reason="another implementation is chosen",
)
def test_longer_stories_other_scales_and_windows_compile_nothing_new() -> None:
    from fastory.kernels.banded.triton import banded_kernel
    from fastory.kernels.grca.triton import grca_kernel

    def entries() -> int:
        return sum(
            len(cache[0])
            for kernel in (grca_kernel, banded_kernel)
            for cache in kernel.device_caches.values()
        )

    def sweep(rows: int, refs: int, window: int, group_size: int) -> None:
        tensors = call(rows, 77, refs)
        grca(*tensors, ref_visible=torch.ones(rows, refs // 4, dtype=torch.bool, device="cuda"))
        banded_causal_attention(*tensors[:3], group_size=group_size, window=window, query_group=window)

    sweep(2, 8, 2, 4)
    before = entries()
    for rows, refs, window, group_size in ((3, 12, 1, 7), (16, 400, 5, 1), (5, 52, 3, 16), (2, 4, 4, 3)):
        sweep(rows, refs, window, group_size)
    assert entries() == before


def test_extent_beyond_32_bits() -> None:
    """q, keys and the result lie more than 2^31 elements from where their tensor begins."""
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GB")
    rows, width = 2**31 // (4096 * 8 * 64) + 2, 64
    q = torch.zeros(rows, 4096, 8, width, device="cuda", dtype=torch.float16)
    q[-1].normal_()
    tensors = call(1, 77, 80)
    out = grca(q, *tensors[1:])
    last = [q[-1:], *tensors[1:]]
    assert_within(out[-1:], *grca_oracle(last, {}))
    wide = torch.randn(1, 77, 2**31 // 76 + 4096, device="cuda", dtype=torch.float16)
    k, v = (wide[..., n * 512 : (n + 1) * 512].unflatten(-1, (8, width)) for n in (0, 1))
    assert k.stride(1) * 76 > 2**31
    far = [q[-1:], k, v, *tensors[3:]]
    assert_within(grca(*far), *grca_oracle(far, {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_row_has_the_same_bytes_in_any_place(dtype: torch.dtype) -> None:
    tensors = call(4, 77, 80, dtype=dtype)
    order = torch.tensor([2, 0, 2, 1], device="cuda")
    moved = [tensors[0][order], tensors[1][order], tensors[2][order], *tensors[3:]]
    assert torch.equal(grca(*moved), grca(*tensors)[order])
