"""The command line: ``superpose prepare | analyse | plan | train | compare | sweep | evaluate | sample``.

Bad input is one line on the standard error and exit code 2.
"""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from superpose.errors import InputError

Fields = Annotated[tuple[str, ...], arg(name="set")]
#: section.field=value, which may stand anywhere on the command line
FIELD = re.compile(r"(--)?(name|seed|[a-z]+(\.\w+)+)=")


def prepare(
    sources: Positional[list[str]],
    out: Path,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    use_bytes: Annotated[bool, arg(name="bytes")] = False,
    eod_token: str | None = None,
    field: str = "text",
    split: str = "train",
    dataset_config: str | None = None,
    validation: float = 0.01,
    seed: int = 0,
) -> None:
    """Turn text into a token store.

    Args:
        sources: Text, .jsonl or .parquet files, directories or globs of them, or a Hugging Face dataset id.
        out: Directory of the store; it must not exist.
        tokenizer: A tokenizer.json, a directory that holds one, or a hub id.
        train_tokenizer: Train a byte-level BPE of this vocabulary on the text.
        use_bytes: Take the bytes of the text as tokens.
        eod_token: End-of-document token, where it is not the tokenizer's usual one.
        field: Field of a .jsonl, .parquet or hub document that holds its text.
        split: Split of a hub dataset.
        dataset_config: Configuration of a hub dataset.
        validation: Share of the tokens to hold out, by document.
        seed: Seed of the shuffle.
    """
    from superpose.data.prepare import prepare

    prepare(
        sources,
        out,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        use_bytes=use_bytes,
        eod_token=eod_token,
        field=field,
        split=split,
        dataset_config=dataset_config,
        validation=validation,
        seed=seed,
    )


def analyse(data: Positional[Path], out: Path | None = None, split: str = "train", tokens: str = "8M", seed: int = 0) -> None:
    """Measure what bears on superposition in a prepared store: how far tokens inform each other, and how often they repeat.

    Args:
        data: A prepared store.
        out: Directory of the plot and the tables, runs/NAME-analysis by default.
        split: Split of the store.
        tokens: Tokens to look at, at most, such as 500K or 8M: pieces spread evenly over the split.
        seed: Seed of the shuffled pairs.
    """
    from superpose.experiment.analyse import analyse, sentences, tables, write_analysis

    analysis = analyse(data, split=split, tokens=int(_count("tokens", tokens)), seed=seed)
    console = Console(highlight=False)
    for table in tables(analysis):
        console.print(table)
    for sentence in sentences(analysis):
        console.print(sentence, markup=False, soft_wrap=True)
    paths = write_analysis(analysis, out or Path("runs") / f"{data.resolve().name}-analysis")
    console.print(f"written: {', '.join(map(str, paths))}", markup=False, soft_wrap=True)


def plan(
    params: str,
    steps: str,
    tokens: str | None = None,
    positions_per_step: str = "2097152",
    weighting: str = "uniform",
    sweep: tuple[Path, ...] = (),
    gpu: str = "H100",
    gpus: int = 1,
    mfu: float = 0.35,
    price: float | None = None,
    errors: bool = False,
    out: Path | None = None,
) -> None:
    """Say which bag size and ratio a run should take, what they should gain, and what the run needs.

    Args:
        params: Parameters of the model, such as 600M.
        steps: Optimizer steps, such as 20000 or 20K.
        tokens: Data tokens there are, such as 60B; without it data is no limit.
        positions_per_step: Positions of an optimizer step over all devices; the published grids have 2097152.
        weighting: Position weights: uniform or power-law.
        sweep: Sweeps of your own, CSV files with the columns of the published grids; their steps have positions_per_step.
        gpu: Kind of GPU, such as H100, B200 or A100.
        gpus: Number of them.
        mfu: Model FLOPs utilisation to reckon with.
        price: Price of a GPU-hour, in any currency.
        errors: Also print the model's cross-validated errors, grid by grid.
        out: Directory for plots of the plan and of the model against the grids.
    """
    from superpose.experiment import plan as planner
    from superpose.experiment.grid_model import cross_validate

    run = planner.Run(
        params=_count("params", params),
        steps=int(_count("steps", steps)),
        tokens=None if tokens is None else _count("tokens", tokens),
        positions_per_step=_count("positions-per-step", positions_per_step),
        weighting=weighting,
    )
    hardware = planner.Hardware(gpu, gpus, mfu, price)
    model, rows = planner.load_model(sweep, run.positions_per_step)
    made = planner.make_plan(run, model, rows)
    console = Console(highlight=False)
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="bold red", markup=False)
    for sentence in planner.sentences(made):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(planner.costs_table(made, hardware))
    console.print(planner.settings_table(made))
    validated = cross_validate(model)
    if errors:
        console.print(planner.errors_table(validated))
    console.print(planner.error_sentence(validated), markup=False)
    if out:
        from superpose.experiment.plan_plots import write_plan_plots

        console.print(f"plots: {', '.join(map(str, write_plan_plots(made, model, out)))}", markup=False, soft_wrap=True)


def _count(name: str, text: str) -> float:
    """A number with K, M, B or T behind it; InputError names the option."""
    from superpose.experiment.grid_model import parse_count

    try:
        value = parse_count(text)
        if value < 1:
            raise ValueError
    except ValueError:
        raise InputError(f"--{name} {text!r} is not a number of at least 1: write it like 600M, 2.1B or 20000") from None
    return value


def train(recipe: Positional[Path], fields: Fields = (), out: Path | None = None, resume: bool = False) -> None:
    """Train a recipe. Under torchrun or accelerate launch the same command trains on many processes.

    Args:
        recipe: A recipe in TOML.
        fields: Fields to change, such as training.steps=100 superposition.bag_size=8; the --set may be left out.
        out: Directory of the run, runs/NAME by default; it must be new.
        resume: Continue the run in it from its last checkpoint.
    """
    _hide_weight_bars()
    from superpose.experiment.recipe import load_recipe
    from superpose.experiment.summary import quantity
    from superpose.experiment.train import train

    loaded = load_recipe(recipe, fields)
    out = out or Path("runs") / loaded.name
    summary = train(loaded, out, resume=resume)
    if not summary:
        return
    console = Console(highlight=False)
    if summary["diverged"]:
        console.print(f"the loss is not finite at step {summary['step']}: training stopped; lower training.learning_rate")
        sys.exit(1)
    for switch in summary["switches"]:
        if switch["height"] is not None:
            steps = switch["steps_to_recover"]
            console.print(
                f"switch at step {switch['step']} from bag size {switch['from_bag_size']} to {switch['to_bag_size']}: "
                f"training loss {switch['loss_before']:.3f} before, up to {switch['loss_after']:.3f} just after, "
                + (f"as low as before after {steps} steps" if steps else "not as low as before by the end")
            )
    for sample in summary["samples"]:
        console.rule("sample")
        console.print(sample, markup=False)
    console.rule()
    console.print(
        f"{summary['final_loss']:.4f} nats per token, perplexity {summary['perplexity']:.2f}, "
        f"{summary['bits_per_byte']:.4f} bits per byte after {summary['step']} steps, {quantity(summary['positions'])} "
        f"positions, {quantity(summary['data_tokens'])} data tokens, {summary['seconds']:.0f} s\nmodel: {out / 'model'}"
    )


def compare(
    recipe: Positional[Path],
    fields: Fields = (),
    out: Path | None = None,
    arms: str = "baseline,tst",
    seeds: int = 1,
    equal_loss: bool = False,
    lengths: str | None = None,
) -> None:
    """Train arms of a recipe side by side at equal FLOPs and write a report. Finished arms are not run again.

    Args:
        recipe: A recipe in TOML; the arm tst is the recipe itself.
        fields: Fields to change, such as training.steps=100 superposition.bag_size=8; the --set may be left out.
        out: Directory of the comparison, runs/NAME-compare by default.
        arms: Arms separated by commas: baseline, tst, input-only, output-only, uniform, power-law, exponential, first, fitted
            (to the data), gradual, sum-to-one, staged, optimizer-reset, reinitialised, patch-level.
        seeds: Seeds of each arm, counted from the recipe's.
        equal_loss: Also train baselines of several lengths, to say how long one must be for the loss of each other arm.
        lengths: Lengths of those as multiples of the recipe's steps, separated by commas; 0.5,1,1.5,2 by default.
    """
    _hide_weight_bars()
    from superpose.experiment.compare import compare
    from superpose.experiment.equal_loss import LENGTHS, compare_at_equal_loss
    from superpose.experiment.equal_loss_plots import equal_loss_sentences, equal_loss_tables
    from superpose.experiment.recipe import load_recipe
    from superpose.experiment.report import write_report
    from superpose.experiment.summary import summarise, table, verdict

    loaded = load_recipe(recipe, fields)
    out = out or Path("runs") / f"{loaded.name}-compare"
    names = [arm.strip() for arm in arms.split(",")]
    if equal_loss:
        multiples = LENGTHS if lengths is None else _numbers("lengths", lengths, float)
        results = compare_at_equal_loss(loaded, out, arms=names, seeds=seeds, lengths=multiples)
    elif lengths is not None:
        raise InputError("--lengths are those of the baselines that --equal-loss trains: give both")
    else:
        results = compare(loaded, out, arms=names, seeds=seeds)
    if not results:
        return
    report = write_report(results, out)
    console = Console(highlight=False)
    if results["arms"][-1]["runs"][0]["sample"]:
        console.rule(f"a sample from {results['arms'][-1]['name']}")
        console.print(results["arms"][-1]["runs"][0]["sample"], markup=False)
    console.rule()
    summaries = summarise(results)
    console.print(table(summaries))
    console.print(verdict(summaries), markup=False)
    if equal_loss:
        rows = results["equal_loss"]["rows"]
        for of_arm in equal_loss_tables(rows):
            console.print(of_arm)
        for sentence in equal_loss_sentences(rows):
            console.print(sentence, markup=False)
    console.print(f"report: {report}")


def sweep(
    recipe: Positional[Path],
    fields: Fields = (),
    out: Path | None = None,
    bag_sizes: str = "2,4,8",
    ratios: str = "0.1,0.2,0.3,0.4",
    weightings: str = "uniform",
    seeds: int = 1,
) -> None:
    """Train a grid of bag sizes and step ratios at equal FLOPs against one baseline. Finished cells are not run again.

    Args:
        recipe: A recipe in TOML; its own bag size and ratio do not count.
        fields: Fields to change, such as training.steps=100; the --set may be left out.
        out: Directory of the sweep, runs/NAME-sweep by default.
        bag_sizes: Bag sizes separated by commas.
        ratios: Step ratios separated by commas; those of one bag size share their superposition phase.
        weightings: Position weights separated by commas: uniform, power-law, exponential, first.
        seeds: Seeds of each cell, counted from the recipe's.
    """
    _hide_weight_bars()
    from superpose.experiment.recipe import load_recipe
    from superpose.experiment.sweep import sweep
    from superpose.experiment.sweep_plots import sweep_table, verdict, write_sweep_plot

    loaded = load_recipe(recipe, fields)
    out = out or Path("runs") / f"{loaded.name}-sweep"
    names = [weighting.strip() for weighting in weightings.split(",")]
    rows = sweep(
        loaded,
        out,
        bag_sizes=_numbers("bag-sizes", bag_sizes, int),
        ratios=_numbers("ratios", ratios, float),
        weightings=names,
        seeds=seeds,
    )
    if not rows:
        return
    plot = write_sweep_plot(rows, out)
    console = Console(highlight=False)
    console.rule()
    for name in names:
        console.print(sweep_table(rows, name))
    console.print(verdict(rows), markup=False)
    console.print(f"rows: {out / 'sweep.csv'}, picture: {plot}", markup=False, soft_wrap=True)


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--{name} {text!r} is not a list of numbers: write them like 2,4,8") from None


def evaluate(
    model: Positional[str], data: Path, positions: int | None = None, tokens: int = 2**24, batch_size: int = 8
) -> None:
    """Loss, perplexity and bits per byte of a saved model on the validation split of a store.

    Args:
        model: A model's directory or hub id.
        data: A prepared store.
        positions: Length of a window; by default the model's longest, at most 2048.
        tokens: Evaluate at most this many tokens.
        batch_size: Windows evaluated at once.
    """
    _hide_weight_bars()
    from superpose.experiment.evaluate import evaluate

    found = evaluate(model, data, positions=positions, tokens=tokens, batch_size=batch_size)
    print(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.3f}, {found.bits_per_byte:.4f} bits per byte "
        f"({found.tokens:,} tokens in windows of {found.positions})"
    )


def sample(
    model: Positional[str], prompt: str = "", max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> None:
    """Continue a prompt with a saved model.

    Args:
        model: A model's directory or hub id.
        prompt: Text to continue.
        max_new_tokens: Tokens to generate.
        temperature: 0 is greedy.
        seed: Seed of the draw.
    """
    _hide_weight_bars()
    from superpose.experiment.sample import generate

    print(generate(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


def _hide_weight_bars() -> None:
    """Keep the bars that transformers shows for each file of weights out of our own progress; read when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    warnings.formatwarning = lambda message, *_, **__: f"superpose: {message}\n"
    functions = (prepare, analyse, plan, train, compare, sweep, evaluate, sample)
    commands: dict[str, Any] = {function.__name__: function for function in functions}
    arguments = [argument for argument in sys.argv[1:] if argument != "--set" and not FIELD.match(argument)]
    fields = [argument for argument in sys.argv[1:] if FIELD.match(argument)]
    if fields:
        arguments.append("--set")
    description = "Token-Superposition Training."
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments + fields, prog="superpose", description=description)
    except InputError as error:
        print(f"superpose: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("superpose: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
