"""sapt_fast runs a whole pool of LoRA adapters in one pass.

Each input gets its own weighted mixture.
"""

from typing import TYPE_CHECKING, Any

from sapt_fast.version import __version__

_EXPORTS = {
    "CodaConfig": "sapt_fast.methods.coda",
    "DualPromptConfig": "sapt_fast.methods.dualprompt",
    "GatedConfig": "sapt_fast.methods.gated",
    "L2PConfig": "sapt_fast.methods.l2p",
    "Reflection": "sapt_fast.continual.reflection",
    "Replay": "sapt_fast.continual.reflection",
    "SaptCallback": "sapt_fast.continual.callback",
    "SaptConfig": "sapt_fast.methods.sapt",
    "SaptTrainer": "sapt_fast.continual.trainer",
    "handle": "sapt_fast.patching",
    "load_official": "sapt_fast.released",
    "load_pretrained": "sapt_fast.loading",
    "patch": "sapt_fast.patching",
    "unpatch": "sapt_fast.patching",
}
__all__ = [
    "CodaConfig",
    "DualPromptConfig",
    "GatedConfig",
    "L2PConfig",
    "Reflection",
    "Replay",
    "SaptCallback",
    "SaptConfig",
    "SaptTrainer",
    "__version__",
    "handle",
    "load_official",
    "load_pretrained",
    "patch",
    "unpatch",
]

if TYPE_CHECKING:
    from sapt_fast.continual.callback import SaptCallback
    from sapt_fast.continual.reflection import Reflection, Replay
    from sapt_fast.continual.trainer import SaptTrainer
    from sapt_fast.loading import load_pretrained
    from sapt_fast.methods.coda import CodaConfig
    from sapt_fast.methods.dualprompt import DualPromptConfig
    from sapt_fast.methods.gated import GatedConfig
    from sapt_fast.methods.l2p import L2PConfig
    from sapt_fast.methods.sapt import SaptConfig
    from sapt_fast.patching import handle, patch, unpatch
    from sapt_fast.released import load_official


def __getattr__(name: str) -> Any:
    """Imports exports on first use, so that `import sapt_fast` alone is fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
