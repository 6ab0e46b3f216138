"""Row programs as Triton kernels: the source of a module, from the same expression as :mod:`.cpu`.

One program instance takes one destination row.  Each group of reductions is a loop over the row's edges that evaluates
what it needs from the operands and from reductions before it: nothing is kept per edge, so a softmax over neighbours
computes its logits three times.  A node of ``width`` numbers is a block of the next power of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..layout import next_power_of_two, parts_per_byte, row_bytes, row_words, top_code
from .kept import arrays_of
from .program import ELEMENTWISE, REDUCTIONS, WITH_VALUE, Node, Operand, Product, Program, Unsupported, Use

__all__ = ["write_triton"]

MAX_ONE_HOT = 1 << 14  # numbers of a sum over runs of features
MAX_WEIGHTS = 1 << 13  # numbers of the weights that edges are mapped by: more do not stay in registers

HEADER = '''"""A kernel written by qgnn_plugin.kernels.generated.triton; changes are overwritten."""

import triton
import triton.language as tl
from qgnn_plugin.kernels.generated.functions import expm1, log1p, sigmoid, softplus, tanh

'''
PRODUCTS = """
from qgnn_plugin.kernels.generated.edge_product import column_terms, edge_product, weight_codes

"""

_CALLS = {
    "copy": "{0}", "neg": "-{0}", "abs": "tl.abs({0})", "relu": "tl.where({0} < 0.0, 0.0, {0})", "exp": "tl.exp({0})",
    "expm1": "expm1({0})", "log": "tl.log({0})", "log1p": "log1p({0})", "sqrt": "tl.sqrt({0})",
    "sigmoid": "sigmoid({0})", "tanh": "tanh({0})", "softplus": "softplus({0})", "add": "{0} + {1}",
    "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})", "greater": "tl.where({0} > {1}, 1.0, 0.0)",
    "greater_equal": "tl.where({0} >= {1}, 1.0, 0.0)", "where": "tl.where({0} != 0.0, {1}, {2})",
    "leaky_relu": "tl.where({0} > 0.0, {0}, {0} * {value!r})",
}  # fmt: skip
assert set(_CALLS) == set(ELEMENTWISE) | set(WITH_VALUE)

_START = {"sum": "0.0", "max": "float('-inf')", "min": "float('inf')"}
_JOIN = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}


_block = next_power_of_two  # places of a vector of so many numbers


@dataclass
class _Writer:
    program: Program
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    names: int = 0
    known: dict[int, str] = field(default_factory=dict)  # rows, and what the edge at hand has computed

    def put(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def named(self, text: str) -> str:
        self.names += 1
        self.put(f"v{self.names} = {text}")
        return f"v{self.names}"

    def write(self) -> str:
        program = self.program
        operands = [name for k, o in enumerate(program.operands) for name in arrays_of(k, o)]
        outs = [f"out{k}" for k in range(len(program.outputs) + len(program.edge_outputs))]
        operands += [name for k in range(len(program.products)) for name in _product_arrays(k)]
        self.lines += ["", "@triton.jit", f"def kernel({', '.join(['rowptr', 'col', 'edge', *operands, *outs])}):"]
        self.put("i = tl.program_id(0).to(tl.int64)")
        self.put("begin = tl.load(rowptr + i)")
        self.put("end = tl.load(rowptr + i + 1)")
        widths = [*(node.width for node in program.nodes), *(product.num_in for product in program.products)]
        for width in sorted({_block(width) for width in widths}):
            self.put(f"f{width} = tl.arange(0, {width})")
        for number, product in enumerate(program.products):
            self.weight(number, product)
        done: set[int] = set()
        for index, node in enumerate(program.nodes):
            if node.op in REDUCTIONS and index not in done:
                done |= self.reductions(index)
            elif node.is_row and node.op not in ("literal", *REDUCTIONS):
                self.known[index] = self.named(self.text(node))
        self.edge_outputs()
        return HEADER + PRODUCTS * bool(program.products) + "\n".join(self.lines) + "\n"

    def reductions(self, first: int) -> set[int]:
        """This reduction and those after it that need nothing more: one loop over the edges."""
        nodes = self.program.nodes
        group = [k for k in range(first, len(nodes)) if nodes[k].op in REDUCTIONS and not self.waits(k, first)]
        for k in group:
            self.put(f"r{k} = tl.full([{_block(nodes[k].width)}], {_START[nodes[k].op]}, tl.float32)")
        self.loop()
        for k in group:
            value = self.value(Use(nodes[k].args[0].node), nodes[k].width)
            self.put(f"r{k} = " + _JOIN[nodes[k].op].format(f"r{k}", value))
        self.end_loop()
        for k in group:
            if nodes[k].op != "sum":
                self.put(f"r{k} = tl.where(begin < end, r{k}, 0.0)")
            self.known[k] = f"r{k}"
            width = nodes[k].width
            for number, output in enumerate(self.program.outputs):
                if output == k:
                    f = f"f{_block(width)}"
                    self.put(f"tl.store(out{number} + i * {width} + {f}, r{k}, mask={f} < {width})")
        return set(group)

    def edge_outputs(self) -> None:
        if not self.program.edge_outputs:
            return
        self.loop()
        for number, index in enumerate(self.program.edge_outputs, len(self.program.outputs)):
            width = self.program.nodes[index].width
            f = f"f{_block(width)}"
            value = self.value(Use(index), width)
            self.put(f"tl.store(out{number} + own * {width} + {f}, {value}, mask={f} < {width})")
        self.end_loop()

    def loop(self) -> None:
        self.before = dict(self.known)
        self.put("for e in range(begin, end):")
        self.depth += 1
        self.put("source = tl.load(col + e).to(tl.int64)")
        self.put("own = tl.load(edge + e).to(tl.int64)")

    def end_loop(self) -> None:
        self.depth -= 1
        self.known = self.before

    def waits(self, later: int, first: int) -> bool:
        seen, stack = set(), [use.node for use in self.program.nodes[later].args]
        while stack:
            index = stack.pop()
            if index in seen:
                continue
            seen.add(index)
            node = self.program.nodes[index]
            if index >= first and node.is_row and node.op != "literal":
                return True
            stack += [use.node for use in node.args]
        return False

    # -- expressions ----------------------------------------------------------------------------------------------

    def value(self, use: Use, width: int) -> str:
        """A node's block, spread to ``width`` numbers."""
        node = self.program.nodes[use.node]
        if node.op == "literal":
            return self.literal(node.value)
        if use.node not in self.known:
            self.known[use.node] = self.named(self.text(node))
        name = self.known[use.node]
        if node.width == width:
            return name
        f = f"f{_block(width)}"
        if node.width == 1:
            return f"tl.sum({name}, 0)"
        share = f"tl.minimum({f} // {width // node.width}, {node.width - 1})"
        share = f"{f} % {node.width}" if use.mode == "tile" else share
        return self.named(f"tl.gather({name}, {share}, 0)")

    def literal(self, value: float) -> str:
        return f"float('{value}')" if value != value or abs(value) == float("inf") else repr(float(value))

    def text(self, node: Node) -> str:
        if node.op == "load":
            return self.load(int(node.value))
        if node.op == "dot":
            return self.dot(node)
        if node.op == "map":
            return self.map(node)
        if node.op == "top":
            return self.top(node)
        if node.op == "join":
            return self.side_by_side(node.args, node.width)
        if node.op == "linear":
            return self.linear(node)
        args = [self.value(use, node.width) for use in node.args]
        if all(self.program.nodes[use.node].op == "literal" for use in node.args):
            args[0] = f"tl.full([{_block(node.width)}], {args[0]}, tl.float32)"
        return _CALLS[node.op].format(*(f"({arg})" for arg in args), value=node.value)

    def dot(self, node: Node) -> str:
        width = self.program.nodes[node.args[0].node].width
        value, f, heads = self.value(node.args[0], width), f"f{_block(width)}", _block(node.width)
        if node.width == 1:
            return f"tl.sum(tl.where({f} < {width}, {value}, 0.0), 0) + tl.zeros([1], tl.float32)"
        if heads * _block(width) > MAX_ONE_HOT:
            raise Unsupported(f"{node.width} sums over {width} features per edge")
        own = f"({f}[None, :] // {width // node.width} == f{heads}[:, None]) & ({f}[None, :] < {width})"
        return f"tl.sum(tl.where({own}, {value}[None, :], 0.0), 1)"

    def top(self, node: Node) -> str:
        """The largest of runs of few numbers."""
        width = self.program.nodes[node.args[0].node].width
        value, f = self.value(node.args[0], width), f"f{_block(width)}"
        own = f"({f}[None, :] // {width // node.width} == f{_block(node.width)}[:, None]) & ({f}[None, :] < {width})"
        return f"tl.max(tl.where({own}, {value}[None, :], float('-inf')), 1)"

    def side_by_side(self, parts: tuple[Use, ...], width: int) -> str:
        """What is read, one behind the other; lanes past ``width`` hold whatever is there."""
        f, offset, joined = f"f{_block(width)}", 0, ""
        for use in parts:
            part = self.program.nodes[use.node]
            value = self.value(Use(use.node), part.width)
            if part.width == width:
                return value
            if part.width == 1 and part.op != "literal":
                value = f"tl.sum({value}, 0)"
            elif part.width > 1:
                value = f"tl.gather({value}, tl.minimum(tl.maximum({f} - {offset}, 0), {part.width - 1}), 0)"
            joined = self.named(f"tl.where({f} >= {offset}, {value}, {joined or '0.0'})")
            offset += part.width
        return joined

    # -- linear maps of edges -------------------------------------------------------------------------------------

    def weight(self, number: int, product: Product) -> None:
        """A weight in registers, before the edges that are mapped by it."""
        sizes = _sizes(product)
        every = [_sizes(product) for product in self.program.products]
        if sum(inner * outer for *_, inner, outer in every) > MAX_WEIGHTS:
            raise Unsupported(f"a map of {product.num_in} to {product.num_out} features per edge on an accelerator")
        words, scale, lower, *_ = _product_arrays(number)
        layout = f"{product.w_bits}, {row_bytes(product.num_in, product.w_bits)}"
        shape = ", ".join(map(str, sizes))
        self.put(f"{words}_codes = weight_codes({words}, {shape}, {layout})")
        self.put(f"{words}_columns = column_terms({words}_codes, {scale}, {lower}, {shape})")

    def linear(self, node: Node) -> str:
        number = int(node.value)
        product = self.program.products[number]
        x = self.side_by_side(node.args, product.num_in)
        words, *others = _product_arrays(number)
        options = f"{product.x_bits}, {product.has_unit}, {product.has_bias}"
        shape = ", ".join(map(str, _sizes(product)))
        return f"edge_product({x}, {words}_codes, {words}_columns, {', '.join(others)}, {shape}, {options})"

    def map(self, node: Node) -> str:
        x, matrix = (self.program.nodes[use.node] for use in node.args)
        value, k, f = self.value(node.args[0], x.width), f"f{_block(x.width)}", f"f{_block(node.width)}"
        inside = f"({k}[:, None] < {x.width}) & ({f}[None, :] < {node.width})"
        rows = f"tl.load(a{int(matrix.value)} + {k}[:, None] * {node.width} + {f}[None, :], mask={inside}, other=0.0)"
        return f"tl.sum({value}[:, None] * {rows}, 0)"

    def load(self, number: int) -> str:
        operand = self.program.operands[number]
        row = {"source": "source", "target": "i", "edge": "own", "constant": "0"}[operand.side]
        f = f"f{_block(operand.width)}"
        if not operand.bits:
            return f"tl.load(a{number} + {row} * {operand.width} + {f}, mask={f} < {operand.width}, other=0.0)"
        return self.decoded(number, operand, row, f)

    def decoded(self, number: int, operand: Operand, row: str, f: str) -> str:
        width, step = operand.width, row_bytes(operand.width, operand.bits)
        assert parts_per_byte(operand.bits) * operand.bits == 8
        at = f"{row} * {row_words(width, operand.bits)} + ({f} % {step}) // 4"
        word = self.named(f"tl.load(a{number} + {at}, mask={f} < {width}, other=0)")
        shift = f"8 * (({f} % {step}) % 4) + {operand.bits} * ({f} // {step})"
        code = self.named(f"(({word} >> ({shift})) & {top_code(operand.bits)}).to(tl.float32)")
        ends = []
        for what in ("scale", "lower"):
            name = f"a{number}_{what}"
            if operand.ranges == "column":
                ends.append(f"tl.load({name} + {f}, mask={f} < {width}, other=0.0)")
            else:
                ends.append(f"tl.load({name} + {row if operand.ranges == 'row' else 0})")
        return f"{code} * {ends[0]} + {ends[1]}"


def _sizes(product: Product) -> tuple[int, int, int, int]:
    """Inputs and outputs, and the next powers of two."""
    return product.num_in, product.num_out, _block(product.num_in), _block(product.num_out)


def _product_arrays(number: int) -> list[str]:
    """The arguments that a product takes, in the order of its arrays."""
    name = f"p{number}"
    return [name, f"{name}_scale", f"{name}_lower", f"{name}_bias", f"{name}_step", f"{name}_low", f"{name}_unit"]


def write_triton(program: Program) -> str:
    """The source of a module with the Triton kernel ``kernel`` of ``program``.

    Raises:
        Unsupported: If there is no kernel of it.
    """
    return _Writer(program.check()).write()
