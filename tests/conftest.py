"""Settings that must be made before the libraries under test are imported."""

import os

# Two threads in each process that shares the tests, so that kernels still split their work, but
# none that waits for work by spinning on another's core. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton decides at import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
