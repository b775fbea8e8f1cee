import pickle
import warnings
from itertools import pairwise

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


def test_each_stage_reads_its_part_of_the_stream_once(data, store):
    tokens = TokenStore(store)
    for first, end in pairwise([0, *SCHEDULE.switches, SCHEDULE.steps]):
        start, stop = SCHEDULE.token_offset(first, 16, 3), SCHEDULE.token_offset(end, 16, 3)
        read = sorted(tuple(data[index]["input_ids"].flatten().tolist()) for index in range(3 * first, 3 * end))
        window = SCHEDULE.stage_at(first).window(16)
        assert read == sorted(tuple(tokens.read(at, window).tolist()) for at in range(start, stop, window))


def test_windows_are_mixed_by_the_seed_and_within_blocks(store, monkeypatch):
    def offsets(seed):
        data = ScheduledTokens(store, Schedule.baseline(20), positions=16, sequences_per_step=2, seed=seed)
        stream = TokenStore(store).read(0, 640).tolist()
        windows = {tuple(stream[at : at + 16]): at // 16 for at in range(0, 640, 16)}
        return [windows[tuple(data[index]["input_ids"].tolist())] for index in range(40)]

    assert offsets(0) == offsets(0) != offsets(1)
    assert offsets(0) != sorted(offsets(0))
    monkeypatch.setattr(batches, "BLOCK", 16)
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


def test_a_window_over_the_end_of_an_epoch_continues_at_the_start(store):
    tokens = TokenStore(store).tokens
    with pytest.warns(UserWarning, match="epochs"):
        data = ScheduledTokens(store, Schedule.baseline(tokens // 512 + 1), positions=512, sequences_per_step=1)
    stream = TokenStore(store).read(0, data.epoch_tokens).tolist()
    last = (stream + stream)[(len(data) - 1) * 512 : len(data) * 512]
    assert last in [data[index]["input_ids"].tolist() for index in range(len(data))]


def test_epochs_warn_and_move_the_windows(store):
    tokens = TokenStore(store).tokens
    steps = 2 * tokens // 512 + 4
    with pytest.warns(UserWarning, match=r"reads 2\.\d\d epochs"):
        data = ScheduledTokens(store, Schedule.baseline(steps), positions=512, sequences_per_step=1)
    starts = [
        {
            (index * 512) % data.epoch_tokens
            for index in range(e * data.epoch_tokens // 512 + 1, (e + 1) * data.epoch_tokens // 512)
        }
        for e in (0, 1)
    ]
    assert starts[0].isdisjoint(starts[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScheduledTokens(store, Schedule.baseline(4), positions=512, sequences_per_step=1)


def test_a_corpus_shorter_than_a_window_is_refused(store):
    with pytest.raises(InputError, match="fewer than one window"):
        ScheduledTokens(store, Schedule.tst(10, 16, 0.5), positions=2**20, sequences_per_step=1)
