"""Before weights are loaded: do all processes have the same versions, configuration and data, room to write, and a network?

The processes talk over the key-value store of the process group, not over its collectives: the store has time limits, and a
rank that does not come can be named. Rank 0 compares and tells the verdict, and an error is raised on every rank, so that
nobody waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlit.config.schema import RunConfig
from vlit.errors import CheckpointError, TrainingError
from vlit.train.cluster import collectives, comparison, facts
from vlit.train.cluster.comparison import ranks_text, size
from vlit.train.cluster.meeting import Meeting
from vlit.train.cluster.needs import Needs, StageNeed, needs_of, process_bytes
from vlit.train.distributed import Ranks

PROBE = ".preflight"


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What was found, the same on every rank."""

    ranks: tuple[Mapping[str, Any], ...]
    """The facts of each rank (`vlit.train.cluster.facts`)."""
    warnings: tuple[str, ...]
    backend: str
    gb_per_s: float
    """Of an all_reduce; 0 for one process."""
    seconds: float

    def __str__(self) -> str:
        hosts = len({f["host"] for f in self.ranks})
        free = [f["output_free"] for f in self.ranks if f["output_free"] is not None]
        words = [f"{_count(len(self.ranks), 'rank')} on {_count(hosts, 'host')}"]
        words += [f"{self.backend}, all_reduce {self.gb_per_s:.1f} GB/s"] if self.gb_per_s else []
        words += [f"disk {size(min(free))} free"] if free else []
        return f"preflight: {', '.join(words)}, {self.seconds:.1f} s"


def preflight(
    run: RunConfig,
    ranks: Ranks,
    *,
    identities: Mapping[str, Any],
    problems: Sequence[str] = (),
    only: str | None = None,
    timeout_s: float = 300.0,
    collective_timeout_s: float = 60.0,
) -> PreflightReport:
    """Compare all processes and try what the run will need. Called by every rank.

    Args:
        identities: dataset -> content hash, as this rank sees them (:func:`vlit.train.identity.data_identities`).
        problems: what this rank already found wrong, so that the others hear of it and do not wait.
        only: the one stage that will be trained; default: every stage that is not finished.
        timeout_s: how long the ranks wait for the last one to arrive.
        collective_timeout_s: how long one small collective may take.

    Raises:
        TrainingError: on every rank, with everything that has to be mended.
        CheckpointError: instead, when all that is wrong is a disk that is too small.
    """
    started, store = time.perf_counter(), Meeting(ranks, "preflight")
    needs = needs_of(run, ranks, only)
    with _probe(Path(run.output_dir), ranks) as probe_problem:
        mine: dict[str, Any] = {"rank": ranks.rank, "host": socket.gethostname()}
        try:
            mine = facts.gather_facts(run, ranks, identities)
            mine["problems"] = [
                *problems,
                *probe_problem,
                *needs.problems,
                *facts.offload_problems(run.runtime.offload),
            ]
        except Exception as error:  # an error of one rank is everybody's, or they would wait for it
            mine["problems"] = [f"facts cannot be gathered: {type(error).__name__}: {error}"]
        store.publish("config", facts.config_leaves(run))
        gathered = store.gather("facts", mine, timeout_s)
        verdict = store.decide("compared", lambda: _compare(gathered, store, run, needs), timeout_s=timeout_s + 30)
        _raise(verdict, ranks)
        tried = collectives.try_collectives(ranks, limit_s=collective_timeout_s) if ranks.world_size > 1 else {}
        tried["sees_output"] = _sees_probe(Path(run.output_dir))
        limit = 3 * collective_timeout_s + 10
        outcome = store.gather("tried", tried, limit)
        verdict = store.decide("tried", lambda: _judge(gathered, outcome, run, needs), timeout_s=2 * limit)
    _raise(verdict, ranks)
    backend = str(torch.distributed.get_backend()) if ranks.world_size > 1 else "none"
    report = PreflightReport(
        tuple(verdict["facts"]), tuple(verdict["warnings"]), backend, verdict["gb_per_s"], time.perf_counter() - started
    )
    if ranks.is_main:
        for warning in report.warnings:
            print(f"warning: preflight: {warning}", file=sys.stderr)
        print(report, file=sys.stderr)
    return report


def _compare(gathered: dict[int, Any], store: Meeting, run: RunConfig, needs: Needs) -> dict[str, Any]:
    held = [gathered[rank] for rank in sorted(gathered)]
    found = [f"rank {rank} did not arrive. Look at its log; it may still be reading data." for rank in store.missing]
    told: dict[str, list[Any]] = {}
    for fact in held:
        for problem in fact["problems"]:
            told.setdefault(problem, []).append(fact)
    found += [
        problem if len(who) == len(held) == store.world_size else f"{ranks_text(who)}: {problem}"
        for problem, who in told.items()
    ]
    complete = [fact for fact in held if "versions" in fact]
    by_digest = {fact["config"]: fact["rank"] for fact in reversed(complete)}
    if len(by_digest) > 1:
        differing = comparison.config_problem(
            complete, {rank: store.note_of("config", rank) for rank in by_digest.values()}
        )
        found += [differing] if differing else []
    found += comparison.problems_of(complete)
    found += _memory_problems(needs, complete)
    lacking = _disk_problems(needs.stages, complete, Path(run.output_dir))
    return {"problems": found + lacking, "spokesmen": _spokesmen(complete), "only_disk": not found}


def _judge(gathered: dict[int, Any], outcome: dict[int, Any], run: RunConfig, needs: Needs) -> dict[str, Any]:
    held = [gathered[rank] for rank in sorted(gathered)]
    found = []
    lost = [fact for fact in held if fact["rank"] not in outcome]
    if lost:
        found.append(
            f"{ranks_text(lost)} stopped answering during the test of the collectives (pid "
            f"{', '.join(str(f['pid']) for f in lost)}). Look at that process and host."
        )
    failed = [fact for fact in held if (outcome.get(fact["rank"]) or {}).get("error")]
    if failed and not lost:
        found.append(
            f"a collective failed on {ranks_text(failed)}: {outcome[failed[0]['rank']]['error']}. Check that the hosts reach "
            "each other on all ports; with several networks name the right one (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."
        )
    wrong = [text for rank in sorted(outcome) for text in outcome[rank].get("wrong", [])]
    if wrong:
        found.append(
            f"collectives give wrong answers: {'; '.join(wrong[:6])}. Look for a defective device or cable on that rank's "
            "host; try NCCL_P2P_DISABLE=1."
        )
    blind = [fact for fact in held if fact["rank"] in outcome and not outcome[fact["rank"]]["sees_output"]]
    if blind:
        found.append(
            f"output_dir {run.output_dir} on {ranks_text(blind)} is not the folder that rank 0 on host {held[0]['host']} "
            "writes to. Use a path on a shared file system."
        )
    warnings = [*needs.warnings, *comparison.warnings_of(held, memory_bytes=process_bytes(needs))]
    warnings += _loading_warnings(needs.stages, held)
    clocks = {rank: result["clock"] for rank, result in outcome.items() if "clock" in result}
    skew = comparison.clock_warning(clocks, held) if len(clocks) > 1 else None
    rates = [result["gb_per_s"] for result in outcome.values() if result.get("gb_per_s")]
    return {
        "problems": found,
        "spokesmen": _spokesmen(held),
        "warnings": warnings + ([skew] if skew else []),
        "facts": held,
        "gb_per_s": min(rates, default=0.0),
    }


def _disk_problems(needs: Sequence[StageNeed], facts: Sequence[Mapping[str, Any]], output: Path) -> list[str]:
    """The stage that lacks most room in ``output``, by the host that sees least of it; nothing when all fit."""
    free = min((f["output_free"] for f in facts if f["output_free"] is not None), default=None)
    if free is None or not needs:
        return []
    worst = max(needs, key=lambda need: need.room.needed + need.earlier - need.there)
    problem = worst.room.problem(output / worst.room.stage, free + worst.there, worst.earlier)
    return [] if problem is None else [problem]


def _memory_problems(needs: Needs, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hosts whose free memory is below what the largest stage holds there at least."""
    found: list[str] = []
    if needs.sharing is None:
        return found
    for host, members, free in _hosts(facts):
        first = any(f["rank"] == 0 for f in members)
        wanted = {n.room.stage: needs.sharing.on_host(n.weights, len(members), loads_all=first) for n in needs.stages}
        stage = max(wanted, key=wanted.__getitem__, default="")
        if wanted and free < wanted[stage]:
            processes = f"its {len(members)} processes need" if len(members) > 1 else "it needs"
            found.append(
                f"host {host}: stage {stage} does not fit its memory: {processes} at least {size(wanted[stage])}, "
                f"{size(free)} are free. Train fewer weights (stages.{stage}.tuning: lora or frozen), set model.llm.quantize, "
                "divide them over more hosts (runtime.strategy zero2 or zero3), or take a host with more memory."
            )
    return found


def _loading_warnings(needs: Sequence[StageNeed], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hosts whose free memory does not hold the weights once."""
    whole = max((need.weights.whole for need in needs), default=0)
    return [
        f"host {host}: the weights take {size(whole)} while they are loaded, {size(free)} of memory are free. Loading will be "
        "slow, or the system will kill it."
        for host, _, free in _hosts(facts)
        if free < whole
    ]


def _hosts(facts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]], int]]:
    for host in dict.fromkeys(f["host"] for f in facts):
        members = [f for f in facts if f["host"] == host]
        yield host, members, min(f["ram_free"] for f in members)


def _raise(verdict: Mapping[str, Any], ranks: Ranks) -> None:
    """The same error on every rank; the first rank of each host tells the whole story, its neighbours point to it."""
    problems, spokesmen = verdict["problems"], verdict["spokesmen"]
    if not problems:
        return
    kind = CheckpointError if verdict.get("only_disk") else TrainingError
    if spokesmen and ranks.rank not in spokesmen:
        raise kind("preflight failed on all ranks; the first rank of this host says why")
    if len(problems) == 1:
        raise kind(f"preflight: {problems[0]}")
    listed = " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
    raise kind(f"preflight found {len(problems)} problems: {listed}")


def _spokesmen(held: Sequence[Mapping[str, Any]]) -> list[int]:
    first: dict[str, int] = {}
    for fact in held:
        first.setdefault(fact["host"], fact["rank"])
    return list(first.values())


@contextlib.contextmanager
def _probe(output: Path, ranks: Ranks) -> Iterator[list[str]]:
    """A file that rank 0 leaves in ``output_dir`` and the others look for; yields rank 0's problem in writing it."""
    path, problem = output / PROBE, []
    if ranks.is_main:
        try:
            output.mkdir(parents=True, exist_ok=True)
            path.write_text("vlit preflight: may be deleted\n", encoding="utf-8")
        except OSError as error:
            problem = [
                f"output_dir {output}: cannot be written by user {os.getuid()} ({error.strerror}). Make it writable, or set "
                "output_dir to a folder that is."
            ]
    try:
        yield problem
    finally:
        if ranks.is_main:
            with contextlib.suppress(OSError):
                path.unlink()


def _sees_probe(output: Path) -> bool:
    until = time.monotonic() + 4.0  # network file systems may cache a listing for some seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if PROBE in os.listdir(output):
                return True
        time.sleep(0.2)
    return False


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"
