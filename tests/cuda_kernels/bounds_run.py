"""Runs kernels on tensors that end where memory ends: an access beyond them kills their process.

    python bounds_run.py MODULE OP[,OP...] [FAULT]

MODULE is the emulated module; OP an op of the cuda backend, or "beyond" for a kernel that does it;
FAULT the number of one that is seeded into the kernels. Each op runs in a forked child. The last
line holds their exit statuses by op; this process fails if one of them did.
"""

import ctypes
import importlib
import importlib.util
import json
import mmap
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from conftest import Synchronised  # the one beside this file
from torch import Tensor

from sapt_fast.cuda_kernels import common
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.route import QueryProjection, TaskProjections

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_libc = ctypes.CDLL(None, use_errno=True)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised; its last byte is the last one before a page that nobody may touch."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=room - size).view(
        dtype
    ).view(shape)  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(shape, dtype).copy_(torch.randn(shape))


def _new_empty(self: Tensor, *shape, dtype: torch.dtype | None = None) -> Tensor:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return empty(tuple(sizes), dtype or self.dtype)


def _mixed_lora(kernel, dtype: torch.dtype) -> None:
    for samples, inputs, outputs, ranks in ((1, 16, 16, 4), (3, 63, 131, 5), (9, 1100, 200, 301)):
        owners = empty((ranks,), torch.int32).zero_()
        owners[ranks // 2 :] = 1
        projection = Projection(
            weight=None,
            bias=None,
            lora_a=normal(ranks, inputs, dtype=dtype),
            lora_b=normal(ranks, outputs, dtype=dtype),
            row_adapter=owners,
            row_scale=normal(ranks),
        )
        x, mixture = normal(samples, inputs, dtype=dtype), normal(samples, 2)
        weight, bias = normal(outputs, inputs, dtype=dtype), normal(outputs, dtype=dtype)
        whole = projection._replace(weight=weight, bias=bias)
        kernel.mixed_lora_fwd(x, mixture, [projection, whole])


def _nearest_key(kernel, dtype: torch.dtype) -> None:
    for queries, count, width in ((1, 130, 32), (4, 17, 63), (6, 133, 33), (17, 129, 40)):
        query, keys = normal(queries, width, dtype=dtype), normal(count, width, dtype=dtype)
        kernel.nearest_key_fwd(query, keys, normal(count))


def _topk_keys(kernel, dtype: torch.dtype) -> None:
    for queries, count, width in ((1, 130, 32), (4, 17, 63), (6, 133, 33), (17, 260, 40)):
        query, keys = normal(queries, width, dtype=dtype), normal(count, width, dtype=dtype)
        kernel.topk_keys_fwd(query, keys, 9, "cosine")


def _route(kernel, dtype: torch.dtype) -> None:
    for samples, width, hidden, count in ((1, 32, 8, 8), (3, 63, 5, 9), (2, 2100, 3, 300)):
        shapes = (hidden, width), (width, hidden), (width,), (width,)
        projection = QueryProjection(*(normal(*shape, dtype=dtype) for shape in shapes))
        pooled, keys = normal(samples, width, dtype=dtype), normal(count, width, dtype=dtype)
        kernel.route_fwd(pooled, keys, projection, 1.0, 3, 0.1)
        shapes = (count, hidden, width), (count, 7, hidden)
        projections = TaskProjections(*(normal(*shape, dtype=dtype) for shape in shapes))
        keys = normal(count, 7, dtype=dtype)
        kernel.route_fwd(pooled, keys, projections, 1.0, 3, 0.1, "relu", "cosine", True)


def _mix_prompts(kernel, dtype: torch.dtype) -> None:
    for samples, length, tokens, width in ((1, 2, 3, 16), (5, 3, 4, 63), (3, 7, 0, 130)):
        prompts, mixture = normal(3, length, width, dtype=dtype), normal(samples, 3)
        kernel.mix_prompts_fwd(prompts, mixture, normal(samples, tokens, width, dtype=dtype), None)


def load(path: str) -> ModuleType:
    """The emulated module, whose name is that of its folder."""
    spec = importlib.util.spec_from_file_location(Path(path).parent.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, op: str) -> None:
    if op == "beyond":
        values, out = normal(128), torch.zeros(128)
        Synchronised(module).run_toy("reads_beyond", values.data_ptr(), out.data_ptr())
        return
    torch.Tensor.new_empty = _new_empty
    native = Synchronised(module)
    common.native = lambda: native
    common.place = lambda device: (0, 0)
    kernel = importlib.import_module(f"sapt_fast.cuda_kernels.{op}")
    for dtype in _DTYPES:
        globals()[f"_{op}"](kernel, dtype)


def status(module: ModuleType, op: str) -> int:
    """The exit status of a child that runs one op; negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        run(module, op)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(path: str, ops: str, fault: str = "0") -> None:
    module = load(path)
    module.set_fault(int(fault))
    ended = {op: status(module, op) for op in ops.split(",")}
    print(json.dumps(ended))
    sys.exit(any(ended.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
