"""Program code that comes with a model runs only when it is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.model_folder_fixture import change_manifest, cli, load
from tests.tiny import build_encoder, build_llm
from vlit.errors import ModelError
from vlit.models.encoders._hf_model import vision_class
from vlit.registry import ENCODERS, LLMS

pytest_plugins = ["tests.model_folder_fixture"]

CODE = """
import os
os.makedirs({canary!r}, exist_ok=True)
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class CanaryConfig(LlamaConfig):
    model_type = {model_type!r}

class CanaryModel(LlamaForCausalLM):
    config_class = CanaryConfig

class CanaryTokenizer(PreTrainedTokenizerFast):
    pass

class CanaryProcessor(CLIPImageProcessor):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "canary.CanaryConfig", "AutoModelForCausalLM": "canary.CanaryModel", "AutoModel": "canary.CanaryModel",
    "AutoTokenizer": [None, "canary.CanaryTokenizer"], "AutoImageProcessor": "canary.CanaryProcessor",
}  # fmt: skip


def with_code(source: Path, folder: Path, *, model_type: str | None = None) -> tuple[Path, Path]:
    """A copy of a model folder that brings Python code, and the canary that this code makes."""
    canary = folder.parent / "canary"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    model_type = model_type or config["model_type"]
    (folder / "canary.py").write_text(CODE.format(canary=str(canary), model_type=model_type))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text()) | {"auto_map": AUTO_MAP}
            (folder / name).write_text(json.dumps(held | ({"model_type": model_type} if name == "config.json" else {})))
    return folder, canary


def test_code_that_comes_with_a_language_model_runs_only_when_asked_for(tiny_dir: Path, tmp_path: Path) -> None:
    source = build_llm("llama", tiny_dir / "llama")
    folder, canary = with_code(source, tmp_path / "evil", model_type="canary_llama")
    config = LLMS.get("hf")(path=str(folder))
    with pytest.raises(ModelError, match=r"set model\.llm\.trust_remote_code: true"):
        config.build(dtype=torch.float32)
    assert not canary.exists()
    built = LLMS.get("hf")(path=str(folder), trust_remote_code=True).build(dtype=torch.float32)
    assert type(built.hf).__name__ == "CanaryModel"
    assert canary.exists()


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_code_beside_a_known_model_is_left_alone(tiny_dir: Path, tmp_path: Path, part: str) -> None:
    if part == "llm":
        from vlit.data.load_tokenizer import tokenizer_for

        folder, canary = with_code(build_llm("llama", tiny_dir / "llama"), tmp_path / "evil")
        LLMS.get("hf")(path=str(folder)).build(dtype=torch.float32)
        tokenizer_for(str(folder))
    else:
        folder, canary = with_code(build_encoder("clip", tiny_dir / "clip"), tmp_path / "evil")
        ENCODERS.get("hf")(path=str(folder)).build(dtype=torch.float32)
    assert not canary.exists()


def test_a_manifest_cannot_grant_itself_the_right_to_run_code(model: Path, tiny_dir: Path, tmp_path: Path) -> None:
    source = build_llm("llama", tiny_dir / "llama")
    folder, canary = with_code(source, tmp_path / "evil", model_type="canary_llama2")
    held = json.loads((model / "manifest.json").read_text())["model"]
    llm = held["llm"] | {"path": str(folder), "trust_remote_code": True}
    change_manifest(model, model={"llm": llm}, changed=["connector"], unchanged={})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(model)
    done = cli("chat", "--checkpoint", str(model), "--prompt", "?", check=False)
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert not canary.exists()
    load(model, trust_remote_code=True)
    assert canary.exists()


def test_an_architecture_name_calls_nothing_but_a_model_class() -> None:
    from transformers import PretrainedConfig

    with pytest.raises(ModelError, match='architecture "pipeline"'):
        vision_class(PretrainedConfig(architectures=["pipeline"]), path="x", trust_remote_code=False)
