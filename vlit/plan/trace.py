"""Which memory PyTorch code holds, operator by operator, without running it on real data.

A dispatch mode sees every operator below autograd, with the tensors that go in and come out. A storage lives from the operator
that returns it until Python and autograd drop it (a weak reference says when), so what is saved for the backward pass, what a
checkpointed block drops and what gradients replace is not modelled but observed. What an operator needs only while it runs is
invisible from outside; :mod:`vlit.plan.workspace` knows the few where that is much. The method is that of
``torch.distributed._tools.mem_tracker``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspace = Callable[[str, tuple[Any, ...], dict[str, Any], Any], int]
"""(operator, arguments, keyword arguments, result) -> bytes it needs while it runs."""

STATES = ("weights", "masters", "optimizer", "gradients")
"""Categories that belong to parameters. All others are made by a micro-batch."""


@dataclass(slots=True)
class Peak:
    """Bytes by category at the highest moment, and where that was."""

    bytes: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    operator: str = ""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class MemoryTrace(TorchDispatchMode):
    """Follows storages while it is active; :attr:`peak` holds the highest moment.

    Args:
        workspace: what an operator needs while it runs.
        answers: operators by name whose result the given function makes instead; it may return None to decline.
    """

    def __init__(self, workspace: Workspace, answers: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.live: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        """Most bytes of each category, at a moment of its own."""
        self.peak = Peak()
        self.peak_without_gradients = Peak()
        self.phase, self.category = "", "activations"
        self._workspace, self._answers = workspace, answers or {}
        self._known: dict[int, list[Any]] = {}  # storage -> [weak reference, bytes, category]

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count these tensors' storages, or move them, into ``category``."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._known.get(storage._cdata)
            if entry is None:
                self._add(storage, category)
            elif entry[2] != category:
                self.live[entry[2]] -= entry[1]
                self.live[category] = self.live.get(category, 0) + entry[1]
                self.highest[category] = max(self.highest.get(category, 0), self.live[category])
                entry[2] = category

    @contextmanager
    def during(self, phase: str, category: str) -> Iterator[None]:
        """Name what happens, and what new storages are."""
        held, (self.phase, self.category) = (self.phase, self.category), (phase, category)
        try:
            yield
        finally:
            self.phase, self.category = held

    @contextmanager
    def apart(self, module: nn.Module, category: str) -> Iterator[None]:
        """Count what the forward pass of ``module`` makes as ``category``; the phase stays."""
        held: list[str] = []

        def enter(*_: Any) -> None:
            held.append(self.category)
            self.category = category

        def leave(*_: Any) -> None:
            self.category = held.pop()

        hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        answer = self._answers.get(name)
        result = None if answer is None else answer(*args, **kwargs)
        if result is None:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage, self.category)
        self._note(name, self._workspace(name, args, kwargs, result))
        return result

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = [weakref.ref(storage, partial(self._gone, key)), size, category]
        self.live[category] = self.live.get(category, 0) + size
        self.highest[category] = max(self.highest.get(category, 0), self.live[category])

    def _gone(self, key: int, reference: Any) -> None:
        entry = self._known.get(key)
        if entry is not None and entry[0] is reference:
            del self._known[key]
            self.live[entry[2]] -= entry[1]

    def _note(self, operator: str, workspace: int) -> None:
        total = sum(self.live.values()) + workspace
        if total > self.peak.total:
            self.peak = Peak(self.live | {"workspace": workspace}, self.phase, operator)
        total -= self.live.get("gradients", 0)
        if total > self.peak_without_gradients.total:
            held = {name: size for name, size in self.live.items() if name != "gradients"}
            self.peak_without_gradients = Peak(held | {"workspace": workspace}, self.phase, operator)
