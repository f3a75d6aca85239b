"""PEFT models whose adapters are computed as one pool: LoRA, X-LoRA and Arrow."""
