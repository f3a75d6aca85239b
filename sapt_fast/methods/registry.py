"""The methods of sapt_fast, by their names in configs and saved folders."""

from __future__ import annotations

import importlib
import os
from typing import Any

from sapt_fast.methods.base import Handle

__all__ = ["METHODS", "handle_type"]

# The module and class of each method's handle. A new method needs one file and one line here.
METHODS: dict[str, str] = {
    "sapt": "sapt_fast.methods.sapt:SaptHandle",
    "sapt_prompt": "sapt_fast.methods.sapt_prompt:PromptHandle",
    "lora_sum": "sapt_fast.methods.lora_sum:LoraSumHandle",
    "gainlora": "sapt_fast.methods.gainlora:GainLoraHandle",
    "sd_lora": "sapt_fast.methods.sd_lora:SdLoraHandle",
    "epi": "sapt_fast.methods.epi:EpiHandle",
    "l2p": "sapt_fast.methods.l2p:L2pHandle",
    "l2p_images": "sapt_fast.methods.l2p_images:L2PImageHandle",
    "progprompt": "sapt_fast.methods.progprompt:ProgPromptHandle",
    "coda": "sapt_fast.methods.coda:CodaHandle",
    "dualprompt": "sapt_fast.methods.dualprompt:DualPromptHandle",
    "gated": "sapt_fast.methods.gated:GatedHandle",
    "grace": "sapt_fast.methods.grace:GraceHandle",
    "melo": "sapt_fast.methods.melo:MeloHandle",
    "mome": "sapt_fast.methods.mome:MomeHandle",
    "peft": "sapt_fast.methods.peft.pool:PeftHandle",
    "xlora": "sapt_fast.methods.peft.xlora:XLoraHandle",
}


def handle_type(method: str, source: str | os.PathLike[str]) -> type[Handle]:
    """Returns the class of a method's handle.

    Args:
        method: the method's name.
        source: the file or argument that contains the name, for the message.

    Raises:
        ValueError: if this version has no such method.
    """
    if method not in METHODS:
        raise ValueError(
            f"{source}: method is {method!r}, which this version of sapt_fast does not have (it "
            f"has {', '.join(METHODS)}); load it with the version that wrote it, or upgrade"
        )
    module, _, name = METHODS[method].partition(":")
    kind: Any = getattr(importlib.import_module(module), name)
    return kind
