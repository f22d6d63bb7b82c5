"""Models on this machine as teachers: what was cut off at its token limit is not taken for finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlit.data.tokenize import SampleTokenizer
from vlit.synth.engine.parse import Rejected, text_of
from vlit.synth.engine.teacher import Ask, Message
from vlit.synth.teachers.local import LocalConfig, LocalTeacher

pytest_plugins = ["tests.model_folder_fixture"]
BASE = Path(__file__).resolve().parent.parent / "vlit/synth/digits/bases/llama"
TOKENS = json.loads((BASE / "config.json").read_text())["vocab_size"]


def language_model(folder: Path, *, ends: Any) -> LocalTeacher:
    """A transformers folder whose answers end with one of the token ids ``ends``."""
    shutil.copytree(BASE, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": ends}))
    return LocalConfig(model=str(folder), device="cpu").build()


def asked(max_tokens: int) -> Ask:
    return Ask("detail", (Message("user", "There is a red 3."),), max_tokens)


@pytest.mark.parametrize("kind", ["transformers", "vlit"])
def test_an_answer_that_never_ends_is_cut_and_one_that_ends_at_its_limit_is_not(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = {}
    for name, ends in (("never", []), ("at once", list(range(TOKENS)))):
        if kind == "transformers":
            teacher = language_model(tmp_path / name, ends=ends or None)
        else:
            folder = request.getfixturevalue("trained") / "instruct" / "model"
            teacher = LocalConfig(model=str(folder), device="cpu").build()
            monkeypatch.setattr(SampleTokenizer, "stop_sequences", lambda self, ends=ends: [[end] for end in ends])
        for limit in (1, 5):
            cut[name, limit] = teacher.read(teacher.send(asked(limit))).cut
    assert cut == {("never", 1): True, ("never", 5): True, ("at once", 1): False, ("at once", 5): False}


def test_a_cut_answer_makes_no_record_and_the_limit_is_the_recipes_unless_a_smaller_one_is_set(tmp_path: Path) -> None:
    teacher = language_model(tmp_path / "llama", ends=None)
    with pytest.raises(Rejected, match="cut: the answer ended at its token limit"):
        text_of(teacher.read(teacher.send(asked(3))))
    lengths = []
    for bound, limit in ((None, 600), (4, 600), (600, 4)):
        made = LocalConfig(model=str(tmp_path / "llama"), device="cpu", max_new_tokens=bound).build()
        made._loaded = lambda ask, temperature, most: lengths.append(most) or ("", False)
        made.send(asked(limit))
    assert lengths == [600, 4, 4]
