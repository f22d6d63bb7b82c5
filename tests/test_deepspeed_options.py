"""``runtime.deepspeed`` and ``runtime.offload`` are checked when the configuration is read, by every command that reads one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.load import load_config
from vlit.errors import ConfigError

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "runtime.deepspeed."
BAD: dict[str, tuple[Any, str, list[str]]] = {
    "unknown": ({"bogus": 1}, "bogus", ["unknown key. Known: aio, ", "zero_optimization"]),
    "mistyped": ({"zero_optimisation": {}}, "zero_optimisation", ['Did you mean "zero_optimization"?']),
    "owned": ({"optimizer": {"type": "Adam"}}, "optimizer", ["stages.<name>.optimizer decides it", "'Adam'"]),
    "nested": (
        {"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com",
        ["unknown key. Known: ", 'Did you mean "overlap_comm"?'],
    ),
    "deep": (
        {"zero_optimization": {"leaf_module": {"clases": ["A"]}}}, "zero_optimization.leaf_module.clases",
        ['Known: classes, name_suffixes, names. Did you mean "classes"?'],
    ),
    "own_section": ({"aio": {"blok_size": 1}}, "aio.blok_size", ['Did you mean "block_size"?']),
    "section_kind": ({"zero_optimization": 5}, "zero_optimization", ["dictionary (got 5)"]),
    "inner_kind": (
        {"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size",
        ["integer", "(got 'many')"],
    ),
    "placeholder": (
        {"zero_optimization": {"reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size", ["(got 'auto')"],
    ),
    "range": (
        {"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size", ["greater than 0 (got 0)"],
    ),
    "other_model": ({"comms_logger": {"enabled": "perhaps"}}, "comms_logger.enabled", ["boolean", "(got 'perhaps')"]),
    "raised": (
        {"zero_optimization": {"leaf_module": 3}}, "zero_optimization", ["DeepSpeed does not take it: TypeError: leaf_module"],
    ),
    "whole_section": (
        {"zero_optimization": {"offload_optimizer": {}, "compute_grad_norm": 7}}, "zero_optimization.offload_optimizer",
        ["runtime.offload.optimizer decides it", "compute_grad_norm: Input should be a valid boolean"],
    ),
    "choice": ({"communication_data_type": "bf17"}, "communication_data_type", ["'fp32', 'bf16' or 'fp16' (got 'bf17')"]),
    "scalar_kind": ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown", ["boolean (got 'yes')"]),
    "number_kind": ({"steps_per_print": "a"}, "steps_per_print", ["integer (got 'a')"]),
    "memory_efficient_linear": (
        {"zero_optimization": {"memory_efficient_linear": True}}, "zero_optimization.memory_efficient_linear",
        ["gradients are silently wrong (got True). Remove the key, or set false."],
    ),
    "old_name": (
        {"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload", ["runtime.offload.optimizer decides it"],
    ),
    "amp": ({"amp": {"enabled": True}}, "amp", ["runtime.precision decides it"]),
    "torch_autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast", ["runtime.precision decides it"]),
    "grad_accum_dtype": (
        {"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype",
        ["summed in fp32", '(got \'bf16\'). Remove the key, or set "fp32".'],
    ),
    "cpu_optimizer": ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer", ["or set false"]),
    "tensor_parallel": ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", ["records of its own"]),
    "dropped": ({"sparse_gradients": True}, "sparse_gradients", ["has dropped it; remove the key (got True)"]),
}  # fmt: skip
"""Setting, the key that the error names below ``runtime.deepspeed``, and what it says, in this order."""
GOOD = {
    "zero_optimization": {"reduce_bucket_size": 12345, "memory_efficient_linear": False, "round_robin_gradients": True},
    "communication_data_type": "bf16",
    "data_types": {"grad_accum_dtype": "fp32"},
    "comms_logger": {"enabled": False},
    "timers": {"throughput": {"enabled": False}},
}
TRAIN = """
import json, sys
from vlit.cli import main
from vlit.train.zero import engine
made = []
initialize = engine._initialize
engine._initialize = lambda *words, **own: made.append(initialize(*words, **own)) or made[-1]
code = main(["train", *sys.argv[2:]])
held = [e._config for e in made]
seen = [[c.zero_config.reduce_bucket_size, str(c.communication_data_type), c.timers_config.enabled] for c in held]
open(sys.argv[1], "w").write(json.dumps([code, seen]))
"""


@pytest.fixture(scope="module")
def config(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny run with one stage of one step, under ``zero2``, which a single process leaves out."""
    folder = tmp_path_factory.mktemp("options")
    run = tiny_run(
        tiny_dir, folder / "out", "stages.instruct=null", "stages.align.max_steps=1", "runtime.strategy=zero2"
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that ends with 2 says."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def setting(value: Any) -> str:
    return f"runtime.deepspeed={json.dumps(value)}"


def in_order(said: str, *parts: str) -> None:
    position = -1
    for part in parts:
        found = said.find(part, position + 1)
        assert found > position, (part, said)
        position = found


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_names_its_key_the_value_and_what_to_do(
    case: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value, key, expected = BAD[case]
    said = refusal(capsys, "preflight", "--config", config, setting(value))
    in_order(said, "error: override ", f": {PREFIX}{key}: ", *expected)
    assert "Traceback" not in said
    assert "pydantic" not in said


@pytest.mark.parametrize(
    "command", [["preflight"], ["plan", "--gpus", "2xA100-80"], ["doctor"], ["train"], ["preview"]]
)
def test_every_command_that_reads_the_configuration_refuses(
    command: list[str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, *command, "--config", config, "runtime.offload.optimizer=cpu", setting({"bogus": 1}))
    assert f"{PREFIX}bogus: unknown key" in said
    assert not (Path(config).parent / "out").exists()


def test_all_mistakes_are_said_at_once(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"optimizer": {}, "bogus": 1, "zero_optimization": {"stage": 3, "overlap_com": True}, "dump_state": 2}
    said = refusal(capsys, "preflight", "--config", config, setting(value))
    for key in ("optimizer", "bogus", "zero_optimization.stage", "zero_optimization.overlap_com", "dump_state"):
        assert said.count(f": {PREFIX}{key}: ") == 1, said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            None,
            ["runtime.deepspeed: ", "ds.json: cannot be read as JSON", "No such file", "Give a mapping or the path"],
        ),
        ("{", ["runtime.deepspeed: ", "ds.json: cannot be read as JSON"]),
        ("[" * 100_000, ["runtime.deepspeed: ", "ds.json: cannot be read as JSON"]),
        ("[1]", ["runtime.deepspeed: ", "ds.json: holds list, expected an object"]),
        (
            '{"zero_optimization": {"overlap_com": true}}',
            [f"{PREFIX}zero_optimization.overlap_com: ", "ds.json: unknown key"],
        ),
    ],
)
def test_a_file_is_read_with_the_configuration(
    text: str | None, expected: list[str], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    said = refusal(capsys, "preflight", "--config", config, f"runtime.deepspeed={path}")
    in_order(said, "error: override ", *expected)


def test_the_configuration_file_is_named_where_the_key_stands_in_it(config: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": config, "runtime": {"deepspeed": {"bogus": 1}}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"child\.yaml: runtime\.deepspeed\.bogus: unknown key"):
        load_config(child)


def test_good_settings_are_taken_as_mapping_and_as_file(config: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    for strategy in ("zero1", "zero2", "zero3"):
        for value in (json.dumps(GOOD), str(path)):
            run = load_config(config, [f"runtime.strategy={strategy}", f"runtime.deepspeed={value}"])
            assert run.runtime.deepspeed in (GOOD, str(path))


def test_what_depends_on_the_stage_is_checked_for_the_stage_of_the_run(config: str) -> None:
    words = [setting({"zero_optimization": {"compute_grad_norm": False}})]
    load_config(config, words)
    with pytest.raises(
        ConfigError, match=r"runtime\.deepspeed\.zero_optimization: compute_grad_norm=false is supported only"
    ):
        load_config(config, ["runtime.strategy=zero3", *words])


def test_names_and_kinds_are_checked_without_deepspeed_too(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.config", None)
    load_config(config, [setting({"zero_optimization": {"overlap_com": True}})])
    for value in ({"bogus": 1}, {"zero_optimization": 5}, {"amp": {}}, {"communication_data_type": "bf17"}):
        with pytest.raises(ConfigError, match=rf"runtime\.deepspeed\.{next(iter(value))}: "):
            load_config(config, [setting(value)])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["runtime.strategy=auto", "runtime.offload.optimizer=cpu"], "runtime.offload.optimizer"),
        (["runtime.strategy=ddp", "runtime.offload.parameters=cpu"], "runtime.offload.parameters"),
        (["runtime.strategy=none", "runtime.deepspeed={}"], "runtime.deepspeed"),
    ],
)
def test_what_needs_zero_says_so_in_one_line(
    overrides: list[str], key: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "preflight", "--config", config, *overrides)
    strategy = overrides[0].partition("=")[2]
    expected = (
        f'error: override "{overrides[1]}": {key}: needs ZeRO, and runtime.strategy is {strategy}. '
        "Set runtime.strategy to zero1, zero2 or zero3, or leave the key out\n"
    )
    assert said == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["runtime.offload.optimizer=nvme"],
            ": runtime.offload: parameters, and anything on nvme, need runtime.strategy zero3\n",
        ),
        (
            ["runtime.strategy=zero3", "runtime.offload.optimizer=nvme"],
            ": runtime.offload.nvme_path: missing. Name a folder on a fast local disk\n",
        ),
        (
            ["stages.align.optimizer.type=muon"],
            ": stages.align.optimizer: muon needs whole matrices, zero2 cuts them. Use adamw, or runtime.strategy ddp\n",
        ),
        (
            ["stages.align.tuning={connector: lora}"],
            ": stages.align.tuning.connector: mode lora is for vision and llm. Use full or frozen\n",
        ),
    ],
)
def test_checks_of_a_whole_section_name_a_key_and_show_no_dump(
    overrides: list[str], expected: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "preflight", "--config", config, *overrides)
    assert said.endswith(expected)
    assert "Value error" not in said
    assert "(got" not in said


def test_deepspeed_is_imported_only_for_a_run_that_sets_the_key(config: str) -> None:
    code = (
        "import sys; from vlit.config.load import load_config; load_config(sys.argv[1], sys.argv[2:]); "
        "print('deepspeed' in sys.modules)"
    )
    for words, expected in (([], "False"), ([setting(GOOD)], "True")):
        command = [sys.executable, "-c", code, config, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.split() == [expected]


def test_a_plan_as_json_stays_json(config: str) -> None:
    words = ["plan", "--config", config, "--gpus", "2xA100-80", "--json", setting(GOOD)]
    code = f"from vlit.cli import main; raise SystemExit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)


def test_settings_reach_the_engine_that_trains(config: str, tmp_path: Path) -> None:
    for number, (extra, bucket, dtype, timed) in enumerate(
        [([], 50_000_000, "torch.float32", True), ([setting(GOOD)], 12345, "torch.bfloat16", False)]
    ):
        report = tmp_path / f"{number}.json"
        words = ["--config", config, f"output_dir={tmp_path / str(number)}", "runtime.offload.optimizer=cpu", *extra]
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(report), *words], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(report.read_text(encoding="utf-8")) == [0, [[bucket, dtype, timed]]], done.stderr[-3000:]
