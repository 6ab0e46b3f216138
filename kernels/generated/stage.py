"""The expression of one tile of features in a generated kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..layout import parts_per_byte, row_bytes
from .kept import CALLS, NARROW, base_of
from .program import KEPT, Node, Operand, Unsupported, Use

if TYPE_CHECKING:
    from .cpu import Writer

__all__ = ["Stage", "Tiling", "runs"]

TILE = 64  # numbers of a step over features: four registers of AVX-512


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


def runs(numbers: list[int]) -> str:
    """The text of a pattern of lanes."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return " ".join(f"{number}x{count}" for number, count in runs)


class Stage:
    """The expressions of one tile: what is the same for all edges before the loop, the rest in it."""

    def __init__(self, writer: Writer, tiling: Tiling) -> None:
        self.writer, self.tiling = writer, tiling

    def enter(self, first: int) -> None:
        self.first = first
        self.fixed: dict[int, str] = {}
        self.spread: dict[tuple[Use, int], str] = {}
        self.sources: set[int] = set()
        self.edges: set[int] = set()
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
        for number in sorted(self.edges):  # in the caller's order, which is that of no row
            width = writer.program.operands[number].width
            writer.put(f"ahead = np.int64(peek(edge_, min(e + AHEAD, final))) * {width}")
            for line in range(self.first, min(width, self.first + self.tiling.lanes), 16):
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
                if index not in writer.scalar:
                    (self.sources if operand.side == "source" else self.edges).add(int(node.value))
                if operand.bits:
                    self._range(int(node.value), operand)
                return False
        elif not node.is_row and node.op != "literal":
            if index in writer.scalar:
                return False
            if node.op == "map" or node.op in KEPT:
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
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"vload({array}, {at} + {numbers[0]}, {len(numbers)})"
        if node.width > NARROW:
            raise Unsupported(f"{node.width} numbers per edge are spread over its features")
        return f"vpattern({array}, {at}, {node.width}, '{runs(numbers)}')"

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
        elif node.op in KEPT and index not in writer.scalar:
            text = f"vload_tile(s{index}, (e - begin) * {node.width}, {self.tiling.constants(self.first)})"
        elif index in writer.scalar:
            text = self.used(Use(index), node.width)
        else:
            args = [self.used(use, node.width) for use in node.args]
            text = CALLS[node.op].format(*(f"({arg})" for arg in args), value=node.value)
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
        base = base_of(operand, "e").replace("np.int64(peek(col_, e))", "source")
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
