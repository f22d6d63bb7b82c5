"""What ``test_attention_triton`` runs in processes of its own, and the reference it compares with.

Triton reads ``TRITON_INTERPRET`` when it is imported, so the interpreter and the compiler each need a fresh process:

    TRITON_INTERPRET=1 python -m tests.triton_interpreter_checks interpret      # errors and facts as JSON
    python -m tests.triton_interpreter_checks compile 64 128                    # what each kernel needs on sm_90, as JSON

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlit.kernels.attention.segments import NO_PARENT, Segments, make_segments
from vlit.kernels.attention.triton_tables import Tile, Tiles, choose_tiles

NAMES = ("out", "dq", "dk", "dv")


def visible_mask(segments: Segments) -> Tensor:
    """bool ``[T, T]``, row by row from the definition."""
    mask = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.bool)
    for start, length, parent in zip(segments.starts, segments.lengths, segments.parents, strict=True):
        for row in range(start, start + length):
            mask[row, start : row + 1] = True
            if parent != NO_PARENT:
                mask[row, segments.starts[parent] : segments.starts[parent] + segments.lengths[parent]] = True
    return mask


def dense_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """The definition with a dense mask; in fp64, and differentiated by autograd, this is the truth. Out ``[T, H, E]``."""
    group = q_HTE.shape[0] // k_KTE.shape[0]
    scores = (q_HTE @ k_KTE.repeat_interleave(group, 0).transpose(1, 2)) * scale
    scores = scores.masked_fill(~visible_mask(segments).to(scores.device), -math.inf)
    return (torch.softmax(scores, -1) @ v_KTE.repeat_interleave(group, 0)).transpose(0, 1)


def with_gradients(function: Callable[..., Tensor], q, k, v, d_out, **options) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def plain_formulas(q, k, v, d_out, *, segments: Segments, scale: float) -> list[Tensor]:
    """out, dq, dk, dv by the formulas of the kernels, in whole matrices of the dtype of the inputs, statistics in fp32."""
    dtype, key_heads, group = q.dtype, k.shape[0], q.shape[0] // k.shape[0]
    k_all, v_all, d_out = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), d_out.transpose(0, 1)
    scores = (q @ k_all.transpose(1, 2)).float() * (scale * math.log2(math.e))
    scores = scores.masked_fill(~visible_mask(segments).to(q.device), -math.inf)
    weights = torch.exp2(scores - torch.logsumexp(scores * math.log(2), -1, keepdim=True) / math.log(2))
    out = weights.to(dtype) @ v_all
    delta = (out.float() * d_out.float()).sum(-1, keepdim=True)
    d_scores = (weights * ((d_out @ v_all.transpose(1, 2)).float() - delta)).to(dtype)
    dk, dv = d_scores.transpose(1, 2) @ q * scale, weights.to(dtype).transpose(1, 2) @ d_out
    grouped = [x.float().unflatten(0, (key_heads, group)).sum(1).to(dtype) for x in (dk, dv)]
    return [out.transpose(0, 1), d_scores @ k_all * scale, *grouped]


def random_inputs(segments: Segments, heads: int, key_heads: int, size: int, dtype, seed: int = 0, device="cpu"):
    """q, k, v as transposed views of one projection ``[T, H + 2 K, E]``, and d_out ``[T, H, E]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = segments.num_tokens
    projected = torch.randn(tokens, heads + 2 * key_heads, size, generator=generator).to(device, dtype).transpose(0, 1)
    d_out = torch.randn(tokens, heads, size, generator=generator).to(device, dtype)
    return *projected.split([heads, key_heads, key_heads]), d_out


def compare(function, segments: Segments, heads, key_heads, size, dtype, *, seed=0, device="cpu", far_below=False):
    """Per tensor: largest error of ``function`` and of the plain formulas in this dtype against fp64, and largest value.

    ``far_below``: all logits lie near -200, where weights of positions that are not masked would overflow.
    """
    inputs, options = random_inputs(segments, heads, key_heads, size, dtype, seed, device), {"segments": segments}
    options["scale"] = size**-0.5
    if far_below:
        options["scale"] = 1.0
        inputs = (torch.ones_like(inputs[0]), inputs[1] / 8 - 200 / size, *inputs[2:])
    ours = with_gradients(function, *inputs, **options)
    plain = plain_formulas(*inputs, **options)
    truth = with_gradients(dense_attention, *(x.double() for x in inputs), **options)
    return {
        name: [float((a - c).abs().max()), float((b - c).abs().max()), float(c.abs().max())]
        for name, a, b, c in zip(NAMES, ours, plain, truth, strict=True)
    }


def random_tree(seed: int, longest: int = 70) -> Segments:
    """Plain samples and families in random order; many lengths sit next to a block boundary."""
    choose = random.Random(seed)
    draw = lambda: choose.choice([1, 2, 15, 16, 17, 31, 33, choose.randint(1, longest)])  # noqa: E731
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(choose.randint(1, 3)):
        prefix = len(lengths)
        children = choose.choice([0, 1, 3])
        lengths += [draw() for _ in range(1 + children)]
        parents += [NO_PARENT] + [prefix] * children
    return make_segments(lengths, parents)


@dataclass(frozen=True)
class Case:
    segments: Segments
    heads: int = 1
    key_heads: int = 1
    size: int = 16
    dtype: str = "float32"
    tiles: int = 0
    far_below: bool = False


# Small tiles so that short rows have full, edge and mixed tiles; wide, tall and square.
TILES = (
    Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
)
_ROOT = NO_PARENT
CASES = {
    **{f"one segment of {n}": Case(make_segments([n]), tiles=n % 3) for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 129)},
    "many segments": Case(make_segments([17, 2, 63, 1, 15, 16, 65]), heads=2, key_heads=2),
    "forty segments of 1 to 5": Case(make_segments([1 + n % 5 for n in range(40)]), tiles=2),
    "grouped heads": Case(make_segments([64, 1, 33]), 4, 2, 32, tiles=1),
    "one key head, fp16": Case(make_segments([33, 65]), 3, 1, 32, "float16"),
    "head size 80, fp16": Case(make_segments([17, 40], [_ROOT, 0]), 2, 1, 80, "float16", tiles=1),
    "head size 80": Case(make_segments([20, 63]), 2, 2, 80, tiles=2),
    "siblings": Case(make_segments([33, 20, 40, 17], [_ROOT, 0, 0, 0]), 2, 1, 32),
    "short siblings under a long prefix": Case(make_segments([130, *[5] * 8], [_ROOT, *[0] * 8]), tiles=2),
    "prefix of one token": Case(make_segments([1, 1, 64, 16], [_ROOT, 0, 0, 0]), tiles=1),
    "families between plain samples": Case(
        make_segments([5, 33, 20, 3, 4, 17, 9, 16, 31], [_ROOT, _ROOT, 1, 1, 1, _ROOT, _ROOT, 6, 6]), 2, 1
    ),
    "logits far below zero": Case(make_segments([35, 33, 1, 5], [_ROOT, 0, 0, _ROOT]), far_below=True),
    **{
        f"random tree {n}": Case(random_tree(n), 2, 1, (16, 32, 80)[n % 3], ("float32", "float16")[n % 2], tiles=n % 3)
        for n in range(9)
    },
}


def interpret() -> dict:
    """Run every case under the interpreter; all memory the kernels receive is filled with NaN first."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    assert torch.empty(4).isnan().all()
    assert torch.zeros(4).new_empty(4).isnan().all()
    _quicken_interpreter()
    from vlit.kernels.attention import triton as kernels

    tiles = TILES[0]
    kernels.tiles_of = lambda q: tiles
    errors = {}
    for name, case in CASES.items():
        tiles = TILES[case.tiles]
        dtype = getattr(torch, case.dtype)
        errors[name] = compare(
            kernels.triton_attention, case.segments, case.heads, case.key_heads, case.size, dtype, seed=len(name),
            far_below=case.far_below,
        )  # fmt: skip
    tiles = TILES[0]
    return {"errors": errors, "facts": {fact.__name__: fact(kernels) for fact in FACTS}}


def _quicken_interpreter() -> None:
    """The interpreter patches all of ``triton.language`` anew at every call of a helper (1 ms); once a module is enough.

    Its check of every integer operation for overflow doubles the time again; positions here stay below 2**20.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)


def equal_inputs_give_equal_bits(kernels) -> bool:
    segments = random_tree(3)
    inputs = random_inputs(segments, 2, 1, 16, torch.float32)
    first, second = (with_gradients(kernels.triton_attention, *inputs, segments=segments, scale=0.2) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def any_strides_give_equal_bits(kernels) -> bool:
    segments = make_segments([20, 9, 18], [NO_PARENT, 0, NO_PARENT])
    q, k, v, _ = random_inputs(segments, 2, 1, 16, torch.float32)
    d_out = torch.ones(()).expand(segments.num_tokens, 2, 16)
    scattered = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    assert scattered[0].stride() != q.stride()
    assert scattered[0].stride(2) != 1
    options = {"segments": segments, "scale": 0.25}
    first = with_gradients(kernels.triton_attention, q, k, v, d_out.contiguous(), **options)
    second = with_gradients(kernels.triton_attention, *scattered, d_out, **options)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def spoiled_rows(function, segments: Segments, spoilt: int, what: str, value: float, device="cpu") -> dict[str, list]:
    """Which rows of each result change when the first token of one segment holds ``value`` in k, v, q or d_out."""
    inputs = random_inputs(segments, 2, 1, 16, torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    options = {"segments": segments, "scale": 0.2}
    clean = with_gradients(function, *inputs, **options)
    spoilt_inputs = {name: x.clone() for name, x in zip(("q", "k", "v", "d_out"), inputs, strict=True)}
    row = segments.starts[spoilt]
    for name in what.split("+"):
        (spoilt_inputs[name][row] if name == "d_out" else spoilt_inputs[name][:, row]).fill_(value)
    dirty = with_gradients(function, *spoilt_inputs.values(), **options)
    changed = {}
    for name, a, b in zip(NAMES, clean, dirty, strict=True):
        different = (a != b).flatten(1).any(1) if name == "out" else (a != b).transpose(0, 1).flatten(1).any(1)
        changed[name] = different.nonzero().flatten().tolist()
    return changed


SPOILT_TREE = make_segments([20, 7, 5, 9, 6, 11], [NO_PARENT, 0, 0, 0, NO_PARENT, NO_PARENT])
SPOILT = [(segment, what, value) for segment in (2, 4) for what, value in (("k+v", math.nan), ("v", math.inf))]
SPOILT += [(2, "k", math.nan), (2, "q+d_out", math.nan)]


def rows_a_spoilt_segment_reaches(kernels) -> list:
    return [spoiled_rows(kernels.triton_attention, SPOILT_TREE, *case) for case in SPOILT]


def bf16_is_refused_with_the_reason(kernels) -> str:
    x = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    try:
        kernels.triton_attention(x, x, x, segments=make_segments([4]), scale=1.0)
    except NotImplementedError as error:
        return str(error)
    return ""


def torch_accepts_the_operator(kernels) -> dict[str, str]:
    q, k, v, _ = random_inputs(make_segments([9, 8]), 2, 1, 16, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.library.opcheck(kernels.forward_op, (*leaves, [9, 8], [NO_PARENT, 0], 0.25))


def compiled_equals_eager_in_one_graph(kernels) -> bool:
    segments = make_segments([9, 8], [NO_PARENT, 0])
    inputs = random_inputs(segments, 2, 1, 16, torch.float32)
    compiled = torch.compile(kernels.triton_attention, backend="aot_eager", fullgraph=True)
    options = {"segments": segments, "scale": 0.25}
    first = with_gradients(kernels.triton_attention, *inputs, **options)
    second = with_gradients(compiled, *inputs, **options)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


FACTS = (
    equal_inputs_give_equal_bits,
    any_strides_give_equal_bits,
    rows_a_spoilt_segment_reaches,
    bf16_is_refused_with_the_reason,
    torch_accepts_the_operator,
    compiled_equals_eager_in_one_graph,
)


def compile_kernels(sizes: list[int]) -> dict:
    """Compile every launch of a bf16 forward and backward pass for Hopper, no GPU needed; shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlit.kernels.attention import triton as kernels

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((self.kernel, arguments, options))

    for name in ("forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"):
        setattr(kernels, name, Recorder(getattr(kernels, name)))
    kernels.tiles_of = lambda q: choose_tiles(q.shape[2], q.element_size(), hopper=True)
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
    segments = make_segments([100, 50, 60], [NO_PARENT, 0, 0])
    found = {}
    for size in sizes:
        launches.clear()
        q, k, v, d_out = random_inputs(segments, 4, 2, size, torch.bfloat16)
        out, lse = kernels.forward_op(q, k, v, segments.lengths, segments.parents, 0.1)
        kernels.backward_op(d_out, q, k, v, out, lse, segments.lengths, segments.parents, 0.1)
        for kernel, arguments, options in launches:
            signature, constants, aligned = {}, {}, {}
            for parameter, argument in zip(kernel.params, arguments, strict=True):
                special = not parameter.do_not_specialize
                if parameter.is_constexpr or (special and isinstance(argument, int) and argument == 1):
                    signature[parameter.name], constants[parameter.name] = "constexpr", argument
                elif isinstance(argument, Tensor):
                    signature[parameter.name] = pointers[argument.dtype]
                else:
                    signature[parameter.name] = "fp32" if isinstance(argument, float) else "i32"
                if isinstance(argument, Tensor) or (special and isinstance(argument, int) and argument % 16 == 0):
                    aligned[(parameter.num,)] = [["tt.divisibility", 16]]
            aligned = {key: value for key, value in aligned.items() if kernel.params[key[0]].name not in constants}
            source = ASTSource(kernel, signature, constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            found[f"{kernel.__name__} {size}"] = {
                "shared": compiled.metadata.shared,
                "tensor_core_products": compiled.asm["ptx"].count("wgmma.mma_async"),
                "cubin": len(compiled.asm["cubin"]),
            }
    return found


if __name__ == "__main__":
    result = interpret() if sys.argv[1] == "interpret" else compile_kernels([int(size) for size in sys.argv[2:]])
    print(json.dumps(result))
