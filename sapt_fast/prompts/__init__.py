"""Pools of prompts: SAPT-Prompt, where the mixture goes before the input embeddings."""
