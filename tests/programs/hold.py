"""``hold.py FOLDER SECONDS [fork]``: keep the output folder; ``fork`` leaves a child behind, as data workers are."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vlit.config.schema import RuntimeConfig
from vlit.errors import CheckpointError
from vlit.train.cluster.lock import OutputLock
from vlit.train.distributed import start_ranks

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
ranks = start_ranks(RuntimeConfig(device="cpu"))
try:
    with OutputLock(folder, ranks, heartbeat_s=0.4):
        if "fork" in sys.argv and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print(f"rank {ranks.rank} holds", flush=True)
        time.sleep(seconds)
except CheckpointError as error:
    print(f"rank {ranks.rank} refused: {error}", flush=True)
    sys.exit(2)
