import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import bag_mean, reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), bag=st.integers(1, 9), batch=st.integers(1, 3), length=st.integers(1, 7))
def test_bag_mean_equals_the_listing(dtype, tolerance, seed, bag, batch, length):
    torch.manual_seed(seed)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 11, (batch, length, bag))  # 11 ids: bags repeat tokens
    fast, slow = bag_mean(weight, ids), reference.bag_mean(weight, ids)
    assert fast.shape == (batch, length, 6)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * upstream).sum(), weight)[0].float() for out in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * max(1.0, gradients[1].abs().max().item()))


def test_a_repeated_token_counts_as_often_as_it_stands():
    weight = torch.eye(4, requires_grad=True)
    mean = bag_mean(weight, torch.tensor([[2, 2, 2, 1]]))
    assert mean.tolist() == [[0, 0.25, 0.75, 0]]
    mean.sum().backward()
    assert weight.grad[:, 0].tolist() == [0, 0.25, 0.75, 0]


def test_bag_of_one_is_the_ordinary_embedding():
    weight, ids = torch.randn(9, 5), torch.randint(0, 9, (2, 3))
    assert torch.equal(bag_mean(weight, ids.unsqueeze(-1)), torch.nn.functional.embedding(ids, weight))


def test_bfloat16_bags_are_summed_in_float32():
    # In bfloat16 256 + 1 is 256 again: a running bfloat16 sum would lose every one of the small rows.
    weight = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    ids = torch.tensor([[0, *[1] * 127]])
    assert bag_mean(weight, ids).item() == torch.tensor((256 + 127) / 128).bfloat16().item()


def test_an_id_outside_of_the_table_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        bag_mean(torch.randn(4, 2), torch.tensor([[1, 4]]))
