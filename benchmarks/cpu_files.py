"""Sizes of model files: a float state dict against a packed model."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import qgnn_plugin as qgnn

from .cpu_paths import quantized_stack
from .cpu_report import Target, table
from .stacks import STACKS, build_stack

BITS = (2, 4, 8)
TARGETS = {2: 11.0, 4: 6.5}

NOTES = "`torch.save` of the float state dict against `save_packed`, whose header holds configuration and checksums.\n"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"widths": args.widths}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        for name in STACKS:
            torch.save(build_stack(name, args.widths).state_dict(), path)
            size = path.stat().st_size
            rows.append({"model": name, "file": "float state dict", "bytes": size, "float over this": 1.0})
            for bits in BITS:
                qgnn.save_packed(qgnn.pack_model(quantized_stack(name, bits, args.widths)), path)
                packed = path.stat().st_size
                rows.append({"model": name, "file": f"INT{bits}", "bytes": packed, "float over this": size / packed})
    return {"rows": rows}


def markdown(section: Mapping[str, Any]) -> list[str]:
    rows = section["data"]["rows"]
    widths = "-".join(str(width) for width in section["settings"]["widths"])
    return [f"## Model files, {widths}", "", NOTES, *table(list(rows[0]), rows)]


def targets(data: Mapping[str, Any]) -> list[Target]:
    return [
        Target(f"model file, {row['model']}, float over {row['file']}", least, {"": row["float over this"]})
        for row in data["rows"]
        for bits, least in TARGETS.items()
        if row["file"] == f"INT{bits}"
    ]
