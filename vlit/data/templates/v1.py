"""Vicuna v1.1, LLaVA's ``v1``."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("v1")
class V1Template(TemplateConfig):
    """``{system} USER: q ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>``. A tokenizer without ``</s>`` uses its own end
    token.
    """

    type: str = "v1"
    default_system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        writer.bos()
        writer.text(f"{system} " if system else "")
        for question, answer in exchanges:
            writer.text("USER: ")
            writer.user(question)
            writer.text(" ASSISTANT:")
            if answer is not None:
                writer.text(f" {answer}", supervised=True)
                self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        writer.eos("</s>")
