"""LLaMA-2 chat."""

from __future__ import annotations

from vlit.data.templates._base import Exchange, PieceWriter, TemplateConfig
from vlit.registry import TEMPLATES


@TEMPLATES.register("llama2")
class Llama2Template(TemplateConfig):
    """``[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\nq [/INST] a </s><s>[INST] q2 [/INST] a2 </s>`` (LLaVA's
    ``llava_llama_2``). The space before ``</s>`` is part of the format and supervised.
    """

    type: str = "llama2"
    default_system = (
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        for number, (question, answer) in enumerate(exchanges):
            writer.bos()
            writer.text("[INST] ")
            if system and number == 0:
                writer.text(f"<<SYS>>\n{system}\n<</SYS>>\n\n")
            writer.user(question)
            writer.text(" [/INST]")
            if answer is not None:
                writer.text(f" {answer}", supervised=True)
                self.write_end(writer)

    def write_end(self, writer: PieceWriter) -> None:
        writer.text(" ", supervised=True)
        writer.eos("</s>")
