"""Run the benchmarks, print their tables beside the targets, and record the figures in benchmarks/results.json.

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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from timing import Figures, Table

RESULTS = Path(__file__).with_name("results.json")
BENCHMARKS = ("loss", "embedding", "step", "engine", "prepare", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="run these alone")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, nothing recorded")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in arguments.only:
        started = time.perf_counter()
        figures: Figures = importlib.import_module(name).run(quick=arguments.quick)
        show(console, name, figures, time.perf_counter() - started)
        if not arguments.quick:
            record(name, figures)


def show(console: Console, name: str, figures: Figures, seconds: float) -> None:
    console.rule(f"{name}, {seconds:.0f} s")
    for table in figures.tables:
        console.print(_rich(table))
    for target in figures.targets:
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:.3g}"
        mark = "[green]met[/]" if target.met else "[red]missed[/]"
        console.print(f"target {mark}: {target.name}: {target.measured:.3f}, {bound}", highlight=False, soft_wrap=True)
    for note in figures.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def record(name: str, figures: Figures) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    entry = dataclasses.asdict(figures)
    for target, values in zip(figures.targets, entry["targets"], strict=True):
        values["met"] = target.met
    results[name] = {"environment": environment(), **entry}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


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


def _rich(table: Table) -> RichTable:
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    rich = RichTable(title=table.title, title_justify="left")
    for name in columns:
        left = any(isinstance(row.get(name), str) for row in table.rows)
        rich.add_column(name.removesuffix(" s").removesuffix(" bytes"), justify="left" if left else "right")
    for row in table.rows:
        rich.add_row(*(_cell(name, row.get(name)) for name in columns))
    return rich


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name.endswith(" s"):
        return f"{1e3 * value:,.1f} ms"
    if name.endswith(" bytes"):
        return f"{value / 1e6:,.1f} MB"
    if name == "spread":
        return f"{value:.0%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


if __name__ == "__main__":
    main()
