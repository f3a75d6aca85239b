"""CUDA backend: hand-written kernels of ``sapt_fast._C`` for decoding and search, forward only."""
