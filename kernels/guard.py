"""A check, inside compiled and exported code, that tensors hold what they held when a constant was made from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checksum import checksum, checksum_reference
from .library import register_fake

__all__ = ["checksums", "require_same"]

_library = torch.library.Library("qgnn", "FRAGMENT")
_library.define("holds(Tensor[] tensors, str checksums, str message) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def checksums(tensors: Sequence[Tensor]) -> str:
    """The contents of ``tensors`` as a constant of compiled code; waits for their device."""
    return " ".join(str(checksum(tensor)) for tensor in tensors)


def _holds(tensors: Sequence[Tensor], checksums: str, message: str) -> Tensor:
    expected = [int(word) for word in checksums.split()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        if [checksum(tensor) for tensor in tensors] != expected:
            raise ValueError(message)
        return torch.ones((), dtype=torch.bool)
    equal = [checksum_reference(tensor) == value for tensor, value in zip(tensors, expected, strict=True)]
    return torch.stack(equal).all()


def _fake(tensors: Sequence[Tensor], checksums: str, message: str) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.bool)


_library.impl("holds", _holds, "CompositeExplicitAutograd")
register_fake("holds", _fake, _library)


def require_same(tensors: Sequence[Tensor], checksums: str, message: str) -> None:
    """Raise where ``tensors`` are others than those of :func:`checksums`.

    On the CPU that is a ``ValueError``; on an accelerator, whose contents are compared there, an assertion of the
    device that is reported when it is next waited for.
    """
    # The assertion is what keeps compilers from dropping the call.
    torch._assert_async(torch.ops.qgnn.holds(tensors, checksums, message), message)
