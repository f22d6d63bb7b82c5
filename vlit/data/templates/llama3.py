"""Llama-3 instruct."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("llama3")
class Llama3Template(TemplateConfig):
    """``<|start_header_id|>role<|end_header_id|>\\n\\ntext<|eot_id|>`` after the begin token. No system text unless one
    is set.
    """

    type: str = "llama3"
    specials = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        writer.bos()
        if system:
            self._header(writer, "system")
            writer.text(system)
            writer.special("<|eot_id|>")
        for question, answer in exchanges:
            self._header(writer, "user")
            writer.user(question)
            writer.special("<|eot_id|>")
            self._header(writer, "assistant")
            if answer is not None:
                writer.text(answer, supervised=True)
                self.write_end(writer)

    def _header(self, writer: PieceWriter, role: str) -> None:
        writer.special("<|start_header_id|>")
        writer.text(role)
        writer.special("<|end_header_id|>")
        writer.text("\n\n")

    def write_end(self, writer: PieceWriter) -> None:
        writer.special("<|eot_id|>", supervised=True)
