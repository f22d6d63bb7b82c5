"""The planner against real training: predicted memory against what a process holds, and the plan of published recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import memory as bench
from benchmarks.models import Size
from tests.tiny import needs_bitsandbytes
from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.load import load_config, merge, read_yaml, validate_config
from vlit.errors import ConfigError, ModelError
from vlit.plan import memory as plan_memory
from vlit.plan import report, scaling
from vlit.plan.execute import Executed
from vlit.plan.hardware import DEVICES, Cluster, parse_gpus
from vlit.plan.memory import Parameters, memory
from vlit.plan.stage import RunPlan, plan_run
from vlit.plan.trace import MemoryTrace, Peak
from vlit.plan.workload import Assumed

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "recipes" / "llava15" / "7b.yaml"
SIZE = Size(112, 14, 256, 3, 4, 512, 3, 8, 1376, 8192)
WIDE = replace(SIZE, width=1024, ff=2816)  # 4 bit works on blocks of 64
TWO_ROWS = ((8, 160, 1), (8, 160, 1))
CASES = (
    bench.MemoryCase("frozen, none, bf16", SIZE, bench.ALIGN, rows=((24, 40, 1),) * 2),
    bench.MemoryCase("frozen, full, bf16, many images", SIZE, bench.ALIGN, "full", rows=((24, 20, 3),) * 2),
    bench.MemoryCase("full, none, bf16", SIZE, bench.INSTRUCT, rows=TWO_ROWS),
    bench.MemoryCase("full, selective, bf16, one long record", SIZE, bench.INSTRUCT, "selective", rows=((1, 2500, 1),) * 2),
    bench.MemoryCase("full, full, bf16, big vocabulary", replace(SIZE, vocabulary=48_000), bench.INSTRUCT, "full",
                     rows=TWO_ROWS),
    bench.MemoryCase("full, selective, fp32, one row", SIZE, bench.INSTRUCT, "selective", "float32", ((16, 160, 1),)),
    bench.MemoryCase("LoRA, none, bf16", SIZE, bench.LORA, rows=TWO_ROWS),
    bench.MemoryCase("LoRA on 4 bits, selective, bf16", WIDE, bench.LORA, "selective", rows=TWO_ROWS, quantize="4bit"),
    bench.MemoryCase("LoRA on 8 bits, none, bf16", WIDE, bench.LORA, rows=TWO_ROWS, quantize="8bit"),
    bench.MemoryCase("vision too, selective, bf16", SIZE, bench.WHOLE, "selective", rows=((24, 20, 2),) * 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case trained in a process of its own, two at a time."""
    for case in CASES:
        bench.write_model(case, tmp_path_factory.getbasetemp() / f"parts-{case.name}")
    with ThreadPoolExecutor(2) as pool:
        folder = tmp_path_factory.getbasetemp()
        measured = list(pool.map(lambda case: bench.measure(case, folder / f"parts-{case.name}"), CASES))
    found = {}
    for case, mb in zip(CASES, measured, strict=True):
        shutil.rmtree(folder / f"parts-{case.name}")
        found[case.name] = {"measured": mb["step"], "predicted": bench.predict(case).peak.total / 2**20}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_predicted_memory_is_within_a_tenth_of_what_training_holds(
    name: str, compared: dict[str, dict[str, Any]]
) -> None:
    row = compared[name]
    assert row["measured"] > 150  # MiB: small enough for a test, far above the noise of a process
    assert abs(row["predicted"] / row["measured"] - 1) <= bench.TOLERANCE, row


def test_recomputation_and_frozen_parts_show_in_the_prediction() -> None:
    case = bench.MemoryCase("", SIZE, bench.INSTRUCT, rows=TWO_ROWS)
    saved = {policy: bench.predict(replace(case, recompute=policy)).saved for policy in ("none", "selective", "full")}
    assert saved["none"] > 1.5 * saved["selective"] > 1.5 * saved["full"]
    assert bench.predict(replace(case, tuning=bench.ALIGN)).saved < 0.75 * saved["none"]


def test_muon_keeps_one_state_of_a_hidden_matrix_and_two_of_everything_else(tiny_dir: Path, tmp_path: Path) -> None:
    overrides = ["stages.instruct.optimizer.type=muon", "runtime.precision=fp32"]
    (plan,) = plan_run(tiny_run(tiny_dir, tmp_path, *overrides), parse_gpus("1xH100"), only="instruct").stages
    _, embeddings, _ = plan.parts["embeddings"]
    found = plan.configured.memory.components["optimizer states"] / plan.parameters.trained
    assert 4 < found < 4 + 4.2 * embeddings / plan.parameters.trained + 0.2
    assert "fp32 masters" not in plan.configured.memory.components


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_recomputation_runs_the_same_attention_as_the_forward_pass(kind: str, recompute: str) -> None:
    case = bench.MemoryCase("", SIZE, bench.WHOLE, dtype="float32", rows=((1, 3000, 1),))
    least = bench.predict(case, kind=kind).peak.total
    peak = bench.predict(replace(case, recompute=recompute), kind=kind).peak
    assert peak.total < least  # plain mathematics would hold 3,064² weights for each of 8 heads: 300 MB


def test_a_trace_sees_what_is_saved_and_what_is_dropped() -> None:
    weight = torch.empty(256, 256, device="meta", requires_grad=True)
    trace = MemoryTrace(lambda *call: 0)
    trace.hold([weight], "weights")
    with trace, trace.during("forward", "saved"):
        x = torch.empty(1024, 256, device="meta")
        hidden = (x @ weight).relu()
        del x
        assert trace.live["saved"] == 2 * 1024 * 256 * 4  # x for the weight's gradient, relu's result; not the product
        hidden.sum().backward()
    assert trace.live["weights"] == 256 * 256 * 4
    # highest in backward: x, the gradient of the product and relu's result; the weight's gradient; scalars
    assert trace.peak.total == pytest.approx(3 * 1024 * 256 * 4 + 2 * 256 * 256 * 4, abs=64)


@pytest.fixture(scope="module")
def published() -> RunPlan:
    return plan_run(load_config(RECIPE), parse_gpus("8xH100"))


def test_the_published_recipe_is_planned_without_weights_and_data(published: RunPlan) -> None:
    align, instruct = published.stages
    assert [source["found"] for source in published.sources] == ["built-in published shape"] * 2
    assert align.parts["connector"] == ("full", 20_979_712, 0)
    assert instruct.parameters.trained == 6_476_271_616 + 262_144_000 + 20_979_712
    assert (align.load.steps, instruct.load.steps) == (2181, 5198)
    assert align.work.useful == pytest.approx(16.5e12, rel=0.01)  # counted by hand at 606 tokens
    assert instruct.load.mean("tokens") == pytest.approx(224 + 0.939 * 576, abs=2)
    whole = memory(instruct.judge.executed(8192, "full", 2), instruct.parameters, published.cluster, "ddp")
    assert not whole.fits(published.cluster)  # 16 bytes a weight on every GPU


@needs_bitsandbytes
def test_packed_weights_count_as_what_they_take_and_no_strategy_divides_them(published: RunPlan) -> None:
    """32 x (4 x 4096² + 3 x 4096 x 11008) values of LLaMA-7B: half a byte each, one for 64 of them, four for 64 x 256."""
    raw = merge(read_yaml(RECIPE.with_name("7b-lora.yaml")), {"model": {"llm": {"quantize": "4bit"}}})
    lora = merge(read_yaml(RECIPE), {key: value for key, value in raw.items() if key != "extends"})
    (stage,) = plan_run(validate_config(lora, name="qlora"), published.cluster, only="instruct").stages
    values = 6_476_005_376
    assert stage.parameters.packed_bytes == pytest.approx(values * (1 / 2 + 1 / 64 + 4 / (64 * 256)), rel=1e-6)
    assert stage.parts["llm"][2] == 6_476_271_616
    executed = stage.judge.executed(4096, "full", 2)
    loose = 2 * (stage.parameters.trained + stage.parameters.frozen)
    whole, cut = (
        memory(executed, stage.parameters, published.cluster, way).components["weights"] for way in ("ddp", "zero3")
    )
    assert whole == pytest.approx(stage.parameters.packed_bytes + loose, rel=0.01)
    assert cut == loose // 8 + stage.parameters.packed_bytes
    assert memory(executed, stage.parameters, Cluster(DEVICES["RTX4090"], 1), "none").total < 24e9


def test_a_proposal_fits_and_is_a_configuration(published: RunPlan) -> None:
    lines = report.as_json(published)["proposal"]
    assert "strategy: zero" in lines
    run = validate_config(merge(read_yaml(RECIPE), yaml.safe_load(lines)), name="proposal")
    for stage in published.stages:
        assert stage.proposed is not None
        assert stage.proposed.memory.total <= 0.9 * published.cluster.device.memory
        assert run.stages[stage.name].micro_batch_tokens == stage.proposed.choice.micro_batch_tokens
    again = plan_run(run, published.cluster)
    assert all(stage.configured.memory.fits(published.cluster) for stage in again.stages)
    text = report.as_text(published)
    assert "not measured" in text
    assert lines.splitlines()[-1] in text


def test_zero_divides_what_the_formulas_divide() -> None:
    psi, frozen, ranks = 6_000_000_000, 1_000_000_000, 8
    parameters = Parameters(psi, frozen, largest_gathered=0, bytes_each=2)
    peak = Peak({"weights": 2 * (psi + frozen), "saved": 10**9}, "forward", "x")
    cluster = Cluster(DEVICES["H100"], ranks)
    states = {}
    for strategy in ("zero1", "zero2", "zero3"):
        found = memory(Executed(peak, peak, 0), parameters, cluster, strategy).components
        names = ("weights", "fp32 masters", "optimizer states", "gradients")
        states[strategy] = sum(found[name] for name in names)
        assert found["activations"] == 10**9
    size = plan_memory.GRADIENT_BYTES
    assert states["zero1"] == 2 * frozen + 2 * psi + size * psi + 12 * psi // ranks
    assert states["zero2"] == 2 * frozen + 2 * psi + (size + 12) * psi // ranks
    assert states["zero3"] == (2 * frozen + (2 + size + 12) * psi) // ranks
    offloaded = memory(Executed(peak, peak, 0), parameters, cluster, "zero3", "all")
    assert offloaded.host == states["zero3"]
    assert "weights" not in offloaded.components


def test_bucket_sizes_are_those_that_training_sets() -> None:
    from vlit.train import distributed
    from vlit.train.zero import config

    assert plan_memory.DDP_BUCKET_BYTES == 4 * distributed.BUCKET
    assert plan_memory.REDUCE_BUCKET == config.REDUCE_BUCKET
    assert plan_memory.PREFETCH_BUCKET == config.PREFETCH_BUCKET


def test_a_model_that_is_described_nowhere_is_named_with_the_next_action(tmp_path: Path) -> None:
    run = load_config(RECIPE, ["model.llm.path=somebody/unknown-7b"])
    with pytest.raises(ModelError, match=r'model\.llm\.path "somebody/unknown-7b".*--parts FOLDER'):
        plan_run(run, parse_gpus("8xH100"))
    with pytest.raises(ConfigError, match=r"unknown accelerator.*H100"):
        parse_gpus("8xH1000")


def test_a_folder_with_a_config_alone_describes_a_part(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    folder = tmp_path / "parts" / "somebody" / "tiny"
    folder.mkdir(parents=True)
    shutil.copy(Path(run.model.llm.path) / "config.json", folder)
    moved = run.model.model_copy(update={"llm": run.model.llm.model_copy(update={"path": "somebody/tiny"})})
    assumed = Assumed(records=100, tokens_per_record=60, images_per_record=1)
    here = plan_run(run, parse_gpus("2xA100-80"), assumed=assumed)
    there = plan_run(
        run.model_copy(update={"model": moved}), parse_gpus("2xA100-80"), parts=tmp_path / "parts", assumed=assumed
    )
    assert there.sources[-1]["found"].startswith("--parts")
    for a, b in zip(here.stages, there.stages, strict=True):
        assert (a.parameters, a.configured.memory) == (b.parameters, b.configured.memory)


def test_lengths_come_from_the_data_where_it_is(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    found = plan_run(run, parse_gpus("1xH100"))
    for stage in found.stages:
        assert stage.load.source.startswith("the first")
        assert 0 < stage.load.mean("images") <= 2
        assert stage.load.mean("tokens") > stage.load.mean("labels") > 0
        assert stage.configured.choice.strategy == "none"


def test_the_command_prints_json(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
    assert main(["plan", "--config", str(path), "--gpus", "2xH100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["stages"]) == set(run.stages)
    assert main(["plan", "--config", str(path), "--gpus", "2xCray"]) == 2


def tables_of(page: str) -> Iterator[tuple[str, str]]:
    """(name, table) of every table that stands under its command."""
    for block in page.split("`python -m vlit.plan.scaling ")[1:]:
        name, _, rest = block.partition("`")
        lines = rest.split("\n")
        first = next(number for number, line in enumerate(lines) if line.startswith("|"))
        last = next(number for number, line in enumerate(lines) if number > first and not line.startswith("|"))
        yield name, "\n".join(lines[first:last])


def test_every_table_of_the_page_is_what_its_command_prints() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = dict(tables_of(page))
    assert set(found) == set(scaling.TABLES)
    for name, table in found.items():
        assert table == scaling.markdown(name), name
