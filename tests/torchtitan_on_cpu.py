# ruff: noqa: E402  what stands in must be there before TorchTitan is imported
"""Runs TorchTitan 0.3.0, which is published for GPUs, on a CPU with gloo and torch 2.13: for tests, and to try commands out.

    python tests/torchtitan_on_cpu.py --module … --config … [options]      # in place of -m torchtitan.train, under torchrun too

Stands in for what a CPU, gloo or this torch lacks, and for nothing of superpose's:

* the device module: names, memory statistics, one device;
* FlexAttention, which has no backward on a CPU: scaled dot-product attention under the same mask, made dense;
* compiled block masks, because each shape takes long to compile;
* ``torch.distributed.set_timeout`` and the micro-batch arguments of pipeline schedules, newer than this torch;
* gloo's missing PREMUL_SUM: FSDP2 sums and divides;
* ``spmd_backend``: ``partial_dtensor`` on more than one rank, because the default needs what only a newer torch has.
"""

import os
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name, value in (
    ("RANK", "0"),
    ("LOCAL_RANK", "0"),
    ("WORLD_SIZE", "1"),
    ("MASTER_ADDR", "localhost"),
    ("MASTER_PORT", "0"),
):
    os.environ.setdefault(name, value)

import torch
import torch.distributed
from torch.distributed import fsdp
from torch.distributed.pipelining import schedules
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention


class _Device(ModuleType):
    """``torch.cpu`` with what TorchTitan asks of ``torch.cuda``."""

    class _Properties:
        total_memory = 2**34

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_device_properties(self, device: Any = None) -> Any:
        return self._Properties

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...


def _dense_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: Any,
    enable_gqa: bool,
    return_aux: Any,
    kernel_options: Any,
) -> Any:
    assert score_mod is None
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa), None


def _step(
    self: Any,
    *args: Any,
    arg_mbs: Any = None,
    kwarg_mbs: Any = None,
    target_mbs: Any = None,
    losses: Any = None,
    return_outputs: bool = True,
    loss_kwargs: Any = None,
) -> None:
    stages = self._stages if hasattr(self, "_stages") else [self._stage]
    for stage in stages:
        stage.has_backward = self._has_backward
        stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


def _eval(self: Any, **kwargs: Any) -> None:
    has_backward, self._has_backward = self._has_backward, False
    try:
        self.step(**kwargs, return_outputs=False)
    finally:
        self._has_backward = has_backward


def _fully_shard(*args: Any, **kwargs: Any) -> Any:
    module = stock_fully_shard(*args, **kwargs)
    for part in module if isinstance(module, list | tuple) else [module]:
        part.set_force_sum_reduction_for_comms(True)
    return module


torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda device_type: _Device("device")
torch.distributed.set_timeout = lambda timeout, group=None: None
for schedule in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
    schedule.step = _step
    schedule.eval = _eval
stock_fully_shard = fsdp.fully_shard
fsdp.fully_shard = _fully_shard

from torchtitan.config import ParallelismConfig
from torchtitan.models.common import attention

attention._compiled_create_block_mask = context_parallel._compiled_create_block_mask = create_block_mask
attention.FlexAttention._compiled_flex_attn = _dense_attention
if int(os.environ["WORLD_SIZE"]) > 1:
    ParallelismConfig.__init__.__kwdefaults__["spmd_backend"] = "partial_dtensor"

if __name__ == "__main__":
    from torchtitan.train import main

    main()
