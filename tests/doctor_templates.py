"""A template under which single records are dangerous, to see what happens to a process that looks at them."""

from __future__ import annotations

import os
import signal
import time

from vlit.data.templates._base import Exchange, PieceWriter
from vlit.data.templates.v1 import V1Template
from vlit.registry import TEMPLATES


@TEMPLATES.register("dangerous")
class DangerousTemplate(V1Template):
    """``KILL`` in a question ends the process as the system does when memory is short, ``SLEEP`` takes an hour."""

    type: str = "dangerous"

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        words = " ".join(question for question, _ in exchanges).split()
        if "KILL" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "SLEEP" in words:
            time.sleep(3600)
        super().write(writer, system, exchanges)
