"""Arms of one recipe side by side at equal FLOPs, from the same initial weights and the same place in the token stream."""

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from superpose.accounting import count_parameters
from superpose.data.store import TokenStore
from superpose.errors import InputError
from superpose.experiment.arms import arm_recipe
from superpose.experiment.recipe import Recipe, load_recipe
from superpose.experiment.train import build_model, check_same, environment, is_main_process, read_metrics, train

#: The columns of runs.csv: the arm, and entries of a run's summary.
COLUMNS = (
    "arm",
    "seed",
    "parameters",
    "step",
    "positions",
    "data_tokens",
    "flops",
    "seconds",
    "final_loss",
    "bits_per_byte",
    "diverged",
)


def compare(
    recipe: Recipe,
    out: str | Path,
    *,
    arms: Sequence[str] = ("baseline", "tst"),
    seeds: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train each arm for each seed under ``out/ARM/seed-N`` and return the results, also written to ``out/results.json``.

    ``out/runs.csv`` has a row for each run: its size, its costs and its final validation loss in nats.
    A finished arm is not run again and an interrupted one continues. Raises InputError for an unknown arm, for a recipe
    without superposition, and where ``out`` holds runs of another recipe.
    """
    out = Path(out)
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if not any(stage.superposed for stage in recipe.schedule().stages):
        raise InputError("superposition.bag_size is 1 or its ratio 0: there is nothing to compare with the baseline")
    recipes = {arm: arm_recipe(arm, recipe) for arm in arms}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for arm in arms:
            runs[arm].append(_run(dataclasses.replace(recipes[arm], seed=seed), out / arm / f"seed-{seed}", arm, say))
    if not is_main_process():
        return {}
    results = _facts(recipe) | {
        "arms": [{"name": arm, "schedule": recipes[arm].schedule().as_dict(), "runs": runs[arm]} for arm in arms]
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"arm": arm["name"], **run} for arm in results["arms"] for run in arm["runs"])
    return results


def _run(recipe: Recipe, out: Path, arm: str, say: Callable[[str], None]) -> dict[str, Any]:
    if (out / "summary.json").exists():
        check_same(load_recipe(out / "recipe.toml"), recipe, out / "recipe.toml")
        say(f"{arm}, seed {recipe.seed}: finished already, {out}")
    else:
        begun = (out / "recipe.toml").exists()
        say(f"{arm}, seed {recipe.seed}: {'continues' if begun else 'starts'}, {out}")
        train(recipe, out, resume=begun)
    if not is_main_process():
        return {}
    summary = json.loads((out / "summary.json").read_text())
    rows = read_metrics(out / "metrics.jsonl")
    return summary | {
        "sample": "\n\n".join(summary.pop("samples", [])),
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "evaluations": [_evaluation(row) for row in rows if "eval_loss" in row],
        "training": [{"mfu": None, **row} for row in rows if "loss" in row],
    }


def _evaluation(row: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "eval_loss", "positions", "data_tokens", "flops", "seconds")
    return {name: row[name] for name in names} | {"bits_per_byte": row["eval_bits_per_byte"]}


def _facts(recipe: Recipe) -> dict[str, Any]:
    store = TokenStore(recipe.data.path)
    model = build_model(recipe.model, store.vocab_size)
    counts = count_parameters(model)
    here = environment()
    return {
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": here["command"],
        "environment": here,
        "model": {
            "architecture": model.config.model_type,
            "parameters": counts["total"],
            "non_embedding_parameters": counts["total"] - counts["embedding"],
            "vocab_size": model.config.vocab_size,
        },
        "data": {
            "path": recipe.data.path,
            "tokens": store.tokens,
            "documents": store.documents,
            "bytes_per_token": store.bytes_per_token,
            "tokenizer": store.manifest["tokenizer"]["name"],
        },
        "positions": recipe.training.positions,
        "sequences_per_step": recipe.training.sequences_per_step,
        "steps": recipe.training.steps,
        "recipe": recipe.to_toml(),
    }
