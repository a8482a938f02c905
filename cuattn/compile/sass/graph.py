"""Basic blocks of a function, its natural loops, and the path through a loop that counts as one iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cuattn.compile.sass.code import Function, Instruction

#: Nothing follows these where they have no predicate.
_ENDS = frozenset({"EXIT", "RET", "KILL", "BRX", "JMX"})
_JUMPS = frozenset({"BRA", "JMP"})
# Forms of BRA that jump only if the warp's lanes disagree, or agree, without a predicate that says so.
_CONDITIONAL = frozenset({"DIV", "CONV", "U", "ANY"})

#: What an iteration is chosen by: the most matrix work, then the least of everything else.
Weight = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that are always executed together, and the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(slots=True)
class Loop:
    """A natural loop.

    Attributes
    ----------
    header : int
        The block through which it is entered.
    blocks : set of int
        Its blocks, those of inner loops included.
    latches : set of int
        The blocks that jump back to the header.
    inner : list of Loop
        Loops inside, at any depth.
    """

    header: int
    blocks: set[int]
    latches: set[int]
    inner: list[Loop] = field(default_factory=list)


def blocks_of(function: Function) -> list[Block]:
    """The basic blocks in the order of their addresses; the first is the entry."""
    code = function.instructions
    starts = {0}
    for index, instruction in enumerate(code):
        starts |= {function.labels[target] for target in instruction.targets if target in function.labels}
        if instruction.targets or instruction.base in _ENDS:
            starts.add(index + 1)
    bounds = sorted(start for start in starts if start < len(code))
    number = {start: index for index, start in enumerate(bounds)}
    result = []
    for start, end in zip(bounds, [*bounds[1:], len(code)], strict=True):
        last = code[end - 1]
        following = [number[at] for at in (function.labels.get(label, -1) for label in last.targets) if at in number]
        if end < len(code) and _falls_through(last):
            following.append(number[end])
        result.append(Block(code[start:end], tuple(dict.fromkeys(following))))
    return result


def _falls_through(last: Instruction) -> bool:
    if last.predicate not in ("", "PT", "UPT"):
        return True
    if last.base in _ENDS:
        return False
    if last.base in _JUMPS:
        # With a second operand, a predicate, the jump depends on it.
        return bool(_CONDITIONAL & set(last.opcode.split("."))) or "," in last.operands
    return True


def order(blocks: list[Block]) -> dict[int, int]:
    """Number the blocks in reverse postorder from the entry; blocks that are never reached are left out."""
    if not blocks:
        return {}
    found = _postorder(0, lambda block: blocks[block].successors)
    return {block: place for place, block in enumerate(reversed(found))}


def _postorder(start: int, successors: Callable[[int], Iterable[int]]) -> list[int]:
    """What can be reached from `start`, each after all that it leads to but for what leads back."""
    seen, result = {start}, []
    stack = [(start, iter(successors(start)))]
    while stack:
        block, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(successors(successor))))
                break
        else:
            result.append(block)
            stack.pop()
    return result


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Every natural loop, outer ones before those inside."""
    place = order(blocks)
    predecessors: dict[int, list[int]] = {block: [] for block in place}
    for block in place:
        for successor in blocks[block].successors:
            predecessors[successor].append(block)
    dominator = _dominators(place, predecessors)
    loops: dict[int, Loop] = {}
    for block in place:
        for successor in blocks[block].successors:
            if _dominates(dominator, successor, block, place):
                loop = loops.setdefault(successor, Loop(successor, {successor}, set()))
                loop.latches.add(block)
                _collect(loop.blocks, block, predecessors)
    result = sorted(loops.values(), key=lambda loop: (-len(loop.blocks), place[loop.header]))
    for index, loop in enumerate(result):
        loop.inner = [other for other in result[index + 1 :] if other.header in loop.blocks]
    return result


def _dominators(place: Mapping[int, int], predecessors: Mapping[int, list[int]]) -> dict[int, int]:
    """Find immediate dominators of blocks (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm, 2001)."""
    entry, *others = place
    dominator = {entry: entry}
    for _ in place:
        changed = False
        for block in others:
            known = [other for other in predecessors[block] if other in dominator]
            new = known[0]
            for other in known[1:]:
                new = _meet(dominator, new, other, place)
            if dominator.get(block) != new:
                dominator[block], changed = new, True
        if not changed:
            break
    return dominator


def _meet(dominator: Mapping[int, int], a: int, b: int, place: Mapping[int, int]) -> int:
    while a != b:
        if place[a] > place[b]:
            a = dominator[a]
        else:
            b = dominator[b]
    return a


def _dominates(dominator: Mapping[int, int], above: int, block: int, place: Mapping[int, int]) -> bool:
    while place[block] > place[above]:
        block = dominator[block]
    return block == above


def _collect(into: set[int], block: int, predecessors: Mapping[int, list[int]]) -> None:
    pending = [block]
    while pending:
        block = pending.pop()
        if block not in into:
            into.add(block)
            pending += predecessors[block]


def iteration(blocks: list[Block], loop: Loop, weigh: Callable[[Iterable[Instruction]], Weight]) -> list[Instruction]:
    """The instructions of one iteration.

    A loop may have branches: tiles with a mask and without, waits that are over at once or not. Of all paths from the
    header to a jump back this is the heaviest by `weigh`. A loop inside counts once.
    """
    return _heaviest(blocks, loop.blocks, loop.header, loop.latches, loop.inner, weigh)


def straight(
    blocks: list[Block], loops: list[Loop], weigh: Callable[[Iterable[Instruction]], Weight]
) -> list[Instruction]:
    """The instructions of a whole function, from its entry to its end, each loop once."""
    place = order(blocks)
    if not place:
        return []
    ends = {block for block in place if not blocks[block].successors}
    return _heaviest(blocks, set(place), 0, ends, loops, weigh)


def _heaviest(
    blocks: list[Block],
    inside: set[int],
    start: int,
    ends: set[int],
    inner: list[Loop],
    weigh: Callable[[Iterable[Instruction]], Weight],
) -> list[Instruction]:
    place = order(blocks)
    # Without the edges that go back, nothing is visited twice.
    following = {
        block: [after for after in blocks[block].successors if after in inside and place[after] > place[block]]
        for block in inside
    }
    for loop in inner:
        # A loop that tests at its head ends in jumps back only: from there on, it goes where the loop is left to.
        exits = {after for block in loop.blocks for after in blocks[block].successors} - loop.blocks
        for latch in loop.latches:
            following[latch] += sorted(exits & inside)
    best: dict[int, tuple[Weight, int | None]] = {}
    for block in _postorder(start, following.__getitem__):
        choices: list[tuple[Weight, int | None]] = [((0.0, 0.0), None)] if block in ends else []
        choices += [(best[after][0], after) for after in following[block] if after in best]
        if choices:
            (work, cost), following_block = max(choices, key=lambda choice: choice[0])
            own_work, own_cost = weigh(blocks[block].instructions)
            best[block] = (own_work + work, own_cost + cost), following_block
    path: list[Instruction] = []
    at: int | None = start if start in best else None
    while at is not None:
        path += blocks[at].instructions
        at = best[at][1]
    return path
