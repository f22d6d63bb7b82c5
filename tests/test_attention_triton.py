"""The Triton attention kernels: tables, numbers under the interpreter, compilation for Hopper, and numbers on a GPU.

The criterion is flash attention's: the largest error against fp64 is at most twice that of the same formulas in plain
PyTorch at the same dtype (fp32: plus 1e-7).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter_checks import (
    CASES,
    NAMES,
    SPOILT,
    SPOILT_TREE,
    compare,
    random_inputs,
    random_tree,
    spoiled_rows,
    visible_mask,
    with_gradients,
)
from vlit.kernels.attention import gpu_peers
from vlit.kernels.attention import triton_tables as tables
from vlit.kernels.attention.segments import NO_PARENT, Segments, make_segments

ROOT = Path(__file__).resolve().parent.parent
HOPPER_SHARED_MEMORY = 232448  # bytes a block may use
SQUARE = tables.Tile(32, 32, 4, 1)


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.triton_interpreter_checks", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate()
    assert process.returncode == 0, err[-4000:]
    return json.loads(out)


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen]:
    """Both run side by side."""
    return {"interpret": start("interpret", TRITON_INTERPRET="1"), "compile": start("compile", "64", "128")}


@pytest.fixture(scope="module")
def interpreted(processes) -> dict:
    return finish(processes["interpret"])


@pytest.fixture(scope="module")
def compiled(processes) -> dict:
    return finish(processes["compile"])


def assert_as_exact_as_plain_pytorch(errors: dict[str, list[float]], dtype: str) -> None:
    floor = 1e-7 if dtype == "float32" else 0.0
    assert set(errors) == set(NAMES)
    assert errors["out"][2] > 0.1
    for name, (ours, plain, _) in errors.items():
        assert ours <= 2 * plain + floor, f"{name}: {ours:.3g} against {plain:.3g} in plain PyTorch"


# ---------------------------------------------------------------------------------------------------------------- tables

TREES = st.integers(0, 10_000).map(lambda seed: random_tree(seed, longest=200))
TILES = st.tuples(st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32, 64, 128]))


@settings(max_examples=60, deadline=None)
@given(TREES, TILES)
def test_query_blocks_hold_every_row_once_and_reach_exactly_the_keys_their_rows_see(segments: Segments, sides) -> None:
    m, n = sides
    mask, rows_seen = visible_mask(segments).numpy(), np.zeros(segments.num_tokens, dtype=int)
    for begin, end, prefix_lo, prefix_hi, own_lo in tables.query_blocks(segments, m, n):
        assert 0 < end - begin <= m
        rows_seen[begin:end] += 1
        reached = np.zeros(segments.num_tokens, dtype=bool)
        reached[prefix_lo:prefix_hi] = True
        reached[own_lo:end] = True
        assert (mask[begin:end].any(0) == reached).all()
        assert mask[begin:end, prefix_lo:prefix_hi].all()
    assert (rows_seen == 1).all()


@settings(max_examples=60, deadline=None)
@given(TREES, TILES)
def test_key_blocks_hold_every_key_once_and_reach_exactly_the_rows_that_see_them(segments: Segments, sides) -> None:
    m, n = sides
    mask, keys_seen = visible_mask(segments).numpy(), np.zeros(segments.num_tokens, dtype=int)
    for begin, end, own_end, family_lo, family_hi in tables.key_blocks(segments, m, n):
        assert 0 < end - begin <= n
        keys_seen[begin:end] += 1
        reached = np.zeros(segments.num_tokens, dtype=bool)
        reached[begin:own_end] = True
        reached[family_lo:family_hi] = True
        assert (mask[:, begin:end].any(1) == reached).all()
        assert mask[family_lo:family_hi, begin:end].all()
    assert (keys_seen == 1).all()


def test_one_image_with_six_conversations_computes_less_than_an_eighth_of_all_tiles() -> None:
    family = make_segments([600, *[90] * 6], [NO_PARENT, *[0] * 6])
    row = make_segments(
        [*family.lengths * 5], [NO_PARENT, *[0] * 6, *(p for n in range(7, 35, 7) for p in (-1, *[n] * 6))]
    )
    tile = tables.choose_tiles(128, 2, hopper=True)
    for count in (tables.count_tiles(row, tile.forward), tables.count_tiles(row, tile.dkdv, keys=True)):
        assert count.needed <= count.computed < 1.5 * count.needed
        assert count.computed < count.dense / 8


def test_the_heaviest_blocks_come_first() -> None:
    segments = make_segments([500, 40, 900, 300])
    _, end, prefix_lo, prefix_hi, own_lo = tables.query_blocks(segments, 64, 64).T
    tiles = -(-(end - own_lo) // 64) - (-(prefix_hi - prefix_lo) // 64)
    assert (np.diff(tiles) <= 0).all()
    assert tiles[0] == -(-900 // 64)


def test_tables_of_equal_segments_are_made_once() -> None:
    one, two = make_segments([5, 9], [NO_PARENT, 0]), make_segments([5, 9], [NO_PARENT, 0])
    assert one is not two
    cpu = torch.device("cpu")
    assert tables.device_query_blocks(one, SQUARE, cpu) is tables.device_query_blocks(two, SQUARE, cpu)
    assert tables.device_key_blocks(one, SQUARE, cpu) is tables.device_key_blocks(two, SQUARE, cpu)
    assert tables.device_segment_lo(one, cpu).tolist() == [0] * 5 + [5] * 9


def test_every_table_has_tiles_the_tensor_cores_take_and_other_sizes_are_refused() -> None:
    for size in (16, 24, 64, 72, 80, 96, 128, 160, 256):
        for element_bytes in (2, 4):
            for hopper in (True, False):
                chosen = tables.choose_tiles(size, element_bytes, hopper=hopper)
                for tile in (chosen.forward, chosen.dq, chosen.dkdv):
                    assert min(tile.block_m, tile.block_n) >= 16
    for size, element_bytes in ((8, 2), (257, 2), (64, 8)):
        with pytest.raises(ValueError, match="choose another attention backend"):
            tables.choose_tiles(size, element_bytes, hopper=True)
    with pytest.raises(ValueError, match="power of two"):
        tables.Tile(8, 64, 4, 1)
    with pytest.raises(ValueError, match="power of two"):
        tables.Tile(64, 48, 4, 1)


# ----------------------------------------------------------------------------------------------------------- interpreter


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_as_exact_as_plain_pytorch(case: str, interpreted) -> None:
    assert_as_exact_as_plain_pytorch(interpreted["errors"][case], CASES[case].dtype)


def test_equal_inputs_give_equal_bits(interpreted) -> None:
    assert interpreted["facts"]["equal_inputs_give_equal_bits"] is True


def test_any_strides_give_the_bits_of_the_usual_layout(interpreted) -> None:
    assert interpreted["facts"]["any_strides_give_equal_bits"] is True


@pytest.mark.parametrize("number", range(len(SPOILT)), ids=lambda n: f"{SPOILT[n][1]}={SPOILT[n][2]} in {SPOILT[n][0]}")
def test_a_nan_of_one_segment_reaches_only_the_rows_and_keys_that_see_it(number: int, interpreted) -> None:
    assert_only_relatives_are_spoilt(interpreted["facts"]["rows_a_spoilt_segment_reaches"][number], *SPOILT[number][:2])


def assert_only_relatives_are_spoilt(changed: dict[str, list[int]], segment: int, what: str) -> None:
    """k or v: the rows that see the key, and the keys these rows see. q and d_out: that row, and the keys it sees."""
    mask, token = visible_mask(SPOILT_TREE), SPOILT_TREE.starts[segment]
    rows = mask[:, token] if "q" not in what else torch.arange(SPOILT_TREE.num_tokens) == token
    keys = mask[rows].any(0)
    assert 0 < int(rows.sum()) < SPOILT_TREE.num_tokens
    for name, expected in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        assert changed[name] == expected.nonzero().flatten().tolist(), name


def test_bf16_under_the_interpreter_is_refused_with_the_reason(interpreted) -> None:
    assert "interpreter" in interpreted["facts"]["bf16_is_refused_with_the_reason"]


def test_torch_accepts_the_operator_and_its_shapes_without_running_it(interpreted) -> None:
    checks = interpreted["facts"]["torch_accepts_the_operator"]
    assert len(checks) >= 4
    assert set(checks.values()) == {"SUCCESS"}


def test_under_torch_compile_the_kernels_are_one_operator_with_the_bits_of_eager(interpreted) -> None:
    assert interpreted["facts"]["compiled_equals_eager_in_one_graph"] is True


# ----------------------------------------------------------------------------------------------------------- compilation


def assert_fits_hopper(kernels: dict[str, dict[str, int]], size: int) -> None:
    names = {name for name in kernels if name.endswith(f" {size}")}
    assert names == {f"{kernel}_kernel {size}" for kernel in ("forward", "delta", "dkdv", "dq")}
    for name in names:
        assert kernels[name]["cubin"] > 0
        assert kernels[name]["shared"] <= HOPPER_SHARED_MEMORY, name
        assert name.startswith("delta") or kernels[name]["tensor_core_products"] > 0, name


@pytest.mark.parametrize("size", [64, 128])
def test_bf16_kernels_compile_for_hopper_and_fit_its_shared_memory(size: int, compiled) -> None:
    assert_fits_hopper(compiled, size)


def test_every_masked_load_says_what_it_reads_elsewhere() -> None:
    """Without ``other`` the interpreter reads 0 and a GPU reads anything."""
    source = (ROOT / "vlit/kernels/attention/triton.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [{keyword.arg for keyword in call.keywords} for call in calls if ast.unparse(call.func) == "tl.load"]
    assert sum("mask" in keywords for keywords in loads) >= 2
    assert all("other" in keywords for keywords in loads if "mask" in keywords)


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 256])
def test_bf16_kernels_of_other_head_sizes_compile_for_hopper(size: int) -> None:
    assert_fits_hopper(finish(start("compile", str(size))), size)


# ---------------------------------------------------------------------------------------------------------------- errors


def test_the_gpu_backends_say_what_they_need_on_a_cpu() -> None:
    from vlit.kernels.attention.triton import triton_attention

    q = torch.zeros(2, 5, 16)
    for backend in (triton_attention, gpu_peers.flex_attention, gpu_peers.varlen_attention):
        with pytest.raises(ValueError, match="CUDA tensors, got cpu"):
            backend(q, q, q, segments=make_segments([5]), scale=1.0)


def test_inputs_that_do_not_fit_are_refused_with_both_values() -> None:
    from vlit.kernels.attention.triton import triton_attention

    q, fit = torch.zeros(4, 5, 16), {"segments": make_segments([5]), "scale": 1.0}
    for k, options, message in (
        (q[:3], fit, r"multiple of K, got \[\(4, 5, 16\), \(3, 5, 16\), \(3, 5, 16\)\]"),
        (q, fit | {"segments": make_segments([4])}, "5 tokens, its segments 4"),
        (q.half(), fit, "share one dtype"),
        (q, fit | {"scale": 0.0}, "scale is positive"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_attention(q, k, k, **options)


def test_flex_and_triton_are_asked_for_the_same_mask() -> None:
    segments = make_segments([3, 200, 140, 7], [NO_PARENT, NO_PARENT, 1, 1])
    mask_mod = gpu_peers._block_mask(segments, torch.device("cpu")).mask_mod
    rows, keys = torch.meshgrid(torch.arange(350), torch.arange(350), indexing="ij")
    assert torch.equal(mask_mod(None, None, rows, keys), visible_mask(segments))


# ------------------------------------------------------------------------------------------------------------------- GPU

ODD_LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]
GPU_ROWS = {
    "odd lengths": make_segments(ODD_LENGTHS),
    "one segment": make_segments([1000]),
    "three hundred segments": make_segments([1 + n % 7 for n in range(300)]),
    "tree": make_segments([601, *ODD_LENGTHS, 33], [NO_PARENT, *[0] * len(ODD_LENGTHS), NO_PARENT]),
    "random tree": random_tree(5, longest=400),
}


@pytest.fixture
def nan_memory():
    """New memory is full of NaN, as the caching allocator's may be."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gpu_attention(backend: str):
    from vlit.kernels.attention.triton import triton_attention

    return {"triton": triton_attention, "flex": gpu_peers.flex_attention, "varlen": gpu_peers.varlen_attention}[backend]


@pytest.mark.gpu
@pytest.mark.parametrize("row", GPU_ROWS)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(2, 2, 64), (4, 2, 96), (8, 2, 128), (2, 1, 256)])
def test_gpu_bf16_is_as_exact_as_plain_pytorch(row: str, heads: int, key_heads: int, size: int, nan_memory) -> None:
    errors = compare(gpu_attention("triton"), GPU_ROWS[row], heads, key_heads, size, torch.bfloat16, device="cuda")
    assert_as_exact_as_plain_pytorch(errors, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size"), [("float16", 80), ("float16", 16), ("float32", 64)])
def test_gpu_other_dtypes_and_head_sizes_are_as_exact_as_plain_pytorch(dtype: str, size: int, nan_memory) -> None:
    errors = compare(gpu_attention("triton"), GPU_ROWS["tree"], 2, 1, size, getattr(torch, dtype), device="cuda")
    assert_as_exact_as_plain_pytorch(errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_gpu_twenty_runs_give_the_same_bits(size: int) -> None:
    segments = GPU_ROWS["tree"]
    inputs = random_inputs(segments, 8, 2, size, torch.bfloat16, device="cuda")
    first, *others = (
        with_gradients(gpu_attention("triton"), *inputs, segments=segments, scale=size**-0.5) for _ in range(20)
    )
    assert len(others) == 19
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_gpu_a_nan_of_one_segment_reaches_only_its_relatives(number: int) -> None:
    changed = spoiled_rows(gpu_attention("triton"), SPOILT_TREE, *SPOILT[number], device="cuda")
    assert_only_relatives_are_spoilt(changed, *SPOILT[number][:2])


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "row"), [("flex", "tree"), ("flex", "odd lengths"), ("varlen", "odd lengths")])
def test_gpu_backends_agree_with_the_definition(backend: str, row: str) -> None:
    errors = compare(gpu_attention(backend), GPU_ROWS[row], 4, 2, 64, torch.bfloat16, device="cuda")
    assert_as_exact_as_plain_pytorch(errors, "bfloat16")


@pytest.mark.gpu
def test_gpu_varlen_refuses_a_shared_prefix() -> None:
    q, k, v, _ = random_inputs(GPU_ROWS["tree"], 2, 1, 64, torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="knows no shared prefix"):
        gpu_peers.varlen_attention(q, k, v, segments=GPU_ROWS["tree"], scale=1.0)


@pytest.mark.gpu
def test_gpu_a_compiled_model_keeps_the_bits() -> None:
    segments = GPU_ROWS["odd lengths"]
    inputs = random_inputs(segments, 4, 2, 64, torch.bfloat16, device="cuda")
    attention = gpu_attention("triton")
    compiled_attention = torch.compile(attention, fullgraph=True)
    eager = with_gradients(attention, *inputs, segments=segments, scale=0.125)
    fused = with_gradients(compiled_attention, *inputs, segments=segments, scale=0.125)
    assert all(torch.equal(a, b) for a, b in zip(eager, fused, strict=True))


@pytest.mark.gpu
def test_gpu_logits_far_below_zero_are_as_exact_as_plain_pytorch() -> None:
    row = GPU_ROWS["tree"]
    errors = compare(gpu_attention("triton"), row, 2, 1, 64, torch.bfloat16, device="cuda", far_below=True)
    assert_as_exact_as_plain_pytorch(errors, "bfloat16")
