"""Exit codes of a training process, in one place; `docs/clusters.md` holds the same table for readers.

128 + signal is the shell's convention for a run that was asked to stop; the others follow ``sysexits.h`` where it has a word.
"""

from __future__ import annotations

import signal

FINISHED = 0
EXIT_BUG = 1
"""An error nobody foresaw, with a traceback."""
EXIT_MISTAKE = 2
"""A mistake that a person can mend: one line on stderr. Starting again changes nothing."""
EXIT_RANK_LOST = 69
"""Another process of the run ended or died; this one ended because of it (EX_UNAVAILABLE)."""
EXIT_HANG = 75
"""The watchdog ended a run that no longer moved (EX_TEMPFAIL)."""

EXIT_CODES: dict[int, tuple[str, str]] = {
    FINISHED: ("finished", "nothing"),
    EXIT_BUG: ("an unforeseen error, with its traceback", "read the traceback; starting again repeats most of them"),
    EXIT_MISTAKE: ("a mistake in configuration, data or folders", "mend what the line says"),
    EXIT_RANK_LOST: ("another process of the run ended or died", "look at the rank it names; start again to resume"),
    EXIT_HANG: (
        "the run no longer moved; `hang-rank-*.txt` says who",
        "look at the rank it names; start again to resume",
    ),
    128 + signal.SIGINT: ("stopped by SIGINT (Ctrl-C), checkpoint written", "start again to resume"),
    128 + signal.SIGKILL: ("killed: out of memory, or `kill -9`", "look at `dmesg`; start again to resume"),
    128 + signal.SIGUSR1: ("stopped by SIGUSR1 (Slurm's warning), checkpoint written", "start again to resume"),
    128 + signal.SIGTERM: ("stopped by SIGTERM, checkpoint written", "start again to resume"),
}
"""Code -> (what happened, what to do)."""


class RankLostError(Exception):
    """Another process of the run is gone. Carries the exit code that the command line ends with."""

    exit_code = EXIT_RANK_LOST
