import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from superpose import linear_multi_hot_cross_entropy, loss, multi_hot_cross_entropy, reference

FORMS = [False, True]
REDUCTIONS = ["mean", "sum", "none"]
#: With a cap well inside the logits' range, so that it bends them.
BENT = [{}, {"soft_cap": 1.5}, {"z_loss": 0.1}, {"soft_cap": 1.5, "z_loss": 0.1}]


def problem(seed, rows=13, width=8, vocabulary=23, bag=4, dtype=torch.float32, ignored=0.2):
    """Random hidden states, head, targets (repeated and ignored ones among them) and position weights."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, width, dtype=dtype).requires_grad_()
    head = (torch.randn(vocabulary, width) * 2 / width**0.5).to(dtype).requires_grad_()  # logits of a few nats
    targets = torch.randint(0, vocabulary, (rows, bag))
    targets[0] = targets[0, 0]
    targets[torch.rand(rows, bag) < ignored] = -100
    targets[1] = -100
    targets[2] = torch.arange(bag)
    return hidden, head, targets, torch.rand(bag) + 0.1


def oracle(hidden, head, targets, weights, reduction, **options):
    return reduced(reference.row_losses(hidden @ head.T, targets, weights, **options), reduction)


def reduced(row_losses, reduction):
    rows, row_weights = row_losses
    return {"mean": rows.sum() / row_weights.sum(), "sum": rows.sum(), "none": rows}[reduction]


def gradients(value, upstream, *inputs):
    return torch.autograd.grad((value.double() * upstream).sum(), inputs)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("sum_to_one", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(3, 20),
    bag=st.integers(1, 6),
    vocabulary=st.integers(8, 40),
    bent=st.sampled_from(BENT),
)
def test_linear_form_equals_the_reference_in_float32(sum_to_one, reduction, seed, rows, bag, vocabulary, bent):
    hidden, head, targets, weights = problem(seed, rows=rows, vocabulary=vocabulary, bag=bag)
    options = {"reduction": reduction, "sum_to_one": sum_to_one, **bent}
    check_linear_form(hidden, head, targets, weights, options, tolerance=1e-6)


# Rows and widths enough that roundings of single logits to bfloat16 weigh little in the norm.
@pytest.mark.parametrize("multiplied", [False, True], ids=["float32-products", "bfloat16-products"])
@pytest.mark.parametrize("sum_to_one", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(20, 100),
    bag=st.integers(1, 6),
    vocabulary=st.integers(40, 200),
    bent=st.sampled_from(BENT),
)
def test_linear_form_equals_the_reference_in_bfloat16(multiplied, sum_to_one, reduction, seed, rows, bag, vocabulary, bent):
    hidden, head, targets, weights = problem(seed, rows=rows, width=32, vocabulary=vocabulary, bag=bag, dtype=torch.bfloat16)
    options = {"reduction": reduction, "sum_to_one": sum_to_one, **bent}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CPU_BFLOAT16", multiplied)
        check_linear_form(hidden, head, targets, weights, options, tolerance=1e-2)


def check_linear_form(hidden, head, targets, weights, options, tolerance):
    exact = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()]
    expected = oracle(*exact, targets, weights, **options)
    found = linear_multi_hot_cross_entropy(hidden, head, targets, weights=weights, **options)
    upstream = torch.rand(expected.shape, dtype=torch.float64)
    assert found.dtype == torch.float32
    assert relative(found, expected) < tolerance
    for ours, theirs in zip(gradients(found, upstream, hidden, head), gradients(expected, upstream, *exact), strict=True):
        assert ours.dtype == hidden.dtype
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("sum_to_one", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(3, 20),
    bag=st.integers(1, 6),
    vocabulary=st.integers(8, 40),
    z_loss=st.sampled_from([0.0, 0.1]),
)
def test_logits_form_equals_the_reference(sum_to_one, reduction, dtype, tolerance, seed, rows, bag, vocabulary, z_loss):
    hidden, head, targets, weights = problem(seed, rows=rows, vocabulary=vocabulary, bag=bag)
    logits = (hidden @ head.T).detach().to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    options = {"sum_to_one": sum_to_one, "z_loss": z_loss}
    expected = reduced(reference.row_losses(exact, targets, weights, **options), reduction)
    found = multi_hot_cross_entropy(logits, targets, weights=weights, reduction=reduction, **options)
    upstream = torch.rand(expected.shape, dtype=torch.float64)
    assert found.dtype == torch.float32
    assert relative(found, expected) < tolerance
    assert relative(*gradients(found, upstream, logits), *gradients(expected, upstream, exact)) < tolerance


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bag_axis", [False, True])
def test_a_bag_of_one_is_cross_entropy(reduction, bag_axis):
    hidden, head, targets, _ = problem(2, bag=1)
    logits = hidden @ head.T
    expected = cross_entropy(logits, targets[:, 0], reduction=reduction)
    given_targets = targets if bag_axis else targets[:, 0]
    assert torch.equal(multi_hot_cross_entropy(logits, given_targets, reduction=reduction), expected)
    linear = linear_multi_hot_cross_entropy(hidden, head, given_targets, reduction=reduction)
    torch.testing.assert_close(linear, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [multi_hot_cross_entropy, linear_multi_hot_cross_entropy])
def test_without_ignored_targets_it_is_the_published_listing(form):
    torch.manual_seed(3)
    hidden, head, targets = torch.randn(2, 5, 8), torch.randn(31, 8), torch.randint(0, 31, (2, 5, 6))
    arguments = (hidden @ head.T,) if form is multi_hot_cross_entropy else (hidden, head)
    assert form(*arguments, targets).item() == pytest.approx(
        reference.multi_hot_cross_entropy(hidden @ head.T, targets).item(), rel=1e-6
    )


def test_difference_to_the_listing_with_a_single_target_in_the_last_bag():
    # The listing averages each offset over its own rows; we average over valid targets: the last row weighs differently.
    torch.manual_seed(4)
    logits = torch.randn(1, 6, 17)
    targets = reference.superposed_labels(torch.randint(0, 17, (1, 18)), 3)
    log_probability = logits.log_softmax(-1)
    valid = targets != -100
    picked = -log_probability.gather(-1, targets.clamp_min(0))[valid]
    assert multi_hot_cross_entropy(logits, targets).item() == pytest.approx(picked.mean().item(), rel=1e-6)
    assert multi_hot_cross_entropy(logits, targets).item() == pytest.approx(
        reference.multi_hot_cross_entropy(logits, targets).item(), rel=0.1
    )


def test_mean_of_cross_entropies_through_the_first_target():
    # mean_i CE(y_i) = CE(y_0) + h·(W[y_0] − mean_i W[y_i]): an oracle that shares no code with the first one.
    hidden, head, targets, _ = problem(5, ignored=0.0)
    hidden, targets = hidden[2:], targets[2:]
    expected = (
        cross_entropy(hidden @ head.T, targets[:, 0]) + (hidden * (head[targets[:, 0]] - head[targets].mean(1))).sum(-1).mean()
    )
    assert linear_multi_hot_cross_entropy(hidden, head, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("sum_to_one", FORMS)
def test_starts_at_the_logarithm_of_the_vocabulary(sum_to_one):
    targets = torch.randint(0, 512, (4, 8))
    assert multi_hot_cross_entropy(torch.zeros(4, 512), targets, sum_to_one=sum_to_one).item() == pytest.approx(math.log(512))


def test_chunks_do_not_change_the_result(monkeypatch):
    hidden, head, targets, weights = problem(6, rows=300)
    whole = linear_multi_hot_cross_entropy(hidden, head, targets, weights=weights)
    whole_gradients = torch.autograd.grad(whole, (hidden, head))
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 1)  # 64 rows
    chunked = linear_multi_hot_cross_entropy(hidden, head, targets, weights=weights)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, (hidden, head)), whole_gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_one_input_alone(reduction):
    hidden, head, targets, _ = problem(7)
    both = torch.autograd.grad(linear_multi_hot_cross_entropy(hidden, head, targets, reduction=reduction).sum(), (hidden, head))
    alone = torch.autograd.grad(
        linear_multi_hot_cross_entropy(hidden, head.detach(), targets, reduction=reduction).sum(), hidden
    )
    assert torch.equal(alone[0], both[0])


def test_all_targets_ignored_is_nan_for_the_mean_and_zero_for_the_sum():
    hidden, head, targets, _ = problem(8)
    nothing = torch.full_like(targets, -100)
    assert linear_multi_hot_cross_entropy(hidden, head, nothing).isnan()
    assert multi_hot_cross_entropy(hidden @ head.T, nothing).isnan()
    total = linear_multi_hot_cross_entropy(hidden, head, nothing, reduction="sum")
    assert total.item() == 0
    assert torch.autograd.grad(total, hidden)[0].abs().sum() == 0


def test_no_rows_at_all():
    hidden, head, targets, _ = problem(13)
    total = linear_multi_hot_cross_entropy(hidden[:0], head, targets[:0], reduction="sum")
    assert total.item() == 0
    assert torch.autograd.grad(total, head)[0].abs().sum() == 0


@pytest.mark.parametrize("multiplied", [False, True])
def test_autocast_keeps_the_gradient_of_the_weight_in_float32(monkeypatch, multiplied):
    monkeypatch.setattr(loss, "CPU_BFLOAT16", multiplied)
    hidden, head, targets, _ = problem(9, rows=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_multi_hot_cross_entropy(hidden, head, targets)
    found = torch.autograd.grad(value, (hidden, head))
    expected = torch.autograd.grad(linear_multi_hot_cross_entropy(hidden, head, targets), (hidden, head))
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs.double()) < 1e-2


def test_large_logits_do_not_overflow():
    hidden, head = torch.full((3, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    value = linear_multi_hot_cross_entropy(hidden, head, torch.tensor([[0, 1], [0, 2], [2, 2]]))
    assert value.item() == pytest.approx((1e4 + 2.5e3 + 5e3) / 3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (hidden, head)))


def test_custom_ops_are_registered_as_torch_demands():
    hidden, head, targets, weights = problem(10)
    arguments = (hidden, head, targets, weights)
    options = loss._Options(
        torch.float32, chunk=64, ignore_index=-100, sum_to_one=False, soft_cap=2.0, z_loss=0.1, group="", first=0
    )
    torch.library.opcheck(loss._linear_rows, (*arguments, *options))
    torch.library.opcheck(loss._linear_total, (*arguments, torch.ones(len(hidden)), True, *options))


def test_compiles_without_a_graph_break():
    hidden, head, targets, _ = problem(11)
    compiled = torch.compile(
        lambda h, w: linear_multi_hot_cross_entropy(h * 2, w, targets) + 1, fullgraph=True, backend="aot_eager"
    )
    expected = linear_multi_hot_cross_entropy(hidden * 2, head, targets) + 1
    found = compiled(hidden, head)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(expected, (hidden, head)))


def test_refuses_what_does_not_fit():
    hidden, head, targets, _ = problem(12)
    with pytest.raises(ValueError, match="do not match"):
        linear_multi_hot_cross_entropy(hidden, head, targets[:-1])
    with pytest.raises(ValueError, match="width"):
        linear_multi_hot_cross_entropy(hidden[:, :-1], head, targets)
    with pytest.raises(ValueError, match="weights"):
        linear_multi_hot_cross_entropy(hidden, head, targets, weights=torch.ones(3))
    with pytest.raises(ValueError, match="reduction"):
        multi_hot_cross_entropy(hidden @ head.T, targets, reduction="median")
