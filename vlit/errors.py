"""Every error vlit raises on purpose. Each message names the place, both values and the next action."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlitError(Exception):
    """Base of all errors a user can mend; the command line prints its message on one line and exits with code 2."""


class ConfigError(VlitError):
    """A configuration file, key or command-line override is wrong."""


class DataError(VlitError):
    """A dataset, record or image cannot be used as the configuration asks."""


class ModelError(VlitError):
    """A model part is missing, does not fit its neighbour, or is not what its configuration says."""


class CheckpointError(VlitError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another configuration."""


class TrainingError(VlitError):
    """Training cannot go on: non-finite values, no supervised tokens, a stage without its predecessor."""


class EvaluationError(VlitError):
    """Answers cannot be scored: unreadable questions, missing answers, or a folder that holds another evaluation."""


class SynthError(VlitError):
    """The data engine cannot go on: the budget is used up, the teacher does not answer, or another process writes here."""


class ExportError(VlitError):
    """The model cannot be expressed in the requested format; the message says which part and why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Sentence that lists the known names and, when one is close, suggests it. Empty list -> empty string."""
    names = sorted(known)
    if not names:
        return ""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return f"Known: {', '.join(names)}.{hint}"
