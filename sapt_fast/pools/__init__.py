"""What methods store: rows, LoRA adapters, prompts."""
