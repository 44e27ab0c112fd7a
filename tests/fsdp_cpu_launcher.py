"""Test-only: runs a script under FSDP2 on CPU processes, which accelerate itself offers on GPUs alone.

    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/fsdp_cpu_launcher.py path/to/script.py [script arguments]

`ENVIRONMENT` is what `accelerate launch` exports for `configs/fsdp.yaml` (anything already set wins), and
`allow_fsdp_on_cpu` lets accelerate keep its FSDP plugin on CPU processes. Everything after that is accelerate's own
code and torch's.
"""

import os
import runpy
import sys


ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ZImageTransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
}


def allow_fsdp_on_cpu():
    """Lets `AcceleratorState` take an FSDP plugin on several CPU processes, as it does on several GPUs."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not AcceleratorState._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = __init__


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    allow_fsdp_on_cpu()
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
