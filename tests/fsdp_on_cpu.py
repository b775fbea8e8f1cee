"""Runs the command line with FSDP2 on gloo ranks without an accelerator, which Accelerate offers on accelerators alone.

Stands in for two things: Accelerate's choice of the distributed type, and the wait for gathered tensors when a state dict is
collected (on an accelerator the copy to the host waits).
"""

from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule

from superpose.cli import main
from superpose.engines.transformers import ScheduledTrainer

stock_init, stock_state_dict, stock_step = AcceleratorState.__init__, Accelerator.get_state_dict, ScheduledTrainer.training_step


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    stock_init(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin") or vars(self).get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    whole = stock_state_dict(self, *args, **kwargs)
    return {name: value.wait() if isinstance(value, AsyncCollectiveTensor) else value for name, value in whole.items()}


def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    assert isinstance(self.model_wrapped, FSDPModule), "the model is not sharded"
    return stock_step(self, *args, **kwargs)


AcceleratorState.__init__ = init
Accelerator.get_state_dict = state_dict
ScheduledTrainer.training_step = training_step
main()
