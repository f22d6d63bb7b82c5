"""Reading a model's configuration from a folder or the hub, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vlit.errors import ModelError

_MAX_BLOCKS = 10_000


def read_config(path: str, *, key: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of ``path`` (local folder or hub id).

    Args:
        key: the configuration key users set, named in errors.

    Raises:
        ModelError: nothing is there, or it is not a transformers model.
    """
    from transformers import AutoConfig

    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        what = "has no config.json" if Path(path).expanduser().is_dir() else "does not exist"
        raise ModelError(f'{key} "{path}": this folder {what}. Give a Hugging Face model folder or a hub id.')
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files make transformers raise anything
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise ModelError(
                f'{key} "{path}": needs program code that comes with the model. Read that code; if you trust it, set '
                f"{key.rpartition('.')[0]}.trust_remote_code: true."
            ) from error
        if looks_local:
            raise ModelError(
                f'{key} "{path}": its config.json cannot be used ({reason or type(error).__name__}). Fetch it again.'
            ) from error
        raise ModelError(
            f'{key} "{path}": not found as a local folder and not available from the Hugging Face hub ({reason}). '
            "Check the name, download it first, or point to a local folder."
        ) from error
    _check_depth(config, path=path, key=key)
    return config


def _check_depth(config: Any, *, path: str, key: str) -> None:
    """ModelError for a number of blocks that no model has: building them one by one would take for ever."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        depth = getattr(part, "num_hidden_layers", 1)
        if not isinstance(depth, int) or not 0 <= depth <= _MAX_BLOCKS:
            raise ModelError(
                f'{key} "{path}": config.json says num_hidden_layers {depth!r}, expected 0 to {_MAX_BLOCKS}. Fetch it again.'
            )


def dropouts(config: Any) -> dict[str, float]:
    """Settings of a transformers config that drop something at random while training, by name; empty when all are 0."""
    values = config.to_dict()
    return {k: float(v) for k, v in values.items() if "drop" in k and isinstance(v, (int, float)) and float(v) > 0}


def set_recompute(hf: Any, policy: str) -> None:
    """Recompute a transformers model's blocks in the backward pass (non-reentrant), under either of its two names.

    ``full`` keeps a block's input only. ``selective`` also keeps the results of matrix products and attention, which cost
    nearly all the time, and computes norms, rotations and activation functions again, which hold most of the memory.
    """
    prefix = "activation" if hasattr(hf, "activation_checkpointing_enable") else "gradient"
    if policy == "none":
        getattr(hf, f"{prefix}_checkpointing_disable")()
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    getattr(hf, f"{prefix}_checkpointing_enable")(options)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = str(operator)
    kept = name.startswith(("aten.mm", "aten.addmm", "aten._scaled_dot_product", "vlit."))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars of transformers inside (for small or frequent loads and saves)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
