"""A comparison in numbers and words: summaries over seeds, the verdict, and a table for the terminal.

Everything reads ``results``, the dictionary that `superpose.experiment.compare` writes to results.json. Arms are compared by
validation loss alone, which is plain next-token loss in every stage; the training loss of a superposed stage is a bag loss,
another quantity.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from superpose.experiment.interval import half_interval

COUNT_UNITS = ("", "K", "M", "B", "T")
FLOPS_UNITS = tuple(f" {prefix}FLOPs" for prefix in ("", "K", "M", "G", "T", "P", "E", "Z", "Y"))


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds. Means leave diverged runs out; None where nothing is left to average.

    Losses are validation losses in nats per token. Differences are arm minus baseline, paired by seed: negative is better.
    """

    name: str
    #: Name of the arm that this one is measured against; its own name for the baseline.
    baseline: str
    #: Seeds that trained to a finite loss, and those that did not.
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    final_loss: float | None
    #: Sample standard deviation over seeds; None below two seeds.
    final_loss_deviation: float | None
    bits_per_byte: float | None
    #: Seeds that both this arm and the baseline finished.
    pairs: int
    difference: float | None
    difference_deviation: float | None
    bits_per_byte_difference: float | None
    data_tokens: float | None
    flops: float | None
    seconds: float | None
    positions_per_second: float | None
    #: The baseline's steps divided by the mean step at which the validation loss first reaches the baseline's final loss,
    #: linear between evaluations; None unless every pair reaches it: a mean over the lucky seeds alone would flatter the arm.
    speed_up: float | None


def summarise(results: dict[str, Any]) -> list[ArmSummary]:
    """One summary an arm, in the order of the results. The baseline is the arm of that name, else the first."""
    baseline = find_baseline(results)
    references = {run["seed"]: run for run in finished(baseline)}
    steps = sum(stage["steps"] for stage in baseline["schedule"]["stages"])
    return [_summarise(arm, baseline["name"], references, steps) for arm in results["arms"]]


def _summarise(arm: dict[str, Any], baseline: str, references: dict[int, dict[str, Any]], baseline_steps: int) -> ArmSummary:
    runs = finished(arm)
    pairs = [(run, references[run["seed"]]) for run in runs if run["seed"] in references]
    losses = [run["final_loss"] for run in runs]
    differences = [run["final_loss"] - reference["final_loss"] for run, reference in pairs]
    steps = _mean(_step_reaching(run["evaluations"], reference["final_loss"]) for run, reference in pairs)
    return ArmSummary(
        name=arm["name"],
        baseline=baseline,
        seeds=tuple(run["seed"] for run in runs),
        diverged=tuple(run["seed"] for run in arm["runs"] if is_diverged(run)),
        final_loss=_mean(losses),
        final_loss_deviation=_deviation(losses),
        bits_per_byte=_mean(run["bits_per_byte"] for run in runs),
        pairs=len(pairs),
        difference=_mean(differences),
        difference_deviation=_deviation(differences),
        bits_per_byte_difference=_mean(run["bits_per_byte"] - reference["bits_per_byte"] for run, reference in pairs),
        data_tokens=_mean(run["data_tokens"] for run in runs),
        flops=_mean(run["flops"] for run in runs),
        seconds=_mean(run["seconds"] for run in runs),
        positions_per_second=_mean(run["positions"] / run["seconds"] for run in runs if run["seconds"]),
        speed_up=baseline_steps / steps if steps else None,
    )


def summarise_switches(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The switches of an arm, as a run has them, with means over the runs that finished; None where one has no value.

    Losses are training losses in nats. Where the bag size changes, those before and after answer different questions: their
    difference, the height, tells how rough the switch is, not what was lost.
    """
    names = ("loss_before", "loss_after", "height", "steps_to_recover")
    switches = zip(*(run["switches"] for run in finished(arm)), strict=True)
    return [same[0] | {name: _mean(switch[name] for switch in same) for name in names} for same in switches]


def find_baseline(results: dict[str, Any]) -> dict[str, Any]:
    """The arm that the others are measured against."""
    arms = results["arms"]
    return next((arm for arm in arms if arm["name"] == "baseline"), arms[0])


def is_diverged(run: dict[str, Any]) -> bool:
    """Whether training stopped at a loss that is not finite, or ended with one."""
    return run.get("diverged", False) or not math.isfinite(number(run["final_loss"]))


def finished(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an arm that did not diverge."""
    return [run for run in arm["runs"] if not is_diverged(run)]


def number(value: float | None) -> float:
    """The value, or NaN for None."""
    return math.nan if value is None else float(value)


def _step_reaching(evaluations: Sequence[dict[str, Any]], loss: float) -> float | None:
    before: tuple[float, float] | None = None
    for row in evaluations:
        step, value = row["step"], number(row["eval_loss"])
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value) if math.isfinite(value) else None
    return None


def _mean(values: Iterable[float | None]) -> float | None:
    """None where a value is missing, or all are."""
    values = list(values)
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def verdict(summaries: Sequence[ArmSummary]) -> str:
    """What the comparison shows, in a few plain sentences, with its uncertainty: the best arm against the baseline."""
    base = next(arm for arm in summaries if arm.name == arm.baseline)
    compared = [arm for arm in summaries if arm is not base and arm.difference is not None]
    diverged = [f"{arm.name} (seed {', '.join(map(str, arm.diverged))})" for arm in summaries if arm.diverged]
    if compared:
        # An arm that lost a seed is not ranked above one that finished them all.
        best = min(compared, key=lambda arm: (len(arm.diverged), number(arm.difference)))
        sentences = [_outcome(best, base), _data_used(compared, base)]
    else:
        sentences = ["There is no finished pair of an arm and its baseline to compare."]
    if diverged:
        sentences.append(f"Diverged and left out: {', '.join(diverged)}.")
    return " ".join(sentences)


def _outcome(best: ArmSummary, base: ArmSummary) -> str:
    ahead = number(best.difference) < 0
    cost = number(best.flops) / number(base.flops)
    budget = "at equal FLOPs" if abs(cost - 1) < 0.01 else f"at {cost:.2f}× its FLOPs"
    gap = f"{abs(number(best.difference)):.4f} nats ({abs(number(best.bits_per_byte_difference)):.4f} bits per byte) {budget}"
    if ahead:
        outcome = f"{best.name} is ahead of {base.name} by {gap}"
    else:
        outcome = f"No arm beats {base.name}: the closest, {best.name}, is behind by {gap}"
    if best.difference_deviation is None:
        spread = "; with one seed the spread is unknown, so repeat it with --seeds 3."
    else:
        gain, half = abs(number(best.difference)), half_interval(best.difference_deviation, best.pairs)
        spread = f" (90 % interval from {best.pairs} seeds: {plus_minus(gain - half)} to {plus_minus(gain + half)})"
        spread += "." if gain > half or not ahead else ": this is not a clear gain."
    plain = " At this size and budget superposition does not pay." if not ahead and base.name == "baseline" else ""
    return outcome + spread + plain


def _data_used(arms: Sequence[ArmSummary], base: ArmSummary) -> str:
    baseline = number(base.data_tokens)
    used = [f"{arm.name} {quantity(arm.data_tokens)} ({number(arm.data_tokens) / baseline:.2f}×)" for arm in arms]
    return f"Data tokens: {base.name} {quantity(baseline)}, {', '.join(used)}."


def table(summaries: Sequence[ArmSummary]) -> Table:
    """The results for a terminal: an arm a column, so that a few arms fit into 80 characters."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    result.add_column(overflow="fold")
    columns = [cells(arm) for arm in summaries]
    for column in columns:
        result.add_column(Text(column.pop("arm")), justify="right", overflow="fold")
    for name in columns[0]:
        result.add_row(name, *(column[name] for column in columns))
    return result


def cells(arm: ArmSummary) -> dict[str, str]:
    """What a table says about an arm: heading to text."""
    is_baseline = arm.name == arm.baseline
    return {
        "arm": arm.name,
        "seeds": str(len(arm.seeds)) + (f" ({len(arm.diverged)} diverged)" if arm.diverged else ""),
        "final loss, nats": plus_minus(arm.final_loss, arm.final_loss_deviation) if arm.seeds else "diverged",
        f"against {arm.baseline}": "–" if is_baseline else plus_minus(arm.difference, arm.difference_deviation, "+"),
        "bits per byte": or_dash(arm.bits_per_byte),
        "speed-up": or_dash(None if is_baseline else arm.speed_up, "{:.2f}×".format),
        "data tokens": quantity(arm.data_tokens),
        "compute": quantity(arm.flops, FLOPS_UNITS),
        "time": or_dash(arm.seconds, duration),
        "positions/s": quantity(arm.positions_per_second),
    }


def or_dash(value: float | None, text: Callable[[float], str] = "{:.4f}".format) -> str:
    """The value as text, by default with four decimals; a dash where it is missing or not finite."""
    return text(value) if value is not None and math.isfinite(value) else "–"


def plus_minus(mean: float | None, deviation: float | None = None, sign: str = "") -> str:
    """A mean with its deviation, where there is one; with ``sign`` "+" a gain and a loss both show theirs."""
    text = or_dash(mean, lambda value: f"{value:{sign}.4f}".replace("-", "−"))
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def quantity(value: float | None, units: Sequence[str] = COUNT_UNITS) -> str:
    """A value in three digits and a unit: 12300000 is 12.3M; a dash where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    scale, unit = scale_of(value, units)
    return (f"{value / scale:#.3g}".rstrip(".") if scale > 1 else f"{value:.3g}") + unit


def scale_of(peak: float, units: Sequence[str] = COUNT_UNITS) -> tuple[float, str]:
    """The power of 1000 that leaves at most three digits of ``peak`` before the point, and its unit."""
    # 999.5 rounds to four digits: it belongs to the next unit.
    power = next((i for i in range(len(units)) if peak < 999.5 * 1000.0**i), len(units) - 1)
    return 1000.0**power, units[power]


def duration(seconds: float) -> str:
    """Seconds as people say them: 42.0 s, 12 min 5 s, 3 h 20 min, 4 d 6 h."""
    whole = round(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // small} {small_name}"
    return f"{seconds:.1f} s"
