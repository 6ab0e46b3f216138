"""Row programs as numba kernels: the source of a module, written from the expression and unrolled over its features.

A thread takes a row of the graph and computes its nodes in order.  What is narrower than what reads it (logits,
weights, numbers of edges) is kept per edge in a scratch array of that thread, and evaluated sixteen numbers at a time.
Reductions of wide rows keep their accumulators in registers: tile by tile, each edge's codes are decoded, the
expression is evaluated and added.  Nothing of size edges times features is written.

Every operation is one float32 rounding and edges are added in the caller's order, as in torch's ``scatter_add_``: sums,
products and quotients come out bit for bit as there, so that results which are quantized again take the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..layout import parts_per_byte, row_bytes
from .program import ELEMENTWISE, REDUCTIONS, WITH_VALUE, Node, Operand, Program, Unsupported, Use

__all__ = ["write_source"]

LANES = 16  # numbers of a step over scratch arrays
TILE = 64  # numbers of a step over features: four registers of AVX-512
NARROW = 64  # the most numbers per edge that are kept

HEADER = '''"""A kernel written by qgnn_plugin.kernels.generated.cpu; changes are overwritten."""

import numpy as np
from qgnn_plugin.kernels.cpu import jit
from qgnn_plugin.kernels.cpu.simd import (
    atomic_add, keep, peek, poke, prefetch, raw, vcast, vfma, vlanes, vload, vload_first, vmax, vmin, vsplat, vspread,
    vstore,
)
from qgnn_plugin.kernels.generated.lanes import (
    vabove, vabs, vexp, vexpm1, vfrom, vgreater, vhead_sum, vleaky, vload_tile, vlog, vlog1p, vneg, vpattern, vrelu,
    vsigmoid, vsoftplus, vsqrt, vstore_tile, vtanh, vwhere,
)

AHEAD = 32
'''

_CALLS = {
    "copy": "{0}", "neg": "vneg({0})", "abs": "vabs({0})", "relu": "vrelu({0})", "exp": "vexp({0})",
    "expm1": "vexpm1({0})", "log": "vlog({0})", "log1p": "vlog1p({0})", "sqrt": "vsqrt({0})",
    "sigmoid": "vsigmoid({0})", "tanh": "vtanh({0})", "softplus": "vsoftplus({0})", "add": "{0} + {1}",
    "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "vmax({0}, {1})",
    "minimum": "vmin({0}, {1})", "greater": "vgreater({0}, {1})", "greater_equal": "vabove({0}, {1})",
    "where": "vwhere({0}, {1}, {2})", "leaky_relu": "vleaky({0}, {value!r})",
}  # fmt: skip
assert set(_CALLS) == set(ELEMENTWISE) | set(WITH_VALUE)

_START = {"sum": "0.0", "max": "-np.inf", "min": "np.inf"}
_JOIN = {"sum": "{0} + {1}", "max": "vmax({0}, {1})", "min": "vmin({0}, {1})"}


@dataclass(frozen=True)
class Tiling:
    """How the features of a row lie in vectors: ``parts`` pieces of ``lanes`` numbers, ``step`` apart."""

    width: int
    bits: int
    parts: int
    step: int
    lanes: int

    @classmethod
    def of(cls, width: int, bits: int) -> Tiling:
        parts = parts_per_byte(bits) if bits else 1
        step = row_bytes(width, bits) if bits else width
        lanes = max(8, TILE // parts)
        while lanes > 8 and lanes // 2 >= step:
            lanes //= 2
        return cls(width, bits, parts, step, lanes)

    @property
    def firsts(self) -> range:
        return range(0, self.step, self.lanes)

    def features(self, first: int) -> list[int]:
        """The feature of each lane of the tile at ``first``, -1 for none."""
        found = []
        for part in range(self.parts):
            for k in range(first, first + self.lanes):
                feature = part * self.step + k
                found.append(feature if k < self.step and feature < self.width else -1)
        return found

    def constants(self, first: int) -> str:
        """The constants of :func:`.lanes.vload_tile`."""
        return f"{first}, {self.step}, {self.parts}, {self.lanes}, {self.width}"


def _runs(numbers: list[int]) -> str:
    """The text of a pattern of lanes."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return " ".join(f"{number}x{count}" for number, count in runs)


@dataclass
class Writer:
    """Writes one program."""

    program: Program
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    names: int = 0

    def __post_init__(self) -> None:
        self.nodes = self.program.nodes
        self.scalar = _scalars(self.program)
        self.readers: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for use in node.args:
                self.readers.setdefault(use.node, []).append(index)

    # -- text -----------------------------------------------------------------------------------------------------

    def put(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def write(self) -> str:
        operands = [name for k, o in enumerate(self.program.operands) for name in _arrays(k, o)]
        outs = [f"out{k}" for k in range(len(self.program.outputs) + len(self.program.edge_outputs))]
        args = ["rowptr", "col", "edge", "max_degree", *operands, *outs, "bounds", "counter"]
        body = Writer(self.program, depth=3)
        body.row()
        kept = self._allocate()
        self.lines += ["", "", "@jit.kernel", f"def kernel({', '.join(args)}):"]
        for name in [*operands, *outs, "rowptr", "col", "edge"]:
            self.put(f"{name}_ = raw({name})")
        for name, size in kept.items():
            self.put(f"{name}_owner = np.zeros({size}, np.float32)")
            self.put(f"{name} = raw({name}_owner)")
        self.put("final = col.size - 1")
        self.put("while True:")
        self.put("    chunk = atomic_add(counter, 0, 1)")
        self.put("    if chunk >= bounds.size - 1:")
        self.put("        break")
        self.put("    for i in range(bounds[chunk], bounds[chunk + 1]):")
        self.put("        begin, end = np.int64(peek(rowptr_, i)), np.int64(peek(rowptr_, i + 1))")
        self.lines += body.lines
        for name in kept:
            self.put(f"keep({name}_owner)")
        return HEADER + "\n".join(self.lines) + "\n"

    def _allocate(self) -> dict[str, str]:
        """Scratch arrays of a thread, by name, and their sizes."""
        kept = {}
        for index, node in enumerate(self.nodes):
            if node.is_row:
                kept[f"row{index}"] = str(-(-node.width // LANES) * LANES + TILE)
            elif index in self.scalar and node.op != "literal":
                kept[f"s{index}"] = f"max_degree * {node.width} + {TILE}"
        for index, position in _fills(self.program, self.scalar):
            kept[f"f{index}_{position}"] = f"max_degree * {self.nodes[index].width} + {TILE}"
        return kept

    # -- one row --------------------------------------------------------------------------------------------------

    def row(self) -> None:
        """All stages of a row, in the order of the nodes."""
        done: set[int] = set()
        for index, node in enumerate(self.nodes):
            if index in done or node.op in ("load", "literal"):
                continue
            if node.op == "dot":
                self.dot(index)
            elif node.op in REDUCTIONS and node.args[0].node in self.scalar:
                self.reduce_scalar(index)
            elif node.op in REDUCTIONS:
                done |= self.reduce_wide(index)
            elif node.is_row:
                self.row_values(index)
            elif index in self.scalar:
                self.scalar_values(index)
        for k, index in enumerate(self.program.outputs):
            if self.nodes[index].args[0].node in self.scalar:
                width = self.nodes[index].width
                self.put(f"for h in range({width}):")
                self.put(f"    poke(out{k}_, i * {width} + h, peek(row{index}, h))")
        for k, index in enumerate(self.program.edge_outputs, len(self.program.outputs)):
            width, (array, at) = self.nodes[index].width, self.place(index)
            self.put("for e in range(begin, end):")
            self.put(f"    for h in range({width}):")
            self.put(f"        poke(out{k}_, np.int64(peek(edge_, e)) * {width} + h, peek({array}, {at} + h))")

    def scalar_values(self, index: int) -> None:
        """A node of few numbers, for all edges of the row at once."""
        node = self.nodes[index]
        args = [self.filled(index, position, use) for position, use in enumerate(node.args)]
        self.put(f"for k in range(0, (end - begin) * {node.width}, {LANES}):")
        texts = [f"vsplat({arg[1:]}, {LANES})" if arg[0] == "=" else f"vload({arg}, k, {LANES})" for arg in args]
        self.put(f"    vstore(s{index}, k, {_CALLS[node.op].format(*texts, value=node.value)})")

    def filled(self, index: int, position: int, use: Use) -> str:
        """The scratch array with an argument of a node for every edge of the row; ``=1.0`` for a number."""
        node, arg = self.nodes[index], self.nodes[use.node]
        if arg.op == "literal":
            return f"={arg.value!r}"
        if not _is_filled(self.program, self.scalar, node, use):
            return f"s{use.node}"
        name = f"f{index}_{position}"
        self.put("for e in range(begin, end):")
        self.put(f"    at = (e - begin) * {node.width}")
        at = self.place(use.node)
        shift = f"h % {arg.width}" if use.mode == "tile" else f"h // {node.width // arg.width}"
        shift = "0" if arg.width == 1 else "h" if arg.width == node.width else shift
        self.put(f"    for h in range({node.width}):")
        self.put(f"        poke({name}, at + h, peek({at[0]}, {at[1]} + {shift}))")
        return name

    def place(self, index: int) -> tuple[str, str]:
        """The array and the position of the numbers of edge ``e``."""
        node = self.nodes[index]
        if node.is_row:
            return f"row{index}", "0"
        if node.op == "load":
            return f"a{int(node.value)}_", _base(self.program.operands[int(node.value)], "e")
        return f"s{index}", f"(e - begin) * {node.width}"

    def reduce_scalar(self, index: int) -> None:
        node = self.nodes[index]
        use = node.args[0]
        array, at = self.place(use.node)
        self.put(f"for h in range({node.width}):")
        self.put("    total = np.float32(0)")
        join = {"sum": "total + x", "max": "max(total, x)", "min": "min(total, x)"}[node.op]
        if node.op != "sum":
            self.put("    if begin < end:")
            self.put("        e = begin")
            self.put(f"        total = peek({array}, {at} + h)")
        self.put("    for e in range(begin, end):")
        self.put(f"        x = peek({array}, {at} + h)")
        self.put(f"        total = {join}")
        self.put(f"    poke(row{index}, h, total)")

    def row_values(self, index: int) -> None:
        """A node of the row itself."""
        node = self.nodes[index]
        self.put(f"for k in range(0, {node.width}, {LANES}):")
        texts = []
        for use in node.args:
            arg = self.nodes[use.node]
            if arg.op == "literal":
                texts.append(f"vsplat({arg.value!r}, {LANES})")
            elif arg.width not in (1, node.width):
                raise Unsupported("numbers of rows of several widths are combined inside a kernel")
            else:
                array, at = self.place(use.node)
                if arg.width == 1:
                    texts.append(f"vsplat(peek({array}, {at}), {LANES})")
                elif arg.is_row:
                    texts.append(f"vload({array}, k, {LANES})")
                else:
                    texts.append(f"vload_first({array}, {at} + k, {LANES}, {arg.width} - k)")
        self.put(f"    vstore(row{index}, k, {_CALLS[node.op].format(*texts, value=node.value)})")

    # -- wide stages ----------------------------------------------------------------------------------------------

    def dot(self, index: int) -> None:
        """Sums over runs of features, for every edge."""
        node, root = self.nodes[index], self.nodes[index].args[0].node
        tiling, heads = self.tiling([root]), node.width
        run = self.nodes[root].width // heads
        if heads > NARROW:
            raise Unsupported(f"{heads} sums over features per edge")
        stage = Stage(self, tiling)
        seen: set[int] = set()
        for first in tiling.firsts:
            stage.enter(first)
            stage.value(root, invariant_only=True)
            self.put("for e in range(begin, end):")
            self.depth += 1
            stage.start_edge()
            value = stage.value(root)
            features = tiling.features(first)
            pattern = _runs([f // run if f >= 0 else -1 for f in features])
            for head in sorted({f // run for f in features if f >= 0}):
                total = f"vhead_sum({value}, '{pattern}', {head})"
                at = f"(e - begin) * {heads} + {head}"
                before = f"peek(s{index}, {at}) + " if head in seen else ""
                self.put(f"poke(s{index}, {at}, {before}{total})")
            seen |= {f // run for f in features if f >= 0}
            self.depth -= 1

    def reduce_wide(self, index: int) -> set[int]:
        """Reductions of wide rows: this one, and those after it that need nothing more than it does."""
        group = [index]
        for later in range(index + 1, len(self.nodes)):
            node = self.nodes[later]
            same = node.op in REDUCTIONS and node.width == self.nodes[index].width
            if same and node.args[0].node not in self.scalar and not self.waits(later, index):
                group.append(later)
        roots = [self.nodes[k].args[0].node for k in group]
        tiling = self.tiling(roots)
        for first in tiling.firsts:
            stage = Stage(self, tiling)
            stage.enter(first)
            for root in roots:
                stage.value(root, invariant_only=True)
            like = tiling.lanes * tiling.parts
            for k in group:
                self.put(f"acc{k} = vsplat({_START[self.nodes[k].op]}, {like})")
            self.put("for e in range(begin, end):")
            self.depth += 1
            stage.start_edge()
            for k, root in zip(group, roots, strict=True):
                self.put(f"acc{k} = " + _JOIN[self.nodes[k].op].format(f"acc{k}", stage.value(root)))
            self.depth -= 1
            for k in group:
                if self.nodes[k].op != "sum":
                    self.put("if begin == end:")
                    self.put(f"    acc{k} = vsplat(0.0, {like})")
                if k in self.readers:
                    self.put(f"vstore_tile(row{k}, 0, acc{k}, {tiling.constants(first)})")
                for number, output in enumerate(self.program.outputs):
                    if output == k:
                        self.put(f"vstore_tile(out{number}_, i * {tiling.width}, acc{k}, {tiling.constants(first)})")
        return set(group)

    def waits(self, later: int, first: int) -> bool:
        """Whether the node ``later`` needs something that is computed at ``first`` or between the two."""
        seen, stack = set(), [use.node for use in self.nodes[later].args]
        while stack:
            index = stack.pop()
            if index in seen:
                continue
            seen.add(index)
            node = self.nodes[index]
            staged = node.is_row or node.op == "dot" or (index in self.scalar and node.op != "load")
            if index >= first and staged and node.op != "literal":
                return True
            stack += [use.node for use in node.args]
        return False

    def tiling(self, roots: list[int]) -> Tiling:
        """The layout of what the roots read."""
        width, bits, seen, stack = self.nodes[roots[0]].width, set(), set(), list(roots)
        while stack:
            index = stack.pop()
            node = self.nodes[index]
            if index in seen or index in self.scalar or node.is_row:
                continue
            seen.add(index)
            if node.op == "load" and self.program.operands[int(node.value)].bits:
                bits.add(self.program.operands[int(node.value)].bits)
            stack += [use.node for use in node.args]
        if len(bits) > 1:
            raise Unsupported(f"codes of {sorted(bits)} bits in one sum")
        return Tiling.of(width, bits.pop() if bits else 0)


class Stage:
    """The expressions of one tile: what is the same for all edges before the loop, the rest in it."""

    def __init__(self, writer: Writer, tiling: Tiling) -> None:
        self.writer, self.tiling = writer, tiling

    def enter(self, first: int) -> None:
        self.first = first
        self.fixed: dict[int, str] = {}
        self.spread: dict[tuple[Use, int], str] = {}
        self.sources: set[int] = set()
        self.ranges: dict[int, tuple[str, str]] = {}
        self.in_edge: dict[int, str] = {}
        self.before = True

    def start_edge(self) -> None:
        self.before = False
        self.in_edge = {}
        self._prefetch()
        self.writer.put("source = np.int64(peek(col_, e))")
        self.writer.put("own = np.int64(peek(edge_, e))")

    def _prefetch(self) -> None:
        writer = self.writer
        for number in sorted(self.sources):
            operand = writer.program.operands[number]
            if operand.bits:
                stride, start = self.tiling.step // 4, self.first // 4
                lines = range(start, min(stride, start + self.tiling.lanes // 4), 16)
            else:
                stride, start = operand.width, self.first
                lines = range(start, min(stride, start + self.tiling.lanes), 16)
            writer.put(f"ahead = np.int64(peek(col_, min(e + AHEAD, final))) * {stride}")
            for line in lines:
                writer.put(f"prefetch(a{number}_, ahead + {line})")

    def value(self, index: int, invariant_only: bool = False) -> str:
        """The name of a node's vector; before the loop only what all edges share is written."""
        if invariant_only:
            self._hoist(index)
            return ""
        if index in self.fixed:
            return self.fixed[index]
        if index not in self.in_edge:
            self.in_edge[index] = self._write(index)
        return self.in_edge[index]

    def _hoist(self, index: int) -> bool:
        """Write what the node shares with all edges of the row; whether that is the whole node."""
        node, writer = self.writer.nodes[index], self.writer
        if index in self.fixed:
            return True
        if node.op == "load":
            operand = writer.program.operands[int(node.value)]
            if operand.side in ("source", "edge"):
                if operand.side == "source" and index not in writer.scalar:
                    self.sources.add(int(node.value))
                if operand.bits:
                    self._range(int(node.value), operand)
                return False
        elif not node.is_row and node.op != "literal":
            if index in writer.scalar:
                return False
            if node.op == "map":
                return False
            shared = [self._hoist(use.node) for use in node.args]
            whole = all(shared)
            # Arguments that are the same for all edges are there by now, spread to where they are used.
            if not whole:
                for use in node.args:
                    self._spread_fixed(use, node.width)
                return False
        if node.width == self.tiling.width:
            self.fixed[index] = self._write(index)
        return node.width == self.tiling.width

    def _spread_fixed(self, use: Use, width: int) -> None:
        node = self.writer.nodes[use.node]
        shared = node.is_row or node.op == "literal" or (
            node.op == "load" and self.writer.program.operands[int(node.value)].side in ("target", "constant")
        )
        if shared and node.width != width and (use, width) not in self.spread:
            text, name = self.used(use, width), self.writer.name()
            self.writer.put(f"{name} = {text}")
            self.spread[use, width] = name

    def used(self, use: Use, width: int) -> str:
        """The vector of an argument, spread to ``width`` numbers."""
        node = self.writer.nodes[use.node]
        if node.width == width and use.node in self.fixed:
            return self.fixed[use.node]
        if (use, width) in self.spread:
            return self.spread[use, width]
        if node.op == "literal":
            return self._literal(node)
        if node.width == width and use.node not in self.writer.scalar:
            return self.value(use.node)
        array, at = self.writer.place(use.node)
        at = at.replace("np.int64(peek(col_, e))", "source").replace("np.int64(peek(edge_, e))", "own")
        features = self.tiling.features(self.first)
        if use.mode == "tile":
            numbers = [f % node.width if f >= 0 else 0 for f in features]
        else:
            numbers = [f * node.width // width if f >= 0 else -1 for f in features]
            # Lanes without a feature follow those before them: fewer different numbers.
            for k, number in enumerate(numbers):
                numbers[k] = numbers[k - 1] if number < 0 and k else max(0, number)
        if len(set(numbers)) == 1:
            return f"vsplat(peek({array}, {at} + {numbers[0]}), {len(numbers)})"
        if node.width > NARROW:
            raise Unsupported(f"{node.width} numbers per edge are spread over its features")
        return f"vpattern({array}, {at}, {node.width}, '{_runs(numbers)}')"

    def _literal(self, node: Node) -> str:
        value = f"np.float32('{node.value}')" if node.value != node.value or abs(node.value) == float("inf") else repr(
            float(node.value)
        )
        return f"vsplat({value}, {self.tiling.lanes * self.tiling.parts})"

    def _write(self, index: int) -> str:
        node, writer = self.writer.nodes[index], self.writer
        if node.op == "load":
            text = self._load(int(node.value))
        elif node.op == "literal":
            text = self._literal(node)
        elif node.is_row:
            text = f"vload_tile(row{index}, 0, {self.tiling.constants(self.first)})"
        elif node.op == "map":
            text = self._map(node)
        elif index in writer.scalar:
            text = self.used(Use(index), node.width)
        else:
            args = [self.used(use, node.width) for use in node.args]
            text = _CALLS[node.op].format(*(f"({arg})" for arg in args), value=node.value)
        name = writer.name()
        writer.put(f"{name} = {text}")
        return name

    def _map(self, node: Node) -> str:
        """Numbers of an edge times rows of a matrix."""
        writer = self.writer
        x, matrix = (writer.nodes[use.node] for use in node.args)
        array, at = writer.place(node.args[0].node)
        at = at.replace("np.int64(peek(col_, e))", "source").replace("np.int64(peek(edge_, e))", "own")
        rows = f"a{int(matrix.value)}_"
        total = ""
        for k in range(x.width):
            number = f"vsplat(peek({array}, {at} + {k}), {self.tiling.lanes * self.tiling.parts})"
            row = f"vload_tile({rows}, {k * node.width}, {self.tiling.constants(self.first)})"
            name = writer.name()
            writer.put(f"{name} = vfma({number}, {row}, {total})" if total else f"{name} = {number} * {row}")
            total = name
        return total

    def _load(self, number: int) -> str:
        operand, tiling = self.writer.program.operands[number], self.tiling
        if operand.bits:
            return self._decode(number, operand)
        base = _base(operand, "e").replace("np.int64(peek(col_, e))", "source")
        base = base.replace("np.int64(peek(edge_, e))", "own")
        return f"vload_tile(a{number}_, {base}, {tiling.constants(self.first)})"

    def _range(self, number: int, operand: Operand) -> None:
        """Vectors of a range that all rows share."""
        if number in self.ranges or operand.ranges == "row":
            return
        names = []
        for what in ("scale", "lower"):
            name = self.writer.name()
            if operand.ranges == "tensor":
                like = self.tiling.lanes * self.tiling.parts
                self.writer.put(f"{name} = vsplat(peek(a{number}_{what}_, 0), {like})")
            else:
                constants = self.tiling.constants(self.first)
                self.writer.put(f"{name} = vload_tile(a{number}_{what}_, 0, {constants})")
            names.append(name)
        self.ranges[number] = (names[0], names[1])

    def _decode(self, number: int, operand: Operand) -> str:
        tiling, writer = self.tiling, self.writer
        stride, lanes, start = tiling.step // 4, tiling.lanes // 4, self.first // 4
        words = writer.name()
        at = f"source * {stride} + {start}" if operand.side == "source" else f"i * {stride} + {start}"
        if start + lanes <= stride:
            writer.put(f"{words} = vload(a{number}_, {at}, {lanes})")
        else:
            writer.put(f"{words} = vload_first(a{number}_, {at}, {lanes}, {stride - start})")
        like = f"vlanes('u8', {tiling.lanes * tiling.parts})"
        codes = f"vcast(vspread({words}, {like}), 'f32')"
        if operand.ranges == "row":
            row = "source" if operand.side == "source" else "i"
            like = str(tiling.lanes * tiling.parts)
            scale, lower = (f"vsplat(peek(a{number}_{what}_, {row}), {like})" for what in ("scale", "lower"))
            return f"{codes} * {scale} + {lower}"
        scale, lower = self.ranges[number]
        return f"{codes} * {scale} + {lower}"


def _arrays(number: int, operand: Operand) -> list[str]:
    return [f"a{number}", f"a{number}_scale", f"a{number}_lower"] if operand.bits else [f"a{number}"]


def _base(operand: Operand, edge: str) -> str:
    """The position of an operand's row for an edge."""
    return {
        "source": f"np.int64(peek(col_, {edge})) * {operand.width}",
        "target": f"i * {operand.width}",
        "edge": f"np.int64(peek(edge_, {edge})) * {operand.width}",
        "constant": "0",
    }[operand.side]


def _scalars(program: Program) -> set[int]:
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
            (reader.width > node.width and reader.op in _CALLS)
            or (reader.width == node.width and (k in found or k in small_rows) and reader.op != "dot")
            for k, reader in by
        )
        if not (narrow or node.op == "dot" or index in program.edge_outputs):
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
            kept = not node.is_row and node.op not in ("load", "literal", "dot") and index not in found
            if kept and node.op in _CALLS and node.width <= NARROW and _reads_kept(program, node, found):
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


def _is_filled(program: Program, scalar: set[int], node: Node, use: Use) -> bool:
    """Whether an argument of a kept node has to be copied into a scratch array for it."""
    arg = program.nodes[use.node]
    if arg.op == "literal":
        return False
    return arg.is_row or arg.op == "load" or arg.width != node.width


def _fills(program: Program, scalar: set[int]) -> list[tuple[int, int]]:
    """Nodes and positions of arguments that are copied."""
    found = []
    for index, node in enumerate(program.nodes):
        if index in scalar and node.op in _CALLS:
            found += [(index, k) for k, use in enumerate(node.args) if _is_filled(program, scalar, node, use)]
    return found


def write_source(program: Program) -> str:
    """The source of a module with the numba kernel ``kernel`` of ``program``.

    Raises:
        Unsupported: If there is no kernel of it.
    """
    return Writer(program.check()).write()
