"""The decoder's weights in 8 or 4 bits (bitsandbytes): a frozen base for LoRA in half or a quarter of bf16's memory.

``4bit`` is NF4 with quantised scales, as QLoRA trains with (arXiv:2305.14314 §3); ``8bit`` is LLM.int8() (arXiv:2208.07339).
Only linear layers inside the decoder's trunk are quantised: never the embeddings, the output head, the connector or the
encoder, and adapters on top stay in the compute dtype. Weights are quantised on the CPU as they are loaded, so that every
process and every later load holds the same bytes. What a weight was before is remembered as the sample its fingerprint needs:
a model folder names the same base whether it is loaded quantised or not.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlit.errors import ModelError

Mode = Literal["none", "8bit", "4bit"]
_BLOCK = 64


class Original(NamedTuple):
    """A weight before it was quantised: its shape, and the values that a fingerprint looks at."""

    shape: torch.Size
    sample: Tensor

    def numel(self) -> int:
        return self.shape.numel()


def sample_of(tensor: Tensor) -> Tensor:
    """Up to 4096 evenly spaced values (8191 at most), rounded to bf16, as int16 on the CPU."""
    flat = tensor.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // 4096)].to(
        torch.bfloat16, copy=True
    )  # a view would keep the whole weight alive
    return values.view(torch.int16).cpu()


def original_of(model: nn.Module, name: str) -> Tensor | Original:
    """The parameter ``name`` of ``model``, or what it was before it was quantised."""
    owner, _, leaf = name.rpartition(".")
    held = getattr(model.get_submodule(owner), "original", None)
    return held if leaf == "weight" and isinstance(held, Original) else model.get_parameter(name)


def is_quantised(module: nn.Module) -> bool:
    """Whether any linear layer in ``module`` has been quantised."""
    return bool(packed_layers(module))


def packed_layers(module: nn.Module) -> list[nn.Module]:
    """The quantised linear layers in ``module``, in its order."""
    return [m for m in module.modules() if isinstance(getattr(m, "original", None), Original)]


def packed_tensors(layer: nn.Module) -> list[Tensor]:
    """What a quantised layer holds for its weight: the packed values and their scales."""
    held: Any = layer
    if _has_four_bits(layer):
        state = held.weight.quant_state
        return [held.weight, state.absmax, state.state2.absmax]
    return [held.weight, held.weight.SCB if held.weight.SCB is not None else held.state.SCB]


def packed_apart(model: nn.Module) -> tuple[list[Tensor], list[nn.Parameter]]:
    """What a model's quantised layers hold (:func:`packed_tensors`), and its other parameters."""
    packed = [tensor for layer in packed_layers(model) for tensor in packed_tensors(layer)]
    apart = {id(tensor) for tensor in packed}
    return packed, [parameter for parameter in model.parameters() if id(parameter) not in apart]


def take_packed(layer: nn.Module) -> dict[str, Tensor]:
    """Take a quantised layer's weight out of it, as plain tensors; :func:`give_packed` is the way back."""
    held: Any = layer
    weight = held.weight
    if _has_four_bits(layer):
        held.quant_state = None
        taken = {"weight": weight.data, **weight.quant_state.as_dict(packed=True)}
    else:
        taken = {"weight": weight.data, "scales": packed_tensors(layer)[1]}
        held.state.CB = held.state.SCB = None
    del held.weight
    return taken


def give_packed(layer: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give a layer the weight that :func:`take_packed` took from one like it, on ``device``, as an attribute.

    It is no parameter of the module any more, so whoever moves, casts or cuts a model's parameters leaves its bytes alone.
    """
    bnb = _bitsandbytes()
    packed, rest = tensors["weight"], {name: value for name, value in tensors.items() if name != "weight"}
    if _has_four_bits(layer):
        weight = bnb.nn.Params4bit.from_prequantized(packed, rest, device=device, module=layer)
    else:
        packed = packed.to(device)
        weight = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=rest["scales"].to(device))
    object.__setattr__(layer, "weight", weight)


def _has_four_bits(layer: nn.Module) -> bool:
    return isinstance(layer, _bitsandbytes().nn.Linear4bit)


def quantise_decoder(hf: Any, mode: Mode, *, dtype: torch.dtype) -> None:
    """Replace the linear layers of a transformers causal LM's trunk in place; they compute in ``dtype``.

    Raises:
        ModelError: bitsandbytes is missing, or a layer's size does not fit its blocks.
    """
    if mode == "none":
        return
    layers = {name: layer for name, layer in hf.get_decoder().named_modules() if type(layer) is nn.Linear}
    for name, layer in layers.items():
        if mode == "4bit" and layer.in_features % _BLOCK:
            raise ModelError(
                f"model.llm.quantize: 4bit works on blocks of {_BLOCK} weights, but {name} has {layer.in_features} inputs. "
                "Use 8bit or none."
            )
    bnb = _bitsandbytes()
    for name, layer in layers.items():
        hf.get_decoder().set_submodule(name, _quantised(bnb, layer, mode, dtype))
    _forget_empty_tables()
    setattr(hf, f"is_loaded_in_{mode}", True)  # peft chooses its adapter classes by this


def _forget_empty_tables() -> None:
    """Drop what bitsandbytes keeps of the first tensor it quantised, where that was on the meta device: it holds no values."""
    tables = getattr(sys.modules.get("bitsandbytes.functional"), "name2qmap", {})
    for name in [name for name, table in tables.items() if table.is_meta]:
        del tables[name]


def _quantised(bnb: Any, layer: nn.Linear, mode: Mode, dtype: torch.dtype) -> nn.Module:
    size: Any = (layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.weight.detach()
    with torch.device("meta"):
        if mode == "4bit":
            new = bnb.nn.Linear4bit(*size, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
    if mode == "4bit":
        fresh = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new)
        new.support_avx512bf16_for_cpu = False  # would repack the weights in place at the first forward without a graph
    else:
        fresh = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.weight = fresh._quantize(weight.device)  # .to() would not on the meta device, where memory is planned
    new.bias = layer.bias
    new.original = Original(weight.shape, torch.empty(0) if weight.is_meta else sample_of(weight))
    return new.requires_grad_(False).train(layer.training)


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # a faster kernel that inference might use
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f'model.llm.quantize needs bitsandbytes, which cannot be imported ({error}). pip install "vlit[quantization]", '
            "or set quantize: none."
        ) from error
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every int8 product
    return bitsandbytes
