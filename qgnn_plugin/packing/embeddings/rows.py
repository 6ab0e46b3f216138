"""State of nodes that is read and written row by row, kept as packed codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.layout import PACKED_BITS, check_bits, row_words
from ...kernels.quantize_pack import quantize_pack
from ...kernels.unpack_dequantize import unpack_dequantize

__all__ = ["PackedRows", "pack_rows"]


class PackedRows(nn.Module):
    r"""A table ``[N, F]`` that is read and written by rows, such as the memory of a temporal network, as codes.

    A row has a range of its own, from its least to its largest value: :math:`\hat x_i = c_i s_i + l_i`, an error of at
    most :math:`s_i / 2 = (\max_f x_{if} - \min_f x_{if}) / (2 (2^b - 1))`.  It takes
    ``4 * row_words(F, bits) + 8`` bytes in place of ``4 F``.  Rows are dequantized as they are read and quantized
    as they are written; what is written has no gradient.

    Args:
        rows: ``[N, F]`` of floats, what the table holds at first.
        bits: 2, 4 or 8.

    Raises:
        ValueError: If ``rows`` is no matrix of floats, or other widths are asked for.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor

    def __init__(self, rows: Tensor, bits: int = 8) -> None:
        super().__init__()
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
            found = f"{rows.dtype}, {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"Expected rows of floats [N, F] (got {found})")
        check_bits(bits, widths=PACKED_BITS[1:])
        self.bits, self.num_features, self.dtype = bits, rows.size(1), rows.dtype
        count = rows.size(0)
        self.register_buffer("words", rows.new_zeros((count, row_words(rows.size(1), bits)), dtype=torch.int32))
        self.register_buffer("scale", rows.new_ones((count, 1), dtype=torch.float32))
        self.register_buffer("lower", rows.new_zeros((count, 1), dtype=torch.float32))
        self[:] = rows

    def __getitem__(self, index: Any) -> Tensor:
        """Rows ``[M, F]``: of an int64 ``[M]``, a boolean ``[N]`` or a slice."""
        words, scale, lower = (_matrix(t[index]) for t in (self.words, self.scale, self.lower))
        return unpack_dequantize(words, scale, lower, self.num_features, self.bits).to(self.dtype)

    @torch.no_grad()
    def __setitem__(self, index: Any, rows: Tensor) -> None:
        """Quantize rows ``[M, F]`` and put them where ``index`` says, which names each row at most once.

        Raises:
            ValueError: If they are of another width or number, or hold a NaN or an infinity.
        """
        wanted = (*self.scale[index].shape[:-1], self.num_features)
        if not isinstance(rows, Tensor) or rows.shape != wanted or len(wanted) != 2:
            found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"Expected rows of shape {list(wanted)} (got {found})")
        if not rows.numel():
            return
        x = rows.detach().to(torch.float32)
        lower, upper = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if not bool((upper - lower).isfinite().all()):
            raise ValueError("Expected finite rows (got NaN or infinity)")
        # A row of one value has that as its lower end, and any step.
        scale = torch.where(upper > lower, (upper - lower) / (2**self.bits - 1), torch.ones_like(lower))
        self.words[index] = quantize_pack(x.contiguous(), scale, lower, self.bits)
        self.scale[index], self.lower[index] = scale, lower

    def __len__(self) -> int:
        return self.words.size(0)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.num_features))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.lower))

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        """An uninitialized tensor of floats, on this device; as of a tensor."""
        options = {"dtype": self.dtype, "device": self.device, **options}
        return torch.empty(*size, **options)

    def zero_(self) -> PackedRows:
        """Set every row to zero."""
        self.words.zero_()
        self.scale.fill_(1.0)
        self.lower.zero_()
        return self

    def fill_(self, value: float) -> PackedRows:
        """Set every value."""
        self.zero_().lower.fill_(value)
        return self

    def detach_(self) -> PackedRows:
        """Nothing to do: what was written has no gradient."""
        return self

    def forward(self, index: Tensor) -> Tensor:
        return self[index]

    def extra_repr(self) -> str:
        return f"{len(self)} x {self.num_features}, bits={self.bits}, {self.nbytes:,} bytes"


def _matrix(rows: Tensor) -> Tensor:
    return rows.contiguous() if rows.dim() == 2 else rows.unsqueeze(0)


def pack_rows(module: nn.Module, name: str = "memory", bits: int = 8) -> PackedRows:
    """Keep a buffer ``[N, F]`` of ``module`` as packed codes from now on, in place.

    The code of ``module`` reads and writes it by rows as before, ``module.memory[index]``; that is how
    :class:`torch_geometric.nn.TGNMemory` uses its ``memory``.  Anything else it does with a tensor, such as arithmetic
    on the whole of it, raises.  Its entry in state dicts becomes three, of codes and ranges.

    Args:
        module: Such as ``packed.memory`` of a packed model, or of one that trains.
        name: Name of the buffer.
        bits: 2, 4 or 8.

    Returns:
        The table.

    Raises:
        ValueError: If ``module`` has no such buffer, or it is no matrix of floats.
    """
    buffer = module._buffers.get(name) if isinstance(module, nn.Module) else None
    if buffer is None:
        names = ", ".join(n for n, _ in module.named_buffers(recurse=False)) if isinstance(module, nn.Module) else ""
        raise ValueError(f"Expected the name of a buffer of {type(module).__name__} (got {name!r}; it has: {names})")
    table = PackedRows(buffer, bits)
    delattr(module, name)
    module.register_module(name, table)
    return table
