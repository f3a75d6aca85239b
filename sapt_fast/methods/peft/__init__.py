"""PEFT models whose adapters are computed in one pass: LoRA, X-LoRA and Arrow."""
