"""The lists of kernel cases: every value and every pair of values occurs. The other kernel tests draw on them."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastory import packages
from fastory.kernels.banded import banded_causal_attention_reference
from fastory.kernels.grca import grca_reference

Case = dict[str, Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (8, 40, 64, 72, 80, 128, 160, 256)

GRCA = {
    "d": WIDTHS,
    "L": (1, 63, 64, 100, 1024),
    "text": (1, 77, 154),
    "refs": (0, 4, 16, 60, 400),
    "groups": (1, 2, 5),
    "visible": ("any", "none", "all but one", "one", "random"),
    "rows": ("one for all", "one for each", "every second"),
    "mask": ("none", "zeros", "fractions", "one empty"),
    "scale": ("zero", "0.3", "negative", "per group", "per row"),
    "layout": ("contiguous", "strided", "odd"),
    "dtype": tuple(DTYPES),
    "logits": ("usual", "large"),
}
BANDED = {
    "d": WIDTHS,
    "L": (1, 63, 64, 100),
    "group_size": (1, 3, 16),
    "keys": (0, 1, 5, 9),
    "window": (0, 1, 2, 5),
    "query_group": (0, 3),
    "query_group_size": (None, 0, 2),
    "prefix": (0, 5, 77),
    "padding": ("none", "random", "tail", "all"),
    "rows": ("one for all", "one for each"),
    "layout": ("contiguous", "strided", "odd"),
    "dtype": tuple(DTYPES),
    "logits": ("usual", "large"),
}


def pairs_of(case: Case) -> set:
    return set(itertools.combinations(case.items(), 2))


def all_pairs(factors: dict[str, tuple]) -> set:
    return {
        pair
        for one, other in itertools.combinations(factors, 2)
        for pair in itertools.product(((one, x) for x in factors[one]), ((other, y) for y in factors[other]))
    }


def _fill(case: Case, factors: dict[str, tuple], missing: set) -> Case:
    """Completes a case factor by factor with the value that adds most of the missing pairs."""
    for name in sorted(factors, key=lambda name: -len(factors[name])):
        if name not in case:
            case[name] = max(
                factors[name],
                key=lambda value, name=name: sum(
                    ((name, value), item) in missing or (item, (name, value)) in missing
                    for item in case.items()
                ),
            )
    return {name: case[name] for name in factors}


def pairwise(factors: dict[str, tuple], costly: tuple[str, Any] | None = None) -> list[Case]:
    """A short list of cases with every pair of values. `costly` (factor, value) stays in as few cases as it can."""
    cases: list[Case] = []
    missing = all_pairs(factors)
    for expensive in (True, False):
        if not expensive and costly:
            factors = factors | {costly[0]: tuple(v for v in factors[costly[0]] if v != costly[1])}
        while wanted := sorted(
            (pair for pair in missing if not expensive or (costly and costly in pair)), key=repr
        ):
            case = _fill(dict(wanted[0]), factors, missing)
            missing -= pairs_of(case)
            cases.append(case)
    return cases


def name_of(case: Case) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


GRCA_CASES = pairwise(GRCA, ("L", 1024))
BANDED_CASES = pairwise(BANDED)


def _random(generator: torch.Generator, case: Case, device: str) -> Callable[..., Tensor]:
    def draw(*shape: int, dtype: torch.dtype = DTYPES[case["dtype"]]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw


def _heads(
    draw: Callable[..., Tensor], rows: int, tokens: int, heads: int, width: int, layout: str
) -> Tensor:
    """(rows, tokens, H, d): contiguous, or a layer's view of one wide tensor as attention.py hands it over.

    "odd" is such a view whose strides no power of two divides, so that nothing may be loaded 16 bytes at a time.
    """
    if layout == "contiguous":
        return draw(rows, tokens, heads, width)
    wide = draw(rows, tokens, 2 * heads * width + (24 if layout == "strided" else 23))
    return wide[..., 8 : 8 + heads * width].unflatten(-1, (heads, width))


def grca_inputs(case: Case, device: str = "cpu", heads: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    """The operator's arguments of a case. tokens_per_ref is 4."""
    generator = torch.Generator().manual_seed(hash_of(case))
    draw = _random(generator, case, device)
    rows, blocks, groups, width, layout = 4, case["refs"] // 4, case["groups"], case["d"], case["layout"]
    if case["L"] == 1024:
        rows, heads = 2, 1
    kept = {"one for all": 1, "one for each": rows, "every second": rows // 2}[case["rows"]]
    q = _heads(draw, rows, case["L"], heads, width, layout) * (30.0 if case["logits"] == "large" else 1.0)
    text_rows = 1 if case["rows"] == "one for all" else rows
    k_text, v_text = (_heads(draw, text_rows, case["text"], heads, width, layout) for _ in "kv")
    k_ref, v_ref = (_heads(draw, kept, case["refs"], heads, width, layout) for _ in "kv")
    scale = {
        "zero": torch.zeros(()),
        "0.3": torch.tensor(0.3),
        "negative": torch.tensor(-0.7),
        "per group": torch.linspace(-0.5, 1.0, groups),
        "per row": torch.linspace(-1.0, 1.5, rows * groups).view(rows, groups),
    }[case["scale"]].to(device)
    cuts = torch.randint(0, blocks + 1, (groups - 1,), generator=generator).sort().values * 4
    offsets = torch.tensor([0, *cuts.tolist(), case["refs"]], device=device)
    return [q, k_text, v_text, k_ref, v_ref, scale], {
        "tokens_per_ref": 4,
        "ref_offsets": None if groups == 1 and case["mask"] == "none" else offsets,
        "ref_visible": _visible(case["visible"], rows, blocks, generator, device),
        "mask": _mask(case["mask"], groups, case["L"], generator, device),
    }


def _visible(kind: str, rows: int, blocks: int, generator: torch.Generator, device: str) -> Tensor | None:
    if kind == "any":
        return None
    seen = torch.rand(rows, blocks, generator=generator) > 0.5
    if blocks and kind != "random":
        seen[0] = {"none": False, "all but one": True, "one": False}[kind]
        if kind != "none":
            seen[0, blocks // 2] = kind == "one"
    return seen.to(device)


def _mask(kind: str, groups: int, queries: int, generator: torch.Generator, device: str) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand(1, groups, queries, generator=generator)
    if kind == "zeros":
        mask = mask.round()
    if kind == "one empty":
        mask[:, groups // 2] = 0.0
    return mask.to(device)


def banded_inputs(case: Case, device: str = "cpu", heads: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    """The operator's arguments of a case."""
    generator = torch.Generator().manual_seed(hash_of(case))
    draw = _random(generator, case, device)
    rows, width, layout = 2, case["d"], case["layout"]
    keys = case["prefix"] + case["keys"] * case["group_size"]
    q = _heads(draw, rows, case["L"], heads, width, layout) * (30.0 if case["logits"] == "large" else 1.0)
    kept = 1 if case["rows"] == "one for all" else rows
    k, v = (_heads(draw, kept, keys, heads, width, layout) for _ in "kv")
    padding = torch.rand(rows, keys, generator=generator) > 0.5
    if case["padding"] == "tail":
        padding[:] = torch.arange(keys) >= keys // 2
    if case["padding"] == "all":
        padding[0] = True
    names = ("group_size", "window", "query_group", "query_group_size", "prefix")
    return [q, k, v], {name: case[name] for name in names} | {
        "key_padding": None if case["padding"] == "none" else padding.to(device)
    }


def hash_of(case: Case) -> int:
    """The same number in every process, unlike hash()."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name_of(case))) % 2**31


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def in_double(tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    return [_double(x) for x in tensors], {name: _double(x) for name, x in options.items()}


def _rounding(dtype: torch.dtype, largest_logit: float, keys: int, width: int) -> float:
    """A priori relative error of an attention's weights and sums, each term by its source.

    Four roundings to the type: a probability, a part, its product with the gate, the sum (the kernel needs two).
    In float32: the score's sum of d products shifts a logit by at most gamma_d |q| |k|, which scales a weight by
    as much; subtracting the maximum and the exponent's argument round a number of the logit's size three times;
    the sums over the keys round `keys` times each; exponent, division and gate, eight times.
    """
    single = torch.finfo(torch.float32).eps / 2
    # bfloat16 is cut off, not rounded, by the interpreter: a whole eps.
    own = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    return 4 * own + single * (2 * (width + 3) * largest_logit + 2 * keys + 8)


def _largest_logit(q: Tensor, k: Tensor) -> float:
    """Largest sum of |q_i k_i| / sqrt d: the product of the norms bounds it (Cauchy-Schwarz)."""
    if k.numel() == 0:
        return 0.0
    return float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(q.shape[-1])


def grca_oracle(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(float64 result, allowed error of each element)."""
    (q, k_text, v_text, k_ref, v_ref, scale), exact = in_double(tensors, options)
    oracle = grca_reference(q, k_text, v_text, k_ref, v_ref, scale, **exact)
    size = grca_reference(q, k_text, v_text.abs(), k_ref, v_ref.abs(), scale.abs(), **exact)
    keys = k_text.shape[1] + k_ref.shape[1]
    logit = max(_largest_logit(q, k_text), _largest_logit(q, k_ref))
    gates = max(1.0, float(scale.abs().max()))
    return oracle, _allowed(size, tensors[0].dtype, logit, keys, q.shape[-1], gates, v_text, v_ref)


def _allowed(
    size: Tensor, dtype: torch.dtype, logit: float, keys: int, width: int, gate: float, *values: Tensor
) -> Tensor:
    """Relative error times the sum of |weight value|, and what underflows: a weight below the smallest number."""
    largest = max((float(v.abs().max()) for v in values if v.numel()), default=0.0)
    under = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * keys * largest * gate
    return size * _rounding(dtype, logit, keys, width) + under


def banded_oracle(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(float64 result, allowed error of each element)."""
    (q, k, v), exact = in_double(tensors, options)
    oracle = banded_causal_attention_reference(q, k, v, **exact)
    size = banded_causal_attention_reference(q, k, v.abs(), **exact)
    logit = _largest_logit(q, k)
    return oracle, _allowed(size, tensors[0].dtype, logit, k.shape[1], q.shape[-1], 1.0, v)


def assert_within(out: Tensor, oracle: Tensor, allowed: Tensor) -> None:
    """Fails with the worst element's error as a multiple of what is allowed."""
    assert out.shape == oracle.shape
    error = (out.double() - oracle).abs()
    assert torch.isfinite(error).all()
    worst = (error / allowed.clamp_min(1e-300)).max()
    assert (error <= allowed).all(), f"{worst:.2f} times the allowed error"


def _start_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _interpret(operator: str, tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    if operator == "grca":
        from fastory.kernels.grca.triton import grca_triton as kernel
    else:
        from fastory.kernels.banded.triton import banded_triton as kernel
    return kernel(*tensors, **options)


Interpreter = Callable[[str, list[Tensor], dict[str, Any]], Tensor]


def start_interpreter() -> Iterator[Interpreter]:
    """Calls a kernel in Triton's interpreter.

    A process of its own: Triton decides on its first import whether its functions are interpreted, for all tests. Skips
    where the installed pair of Triton and numpy is known not to interpret.
    """
    if known := packages.found("triton-interpreter"):
        pytest.skip(known)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start_interpreter) as pool:
        yield lambda *call: pool.submit(_interpret, *call).result()
