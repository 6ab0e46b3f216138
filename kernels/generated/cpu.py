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

from ..layout import next_power_of_two
from .kept import CALLS, LANES, NARROW, arrays_of, base_of, fills, is_filled, is_tiled, pitch_of, scalars
from .program import KEPT, REDUCTIONS, Node, Program, Unsupported, Use
from .stage import TILE, Stage, Tiling, runs

__all__ = ["write_source"]

HEADER = '''"""A kernel written by qgnn_plugin.kernels.generated.cpu; changes are overwritten."""

import numpy as np
from qgnn_plugin.kernels.cpu import jit
from qgnn_plugin.kernels.cpu.simd import (
    atomic_add, keep, peek, poke, prefetch, raw, vcast, vfma, vlanes, vload, vload_first, vmax, vmin, vrun_sum, vsplat,
    vspread, vstore, vstore_first, vstore_parts,
)
from qgnn_plugin.kernels.generated.lanes import (
    vabove, vabs, vexp, vexpm1, vgreater, vhead_sum, vleaky, vload_tile, vlog, vlog1p, vneg, vpattern, vrelu,
    vsigmoid, vsoftplus, vsqrt, vstore_tile, vtanh, vwhere,
)

AHEAD = 32
'''
BLOCK_EDGES = 48  # that a linear map takes at a time, cpu_products.BLOCK_ROWS
PRODUCTS = """
from qgnn_plugin.kernels.generated.cpu_products import open_product, run_product
"""

_START = {"sum": "0.0", "max": "-np.inf", "min": "np.inf"}
_JOIN = {"sum": "{0} + {1}", "max": "vmax({0}, {1})", "min": "vmin({0}, {1})"}


@dataclass
class Writer:
    """Writes one program."""

    program: Program
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    names: int = 0

    def __post_init__(self) -> None:
        self.nodes = self.program.nodes
        self.scalar = scalars(self.program)
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
        operands = [name for k, o in enumerate(self.program.operands) for name in arrays_of(k, o)]
        outs = [f"out{k}" for k in range(len(self.program.outputs) + len(self.program.edge_outputs))]
        products = [f"c{k}" for k in range(len(self.program.products))] + ["bad"] * bool(self.program.products)
        args = ["rowptr", "col", "edge", "max_degree", *operands, *products, *outs, "bounds", "counter"]
        body = Writer(self.program, depth=3)
        body.row()
        kept = self._allocate()
        self.lines += ["", "", "@jit.kernel", f"def kernel({', '.join(args)}):"]
        for name in [*operands, *outs, "rowptr", "col", "edge"]:
            self.put(f"{name}_ = raw({name})")
        for name, size in kept.items():
            self.put(f"{name}_owner = np.zeros({size}, np.float32)")
            self.put(f"{name} = raw({name}_owner)")
        maps = [index for index, node in enumerate(self.nodes) if node.op == "linear"]
        for index in maps:
            self.put(f"p{index}_owner, p{index} = open_product(c{int(self.nodes[index].value)})")
        self.put("final = col.size - 1")
        self.put("while True:")
        self.put("    chunk = atomic_add(counter, 0, 1)")
        self.put("    if chunk >= bounds.size - 1:")
        self.put("        break")
        self.put("    for i in range(bounds[chunk], bounds[chunk + 1]):")
        self.put("        begin, end = np.int64(peek(rowptr_, i)), np.int64(peek(rowptr_, i + 1))")
        self.lines += body.lines
        for name in (*kept, *(f"p{index}" for index in maps)):
            self.put(f"keep({name}_owner)")
        header = HEADER + PRODUCTS * bool(self.program.products)
        return header + "\n".join(self.lines) + "\n"

    def _allocate(self) -> dict[str, str]:
        """Scratch arrays of a thread, by name, and their sizes."""
        kept = {}
        for index, node in enumerate(self.nodes):
            if node.is_row:
                kept[f"row{index}"] = str(-(-node.width // LANES) * LANES + TILE)
            elif (index in self.scalar and node.op != "literal") or node.op in KEPT:
                kept[f"s{index}"] = f"max_degree * {node.width} + {TILE}"
            if node.op == "linear":
                pitch = pitch_of(self.program.products[int(node.value)].num_in)
                kept[f"z{index}"] = str(BLOCK_EDGES * pitch + TILE)
        for index, position in fills(self.program, self.scalar):
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
            elif node.op == "top":
                self.top(index)
            elif node.op in KEPT:
                done |= self.kept(index)
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
            self.put(f"    for h in range(0, {width}, {LANES}):")
            few = f"vload_first({array}, {at} + h, {LANES}, {width} - h)"
            self.put(f"        vstore_first(out{k}_, np.int64(peek(edge_, e)) * {width} + h, {few}, {width} - h)")

    def scalar_values(self, index: int) -> None:
        """A node of few numbers, for all edges of the row at once."""
        node = self.nodes[index]
        args = [self.filled(index, position, use) for position, use in enumerate(node.args)]
        texts = [f"vload({arg}, k, {LANES})" for arg in args]
        for position, arg in enumerate(args):
            if arg[0] == "=":
                texts[position] = self.name()
                self.put(f"{texts[position]} = {arg[1:]}")
        self.put(f"for k in range(0, (end - begin) * {node.width}, {LANES}):")
        self.put(f"    vstore(s{index}, k, {CALLS[node.op].format(*texts, value=node.value)})")

    def filled(self, index: int, position: int, use: Use) -> str:
        """The scratch array with an argument of a node for every edge of the row; ``=vector`` where it is the same."""
        node, arg = self.nodes[index], self.nodes[use.node]
        if arg.op == "literal":
            return f"=vsplat({arg.value!r}, {LANES})"
        if not is_filled(self.program, node, use):
            return f"s{use.node}"
        if is_tiled(self.program, node, use):
            numbers = runs([k % node.width // (node.width // arg.width) for k in range(LANES)])
            return f"=vpattern(row{use.node}, 0, {arg.width}, '{numbers}')"
        name = f"f{index}_{position}"
        self.put("for e in range(begin, end):")
        self.put(f"    at = (e - begin) * {node.width}")
        at = self.place(use.node)
        if node.width <= LANES:  # what is written past an edge's numbers, the next edge writes over
            self.put(f"    vstore({name}, at, {self._few(at, arg, use, node.width)})")
            return name
        shift = f"h % {arg.width}" if use.mode == "tile" else f"h // {node.width // arg.width}"
        shift = "0" if arg.width == 1 else "h" if arg.width == node.width else shift
        self.put(f"    for h in range({node.width}):")
        self.put(f"        poke({name}, at + h, peek({at[0]}, {at[1]} + {shift}))")
        return name

    def _few(self, place: tuple[str, str], arg: Node, use: Use, width: int) -> str:
        """The vector of an argument of an edge, spread to ``width`` numbers, at most :data:`LANES`."""
        array, at = place
        if arg.width == 1:
            return f"vsplat(peek({array}, {at}), {LANES})"
        if arg.width == width:
            return f"vload_first({array}, {at}, {LANES}, {width})"
        run = width // arg.width
        numbers = [k % arg.width if use.mode == "tile" else k // run for k in range(width)]
        return f"vpattern({array}, {at}, {arg.width}, '{runs(numbers + [0] * (LANES - width))}')"

    def place(self, index: int) -> tuple[str, str]:
        """The array and the position of the numbers of edge ``e``."""
        node = self.nodes[index]
        if node.is_row:
            return f"row{index}", "0"
        if node.op == "load":
            return f"a{int(node.value)}_", base_of(self.program.operands[int(node.value)], "e")
        return f"s{index}", f"(e - begin) * {node.width}"

    def reduce_scalar(self, index: int) -> None:
        """Few numbers of a row's edges, sixteen at a time: each is reduced in the order of the edges."""
        node = self.nodes[index]
        array, at = self.place(node.args[0].node)
        for first in range(0, node.width, LANES):
            count = min(LANES, node.width - first)
            number = f"vload_first({array}, {at} + {first}, {LANES}, {count})"
            self.put(f"few = vsplat(0.0, {LANES})")
            if node.op != "sum":
                self.put("if begin < end:")
                self.put("    e = begin")
                self.put(f"    few = {number}")
            self.put("for e in range(begin, end):")
            self.put(f"    few = {_JOIN[node.op].format('few', number)}")
            self.put(f"vstore(row{index}, {first}, few)")

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
        self.put(f"    vstore(row{index}, k, {CALLS[node.op].format(*texts, value=node.value)})")

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
            found = [f // run if f >= 0 else -1 for f in features]
            whole = [head for head in dict.fromkeys(found) for _ in range(run)]
            if found == whole and -1 not in found and run == next_power_of_two(run) and tiling.lanes % run == 0:
                total = f"vrun_sum({value}, vsplat(0.0, {len(found) // run}))"
                at = f"(e - begin) * {heads} + {found[0]}"
                self.put(f"vstore_parts(s{index}, {at}, {tiling.step // run}, {total}, {tiling.parts}, None)")
                seen |= set(found)
                self.depth -= 1
                continue
            pattern = runs(found)
            for head in sorted({f // run for f in features if f >= 0}):
                total = f"vhead_sum({value}, '{pattern}', {head})"
                at = f"(e - begin) * {heads} + {head}"
                before = f"peek(s{index}, {at}) + " if head in seen else ""
                self.put(f"poke(s{index}, {at}, {before}{total})")
            seen |= {f // run for f in features if f >= 0}
            self.depth -= 1

    def top(self, index: int) -> None:
        """The largest of runs of few numbers, for every edge."""
        node, arg = self.nodes[index], self.nodes[index].args[0].node
        run, (array, at) = self.nodes[arg].width // node.width, self.place(arg)
        self.put("for e in range(begin, end):")
        self.put(f"    for h in range({node.width}):")
        self.put(f"        total = peek({array}, {at} + h * {run})")
        self.put(f"        for k in range(1, {run}):")
        self.put(f"            total = max(total, peek({array}, {at} + h * {run} + k))")
        self.put(f"        poke(s{index}, (e - begin) * {node.width} + h, total)")

    def kept(self, index: int) -> set[int]:
        """What is computed of several values of every edge, all of them at once; linear maps of the same together."""
        node = self.nodes[index]
        if node.op == "join":
            self.side_by_side(node.args, f"s{index}", node.width, "begin", "end")
            return {index}
        same = [k for k, other in enumerate(self.nodes) if other.op == "linear" and other.args == node.args]
        self.put(f"for block in range(begin, end, {BLOCK_EDGES}):")
        self.depth += 1
        self.put(f"until = min(block + {BLOCK_EDGES}, end)")
        pitch = pitch_of(self.program.products[int(node.value)].num_in)
        self.side_by_side(node.args, f"z{index}", pitch, "block", "until")
        for k in same:
            self.put(f"if not run_product(p{k}, z{index}, s{k}, until - block, block - begin):")
            self.put(f"    bad[{int(self.nodes[k].value)}] = 1")
        self.depth -= 1
        return set(same)

    def side_by_side(self, parts: tuple[Use, ...], array: str, pitch: int, first: str, last: str) -> None:
        """Write values of the edges from ``first`` to ``last`` one behind the other into the rows of ``array``."""
        offset = 0
        for use in parts:
            tiling = self.tiling([use.node])
            stage = Stage(self, tiling)
            for start in tiling.firsts:
                stage.enter(start)
                stage.value(use.node, invariant_only=True)
                self.put(f"for e in range({first}, {last}):")
                self.depth += 1
                stage.start_edge()
                at = f"(e - {first}) * {pitch} + {offset}"
                self.put(f"vstore_tile({array}, {at}, {stage.value(use.node)}, {tiling.constants(start)})")
                self.depth -= 1
            offset += self.nodes[use.node].width

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
            staged = node.is_row or node.op in ("dot", *KEPT) or (index in self.scalar and node.op != "load")
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
            if index in seen or index in self.scalar or node.is_row or node.op in KEPT:
                continue
            seen.add(index)
            if node.op == "load" and self.program.operands[int(node.value)].bits:
                bits.add(self.program.operands[int(node.value)].bits)
            stack += [use.node for use in node.args]
        if len(bits) > 1:
            raise Unsupported(f"codes of {sorted(bits)} bits in one sum")
        return Tiling.of(width, bits.pop() if bits else 0)


def write_source(program: Program) -> str:
    """The source of a module with the numba kernel ``kernel`` of ``program``.

    Raises:
        Unsupported: If there is no kernel of it.
    """
    return Writer(program.check()).write()
