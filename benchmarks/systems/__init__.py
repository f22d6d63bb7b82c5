"""The trainers that are compared, one module each, and what they have in common.

A system module has ``make(job) -> System``. It is imported and run in a process of its own (:mod:`benchmarks.systems.worker`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

VARIANTS: dict[str, dict[str, object]] = {
    "compiled": {"compile": True},
    "unshared": {"share": False},
    "unpacked": {"share": False, "pack": False},
    "dense": {"attention": "dense"},
    "blocked": {"attention": "blocked"},
    "fresh": {"keep_memory": False},
    "fp32": {"precision": "fp32"},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
}
"""What each variant of vlit changes; the keys are the fields of :class:`benchmarks.systems.vlit_system.Settings`."""

SYSTEMS = {
    "vlit": "vlit_system",
    "transformers": "transformers_system",
    "transformers-autocast": "transformers_system",
    "trl": "trl_system",
    **{f"vlit-{name}": "vlit_system" for name in VARIANTS},
}
"""Name -> module. ``transformers-autocast``: fp32 weights under bf16 autocast instead of bf16 weights. ``vlit-...``: one
technique taken out or put in (:data:`VARIANTS`)."""


@dataclass(frozen=True)
class Job:
    """One system, one case; everything the process needs to know."""

    system: str
    case: str
    size: str
    num_records: int
    parts: Path
    """Folder with ``clip``, ``llama`` and ``llava``: the same weights three times."""
    threads: int
    device: str
    micro_batch_tokens: int
    """Most tokens of a packed row (systems that pack)."""
    profile: str | None = None
    """File that receives the profile of one more step."""


class Clock(Protocol):
    """The parent's side of a step: asks for it, times it, takes its result."""

    def begin(self) -> None:
        """Wait for the parent to ask for a step, then start the clock. Ends the process when there are no more."""

    def end(self) -> None:
        """The step's work is queued: wait for the device and stop the clock."""

    def report(self, loss: float, grad_norm: float) -> None:
        """Mean loss per label token and gradient norm, both before the update."""


class System(Protocol):
    """A trainer with its batch ready."""

    positions: int
    """Token positions the language model computes in a step, padding included."""
    padding: int
    """How many of them are padding."""
    note: str

    def run(self, clock: Clock) -> None:
        """Optimizer steps over the batch: ``begin``, work, ``end``, ``report``, and again until ``begin`` ends it."""
