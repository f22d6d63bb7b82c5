"""A training loop without training: ``steps.py FOLDER FAULT [TIMEOUT]``. Rank 1 meets the fault in step 3."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from vlit.config.schema import RuntimeConfig
from vlit.train.cluster.exit_codes import RankLostError
from vlit.train.cluster.watchdog import Watchdog
from vlit.train.distributed import start_ranks
from vlit.train.signals import stop_requests

folder, fault, timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
ranks = start_ranks(RuntimeConfig(device="cpu"))
(folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))


def meet(dog: Watchdog) -> None:
    if fault == "sleep":
        time.sleep(1000)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise ValueError("the cat sat on the keyboard")
    elif fault == "allowed":
        dog.phase("load", allow_s=math.inf)
        time.sleep(3 * timeout)
    elif fault == "continue":  # stopped for longer than the limit, then continued: as after `scontrol resume`
        if os.fork() == 0:
            time.sleep(2.5 * timeout)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)


def steps(stop: list[int]) -> None:
    with Watchdog(ranks, timeout, output_dir=folder) as dog:
        for step in range(6 if fault != "orphan" else 10_000):
            dog.phase("forward", step)
            time.sleep(0.05)
            if step == 3 and ranks.rank == ranks.world_size - 1:
                meet(dog)
            dog.phase("reduce", step, collective=True)
            flag = torch.tensor([stop[0] if stop else 0])
            if ranks.world_size > 1:
                torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            if int(flag):
                (folder / f"saved-{ranks.rank}").write_text(str(step))
                sys.exit(128 + int(flag))


with stop_requests() as stop:
    try:
        steps(stop)
    except RankLostError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
