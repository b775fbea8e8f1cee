"""Times taken in turn, peaks of memory, and the form in which a benchmark hands back its figures.

Memory is measured twice. The peak of the tensors is what torch's allocator has handed out at once: the same in every run, so
bounds are judged by it. The peak of resident memory holds what libraries and the system take beside it, and differs by up to a
fifth between processes that do the same.
"""

import ctypes
import gc
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages; read when it is loaded

from torch.profiler import ProfilerActivity, profile

#: Rounds of every comparison, at least and at most.
LEAST_ROUNDS, MOST_ROUNDS = 3, 151

Row = dict[str, Any]


@dataclass
class Table:
    """Figures of one comparison. A column named ``… s`` holds seconds, ``… bytes`` bytes, ``× …`` a ratio."""

    title: str
    rows: list[Row] = field(default_factory=list)


@dataclass
class Target:
    """A bound that a figure has to keep: ``measured`` at most (or at least) ``bound``."""

    name: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass
class Figures:
    """What a benchmark returns."""

    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    #: what was not measured, and why
    notes: list[str] = field(default_factory=list)


def progress(comparison: str) -> None:
    """Say on standard error what is measured next."""
    print(f"{time.strftime('%H:%M:%S')}  {comparison}", file=sys.stderr, flush=True)


def in_turn(
    comparison: str, candidates: dict[str, Callable[[], object]], seconds: float, *, warm_up: bool = True
) -> dict[str, Row]:
    """Run the candidates in turn, A B C, B C A …, for about ``seconds``, and return the median of each with its spread.

    Whatever else the machine does falls on all alike, and so does what each leaves in the caches for the next: a fixed order
    made the first of two equal training steps 2 % faster. ``× first`` is the median over the rounds of the ratio to the first
    candidate of the same round, ``spread`` the distance of the quartiles over the median.
    """
    progress(comparison)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    if warm_up:
        for run in candidates.values():
            run()
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and (time.perf_counter() - started) * (done + 1) / done > seconds:
            break
        turn = done % len(candidates)
        for name in [*times][turn:] + [*times][:turn]:
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return {name: summary(values, next(iter(times.values()))) for name, values in times.items()}


def summary(seconds: list[float], reference: list[float]) -> Row:
    """The row of one candidate from the seconds of its rounds and of the reference's, round by round."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median s": median,
        "spread": (high - low) / median,
        "rounds": len(seconds),
        "× first": statistics.median(own / first for own, first in zip(seconds, reference, strict=True)),
    }


def peak_of_tensors(call: Callable[[], object]) -> int:
    """The most bytes of tensors that live at once of those which one call allocates, on a CPU; it counts as a warm-up."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    live = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(live, default=0)


def peak_resident(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes by which one call raises the peak of resident memory, in a fresh process.

    ``prepare(*arguments)`` runs in that process, allocates the inputs and returns the call. Both must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "superpose"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_resident_here, prepare, arguments).result()


def _peak_resident_here(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    call = prepare(*arguments)
    gc.collect()
    # memory that the inputs' making has freed goes back to the system, so that the call cannot reuse it unseen
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _most_resident()
    call()
    return _most_resident() - before


def _most_resident() -> int:
    """VmHWM, in bytes; unlike ru_maxrss it starts again from the resident memory when 5 is written to clear_refs."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
