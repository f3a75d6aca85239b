"""Methods of continual learning, one small file each, behind the interface of `base.Strategy`.

A strategy decides which adapter a task trains, which terms its loss adds, and which adapters are
used for prediction. Model, trainer, pool and loop are the same for all. To add one, subclass
`Strategy` and add it to `STRATEGIES`.
"""

from sapt_fast.continual import registry
from sapt_fast.continual.strategies.base import Strategy
from sapt_fast.continual.strategies.epi import Epi
from sapt_fast.continual.strategies.ewc import Ewc
from sapt_fast.continual.strategies.experts import LdaExperts
from sapt_fast.continual.strategies.gainlora import GainLora
from sapt_fast.continual.strategies.generative_replay import GenerativeReplay
from sapt_fast.continual.strategies.heads import (
    FineTunedHead,
    FrozenLda,
    FrozenNcm,
    FrozenRidge,
)
from sapt_fast.continual.strategies.inflora import InfLora
from sapt_fast.continual.strategies.l2p import L2p
from sapt_fast.continual.strategies.lfpt5 import Lfpt5
from sapt_fast.continual.strategies.lwf import Lwf
from sapt_fast.continual.strategies.olora import OLora
from sapt_fast.continual.strategies.prefixes import Coda, DualPrompt
from sapt_fast.continual.strategies.progprompt import ProgPrompt
from sapt_fast.continual.strategies.replay import Replay
from sapt_fast.continual.strategies.sapt import Sapt
from sapt_fast.continual.strategies.sapt_prompt import SaptPrompt
from sapt_fast.continual.strategies.sd_lora import SdLora
from sapt_fast.continual.strategies.shared import Joint, SeqLora, Single

__all__ = ["STRATEGIES", "Strategy"]

STRATEGIES: dict[str, type[Strategy]] = registry.STRATEGIES
STRATEGIES.update(
    {
        "sapt": Sapt,
        "sapt_prompt": SaptPrompt,
        "seqlora": SeqLora,
        "joint": Joint,
        "replay": Replay,
        "generative_replay": GenerativeReplay,
        "ewc": Ewc,
        "lwf": Lwf,
        "olora": OLora,
        "inflora": InfLora,
        "gainlora": GainLora,
        "sd_lora": SdLora,
        "epi": Epi,
        "lfpt5": Lfpt5,
        "l2p": L2p,
        "progprompt": ProgPrompt,
        "dualprompt": DualPrompt,
        "coda": Coda,
        "head": FineTunedHead,
        "ncm": FrozenNcm,
        "lda": FrozenLda,
        "ridge": FrozenRidge,
        "lda_experts": LdaExperts,
        "single": Single,
    }
)
