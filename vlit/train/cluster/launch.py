"""torchrun with exit codes that say something, and with SIGUSR1.

torchrun itself ends with 1 whatever happened, dies from SIGUSR1 without telling its processes, and gives them 30 seconds after
a signal, which is too short to write a large checkpoint. This starts the same agent with the same options, passes SIGUSR1 on,
waits as long as the scheduler allows, and ends with the exit code of the process that failed first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlit.train.cluster.exit_codes import EXIT_BUG, EXIT_CODES, EXIT_RANK_LOST

PATIENCE_S = 600
"""How long processes may take to end after a signal; schedulers kill much earlier."""


def launch(words: Sequence[str]) -> int:
    """Run ``torchrun WORDS`` in this process and return the exit code for it."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = torchrun.parse_args(list(words))
    handled = [name for name in getattr(args, "signals_to_handle", "").split(",") if name]
    if "SIGUSR1" not in handled:
        args.signals_to_handle = ",".join([*handled, "SIGUSR1"])
    if getattr(args, "shutdown_timeout", PATIENCE_S) is None:
        args.shutdown_timeout = PATIENCE_S
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        # ranks that ended because another did tell less than that one, and times are whole seconds
        causes = {rank: one for rank, one in error.failures.items() if one.exitcode != EXIT_RANK_LOST}
        rank, failure = ChildFailedError("", causes or error.failures).get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        what = EXIT_CODES.get(code, EXIT_CODES[EXIT_BUG])[0]
        print(
            f"launch: rank {rank} (pid {failure.pid}) ended first, with exit code {code}: {what}; the others were stopped.",
            file=sys.stderr,
        )
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
