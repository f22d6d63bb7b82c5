"""A plan as text a person reads, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlit.plan.hardware import DISK_RATE, GIB, NVME_RATE
from vlit.plan.memory import MARGIN
from vlit.plan.propose import Judged, yaml_lines
from vlit.plan.stage import RunPlan, StagePlan

NOTE = "GPU figures are calculated from published peaks and rates, not measured."


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Plain values: bytes, seconds, counts."""
    return {
        "note": NOTE,
        "gpus": plan.cluster.describe(),
        "device": asdict(plan.cluster.device),
        "share_of_peak": plan.share,
        "precision": plan.precision,
        "parts_found": plan.sources,
        "proposal": "\n".join(_yaml(plan)),
        "stages": {stage.name: _stage(plan, stage) for stage in plan.stages},
    }


def _stage(plan: RunPlan, stage: StagePlan) -> dict[str, Any]:
    load = stage.load
    return {
        "parts": {part: {"mode": m, "trained": t, "frozen": f} for part, (m, t, f) in stage.parts.items()},
        "data": {
            "source": load.source, "records": load.records, "steps": load.steps, "global_batch": load.global_batch,
            "tokens_per_record": load.mean("tokens"), "images_per_record": load.mean("images"),
            "labels_per_record": load.mean("labels"),
        },
        "flops_per_record": stage.work.useful,
        "configured": _judged(plan, stage, stage.configured),
        "proposed": None if stage.proposed is None else _judged(plan, stage, stage.proposed),
        "checkpoint": asdict(stage.checkpoint) | {"written": stage.num_checkpoints},
    }  # fmt: skip


def _judged(plan: RunPlan, stage: StagePlan, judged: Judged) -> dict[str, Any]:
    found: dict[str, Any] = {
        **asdict(judged.choice),
        "rows_per_step": judged.rows,
        "memory_bytes": judged.memory.components,
        "memory_total": judged.memory.total,
        "logits_highest_bytes": judged.memory.logits_highest,
        "host_bytes": judged.memory.host,
        "nvme_bytes": judged.memory.nvme,
        "peak_at": judged.memory.where,
        "fits": judged.memory.fits(plan.cluster),
        "step_seconds": None,
    }
    if judged.time is not None:
        seconds = judged.time.total * stage.load.steps
        found |= {
            "step_seconds": asdict(judged.time) | {"total": judged.time.total},
            "stage_seconds": seconds,
            "gpu_hours": seconds * plan.cluster.count / 3600,
        }
    return found


def as_text(plan: RunPlan) -> str:
    """The whole plan."""
    device = plan.cluster.device
    peak = f"{device.peak / 1e12:,.0f} TFLOP/s bf16 dense" if device.peak else "peak unknown, so no times"
    lines = [f"{plan.cluster.describe()}: {device.memory / GIB:.1f} GiB each, {peak}; computing in {plan.precision}"]
    if device.kind == "cuda":
        lines.append(f"{NOTE} Products run at {100 * plan.share:.0f} % of the peak (--share).")
    else:
        lines.append(
            "Memory is what a step holds. Training keeps freed memory (vlit.train.distributed.keep_freed_memory), so a process "
            "grows larger: 1.1 to 2.3 times in docs/measurements/memory_cpu.json."
        )
    lines += [f"{source['key']} {source['name']}: {source['found']}" for source in plan.sources]
    for stage in plan.stages:
        lines += ["", *_stage_lines(plan, stage)]
    if lines_to_paste := _yaml(plan):
        lines += ["", "proposal, to paste into the configuration:", *(f"    {line}" for line in lines_to_paste)]
    return "\n".join(lines)


def _yaml(plan: RunPlan) -> list[str]:
    choices = {stage.name: stage.proposed.choice for stage in plan.stages if stage.proposed is not None}
    return yaml_lines(choices) if choices else []


def _stage_lines(plan: RunPlan, stage: StagePlan) -> list[str]:
    load, check = stage.load, stage.checkpoint
    rows = [
        [part, mode, f"{trained + frozen:,}", f"{trained:,}", f"{frozen:,}"]
        for part, (mode, trained, frozen) in stage.parts.items()
    ]
    lines = [f"stage {stage.name}", *_table(["part", "mode", "parameters", "trained", "frozen"], rows)]
    epoch = load.records
    lines.append(
        f"data         {epoch:,} records, {load.mean('tokens'):,.0f} tokens and {load.mean('images'):.2f} images a record, "
        f"{load.mean('labels'):,.0f} supervised ({load.source})"
    )
    seen = load.steps * load.global_batch
    lines.append(
        f"work         {load.steps:,} steps of {load.global_batch} records; {seen * load.mean('tokens') / 1e6:,.0f} M tokens, "
        f"{seen * load.mean('images') / 1e3:,.0f} k images, {stage.work.useful * seen:.2e} useful FLOPs "
        f"({stage.work.useful / 1e12:,.1f} TFLOP a record)"
    )
    lines += _way(plan, stage, "configured", stage.configured)
    if stage.proposed is None:
        lines.append(
            f"proposed     nothing fits {plan.cluster.device.memory / GIB:.0f} GiB with {100 * MARGIN:.0f} % to spare, not "
            "even zero3 with offloaded weights: take more or larger GPUs, or train adapters (tuning.llm: {mode: lora})"
        )
    elif stage.proposed.choice == stage.configured.choice:
        lines.append("proposed     the configuration as it is")
    else:
        lines += _way(plan, stage, "proposed", stage.proposed)
    lines.append(
        f"checkpoints  {stage.num_checkpoints} of {_gib(check.state_bytes)}, each {check.write_seconds:,.0f} s to a disk of "
        f"{DISK_RATE / 1e9:g} GB/s a machine; model folder {_gib(check.model_bytes)}"
    )
    return lines


def _way(plan: RunPlan, stage: StagePlan, title: str, judged: Judged) -> list[str]:
    choice, held = judged.choice, judged.memory
    offload = f" + offload {choice.offload.yaml()}" if choice.offload.any else ""
    fits = "fits" if held.fits(plan.cluster) else "DOES NOT FIT"
    lines = [
        f"{title:<12} {choice.strategy}{offload}, rows of {choice.micro_batch_tokens:,} tokens ({judged.rows} a rank and "
        f"step), gradient_checkpointing {choice.recompute}",
        f"  memory     {_gib(held.total)} a rank of {plan.cluster.device.memory / GIB:.1f}: {fits} with {100 * MARGIN:.0f} % "
        f"to spare; highest in {held.where}",
        *_table(["", ""], [[name, _gib(size)] for name, size in held.components.items()], indent="             "),
    ]
    lines.append(f"  logits     {_gib(held.logits_highest)} at most, while the loss is computed")
    if held.host:
        lines.append(f"  host       {_gib(held.host)} of main memory a rank")
    if held.nvme:
        lines.append(f"  nvme       {_gib(held.nvme)} of the NVMe disk a rank")
    if judged.time is not None:
        time, seconds = judged.time, judged.time.total * stage.load.steps
        disk = f"NVMe at {NVME_RATE / 1e9:g} GB/s a machine {time.nvme:.2f}, " if time.nvme else ""
        lines.append(
            f"  time       {time.total:.2f} s a step (products {time.compute:.2f}, memory traffic {time.memory:.2f}, {disk}"
            f"communication not hidden {time.communication:.2f} of {time.sent / 1e9:,.1f} GB sent a rank)"
        )
        lines.append(f"             {seconds / 3600:.1f} h, {seconds * plan.cluster.count / 3600:,.0f} GPU-hours")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _table(head: list[str], rows: list[list[str]], indent: str = "  ") -> list[str]:
    lines = [head, *rows] if any(head) else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = len([cell for cell in head if cell in ("part", "mode")]) or 1
    return [
        indent
        + "  ".join(c.ljust(w) if n < text else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
