"""What the Triton kernels are made of."""
