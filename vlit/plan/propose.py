"""Strategy, row size and recomputation that fit a device and take the least time.

Every candidate is judged by an executed step (:mod:`vlit.plan.execute`), never by a formula for its activations. Rows are
executed at two sizes and sizes between are interpolated (what a row makes grows in a line with its tokens); the chosen one is
executed again at its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vlit.plan.cost import StepTime, Work, step_time
from vlit.plan.execute import Executed
from vlit.plan.hardware import Cluster
from vlit.plan.memory import Memory, Parameters, Strategy, memory
from vlit.plan.offload import OFFLOADS, Offload
from vlit.plan.workload import Workload

ROW_TOKENS = (2048, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768)
RECOMPUTE = ("none", "selective", "full")
STRATEGIES = ("none", "ddp", "zero1", "zero2", "zero3")
LONG_ENOUGH = 16_384
"""Longer rows make products no faster."""
EQUAL = 0.02
"""Times this close are equal: the calculation knows no better."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a stage."""

    strategy: Strategy
    offload: Offload
    recompute: str
    micro_batch_tokens: int

    @property
    def simplicity(self) -> tuple[int, int]:
        """The less, the less is divided and moved."""
        return self.offload.distance, STRATEGIES.index(self.strategy)


def yaml_lines(choices: dict[str, Choice]) -> list[str]:
    """The choices of a run's stages as lines of a configuration; they share strategy and offload."""
    first = next(iter(choices.values()))
    lines = ["runtime:", f"  strategy: {first.strategy}"]
    if first.offload.any:
        lines.append(f"  offload: {first.offload.yaml()}")
    lines.append("stages:")
    for stage, choice in choices.items():
        lines += [
            f"  {stage}:", f"    micro_batch_tokens: {choice.micro_batch_tokens}",
            f"    gradient_checkpointing: {choice.recompute}",
        ]  # fmt: skip
    return lines


@dataclass(frozen=True, slots=True)
class Judged:
    """A choice with its memory and time."""

    choice: Choice
    memory: Memory
    time: StepTime | None
    rows: int


@dataclass(slots=True)
class Judge:
    """Memory and time of choices for one stage; executed steps are kept.

    Args:
        run: (row tokens, recompute, rows) -> executed step.
        rows: (row tokens) -> rows of a rank in a step.
    """

    run: Callable[[int, str, int], Executed]
    rows: Callable[[int], int]
    load: Workload
    work: Work
    parameters: Parameters
    cluster: Cluster
    share: float
    _held: dict[tuple[int, str, int], Executed] = field(default_factory=dict)

    def judge(self, choice: Choice) -> Judged:
        """With the real row size."""
        rows = self.rows(choice.micro_batch_tokens)
        executed = self.executed(choice.micro_batch_tokens, choice.recompute, rows)
        return self._judged(
            choice, memory(executed, self.parameters, self.cluster, choice.strategy, choice.offload), rows
        )

    def executed(self, tokens: int, recompute: str, rows: int) -> Executed:
        key = (tokens, recompute, min(rows, 2))
        if key not in self._held:
            self._held[key] = self.run(*key)
        return self._held[key]

    def estimate(self, choice: Choice) -> Judged:
        """Interpolated between two executed row sizes."""
        low, high = ROW_TOKENS[0], ROW_TOKENS[3]
        rows = self.rows(choice.micro_batch_tokens)
        ends = [
            memory(
                self.executed(tokens, choice.recompute, rows),
                self.parameters,
                self.cluster,
                choice.strategy,
                choice.offload,
            )
            for tokens in (low, high)
        ]
        slope = (ends[1].total - ends[0].total) / (high - low)
        made = max(0, round(slope * (choice.micro_batch_tokens - low)))
        guess = Memory({"about": ends[0].total + made}, "interpolated", ends[0].elsewhere)
        return self._judged(choice, guess, rows)

    def _judged(self, choice: Choice, held: Memory, rows: int) -> Judged:
        time = step_time(
            self.work, self.load, self.parameters, self.cluster, strategy=choice.strategy, offload=choice.offload,
            recompute=choice.recompute, rows=rows, share=self.share,
        )  # fmt: skip
        return Judged(choice, held, time, rows)


def candidates(
    ranks: int, longest: int, largest: int, *, muon: bool, configured: Choice | None = None
) -> Iterator[Choice]:
    """All choices worth a look: row sizes that hold the longest record and do not exceed what a rank has in a step.

    The ways are those of :data:`~vlit.plan.offload.OFFLOADS`, and what ``configured`` offloads.
    """
    sizes = [tokens for tokens in ROW_TOKENS if tokens >= longest] or [longest]
    sizes = [tokens for tokens in sizes if tokens <= largest] or sizes[:1]
    whole: Strategy = "none" if ranks == 1 else "ddp"
    zero: tuple[Strategy, ...] = () if muon else (("zero1", "zero2", "zero3") if ranks > 1 else ())
    ways: list[tuple[Strategy, Offload]] = [(strategy, OFFLOADS["none"]) for strategy in (whole, *zero)]
    if not muon:
        ways += [("zero2", OFFLOADS["optimizer"]), ("zero3", OFFLOADS["optimizer"]), ("zero3", OFFLOADS["all"])]
    if configured is not None and configured.offload.any and (configured.strategy, configured.offload) not in ways:
        ways.append((configured.strategy, configured.offload))
    for strategy, offload in ways:
        for recompute in RECOMPUTE:
            for tokens in sizes:
                yield Choice(strategy, offload, recompute, tokens)


def propose(judge: Judge, choices: Sequence[Choice]) -> Judged | None:
    """The fastest choice that fits with a margin; None when nothing fits.

    Among those within :data:`EQUAL` of the fastest it is the one that divides least, then the one with long rows.
    """

    def seconds(judged: Judged) -> float:
        if judged.time is not None:
            return judged.time.total
        choice = judged.choice  # nothing is known of the device's speed: recomputing least, then the longest rows
        return 1.0 + RECOMPUTE.index(choice.recompute) - choice.micro_batch_tokens * 1e-9

    fitting = sorted((j for c in choices if (j := judge.estimate(c)).memory.fits(judge.cluster)), key=seconds)
    best = seconds(fitting[0]) if fitting else 0.0

    def order(judged: Judged) -> tuple[bool, int, int, int, float]:
        equal = seconds(judged) <= (1 + EQUAL) * best
        room = -min(judged.choice.micro_batch_tokens, LONG_ENOUGH)
        return (
            (False, *judged.choice.simplicity, room, judged.memory.total) if equal else (True, 0, 0, 0, seconds(judged))
        )

    for judged in sorted(fitting, key=order):
        exact = judge.judge(judged.choice)
        if exact.memory.fits(judge.cluster):
            return exact
    return None


def prefer(configured: Judged, proposed: Judged | None, cluster: Cluster) -> Judged | None:
    """The configuration itself where it fits, divides no more than the proposal and is as fast: no change for nothing."""
    if proposed is None or not configured.memory.fits(cluster):
        return proposed
    ours, theirs = configured.choice.simplicity, proposed.choice.simplicity
    if configured.time is None or proposed.time is None:
        equal = configured.choice.recompute == proposed.choice.recompute
    else:
        equal = configured.time.total <= (1 + EQUAL) * proposed.time.total
    return configured if equal and ours <= theirs else proposed
