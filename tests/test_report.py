import io
import math
import struct
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from superpose.experiment.plots import draw_loss, draw_training
from superpose.experiment.report import write_report
from superpose.experiment.summary import cells, duration, quantity, summarise, table, verdict

STEPS, TOKENS_PER_STEP, FLOPS_PER_STEP = 750, 16 * 256, 2.1e10


def stage(steps, bag_size=1):
    return {"steps": steps, "bag_size": bag_size, "mode": "full", "weighting": "uniform", "position_divisor": 1}


def make_run(seed, stages, final_loss, pace=1.0):
    """A run that ends at ``final_loss``: plain validation loss high while superposed, then a power law towards the end."""
    noise = np.random.default_rng(seed)
    bags = [stage["bag_size"] for stage in stages for _ in range(stage["steps"])]
    superposed = sum(bag > 1 for bag in bags)
    tokens = np.cumsum([0, *bags]) * TOKENS_PER_STEP

    def plain(step):
        if step == 0:
            return math.log(257)
        if bags[step - 1] > 1:
            return 6.9 - step / superposed
        since = step - superposed
        return final_loss + 4.5 * ((since + 6) ** -0.55 - (STEPS - superposed + 6) ** -0.55)

    def bag(step):
        return 2.75 + 3.5 * (step + 2) ** -0.5

    def accounts(step):
        return {
            "step": step,
            "positions": step * TOKENS_PER_STEP,
            "data_tokens": int(tokens[step]),
            "flops": step * FLOPS_PER_STEP,
            "seconds": step * 0.41 * pace * (1 + 0.02 * seed),
        }

    evaluations = [
        accounts(step) | {"eval_loss": plain(step), "bits_per_byte": plain(step) / math.log(2)}
        for step in range(0, STEPS + 1, 25)
    ]
    training = [
        accounts(step)
        | {
            "loss": (plain(step) if bags[step - 1] == 1 else bag(step)) + 0.04 * noise.standard_normal(),
            "bag_size": bags[step - 1],
            "learning_rate": 3e-3 * min(1, step / 40, (STEPS - step) / 75),
            "grad_norm": 1.0,
            "positions_per_second": 1e4 / pace * (1 + 0.02 * noise.standard_normal()),
            "data_tokens_per_second": 1e4 / pace * bags[step - 1],
            "mfu": None,
        }
        for step in range(5, STEPS + 1, 5)
    ]
    switches, start = [], 0
    for before, after in pairwise(stages):
        start += before["steps"]
        losses = {
            "loss_before": 2.9,
            "loss_after": 3.6 + 0.01 * seed,
            "height": 0.7 + 0.01 * seed,
            "steps_to_recover": 12 + seed,
        }
        switches.append({"step": start, "from_bag_size": before["bag_size"], "to_bag_size": after["bag_size"]} | losses)
    last = evaluations[-1]
    return {
        "seed": seed,
        "final_loss": final_loss,
        "bits_per_byte": final_loss / math.log(2),
        "perplexity": math.exp(final_loss),
        **{name: last[name] for name in ("positions", "data_tokens", "flops", "seconds")},
        "epochs": 0.3,
        "peak_memory_bytes": None,
        "switches": switches,
        "evaluations": evaluations,
        "training": training,
        "sample": "def main(self):\n    if x < 1 & y > 2:\n        return self.<b>parse</b>(line)\n\n" * 3,
    }


def make_arm(name, stages, losses, pace=1.0):
    return {
        "name": name,
        "schedule": {"stages": stages},
        "runs": [make_run(seed, stages, loss, pace) for seed, loss in enumerate(losses)],
    }


def make_results(*arms):
    return {
        "name": "demo",
        "created": "2026-01-02T03:04:05+00:00",
        "environment": {
            "torch": "2.13",
            "transformers": "5.23",
            "device": "cpu",
            "processor": None,
            "threads": 2,
            "superpose": "0.1.0",
        },
        "model": {"architecture": "llama", "parameters": 820608, "non_embedding_parameters": 787712, "vocab_size": 257},
        "data": {"path": "data/demo", "tokens": 31415926, "bytes_per_token": 0.9987, "documents": 4242, "tokenizer": "bytes"},
        "positions": 256,
        "sequences_per_step": 16,
        "steps": STEPS,
        "recipe": 'name = "demo"\n\n[superposition]\nbag_size = 4\nratio = 0.3\n',
        "command": "superpose compare recipes/demo.toml --out runs/demo-compare",
        "arms": list(arms),
    }


PLAIN, TST = [stage(STEPS)], [stage(225, 4), stage(525)]


def baseline(*losses):
    return make_arm("baseline", PLAIN, losses)


def tst(*losses):
    return make_arm("tst", TST, losses, pace=1.04)


def diverge(run):
    for row in run["evaluations"][10:]:
        row["eval_loss"] = row["bits_per_byte"] = math.nan
    for row in run["training"][40:]:
        row["loss"] = math.nan
    run["final_loss"] = run["bits_per_byte"] = run["perplexity"] = math.nan


def by_name(results):
    return {summary.name: summary for summary in summarise(results)}


def test_differences_are_paired_by_seed():
    results = make_results(baseline(1.30, 1.40, 1.35), tst(1.27, 1.36, 1.33))
    results["arms"][1]["runs"].reverse()
    arms = by_name(results)
    assert arms["baseline"].final_loss == pytest.approx(1.35)
    assert arms["baseline"].final_loss_deviation == pytest.approx(0.05)
    assert arms["baseline"].difference == 0
    assert arms["tst"].difference == pytest.approx(-0.03)
    assert arms["tst"].difference_deviation == pytest.approx(0.01)
    assert arms["tst"].bits_per_byte_difference == pytest.approx(-0.03 / math.log(2))
    assert arms["tst"].seeds == (2, 1, 0)
    assert arms["tst"].data_tokens == pytest.approx(1.9 * arms["baseline"].data_tokens)
    assert arms["tst"].flops == arms["baseline"].flops
    assert arms["tst"].positions_per_second < arms["baseline"].positions_per_second


def test_one_seed_has_no_deviation():
    arms = by_name(make_results(baseline(1.33), tst(1.30)))
    assert arms["tst"].final_loss_deviation is None
    assert arms["tst"].difference_deviation is None


def test_speed_up_is_interpolated_between_evaluations():
    results = make_results(baseline(1.33), tst(1.30))
    rows = [(0, 5.5), (300, 7.0), (500, 1.43), (600, 1.23), (750, 1.2)]
    results["arms"][1]["runs"][0]["evaluations"] = [{"step": step, "eval_loss": loss} for step, loss in rows]
    arms = by_name(results)
    assert arms["tst"].speed_up == pytest.approx(750 / 550)
    assert arms["baseline"].speed_up == pytest.approx(1)


def test_speed_up_needs_every_seed_to_reach_the_loss():
    arms = by_name(make_results(baseline(1.33, 1.33), tst(1.30, 1.36)))
    assert arms["tst"].difference == pytest.approx(0)
    assert arms["tst"].speed_up is None


def test_training_loss_plays_no_part_in_the_summary():
    results = make_results(baseline(1.33, 1.34), tst(1.30, 1.31))
    expected = summarise(results)
    for arm in results["arms"]:
        for run in arm["runs"]:
            for row in run["training"]:
                row["loss"] = 0.01
    assert summarise(results) == expected


def test_baseline_is_found_by_name_else_first():
    results = make_results(tst(1.30), baseline(1.33))
    assert {summary.baseline for summary in summarise(results)} == {"baseline"}
    results["arms"][1]["name"] = "plain"
    assert {summary.baseline for summary in summarise(results)} == {"tst"}
    assert all("against tst" in cells(summary) for summary in summarise(results))


def test_diverged_run_is_left_out_with_its_pair():
    results = make_results(baseline(1.30, 1.40), tst(1.27, 1.20))
    diverge(results["arms"][1]["runs"][1])
    arm = by_name(results)["tst"]
    assert (arm.seeds, arm.diverged, arm.pairs) == ((0,), (1,), 1)
    assert arm.difference == pytest.approx(-0.03)
    assert "Diverged and left out: tst (seed 1)." in verdict(summarise(results))


def test_verdict_of_a_clear_gain():
    text = verdict(summarise(make_results(baseline(1.330, 1.340, 1.335), tst(1.300, 1.309, 1.304))))
    assert "tst is ahead of baseline by 0.0307 nats (0.0442 bits per byte) at equal FLOPs" in text
    assert "(90 % interval from 3 seeds: 0.0297 to 0.0316)." in text  # 2.920 · 0.00058 / √3 on both sides
    assert "Data tokens: baseline 3.07M, tst 5.84M (1.90×)." in text


def test_verdict_of_an_unclear_gain():
    text = verdict(summarise(make_results(baseline(1.33, 1.33), tst(1.31, 1.34))))
    assert "ahead of baseline by 0.0050 nats" in text
    assert "(90 % interval from 2 seeds: −0.0897 to 0.0997): this is not a clear gain." in text


def test_a_gain_in_many_seeds_is_clear_though_smaller_than_their_spread():
    gains = [0.01, 0.04] * 5
    text = verdict(summarise(make_results(baseline(*[1.33] * 10), tst(*[1.33 - gain for gain in gains]))))
    assert "(90 % interval from 10 seeds: 0.0158 to 0.0342)." in text


def test_verdict_with_one_seed_names_the_remedy():
    text = verdict(summarise(make_results(baseline(1.33), tst(1.30))))
    assert "with one seed the spread is unknown" in text
    assert "--seeds" in text


def test_verdict_when_superposition_does_not_pay():
    text = verdict(summarise(make_results(baseline(1.33), tst(1.36), make_arm("input-only", TST, [1.35]))))
    assert text.startswith("No arm beats baseline: the closest, input-only, is behind by 0.0200 nats")
    assert "At this size and budget superposition does not pay." in text


def test_verdict_prefers_an_arm_that_finished_every_seed():
    results = make_results(baseline(1.33, 1.34), tst(1.20, 1.21), make_arm("power-law", TST, [1.30, 1.31]))
    diverge(results["arms"][1]["runs"][1])
    assert verdict(summarise(results)).startswith("power-law is ahead of baseline")


def test_verdict_says_when_flops_are_not_equal():
    results = make_results(baseline(1.33), tst(1.30))
    results["arms"][1]["runs"][0]["flops"] *= 0.5
    assert "at 0.50× its FLOPs" in verdict(summarise(results))


def test_verdict_without_a_pair():
    results = make_results(baseline(1.33), tst(1.30))
    diverge(results["arms"][0]["runs"][0])
    assert "no finished pair" in verdict(summarise(results))
    assert "no finished pair" in verdict(summarise(make_results(baseline(1.33))))


def test_table_shows_every_arm_as_text():
    results = make_results(baseline(1.33, 1.34, 1.35), make_arm("[bold]tst", TST, [1.30, 1.31, 1.33]))
    diverge(results["arms"][0]["runs"][2])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(summarise(results)))
    text = console.export_text()
    assert "[bold]tst" in text
    assert "2 (1 diverged)" in text
    assert "1.3350 ± 0.0071" in text
    assert "−0.0300 ± 0.0000" in text


def test_loss_panels_are_cropped_to_what_can_be_compared():
    results = make_results(baseline(1.33, 1.34), tst(1.30, 1.45))
    diverge(results["arms"][1]["runs"][0])
    axes = draw_loss(results).axes[0]
    low, high = axes.get_ylim()
    assert low < 1.33 < 1.45 < high < 2
    assert any("up to 6.8 while superposed" in text.get_text() for text in axes.texts)


def test_no_line_joins_a_bag_loss_with_a_plain_loss():
    results = make_results(baseline(1.33), tst(1.30))
    for run in results["arms"][1]["runs"]:
        for row in run["training"]:
            row["loss"] = 1000.0 if row["bag_size"] > 1 else 1.0
    drawn = [set(line.get_ydata()) for line in draw_training(results).axes[0].lines]
    assert any(1000.0 in values for values in drawn)
    assert not any({1000.0, 1.0} <= values for values in drawn)


class Page(HTMLParser):
    """Tags, attributes that ask for another file, and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.words, self.open = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def assert_good_report(results, out):
    path = write_report(results, out)
    assert path == out / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "b"} & set(page.tags)
    for name in ("loss", "final", "training"):
        header = (out / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", header[16:])[0] == 1440
    assert verdict(summarise(results)) in page.words
    for arm in results["arms"]:
        assert arm["name"] in page.words
    assert results["recipe"] in page.words
    assert results["command"] in page.words
    return page


def test_report_of_three_seeds(tmp_path):
    results = make_results(baseline(1.33, 1.34, 1.335), tst(1.30, 1.309, 1.304))
    page = assert_good_report(results, tmp_path / "report")
    assert results["arms"][0]["runs"][0]["sample"] in page.words
    assert "4 → 1" in page.words
    assert "+0.7100" in page.words
    assert "15.8 TFLOPs" in page.words


def test_report_of_hostile_names_three_stages_and_missing_values(tmp_path):
    name = "<script>$\\frac{a}$ & _x"
    staged = make_arm(name, [stage(100, 8), stage(125, 4), stage(525)], [1.31])
    staged["runs"][0]["switches"][1] |= {"loss_before": None, "height": None, "steps_to_recover": None}
    results = make_results(baseline(1.33), staged)
    for row in staged["runs"][0]["training"][:3]:
        del row["positions_per_second"]
    results["recipe"] = "</pre><script>alert(1)</script>"
    page = assert_good_report(results, tmp_path)
    assert "8 → 4" in page.words
    assert "4 → 1" in page.words


@pytest.mark.parametrize("lost", [(0, 0), (1, 0), (1, 1)])
def test_report_of_diverged_runs(tmp_path, lost):
    results = make_results(baseline(1.33, 1.34), tst(1.30, 1.31))
    diverge(results["arms"][lost[0]]["runs"][lost[1]])
    assert "diverged" in assert_good_report(results, tmp_path).words


def test_report_when_everything_diverged(tmp_path):
    results = make_results(baseline(1.33), tst(1.30))
    for arm in results["arms"]:
        diverge(arm["runs"][0])
    assert_good_report(results, tmp_path)


def test_report_of_the_baseline_alone(tmp_path):
    assert "Switches" not in assert_good_report(make_results(baseline(1.33)), tmp_path).words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0, "0"),
        (257, "257"),
        (999.7, "1.00K"),
        (12_345_678, "12.3M"),
        (999_999, "1.00M"),
        (6e10, "60.0B"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (42, "42.0 s"), (59.99, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min"), (367_200, "4 d 6 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
