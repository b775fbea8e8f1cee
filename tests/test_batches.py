import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from superpose import InputError, Schedule, ScheduledTokens, Stage, TokenStore, bags
from superpose.data import batches

SCHEDULE = Schedule.staged(
    [
        Stage(2, 4, weighting="power-law"),
        Stage(2, 3, "input-only"),
        Stage(2, 2, "output-only"),
        Stage(2, 4, position_divisor=4),
        Stage(3),
    ]
)


@pytest.fixture
def data(store):
    return ScheduledTokens(store, SCHEDULE, positions=16, sequences_per_step=3)


def test_each_stage_gives_its_shapes(data):
    shapes = [(tuple(data[3 * step]["input_ids"].shape), tuple(data[3 * step]["labels"].shape)) for step in (0, 2, 4, 6, 8)]
    assert shapes == [((16, 4), (16, 4)), ((16, 3), (16,)), ((16,), (16, 2)), ((4, 4), (4, 4)), ((16,), (16,))]
    assert torch.equal(data[0]["position_weights"], bags.position_weights("power-law", 4))
    assert "position_weights" not in data[6]
    assert len(data) == 11 * 3


@pytest.fixture
def places(store, monkeypatch):
    """A store whose tokens are their own places in it."""
    monkeypatch.setattr(TokenStore, "read", lambda self, start, count: np.arange(start, start + count))
    return TokenStore(store)


def read(data, first, end):
    return torch.cat([data[index]["input_ids"].flatten() for index in range(first, end)])


def test_each_stage_reads_its_part_of_the_stream_once(data, places):
    block = batches.BLOCK * 16
    expected = 0
    for first, end in pairwise([0, *SCHEDULE.switches, SCHEDULE.steps]):
        tokens = read(data, 3 * first, 3 * end)
        assert len(tokens) == len(tokens.unique()) == SCHEDULE.token_offset(end, 16, 3) - SCHEDULE.token_offset(first, 16, 3)
        blocks = (tokens // block).unique()
        order = [(place * data.stride) % data.blocks for place in range(data.blocks)]
        stretch = range(expected // block, (expected + len(tokens) - 1) // block + 1)
        assert set(blocks.tolist()) == {order[place] for place in stretch}
        expected += len(tokens)


def test_the_stream_is_the_same_in_every_arm(places):
    def read_in_all(schedule, seed):
        data = ScheduledTokens(places, schedule, positions=16, sequences_per_step=4, seed=seed)
        epochs.add(data.epoch_tokens // block)
        return sorted(read(data, 0, len(data)).tolist())

    block, epochs = batches.BLOCK * 16, set()
    places.tokens = next(n for n in range(places.tokens, 0, -1) if n % block == 1 and n % 3 == 0)
    plain, bags = Schedule.baseline(24), Schedule.staged([Stage(4, 8), Stage(2, 3), Stage(2)])
    assert read_in_all(plain, 0) == read_in_all(plain, 1)
    assert read_in_all(bags, 0) == read_in_all(Schedule.baseline(40), 3)
    assert set(read_in_all(plain, 0)) < set(read_in_all(bags, 0))
    assert len(epochs) == 2  # windows of three sequences make an epoch that has a block less


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 10, 377, 11_992])
def test_blocks_are_each_visited_once_and_spread_evenly(blocks):
    stride = batches._golden_stride(blocks)
    order = [step * stride % blocks for step in range(blocks)]
    assert sorted(order) == list(range(blocks))
    for first in range(0, blocks - 20, max(1, blocks // 7)):
        counts = np.histogram(order[first : first + 20], bins=4, range=(0, blocks))[0]
        assert counts.min() >= 3


def test_windows_are_mixed_by_the_seed_and_in_parts(places, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", 64)

    def offsets(seed):
        data = ScheduledTokens(places, Schedule.baseline(20), positions=16, sequences_per_step=2, seed=seed)
        return [int(data[index]["input_ids"][0]) // 16 for index in range(40)]

    assert offsets(0) == offsets(0) != offsets(1)
    assert offsets(0) != sorted(offsets(0))
    monkeypatch.setattr(batches, "PERMUTED", 16)
    order = offsets(0)
    assert [sorted(order[at : at + 16]) for at in (0, 16, 32)] == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert order[:16] != order[16:32]


def test_labels_by_mode(data):
    full, input_only, output_only, plain = data[0], data[6], data[12], data[24]
    assert torch.equal(full["labels"], full["input_ids"])
    assert torch.equal(plain["labels"], plain["input_ids"])
    assert torch.equal(input_only["labels"], input_only["input_ids"][:, 0])
    assert output_only["labels"][:-1, 1].equal(output_only["input_ids"][1:])
    assert output_only["labels"][-1].tolist() == [output_only["input_ids"][-1].item(), -100]


def test_workers_and_starting_points_do_not_change_a_sample(data):
    loader = DataLoader(data, batch_size=3, num_workers=2)
    for step, batch in enumerate(loader):
        expected = torch.stack([data[3 * step + i]["input_ids"] for i in range(3)])
        assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(pickle.loads(pickle.dumps(data))[5]["input_ids"], data[5]["input_ids"])


def test_an_unordered_batch_is_refused(data):
    with pytest.raises(InputError, match="train_sampling_strategy='sequential'"):
        data.__getitems__([0, 9])


def test_an_epoch_reads_every_token_and_the_next_continues_at_its_start(places):
    with pytest.warns(UserWarning, match="epochs"):
        data = ScheduledTokens(places, Schedule.baseline(places.tokens // 512 + 1), positions=512, sequences_per_step=1)
    tokens, counts = read(data, 0, len(data)).unique(return_counts=True)
    assert tokens.tolist() == list(range(data.epoch_tokens))
    twice = tokens[counts == 2]
    assert len(twice) == len(data) * 512 - data.epoch_tokens
    assert set(counts.tolist()) == {1, 2}
    assert twice.tolist() == list(range(len(twice)))  # the stream begins at the store's


def test_epochs_warn_and_move_the_windows(places):
    steps = 2 * places.tokens // 512 + 4
    with pytest.warns(UserWarning, match=r"reads 2\.\d\d epochs"):
        data = ScheduledTokens(places, Schedule.baseline(steps), positions=512, sequences_per_step=1)
    windows = sorted(int(data[index]["input_ids"][0]) for index in range(len(data)))
    assert len(set(windows)) == len(windows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScheduledTokens(places, Schedule.baseline(4), positions=512, sequences_per_step=1)


def test_a_corpus_shorter_than_a_window_is_refused(store):
    with pytest.raises(InputError, match="fewer than one window"):
        ScheduledTokens(store, Schedule.tst(10, 16, 0.5), positions=2**20, sequences_per_step=1)
