"""Runs kernels with faults seeded into them, each in a process of its own: some kill it.

    python faults_run.py MODULE NUMBER:OP,OP ...

MODULE is the module with the faults. Prints the numbers of those that no op's result shows.
"""

import importlib
import os
import signal
import sys
from types import ModuleType

import torch
from bounds_run import load
from conftest import Synchronised  # the one beside this file
from test_launches import case

from sapt_fast.cuda_kernels import common

SEEDS = range(12)
LIMIT = 100  # seconds


def shows(module: ModuleType, op: str, fault: int) -> bool:
    """Whether a fault is an error, or a result that depends on the order of the threads."""
    kernel = importlib.import_module(f"sapt_fast.cuda_kernels.{op}")
    for rows in (1, 3, 9):
        _, call = case(op, rows)
        module.set_fault(0)
        want = call(kernel)
        module.set_fault(fault)
        for seed in SEEDS:
            module.set_order(seed)
            try:
                results = call(kernel)
            except RuntimeError:
                return True
            if not all(torch.equal(a, b) for a, b in zip(results, want, strict=True)):
                return True
    return False


def main(path: str, *faults: str) -> None:
    module = load(path)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    native = Synchronised(module)
    common.native = lambda: native
    common.place = lambda device: (0, 0)
    for fault in faults:
        number, _, ops = fault.partition(":")
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            os._exit(any(shows(module, op, int(number)) for op in ops.split(",")))
        if os.waitpid(child, 0)[1] == 0:
            print(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
