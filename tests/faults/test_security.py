"""Data that would reach for other files, run code or fetch something: refused, and the file in question is never opened."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.data_fixtures import conversation, make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from tests.tiny import build_llm, build_tokenizer
from vlit.answer import ask
from vlit.config.load import load_config
from vlit.config.schema import DataConfig
from vlit.data.formats._base import BadRow
from vlit.data.formats.llava import LlavaFormat
from vlit.data.images import resolve_image
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import ConfigError, DataError, VlitError
from vlit.models.interop.llava import detect
from vlit.models.interop.weights import WeightFiles
from vlit.models.llms.hf import HFLanguageModelConfig
from vlit.types import Sample, Turn

ROOT = Path(__file__).resolve().parent.parent.parent

# Image references

UNSAFE = [
    "../secret.png", "img/../../secret.png", "..\\secret.png", "img\\..\\..\\secret.png", "./../secret.png",
    "{outside}/secret.png", "file://{outside}/secret.png", "file:{outside}/secret.png", "FILE:///etc/passwd",
    "http://127.0.0.1/a.png", "https://h/a.png",
    "http://169.254.169.254/latest/meta-data", "http://a\\@b/c.png", "ftp://h/a.png", "s3://bucket/a.png", "gs://b/a.png",
    "data:image/png;base64,iVBORw0KGgo=", "DATA:image/png;base64,AA", "C:\\secret.png", "c:/secret.png",
    "\\\\server\\share\\a.png", "secret.png\0.png", "\0", "", " ", "a" * 300, "a/" * 1500,
]  # fmt: skip


@pytest.mark.parametrize("reference", UNSAFE, ids=range(len(UNSAFE)))
def test_a_reference_out_of_the_image_folder_or_to_a_server_is_a_bad_record_or_a_refusal(
    tmp_path: Path, reference: str
):
    reference = reference.format(outside=tmp_path) if "{" in reference else reference
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError) as caught:
        resolve_image(reference, tmp_path / "root")
    assert "image" in str(caught.value)
    raw = json.dumps({"id": "x", "image": reference, "conversations": conversation("<image>", "a")}).encode()
    row = LlavaFormat().parse(0, raw)
    # an absolute path may lie inside the image folder, so it is judged where the folder is known
    assert isinstance(row, BadRow) or reference == f"{tmp_path}/secret.png"


def test_names_that_only_look_unsafe_are_ordinary_files(tmp_path: Path):
    for name in (
        "a..b.png",
        "...png",
        "COCO:train.png",
        "sub dir/é.png",
        "~/a.png",
        "$HOME.png",
        "%2e%2e/a.png",
        "-rf",
    ):
        assert resolve_image(name, tmp_path) == tmp_path / name


OPENING = """
import json, os, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "socket.connect") else None)
from tests.data_fixtures import make_spec
from vlit.config.schema import DataConfig, DataSource
from vlit.data.load import StepLoader
from vlit.data.mixture import Mixture
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
folder, tokenizer = Path(sys.argv[1]), sys.argv[2]
data = DataConfig(template="v1", cache_dir=str(folder / "c"), on_bad_sample="quarantine", quarantine_budget=1.0)
error, refused, trained = "", 0, []
try:
    source = open_source(DataSource(path=str(folder / "root" / "d.json")), data=data, seed=0, progress=False)
    loader = StepLoader(Mixture([source], seed=0), SampleTokenizer(make_spec(tokenizer), data), data,
                        global_batch=len(source), micro_batch_tokens=4000, total_steps=1, num_workers=0)
    step = loader.step(0)
    refused = source.num_quarantined + len(step.quarantined)
    trained = [name for micro in step.micro_batches for name in micro.sample_ids]
except DataError as problem:
    error = str(problem)
secret = [name for name in opened if "secret.png" in name or name.endswith("passwd")]
fine = [name for name in opened if name.endswith("fine.png")]
print(json.dumps({"error": error, "refused": refused, "trained": trained, "secret": secret, "fine": fine}))
"""


def opened_by_a_step_over(tmp_path: Path, references: list[str], tokenizer: str) -> dict[str, Any]:
    """Load every record of a dataset with these image references and three sound ones; what was opened meanwhile."""
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (9, 9)).save(root / "fine.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    records = [
        {"id": f"bad{n}", "image": r, "conversations": conversation("<image>", "a")} for n, r in enumerate(references)
    ]
    good = [{"id": f"good{n}", "image": "fine.png", "conversations": conversation("<image>", "a")} for n in range(3)]
    (root / "d.json").write_text(json.dumps([*good[:1], *records, *good[1:]]))
    command = [sys.executable, "-c", OPENING, str(tmp_path), tokenizer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_unsafe_reference_opens_a_file_or_a_connection_and_the_other_records_are_trained(
    tmp_path: Path, tokenizer_dir: Callable[[str], str]
):
    references = [reference for reference in UNSAFE if not reference.startswith("{outside}")]
    found = opened_by_a_step_over(
        tmp_path, [r.replace("{outside}", str(tmp_path)) for r in references], tokenizer_dir("llama3")
    )
    assert found["error"] == ""
    assert sorted(found["trained"]) == ["good0", "good1", "good2"]
    assert found["refused"] == len(references)
    assert found["secret"] == []
    assert found["fine"], "the hook did see files being opened"


@pytest.mark.parametrize("reference", ["link.png", "out/secret.png", "{outside}/secret.png"])
def test_a_link_or_an_absolute_path_out_of_the_folder_is_not_opened(
    tmp_path: Path, tokenizer_dir: Callable[[str], str], reference: str
):
    reference = reference.replace("{outside}", str(tmp_path))
    found = opened_by_a_step_over(tmp_path, [reference], tokenizer_dir("llama3"))
    assert found["secret"] == []
    assert "image folder" in found["error"] or (found["refused"], len(found["trained"])) == (1, 3)


# Code in data


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def malicious_files(folder: Path, canary: Path) -> list[Path]:
    """Weight files of every kind that is read, whose pickle runs a command."""
    payload = {"mm_projector.0.weight": Canary(canary), "mm_projector.0.bias": torch.ones(2)}
    files = [folder / name for name in ("mm_projector.bin", "old.bin", "raw.bin", "adapter_model.bin", "x.pth", "x.pt")]
    for file in files:
        if file.name == "raw.bin":
            file.write_bytes(pickle.dumps(payload))
        else:
            torch.save(payload, file, _use_new_zipfile_serialization=file.name != "old.bin")
    return files


def test_a_command_in_a_weights_file_is_never_run(tmp_path: Path):
    canary = tmp_path / "canary"
    files = malicious_files(tmp_path, canary)
    for file in files:
        with pytest.raises(VlitError, match="not a file of plain tensors") as caught:
            detect(file)
        assert file.name in str(caught.value)
        with pytest.raises(VlitError):
            WeightFiles(file)
        assert not canary.exists(), file.name
    torch.load(files[0], weights_only=False)
    assert canary.exists(), "the pickle does run its command where pickles are trusted"


def test_a_command_in_a_language_models_weights_is_never_run(tiny_dir: Path, tmp_path: Path):
    folder, canary = tmp_path / "llm", tmp_path / "canary"
    shutil.copytree(build_llm("llama", tiny_dir / "llama"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Canary(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(VlitError, match=r"model\.llm\.path"):
        HFLanguageModelConfig(path=str(folder)).build(dtype=torch.float32)
    assert not canary.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch {canary}']", "!!python/object/new:os.system ['touch {canary}']"]
)
def test_a_command_in_a_configuration_is_never_run(tmp_path: Path, tag: str):
    canary = tmp_path / "canary"
    text = tag.format(canary=canary)
    child, parent = tmp_path / "c.yaml", tmp_path / "p.yaml"
    parent.write_text(f"name: {text}\n")
    child.write_text("extends: p.yaml\n")
    for load in (lambda: load_config(parent), lambda: load_config(child)):
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            load()
    child.write_text("name: x\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config(child, [f"name={text}"])
    assert not canary.exists()
    if "apply" in tag:
        yaml.load(text, yaml.UnsafeLoader)
        assert canary.exists(), "the tag does run its command where YAML is trusted"


def test_a_chat_template_that_fails_or_reaches_for_python_is_a_configuration_error(tmp_path: Path):
    sample = Sample("x", "s", (Turn("user", "q"), Turn("assistant", "a")))
    templates = {
        "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "zero": "{{ 1 // 0 }}",
        "unknown": "{{ nothing.at.all }}",
        "syntax": "{% if %}",
        "raises": "{{ raise_exception('no') }}",
    }
    for name, template in templates.items():
        folder = build_tokenizer(tmp_path / name)
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = SampleTokenizer(make_spec(str(folder)), DataConfig(template="tokenizer"))
        with pytest.raises(VlitError, match=r"data\.template: the chat template of .*" + name):
            tokenizer.tokenize(sample)


# No server, no fetching


def test_nothing_in_vlit_serves_or_fetches_over_a_network():
    """Sockets are opened only among the processes of a run, and by what was asked for and has tests of its own."""
    network = {
        "http",
        "urllib",
        "requests",
        "httpx",
        "aiohttp",
        "socketserver",
        "gradio",
        "fastapi",
        "flask",
        "uvicorn",
        "ftplib",
    }
    allowed = {
        "vlit/train/trackers/wandb.py",  # splits the address of the server it was told to log to
        "vlit/synth/teachers/openai.py",  # the endpoint that was configured: test_synth_teacher_http.py
        "vlit/serve/review/server.py",  # this machine only, with a token: test_synth_review.py
    }
    files = sorted((ROOT / "vlit").rglob("*.py"))
    assert len(files) > 100
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if hit := {name.split(".")[0] for name in names} & network:
                found[str(path.relative_to(ROOT))] = hit
    assert set(found) <= allowed, found


def test_placeholders_in_a_prompt_must_match_the_pictures_that_were_given():
    with pytest.raises(DataError, match=r"the question has 2 <image> placeholders, but 1 images were given"):
        ask("<image> or <image>?", ["a.png"])
    assert ask("What?", ["a.png"]).turns[0].text == "<image>\nWhat?"
