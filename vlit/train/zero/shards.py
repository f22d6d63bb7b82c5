"""A model on rank 0 -> the same model on every rank, each holding a share of its weights (ZeRO-3).

Only rank 0 reads the checkpoint. The others receive the model's structure without weights, and then one module's weights
after the other, which are cut up at once: no rank but the first ever holds more than one whole module.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlit.models.quantize import give_packed, packed_layers, take_packed
from vlit.train.distributed import Ranks


class _Structure(pickle.Pickler):
    """Pickles a module with placeholders instead of parameters; a tied one has the same number everywhere."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Parameter):
            return None
        number = self._numbers.setdefault(id(obj), len(self._numbers))
        return number, tuple(obj.shape), obj.dtype, obj.requires_grad


class _Rebuild(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:
        number, shape, dtype, trained = pid
        if number not in self._made:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self._made[number] = nn.Parameter(empty, requires_grad=trained)
        return self._made[number]


def share_structure(value: Any, ranks: Ranks) -> Any:
    """Rank 0's object on every rank; its parameters are on the meta device everywhere else.

    The bytes come from rank 0 of this very run, the only reason why unpickling them is acceptable.
    """
    if ranks.world_size == 1:
        return value
    packed = None
    if ranks.is_main:
        file = io.BytesIO()
        _Structure(file).dump(value)
        packed = file.getvalue()
    packed = ranks.share(packed)
    return value if ranks.is_main else _Rebuild(io.BytesIO(packed)).load()


def shard(model: nn.Module, ranks: Ranks, config: dict[str, Any]) -> None:
    """Cut every weight into equal shares, in place; rank 0's values are the ones that count."""
    from deepspeed import zero

    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if parameter.device.type == "meta":
                if id(parameter) not in filled:
                    empty = torch.empty_like(parameter, device=ranks.device)
                    filled[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, filled[id(parameter)])
        if own:
            holder = nn.Module()
            for number, name in enumerate(own):
                holder.register_parameter(str(number), getattr(module, name))
            dtype = next(iter(own.values())).dtype
            zero.Init(module=holder, config_dict_or_path=config, dtype=dtype, mem_efficient_linear=False)


class PackedWeights:
    """A decoder's quantised weights, which ZeRO-3 leaves whole: every rank holds all of them, and DeepSpeed sees none.

    Made on rank 0 before the structure is shared (``model`` is None elsewhere), so that they do not travel with it.
    """

    def __init__(self, model: nn.Module | None) -> None:
        layers = [] if model is None else packed_layers(model)
        self._taken = [take_packed(layer) for layer in layers]

    def spread(self, model: nn.Module, ranks: Ranks) -> None:
        """Give every rank's ``model`` the weights, one layer after the other."""
        self._taken.reverse()
        for layer in packed_layers(model):
            give_packed(layer, ranks.share(self._taken.pop() if ranks.is_main else None), ranks.device)


def gathered(model: nn.Module, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight in host memory) of every parameter, one after the other; called on all ranks, yields on rank 0."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in model.named_parameters(remove_duplicate=False):
        with GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if ranks.is_main else None
        if whole is not None:
            yield name, whole
