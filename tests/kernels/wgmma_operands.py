"""Looks in Hopper's machine code for registers that are written while a wgmma may still read its operand from them.

A wgmma reads an operand in registers until a wait says that it is done. ptxas watches over that only for what PTX itself
leaves alone meanwhile: a loop that decodes its next operand into the variable of the last one, before the wait, computes with
mixtures of both, now and then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# What has no register as its destination, or none at the place where others have theirs.
_WRITES_NOTHING = re.compile(
    r"ST|BAR|BRA|EXIT|SYNCS|UTMA|RED|MEMBAR|FENCE|WARPGROUP|DEPBAR|[A-Z]*SETP|PLOP3|VOTEU|R2UR|ELECT|NOP|ERRBAR|CCTL|WARPSYNC"
)
_GROUPS = 4  # so many in flight are told apart


@dataclass
class _Instruction:
    text: str
    writes: set[int] = field(default_factory=set)
    operand: set[int] = field(default_factory=set)  # of a wgmma
    commits: bool = False  # a group of wgmma
    waits: int | None = None  # until no more than so many groups are in flight
    next: list[int] = field(default_factory=list)


def _register(text: str) -> int | None:
    found = re.fullmatch(r"R(\d+)(?:\.\w+)*", text)
    return int(found[1]) if found else None


def _width(operation: str) -> int:
    """Registers that an operation writes."""
    if ".128" in operation or operation.endswith(".4"):
        return 4
    return 2 if ".64" in operation or ".WIDE" in operation or operation.endswith(".2") or operation == "CS2R" else 1


def _parsed(code: Sequence[tuple[int, str]]) -> list[_Instruction]:
    index = {address: i for i, (address, _) in enumerate(code)}
    made = []
    for i, (_, text) in enumerate(code):
        one = _Instruction(text)
        predicate, bare = re.fullmatch(r"(@!?U?P\w+\s+)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        operation, _, rest = bare.partition(" ")
        arguments = [argument.strip() for argument in rest.split(",")]
        if "GMMA" in operation:
            first = _register(arguments[1])
            one.operand = set() if first is None else set(range(first, first + 4))
            one.commits = "gsb0" in rest
        elif operation.startswith("WARPGROUP.DEPBAR"):
            one.waits = int(arguments[-1], 16)
        elif not _WRITES_NOTHING.match(operation):
            # A carry or a predicate may come first.
            found = next((n for n in map(_register, arguments[: 1 + arguments[0].startswith("P")]) if n is not None), None)
            one.writes = set() if found is None else set(range(found, found + _width(operation)))
        if operation.startswith("BRA"):
            to = re.search(r"0x([0-9a-f]+)", rest)
            one.next = [index[int(to[1], 16)]] if to and int(to[1], 16) in index else []
        if not operation.startswith(("BRA", "BRX", "EXIT", "RET")) or predicate:
            one.next.append(i + 1)
        made.append(one)
    return made


def overwritten(code: Sequence[tuple[int, str]]) -> list[str]:
    """For every wgmma of a kernel, given as (address, instruction), what may write its operand before the wait for it."""
    instructions = _parsed(code)
    found = []
    for start in instructions:
        ahead = [(i, int(start.commits)) for i in start.next] if start.operand else []
        seen = set()
        while ahead:
            state = i, groups = ahead.pop()  # groups committed since, this wgmma's own among them
            if state in seen or i >= len(instructions):
                continue
            seen.add(state)
            one = instructions[i]
            if one.waits is not None and one.waits < groups:
                continue
            if one.writes & start.operand:
                found.append(f"{start.text} | {one.text}")
            groups = min(groups + one.commits, _GROUPS)
            ahead += [(following, groups) for following in one.next]
    return found
