"""What `vlit plan` says of offloading: which bytes lie on the GPU, in main memory and on the disk, and the time that takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import tiny_run
from vlit.config.load import load_config, merge, read_yaml, validate_config
from vlit.plan import offload, report
from vlit.plan.execute import Executed
from vlit.plan.hardware import DEVICES, Cluster, parse_gpus
from vlit.plan.memory import Memory, Parameters, memory
from vlit.plan.offload import Offload
from vlit.plan.propose import Choice, candidates, yaml_lines
from vlit.plan.stage import RunPlan, plan_run
from vlit.plan.trace import Peak

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "recipes" / "llava15" / "7b.yaml"


def held_by(offload: Offload, ranks: int) -> Memory:
    """6 G trained and 1 G frozen weights in bf16 under ``zero3``."""
    parameters = Parameters(6_000_000_000, 1_000_000_000, largest_gathered=0, bytes_each=2)
    peak = Peak({"weights": 14_000_000_000}, "forward", "x")
    return memory(Executed(peak, peak, 0), parameters, Cluster(DEVICES["H100"], ranks), "zero3", offload)


@pytest.mark.parametrize(
    ("offload", "ranks", "on_gpu", "host", "nvme"),
    [  # billions of bytes: weights, masters, optimizer states, gradients on the GPU; main memory; disk
        (Offload(), 8, (1.75, 3, 6, 3), 0, 0),
        (Offload(parameters="cpu"), 8, (0, 3, 6, 3), 1.75, 0),
        (Offload("cpu"), 8, (1.75, 0, 0, 0), 12, 0),
        (Offload("cpu", "cpu"), 8, (0, 0, 0, 0), 13.75, 0),
        (Offload("nvme"), 8, (1.75, 0, 0, 0), 3 + 4 * 4 * 0.75, 12),
        (Offload("nvme", "cpu"), 1, (0, 0, 0, 0), 24 + 4 * 4 * 1 + 14, 96),
        (Offload("none", "nvme"), 8, (0, 3, 6, 3), 2 * 0.75 + 2 * 0.5, 0.25),  # 0.75 G trained weights stay in memory
        (Offload("cpu", "nvme"), 1, (0, 0, 0, 0), 96 + 2 * 1 + 2 * 0.5, 14),  # 6 G do not
    ],
)  # fmt: skip
def test_optimizer_and_parameters_are_offloaded_independently(
    offload: Offload, ranks: int, on_gpu: tuple[float, ...], host: float, nvme: float
) -> None:
    found = held_by(offload, ranks)
    names = ("weights", "fp32 masters", "optimizer states", "gradients")
    assert tuple(found.components.get(name, 0) for name in names) == tuple(1e9 * value for value in on_gpu)
    assert (found.host, found.nvme) == (1e9 * host, 1e9 * nvme)


def test_offloaded_parameters_alone_do_not_make_a_7b_fit_one_gpu() -> None:
    run = load_config(RECIPE, ["runtime.strategy=zero3", "runtime.offload.parameters=cpu"])
    plan = plan_run(run, parse_gpus("1xA100-80"), only="instruct")
    held, trained = plan.stages[0].configured.memory, 6_476_271_616 + 262_144_000 + 20_979_712
    assert held.components["fp32 masters"] == held.components["gradients"] == 4 * trained
    assert held.components["optimizer states"] == 8 * trained
    assert held.host == 2 * (trained + 290_909_184)
    assert not held.fits(plan.cluster)
    assert "zero3 + offload {parameters: cpu}" in report.as_text(plan)


def test_offload_to_disk_has_a_line_and_a_time_of_its_own(tiny_dir: Path, tmp_path: Path) -> None:
    overrides = ["strategy=zero3", "precision=bf16", "offload.nvme_path=/ssd"]

    def planned(gpus: str, *places: str) -> RunPlan:
        settings = [f"runtime.{setting}" for setting in (*overrides, *places)]
        return plan_run(tiny_run(tiny_dir, tmp_path, *settings), parse_gpus(gpus), only="instruct")

    plan, rate = planned("8xH100", "offload.optimizer=nvme"), 3e9
    (stage,) = plan.stages
    time, owned = stage.configured.time, stage.parameters.trained / 8
    assert time is not None
    assert time.nvme == pytest.approx(8 * 2 * 16 * owned / rate)  # eight GPUs read and write 16 bytes a value
    assert time.total == pytest.approx(time.compute + time.memory + time.communication + time.nvme)
    text = report.as_text(plan)
    assert "of the NVMe disk a rank" in text
    assert "NVMe at 3 GB/s a machine" in text
    judged = report.as_json(plan)["stages"]["instruct"]["configured"]
    assert judged["nvme_bytes"] == pytest.approx(16 * owned, abs=64)
    assert judged["offload"] == {"optimizer": "nvme", "parameters": "none", "nvme_path": "/ssd"}

    (stage,) = planned("1xH100", "offload.parameters=nvme").stages
    frozen = 2 * stage.parameters.frozen
    assert frozen == stage.configured.memory.nvme > 0  # the few trained weights stay in main memory
    assert stage.configured.time is not None
    assert stage.configured.time.nvme == pytest.approx(2 * stage.configured.rows * frozen / rate)  # read, never written
    assert "NVMe" not in report.as_text(planned("1xH100", "offload.parameters=cpu"))


def test_a_run_offloaded_to_disk_stays_a_choice_and_a_configuration() -> None:
    places = Offload("nvme", "cpu", nvme_path="/local ssd: fast")
    choice = Choice("zero3", places, "full", 4096)
    assert choice in set(candidates(1, 100, 8192, muon=False, configured=choice))
    pasted = yaml.safe_load("\n".join(yaml_lines({"instruct": choice})))
    run = validate_config(merge(read_yaml(RECIPE), pasted), name="pasted")
    assert run.runtime.offload.model_dump() == asdict(places)


def test_places_and_buffers_of_offloading_are_deepspeeds() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    weights = offload_config.DeepSpeedZeroOffloadParamConfig()
    assert offload_config.DeepSpeedZeroOffloadOptimizerConfig().buffer_count == offload.SWAP_BUFFERS
    assert weights.max_in_cpu == offload.WEIGHTS_IN_MEMORY
    assert weights.buffer_count * weights.buffer_size == offload.READ_BUFFERS
    assert DeepSpeedZeroConfig().sub_group_size == offload.SUB_GROUP
