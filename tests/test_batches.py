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
    assert data.block == 64  # the longest window: 16 bags of 4
    expected = 0
    for first, end in pairwise([0, *SCHEDULE.switches, SCHEDULE.steps]):
        tokens = read(data, 3 * first, 3 * end)
        assert len(tokens) == len(tokens.unique()) == SCHEDULE.token_offset(end, 16, 3) - SCHEDULE.token_offset(first, 16, 3)
        order = [(place * data.stride) % data.blocks for place in range(data.blocks)]
        stretch = range(expected // 64, (expected + len(tokens) - 1) // 64 + 1)
        assert set((tokens // 64).unique().tolist()) == {order[place] for place in stretch}
        expected += len(tokens)


def test_the_longest_window_is_read_in_one_piece(places):
    data = ScheduledTokens(places, Schedule.tst(40, 4, 0.5), positions=16, sequences_per_step=8)
    for index in range(20 * 8):
        tokens = data[index]["input_ids"].flatten().tolist()
        assert tokens == list(range(tokens[0], tokens[0] + 64))


def test_a_cut_stage_reads_windows_as_far_apart_as_there_is_room(places):
    """Neighbouring windows are alike: a decay that is a stage of its own must not read fewer documents than one that is not."""
    data = ScheduledTokens(places, Schedule.staged([Stage(4)] * 5), positions=16, sequences_per_step=8)
    for first in range(0, 20 * 8, 32):
        starts = np.sort([int(data[index]["input_ids"][0]) for index in range(first, first + 32)])
        assert np.diff(starts).min() > 0.4 * places.tokens / 32


def test_the_text_is_the_same_at_every_ratio_and_in_every_seed(places):
    def text(schedule, seed):
        data = ScheduledTokens(places, schedule, positions=16, sequences_per_step=4, seed=seed)
        return sorted(read(data, 0, len(data)).tolist())

    bags = Schedule.staged([Stage(4, 4), Stage(4, 2), Stage(8)])  # 32 plain steps of text
    assert text(bags, 0) == text(bags, 1)
    assert text(bags, 0) == text(Schedule.tst(20, 4, 0.2), 3)
    assert set(text(Schedule.tst(10, 4, 0.2), 0)) < set(text(bags, 0))
    assert text(Schedule.baseline(24), 0) == text(Schedule.staged([Stage(8), Stage(16)]), 0)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 10, 377, 11_992])
def test_blocks_are_each_visited_once_and_spread_evenly(blocks):
    stride = batches._golden_stride(blocks)
    order = [step * stride % blocks for step in range(blocks)]
    assert sorted(order) == list(range(blocks))
    for first in range(0, blocks - 20, max(1, blocks // 7)):
        counts = np.histogram(order[first : first + 20], bins=4, range=(0, blocks))[0]
        assert counts.min() >= 3


def test_windows_are_mixed_by_the_seed_and_in_parts(places, monkeypatch):
    def offsets(seed):
        data = ScheduledTokens(places, Schedule.baseline(20), positions=16, sequences_per_step=2, seed=seed)
        places_in_stream = {place * data.stride % data.blocks: place for place in range(data.blocks)}
        return [places_in_stream[int(data[index]["input_ids"][0]) // 16] for index in range(40)]

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


def test_an_epoch_reads_every_window_once_and_the_next_cuts_others(places):
    epoch = places.tokens // 512
    with pytest.warns(UserWarning, match=r"reads 2\.\d\d epochs"):
        data = ScheduledTokens(places, Schedule.staged([Stage(epoch)] * 2 + [Stage(4)]), positions=512, sequences_per_step=1)
    assert read(data, 0, epoch).unique().tolist() == list(range(epoch * 512))
    second = [data[index]["input_ids"] for index in range(epoch, 2 * epoch)]
    starts = {int(window[0]) for window in second}
    assert {start % 512 for start in starts} == {316}  # 0.618 of a window on
    whole = [window.diff().eq(1).all().item() for window in second]
    assert len(starts) == epoch
    assert sum(whole) >= epoch - 1  # one may go from the store's last token to its first
    assert len(torch.cat(second).unique()) == epoch * 512
    assert int(data[2 * epoch]["input_ids"][0]) % 512 == 120
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScheduledTokens(places, Schedule.baseline(epoch), positions=512, sequences_per_step=1)


def test_a_corpus_shorter_than_a_window_is_refused(store):
    with pytest.raises(InputError, match="fewer than one window"):
        ScheduledTokens(store, Schedule.tst(10, 16, 0.5), positions=2**20, sequences_per_step=1)
