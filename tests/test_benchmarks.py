"""What the benchmarks measure with, and that the document quotes what they recorded."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from superpose import bag_mean, linear_multi_hot_cross_entropy, loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name):
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def peak_of_tensors(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # set by the module, and kept to this test
    return benchmark("timing").peak_of_tensors


def test_the_document_is_what_was_recorded():
    table = benchmark("table")
    assert table.DOCUMENT.read_text() == table.document(json.loads(table.RESULTS.read_text()))


def test_peak_of_tensors_counts_what_lives_at_once(peak_of_tensors):
    kept = torch.ones(250)

    def call():
        doubled = kept * 2  # 1,000 bytes
        del doubled
        other = kept + 1
        return torch.cat([other, other, other])  # 3,000 more

    assert peak_of_tensors(call) == 4000


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_never_holds_the_full_logits(peak_of_tensors, monkeypatch, reduction):
    rows, vocabulary = 2048, 500
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 4 * vocabulary * 64)
    hidden, head = torch.randn(rows, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(vocabulary, (rows, 8))

    def call():
        linear_multi_hot_cross_entropy(hidden, head, targets, reduction=reduction).sum().backward()

    assert peak_of_tensors(call) < 4 * rows * vocabulary / 8


@pytest.mark.parametrize("vocabulary", [64, 1000])
def test_the_bag_mean_never_holds_an_embedding_for_each_token(peak_of_tensors, vocabulary):
    bag_size, width = 16, 64
    weight, ids = torch.randn(vocabulary, width, requires_grad=True), torch.randint(vocabulary, (4, 128, bag_size))
    assert peak_of_tensors(lambda: bag_mean(weight, ids).sum().backward()) < 4 * ids.numel() * width / 2
