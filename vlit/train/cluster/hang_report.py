"""Who is to blame for a hang, and the report that says so. Pure functions of what the ranks published."""

from __future__ import annotations

from collections.abc import Sequence

from vlit.train.cluster.peers import Peer

_SHOWN = 32  # rows of the table
_NOBODY = (
    "every rank waits in a collective. Either the network does not carry it (try NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME with "
    "the name of the right interface), or the ranks disagree about which collective comes next"
)


def name_of(peer: Peer) -> str:
    return f"rank {peer.rank} (host {peer.host}, pid {peer.pid})"


def culprits(peers: Sequence[Peer]) -> list[tuple[Peer, str]]:
    """The ranks that hold the others up, each with the reason: first those that are gone, else those that are stuck in work of
    their own, else those that are a step behind. Empty when all wait alike."""
    gone = [(p, why) for p in peers if (why := _gone(p))]
    if gone:
        return gone
    own = [p for p in peers if not p.collective]
    own = [p for p in own if p.left is not None and p.left <= 0] or own
    if own:
        least = min(p.step for p in own)
        return [
            (p, f'is in "{p.phase}" of step {p.step} since {p.seconds:.1f} s, which waits for nobody else')
            for p in own
            if p.step == least
        ]
    least = min(p.step for p in peers)
    if any(p.step != least for p in peers):
        return [
            (p, f'is behind: it waits in "{p.phase}" of step {p.step}, others are further')
            for p in peers
            if p.step == least
        ]
    return []


def _gone(peer: Peer) -> str | None:
    last = f'last seen in "{peer.phase}" of step {peer.step}'
    if peer.ended is not None:
        return f"left the run ({peer.ended}); {last}"
    if peer.gone:
        return f"does not run any more (killed or crashed); {last}"
    if peer.silent:
        return f"gives no sign of life (process stopped, or host dead or unreachable); {last}"
    return None


def hang_report(me: Peer, others: dict[int, Peer] | None, world_size: int, *, limit_s: float) -> str:
    """The text for people: who, where, since when, and what to do. ``others`` None: the store did not answer."""
    peers = [me, *(others or {}).values()]
    peers.sort(key=lambda p: p.rank)
    lines = [
        "",
        f'hang: {name_of(me)} is in "{me.phase}" of step {me.step} since {me.seconds:.1f} s, the limit is {limit_s:g} s '
        "(runtime.hang_timeout_s).",
    ]
    missing = sorted(set(range(world_size)) - {p.rank for p in peers})
    if others is None:
        lines.append(
            "The other ranks cannot be asked: the store of torchrun does not answer. Look at the host of rank 0."
        )
    elif missing:
        lines.append(f"culprit: rank {', '.join(map(str, missing))}: never reached training.")
    found = culprits(peers)
    lines += [f"culprit: {name_of(peer)} {why}." for peer, why in found]
    if not found and world_size > 1 and not missing:
        lines.append(f"culprit: none stands out; {_NOBODY}.")
    if world_size > 1:
        blamed = {peer.rank for peer, _ in found}
        shown = sorted(peers, key=lambda p: (p.rank not in blamed, p.rank))[:_SHOWN]
        lines += ["", f"{'rank':>5}  {'phase':<20} {'step':>8} {'since':>9}  {'heartbeat':<9}  process"]
        lines += [
            f"{p.rank:>5}  {p.phase[:20]:<20} {p.step:>8} {p.seconds:>7.1f} s  {_pulse(p):<9}  pid {p.pid} on {p.host}"
            for p in shown
        ]
        if len(shown) < len(peers):
            lines.append(f"       and {len(peers) - len(shown)} more ranks")
    lines += [
        "",
        "Start the same command again to go on from the newest checkpoint. If the phase is only slow, raise "
        "runtime.hang_timeout_s. Stacks of this process:",
        "",
        "",
    ]
    return "\n".join(lines)


def _pulse(peer: Peer) -> str:
    if peer.ended is not None:
        return "left"
    return "gone" if peer.gone else "none" if peer.silent else "alive"
