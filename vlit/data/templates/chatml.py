"""ChatML, the format of Qwen and many others."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("chatml")
class ChatMLTemplate(TemplateConfig):
    """``<|im_start|>role\\ntext<|im_end|>\\n``. Answer and ``<|im_end|>`` are supervised, the line break after it is
    not. Special tokens are looked up by their strings, however many others the tokenizer has.
    """

    type: str = "chatml"
    default_system = "You are a helpful assistant."
    specials = ("<|im_start|>", "<|im_end|>")

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        writer.bos()
        if system:
            writer.special("<|im_start|>")
            writer.text(f"system\n{system}")
            writer.special("<|im_end|>")
            writer.text("\n")
        for question, answer in exchanges:
            writer.special("<|im_start|>")
            writer.text("user\n")
            writer.user(question)
            writer.special("<|im_end|>")
            writer.text("\n")
            writer.special("<|im_start|>")
            writer.text("assistant\n")
            if answer is not None:
                writer.text(answer, supervised=True)
                self.write_end(writer)
                writer.text("\n")

    def write_end(self, writer: PieceWriter) -> None:
        writer.special("<|im_end|>", supervised=True)
