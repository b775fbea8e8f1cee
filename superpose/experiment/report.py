"""The report of a comparison: plots, and one HTML page that holds them and its style and asks for nothing else."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from superpose.experiment.equal_loss_plots import equal_loss_cells, equal_loss_sentences, write_equal_loss_plot
from superpose.experiment.plots import write_plots
from superpose.experiment.summary import (
    ArmSummary,
    cells,
    duration,
    is_diverged,
    or_dash,
    plus_minus,
    quantity,
    summarise,
    summarise_switches,
    verdict,
)


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write the plots and report.html into the directory ``out``, made if need be; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    summaries = summarise(results)
    plots = {plot.stem: _data_url(plot) for plot in write_plots(results, out)}
    page = Template(files("superpose.experiment").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        plots,
        name=escape(results["name"]),
        subtitle=escape(_subtitle(results)),
        verdict=escape(verdict(summaries)),
        results=_table([cells(arm) for arm in summaries]),
        equal_loss=_equal_loss(results, out),
        switches=_switches(results),
        equal_flops=_equal_flops(summaries),
        samples=_samples(results),
        runs=_runs(results),
        facts=_facts(results),
        command=escape(results["command"]),
        recipe=escape(results["recipe"]),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _data_url(plot: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"


def _subtitle(results: dict[str, Any]) -> str:
    model = results["model"]
    return (
        f"{quantity(model['parameters'])} parameters ({model['architecture']}) · {results['steps']:,} steps of "
        f"{results['sequences_per_step']:,} × {results['positions']:,} positions · {results['created']}"
    )


def _equal_flops(summaries: Sequence[ArmSummary]) -> str:
    costs = [arm.flops for arm in summaries if arm.flops]
    if costs and max(costs) < 1.01 * min(costs):
        return "Equal FLOPs means that every arm spent the same compute, counted from the model’s shape; their data differ."
    return "The arms here did not spend equal FLOPs, counted from the model’s shape: compare them against FLOPs, not steps."


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _equal_loss(results: dict[str, Any], out: Path) -> str:
    if "equal_loss" not in results:
        return ""
    rows = results["equal_loss"]["rows"]
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in equal_loss_sentences(rows))
    note = (
        "Every baseline here is a run of its own length with the whole decay of its learning rate; those of one seed share "
        "their beginning at the constant rate. A curve is fitted to their final losses, and read off where it reaches an arm’s "
        "loss. The interval comes from the seeds, each with a level of its own; the shape of the curve is taken as fitted. "
        "Costs of a baseline that was not run are those per step of the baselines that were."
    )
    plot = (
        f'<figure><img alt="Final loss of baselines against their length" src="{_data_url(write_equal_loss_plot(rows, out))}">'
    )
    return (
        f'<h2>Equal loss</h2>{sentences}{plot}<figcaption>{note}</figcaption></figure><div class="scroll">'
        f"{_table(equal_loss_cells(rows))}</div>"
    )


def _switches(results: dict[str, Any]) -> str:
    rows = [
        {
            "arm": arm["name"],
            "step": f"{switch['step']:,}",
            "bag size": f"{switch['from_bag_size']} → {switch['to_bag_size']}",
            "loss before": or_dash(switch["loss_before"]),
            "loss after": or_dash(switch["loss_after"]),
            "height, nats": plus_minus(switch["height"], sign="+"),
            "steps to recover": or_dash(switch["steps_to_recover"], "{:,.0f}".format),
        }
        for arm in results["arms"]
        for switch in summarise_switches(arm)
    ]
    if not rows:
        return ""
    note = (
        "Training loss, mean over seeds: the last value before the switch and the highest just after it. A bag loss and a "
        "plain loss answer different questions: where the bag size changes, the height tells how rough the switch is, not what "
        "was lost. “Steps to recover” is the time until the loss is as low as before; a dash means that it is not, with some "
        "seed."
    )
    return f'<h2>Switches</h2><div class="scroll">{_table(rows)}</div><p class="soft">{note}</p>'


def _samples(results: dict[str, Any]) -> str:
    cards = [
        f'<div class="card"><h3>{escape(arm["name"])}, seed {run["seed"]}</h3><pre>{escape(run["sample"])}</pre></div>'
        for arm in results["arms"]
        for run in arm["runs"][:1]
        if run["sample"]
    ]
    return f'<h2>Samples</h2><div class="columns">{"".join(cards)}</div>' if cards else ""


def _runs(results: dict[str, Any]) -> str:
    return _table(
        [
            {
                "arm": arm["name"],
                "seed": str(run["seed"]),
                "final loss, nats": "diverged" if is_diverged(run) else or_dash(run["final_loss"]),
                "bits per byte": or_dash(None if is_diverged(run) else run["bits_per_byte"]),
                "perplexity": or_dash(None if is_diverged(run) else run["perplexity"]),
                "epochs": or_dash(run["epochs"], "{:.2f}".format),
                "positions": quantity(run["positions"]),
                "time": or_dash(run["seconds"], duration),
                "peak memory": or_dash(run["peak_memory_bytes"], lambda size: f"{size / 2**30:.2f} GiB"),
            }
            for arm in results["arms"]
            for run in arm["runs"]
        ]
    )


def _facts(results: dict[str, Any]) -> str:
    environment = {name: value for name, value in results["environment"].items() if name != "command"}
    schedules = {arm["name"]: _schedule(arm) for arm in results["arms"]}
    cards = {"Model": results["model"], "Data": results["data"], "Environment": environment, "Schedules": schedules}
    return "".join(f'<div class="card"><h3>{title}</h3><dl>{_definitions(facts)}</dl></div>' for title, facts in cards.items())


def _definitions(facts: dict[str, Any]) -> str:
    return "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_fact(fact))}</dd>" for name, fact in facts.items())


def _fact(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _schedule(arm: dict[str, Any]) -> str:
    return ", then ".join(
        f"{stage['steps']:,} steps "
        + (f"in bags of {stage['bag_size']} ({stage['mode']}, {stage['weighting']})" if stage["bag_size"] > 1 else "plain")
        for stage in arm["schedule"]["stages"]
    )
