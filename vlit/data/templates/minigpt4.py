"""MiniGPT-4's conversation form (arXiv:2304.10592)."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES
from vlit.types import IMAGE_PLACEHOLDER


@TEMPLATES.register("minigpt4")
class MiniGPT4Template(TemplateConfig):
    """``###Human: <Img>image</Img> q ###Assistant: a###``; the marks are ordinary text, an answer ends with ``###``.

    A line break between the placeholder and the question, as LLaVA's files have it, is dropped.
    """

    type: str = "minigpt4"

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        writer.bos()
        writer.text(system)
        for number, (question, answer) in enumerate(exchanges):
            writer.text("###Human: " if number == 0 else "Human: ")
            for index, part in enumerate(question.split(IMAGE_PLACEHOLDER)):
                if index:
                    writer.text("<Img>")
                    writer.user(IMAGE_PLACEHOLDER)
                    writer.text("</Img> ")
                writer.text(part.lstrip("\n") if index else part.rstrip("\n"))
            writer.text(" ###Assistant:")
            if answer is not None:
                writer.text(f" {answer}", supervised=True)
                self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        writer.text("###", supervised=True)
