"""One run: stages, evaluation, checkpoints."""
