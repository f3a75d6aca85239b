"""Triton backend: NVIDIA GPUs from compute capability 8.0 on, or Triton's interpreter."""
