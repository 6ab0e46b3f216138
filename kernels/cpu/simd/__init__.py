"""Explicit vectors inside numba kernels: a value type over LLVM vectors, with loads, stores,
arithmetic and casts.

A ``Vector(element, lanes)`` lives in registers.  LLVM legalizes any power-of-two number of lanes to
what the machine has (AVX-512, AVX2, SSE, NEON), so a kernel is written once.  Integer lanes are
unsigned where it matters (shifts, casts, ``vmax``). Float operations carry no fast-math flags: LLVM
neither contracts nor reassociates them.

``array`` arguments are C-contiguous, ``offset`` counts elements from the start of the array's data,
and nothing is bounds-checked.
"""
# mypy: ignore-errors

from __future__ import annotations

from .arithmetic import (
    vabs,
    vcast,
    vclimb,
    vfirst,
    vfma,
    vfold_max,
    vfold_sum,
    vfull_adder,
    vmax,
    vmin,
    vpositive,
    vreach,
    vround,
    vrun_sum,
    vsplat,
    vstep,
    vsum,
    vtile,
    vtop,
    vview,
    vwithin,
)
from .codes import (
    vjoin,
    vlanes,
    vload_parts,
    vspread,
    vstore_parts,
)
from .dots import has_feature, vdot, vdot_small
from .memory import (
    atomic_add,
    keep,
    peek,
    poke,
    prefetch,
    raw,
    raw_aligned,
    raw_at,
    vgather,
    vheads,
    vlive,
    vload,
    vload_first,
    vstore,
    vstore_first,
    vstream,
)
from .vectors import (
    Vector,
)

__all__ = [
    "Vector",
    "atomic_add",
    "has_feature",
    "keep",
    "peek",
    "poke",
    "prefetch",
    "raw",
    "raw_aligned",
    "raw_at",
    "vabs",
    "vcast",
    "vclimb",
    "vdot",
    "vdot_small",
    "vfirst",
    "vfma",
    "vfold_max",
    "vfold_sum",
    "vfull_adder",
    "vgather",
    "vheads",
    "vjoin",
    "vlanes",
    "vlive",
    "vload",
    "vload_first",
    "vload_parts",
    "vmax",
    "vmin",
    "vpositive",
    "vreach",
    "vround",
    "vrun_sum",
    "vsplat",
    "vspread",
    "vstep",
    "vstore",
    "vstore_first",
    "vstore_parts",
    "vstream",
    "vsum",
    "vtile",
    "vtop",
    "vview",
    "vwithin",
]
