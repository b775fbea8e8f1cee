"""The Triton kernels against the torch passes and the reference: in Triton's interpreter, or on the GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from superpose import kernels, linear_multi_hot_cross_entropy, loss, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPS = [None, 2.0]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)


@pytest.fixture
def with_kernels(monkeypatch, small_blocks):
    monkeypatch.setattr(loss, "_kernels", lambda device, dtype: kernels)
    monkeypatch.setattr(loss, "CPU_BFLOAT16", True)


def chunk(rows=4, vocabulary=41, bag=3, dtype=torch.float32):
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary, device=DEVICE) * 3).to(dtype)
    targets = torch.randint(vocabulary, (rows, bag), device=DEVICE)
    targets[0] = 5  # repeated
    return logits, targets, torch.rand(rows, bag, device=DEVICE), torch.rand(rows, device=DEVICE)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp(cap, dtype, small_blocks):
    logits, *_ = chunk(dtype=dtype)
    top, normaliser = kernels.log_sum_exp(logits, cap)
    expected_top, expected, _ = loss._exponentials(logits.float().clone(), cap)
    torch.testing.assert_close(top, expected_top)
    torch.testing.assert_close(normaliser, expected)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwrite_with_gradient(cap, dtype, small_blocks):
    logits, targets, taken, factor = chunk(dtype=dtype)
    values = logits.float().clone()
    top, _, bend = loss._exponentials(values, cap)
    values.mul_(factor[:, None]).scatter_add_(-1, targets, -taken)
    expected = values if bend is None else values * bend
    kernels.overwrite_with_gradient(logits, top, factor, targets, taken, cap)
    torch.testing.assert_close(logits, expected.to(dtype))


def test_rows_of_a_larger_buffer_are_left_alone(small_blocks):
    logits, targets, taken, factor = chunk()
    buffer = torch.full((6, 64), 7.0, device=DEVICE)
    view = buffer[:4, :41]
    view.copy_(logits)
    kernels.overwrite_with_gradient(view, logits.amax(-1), factor, targets, taken, None)
    assert (buffer[4:] == 7).all()
    assert (buffer[:, 41:] == 7).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("reduction", "sum_to_one", "options"),
    [("mean", False, {}), ("mean", True, {"soft_cap": 2.0, "z_loss": 0.1}), ("none", False, {"soft_cap": 2.0})],
)
def test_the_whole_loss_through_the_kernels(with_kernels, monkeypatch, reduction, sum_to_one, options, dtype, tolerance):
    torch.manual_seed(1)
    monkeypatch.setattr(loss, "_rows_per_chunk", lambda vocabulary, device: 4)
    hidden = torch.randn(10, 16, device=DEVICE).to(dtype).requires_grad_()
    head = (torch.randn(40, 16, device=DEVICE) * 0.5).to(dtype).requires_grad_()
    targets, weights = torch.randint(40, (10, 3), device=DEVICE), torch.rand(3, device=DEVICE)
    targets[0], targets[1, 1:], targets[2] = -100, -100, 3
    exact = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()]
    rows, row_weights = reference.row_losses(exact[0] @ exact[1].T, targets, weights, sum_to_one=sum_to_one, **options)
    expected = rows if reduction == "none" else rows.sum() / row_weights.sum()
    found = linear_multi_hot_cross_entropy(
        hidden, head, targets, weights=weights, reduction=reduction, sum_to_one=sum_to_one, **options
    )
    upstream = torch.rand_like(expected)
    gradients = torch.autograd.grad((found.double() * upstream).sum(), (hidden, head))
    for ours, theirs in zip(
        [found, *gradients], [expected, *torch.autograd.grad((expected * upstream).sum(), exact)], strict=True
    ):
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


def test_chosen_on_cuda_alone():
    assert loss._kernels(torch.device("cuda"), torch.bfloat16) is kernels
    assert loss._kernels(torch.device("cuda"), torch.float64) is None
    assert loss._kernels(torch.device("cpu"), torch.float32) is None


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from superpose import kernels

types = {"top": "*fp32", "tops": "*fp32", "normalisers": "*fp32", "factors": "*fp32", "taken": "*fp32", "targets": "*i64",
         "stride": "i64", "vocabulary": "i32", "soft_cap": "fp32"}
constants = {"CAPPED": True, "BAG": 16, "BLOCK": kernels.BLOCK}
for kernel in (kernels._log_sum_exp, kernels._overwrite_with_gradient):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names}
    source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert compiled.asm["cubin"]
"""


def test_kernels_compile_to_machine_code_of_a_gpu_that_need_not_be_there():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
