"""Lets accelerate shard models over CPU processes: for tests only, since accelerate itself has FSDP on devices only.

Import it before anything makes an ``Accelerator``.
"""

from accelerate.state import AcceleratorState, DistributedType, PartialState

_initialize = AcceleratorState.__init__


def _initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _initialize_with_fsdp
