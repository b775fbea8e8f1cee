import pytest
import torch

from superpose import reference
from superpose.bags import DCLM_FIT, WEIGHTINGS, fold, following_tokens, next_position_targets, position_weights


def test_fold_is_contiguous_and_ordered():
    ids = torch.arange(24).view(2, 12)
    bags = fold(ids, 3)
    assert bags.shape == (2, 4, 3)
    assert bags[1, 2].tolist() == [18, 19, 20]
    assert torch.equal(fold(ids, 1).squeeze(-1), ids)


def test_fold_partial_bag():
    with pytest.raises(ValueError, match="10 tokens do not fold into bags of 4"):
        fold(torch.arange(10), 4)
    assert fold(torch.arange(10), 4, pad_value=-100)[-1].tolist() == [8, 9, -100, -100]
    with pytest.raises(ValueError, match="bag_size"):
        fold(torch.arange(10), 0)


@pytest.mark.parametrize("bag_size", [1, 2, 5])
def test_next_bag_targets_are_the_published_labels_but_for_the_last_bag(bag_size):
    ids = torch.randint(0, 99, (3, 6 * bag_size + 1))
    published = reference.superposed_labels(ids[:, 1:], bag_size)
    ours = next_position_targets(fold(ids[:, :-1], bag_size))
    assert torch.equal(published[:, :-1], ours[:, :-1])
    assert (ours[:, -1] == -100).all()
    # The published window is one token longer, so its last bag has that one target.
    assert published[:, -1, 0].equal(ids[:, -1])
    assert (published[:, -1, 1:] == -100).all()


def test_targets_leave_the_labels_alone():
    labels = torch.arange(6).view(1, 6)
    assert next_position_targets(labels).tolist() == [[1, 2, 3, 4, 5, -100]]
    assert labels.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_following_tokens_shifted_by_one_position_are_the_next_tokens():
    targets = next_position_targets(following_tokens(torch.arange(5).view(1, 5), 3))
    assert targets[0].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, -100], [4, -100, -100], [-100] * 3]


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, DCLM_FIT])
@pytest.mark.parametrize("bag_size", [1, 2, 8])
def test_position_weights_sum_to_one_and_never_rise(weighting, bag_size):
    weights = position_weights(weighting, bag_size)
    assert weights.shape == (bag_size,)
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx(1)
    assert (weights.diff() <= 1e-7).all()


def test_position_weights_follow_their_laws():
    assert position_weights("uniform", 4).tolist() == [0.25] * 4
    assert position_weights("first", 3).tolist() == [1, 0, 0]
    power = position_weights("power-law", 3)
    assert (power[0] / power[2]).item() == pytest.approx(3)
    exponential = position_weights("exponential", 3)
    assert (exponential[1] / exponential[2]).item() == pytest.approx(2.718281828)
    fitted = position_weights((3.63, 1.35, -1.25), 2)
    assert (fitted[0] / fitted[1]).item() == pytest.approx((3.63 + 1.35) / (3.63 + 1.35 * 2**-1.25))


def test_position_weights_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="power_law"):
        position_weights("power_law", 4)
    with pytest.raises(ValueError, match="negative"):
        position_weights((-5.0, 1.0, -1.0), 4)
