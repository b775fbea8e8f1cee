"""Run the benchmarks, print their tables and bounds, and record the figures in benchmarks/results.json and docs/benchmarks.md.

python benchmarks/run.py [--only loss step …] [--quick]

A benchmark replaces its own entry of the file, with the machine and the command that it ran on; --quick takes small shapes
and few rounds and records nothing. Threads are torch's: set OMP_NUM_THREADS to change them.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from table import RESULTS, bound, cell, columns, heading, is_text
from table import main as write_document
from timing import Figures

BENCHMARKS = ("loss", "embedding", "step", "engine", "prepare", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="run these alone")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, nothing recorded")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in arguments.only:
        started = time.perf_counter()
        entry = _entry(importlib.import_module(name).run(quick=arguments.quick))
        _show(console, f"{name}, {time.perf_counter() - started:.0f} s", entry)
        if not arguments.quick:
            _record(name, entry)


def _entry(figures: Figures) -> dict[str, Any]:
    entry = {"environment": environment(), **dataclasses.asdict(figures)}
    for target, values in zip(figures.targets, entry["targets"], strict=True):
        values["met"] = target.met
    return entry


def _show(console: Console, heading: str, entry: dict[str, Any]) -> None:
    console.rule(heading)
    for table in entry["tables"]:
        console.print(_rich(table["title"], table["rows"]))
    if entry["targets"]:
        console.print(_rich("bounds", [bound(target) for target in entry["targets"]]))
    for note in entry["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _record(name: str, entry: dict[str, Any]) -> None:
    results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: entry}
    ordered = {name: results[name] for name in BENCHMARKS if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    write_document()


def environment() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _rich(title: str, rows: list[dict[str, Any]]) -> RichTable:
    rich = RichTable(title=title, title_justify="left")
    for name in columns(rows):
        rich.add_column(heading(name), justify="left" if is_text(rows, name) else "right")
    for row in rows:
        rich.add_row(*(cell(name, row.get(name)) for name in columns(rows)))
    return rich


if __name__ == "__main__":
    main()
