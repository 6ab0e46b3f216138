"""Which numbers of a row program are kept per edge, and the texts that all parts of a kernel are made of."""

from __future__ import annotations

from .program import ELEMENTWISE, KEPT, WITH_VALUE, Node, Operand, Program, Unsupported, Use

__all__ = ["CALLS", "LANES", "NARROW", "arrays_of", "base_of", "fills", "is_filled", "is_tiled", "pitch_of", "scalars"]

LANES = 16  # numbers of a step over scratch arrays
NARROW = 64  # the most numbers per edge that are kept
FEW = 16  # of linear maps: of more numbers, what is made of them is computed where it is reduced
ALONE = ("dot", "top", *KEPT)  # operations that are no functions number by number

CALLS = {
    "copy": "{0}", "neg": "vneg({0})", "abs": "vabs({0})", "relu": "vrelu({0})", "exp": "vexp({0})",
    "expm1": "vexpm1({0})", "log": "vlog({0})", "log1p": "vlog1p({0})", "sqrt": "vsqrt({0})",
    "sigmoid": "vsigmoid({0})", "tanh": "vtanh({0})", "softplus": "vsoftplus({0})", "add": "{0} + {1}",
    "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "vmax({0}, {1})",
    "minimum": "vmin({0}, {1})", "greater": "vgreater({0}, {1})", "greater_equal": "vabove({0}, {1})",
    "where": "vwhere({0}, {1}, {2})", "leaky_relu": "vleaky({0}, {value!r})",
}  # fmt: skip
assert set(CALLS) == set(ELEMENTWISE) | set(WITH_VALUE)


GROUP = 16  # numbers of a step over what is mapped


def pitch_of(num_in: int) -> int:
    """Numbers from one edge's row to the next in what a linear map takes: whole groups, zeros behind the last one."""
    return -(-num_in // GROUP) * GROUP


def arrays_of(number: int, operand: Operand) -> list[str]:
    return [f"a{number}", f"a{number}_scale", f"a{number}_lower"] if operand.bits else [f"a{number}"]


def base_of(operand: Operand, edge: str) -> str:
    """The position of an operand's row for an edge."""
    return {
        "source": f"np.int64(peek(col_, {edge})) * {operand.width}",
        "target": f"i * {operand.width}",
        "edge": f"np.int64(peek(edge_, {edge})) * {operand.width}",
        "constant": "0",
    }[operand.side]


def scalars(program: Program) -> set[int]:
    """Nodes of edges that are kept per edge: sums over features, and what wider ones or such nodes read."""
    readers: dict[int, list[int]] = {}
    for index, node in enumerate(program.nodes):
        for use in node.args:
            readers.setdefault(use.node, []).append(index)
    found: set[int] = set()
    small_rows: set[int] = set()
    for index in reversed(range(len(program.nodes))):
        node = program.nodes[index]
        by = [(k, program.nodes[k]) for k in readers.get(index, [])]
        narrow = any(
            (reader.width > node.width and reader.op in CALLS)
            or (reader.width == node.width and (k in found or k in small_rows) and reader.op not in ALONE)
            or reader.op == "top"
            for k, reader in by
        )
        if node.op in KEPT and node.width > FEW and index not in program.edge_outputs:
            continue  # kept whole, but not few
        if not (narrow or node.op in ALONE or index in program.edge_outputs):
            continue
        (small_rows if node.is_row else found).add(index)
    for index in found:
        node = program.nodes[index]
        if node.op == "load" and program.operands[int(node.value)].bits:
            raise Unsupported("packed features are spread over wider ones")
        if node.op == "map" or (node.op != "literal" and node.width > NARROW):
            raise Unsupported(f"{node.width} numbers are kept per edge")
    # What a kept sum over features makes of its own: reductions of it, and so on, are narrow as well.
    changed = True
    while changed:
        changed = False
        for index, node in enumerate(program.nodes):
            kept = not node.is_row and node.op not in ("load", "literal", *ALONE) and index not in found
            if kept and node.op in CALLS and node.width <= NARROW and _reads_kept(program, node, found):
                found.add(index)
                changed = True
    return found


def _reads_kept(program: Program, node: Node, found: set[int]) -> bool:
    """Whether all that an edge gives to ``node`` is kept already."""
    args = [use.node for use in node.args if not program.nodes[use.node].is_row]
    args = [k for k in args if program.nodes[k].op != "literal"]
    wide = [k for k in args if k not in found and not (program.nodes[k].op == "load" and _is_float(program, k))]
    return bool(args) and not wide and any(k in found and program.nodes[k].width == node.width for k in args)


def _is_float(program: Program, index: int) -> bool:
    return not program.operands[int(program.nodes[index].value)].bits


def is_filled(program: Program, node: Node, use: Use) -> bool:
    """Whether an argument of a kept node has to be copied into a scratch array for it."""
    arg = program.nodes[use.node]
    if arg.op == "literal":
        return False
    return arg.is_row or arg.op == "load" or arg.width != node.width


def is_tiled(program: Program, node: Node, use: Use) -> bool:
    """Whether an argument of a kept node is numbers of the row, over and over in every step over the scratch array."""
    arg = program.nodes[use.node]
    return arg.is_row and (arg.width in (1, node.width)) and LANES % node.width == 0


def fills(program: Program, scalar: set[int]) -> list[tuple[int, int]]:
    """Nodes and positions of arguments that are copied."""
    found = []
    for index, node in enumerate(program.nodes):
        if index in scalar and node.op in CALLS:
            uses = [(k, use) for k, use in enumerate(node.args) if is_filled(program, node, use)]
            found += [(index, k) for k, use in uses if not is_tiled(program, node, use)]
    return found
