"""A model's tokenizer, loaded so that it tokenizes as the model was trained.

Two things are mended after transformers (5.17-5.23) has read a folder that has only a SentencePiece ``tokenizer.model``, as
Vicuna 1.5 has: it orders the merges by vocabulary index instead of by score, which tokenizes runs of spaces (all indented
code) differently from SentencePiece; and ``save_pretrained`` forgets ``legacy: true``, so the saved copy would tokenize
differently from the original.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from vlit.errors import ModelError


@functools.lru_cache(maxsize=16)
def tokenizer_for(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a model folder or hub name. Asks the network only when the local cache does not hold it.

    Raises:
        ModelError: there is none, or it has no fast (Rust) implementation.
    """
    tokenizer = _load(path, trust_remote_code=trust_remote_code, revision=revision)
    if not tokenizer.is_fast:
        raise ModelError(
            f"tokenizer {path}: {type(tokenizer).__name__} has no fast version, which exact masks need. "
            "Convert it to a tokenizer.json first."
        )
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    model = tokenizer.init_kwargs.get("vocab_file")
    if model and str(model).endswith(".model") and not (Path(model).parent / "tokenizer.json").is_file():
        _order_merges_by_score(tokenizer, Path(model))
    return tokenizer


def _load(path: str, *, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True}
    attempts = [local] if os.path.isdir(path) else [local, {}]
    error: Exception | None = None
    for options in attempts:
        try:
            return AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, revision=revision or "main", **options
            )
        except Exception as reason:  # damaged files make transformers and tokenizers raise anything
            error = reason
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise ModelError(
        f"tokenizer {path}: cannot be loaded ({first_line}). Name a folder with tokenizer.json or tokenizer.model, or a "
        "hub model."
    ) from error


def _order_merges_by_score(tokenizer: Any, model: Path) -> None:
    """Give the backend SentencePiece's own merge order: highest score first, then the longest left part."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE

    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE":
        return
    pieces = SentencePieceProcessor(model_file=str(model))
    scores = {
        pieces.id_to_piece(number): pieces.get_score(number)
        for number in range(pieces.get_piece_size())
        if not (
            pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number) or pieces.is_unused(number)
        )
    }
    merges = [
        (left, right)
        for piece in scores
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    merges.sort(key=lambda merge: (-scores[merge[0] + merge[1]], -len(merge[0])))
    old = backend.model
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    backend.model = BPE(
        vocab=vocab,
        merges=merges,
        dropout=None,
        unk_token=old.unk_token,
        fuse_unk=old.fuse_unk,
        byte_fallback=old.byte_fallback,
    )
