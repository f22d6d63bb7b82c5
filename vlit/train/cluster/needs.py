"""What the unfinished stages of a run will take of disk and memory, counted from shapes before a weight is loaded.

Of the disk: checkpoints and models, as the check before the first step counts them. Of memory: a lower bound, which only holds
what lives for the whole stage (weights, gradients, optimizer states), so that a run which is refused could not have finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlit.config.schema import ModelConfig, OffloadConfig, RunConfig, StageConfig
from vlit.durable import bytes_below
from vlit.errors import VlitError
from vlit.models.artifact import read_manifest
from vlit.models.assemble import VisionLanguageModel, build_empty_model
from vlit.models.interop import detect
from vlit.models.quantize import original_of, packed_apart
from vlit.models.tuning import PartRow, apply_tuning, has_lora, part_of_parameters
from vlit.train.cluster.comparison import size
from vlit.train.distributed import Ranks, compute_dtype, effective_strategy
from vlit.types import PARTS

STATE_BYTES = 12  # of a trained value in a checkpoint: fp32 master and two optimizer states
MODEL_BYTES = 4  # of a value in a model folder, at most
MOMENT_BYTES = {"adamw": 8, "muon": 4}  # optimizer states of a trained value, at least


@dataclass(frozen=True, slots=True)
class PartCount:
    """Number of values of one part, before quantisation."""

    part: str
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Room:
    """What a stage writes, in values."""

    stage: str
    keep: int
    trained: int
    written: int

    @property
    def state(self) -> int:
        """Bytes of one checkpoint."""
        return STATE_BYTES * self.trained

    @property
    def needed(self) -> int:
        """Bytes of the checkpoints that are kept, one being written, and the model."""
        return self.state * (self.keep + 1) + MODEL_BYTES * self.written

    def problem(self, folder: Path, free: int, earlier: int = 0) -> str | None:
        """A sentence when ``free`` bytes do not hold it besides what the models of earlier stages still add."""
        if free >= self.needed + earlier:
            return None
        more = f" besides {size(earlier)} of the stages before it" if earlier else ""
        return (
            f"{folder}: {self.keep} checkpoints of {size(self.state)}, one being written and the model need "
            f"{self.needed / 1e9:,.2f} GB{more}, {free / 1e9:,.2f} GB are free. Free some space, set "
            f"stages.{self.stage}.checkpoint.keep lower, or use another output_dir."
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """What a stage's model takes of memory."""

    trained: int  # values
    frozen: int  # bytes, without packed ones
    packed: int  # bytes of a quantised decoder
    value_bytes: int  # 2 in bf16, 4 in fp32
    moment_bytes: int

    @property
    def whole(self) -> int:
        """Bytes of all weights, as they are loaded."""
        return self.trained * self.value_bytes + self.frozen + self.packed


@dataclass(frozen=True, slots=True)
class StageNeed:
    """The needs of one stage that is not finished."""

    room: Room
    there: int  # bytes that an earlier start of the stage left; they count as room
    earlier: int  # bytes that the models of unfinished stages before it will have taken
    weights: Weights


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the processes divide a stage."""

    strategy: str
    world_size: int
    offload: OffloadConfig
    on_cpu: bool

    @property
    def zero(self) -> int:
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    def held(self, weights: Weights) -> dict[str, int]:
        """Bytes that one process holds at least, wherever they are."""
        cut = [self.world_size if self.zero >= level else 1 for level in (1, 2, 3)]
        masters = 4 if weights.value_bytes < 4 else 0
        return {
            "packed": weights.packed,
            "frozen": weights.frozen // cut[2],
            "trained": weights.trained * weights.value_bytes // cut[2],
            "gradients": 4 * weights.trained // cut[1],
            "states": (masters + weights.moment_bytes) * weights.trained // cut[0],
        }

    def on_device(self, weights: Weights) -> int:
        """Bytes that one process holds on its device at least."""
        held = self.held(weights)
        if self.on_cpu:
            return sum(held.values()) - sum(held[name] for name in self._away("nvme"))
        away = {*self._away("cpu"), *self._away("nvme")}
        if "states" in away and self.zero >= 2:
            away.add("gradients")
        return sum(count for name, count in held.items() if name not in away)

    def on_host(self, weights: Weights, processes: int, *, loads_all: bool) -> int:
        """Bytes of host memory that ``processes`` of one host hold at least.

        Args:
            loads_all: one of them is rank 0, which under ``zero3`` reads all weights before it hands them out.

        Frozen weights on a CPU count once: they may be pages of the weights' file, which the processes share. A GPU's weights
        pass through such pages, so only what is made anew on the host counts for it.
        """
        held = self.held(weights)
        if not self.on_cpu:
            return max(processes * sum(held[name] for name in self._away("cpu")), weights.packed)
        shared = held["frozen"] if self.zero < 3 else 0
        running = shared + processes * (self.on_device(weights) - shared)
        return max(running, weights.whole) if loads_all else running

    def _away(self, place: str) -> list[str]:
        """What of :meth:`held` is offloaded to ``place``."""
        states = ["states"] if self.offload.optimizer == place else []
        return states + (["frozen", "trained"] if self.offload.parameters == place else [])


def room_of(stage: str, config: StageConfig, rows: Iterable[PartRow | PartCount], changed: Iterable[str]) -> Room:
    """What a stage writes.

    Args:
        changed: parts trained in full by this stage or one before it. The model folder holds those whole (language model and
            embeddings together) and of the others their adapters.
    """
    whole, rows = {*changed, "connector"}, list(rows)
    if whole & {"llm", "embeddings"}:
        whole |= {"llm", "embeddings"}
    written = sum(row.parameters if row.part in whole else row.trainable for row in rows)
    return Room(stage, config.checkpoint.keep, sum(row.trainable for row in rows), written)


def left_by_earlier_start(folder: Path) -> int:
    """Bytes of checkpoints and model in a stage's folder, whose room it uses again."""
    return bytes_below(folder / "state") + bytes_below(folder / "model")


@dataclass(frozen=True, slots=True)
class Needs:
    """What rank 0 counted; nothing elsewhere."""

    stages: Sequence[StageNeed] = ()
    sharing: Sharing | None = None
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()


def needs_of(run: RunConfig, ranks: Ranks, only: str | None = None) -> Needs:
    """The needs of the unfinished stages, counted on rank 0. What cannot be counted is a warning, a misfit part a problem.

    Raises:
        ModelError: a part does not fit, and there are no other ranks that would wait.
    """
    if not ranks.is_main:
        return Needs()
    try:
        strategy = effective_strategy(run.runtime, ranks.world_size)
        sharing = Sharing(strategy, ranks.world_size, run.runtime.offload, ranks.device.type == "cpu")
        return Needs(stage_needs(run, compute_dtype(run.runtime, ranks.device), only), sharing)
    except VlitError as error:
        if ranks.world_size == 1:
            raise
        return Needs(problems=[str(error)])
    except Exception as error:  # a model whose program cannot run without weights may still train
        return Needs(warnings=[f"what the run needs cannot be counted ({type(error).__name__}: {error})."])


def stage_needs(run: RunConfig, dtype: torch.dtype, only: str | None = None) -> list[StageNeed]:
    """The needs of every stage (up to ``only``) that is not finished. Reads descriptions of models, no weights.

    Raises:
        ModelError: a part is missing, or a stage's tuning does not fit it.
    """
    needs: list[StageNeed] = []
    changed = _changed_at_start(run.model)
    earlier, out, names = 0, Path(run.output_dir), list(run.stages)
    names = names[: len(names) if only is None else names.index(only) + 1]
    unfinished = [name for name in names if not (out / name / "done.json").is_file()]
    models = _tuned(run, unfinished, dtype)
    for name in names:
        config = run.stages[name]
        changed |= {part for part in PARTS if config.tuning.of(part).mode == "full"}
        if name not in unfinished:
            continue
        model = next(models)
        room = room_of(name, config, count_parts(model), changed)
        weights = weights_of(model, config.optimizer.type)
        needs.append(StageNeed(room, left_by_earlier_start(out / name), earlier, weights))
        earlier += max(0, weights.value_bytes * room.written - bytes_below(out / name / "model"))
    return needs


def _changed_at_start(model: ModelConfig) -> set[str]:
    """Parts that no longer are their base when the first stage starts."""
    if model.init_from is None:
        return set()
    if (Path(model.init_from) / "manifest.json").is_file():
        return set(read_manifest(Path(model.init_from))["changed"])
    return {"connector"} if detect(model.init_from) == "mm_projector" else {"connector", "llm", "embeddings"}


def count_parts(model: VisionLanguageModel) -> list[PartCount]:
    """Values of every part that has any, as the table of parts counts them."""
    parameters, trainable = Counter[str](), Counter[str]()
    for name, part in part_of_parameters(model).items():
        parameter = model.get_parameter(name)
        parameters[part] += original_of(model, name).numel()
        trainable[part] += parameter.numel() if parameter.requires_grad else 0
    return [PartCount(part, count, trainable[part]) for part, count in parameters.items()]


def weights_of(model: VisionLanguageModel, optimizer: str) -> Weights:
    """Bytes of a tuned model, its packed weights as small as they are."""
    packed, own = packed_apart(model)
    return Weights(
        trained=sum(p.numel() for p in own if p.requires_grad),
        frozen=sum(p.nbytes for p in own if not p.requires_grad),
        packed=sum(tensor.nbytes for tensor in packed),
        value_bytes=min(p.element_size() for p in own),
        moment_bytes=MOMENT_BYTES[optimizer],
    )


def process_bytes(needs: Needs) -> int:
    """What the largest stage holds on the device of one process at least."""
    return max((needs.sharing.on_device(n.weights) for n in needs.stages if needs.sharing), default=0)


def _tuned(run: RunConfig, names: Sequence[str], dtype: torch.dtype) -> Iterator[VisionLanguageModel]:
    """The model of each stage on the meta device; built again only where adapters are in the way."""
    model: VisionLanguageModel | None = None
    for name in names:
        with torch.random.fork_rng(devices=[]):
            if model is None or has_lora(model):
                model = build_empty_model(run.model, dtype=dtype)
            with torch.device("meta"):
                apply_tuning(model, run.stages[name].tuning)
        yield model
