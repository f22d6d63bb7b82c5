"""``check.py CONFIG FOLDER CASE...``: run the preflight once per case, on every rank; rank 1 is the one with the fault.

Each rank writes what it was told to ``FOLDER/told-RANK.json``: case -> error, or the report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vlit.config.load import load_config
from vlit.errors import CheckpointError, TrainingError
from vlit.train.cluster import facts
from vlit.train.cluster.preflight import preflight
from vlit.train.distributed import start_ranks
from vlit.train.identity import data_identities, open_data

config, folder, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
run = load_config(config)
ranks = start_ranks(run.runtime)
(folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))
odd = ranks.rank == 1
opened, problems = open_data(run, progress=False)
identities = data_identities(opened)
arguments: dict[str, Any] = {}


@contextmanager
def fault(case: str) -> Iterator[None]:
    """Put the fault of a case into rank 1 (or, for room on disk and memory, into all)."""
    global arguments
    arguments = {"run": run, "ranks": ranks, "identities": dict(identities), "problems": list(problems)}
    true_versions, true_machine, true_gather = facts.versions(), facts.machine_facts, torch.distributed.all_gather
    if case == "config" and odd:
        align = run.stages["align"].model_copy(update={"lr": 0.5})
        arguments["run"] = run.model_copy(update={"stages": run.stages | {"align": align}})
    elif case == "local_config" and odd:
        arguments["run"] = run.model_copy(
            update={"data": run.data.model_copy(update={"cache_dir": "/scratch/elsewhere"})}
        )
    elif case == "version" and odd:
        with patch.object(facts, "versions", lambda: true_versions | {"transformers": "4.1.0"}):
            yield
        return
    elif case == "data" and odd:
        arguments["identities"]["align/colours"] = "0123456789"
    elif case == "precision" and odd:
        runtime = run.runtime.model_copy(update={"precision": "bf16"})
        arguments["run"] = run.model_copy(update={"runtime": runtime})
    elif case == "two" and odd:
        arguments["problems"] = ["mix665k.json: no such file."]
        arguments["identities"]["align/colours"] = "0123456789"
    elif case == "disk":
        align = run.stages["align"]
        checkpoint = align.checkpoint.model_copy(update={"keep": 10**12})
        stages = run.stages | {"align": align.model_copy(update={"checkpoint": checkpoint})}
        arguments["run"] = run.model_copy(update={"stages": stages})
    elif case == "memory":
        llm = run.model.llm.model_copy(update={"path": str(folder / "giant")})
        model = run.model.model_copy(update={"llm": llm})
        arguments["run"] = run.model_copy(update={"model": model, "stages": {"align": run.stages["align"]}})
    elif case == "shm" and odd:
        small = {"shm_free": 64 << 20, "shm_needed": 1 << 30, "workers": 8}
        host = {"host": "node17"}
        true = facts.gather_facts
        with (
            patch.object(facts, "machine_facts", lambda *a: true_machine(*a) | small),
            patch.object(facts, "gather_facts", lambda *a: true(*a) | host),
        ):
            yield
        return
    elif case == "clock" and odd:
        with patch.object(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + 500):
            yield
        return
    elif case == "folder" and odd:  # the same relative path, another working directory: another folder
        here = Path.cwd()
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)
        return
    elif case == "crash" and odd:
        with patch.object(facts, "device_facts", lambda device: 1 // 0):
            yield
        return
    elif case == "wrong" and odd:

        def corrupted(slots: Any, tensor: torch.Tensor, **more: Any) -> Any:
            return true_gather(slots, tensor + 1e-3, **more)

        with patch.object(torch.distributed, "all_gather", corrupted):
            yield
        return
    elif case == "late":
        arguments["timeout_s"] = 2.0
        if odd:
            time.sleep(8.0)
    elif case == "stuck":
        arguments["collective_timeout_s"] = 2.0
        if odd:
            with patch.object(torch.distributed, "all_gather", lambda *a, **k: os.kill(os.getpid(), signal.SIGSTOP)):
                yield
            return
    yield


told: dict[str, str] = {}
for case in cases:
    with fault(case):
        relative = case == "folder"
        try:
            if relative:
                update = {"output_dir": os.path.relpath(folder / "here", start=Path(__file__).parents[2])}
                arguments["run"] = run.model_copy(update=update)
            report = preflight(**arguments)
            told[case] = f"{report} | {' | '.join(report.warnings)}"
        except (TrainingError, CheckpointError) as error:
            told[case] = f"{type(error).__name__}: {error}"
    (folder / f"told-{ranks.rank}.json").write_text(json.dumps(told))
