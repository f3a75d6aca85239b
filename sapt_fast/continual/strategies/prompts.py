"""The config of strategies whose tasks are prompts."""

from __future__ import annotations

from typing import Any

from sapt_fast.methods.task_config import TaskConfig

__all__ = ["prompt_fields"]


def prompt_fields(config: TaskConfig[Any]) -> dict[str, Any]:
    """Returns the fields of a config with prompts instead of LoRA.

    Fields of layers are reset, and so is the weight of the own-key loss, which only SAPT uses.
    """
    own = {"adapter": "prompt", "target_modules": None, "lora_dropout": 0.0, "own_key_loss": 0.0}
    return {**config.to_dict(), **own}
