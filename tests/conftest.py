"""Settings that must be made before the libraries under test are imported."""

import os

import torch

# Triton decides at import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
