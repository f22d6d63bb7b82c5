"""Our chat templates as Jinja, so that an exported model is prompted by others as it was trained.

A message's content is a string, which is taken as it is (``<image>`` marks an image), or a list of parts, where every
image is followed by a line break as in LLaVA's data. The begin token is left to the tokenizer, except where the
tokenizer's own chat template writes it.
"""

from __future__ import annotations

from typing import Any

from vlit.errors import ExportError
from vlit.types import IMAGE_PLACEHOLDER, Turn

_CONTENT = (
    "{% macro content(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
_SYSTEM = (
    "{% set own = messages[0]['role'] == 'system' %}{% set system = content(messages[0]) if own else SYSTEM %}"
    "{% set turns = messages[1:] if own else messages %}"
)


def _literal(text: str) -> str:
    """``text`` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _turns(user: str, assistant: str) -> str:
    """A loop over the turns; ``user`` and ``assistant`` are Jinja expressions of ``c``, the turn's content."""
    return (
        "{% for m in turns %}{% set c = content(m) %}{% if m['role'] == 'user' %}{{ "
        + user
        + " }}{% else %}{{ "
        + assistant
        + " }}{% endif %}{% endfor %}"
    )


def jinja_template(template: Any, tokenizer: Any) -> str | None:
    """Jinja text of one of our templates for ``tokenizer``; None for a template that has no fixed text of its own.

    Args:
        template: a template's configuration: its registered ``type``, ``system`` and ``default_system``.
        tokenizer: holds ``<image>`` as a special token.

    Raises:
        ExportError: the tokenizer's own chat template cannot be made to write what training wrote.
    """
    if template.type == "tokenizer":
        whole = _own_template(template, tokenizer)
        _check_own(whole, template, tokenizer)
        return _with_lead(whole, tokenizer)
    system = template.system if template.system is not None else getattr(template, "default_system", "")
    known = set(tokenizer.get_added_vocab())
    end = "</s>" if "</s>" in known or not tokenizer.eos_token else tokenizer.eos_token
    adds_bos = bool(tokenizer.bos_token) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    body = _body(template.type, _literal(end), _literal(tokenizer.bos_token if adds_bos else ""), known, tokenizer)
    if body is None:
        return None
    return _with_lead(_CONTENT + _SYSTEM.replace("SYSTEM", _literal(system)) + body, tokenizer)


_OWN = (
    "{%- set flat = namespace(turns=[]) -%}"
    "{%- for m in messages -%}{%- set listed = m['content'] is iterable and m['content'] is not string -%}"
    "{%- set flat.turns = flat.turns + [dict(m, content=content(m)) if listed else m] -%}{%- endfor -%}"
)
_OWN_SYSTEM = (
    "{%- if flat.turns[0]['role'] != 'system' -%}"
    "{%- set flat.turns = [{'role': 'system', 'content': SYSTEM}] + flat.turns -%}{%- endif -%}"
)
_OWN_FOLDED = (
    "{%- if flat.turns[0]['role'] == 'system' -%}{%- set opening = flat.turns[0]['content'] + '\\n\\n' -%}"
    "{%- set asked = dict(flat.turns[1], content=opening + flat.turns[1]['content']) -%}"
    "{%- set flat.turns = [asked] + flat.turns[2:] -%}{%- endif -%}"
)
_ANSWER = "vlitanswerx"
_OWN_PROMPT = (
    f"{{%- set last = [{{'role': 'assistant', 'content': '{_ANSWER}'}}] if add_generation_prompt else [] -%}}"
    "{%- set messages = flat.turns + last -%}{%- set add_generation_prompt = false -%}{%- set written -%}"
)
_OWN_REST = (
    "{%- endset -%}{%- if last -%}"
    f"{{%- set written = written.split('{_ANSWER}')[0] -%}}"
    "{%- set written = written[:-1] if written.endswith(' ') else written -%}{%- endif -%}{{- written -}}"
)


def _own_template(template: Any, tokenizer: Any) -> str:
    """The tokenizer's chat template, run on flat texts with the run's system text. What stands before an answer is what
    the template writes before one that it is given, as in training, not what its generation prompt says.
    """
    system, folded = template.opening(tokenizer)
    return (
        _CONTENT
        + _OWN
        + ("" if system is None else _OWN_SYSTEM.replace("SYSTEM", _literal(system)))
        + (_OWN_FOLDED if folded else "")
        + _OWN_PROMPT
        + tokenizer.get_chat_template()
        + _OWN_REST
    )


def _check_own(jinja: str, template: Any, tokenizer: Any) -> None:
    """ExportError unless ``jinja`` writes what ``template`` writes, white space aside (special tokens may swallow it)."""
    turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"), Turn("assistant", "This."), Turn("user", "Sure?")]
    for some in (turns[:1], turns, [Turn("system", "Be brief."), *turns]):
        pieces = template.render(some, tokenizer=tokenizer, generation_prompt=True)
        ours = "".join(IMAGE_PLACEHOLDER if piece.kind == "image" else piece.text for piece in pieces)
        messages = [{"role": turn.role, "content": turn.text} for turn in some]
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=jinja, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is a program; transformers runs it in a sandbox
            theirs = f"{type(error).__name__}: {error}"
        if "".join(ours.split()) != "".join(theirs.split()):
            raise ExportError(
                f"data.template: the chat template of {tokenizer.name_or_path} cannot be exported as it was trained: "
                f"training wrote {ours!r}, the exported template {theirs!r}. Train with another data.template, for example "
                "chatml."
            )


def _with_lead(whole: str, tokenizer: Any) -> str:
    """``whole`` with what a text after an image needs in front of it."""
    lead = lead_after_image(tokenizer)
    return _CONTENT + _LEAD.format(body=whole.removeprefix(_CONTENT), lead=_literal(lead)) if lead else whole


_LEAD = (
    "{{% set prompt %}}{body}{{% endset %}}{{% for part in prompt.split('<image>') %}}{{% if loop.first %}}{{{{ part }}}}"
    "{{% else %}}{{{{ '<image>' + ({lead} + part if part else '') }}}}{{% endif %}}{{% endfor %}}"
)


def lead_after_image(tokenizer: Any) -> str:
    """What must stand between ``<image>`` and the text after it for that text to tokenize as a text of its own.

    LLaVA, and vlit, tokenize the text after an image by itself; a SentencePiece tokenizer then puts its space in front of
    it. Inside one string it does so only under ``legacy: true``; otherwise a space has to be written (Vicuna 1.5).
    """
    image = tokenizer.convert_tokens_to_ids("<image>")
    alone = tokenizer("\nWhat", add_special_tokens=False)["input_ids"]
    for lead in ("", " "):
        ids = tokenizer(f"<image>{lead}\nWhat", add_special_tokens=False)["input_ids"]
        if ids[ids.index(image) + 1 :] == alone:
            return lead
    return ""


def _body(kind: str, end: str, bos: str, known: set[str], tokenizer: Any) -> str | None:
    if kind == "v1":
        return "{% if system %}{{ system + ' ' }}{% endif %}" + _turns(
            "'USER: ' + c + ' ASSISTANT:'", f"' ' + c + {end}"
        )
    if kind == "v0":
        return "{% if system %}{{ system + '\\n\\n' }}{% endif %}###" + _turns(
            "' Human: ' + c + '\\n### Assistant:'", "' ' + c + '\\n###'"
        )
    if kind == "plain":
        return _turns("'<image>' * (c.split('<image>') | length - 1)", "c + '\\n'")
    if kind == "chatml":
        return (
            "{% if system %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}"
            + _turns("'<|im_start|>user\\n' + c + '<|im_end|>\\n'", "'<|im_start|>assistant\\n' + c + '<|im_end|>\\n'")
            + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
    if kind == "llama3":
        header = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"
        return (
            "{% if system %}{{ " + header.format("system") + " + system + '<|eot_id|>' }}{% endif %}"
            + _turns(
                header.format("user") + " + c + '<|eot_id|>'", header.format("assistant") + " + c + '<|eot_id|>'"
            )
            + "{% if add_generation_prompt %}{{ " + header.format("assistant") + " }}{% endif %}"
        )  # fmt: skip
    if kind == "llama2":
        wrapped = "('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '')"
        return _turns(
            f"('' if loop.first else {bos}) + '[INST] ' + {wrapped} + c + ' [/INST]'", f"' ' + c + ' ' + {end}"
        )
    if kind == "mistral":
        as_token = {"[INST]", "[/INST]"} <= known
        backend = tokenizer.backend_tokenizer
        sentencepiece = "▁" in f"{backend.normalizer} {backend.pre_tokenizer}"
        lead = "' '" if not as_token or sentencepiece else "''"
        tail = "''" if as_token else "' '"
        wrapped = "(system + '\\n\\n' if system and loop.first else '')"
        return _turns(f"'[INST]' + {lead} + {wrapped} + c + {tail} + '[/INST]'", f"{lead} + c + {end}")
    return None
