"""What can be wrong before the first step: configuration, packages, home folder, network, another run's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from tests.tiny_run import tiny_run, write_dataset
from vlit.config.load import load_config
from vlit.data.vocabulary import fingerprint_of
from vlit.errors import CheckpointError, ConfigError, VlitError
from vlit.train.run import run_training

ROOT = Path(__file__).resolve().parent.parent.parent

# Configuration

WRONG = """
    name: broken
    modle: {}
    model:
      encoder: {type: hf, path: nowhere, feature_layr: -2}
      connector: {type: mpl}
      llm: {type: hf, path: nowhere, revision: 3}
    data: {max_tokens: 0, on_bad_sample: skip, template: v9}
    stages:
      align:
        data: [{path: a.json, weight: 0, imgaes: x}]
        lr: -1
        global_batch: many
        tuning: {conector: full, llm: lora2}
      tune:
        data: []
        lr: .inf
    runtime: {device: tpu}
    trackers: [wandbb]
"""
MISTAKES = {
    "modle": 'Did you mean "model"?',
    "model.encoder.feature_layr": 'Did you mean "feature_layer"?',
    "model.connector.type": 'Did you mean "mlp"?',
    "model.llm.revision": "should be a valid string (got 3)",
    "data.max_tokens": "greater than or equal to 1 (got 0)",
    "data.on_bad_sample": "'error' or 'quarantine' (got 'skip')",
    "data.template.type": 'unknown template "v9"',
    "stages.align.data.0.weight": "greater than 0 (got 0)",
    "stages.align.data.0.imgaes": 'Did you mean "images"?',
    "stages.align.lr": "greater than 0 (got -1)",
    "stages.align.global_batch": "valid integer",
    "stages.align.tuning.conector": 'Did you mean "connector"?',
    "stages.align.tuning.llm.mode": "'frozen', 'full' or 'lora' (got 'lora2')",
    "stages.tune.data": "at least 1 item",
    "stages.tune.lr": "finite number (got inf)",
    "stages.tune.global_batch": "this key is required and missing",
    "runtime.device": "'auto', 'cpu' or 'cuda' (got 'tpu')",
    "trackers.0.type": 'Did you mean "wandb"?',
}


def test_every_mistake_of_a_configuration_is_on_a_line_of_its_own_before_anything_is_loaded(tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(dedent(WRONG))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["stages.align.lr.peak=1", "nonsense", "runtime.precison=bf16"])
    lines = str(caught.value).split("\n")
    assert 'override "stages.align.lr.peak=1": stages.align.lr is -1, it has no key "peak".' in lines
    assert any(line.startswith('override "nonsense": expected key.path=value') for line in lines)
    assert any("runtime.precison: unknown key" in line and 'Did you mean "precision"?' in line for line in lines)
    for key, words in MISTAKES.items():
        (line,) = [line for line in lines if line.startswith(f"{path}: {key}: ")]
        assert words in line, key
    assert len(lines) == len(MISTAKES) + 3, "every line is one of the mistakes, none follows from another"


def test_images_longer_than_the_sample_may_be_are_refused_before_weights_are_loaded(tiny_dir: Path, tmp_path: Path):
    with pytest.raises(VlitError, match=r"no supervised token is left within max_tokens 10 .* 32 of them for 2 images"):
        run_training(tiny_run(tiny_dir, tmp_path / "out", "data.max_tokens=10"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# Packages

HIDE = """
import os, sys

class Hiding:
    names = set(os.environ["HIDDEN"].split(","))
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
OPTIONAL = "deepspeed,open_clip,timm,wandb,tensorboard,bitsandbytes,sklearn,matplotlib,flash_attn"


def without_packages(
    code: str, *words: str, hidden: str = OPTIONAL, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python where some packages cannot be found, as if they were not installed."""
    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HIDDEN": hidden,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", HIDE + code, *words], cwd=ROOT, capture_output=True, text=True, env=variables | environment
    )  # fmt: skip


def saved(tiny_dir: Path, output: Path, *overrides: str) -> Path:
    """The configuration file of a two-stage run on tiny parts."""
    run = tiny_run(tiny_dir, output, "stages.align.max_steps=2", "stages.instruct.max_steps=2", *overrides)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    return path


COMMAND = "import sys; from vlit.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_run_needs_none_of_the_packages_it_does_not_use(tiny_dir: Path, tmp_path: Path):
    config = saved(tiny_dir, tmp_path / "out")
    done = without_packages(COMMAND, "train", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "instruct" / "model" / "manifest.json").is_file()


USED = {
    "open_clip": ["model.encoder={type: open_clip, model: ViT-B-32, pretrained: openai}"],
    "timm": ["model.encoder={type: timm, model: vit_tiny_patch16_224}"],
    "wandb": ["trackers=[wandb]"],
    "tensorboard": ["trackers=[tensorboard]"],
    "deepspeed": ["runtime.strategy=zero2", "runtime.offload.optimizer=cpu"],
}
EACH = """
import contextlib, io, json
from vlit.cli import main
results = {}
for package, overrides in json.loads(sys.argv[2]).items():
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
        code = main(["train", "--config", sys.argv[1], f"output_dir={sys.argv[1]}.{package}", *overrides])
    results[package] = [code, noise.getvalue()]
print(json.dumps(results))
"""


def test_a_package_that_is_used_and_missing_is_named_on_one_line(tiny_dir: Path, tmp_path: Path):
    config = saved(tiny_dir, tmp_path / "out")
    done = without_packages(EACH, str(config), json.dumps(USED))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == USED.keys()
    for package, (code, text) in results.items():
        last = text.strip().splitlines()[-1]
        assert (code, last[:7]) == (2, "error: "), f"{package}: {text[-2000:]}"
        assert package in last.lower().replace("-", "_"), last
        assert "install" in last, last


# Home, network, clock


def test_a_run_on_local_files_needs_no_home_folder_and_no_network(tiny_dir: Path, tmp_path: Path):
    """Every connection fails at once; HOME cannot be written even by root."""
    config = saved(tiny_dir, tmp_path / "out", "data.cache_dir=null")
    no_network = """
import socket
def refuse(*args, **kwargs):
    raise OSError(101, "Network is unreachable")
socket.getaddrinfo = socket.create_connection = refuse
"""
    (tmp_path / "tmp").mkdir()
    homeless = {
        "HOME": "/proc/1/nowhere",
        "VLIT_CACHE": "",
        "XDG_CACHE_HOME": "",
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_HUB_OFFLINE": "",
    }
    done = without_packages(no_network + COMMAND, "train", "--config", str(config), **homeless)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be written" in done.stderr
    assert list((tmp_path / "tmp").rglob("*.arrow")), "the index went to the temporary folder"


def test_a_hub_name_without_a_network_is_one_line_with_the_remedy(tiny_dir: Path, tmp_path: Path):
    config = saved(tiny_dir, tmp_path / "out", "model.llm.path=nobody/nothing")
    done = without_packages(COMMAND, "train", "--config", str(config))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: model.llm.path "nobody/nothing": not found as a local folder and not available')
    assert "download it first" in last


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(tiny_dir: Path, tmp_path: Path):
    with pytest.raises(VlitError, match=r"data\.cache_dir: the cache folder /proc/1/nowhere/index cannot be written"):
        run_training(tiny_run(tiny_dir, tmp_path / "out", "data.cache_dir=/proc/1/nowhere"))


def test_files_with_times_in_the_future_or_the_past_change_nothing(tiny_dir: Path, tmp_path: Path):
    """The clock jumped between two runs: an index is found by content, an edited file is noticed whatever its time says."""
    from vlit.config.schema import DataConfig, DataSource
    from vlit.data.source import open_source

    path = write_dataset(tmp_path / "d")
    data = DataConfig(cache_dir=str(tmp_path / "c"))
    for second in (0, 1_000_000_000, 4_000_000_000):
        os.utime(path, (second, second))
        assert len(open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)) == 24
    (index,) = (tmp_path / "c").rglob("*.arrow")
    rows = json.loads(path.read_text())
    size = path.stat().st_size
    rows[0]["conversations"][1]["value"] = rows[0]["conversations"][1]["value"][::-1]
    path.write_text(json.dumps(rows))
    os.utime(path, (4_000_000_000, 4_000_000_000))
    assert path.stat().st_size == size
    changed = open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)
    assert changed.sample(0).turns[1].text == rows[0]["conversations"][1]["value"]
    assert index.is_file()


# Another run's folder


def test_a_finished_stage_of_another_dataset_preprocessing_or_template_is_refused_with_the_difference(
    tiny_dir: Path, tmp_path: Path
):
    short = ("stages.align.max_steps=1", "stages.instruct=null")
    out = tmp_path / "out"
    run_training(tiny_run(tiny_dir, out, *short))
    rows = json.loads((tiny_dir / "dataset" / "data.json").read_text())
    (tmp_path / "edited.json").write_text(json.dumps(rows[::-1]))
    edited = f"stages.align.data=[{{path: {tmp_path}/edited.json, name: colours, images: {tiny_dir}/dataset}}]"
    for override, named in (
        (edited, r"sources\.colours"),
        ("data.image_policy=crop", r"data\.image_policy: .*pad.* -> .*crop"),
        ("data.template=v0", r"data\.template"),
        ("data.max_tokens=512", r"data\.max_tokens: 1024 -> 512"),
        ("seed=7", r"seed: 0 -> 7"),
    ):
        with pytest.raises(CheckpointError, match=rf"(?s){named}.*allow_config_drift"):
            run_training(tiny_run(tiny_dir, out, *short, override))
    run_training(tiny_run(tiny_dir, out, *short))


def test_another_mixture_of_the_same_datasets_is_refused_with_the_difference(tiny_dir: Path, tmp_path: Path):
    """Shares, and weights that change places, are as much a part of what was trained as the files are."""
    rows = json.loads((write_dataset(tiny_dir / "dataset")).read_text())
    (tmp_path / "b.json").write_text(json.dumps(rows[::2]))

    def mixed(first: str, second: str) -> tuple[str, ...]:
        folder = tiny_dir / "dataset"
        sources = f"[{{path: {folder}/data.json, {first}}}, {{path: {tmp_path}/b.json, images: {folder}, {second}}}]"
        return "stages.align.max_steps=1", "stages.instruct=null", f"stages.align.data={sources}"

    for number, (before, after, named) in enumerate(
        (
            (("share: 0.5", "share: 0.5"), ("share: 0.9", "share: 0.1"), r"'share': 0\.5.* -> .*'share': 0\.9"),
            (
                ("weight: 0.25", "weight: 1"),
                ("weight: 1", "weight: 0.25"),
                r"'weight': 0\.25.* -> .*'weight': 1\.0.*0\.25",
            ),
        )
    ):
        run_training(tiny_run(tiny_dir, tmp_path / str(number), *mixed(*before)))
        with pytest.raises(CheckpointError, match=rf"(?s){named}.*allow_config_drift"):
            run_training(tiny_run(tiny_dir, tmp_path / str(number), *mixed(*after)))
        run_training(tiny_run(tiny_dir, tmp_path / str(number), *mixed(*before)))


def test_a_tokenizer_that_would_tokenize_differently_has_another_fingerprint(tmp_path: Path):
    from transformers import AutoTokenizer

    from tests.tiny import build_tokenizer

    first, again = (AutoTokenizer.from_pretrained(build_tokenizer(tmp_path / name)) for name in "ab")
    assert fingerprint_of(first) == fingerprint_of(again)
    again.add_tokens(["sevenfold"])
    assert fingerprint_of(first) != fingerprint_of(again)
