"""Text -> token ids in which special tokens can never appear, whatever the text holds.

transformers matches special tokens inside ordinary text, so a user who writes ``</s>`` ends the turn, and SentencePiece
tokenizers put a space in front of every text they are given, so fragments do not concatenate. Both are switched off
here by building two backends from the tokenizer's own JSON: one as it is, one without its prefix space.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from vlit.errors import DataError

Context = Literal["start", "special", "text"]
"""What stands before a fragment: nothing or an image, a special token, other text."""

_LOOKS_STRUCTURAL = re.compile(r"<\|.+\|>|<｜.+｜>|\[/?[A-Z_]+\]|</?s>|<(start|end)_of_turn>|<(bos|eos|pad|unk)>")


@dataclass(frozen=True)
class TokenizerTraits:
    """What templates ask of a tokenizer."""

    specials: dict[str, int]  # string -> id of every token with a structural meaning
    bos: str | None  # the begin token, when the tokenizer puts it in front of a text by itself
    eos: str | None
    sentencepiece: bool  # spaces are written as "▁"
    line_breaks: bool  # "\n" gives a token (vocabularies of whole words drop white space)


@functools.lru_cache(maxsize=16)
def traits_of(tokenizer: Any) -> TokenizerTraits:
    """Traits of a transformers tokenizer (computed once).

    Special are: tokens flagged as special, the named ones (bos, eos, pad …), and added tokens written like a structural
    one (``<|im_end|>``), because some published tokenizers forget the flag.
    """
    named = {
        token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) if token
    }
    specials = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special or token.content in named or _LOOKS_STRUCTURAL.fullmatch(token.content):
            specials[token.content] = int(token_id)
    for token in named - specials.keys():
        specials[token] = int(tokenizer.convert_tokens_to_ids(token))
    first = tokenizer("x")["input_ids"][:1]
    bos = tokenizer.bos_token if tokenizer.bos_token and first == [tokenizer.bos_token_id] else None
    backend = tokenizer.backend_tokenizer
    marks_spaces = "▁" in f"{backend.normalizer} {backend.pre_tokenizer}"
    return TokenizerTraits(
        specials=specials,
        bos=bos,
        eos=tokenizer.eos_token,
        sentencepiece=marks_spaces,
        line_breaks=bool(tokenizer("\n", add_special_tokens=False)["input_ids"]),
    )


class TextEncoder:
    """Encodes fragments of ordinary text. Make one with :func:`encoder_of`."""

    def __init__(self, tokenizer: Any) -> None:
        traits = traits_of(tokenizer)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] or token["content"] in traits.specials
        spec.update(post_processor=None, truncation=None, padding=None)
        self._specials = traits.specials
        unk = (
            tokenizer.unk_token_id
            if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
            else None
        )
        self._forbidden = frozenset(traits.specials.values()) - {unk}
        whole = _backend(spec)
        prefix, marks = _remove_prefix(spec)
        self._continued = whole if prefix == "none" else _backend(spec)
        self._whole = self._continued if marks else whole
        self._lead = " " if marks else ""
        self._prefixed: dict[Context, bool] = {
            "start": prefix != "none",
            "special": prefix == "always",
            "text": False,
        }

    def encode(self, text: str, context: Context) -> list[int]:
        """Ids of ``text``. ``start`` is how the tokenizer encodes a text by itself; ``special`` how transformers goes
        on after a special token; ``text`` adds no prefix space, so the text's own characters are all that is encoded.
        """
        return [token_id for token_id, _ in self.encode_with_text(text, context, with_text=False)]

    def encode_with_text(self, text: str, context: Context, *, with_text: bool = True) -> list[tuple[int, str]]:
        """(id, the characters it stands for); the characters of all tokens concatenate to ``text``. A character that
        takes several tokens is given to the last of them. Without ``with_text`` the strings are empty.
        """
        if not text:
            return []
        pairs = self._run(text, context, with_text)
        if self._forbidden.isdisjoint(token_id for token_id, _ in pairs):
            return pairs
        return self._encode_apart(text, context, with_text)

    def _run(self, text: str, context: Context, with_text: bool) -> list[tuple[int, str]]:
        """The prefix of SentencePiece is a space in front of *every* text, also of one that begins with a space; the
        Metaspace of ``tokenizers`` leaves it out there, so it is written out.
        """
        prefixed = self._prefixed[context]
        lead = self._lead if prefixed else ""
        backend = self._whole if prefixed else self._continued
        encoding = backend.encode(lead + text, add_special_tokens=False)
        if not with_text:
            return [(token_id, "") for token_id in encoding.ids]
        ends = [max(0, end - len(lead)) for _, end in encoding.offsets]
        return list(zip(encoding.ids, _cover(text, ends), strict=True))

    def _encode_apart(self, text: str, context: Context, with_text: bool) -> list[tuple[int, str]]:
        """For vocabularies whose ordinary model can produce a special token (Unigram, WordLevel): cut every special
        string after its first character, so that no fragment holds it.
        """
        cuts = sorted(
            {
                match.start() + 1
                for special in self._specials
                for match in re.finditer(f"(?={re.escape(special)})", text)
            }
        )
        result: list[tuple[int, str]] = []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part, part_context = text[begin:end], context if begin == 0 else "text"
            if not part:
                continue
            pairs = self._run(part, part_context, with_text)
            if not self._forbidden.isdisjoint(token_id for token_id, _ in pairs):
                raise DataError(
                    f"the tokenizer cannot write {part[:40]!r} without a special token. Remove it from the text."
                )
            result += pairs
        return result


@functools.lru_cache(maxsize=16)
def encoder_of(tokenizer: Any) -> TextEncoder:
    """The (cached) encoder of a tokenizer."""
    return TextEncoder(tokenizer)


def _backend(spec: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def _remove_prefix(spec: dict[str, Any]) -> tuple[Literal["none", "first", "always"], bool]:
    """Take the prefix space out of a tokenizer's JSON (in place). Returns when it was added (never, only at the start of a
    text, or after every special token too) and whether Metaspace added it.
    """
    found: set[str] = set()
    marks = False

    def visit(node: Any) -> Any:
        nonlocal marks
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "Sequence":
            key = "normalizers" if "normalizers" in node else "pretokenizers"
            node[key] = [kept for child in node[key] if (kept := visit(child)) is not None]
            return node
        if kind == "Prepend":
            found.add("always")
            return None
        if kind == "Metaspace":
            scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
            if scheme != "never":
                found.add(scheme)
                marks = True
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
        elif kind == "ByteLevel" and node.get("add_prefix_space"):
            found.add("always")
            node["add_prefix_space"] = False
        return node

    spec["normalizer"] = visit(spec.get("normalizer"))
    spec["pre_tokenizer"] = visit(spec.get("pre_tokenizer"))
    return "always" if "always" in found else "first" if "first" in found else "none", marks


def _cover(text: str, ends: list[int]) -> list[str]:
    """Stretches of ``text`` that its tokens stand for, without gap or overlap; ``ends`` are the tokens' end offsets."""
    stretches, done = [], 0
    for index, end in enumerate(ends):
        shared = index + 1 < len(ends) and ends[index + 1] == end
        upto = done if shared else max(done, end)
        stretches.append(text[done:upto])
        done = upto
    if stretches:
        stretches[-1] += text[done:]
    return stretches
