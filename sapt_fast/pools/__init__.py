"""Pools of parameters: rows, LoRA adapters, prompts."""
