"""The table of a run, from its rows alone: ``python3 -m benchmarks.gpu.report FILE`` of one that was cut off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import Row, read

__all__ = ["markdown", "ratios", "report_name"]

LONGEST = 110  # characters of a cell


def report_name(rows: Iterable[Row]) -> str:
    """``gpu-<device>``, for a file's name."""
    name = next((row["name"] for row in rows if row.get("kind") == "device"), "unknown")
    return "gpu-" + "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def ratios(rows: list[Row], keys: Sequence[str], baseline: Callable[[Row], bool], name: str) -> None:
    """Add ``name``: the fastest baseline's time over each row's, among rows that agree on ``keys``."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if baseline(row) and "ms" in row:
            group = tuple(row.get(key) for key in keys)
            best[group] = min(row["ms"], best.get(group, row["ms"]))
    for row in rows:
        least = best.get(tuple(row.get(key) for key in keys))
        if least and row.get("ms"):
            row[name] = least / row["ms"]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")[:LONGEST]


def _table(title: str, rows: list[Row], columns: dict[str, str]) -> list[str]:
    if not rows:
        return []
    head = "| " + " | ".join(columns.values()) + " |"
    lines = [f"## {title}", "", head, "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |" for row in rows]
    return [*lines, ""]


TIMES = {"ms": "ms", "spread": "spread", "eager_ms": "eager ms", "host_us": "host us", "peak_bytes": "peak bytes"}
PYG = "PyG "


def _fp32(row: Row) -> bool:
    name = row["name"]
    plain = "TF32" not in name and "16" not in name
    return plain and (name.startswith((PYG, "cuSPARSE", "edge_index")) or name == "fp32")


def _theirs(row: Row) -> bool:
    return not row["name"].startswith("int")


def markdown(rows: list[Row]) -> str:
    """Everything that was found, and what was not."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(dict(row))
    lines = [*_head(kinds), *_checks(kinds.get("check", []))]
    copy_rate = max((row.get("bytes_per_second", 0.0) for row in kinds.get("ceiling", [])), default=0.0)
    for kind, keys in (
        ("aggregate", ("graph", "features")), ("linear", ("shape",)), ("inference", ("graph", "model")),
        ("training", ("graph", "model")),
    ):  # fmt: skip
        ratios(kinds.get(kind, []), keys, _fp32, "vs_fp32")
        ratios(kinds.get(kind, []), keys, _theirs, "vs_best")
    for row in kinds.get("aggregate", []):
        if copy_rate and row.get("ms") and "bytes_once" in row:
            row["of_copy"] = row["bytes_once"] / (1e-3 * row["ms"]) / copy_rate
            row["gathered_of_copy"] = row["bytes_gathered"] / (1e-3 * row["ms"]) / copy_rate
    versus = {"vs_fp32": "vs fp32", "vs_best": "vs best", "capture_error": "not captured"}
    shares = {"of_copy": "of copy, once", "gathered_of_copy": "of copy, gathered"}
    lines += _table(
        "aggregate", kinds.get("aggregate", []),
        {"graph": "graph", "features": "features", "name": "what", **TIMES, **versus, **shares},
    )  # fmt: skip
    shape = {"rows": "rows", "shape": "shape", "name": "what"}
    lines += _table("linear", kinds.get("linear", []), {**shape, **TIMES, **versus})
    model = {"graph": "graph", "model": "model", "name": "what", **TIMES, **versus}
    lines += _table("Inference", kinds.get("inference", []), model)
    lines += _table("Training step", kinds.get("training", []), model)
    lines += _table("Tuning", kinds.get("tuning", []), {"kernel": "kernel", "bits": "bits", "name": "setting", **TIMES})
    profile = {"model": "model", "name": "what"} | {key: key for key in ("kernel", "us", "launches", "share")}
    lines += _table("Kernels of a forward pass", kinds.get("profile", []), profile)
    lines += _counters(kinds.get("counters", []))
    failures = {"section": "section", "unit": "unit", "error": "what"}
    lines += _table("Not measured", kinds.get("failure", []), failures)
    return "\n".join(lines)


def _head(kinds: dict[str, list[Row]]) -> list[str]:
    device = next(iter(kinds.get("device", [])), {"name": "unknown"})
    versions = device.get("environment", {}).get("versions", {})
    lines = [f"# GPU run: {device['name']}", ""]
    if device.get("dry"):
        lines += ["A dry run: interpreted on tiny graphs; no time in here means anything.", ""]
    lines += [
        "Python " + str(device.get("environment", {}).get("python")) + ", "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version) + ". `ms` is the median "
        "call of a replayed CUDA graph; `spread` its largest over its smallest, less one; `eager ms` calls without a "
        "graph; `host us` what one such call takes of the host. `vs fp32` and `vs best` are times as fast as the best "
        "way in fp32 without TF32, and in any precision. `of copy`: bytes that must move, every row once or once per "
        "edge, over what a copy moves in that time.", "",
    ]  # fmt: skip
    lines += _table("Ceilings", kinds.get("ceiling", []), {
        "name": "what", "bytes": "bytes", "ms": "ms", "bytes_per_second": "bytes/s",
        "operations_per_second": "operations/s",
    })  # fmt: skip
    sections = kinds.get("section", [])
    caches = {row["section"]: row for row in kinds.get("cache", [])}
    for row in sections:
        cache = caches.get(row["section"], {})
        row["cache"] = f"{cache['hits']} / {cache['compiled']}" if cache else ""
    columns = {"section": "section", "status": "status", "seconds": "s", "cache": "kernels from the cache / compiled"}
    return lines + _table("Sections", sections, columns) + _compiled(kinds.get("compiled", []))


def _compiled(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    binaries, hits = (sum(row.get(key, 0) for row in rows) for key in ("binaries", "hits"))
    slowest = max(rows, key=lambda row: row.get("seconds", 0.0))
    lines = [
        f"Compiled beforehand: {binaries} kernels in {len(rows)} tasks, {hits} more were in the cache; the slowest "
        f"task, {slowest['task']}, took {slowest.get('seconds', 0.0):.0f} s.", "",
    ]  # fmt: skip
    wrong = [row for row in rows if row.get("error")]
    return lines + _table("Tasks with errors", wrong, {"task": "task", "error": "error"})


def _checks(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row["error"]]
    lines = [f"{len(rows)} checks of ops and models against the references, {len(failed)} failed.", ""]
    columns = {"section": "section", "check": "check", "features": "features", "error": "error"}
    return lines + _table("Failed checks", failed, columns)


def _counters(rows: list[Row]) -> list[str]:
    """Long names and few launches: one row per counter."""
    found = [
        {"name": row["name"], "kernel": row["kernel"], "counter": key, "value": value}
        for row in rows for key, value in row.items() if "[" in key
    ]  # fmt: skip
    return _table("Hardware counters", found, {k: k for k in ("name", "kernel", "counter", "value")})


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]))))
