"""The recorded figures as the tables of docs/benchmarks.md, and the form in which a figure is shown.

python benchmarks/table.py writes the document from benchmarks/results.json; benchmarks/run.py does it after each benchmark.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `python benchmarks/table.py` from `benchmarks/results.json`, which `make bench` records. Candidates of a comparison
run in turn in one process, A B C, B C A …: *median* is the time of one run, *spread* the distance of its quartiles over it, and
*× first* the median over the rounds of the ratio to the first candidate in the same round. *Tensors* is the most that torch's
allocator has handed out at once beyond the inputs, the same in every run; *resident* the growth of a fresh process, which
differs by up to a fifth between processes that do the same. Bounds on memory are judged by the tensors, bounds on time by the
ratios.
"""


def main() -> None:
    DOCUMENT.write_text(document(json.loads(RESULTS.read_text())))


def document(results: dict[str, Any]) -> str:
    """The text of docs/benchmarks.md."""
    return "\n".join([INTRODUCTION, *(line for name, entry in results.items() for line in _section(name, entry))])


def _section(name: str, entry: dict[str, Any]) -> Iterator[str]:
    environment = entry["environment"]
    yield f"## {name}\n"
    yield (
        f"`{environment['command']}`, {environment['date']}: {environment['processor']}, {environment['cores']} cores, "
        f"{environment['threads']} threads, load {environment['load']:.1f} at the end, torch {environment['torch']}, "
        f"Python {environment['python']}\n"
    )
    if entry["targets"]:
        yield from _markdown([bound(target) for target in entry["targets"]])
    for table in entry["tables"]:
        yield f"{table['title'][0].upper()}{table['title'][1:]}\n"
        yield from _markdown(table["rows"])
    for note in entry["notes"]:
        yield f"Note: {note}.\n"


def bound(target: dict[str, Any]) -> dict[str, str]:
    """A target as a row of a table."""
    return {
        "bound": target["name"],
        "measured": f"{target['measured']:.3f}",
        "wanted": f"{'at least' if target['at_least'] else 'at most'} {target['bound']:.3g}",
        "outcome": "met" if target["met"] else "missed",
    }


def _markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = columns(rows)
    yield f"| {' | '.join(heading(name) for name in names)} |"
    yield f"|{'|'.join('---' if is_text(rows, name) else '---:' for name in names)}|"
    for row in rows:
        yield f"| {' | '.join(cell(name, row.get(name)) for name in names)} |"
    yield ""


def columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def is_text(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) for row in rows)


def heading(name: str) -> str:
    return name.removesuffix(" s").removesuffix(" bytes")


def cell(name: str, value: Any) -> str:
    """A figure with the unit that its column's name tells: ``… s`` seconds, ``… bytes`` bytes, ``spread`` a part of one."""
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
