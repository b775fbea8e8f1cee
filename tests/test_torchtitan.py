"""TST on TorchTitan, run on a CPU: each parallelism against one process, resume, evaluation, export, and our own engine.

The runs are made by `torchtitan_runs.py`, several to a process group. All are in float32 and differ in the order of sums alone,
so losses agree to a few units in their seventh digit. Adam divides by the gradient's size, which lets noise grow: less than
tenfold in six steps. A mixture of experts may route a token differently at a near tie, which is worth more. The norm of a
gradient is a sum of squares over half a million values, which a CPU adds up one by one in float32: four digits.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel, deepseek_v3_debugmodel_mtp
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from transformers import AutoModelForCausalLM

from superpose import InputError, Schedule, ScheduledTokens, Stage, TokenStore, reference
from superpose.bags import IGNORE_INDEX, position_weights
from superpose.engines.torchtitan import Superposition, config_registry, with_superposition
from superpose.engines.torchtitan.batch import join, superpose
from superpose.engines.torchtitan.export import export, hf_config
from superpose.engines.torchtitan.loss import MultiHotLoss
from superpose.experiment.recipe import load_recipe
from superpose.experiment.train import build_model, read_metrics, train

TESTS = Path(__file__).parent
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0"]

EXPORT = ["--checkpoint.enable", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--validator.enable"]
EXPORTED = ("tiny_llama", "debug_llama", "no_rope", "qwen", "unbiased_moe", "deepseek")
TP, PP = "--parallelism.tensor_parallel_degree", "--parallelism.pipeline_parallel_degree"
LONG = ["--training.seq_len", "256", "--training.local_batch_size", "1", "--training.global_batch_size", "1"]
HALF, QUARTER = (["--training.local_batch_size", size] for size in "21")

#: Name: processes, configuration, options, the run on one process that it must equal.
PARALLEL = {
    "fsdp": (2, "debug_llama", HALF, "debug_llama"),
    "tp": (2, "debug_llama", [TP, "2"], "debug_llama"),
    "cp": (2, "debug_llama", [*LONG, "--parallelism.context_parallel_degree", "2"], "long"),
    "pp": (2, "debug_llama", [PP, "2"], "debug_llama"),
    "hsdp": (4, "debug_llama", [*QUARTER, "--parallelism.data_parallel_replicate_degree", "2"], "debug_llama"),
    "compiled": (2, "tiny_llama", [*HALF, "--compile.enable", "--compile.backend", "aot_eager"], "tiny_llama"),
    "accumulated": (2, "tiny_llama", QUARTER, "tiny_llama"),
    "full-dtensor": (2, "tiny_llama", [TP, "2", "--parallelism.spmd_backend", "full_dtensor"], "tiny_llama"),
    "tp-sum-to-one": (2, "sum_to_one", [TP, "2"], "sum_to_one"),
    "pp-sum-to-one": (2, "sum_to_one", [PP, "2"], "sum_to_one"),
    "tp-output-only": (2, "output_only", [TP, "2"], "output_only"),
    "fsdp-moe": (2, "tiny_moe", HALF, "tiny_moe"),
    "ep-moe": (2, "tiny_moe", [*HALF, "--parallelism.expert_parallel_degree", "2"], "tiny_moe"),
    "tp-moe": (2, "tiny_moe", [TP, "2"], "tiny_moe"),
}  # fmt: skip


class Runs:
    """What the runs logged, by name."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def launch(self, processes, runs):
        """runs: name -> (configuration, options)."""
        listed = [
            {"config": config, "out": str(self.folder / name), "options": options} for name, (config, options) in runs.items()
        ]
        file = self.folder / f"runs-{len(list(self.folder.glob('runs-*')))}.json"
        file.write_text(json.dumps(listed))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(port),
        ]
        done = subprocess.run(
            [*command, TESTS / "torchtitan_runs.py", file], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]

    def seeded(self, config):
        """Options that start a run of ``config`` from its seed checkpoint."""
        folder = self.folder / f"seed-{config}" / "checkpoint" / "step-0"
        return ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.initial_load_path", str(folder)]

    def resume(self, config, step):
        """Options that continue the whole run of ``config`` from its checkpoint at ``step``, and save nothing."""
        folder = self.folder / f"whole-{config}" / "checkpoint"
        load = ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.load_step", str(step)]
        return [*load, "--checkpoint.folder", str(folder)]

    def rows(self, name, key="loss_metrics/global_avg_loss"):
        """Rows that have ``key``, of the rank that has the loss (a first pipeline stage logs −1 instead)."""
        logs = [json.loads(file.read_text()) for file in sorted((self.folder / name).glob("log-*.json"))]
        return next(rows for log in logs if (rows := [row for row in log if row.get(key, -1) != -1]))

    def losses(self, name):
        return [row["loss_metrics/global_avg_loss"] for row in self.rows(name)]

    def validation(self, name):
        return {row["step"]: row["validation_metrics/loss"] for row in self.rows(name, "validation_metrics/loss")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, store, recipe):
    folder = tmp_path_factory.mktemp("torchtitan")
    text = folder / "text"
    text.mkdir()
    documents = [(TESTS / name).read_text()[:1500] for name in ("test_loss.py", "test_models.py", "test_train.py")]
    (text / "data.json").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents * 8))
    environment = {
        **os.environ,
        "STORE": str(store),
        "TEXT": str(text),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    made = Runs(folder, environment)
    torch.manual_seed(0)
    build_model(recipe.model, 257).save_pretrained(folder / "initial")
    configs = sorted({config for _, config, _, _ in PARALLEL.values()})
    seed = {f"seed-{c}": (c, ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]) for c in configs}
    single = {c: (c, made.seeded(c)) for c in configs}
    export = {f"export-{c}": (c, EXPORT) for c in EXPORTED}
    whole = {f"whole-{c}": (c, SAVE) for c in ("tiny_llama", "from_text")}
    resumed = {f"{c}-from-{step}": (c, made.resume(c, step)) for c in ("tiny_llama", "from_text") for step in (1, 2, 3)}
    initial = ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(folder / "initial")]
    parity = {"parity": ("parity", ["--checkpoint.enable", "--checkpoint.load_only", *initial])}
    long = {"long": ("debug_llama", [*made.seeded("debug_llama"), *LONG])}
    made.launch(1, {**seed, **single, **long, **export, **whole, **resumed, **parity})
    for processes in (2, 4):
        chosen = {name: run for name, run in PARALLEL.items() if run[0] == processes}
        jobs = {name: (config, [*made.seeded(config), *options]) for name, (_, config, options, _) in chosen.items()}
        if processes == 2:
            jobs["resharded"] = ("tiny_llama", [*made.resume("tiny_llama", 1), *HALF])
        made.launch(processes, jobs)
    return made


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallelism_gives_the_losses_of_one_process(runs, name):
    _, config, _, alone = PARALLEL[name]
    losses, expected = runs.losses(name), runs.losses(alone)
    assert len(losses) == (6 if config == "debug_llama" else 4)
    routed = config == "tiny_moe"
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-4 if routed else 5e-6)
    norms, norms_alone = ([row["grad_norm"] for row in runs.rows(which)] for which in (name, alone))
    assert norms == pytest.approx(norms_alone, rel=1e-3 if routed else 2e-4)


@pytest.mark.parametrize("config", ["tiny_llama", "from_text"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(runs, config, step):
    whole = {row["step"]: row for row in runs.rows(f"whole-{config}")}
    resumed = {row["step"]: row for row in runs.rows(f"{config}-from-{step}")}
    assert sorted(resumed) == list(range(step + 1, 5))
    for name in ("loss_metrics/global_avg_loss", "grad_norm", "tst/data_tokens", "n_tokens_seen"):
        assert {at: row[name] for at, row in resumed.items()} == {at: whole[at][name] for at in resumed}


def test_a_store_is_resumed_on_another_number_of_ranks(runs):
    assert runs.losses("resharded") == pytest.approx(runs.losses("whole-tiny_llama")[1:], rel=5e-6)


def test_metrics_keep_positions_and_data_tokens_apart(runs):
    rows = runs.rows("debug_llama")
    step = 4 * 64  # positions
    assert [row["tst/bag_size"] for row in rows] == [4, 4, 4, 1, 1, 1]
    assert [row["tst/stage"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["tst/switch"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert [row["tst/positions"] for row in rows] == [step * n for n in range(1, 7)]
    assert [row["tst/data_tokens"] for row in rows] == [step * n for n in (4, 8, 12, 13, 14, 15)]
    assert [row["n_tokens_seen"] for row in rows] == [step * n for n in (4, 8, 12, 13, 14, 15)]
    assert [row["n_tokens_seen"] for row in runs.rows("output_only")] == [step * n for n in (1, 2, 3, 4)]
    for row in rows[1:]:  # throughput, and with it the use of the hardware, counts positions
        assert row["throughput(tps)"] * row["time_metrics/end_to_end(s)"] == pytest.approx(step, rel=0.2)
        ratio = row["tst/data_tokens_per_second"] / row["throughput(tps)"]
        assert ratio == pytest.approx(row["tst/bag_size"], rel=0.2)


def validation_loss(model, store):
    """The plain next-token loss on the windows of TorchTitan's validator: four batches of four."""
    data = TokenStore(store, "validation")
    windows = ScheduledTokens(data, Schedule.baseline(1), positions=64, sequences_per_step=(data.tokens - 1) // 64)
    ids = torch.stack([windows[index]["input_ids"] for index in range(16)])
    with torch.no_grad():
        logits = model(ids).logits.float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("config", EXPORTED)
def test_a_run_ends_in_a_model_that_transformers_loads(runs, store, config):
    """Equal validation loss: the export is exact, and the validator's loss is the plain one."""
    step = 6 if config == "debug_llama" else 4
    folder = runs.folder / f"export-{config}" / "checkpoint" / f"step-{step}"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert validation_loss(model, store) == pytest.approx(runs.validation(f"export-{config}")[step], rel=2e-5)


def test_a_checkpoint_of_the_superposition_phase_is_exported(runs, store, tmp_path):
    """By the command, from TorchTitan's own checkpoint; and in this phase too the validation loss is the plain one."""
    checkpoint, out = runs.folder / "whole-tiny_llama" / "checkpoint" / "step-2", tmp_path / "model"
    command = [sys.executable, "-m", "superpose.engines.torchtitan.export", checkpoint, out]
    command += ["--module", "torchtitan_runs", "--config", "tiny_llama"]
    subprocess.run(command, env=runs.environment, check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    assert (out / "tokenizer.json").exists()
    assert validation_loss(model, store) == pytest.approx(runs.validation("export-tiny_llama")[2], rel=2e-5)


def test_export_refuses_what_it_cannot_write(tmp_path):
    config = with_superposition(llama3_debugmodel(), Schedule.tst(10, 4, 0.5))
    with pytest.raises(InputError, match="is not a checkpoint"):
        export(config, tmp_path, tmp_path / "model")
    with pytest.raises(InputError, match="routes by sigmoid"):
        hf_config(deepseek_v3_debugmodel().model_spec.model)


def test_torchtitan_gives_the_losses_of_our_own_engine(runs, recipe, tmp_path):
    """The same weights, tokens and schedule: 24 steps in float32, the switch after 8."""
    values = recipe.as_dict() | {"model": {"path": str(runs.folder / "initial")}}
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "logging_steps": 1}
    values["training"] |= constant
    train(type(recipe).from_dict(values), tmp_path / "run")
    ours = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    theirs = runs.losses("parity")
    assert len(theirs) == 24
    assert theirs[0] == pytest.approx(ours[0], rel=1e-6)
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_torchtitan_gives_the_losses_of_the_published_listings(runs, store, recipe):
    """`reference.py`, as plain loops in a plain training loop, over the switch."""
    model = AutoModelForCausalLM.from_pretrained(runs.folder / "initial", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    data = ScheduledTokens(store, Schedule.tst(24, 4, 1 / 3), positions=32, sequences_per_step=4)
    table, losses = model.get_input_embeddings().weight, []
    for step in range(11):
        windows = torch.stack([data[step * 4 + row]["input_ids"].flatten() for row in range(4)])
        labels = torch.cat([windows[:, 1:], torch.full((4, 1), IGNORE_INDEX)], 1)
        bag_size = windows.shape[1] // 32
        targets = reference.superposed_labels(labels, bag_size)
        logits = model(inputs_embeds=reference.bag_mean(table, windows.unflatten(1, (32, bag_size)))).logits
        rows, weights = reference.row_losses(logits.flatten(0, 1), targets.flatten(0, 1), torch.ones(bag_size))
        loss = rows.sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert runs.losses("parity")[:11] == pytest.approx(losses, rel=1e-4)


# --- one batch ---


def batch(rows=2, width=24, starts=()):
    """Ids that count, their next-token labels, and positions that start anew at ``starts``."""
    ids = torch.arange(rows * width).view(rows, width)
    positions = torch.arange(width).repeat(rows, 1)
    for start in starts:
        positions[:, start:] = torch.arange(width - start)
    return {"input": ids, "positions": positions}, ids + 1


def test_packed_bags_are_those_of_the_listing():
    inputs, labels = batch()
    bags, targets = superpose(inputs, labels, Stage(1, 4), separate_documents=False)
    assert torch.equal(bags["input"], inputs["input"].view(2, 6, 4))
    assert torch.equal(targets, reference.superposed_labels(labels, 4))
    assert torch.equal(bags["positions"], torch.arange(6).expand(2, 6))


def test_input_only_has_one_target_and_output_only_plain_inputs():
    inputs, labels = batch()
    bags, targets = superpose(inputs, labels, Stage(1, 4, "input-only"), separate_documents=False)
    assert bags["input"].shape == (2, 6, 4)
    assert torch.equal(targets, reference.superposed_labels(labels, 4)[..., 0])
    plain, targets = superpose(inputs, labels, Stage(1, 4, "output-only"), separate_documents=False)
    assert torch.equal(plain["input"], inputs["input"])
    assert targets[0, 3].tolist() == [4, 5, 6, 7]
    assert targets[0, -1].tolist() == [24, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


@pytest.mark.parametrize("mode", ["full", "input-only", "output-only"])
def test_one_document_is_cut_as_the_stream_is(mode):
    packed = superpose(*batch(), Stage(1, 4, mode), separate_documents=False)
    separate = superpose(*batch(), Stage(1, 4, mode), separate_documents=True)
    assert torch.equal(packed[1], separate[1])
    assert all(torch.equal(packed[0][name], separate[0][name]) for name in ("input", "positions"))


def test_separate_documents_are_cut_by_themselves():
    """Documents of 10, 3 and 11 tokens in bags of 4: two bags, none, two, and two positions left over."""
    inputs, labels = batch(rows=1, starts=(10, 13))
    bags, targets = superpose(inputs, labels, Stage(1, 4), separate_documents=True)
    assert bags["input"][0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [13, 14, 15, 16], [17, 18, 19, 20], [0] * 4, [0] * 4]
    assert bags["positions"][0].tolist() == [0, 1, 0, 1, 0, 1]
    assert targets[0].tolist() == [
        [4, 5, 6, 7],
        [8, 9, 10, IGNORE_INDEX],  # the label of a document's last token belongs to it
        [17, 18, 19, 20],
        [21, 22, 23, 24],
        [IGNORE_INDEX] * 4,
        [IGNORE_INDEX] * 4,
    ]


def test_samples_join_where_the_text_goes_on():
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [9, 10, 11], [12, 13, 14]])  # one document, another that starts at 9
    labels = torch.tensor([[1, 2, 3], [4, 5, 6], [10, 11, 12], [13, 14, 15]])
    positions = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 0, 1]])  # and one that starts at 13
    batches = [({"input": ids[:2], "positions": positions[:2]}, labels[:2])]
    batches.append(({"input": ids[2:], "positions": positions[2:]}, labels[2:]))
    joined, targets = join(batches)
    assert joined["input"].tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]
    assert targets.tolist() == [[1, 2, 3, 4, 5, 6], [10, 11, 12, 13, 14, 15]]
    assert joined["positions"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize("mode", ["full", "output-only"])
@pytest.mark.parametrize("sum_to_one", [False, True])
def test_the_loss_is_the_weighted_mean_over_valid_targets(mode, sum_to_one):
    inputs, labels = batch()
    stage = Stage(1, 4, mode, "power-law")
    bags, targets = superpose(inputs, labels, stage, weights=stage.position_weights(0), separate_documents=False)
    logits = torch.randn(*targets.shape[:2], 50)
    loss = MultiHotLoss.Config(sum_to_one=sum_to_one).build(compile_config=None)
    loss.weights = bags["position_weights"]
    value, _ = loss(logits, targets, (targets != IGNORE_INDEX).sum())
    weights = position_weights("power-law", 4)
    rows, row_weights = reference.row_losses(logits.flatten(0, 1), targets.flatten(0, 1), weights, sum_to_one=sum_to_one)
    assert value.item() == pytest.approx((rows.sum() / row_weights.sum()).item(), rel=1e-6)


# --- configurations ---


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.baseline(10),
        Schedule.tst(10, 4, 0.3, mode="input-only", weighting="power-law"),
        Schedule.staged([Stage(2, 8), Stage(3, 4), Stage(5)]),
        Schedule.staged([Stage(2), Stage(8, 4)]),
    ],
)
def test_a_section_stands_for_its_schedule(schedule):
    section = Superposition.of(schedule)
    assert section.schedule(10) == schedule
    config = with_superposition(llama3_debugmodel(), schedule)
    assert config.training.steps == 10
    assert config.tst == section


def test_cuda_graphs_are_disabled_where_shapes_change():
    assert with_superposition(llama3_debugmodel(), Schedule.tst(10, 4, 0.5)).training.disable_cuda_graphs
    assert not with_superposition(llama3_debugmodel(), Schedule.baseline(10)).training.disable_cuda_graphs


def test_the_stock_configuration_is_left_alone():
    stock = llama3_debugmodel()
    steps = stock.training.steps
    with_superposition(stock, Schedule.tst(100, 4, 0.5))
    assert (stock.training.steps, stock.training.disable_cuda_graphs) == (steps, False)


def test_what_cannot_be_superposed_is_refused():
    with pytest.raises(InputError, match="multi-token prediction"):
        with_superposition(deepseek_v3_debugmodel_mtp(), Schedule.tst(10, 4, 0.5))
    with pytest.raises(InputError, match="windows of 512 tokens"):
        with_superposition(llama3_debugmodel(), Schedule.staged([Stage(2, 2, position_divisor=8), Stage(2)]))
    with pytest.raises(InputError, match=r"training\.seq_len: positions 2048"):
        with_superposition(llama3_debugmodel(), Schedule.patch_level(10, 3, 0.5))
    with pytest.raises(InputError, match=r"tst\.stages have 5 steps"):
        Superposition.of(Schedule.staged([Stage(2, 8), Stage(1, 4), Stage(2)])).schedule(6)
    with pytest.raises(InputError, match=r"tst: ratio"):
        Superposition(bag_size=4, ratio=2).schedule(10)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("270m", "llama3_270m"),
        ("600m", "llama3_600m"),
        ("3b", "llama3_3b"),
        ("10b-a1b", "qwen3_10b_a1b"),
    ],
)
def test_the_papers_models_are_those_of_the_recipes(name, config):
    recipe = load_recipe(TESTS.parent / "recipes" / f"paper-{name}.toml")
    superposed, baseline = (getattr(config_registry, config + suffix)() for suffix in ("_tst", ""))
    training = recipe.training
    assert superposed.tst.schedule(superposed.training.steps) == recipe.schedule()
    assert not baseline.tst.schedule(baseline.training.steps).switches
    assert superposed.training.seq_len == training.positions
    assert superposed.training.global_batch_size == training.sequences_per_step
    group = superposed.optimizer.param_groups[0].optimizer_kwargs
    assert (group["lr"], group["betas"], group["weight_decay"]) == (training.arguments["learning_rate"], (0.9, 0.95), 0.1)
    assert superposed.lr_scheduler.warmup_steps == training.arguments["warmup_steps"]
    assert superposed.lr_scheduler.decay_ratio == training.decay_ratio
    assert isinstance(superposed.loss, ChunkedLossWrapper.Config)
    with torch.device("meta"):
        ours = superposed.model_spec.model.build()
        theirs = build_model(recipe.model, 128_256)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    rope = superposed.model_spec.model.layers[0].attention.rope
    if name != "10b-a1b":
        assert math.isclose(rope.theta, theirs.config.rope_parameters["rope_theta"])
