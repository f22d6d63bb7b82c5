"""Mistral instruct, all three generations."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("mistral")
class MistralTemplate(TemplateConfig):
    """The format of the tokenizer's generation (as in mistral_common): ``[INST] q [/INST] a</s>`` where ``[INST]`` is
    text (v1), ``[INST] q[/INST] a</s>`` where it is a token of a SentencePiece model (v2, v3), ``[INST]q[/INST]a</s>``
    with tekken. A system text stands in front of the first question.

    LLaVA's ``mistral_instruct`` writes a space before ``</s>``; Mistral's own models were not trained so.
    """

    type: str = "mistral"
    specials = ("[INST]", "[/INST]")

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        as_token = writer.has("[INST]") and writer.has("[/INST]")
        lead = " " if not as_token or writer.traits.sentencepiece else ""
        writer.bos()
        for number, (question, answer) in enumerate(exchanges):
            writer.special("[INST]")
            writer.text(lead)
            if system and number == 0:
                writer.text(f"{system}\n\n")
            writer.user(question)
            writer.text("" if as_token else " ")
            writer.special("[/INST]")
            if answer is not None:
                writer.text(f"{lead}{answer}", supervised=True)
                self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        writer.eos("</s>")
