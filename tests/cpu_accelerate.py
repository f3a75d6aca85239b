"""Has accelerate do on CPUs what it does on GPUs: there it runs DDP, whatever it is asked for.

Run as a script it starts another one so:

    accelerate launch --config_file fsdp2.yaml tests/cpu_accelerate.py script.py --its options
"""

import os
import runpy
import sys


def act_as_on_gpus() -> None:
    """Before accelerate is used: gloo, the CPU, and FSDP or DeepSpeed as the environment asks."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        # Its own all-reduce between CPUs is compiled at the first start, which takes minutes.
        deepspeed.comm.torch.build_shm_op = lambda: None
        PartialState(backend="gloo")
    else:
        PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    act_as_on_gpus()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
