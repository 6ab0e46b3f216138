"""Configuration of a conversion."""

from .checks import check_levels, check_number, check_one_of
from .quant import GRANULARITIES, LEVELS, Granularity, Levels, QuantConfig, Site, Truncation
from .smp import SMPConfig
from .widths import BITS, MULTILEVEL_BITS, OFF, shown_widths

__all__ = [
    "BITS",
    "GRANULARITIES",
    "LEVELS",
    "MULTILEVEL_BITS",
    "OFF",
    "Granularity",
    "Levels",
    "QuantConfig",
    "SMPConfig",
    "Site",
    "Truncation",
    "check_levels",
    "check_number",
    "check_one_of",
    "shown_widths",
]
