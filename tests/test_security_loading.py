"""Loading somebody else's model: no code, no path out of its folder, no network. Canaries show that an attack would work."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.model_folder_fixture import Bomb, change_manifest, cli, load
from tests.tiny import build_encoder, build_llm, build_open_clip, build_timm
from tests.tiny_run import tiny_run, write_dataset
from vlit.errors import CheckpointError, EvaluationError, ModelError
from vlit.models.interop.weights import WeightFiles
from vlit.registry import BENCHMARKS, ENCODERS, LLMS

pytest_plugins = ["tests.model_folder_fixture"]

ROOT = Path(__file__).resolve().parent.parent


# --- model folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "llm/../../secret", "{absolute}", "llm\\..\\..\\secret", ""])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(model: Path, name: str) -> None:
    """The hash is right, so only the name gives it away."""
    secret = model.parent / "secret"
    secret.write_bytes(b"canary")
    name = name.format(absolute=secret)
    change_manifest(model, files={name: hashlib.sha256(b"canary").hexdigest()})
    with pytest.raises(CheckpointError, match="not the name of a file in its own folder"):
        load(model)


def test_a_part_name_of_a_manifest_cannot_lead_outside(model: Path) -> None:
    save_file({"x": torch.zeros(1)}, model.parent / "x_lora.safetensors")
    change_manifest(model, lora={"../x": {"mode": "lora", "rank": 2}})
    with pytest.raises(CheckpointError, match=r"does not list \.\./x_lora\.safetensors"):
        load(model)


@pytest.mark.parametrize("name", ["llm", "tokenizer"])
def test_a_folder_of_the_model_that_is_a_link_is_refused(model: Path, name: str) -> None:
    elsewhere = model.parent / "elsewhere"
    (model / name).rename(elsewhere)
    (model / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"a link to .*elsewhere"):
        load(model)


def test_linked_files_are_read_when_their_content_is_that_of_the_manifest(model: Path) -> None:
    """The layout of the Hugging Face cache: every file is a link to a blob."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    files = [path for path in model.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert len(files) > 5
    load(model)
    (blobs / str(files.index(model / "connector.safetensors"))).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="damaged"):
        load(model)


@pytest.mark.parametrize("name", ["llm/generation_config_2.json", "tokenizer/added_tokens.json", "llm/deep/x.json"])
def test_a_file_that_the_manifest_does_not_list_is_refused_where_libraries_would_read_it(
    model: Path, name: str
) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"not listed in manifest\.json"):
        load(model)


def test_a_model_folder_holds_no_pickle(model: Path) -> None:
    held = pickle.dumps(Bomb(model.parent / "canary"))
    (model / "llm" / "pytorch_model.bin").write_bytes(held)
    change_manifest(model, files={"llm/pytorch_model.bin": hashlib.sha256(held).hexdigest()})
    with pytest.raises(CheckpointError, match="a pickle"):
        load(model)
    assert not (model.parent / "canary").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"format": "vlit-model", "version": 1, "files": []}'])
def test_a_manifest_that_is_none_is_an_error_of_one_line(model: Path, text: str) -> None:
    (model / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(model)


def test_the_stage_names_of_a_run_folder_cannot_lead_outside(trained: Path, tmp_path: Path) -> None:
    from vlit.serve.commands import open_checkpoint

    for stage in (f"../{trained.parent.name}/out/instruct", str(trained / "instruct")):
        shutil.copytree(trained, tmp_path / "run", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model"))
        shutil.copytree(trained.parent, tmp_path / trained.parent.name, dirs_exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"stages": {stage: {}}}))
        with pytest.raises(CheckpointError, match="outside of the run"):
            open_checkpoint(tmp_path / "run")


# --- weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["../secret/model.safetensors", "{absolute}"])
def test_an_index_of_shards_cannot_name_a_file_outside_its_folder(tiny_dir: Path, tmp_path: Path, outside: str) -> None:
    """The file outside is a good one: without the check the model would load."""
    folder = Path(shutil.copytree(build_llm("llama", tiny_dir / "llama"), tmp_path / "llm"))
    (tmp_path / "secret").mkdir()
    weights = (folder / "model.safetensors").rename(tmp_path / "secret" / "model.safetensors")
    names = dict.fromkeys(load_file(weights), outside.format(absolute=weights))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = LLMS.get("hf")(path=str(folder))
    with pytest.raises(ModelError, match="not the name of a file in its own folder"):
        config.build(dtype=torch.float32)
    with pytest.raises(ModelError, match="not the name of a file in its own folder"):
        WeightFiles(folder)
    weights.rename(folder / "shard.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors")}))
    config.build(dtype=torch.float32)
    assert len(WeightFiles(folder).names()) == len(names)


def test_a_pickled_base_model_is_read_as_plain_tensors_and_said(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(build_llm("llama", tiny_dir / "llama"), tmp_path / "llm"))
    config = LLMS.get("hf")(path=str(folder))
    wanted = config.build(dtype=torch.float32).hf.state_dict()
    assert "pickle" not in capsys.readouterr().err
    tensors = load_file(folder / "model.safetensors")
    torch.save({"bomb": Bomb(tmp_path / "canary")}, folder / "pytorch_model.bin")
    config.build(dtype=torch.float32)  # safetensors are there: the pickle is not opened
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds more than tensors"):
        config.build(dtype=torch.float32)
    assert not (tmp_path / "canary").exists()
    torch.save(tensors, folder / "pytorch_model.bin")
    found = config.build(dtype=torch.float32).hf.state_dict()
    assert "read as plain tensors" in capsys.readouterr().err
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(wanted[name], found[name])


@pytest.mark.parametrize("kind", ["timm", "open_clip", "hf"])
def test_no_encoder_runs_what_a_pickle_says(tiny_dir: Path, tmp_path: Path, kind: str) -> None:
    source = {"timm": build_timm, "open_clip": build_open_clip, "hf": lambda f: build_encoder("clip", f)}[kind](
        tiny_dir / (kind if kind != "hf" else "clip")
    )
    folder = Path(shutil.copytree(source, tmp_path / "encoder"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    name = {"timm": "pytorch_model.bin", "open_clip": "open_clip_pytorch_model.bin", "hf": "pytorch_model.bin"}[kind]
    torch.save({"x": torch.zeros(1), "bomb": Bomb(tmp_path / "canary")}, folder / name)
    key = {"timm": "model", "open_clip": "model", "hf": "path"}[kind]
    config = ENCODERS.get(kind)(**{key: str(folder) if kind == "hf" else f"local-dir:{folder}"})
    with pytest.raises(ModelError):
        config.build(dtype=torch.float32)
    assert not (tmp_path / "canary").exists()
    torch.load(folder / name, weights_only=False)  # the bomb is a real one
    assert (tmp_path / "canary").exists()


def test_a_checkpoint_file_for_timm_is_read_as_plain_tensors(tiny_dir: Path, tmp_path: Path) -> None:
    folder = build_timm(tiny_dir / "timm")
    torch.save({"x": torch.zeros(1), "bomb": Bomb(tmp_path / "canary")}, tmp_path / "evil.pth")
    config = ENCODERS.get("timm")(model=f"local-dir:{folder}", checkpoint=str(tmp_path / "evil.pth"))
    with pytest.raises(ModelError, match=r"evil\.pth"):
        config.build(dtype=torch.float32)
    assert not (tmp_path / "canary").exists()


def test_a_pinned_revision_also_pins_the_tokenizer(tiny_dir: Path) -> None:
    from vlit.config.schema import ModelConfig
    from vlit.models.assemble import model_spec

    parts = {"encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))}, "connector": "linear"}
    llm = {"type": "hf", "path": str(build_llm("llama", tiny_dir / "llama")), "revision": "abc123"}
    parts["connector"] = {"type": "linear"}
    assert model_spec(ModelConfig.model_validate(parts | {"llm": llm})).tokenizer_revision == "abc123"


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.png", "{absolute}"])
def test_a_question_file_cannot_name_a_picture_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"canary")
    (tmp_path / "images").mkdir()
    row = {"question_id": "1", "question": "?", "answer": "x", "image": name.format(absolute=tmp_path / "secret.png")}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    config = BENCHMARKS.get("qa")(path=str(tmp_path / "q.jsonl"), images=str(tmp_path / "images"))
    with pytest.raises(EvaluationError, match=r"q\.jsonl#1: .*image folder"):
        config.build().load()


def test_a_link_out_of_the_picture_folder_is_followed_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    row = {"question_id": "1", "question": "?", "answer": "x", "image": "coco/a.png"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    settings = {"path": str(tmp_path / "q.jsonl"), "images": str(tmp_path / "images")}
    with pytest.raises(EvaluationError, match="follow_links=true"):
        BENCHMARKS.get("qa")(**settings).build().load()
    assert BENCHMARKS.get("qa")(**settings, follow_links=True).build().load()[0].images[0].is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="compiled kernels are for Linux")
def test_a_compiled_kernel_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    from vlit.kernels.native import _refuse_foreign

    library = tmp_path / "kernels.so"
    library.write_bytes(b"")
    library.chmod(0o755)
    _refuse_foreign(library)
    for path in (library, tmp_path):
        mode = path.stat().st_mode
        path.chmod(0o777)
        with pytest.raises(PermissionError, match="VLIT_CACHE"):
            _refuse_foreign(library)
        path.chmod(mode)


# --- network ----------------------------------------------------------------------------------------------------------

WALL = """
import os, socket

def _wall(name, original):
    def guarded(*args, **kwargs):
        host = next((a[0] if isinstance(a, tuple) else a for a in args if isinstance(a, (tuple, str, bytes))), None)
        host = host.decode() if isinstance(host, bytes) else host
        if host in (None, "", "localhost", "::1", socket.gethostname()) or host.startswith(("127.", "/")):
            return original(*args, **kwargs)
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(name, host, file=log)
        raise OSError("the network is walled off")
    return guarded

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, _wall(name, getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname"):
    setattr(socket, name, _wall(name, getattr(socket, name)))
"""


@pytest.mark.slow
def test_nothing_touches_the_network_while_every_path_is_local(tiny_dir: Path, tmp_path: Path) -> None:
    """Training, evaluation, chat, export and report with all offline switches off. A hub name is the control."""
    (tmp_path / "sitecustomize.py").write_text(WALL)
    log = tmp_path / "network.log"
    walled = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "NETWORK_LOG": str(log), "HF_HOME": str(tmp_path / "hub"),
        "WANDB_API_KEY": "",
    }  # fmt: skip
    run = tiny_run(tiny_dir, tmp_path / "out", "stages.align.max_steps=1", "stages.instruct.max_steps=1")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    write_dataset(tiny_dir / "dataset")
    row = {"question_id": "1", "question": "Which?", "answer": "red", "image": "000_0.png"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    checkpoint = ("--checkpoint", str(tmp_path / "out"))
    cli("train", "--config", str(config), **walled)
    questions = (f"path={tmp_path}/q.jsonl", f"images={tiny_dir}/dataset")
    cli("eval", *checkpoint, "--benchmark", "qa", "--max-new-tokens", "2", *questions, **walled)
    picture = str(tiny_dir / "dataset" / "000_0.png")
    assert cli("chat", *checkpoint, "--image", picture, "--prompt", "?", "--max-new-tokens", "2", **walled).stdout
    cli("export", *checkpoint, "--out", str(tmp_path / "hf"), **walled)
    cli("report", str(tmp_path / "out"), **walled)
    assert (tmp_path / "hf" / "config.json").is_file()
    assert not log.exists(), log.read_text()
    control = cli(
        "train", "--config", str(config), "model.llm.path=nobody/nothing", "output_dir=/none", check=False, **walled
    )
    assert control.returncode == 2
    assert "huggingface.co" in log.read_text()
