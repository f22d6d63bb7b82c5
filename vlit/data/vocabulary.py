"""Do tokenizer and language model belong together? Asked when a tokenizer is first used, before weights are loaded."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from vlit.data.text import traits_of
from vlit.errors import ModelError


@functools.lru_cache(maxsize=16)
def check_vocabulary(tokenizer: Any, vocab_size: int, path: str) -> None:
    """Every token that texts and templates can give has an embedding. Special tokens that nothing writes (many tokenizers
    bring a pad token of their own) may be beyond.

    Raises:
        ModelError: names the token, both sizes and the configuration key.
    """
    used = dict(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if not token.special and token.content not in traits_of(tokenizer).specials:
            used[token.content] = int(token_id)  # found inside ordinary text
    for name in (traits_of(tokenizer).bos, traits_of(tokenizer).eos):
        if name is not None:
            used[name] = traits_of(tokenizer).specials[name]
    token, largest = max(used.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ModelError(
            f'model.llm.tokenizer "{path}": its token {token!r} has the id {largest}, so it needs {largest + 1} embeddings; '
            f"the language model of model.llm.path has {vocab_size} (its vocab_size). Set model.llm.tokenizer to the tokenizer "
            "that belongs to the model."
        )


def fingerprint_of(tokenizer: Any) -> str:
    """Hex digest of all that decides how texts become ids and ids texts: equal for equal tokenizers, wherever they lie."""
    parts = (
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.chat_template),
        repr(sorted(traits_of(tokenizer).specials)),
    )
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
