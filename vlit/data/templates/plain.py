"""LLaVA's ``plain``: images, then the caption; for alignment."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.errors import DataError
from vlit.registry import TEMPLATES
from vlit.types import IMAGE_PLACEHOLDER


@TEMPLATES.register("plain")
class PlainTemplate(TemplateConfig):
    """``<image>caption\\n``: the human's text is discarded, caption and line break are supervised, there is no end
    token (LLaVA's rule for stage 1); only a tokenizer that knows no line break uses its end token. Records have one
    question and one answer; system texts are ignored.
    """

    type: str = "plain"

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        if len(exchanges) != 1:
            raise DataError(
                f"the template plain takes one question and one answer, the record has {len(exchanges)}. Use another "
                "template for conversations."
            )
        question, caption = exchanges[0]
        writer.bos()
        writer.user(IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER))
        if caption is not None:
            writer.text(caption, supervised=True)
            self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        if writer.traits.line_breaks:
            writer.text("\n", supervised=True)
        else:
            writer.eos("</s>")
