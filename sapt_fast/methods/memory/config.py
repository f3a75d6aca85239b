"""The settings of a memory of experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from sapt_fast.checks import require_choice, require_count, require_number
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.task_config import require
from sapt_fast.pools.experts import STORAGES
from sapt_fast.pools.key_index import KINDS
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS
from sapt_fast.sites.memory import GATES

__all__ = ["MomeConfig"]

_KEYS = ("facts", "learned", "product")
_QUERIES = ("sequence", "token")
_THRESHOLD = 0.6


@dataclass
class MomeConfig(MethodConfig["MomeHandle"]):  # type: ignore[name-defined]
    """How many experts there are, where they act, how they are found, and how they are trained."""

    num_experts: int = field(default=65536, metadata={"help": "N, the experts of a bank."})
    r: int = field(default=1, metadata={"help": "Rank of an expert."})
    k: int = field(default=16, metadata={"help": "Experts of a fact, or found by a head."})
    heads: int = field(
        default=1, metadata={"help": "Queries of a prompt; more than 1 only with learned keys."}
    )
    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers to whose output experts are added: last parts of paths, or one regular "
            "expression. None: the MLP of the block at two thirds of the depth."
        },
    )
    shared: bool = field(
        default=False, metadata={"help": "Whether all layers use one bank, else one each."}
    )
    keys: str = field(
        default="facts",
        metadata={
            "help": "Each fact owns k experts, with its query as their key (facts); or each expert "
            "has a key that `fit_router` trains, in one table (learned) or two of halves (product)."
        },
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "How keys are found: exact, ivf or hnsw (both by faiss), or product. None: "
            "exact, or product for such keys."
        },
    )
    query: str = field(
        default="sequence",
        metadata={
            "help": "What looks up: the prompt, once (sequence); or each token from the prompt's "
            "last on, by the layer's input (token, only with learned keys)."
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "The least score of the best key (-1 to 1 for facts) at which experts act. "
            f"None: {_THRESHOLD} for facts, and no threshold for learned keys."
        },
    )
    ratio: float | None = field(
        default=None,
        metadata={
            "help": "The largest distance to the nearest fact's key as a share of that to the "
            "second, which keeps apart facts and other questions in the same words. None: any."
        },
    )
    gate: str = field(
        default="softmax",
        metadata={
            "help": "The weights of the experts found, from their scores s: softmax(s), "
            "sigmoid(s) / k or relu(s) / k."
        },
    )
    key_layer: int = field(
        default=2,
        metadata={"help": "Blocks that run to compute what a prompt is looked up by."},
    )
    components: int = field(
        default=64, metadata={"help": "Principal components of a query that `fit_router` keeps."}
    )
    whitening: float = field(
        default=0.0,
        metadata={
            "help": "Components are divided by their deviations to this power: 0 keeps them, 1 "
            "makes them alike, so that names count more than the words around them."
        },
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression whose first group is the question in the decoded prompt, "
            "for example in a chat template; needs a tokenizer. None: the whole prompt."
        },
    )
    storage: str = field(
        default="device",
        metadata={"help": "Where trained experts are: device, pinned or mapped."},
    )
    sharded: bool = field(
        default=False,
        metadata={
            "help": "Whether experts and keys are divided over the processes of "
            "torch.distributed, which then call the model and its memory together."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of experts: float32 or bfloat16."})
    scaling: float = field(default=1.0, metadata={"help": "s, by which experts are multiplied."})
    optimizer: str = field(
        default="adam", metadata={"help": f"One of {', '.join(ROW_OPTIMIZERS)}."}
    )
    learning_rate: float = field(default=0.04, metadata={"help": "The optimizer's rate."})
    slots: int | None = field(
        default=None,
        metadata={
            "help": "How many experts a step trains: those that its facts use often and the "
            "prompts of `fit_router` seldom (TF-IDF); only with learned keys. None: all."
        },
    )
    epochs: int = field(default=60, metadata={"help": "The largest number of passes over a fact."})
    seed: int = field(default=0, metadata={"help": "Of the experts' start values."})

    def __post_init__(self) -> None:
        for name in ("num_experts", "r", "k", "heads", "key_layer", "components", "epochs"):
            require_count(name, getattr(self, name))
        require_count("seed", self.seed, least=0)
        chosen = {"keys": _KEYS, "query": _QUERIES, "gate": GATES, "storage": STORAGES}
        chosen |= {"dtype": ("float32", "bfloat16"), "optimizer": tuple(ROW_OPTIMIZERS)}
        for name, choices in chosen.items():
            require_choice(name, getattr(self, name), choices)
        for name in ("scaling", "learning_rate"):
            require_number(name, getattr(self, name), positive=True)
        if self.index is not None:
            require_choice("index", self.index, tuple(KINDS))
        if self.threshold is not None:
            require_number("threshold", self.threshold, least=-math.inf)
        require_number("whitening", self.whitening, most=1.0)
        if self.ratio is not None:
            require_number("ratio", self.ratio, positive=True, most=1.0)
            require(self.keys == "facts", "ratio", self.ratio, "None with learned keys")
        most = f"at most num_experts ({self.num_experts})"
        require(self.k <= self.num_experts, "k", self.k, most)
        by_facts = self.keys == "facts"
        require(self.heads == 1 or not by_facts, "heads", self.heads, "1 with keys='facts'")
        require(self.query == "sequence" or not by_facts, "query", self.query, "sequence for facts")
        require(by_facts or not self.sharded, "sharded", self.sharded, "False with learned keys")
        if self.slots is not None:
            require_count("slots", self.slots)
            require(not by_facts, "slots", self.slots, "None with keys='facts'")
        kinds = {"facts": ("exact", "ivf", "hnsw"), "learned": ("exact",), "product": ("product",)}
        fits = kinds[self.keys]
        expected = f"one of {', '.join(fits)} with keys={self.keys!r}"
        require(self.index_kind in fits, "index", self.index, expected)
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"pattern: got {self.pattern!r}, expected a regular expression: {error}"
            ) from None
        if isinstance(self.target_modules, list):
            self.target_modules = tuple(self.target_modules)

    @property
    def method(self) -> str:
        """The name of the method."""
        return "mome"

    @property
    def index_kind(self) -> str:
        """`index`, or its default."""
        return self.index or ("product" if self.keys == "product" else "exact")

    @property
    def least_score(self) -> float | None:
        """`threshold`, or its default."""
        default = _THRESHOLD if self.keys == "facts" else None
        return default if self.threshold is None else self.threshold

    @property
    def experts_per_fact(self) -> int:
        """K, the experts of a prompt."""
        return self.heads * self.k
