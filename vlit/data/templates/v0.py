"""Vicuna v0, the template of the first LLaVA."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("v0")
class V0Template(TemplateConfig):
    """``{system}\\n\\n### Human: q\\n### Assistant: a\\n### Human: …``; an answer ends with the text ``\\n###``.

    LLaVA's code also supervises role names and, because it counts a begin token for every segment, one drifting token
    more per turn; here the answer and ``\\n###`` are supervised and nothing else.
    """

    type: str = "v0"
    default_system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        writer.bos()
        writer.text(f"{system}\n\n" if system else "")
        writer.text("###")
        for question, answer in exchanges:
            writer.text(" Human: ")
            writer.user(question)
            writer.text("\n### Assistant:")
            if answer is not None:
                writer.text(f" {answer}", supervised=True)
                self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        writer.text("\n###", supervised=True)
