"""What this machine has: its cards with their free memory, and its RAM, as a target, with words on how that was found.

Free memory is what nobody else holds at this moment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reapc.errors import ReapcError
from reapc.probes import Card, Host, amd_cards, apple, available_ram, nvidia_cards
from reapc.target import ASSUMED_RAM_BANDWIDTH, Target
from reapc.units import format_bytes

__all__ = ["Card", "Host", "Machine", "detect"]


_RAM_BANDWIDTH = f"the RAM's bandwidth cannot be read: {ASSUMED_RAM_BANDWIDTH / 1e9:.0f}e9 bytes per second are assumed"


@dataclass(frozen=True)
class Machine:
    """The target that this machine is, all cards seen, and the findings in words."""

    target: Target
    cards: tuple[Card, ...]
    findings: tuple[str, ...]


def detect(host: Host | None = None) -> Machine:
    """This machine. ReapcError when neither a card nor the RAM can be read."""
    host = host or Host()
    findings: list[str] = []
    if host.system == "Darwin":
        cards, ram_bytes = apple(host, findings)
    else:
        ram_bytes = available_ram(host, findings)
        cards = nvidia_cards(host, ram_bytes, findings) or amd_cards(host, ram_bytes, findings)
    chosen = _choose(cards, findings)
    if not chosen and not ram_bytes:
        raise ReapcError(
            f"cannot tell what this machine has: {'; '.join(findings)}", hint="say it: --vram 24GB --gpus 1 --ram 64GB"
        )
    return Machine(_target(chosen, ram_bytes), tuple(cards), tuple(findings))


def _target(cards: list[Card], ram_bytes: int) -> Target:
    source = "read from this machine when the command ran"
    if not cards:
        description = f"no card; {format_bytes(ram_bytes)} of RAM available"
        return Target(
            name="this machine",
            description=description,
            ram=ram_bytes,
            bandwidth=ASSUMED_RAM_BANDWIDTH,
            assumptions=_RAM_BANDWIDTH,
            source=source,
        )
    first = cards[0]
    vram = min(card.free_bytes for card in cards)
    shared = sum(min(card.shared_bytes, vram) for card in cards)
    capabilities = [card.compute_capability for card in cards if card.compute_capability]
    bandwidths = [card.bandwidth for card in cards if card.bandwidth]
    names = list(dict.fromkeys(card.name for card in cards))
    left = max(0, ram_bytes - shared)
    linked = all(card.nvlink for card in cards)
    return Target(
        name="this machine",
        description=f"{len(cards)} x {' and '.join(names)}, {format_bytes(vram)} free on the fullest; "
        f"{format_bytes(left)} of RAM available",
        gpus=len(cards),
        card=re.sub(r"^(NVIDIA|AMD) (GeForce )?", "", first.name) if len(names) == 1 else "mixed card",
        kind=first.kind,
        vram=vram,
        # the largest: vLLM takes a fraction of each card's own total, and none may ask for more than is free
        vram_total=max(card.total_bytes for card in cards),
        ram=left,
        bandwidth=min(bandwidths) if len(bandwidths) == len(cards) else None,
        compute_capability=min(capabilities, key=_version) if len(capabilities) == len(cards) else None,
        arch=first.arch if len({card.arch for card in cards}) == 1 else "",
        interconnect="unified" if first.shared_bytes else "nvlink" if linked else "pcie",
        unified=bool(first.shared_bytes),
        geforce=any("GeForce" in card.name for card in cards),
        assumptions="" if first.shared_bytes else _RAM_BANDWIDTH,
        source=source,
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _choose(cards: list[Card], findings: list[str]) -> list[Card]:
    """The cards to plan for. A target has one size of card, so n cards count as n times the fullest one's free memory;
    the n that makes the most of it is taken."""
    usable = sorted((card for card in cards if card.free_bytes > 0), key=lambda card: (-card.free_bytes, card.index))
    if not usable:
        return []
    count = max(range(1, len(usable) + 1), key=lambda n: (n * usable[n - 1].free_bytes, -n))
    chosen = sorted(usable[:count], key=lambda card: card.index)
    names = {card.name for card in chosen}
    vram = min(card.free_bytes for card in chosen)
    if len(names) > 1:
        findings.append(
            f"the {count} cards are not the same: all are planned as the one with the least free memory, {vram} bytes, "
            "and the lowest compute capability"
        )
    elif any(card.free_bytes - vram > vram // 20 for card in chosen):
        findings.append(f"free memory differs: all {count} cards are planned with the least of them, {vram} bytes")
    if count < len(cards):
        left = [
            f"{card.index} ({card.name}, {format_bytes(card.free_bytes)} free)" for card in cards if card not in chosen
        ]
        indices = ",".join(str(card.index) for card in chosen)
        order, variable = (
            ("CUDA_DEVICE_ORDER=PCI_BUS_ID ", "CUDA_VISIBLE_DEVICES")
            if chosen[0].kind == "cuda"
            else ("", "HIP_VISIBLE_DEVICES")
        )
        findings.append(
            f"left out, because the others hold more without it: card {', '.join(left)}; "
            f"serve with {order}{variable}={indices}"
        )
    return chosen
