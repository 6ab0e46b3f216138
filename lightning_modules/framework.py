"""Lightning under either of its names.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code under two names whose classes do not know each other:
a ``lightning.Trainer`` refuses a module of the other name.  The modules of this package are those of ``lightning``
where that has been imported before them (``import lightning as L`` comes first in a sorted file), else of
``pytorch_lightning``.  ``QGNN_LIGHTNING=pytorch_lightning`` or ``=lightning`` decides for a process that has both.

Callbacks work under both whichever is chosen: trainers ask them for their hooks only.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "FRAMEWORK",
    "CombinedLoader",
    "MisconfigurationException",
    "TrainerFn",
    "isolate_rng",
    "pl",
    "rank_zero_warn",
]

VARIABLE = "QGNN_LIGHTNING"
NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def _chosen() -> str:
    name = os.environ.get(VARIABLE) or ("lightning" if "lightning.pytorch" in sys.modules else "pytorch_lightning")
    if name not in NAMES:
        raise ValueError(f"Expected {VARIABLE} to be one of {', '.join(NAMES)} (got {name!r})")
    return NAMES[name]


FRAMEWORK = _chosen()


def _part(path: str) -> Any:
    return importlib.import_module(f"{FRAMEWORK}.{path}")


if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.trainer.states import TrainerFn
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.rank_zero import rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    pl = importlib.import_module(FRAMEWORK)
    TrainerFn = _part("trainer.states").TrainerFn
    CombinedLoader = _part("utilities.combined_loader").CombinedLoader
    MisconfigurationException = _part("utilities.exceptions").MisconfigurationException
    rank_zero_warn = _part("utilities.rank_zero").rank_zero_warn
    isolate_rng = _part("utilities.seed").isolate_rng
