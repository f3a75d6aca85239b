"""Generated tasks and a small pretrained backbone for `sapt-fast demo`."""
