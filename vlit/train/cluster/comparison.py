"""What is wrong with the facts of all processes: pure functions from facts to problems and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]

MAX_CLOCK_SKEW_S = 60.0
GB = 10**9


def problems_of(facts: Sequence[Facts]) -> list[str]:
    """Everything that must be mended before the run, one sentence each with both values and the fix."""
    found: list[str] = []
    for package in dict.fromkeys(name for f in facts for name in f["versions"]):
        found += differing(
            facts,
            package,
            lambda f, package=package: f["versions"].get(package, "not installed"),
            "Install the same version on every host (vlit: the same checkout).",
        )
    found += differing(
        facts, "device kind", lambda f: "cpu" if f["device"].startswith("cpu") else "cuda", "Set runtime.device."
    )
    found += differing(facts, "precision", lambda f: f["precision"], "Set runtime.precision to bf16 or fp32 for all.")
    for name in dict.fromkeys(name for f in facts for name in f["data"]):
        found += differing(
            facts,
            f"content of dataset {name}",
            lambda f, name=name: f["data"].get(name, "missing"),
            "Copy the same file to every host, or put it on a shared file system.",
        )
    for host, members in _by_host(facts).items():
        first = members[0]
        shm_needed = sum(f["shm_needed"] for f in members)
        if first["shm_free"] is not None and first["shm_free"] < shm_needed:
            found.append(
                f"/dev/shm on host {host}: {sum(f['workers'] for f in members)} data workers hand over up to "
                f"{size(shm_needed)} through it, {size(first['shm_free'])} are free. Set data.num_workers=0, or give the "
                f"container more (docker run --shm-size={max(1, -(-2 * shm_needed // 2**30))}g, or --ipc=host)."
            )
    return found


def config_problem(facts: Sequence[Facts], leaves: Mapping[int, Mapping[str, Any]]) -> str | None:
    """How the configurations differ, key by key. ``leaves``: rank -> dotted key -> value, for one rank of each digest."""
    keys = sorted({key for held in leaves.values() for key in held})
    first, *rest = sorted(leaves)
    lines = [
        f"{key}: {leaves[first].get(key)!r} on rank {first}, {leaves[rank].get(key)!r} on rank {rank}"
        for rank in rest
        for key in keys
        if leaves[first].get(key) != leaves[rank].get(key)
    ]
    if not lines:
        return None
    groups = "; ".join(f"{value} on {where}" for value, where in _groups(facts, lambda f: f["config"]).items())
    more = f" (and {len(lines) - 6} more)" if len(lines) > 6 else ""
    return (
        f"the configuration differs ({groups}): {'; '.join(lines[:6])}{more}. Start every process with the same file and "
        "overrides."
    )


def warnings_of(facts: Sequence[Facts], *, memory_bytes: int) -> list[str]:
    """What may go badly, but need not."""
    found = differing(facts, "device", lambda f: f["device"], "The slowest one sets the pace of all.")
    for host, members in _by_host(facts).items():
        threads, cores = sum(f["threads"] for f in members), max(f["cores"] for f in members)
        if threads > cores and members[0]["device"].startswith("cpu"):
            found.append(
                f"host {host}: {len(members)} processes use {threads} threads on {cores} cores. Lower OMP_NUM_THREADS or "
                "runtime.num_threads."
            )
        shares = len(members) if members[0]["device"].startswith("cpu") else 1
        free = min(f["memory_free"] for f in members) // shares
        if free < memory_bytes:
            found.append(
                f"host {host}: a process needs about {size(memory_bytes)} of memory, {size(free)} are free for each. Use "
                "runtime.strategy zero2 or zero3, lora, or a smaller micro_batch_tokens."
            )
        cache = members[0]["cache_free"]
        if cache is not None and cache < GB:
            found.append(f"data.cache_dir {members[0]['cache_dir']} on host {host}: only {size(cache)} are free.")
    wanted = {f["precision"] for f in facts}
    if "bfloat16" in wanted and not all(f["bf16"] for f in facts):
        where = ranks_text([f for f in facts if not f["bf16"]])
        found.append(f"precision bf16 is not native on {where} and will be slow. Consider runtime.precision: fp32.")
    nccl = differing(facts, "NCCL environment", lambda f: _nccl(f), "Export the same NCCL_* variables on every host.")
    return found + nccl


def clock_warning(clocks: Mapping[int, float], facts: Sequence[Facts]) -> str | None:
    """``clocks``: rank -> its time right after a collective that ends everywhere at once."""
    low, high = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[high] - clocks[low]
    if skew <= MAX_CLOCK_SKEW_S:
        return None
    ahead, behind = (ranks_text([f for f in facts if f["rank"] == rank]) for rank in (high, low))
    return f"the clock of {ahead} is {skew:.0f} s ahead of that of {behind}. Run an NTP client; file times will not compare."


def differing(facts: Sequence[Facts], what: str, value: Any, fix: str) -> list[str]:
    """No sentence, or one that names every value with its ranks, the most common first."""
    groups = _groups(facts, value)
    if len(groups) < 2:
        return []
    return [f"{what} differs: {'; '.join(f'{held} on {where}' for held, where in groups.items())}. {fix}"]


def ranks_text(facts: Sequence[Facts]) -> str:
    """``rank 3 (host b)``, ``ranks 0-7 (host a)``, ``ranks 0-7, 9 (hosts a, b)``."""
    numbers, hosts = sorted(f["rank"] for f in facts), list(dict.fromkeys(f["host"] for f in facts))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {text} (host{'s' if len(hosts) > 1 else ''} {shown})"


def size(count: float) -> str:
    """1,234,000,000 -> ``1.2 GB``."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} bytes"


def _groups(facts: Iterable[Facts], value: Any) -> dict[str, str]:
    members: dict[str, list[Facts]] = {}
    for fact in facts:
        members.setdefault(str(value(fact)), []).append(fact)
    return {held: ranks_text(who) for held, who in sorted(members.items(), key=lambda kv: -len(kv[1]))}


def _by_host(facts: Iterable[Facts]) -> dict[str, list[Facts]]:
    found: dict[str, list[Facts]] = {}
    for fact in facts:
        found.setdefault(fact["host"], []).append(fact)
    return found


def _nccl(fact: Facts) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(fact["environment"].items()) if k.startswith("NCCL_")) or "none"
