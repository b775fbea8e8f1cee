import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import bag_mean, reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bag=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    rows=st.sampled_from([11, 1000]),  # a product, or a gather
)
def test_bag_mean_equals_the_listing(dtype, tolerance, seed, bag, batch, length, rows):
    torch.manual_seed(seed)
    weight = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 11, (batch, length, bag))  # 11 ids: bags repeat tokens
    fast, slow = bag_mean(weight, ids), reference.bag_mean(weight, ids)
    assert fast.shape == (batch, length, 6)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * upstream).sum(), weight)[0].float() for out in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * max(1.0, gradients[1].abs().max().item()))


@pytest.mark.parametrize("rows", [4, 1000])
def test_a_repeated_token_counts_as_often_as_it_stands(rows):
    weight = torch.eye(rows, 4, requires_grad=True)
    mean = bag_mean(weight, torch.tensor([[2, 2, 2, 1]]))
    assert mean.tolist() == [[0, 0.25, 0.75, 0]]
    mean.sum().backward()
    assert weight.grad[:4, 0].tolist() == [0, 0.25, 0.75, 0]
    assert not weight.grad[4:].any()


@pytest.mark.parametrize("rows", [11, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_the_mean_in_the_dtype_of_the_table(rows, dtype):
    weight, ids = torch.randn(rows, 6, dtype=dtype), torch.randint(0, 11, (2, 5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(bag_mean(weight, ids), weight[ids].mean(-2))


def test_bag_of_one_is_the_ordinary_embedding():
    weight, ids = torch.randn(9, 5), torch.randint(0, 9, (2, 3))
    assert torch.equal(bag_mean(weight, ids.unsqueeze(-1)), torch.nn.functional.embedding(ids, weight))


@pytest.mark.parametrize("rows", [11, 1000])
def test_compiles_without_a_graph_break(rows):
    weight, ids = torch.randn(rows, 6, requires_grad=True), torch.randint(0, 11, (2, 5, 4))
    compiled = torch.compile(lambda table: bag_mean(table * 2, ids) + 1, fullgraph=True, backend="aot_eager")
    found, expected = compiled(weight), bag_mean(weight * 2, ids) + 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), weight), torch.autograd.grad(expected.sum(), weight))


@pytest.mark.parametrize("rows", [1, 6000])
def test_bfloat16_bags_are_summed_in_float32(rows):
    # In bfloat16 256 + 1 is 256 again: a running bfloat16 sum would lose every one of the small rows.
    weight = torch.tensor([[256.0], *[[1.0]] * rows], dtype=torch.bfloat16)
    ids = torch.tensor([[0, *[1] * 127]])
    assert bag_mean(weight, ids).item() == torch.tensor((256 + 127) / 128).bfloat16().item()


@pytest.mark.parametrize("rows", [4, 1000])
def test_an_id_outside_of_the_table_is_an_error(rows):
    with pytest.raises((IndexError, RuntimeError)):
        bag_mean(torch.randn(rows, 2), torch.tensor([[1, rows]]))
