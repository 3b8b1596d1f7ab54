"""Rounds of rollouts, pairs and DPO, and the policies: the base model, SFT, and one of each round, called as the round.

The rounds are `rounds` in params.yaml; stages/run/params.py reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.run.paths import LAST_ROUND, SFT_ADAPTER, RoundPaths

SHOWN = {"base": "base", "sft": "SFT", LAST_ROUND: "DPO"}


def shown(policy: str) -> str:
    """How a policy is called in tables and on the page."""
    return SHOWN.get(policy, policy)


def adapter_of(policy: str) -> Path | None:
    """The adapter on top of the base model; None for the base model itself."""
    if policy == "base":
        return None
    return SFT_ADAPTER if policy == "sft" else RoundPaths(policy).adapter


def policy_of(adapter: Path) -> str:
    """The policy that an adapter makes."""
    return "sft" if adapter == SFT_ADAPTER else adapter.name


def trainer_of(policy: str) -> str:
    """The stage that makes a policy: base, sft, or dpo@<round>."""
    return policy if policy in ("base", "sft") else f"dpo@{policy}"


def chain(starts: Mapping[str, str]) -> dict[str, str]:
    """Each round with the policy that it starts from, the first round first. `starts`: the adapters they start from.

    Raises ValueError, with the key in front, when they are not one chain from the SFT adapter to the last round.
    """
    for name in SHOWN:
        if (name in starts) != (name == LAST_ROUND):
            words = (
                "is missing; the last round is called so"
                if name == LAST_ROUND
                else "is the name of another policy"
            )
            raise ValueError(f"rounds.{name}: {words}")
    made_by = {RoundPaths(name).adapter.as_posix(): name for name in starts} | {SFT_ADAPTER.as_posix(): "sft"}
    found: dict[str, str] = {}
    name = LAST_ROUND
    while name != "sft":
        if name in found:
            raise ValueError(f"rounds.{name}.start: a circle; the first round starts from {SFT_ADAPTER}")
        if starts[name] not in made_by:
            words = f"no adapter of this run; choose one of {', '.join(sorted(made_by))}"
            raise ValueError(f"rounds.{name}.start: {words} (found '{starts[name]}')")
        found[name] = made_by[starts[name]]
        name = found[name]
    for name in starts:
        if name not in found:
            raise ValueError(
                f"rounds.{name}: no other round starts from it; rounds are one chain up to {LAST_ROUND}"
            )
    return dict(reversed(found.items()))


def policies_of(starts: Mapping[str, str]) -> tuple[str, ...]:
    """All policies, in the order of the pipeline."""
    return ("base", "sft", *chain(starts))


def compared(starts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Which policies are compared: each with the one it started from, and the last one with SFT and with the base."""
    steps = [("base", "sft"), *((before, name) for name, before in chain(starts).items())]
    return list(dict.fromkeys([*steps, ("sft", LAST_ROUND), ("base", LAST_ROUND)]))
