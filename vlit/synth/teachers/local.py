"""A model on this machine as the teacher: a vlit model folder, or a transformers folder (text, or pictures and text).

Greedy on the first draw; further draws of the same prompt are sampled with a seed made of the request, so they are
reproducible on the same machine. Remote code is never run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlit.config.component import ComponentConfig
from vlit.errors import ConfigError
from vlit.registry import TEACHERS
from vlit.synth.engine.teacher import Ask, BrokenReply, Limits, Reply, Teacher, open_picture
from vlit.types import IMAGE_PLACEHOLDER, Turn


@TEACHERS.register("local")
class LocalConfig(ComponentConfig):
    """A model folder on this machine."""

    type: str = "local"
    model: str
    """A vlit model folder (`<output_dir>/<stage>/model`) or a transformers folder with a chat template."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Of the draws after the first."""
    device: str = "auto"
    """`auto`: a GPU where there is one."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Bound of every answer, beside the recipe's own; null: the recipe's alone. An answer that reaches its bound is rejected as
    `cut`."""

    def build(self, **kwargs: Any) -> LocalTeacher:
        """The teacher; weights are loaded at its first question."""
        if not Path(self.model).is_dir():
            raise ConfigError(f"teacher.model: {self.model} is not a folder. Give a vlit or transformers model folder.")
        return LocalTeacher(self)


class LocalTeacher(Teacher):
    """Answers one request at a time."""

    limits = Limits(concurrency=1)

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self._loaded: Any = None
        self._sees = False
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        manifest = next(
            (p for n in ("manifest.json", "config.json") if (p := Path(self.config.model) / n).is_file()), None
        )
        if manifest is None:
            raise ConfigError(f"teacher.model: {self.config.model} holds neither manifest.json nor config.json.")
        stat = manifest.stat()
        what = {
            "type": "local",
            "model": str(Path(self.config.model).resolve()),
            "changed": [stat.st_mtime_ns, stat.st_size],
        }
        return what | {"temperature": self.config.temperature, "max_new_tokens": self.config.max_new_tokens}

    def send(self, ask: Ask) -> str:
        import torch

        with self._lock:
            if self._loaded is None or (ask.messages[-1].images and not self._sees):
                self._sees = bool(ask.messages[-1].images)
                self._loaded = self._load(self._sees)
            torch.manual_seed(int(self.key(ask)[:15], 16))
            temperature = self.config.temperature if ask.sample else 0.0
            most = min(ask.max_tokens, self.config.max_new_tokens or ask.max_tokens)
            text, is_cut = self._loaded(ask, temperature, most)
        return json.dumps({"text": text, "cut": is_cut})

    def ready(self, ask: Ask) -> Callable[[], str]:
        for path in (image for message in ask.messages for image in message.images):
            open_picture(path)
        return super().ready(ask)

    def read(self, body: str) -> Reply:
        try:
            held = json.loads(body)
            return Reply(held["text"], cut=held["cut"])
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenReply(str(error)) from error

    def _load(self, with_pictures: bool) -> Any:
        import torch

        wanted = self.config.device
        device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
        if (Path(self.config.model) / "manifest.json").is_file():
            return _vlit(self.config, device)
        return _transformers(self.config, device, with_pictures=with_pictures)


def _vlit(config: LocalConfig, device: str) -> Any:
    import torch

    from vlit.answer import Answerer, Request
    from vlit.models.artifact import data_rules, load_model

    folder = Path(config.model)
    model, manifest = load_model(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model.to(device).eval()
    answerer = Answerer(model, data_rules(folder, manifest))

    def answer(ask: Ask, temperature: float, max_tokens: int) -> tuple[str, bool]:
        answerer.max_new_tokens = max_tokens
        turns = tuple(
            Turn(m.role, f"{IMAGE_PLACEHOLDER}\n" * len(m.images) + m.text.replace(IMAGE_PLACEHOLDER, ""))
            for m in ask.messages
        )
        images = tuple(Path(i) for m in ask.messages for i in m.images)
        return answerer.answers([Request(turns, images)], temperature=temperature)[0]

    return answer


def _transformers(config: LocalConfig, device: str, *, with_pictures: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    kind = AutoModelForImageTextToText if with_pictures else AutoModelForCausalLM
    reader: Any = (AutoProcessor if with_pictures else AutoTokenizer).from_pretrained(config.model)
    model: Any = kind.from_pretrained(config.model, dtype=dtype)
    model.to(device).eval()

    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())

    def answer(ask: Ask, temperature: float, max_tokens: int) -> tuple[str, bool]:
        chat: list[dict[str, Any]] = [{"role": m.role, "content": m.text} for m in ask.messages]
        if with_pictures:
            for row, message in zip(chat, ask.messages, strict=True):
                pictures = [{"type": "image", "image": open_picture(path)} for path in message.images]
                row["content"] = [*pictures, {"type": "text", "text": message.text}]
        inputs = reader.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        is_cut = len(new) >= max_tokens and not ends.intersection(new)
        return str(reader.decode(new, skip_special_tokens=True)).strip(), is_cut

    return answer
