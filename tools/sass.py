"""What a compiled kernel shows: registers, spills, load widths and the inner loop's instructions.

Reads cubins with the ``cuobjdump`` and ``nvdisasm`` of the triton wheel and AMD assembly as text;
neither needs a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Binary", "Instruction", "inner_loop", "longest_way", "read_amdgcn", "read_cubin"]

# Memory, float, control and conversion instructions.  Of AMD's, scalar ones as well: the unit of their own
# executes them once per wave.
_NOT_INTEGER = re.compile(
    r"^(global_|buffer_|flat_|scratch_|ds_|s_|v_mfma|v_\w+_[bf]?f(16|32|64)|"
    r"LD|ST|ATOM|RED|F|H|MUFU|BRA|EXIT|BAR|WARPSYNC|NOP|BSSY|BSYNC|DEPBAR|MMA|IMMA|HGMMA|IGMMA|"
    r"QGMMA|SHFL|CCTL|MEMBAR|ERRBAR|S2|CS2R|I2F|F2I|WARPGROUP|UCGABAR|SYNCS|LDGSTS|LDGDEPBAR|R2UR)"
)


@dataclass(frozen=True)
class Instruction:
    """``address`` in bytes (lines for AMD); ``target`` of a branch; whether the next one may follow."""

    address: int
    opcode: str
    target: int | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Binary:
    """What the tools report about one kernel.

    Attributes:
        registers: Per thread (AMD: vector registers).
        local_bytes: Stack or local memory per thread.
        spills: For NVIDIA the loads and stores of local memory, for AMD spilled vector registers.  (Scalar ones move
            to lanes of a vector register; what goes to memory is in ``local_bytes``.)
        shared_bytes: Per program.
        widest_load: Bytes of the widest global load of one thread.
        loop: Instruction mix of the inner loop, by opcode.
        loop_loads: Widths in bytes of the global loads in the inner loop, widest first.
        outside: Instructions outside the inner loop on the longest way through the kernel that repeats no loop.
    """

    registers: int
    local_bytes: int
    spills: int
    shared_bytes: int
    widest_load: int
    loop: dict[str, int]
    loop_loads: tuple[int, ...]
    outside: int

    @property
    def integer_instructions(self) -> int:
        """Integer, logic, move and predicate instructions of the inner loop."""
        return sum(n for op, n in self.loop.items() if not _NOT_INTEGER.match(op))


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def load_bytes(opcode: str) -> int:
    """Bytes that one thread loads from global memory by ``opcode``; 0 for anything else."""
    if re.match(r"LDG(STS)?\b", opcode):
        found = re.search(r"\.(U8|S8|U16|S16|64|128)\b", opcode)
        width = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return width[found.group(1)] if found else 4
    found = re.match(r"(?:global|buffer)_load_(u?s?byte|u?s?short|dword(?:x\d)?)", opcode)
    if not found:
        return 0
    if "byte" in found.group(1):
        return 1
    if "short" in found.group(1):
        return 2
    return 4 * int(found.group(1).removeprefix("dword").removeprefix("x") or 1)


def inner_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The innermost loop that loads most bytes from global memory (empty without loops).

    Loops are natural loops of the control flow graph: blocks that the compiler placed out of line belong to them.
    """
    loops = _natural_loops(instructions)
    innermost = [a for a in loops if not any(b < a for b in loops)]
    loading = [a for a in innermost if any(load_bytes(instructions[i].opcode) for i in a)]
    if not loading:
        return []
    best = max(loading, key=lambda a: sum(load_bytes(instructions[i].opcode) for i in a))
    return [instructions[i] for i in sorted(best)]


def _natural_loops(instructions: list[Instruction]) -> list[frozenset[int]]:
    """One set of instruction numbers per loop header: all that reach one of its back edges without passing it."""
    after = _successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for i, follows in enumerate(after):
        for j in follows:
            before[j].append(i)
    loops = []
    for header, sources in enumerate(before):
        if len(sources) < 2:
            continue
        # A back edge comes from where no path from the entry leads but through the header.
        elsewhere = _reached(after, 0, header)
        latches = [i for i in sources if i not in elsewhere]
        if latches:
            loops.append(frozenset({header}.union(*(_reached(before, i, header) for i in latches))))
    return loops


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    after = []
    for i, instruction in enumerate(instructions):
        follows = [i + 1] if instruction.falls_through and i + 1 < len(instructions) else []
        if instruction.target is not None:
            follows.append(index[instruction.target])
        after.append(follows)
    return after


def longest_way(instructions: list[Instruction], without: list[Instruction]) -> int:
    """Instructions on the longest way from the entry that repeats no loop; those in ``without`` do not count."""
    if not instructions:
        return 0
    after, free = _successors(instructions), {i.address for i in without}
    length: dict[int, int] = {}
    under_way, stack = {0}, [(0, iter(after[0]))]
    while stack:
        i, follows = stack[-1]
        j = next((j for j in follows if j not in length and j not in under_way), None)
        if j is not None:
            under_way.add(j)
            stack.append((j, iter(after[j])))
            continue
        stack.pop()
        under_way.discard(i)
        # Successors that are still under way are the headers of loops.
        length[i] = (instructions[i].address not in free) + max((length.get(j, 0) for j in after[i]), default=0)
    return length[0]


def _reached(edges: list[list[int]], start: int, without: int) -> set[int]:
    """What can be reached from ``start`` without passing ``without``."""
    found, stack = {start} - {without}, [start]
    while stack:
        for j in edges[stack.pop()]:
            if j != without and j not in found:
                found.add(j)
                stack.append(j)
    return found


def _binary(instructions: list[Instruction], registers: int, local: int, spills: int, shared: int) -> Binary:
    loop = inner_loop(instructions)
    loads = sorted((load_bytes(i.opcode) for i in loop if load_bytes(i.opcode)), reverse=True)
    return Binary(
        registers=registers,
        local_bytes=local,
        spills=spills,
        shared_bytes=shared,
        widest_load=max((load_bytes(i.opcode) for i in instructions), default=0),
        loop=dict(Counter(i.opcode for i in loop)),
        loop_loads=tuple(loads),
        outside=longest_way(instructions, loop),
    )


def _parse_sass(text: str) -> list[Instruction]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            pending.append(label.group(1))
            continue
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if not code:
            continue
        address, opcode = int(code.group(1), 16), code.group(3)
        labels.update(dict.fromkeys(pending, address))
        pending.clear()
        target = re.search(r"`\((\.L_x_\d+)\)", code.group(4))
        if opcode.startswith("BRA") and target:
            branches.append((len(instructions), target.group(1)))
        # A branch may be conditional by a predicate of its own (BRA P0, ...) as well.
        always = opcode.startswith(("BRA", "EXIT", "RET")) and not code.group(2) and " P" not in code.group(4)
        instructions.append(Instruction(address, opcode, falls_through=not always))
    return _with_targets(instructions, branches, labels)


def _with_targets(
    instructions: list[Instruction], branches: list[tuple[int, str]], labels: dict[str, int]
) -> list[Instruction]:
    for index, name in branches:
        instructions[index] = replace(instructions[index], target=labels.get(name))
    return instructions


def read_cubin(cubin: bytes, shared_bytes: int) -> Binary:
    """Disassemble a cubin that holds one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(_tools() / "cuobjdump", "-res-usage", str(path))
        instructions = _parse_sass(_run(_tools() / "nvdisasm", "-c", str(path)))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"Expected the resource usage of a kernel (got {usage!r})")
    registers, stack, local = (int(v) for v in found.groups())
    spills = sum(i.opcode.startswith(("LDL", "STL")) for i in instructions)
    return _binary(instructions, registers, stack + local, spills, shared_bytes)


def read_amdgcn(text: str) -> Binary:
    """Read the assembly of one AMD kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    branches: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines()):
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            pending.append(label.group(1))
            continue
        code = re.match(r"\t([a-z]\w+)\s*(.*)", line)
        if not code:
            continue
        if "branch" in code.group(1):
            branches.append((len(instructions), code.group(2).split(";")[0].strip()))
        always = code.group(1) in ("s_branch", "s_endpgm", "s_setpc_b64")
        instructions.append(Instruction(number, code.group(1), falls_through=not always))
        labels.update(dict.fromkeys(pending, number))
        pending.clear()
    instructions = _with_targets(instructions, branches, labels)

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return _binary(
        instructions,
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        field("vgpr_spill_count"),
        field("group_segment_fixed_size"),
    )
