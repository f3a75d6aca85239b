"""What is wrong with a compiled kernel, read from its Triton IR, its PTX and the log of ptxas.

Each check is a function of text. A main loop is a loop of the PTX that holds matrix instructions;
what loops inside of it hold is theirs. Loops are found by back edges: jumps to a block that every
way to the jump passes through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# Bytes that a block may have at most (the opt-in limit of the CUDA programming guide, compute
# capabilities).
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
MATRIX_UNIT = {
    80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma",
    120: "mma.sync",
}  # fmt: skip

WIDE = 16  # bytes of the widest load of a thread
_FEWEST_FMA = 32  # in a loop that multiplies tiles without the matrix unit; others hold fewer

_LABEL = re.compile(r"^(\$L__BB\w+):")
_JUMP = re.compile(r"^(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
_LOAD = re.compile(r"\bld\.global(?:\.(?!v\d|[bfsu]\d)\w+(?:::\w+)*)*(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b[^,]*,[^,]*,\s*(0x[0-9a-fA-F]+|\d+)")


# --- loops --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    lines: tuple[str, ...]
    targets: tuple[int, ...]


def _blocks(ptx: str) -> list[_Block]:
    """The basic blocks of a kernel in their order, with the numbers of those that may follow."""
    parts: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in map(str.strip, ptx.splitlines()):
        if label := _LABEL.match(line):
            parts.append([])
            labels[label[1]] = len(parts) - 1
        parts[-1].append(line)
        if _JUMP.match(line) or re.match(r"ret\s*;", line):
            parts.append([])
    blocks = []
    for number, lines in enumerate(parts):
        last = lines[-1] if lines else ""
        jump = _JUMP.match(last)
        targets = [labels[jump[2]]] if jump and jump[2] in labels else []
        goes_on = not re.match(r"ret\s*;", last) and (jump is None or jump[1] is not None)
        if goes_on and number + 1 < len(parts):
            targets.append(number + 1)
        blocks.append(_Block(tuple(lines), tuple(targets)))
    return blocks


def _dominators(blocks: list[_Block]) -> dict[int, set[int]]:
    """Of each block that is reached those that every way to it passes through."""
    reached, todo = {0}, [0]
    while todo:
        new = set(blocks[todo.pop()].targets) - reached
        reached |= new
        todo += new
    sources: dict[int, list[int]] = {number: [] for number in sorted(reached)}
    for number in reached:
        for target in blocks[number].targets:
            sources[target].append(number)
    found = {number: set(reached) for number in sources} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in [number for number in sources if number]:
            now = {number} | set.intersection(*(found[source] for source in sources[number]))
            changed |= now != found[number]
            found[number] = now
    return found


def loops(ptx: str, innermost: bool = False) -> list[str]:
    """The text of each loop, without what the loops inside of it hold, or of the innermost ones."""
    blocks = _blocks(ptx)
    dominators = _dominators(blocks)
    bodies: dict[int, set[int]] = {}
    for number in dominators:
        for head in blocks[number].targets:
            if head in dominators[number]:
                body, todo = bodies.setdefault(head, {head}), [number]
                while todo:
                    if (each := todo.pop()) not in body:
                        body.add(each)
                        todo += [i for i in dominators if each in blocks[i].targets]
    texts = []
    for body in bodies.values():
        inner = set[int]().union(*(other for other in bodies.values() if other < body))
        if inner and innermost:
            continue
        lines = [line for number in sorted(body - inner) for line in blocks[number].lines]
        texts.append("\n".join(lines))
    return texts


def main_loops(ptx: str) -> list[str]:
    """The loops that hold matrix instructions."""
    return [loop for loop in loops(ptx) if _MATRIX.search(loop)]


def loaded(text: str) -> Counter[int]:
    """How many loads and copies from global memory there are, by bytes of a thread."""
    widths: Counter[int] = Counter()
    for vector, bits in _LOAD.findall(text):
        widths[int(vector or 1) * int(bits) // 8] += 1
    widths.update(int(size, 0) for size in _COPY.findall(text))
    return widths


# --- checks: what is wrong, in words --------------------------------------------------------------


def spills(log: str) -> list[str]:
    """Registers that ptxas keeps in memory."""
    found = re.search(r"(\d+) bytes spill stores", log)
    return [f"spills {found[1]} bytes"] if found and int(found[1]) else []


def serialised(log: str) -> list[str]:
    """wgmma that ptxas makes wait for one another."""
    return ["serialised matrix instructions"] if "serialized" in log else []


def drained(ptx: str) -> list[str]:
    """Main loops that wait in each step for the products of this step."""
    wait = re.compile(r"\bwgmma\.wait_group\.sync\.aligned\s+0\b")
    found = sum(bool(wait.search(loop)) for loop in main_loops(ptx))
    return [f"wgmma.wait_group 0 in {found} main loops"] if found else []


def meant_for_matrix_unit(ttir: str) -> bool:
    """Whether a product has operands of 16 or fewer bits, or may round float32 to tf32."""
    products = re.finditer(r"\btt\.dot(?:_scaled)?\b.*?tensor<[\dx]+x(\w+?)[,>].*", ttir)
    return any(p[1] != "f32" or "tf32" in p[0].lower() for p in products)


def off_the_matrix_unit(ttir: str, ptx: str, capability: int) -> list[str]:
    """Products that are meant for the matrix unit, and run on another one or an older way."""
    if not meant_for_matrix_unit(ttir):
        return []
    problems = []
    if MATRIX_UNIT[capability] not in ptx:
        problems.append(f"no {MATRIX_UNIT[capability]}")
    # What follows a main loop within a loop over tiles may multiply its sums.
    others = [loop for loop in loops(ptx, innermost=True) if not _MATRIX.search(loop)]
    found = sum(len(re.findall(r"\bfma\.rn\S*\.f32", loop)) >= _FEWEST_FMA for loop in others)
    if found:
        problems.append(f"FFMA in place of matrix instructions in {found} loops")
    return problems


def narrow(ptx: str, streams: bool = False) -> list[str]:
    """Loads of fewer than 16 bytes in a main loop; of a kernel that `streams`, in its widest loop.

    A thread's only load of a small tile cannot be wider: those of a width must make 16 bytes. A
    kernel that streams has no matrix instructions, and its widest loop is the one that loads the
    most bytes: at least a quarter of them must be loaded by 16. The rest may be what every thread
    of a row needs: an id, a weight.
    """
    if not streams:
        for loop in main_loops(ptx):
            widths = sorted(loaded(loop).items())
            found = {w: count for w, count in widths if w < WIDE <= w * count}
            if found:
                return [f"narrow loads in a main loop: {_widths(found)}"]
        return []
    sums = [loaded(loop) for loop in loops(ptx)] or [loaded(ptx)]
    most = max(sums, key=_bytes)
    wide = _bytes({width: count for width, count in most.items() if width >= WIDE})
    if 4 * wide >= _bytes(most):
        return []
    return [f"narrow loads where it streams: {_widths(dict(sorted(most.items())))}"]


def synchronous(ptx: str) -> list[str]:
    """Main loops whose operands no asynchronous copy brings."""
    copies = re.compile(r"\bcp\.async\.(?:c[ag]|bulk)\b|\bcp\.async\.bulk\.tensor")
    found = [loop for loop in main_loops(ptx) if _LOAD.search(loop) and not copies.search(loop)]
    return [f"synchronous loads in {len(found)} main loops"] if found else []


def too_much_shared(size: int, capability: int) -> list[str]:
    """More shared memory than a block may have."""
    most = SHARED_LIMIT[capability]
    return [f"shared memory: {size} of {most} bytes"] if size > most else []


def _bytes(widths: Mapping[int, int]) -> int:
    return sum(width * count for width, count in widths.items())


def _widths(widths: Mapping[int, int]) -> str:
    return ", ".join(f"{count} x {width} B" for width, count in widths.items())


# --- known exceptions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A problem that is known, and why it stays.

    Attributes:
        problem: how its words begin. kernel, case: names, * for any part of one.
        capabilities: where it occurs; none for everywhere.
    """

    problem: str
    kernel: str
    case: str
    reason: str
    capabilities: tuple[int, ...] = ()

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the report is one where it may occur."""
        return (
            fnmatchcase(row["kernel"], self.kernel)
            and fnmatchcase(row["case"], self.case)
            and (not self.capabilities or row["capability"] in self.capabilities)
        )


def judge(
    rows: Iterable[Mapping[str, Any]], known: Iterable[Known]
) -> tuple[list[dict[str, Any]], list[Known]]:
    """The rows with each known problem moved from "problems" to "known", and stale exceptions.

    An exception is stale if rows are covered by it and none of them has its problem.
    """
    entries = list(known)
    seen: dict[Known, bool] = {}
    judged = []
    for row in rows:
        excused = {}
        for entry in entries:
            if entry.covers(row):
                found = [p for p in row["problems"] if p.startswith(entry.problem)]
                seen[entry] = seen.get(entry, False) or bool(found)
                excused |= dict.fromkeys(found, entry.reason)
        left = [problem for problem in row["problems"] if problem not in excused]
        judged.append({**row, "problems": left, "known": excused})
    return judged, [entry for entry, occurs in seen.items() if not occurs]
