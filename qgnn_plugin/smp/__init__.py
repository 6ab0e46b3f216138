"""Smoothness-aware message propagation and the differential multiplier method."""

from .constraint import ConstraintState, SmoothLayer, dirichlet_energy
from .multiplier import MultiplierState, differential_multiplier_step, smp_layers
from .propagation import SMPropagation

__all__ = [
    "ConstraintState",
    "MultiplierState",
    "SMPropagation",
    "SmoothLayer",
    "differential_multiplier_step",
    "dirichlet_energy",
    "smp_layers",
]
