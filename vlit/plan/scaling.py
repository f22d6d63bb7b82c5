"""Tables of docs/scaling.md: python -m vlit.plan.scaling [TABLE ...]

From one GPU to thousands for LLaVA-1.5 7B and 13B: what ranks send, how far a fixed global batch carries, and when loading
images or writing checkpoints becomes the limit. Shapes and dataset sizes are the built-in ones (``published.json``), so the
tables are the same on every machine. Everything is calculated from published peaks and rates; no GPU was measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from vlit.config.schema import RunConfig
from vlit.models.assemble import build_empty_model
from vlit.plan.cost import StepTime, Work, checkpoints, step_time, traffic, work
from vlit.plan.execute import tune
from vlit.plan.hardware import DEVICES, Cluster
from vlit.plan.memory import Parameters, Strategy
from vlit.plan.offload import Offload
from vlit.plan.parts import described
from vlit.plan.stage import parameters_of
from vlit.plan.workload import Assumed, Workload, workload

SHARE = 0.4
ROW_TOKENS = 8192
IMAGES_PER_CORE = 275.0
"""Images/s that one core decodes, pads and resizes (JPEG of 640 x 480 to 336 px): what ``benchmarks.loader`` measured."""
WAYS: tuple[tuple[Strategy, str], ...] = (
    ("ddp", "none"), ("zero1", "none"), ("zero2", "none"), ("zero3", "none"), ("zero3", "full"),
)  # fmt: skip
STAGES = {
    "align": {
        "data": [{"path": "blip_laion_cc_sbu_558k.json"}], "tuning": {"connector": "full"}, "lr": 1e-3,
        "global_batch": 256, "template": "plain",
    },
    "instruct": {
        "data": [{"path": "llava_v1_5_mix665k.json"}], "tuning": {"connector": "full", "llm": "full"}, "lr": 2e-5,
        "global_batch": 128,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of one model, as far as the tables need it."""

    model: str
    name: str
    parameters: Parameters
    changed: int
    load: Workload
    work: Work
    tokens_per_view: int

    def rows(self, ranks: int, global_batch: int | None = None) -> int:
        """Rows of a rank in a step; ranks have the same number of records, so one of them is packed."""
        share = math.ceil((global_batch or self.load.global_batch) / ranks)
        return _first_records(self.load, share).rows_per_step(ROW_TOKENS, 1, self.tokens_per_view)

    def time(self, cluster: Cluster, strategy: Strategy, recompute: str, global_batch: int | None = None) -> StepTime:
        load = self.load if global_batch is None else replace(self.load, global_batch=global_batch)
        found = step_time(
            self.work, load, self.parameters, cluster, strategy=strategy, offload=Offload(), recompute=recompute,
            rows=self.rows(cluster.count, global_batch), share=SHARE,
        )  # fmt: skip
        assert found is not None
        return found


def _first_records(load: Workload, count: int) -> Workload:
    """The same records in steps of another size."""
    every = [item for step in load.sampled for item in step]
    step = tuple(every[number % len(every)] for number in range(count))
    return replace(load, global_batch=count, sampled=(step,), _rows={})


@lru_cache(maxsize=1)
def stages() -> tuple[Stage, ...]:
    """Both stages of LLaVA-1.5 7B and 13B."""
    found = []
    for size in ("7b", "13b"):
        run = RunConfig.model_validate(
            {
                "model": {
                    "encoder": {"type": "hf", "path": "openai/clip-vit-large-patch14-336"},
                    "connector": {"type": "mlp"},
                    "llm": {"type": "hf", "path": f"lmsys/vicuna-{size}-v1.5"},
                },
                "stages": STAGES,
            }
        )
        with described(run.model) as (config, _):
            for name in STAGES:
                model = build_empty_model(config, dtype=torch.bfloat16)
                tune(model, run.stages[name].tuning)
                load = workload(run, name, model.spec, Assumed())
                held = parameters_of(model, "adamw")
                changed = held.trained
                found.append(
                    Stage(size.upper(), name, held, changed, load, work(model, load), model.spec.tokens_per_view)
                )
    return tuple(found)


def communication() -> list[list[str]]:
    """Bytes each rank sends in a step on 8 GPUs, and how long that takes against the products."""
    rows = [
        ["model, stage", "trained / frozen", "rows a rank", *(f"{s}{' full' if r == 'full' else ''}" for s, r in WAYS)]
    ]
    cluster = Cluster(DEVICES["H100"], 8)
    for stage in stages():
        count = stage.rows(8)
        cells = []
        for strategy, recompute in WAYS:
            sent = traffic(strategy, stage.parameters, 8, count, recompute).bytes
            share = sent / cluster.bus_rate / stage.time(cluster, strategy, recompute).compute
            cells.append(f"{sent / 1e9:,.1f} GB ({100 * share:.0f} %)")
        trained = f"{stage.parameters.trained / 1e9:.2f} / {stage.parameters.frozen / 1e9:.2f} G"
        rows.append([f"{stage.model} {stage.name}", trained, str(count), *cells])
    return rows


def ranks() -> list[list[str]]:
    """Stage instruct of 7B on more and more GPUs, at the published global batch and with 16 records a GPU."""
    stage = next(s for s in stages() if (s.model, s.name) == ("7B", "instruct"))
    rows = [["H100", "records a GPU", "ddp", "zero2", "zero3", "batch at 16 records a GPU", "ddp", "zero2", "zero3"]]
    for count in (8, 16, 32, 64, 128, 256, 512, 1024, 4096):
        cluster = Cluster(DEVICES["H100"], count)
        fixed = ["–"] * 3
        if count <= stage.load.global_batch:
            fixed = [
                _efficiency(stage, cluster, strategy, stage.load.global_batch) for strategy in ("ddp", "zero2", "zero3")
            ]
        grown = [_efficiency(stage, cluster, strategy, 16 * count) for strategy in ("ddp", "zero2", "zero3")]
        share = stage.load.global_batch / count
        rows.append([f"{count:,}", f"{share:g}" if share >= 1 else "under 1", *fixed, f"{16 * count:,}", *grown])
    return rows


def _efficiency(stage: Stage, cluster: Cluster, strategy: Strategy, batch: int) -> str:
    """Useful products' share of a step."""
    time = stage.time(cluster, strategy, "none", batch)
    return f"{100 * time.compute / time.total:.0f} %"


def loading() -> list[list[str]]:
    """Images a GPU consumes and the cores that takes."""
    rows = [["model, stage", "GPU", "images/s a GPU", "cores a GPU", "images/s of 8 GPUs", "cores of a machine"]]
    for stage in stages():
        for name in ("A100-80", "H100", "B200"):
            device = DEVICES[name]
            assert device.peak is not None
            rate = device.peak * SHARE / stage.work.useful * stage.load.mean("images")
            rows.append(
                [f"{stage.model} {stage.name}", name, f"{rate:.1f}", f"{rate / IMAGES_PER_CORE:.2f}", f"{8 * rate:,.0f}",
                 f"{8 * rate / IMAGES_PER_CORE:.1f}"]
            )  # fmt: skip
    return rows


def saving() -> list[list[str]]:
    """Bytes of a checkpoint, seconds to write it, and how rarely it must be written to cost 1 %."""
    rows = [
        ["model, stage", "machines of 8", "state", "written in", "every … when waiting", "every … in the background"]
    ]
    for stage in stages():
        for nodes in (1, 8, 64):
            cost = checkpoints(stage.parameters, stage.changed, Cluster(DEVICES["H100"], 8 * nodes))
            longest = max(cost.write_seconds, 100 * cost.copy_seconds)
            rows.append(
                [f"{stage.model} {stage.name}", str(nodes), f"{cost.state_bytes / 1e9:,.1f} GB",
                 f"{cost.write_seconds:,.1f} s", _minutes(100 * cost.write_seconds), _minutes(longest)]
            )  # fmt: skip
    return rows


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:,.1f} s"


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "communication": communication, "ranks": ranks, "loading": loading, "saving": saving,
}  # fmt: skip


def markdown(name: str) -> str:
    """One table."""
    rows = TABLES[name]()
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def main(words: Sequence[str]) -> int:
    unknown: Any = [word for word in words if word not in TABLES]
    if unknown:
        print(f"no table {unknown[0]!r}. Known: {', '.join(TABLES)}", file=sys.stderr)
        return 2
    print("\n\n".join(markdown(name) for name in words or TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
