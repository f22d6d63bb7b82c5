"""Weight files and model folders with damage anywhere: a ModelError or CheckpointError, or a model whose weights are real."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from tests.fuzz.common import Property, mutated, peak_memory
from tests.tiny import build_encoder, build_llm
from vlit.errors import VlitError
from vlit.models.artifact import read_manifest
from vlit.models.encoders.hf import HfEncoderConfig
from vlit.models.interop.llava import detect
from vlit.models.interop.weights import WeightFiles
from vlit.models.llms.hf import HFLanguageModelConfig

TENSORS = {"mm_projector.0.weight": torch.ones(4, 3), "mm_projector.0.bias": torch.zeros(4)}
TOKENS = (
    b"F64", b"I8", b"BOGUS", b'"shape":[-1]', b'"shape":[4294967296,4294967296]', b'"data_offsets":[0,99999999999]', b"{}",
    b"[]", b"null",
    b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b'"__metadata__":{"format":3},', b"NaN", b"\xff\xfe",
)  # fmt: skip
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**40)
    | st.floats()
    | st.sampled_from(["", "x", "llama", "bfloat16", "../x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)


@cache
def original(name: str) -> bytes:
    if name == "safetensors":
        return save(TENSORS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "zip")
        return path.read_bytes()


def outcome(action: Any) -> tuple[Any, str]:
    """What ``action`` returns, or (None, the message of its VlitError)."""
    try:
        return action(), ""
    except VlitError as error:
        return None, str(error)


def check_file(case: tuple[str, bytes]) -> None:
    suffix, content = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(content)
        files, message = outcome(lambda: WeightFiles(path))
        if files is None:
            assert f"w{suffix}" in message
            return
        outcome(lambda: detect(path))
        for name in files.names():
            tensor, message = outcome(lambda name=name: files.get(name))
            assert isinstance(tensor, torch.Tensor) or f"w{suffix}" in message


def check_index(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "s.safetensors").write_bytes(original("safetensors"))
        index = Path(folder) / "model.safetensors.index.json"
        index.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        files, message = outcome(lambda: WeightFiles(folder))
        if files is None:
            assert "model.safetensors.index.json" in message
        else:
            assert set(files.names()) <= set(TENSORS)


def check_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content)
        found, message = outcome(lambda: read_manifest(Path(folder)))
        assert isinstance(found, dict) or "manifest.json" in message
        outcome(lambda: detect(folder))


@cache
def folder_of(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vlit-fuzz-"))
    return build_llm("llama", folder / "llm") if kind == "llm" else build_encoder("clip_vision", folder / "enc")


def check_folder(case: tuple[str, str, Any]) -> None:
    """One file of a model folder is damaged (bytes), or one key of it holds another value (key, value)."""
    kind, name, damage = case
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        shutil.copytree(folder_of(kind), folder)
        if isinstance(damage, tuple):
            held = json.loads((folder / name).read_bytes())
            keys = sorted(held)
            held[keys[damage[0] % len(keys)]] = damage[1]
            (folder / name).write_text(json.dumps(held), encoding="utf-8")
        else:
            (folder / name).write_bytes(damage)
        config: Any = HFLanguageModelConfig(path=str(folder)) if kind == "llm" else HfEncoderConfig(path=str(folder))
        about, message = outcome(config.width if kind == "llm" else config.spec)
        assert about is not None or str(folder) in message
        model, message = outcome(lambda: config.build(dtype=torch.float32))
        assert model is not None or "model." in message
        if model is not None:
            assert all(not parameter.is_meta for parameter in model.parameters())


def contents(kind: str, name: str) -> st.SearchStrategy[Any]:
    whole = st.builds(lambda: (folder_of(kind) / name).read_bytes())
    if name.endswith(".safetensors"):
        return mutated(whole.map(lambda content: content[:8000]), tokens=TOKENS) | mutated(whole)
    return mutated(whole, tokens=TOKENS) | st.tuples(st.integers(0, 40), anything)


weight_files = st.one_of(
    st.tuples(st.just(suffix), mutated(st.just(kind).map(original), tokens=TOKENS))
    for suffix, kind in ((".safetensors", "safetensors"), (".bin", "zip"), (".bin", "legacy"), (".pth", "zip"))
)
indexes = st.dictionaries(
    st.sampled_from(["weight_map", "metadata"]), st.dictionaries(st.text(max_size=3), anything) | anything
)
manifests = mutated(st.just(b'{"format": "vlit-model", "version": 1, "files": {}, "model": {}}'), tokens=TOKENS)
FOLDERS = (
    ("llm", "config.json"), ("llm", "model.safetensors"), ("llm", "generation_config.json"),
    ("vision", "config.json"), ("vision", "model.safetensors"), ("vision", "preprocessor_config.json"),
)  # fmt: skip
PROPERTIES = [
    Property("weights: damaged files", weight_files, check_file, 200),
    Property(
        "weights: any index",
        indexes | anything | mutated(st.just(b'{"weight_map": {"a": "s.safetensors"}}')),
        check_index,
        120,
    ),
    Property("weights: damaged manifest", manifests, check_manifest, 100),
    *(
        Property(
            f"weights: {kind} with a damaged {name}",
            contents(kind, name).map(lambda damage, kind=kind, name=name: (kind, name, damage)),
            check_folder,
            15,
        )
        for kind, name in FOLDERS
    ),
]


@pytest.mark.parametrize("fuzz", PROPERTIES, ids=lambda fuzz: fuzz.name)
def test_weights(fuzz: Property):
    before = peak_memory()
    assert fuzz.run() > fuzz.examples // 2
    assert peak_memory() - before < 1 << 30
