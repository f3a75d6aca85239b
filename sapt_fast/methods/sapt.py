"""SAPT: shared attention over learned keys chooses each input's mixture of adapters.

Zhao et al., "SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of
Large Language Models", ACL 2024.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident, ResidentLinear, ResidentNorm, is_offloaded
from sapt_fast.ops._common import without_autocast
from sapt_fast.ops.route import (
    POOLINGS,
    QueryProjection,
    pool_embeds,
    pool_tokens,
    route,
    route_scores,
)
from sapt_fast.pools.lora import RowStack
from sapt_fast.pools.sharding import is_partitioned


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_COUNT


def _number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # neither NaN nor an integer beyond floats


def _names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    listed = isinstance(names, (list, tuple)) and len(names) > 0
    return value is None or (listed and all(isinstance(name, str) and name for name in names))


def _loss_weight(value: Any) -> bool:
    return _number(value) and 0 <= value <= _MOST


_MOST = 2**31 - 1  # far larger numbers would overflow in float16 or float32 without an error
_INITS, _KEY_INITS = ("linear", "normal"), ("uniform", "mean_query")
_ADAPTERS = ("lora", "prompt")
_FLAG = (lambda v: isinstance(v, bool), "True or False")
_MOST_COUNT = 2**16  # memory is reserved by these
_COUNT = (_count, f"an integer, at least 1 and at most {_MOST_COUNT}")
_WEIGHT = (lambda v: _number(v) and v >= 0, "a number, at least 0")
# What each field may be, and the words for it.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": _COUNT,
    "lora_alpha": (lambda v: _number(v) and 0 < v <= _MOST, f"a positive number, at most {_MOST}"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "[0, 1)"),
    "target_modules": (_names, "names, one regular expression, or None"),
    "modules_to_save": (_names, "names, or None"),
    "modules_per_task": _FLAG,
    "adapter": (lambda v: v in _ADAPTERS, f"one of {_ADAPTERS}"),
    "prompt_length": _COUNT,
    "query_hidden_dim": _COUNT,
    "query_init": (lambda v: v in _INITS, f"one of {_INITS}"),
    "temperature": (
        lambda v: v is None or (_number(v) and 1e-6 <= v <= _MOST),
        f"a number from 1e-6 to {_MOST}, or None",
    ),
    "pooling": (lambda v: v in POOLINGS, f"one of {POOLINGS}"),
    "standardize_query": _FLAG,
    "key_init": (lambda v: v in _KEY_INITS, f"one of {_KEY_INITS}"),
    "own_key_loss": (_loss_weight, f"{_WEIGHT[1]} and at most {_MOST}"),
    "kl_ratio": (_loss_weight, f"{_WEIGHT[1]} and at most {_MOST}"),
    "mask_padding": _FLAG,
    "grad_through_frozen": _FLAG,
    "autocast_adapter_dtype": _FLAG,
    "top_k": (lambda v: v is None or _count(v), "an integer, at least 1, or None"),
    "threshold": (lambda v: v is None or (_number(v) and 0 <= v <= 1), "[0, 1] or None"),
    "reserve_tasks": _COUNT,
}


@dataclass
class SaptConfig:
    """How a model's adapters are shaped, placed and routed.

    The defaults are those that work across backbones; `official` gives the released settings.

    Example:
        >>> from sapt_fast import SaptConfig
        >>> SaptConfig(r=4, target_modules=["q_proj", "v_proj"]).pooling
        'mean'
        >>> SaptConfig(r=0)
        Traceback (most recent call last):
        ValueError: r: got 0, expected an integer, at least 1 and at most 65536
    """

    r: int = field(default=8, metadata={"help": "Rank of each new adapter."})
    lora_alpha: float = field(default=32, metadata={"help": "Scaling is lora_alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapters' input while training."}
    )
    target_modules: Sequence[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (last parts of the path) of the linear layers to adapt, one regular "
            "expression for the whole path, or 'all-linear' for all but the output head; None "
            "takes query and value as PEFT does."
        },
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Names (last parts of the path) of modules that train in full and are saved "
            "with the adapters, such as a classification head; None for no such module."
        },
    )
    modules_per_task: bool = field(
        default=False,
        metadata={
            "help": "Give each task its own copy of modules_to_save and mix the copies' outputs as "
            "the adapters are mixed; otherwise all tasks train one."
        },
    )
    adapter: str = field(
        default="lora",
        metadata={
            "help": "Kind of adapter: 'lora', matrices beside linear layers, or 'prompt', rows "
            "before the input embeddings, for which r, lora_alpha, grad_through_frozen and "
            "target_modules mean nothing."
        },
    )
    prompt_length: int = field(
        default=10, metadata={"help": "Rows of each prompt, with adapter='prompt'."}
    )
    query_hidden_dim: int = field(
        default=100, metadata={"help": "Bottleneck of the query projection."}
    )
    query_init: str = field(
        default="linear",
        metadata={"help": "'linear' (nn.Linear's default) or 'normal' (initializer_range)."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divisor of the attention scores; None for sqrt(d)."}
    )
    pooling: str = field(
        default="mean", metadata={"help": "'mean' or 'max' of the embeddings over the tokens."}
    )
    standardize_query: bool = field(
        default=False,
        metadata={
            "help": "Subtract from the pooled embedding the mean, and divide by the deviation, "
            "that random token sequences have: what all inputs share then no longer hides what "
            "tells them apart."
        },
    )
    key_init: str = field(
        default="uniform",
        metadata={"help": "'uniform' in (-1, 1), or 'mean_query' of the task's first inputs."},
    )
    own_key_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of -log(weight of the task's own adapter), added in training."},
    )
    kl_ratio: float = field(default=0.5, metadata={"help": "Weight of the reflection loss."})
    mask_padding: bool = field(default=True, metadata={"help": "Leave padding out of the pooling."})
    grad_through_frozen: bool = field(
        default=True,
        metadata={"help": "Let inputs receive gradient through earlier tasks' adapters."},
    )
    autocast_adapter_dtype: bool = field(
        default=False,
        metadata={
            "help": "Keep adapters, keys and router in float32 where the model's weights are "
            "float16 or bfloat16, as PEFT does by the option of this name; else they have the "
            "weights' dtype."
        },
    )
    top_k: int | None = field(default=None, metadata={"help": "Keep the k largest weights only."})
    threshold: float | None = field(
        default=None, metadata={"help": "Weights below this become zero."}
    )
    reserve_tasks: int = field(
        default=16, metadata={"help": "Tasks to make room for; beyond it the pool doubles."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range; names become a list, as JSON has them."""
        for name, (fits, expected) in _FIELDS.items():
            value = getattr(self, name)
            _require(fits(value), name, value, expected)
        sparse = self.top_k is not None or self.threshold is not None
        _require(
            not (self.own_key_loss and sparse), "own_key_loss", self.own_key_loss,
            "0 with top_k or threshold, which may drop the own adapter and its gradient",
        )  # fmt: skip
        if self.adapter == "prompt":
            for name, without in (("target_modules", None), ("lora_dropout", 0)):
                value = getattr(self, name)
                _require(value == without, name, value, f"{without} with adapter='prompt'")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
        if self.modules_to_save is not None:
            named = self.modules_to_save
            self.modules_to_save = [named] if isinstance(named, str) else list(named)
        _require(
            not self.modules_per_task or self.modules_to_save is not None,
            "modules_per_task", True, "False without modules_to_save",
        )  # fmt: skip

    @classmethod
    def official(cls, model: str, benchmark: str) -> "SaptConfig":
        """The released settings, quirks included: padding is pooled, no gradient reaches inputs
        through earlier adapters, plain max-pooling.

        Args:
            model: "t5" or "llama".
            benchmark: "superni" or "long_sequence".

        Raises:
            ValueError: there are no such settings.

        Example:
            >>> from sapt_fast import SaptConfig
            >>> config = SaptConfig.official("t5", "superni")
            >>> config.r, config.pooling, config.mask_padding, config.grad_through_frozen
            (4, 'max', False, False)
        """
        if (model, benchmark) not in _OFFICIAL:
            raise ValueError(
                f"official: got ({model!r}, {benchmark!r}), expected one of {sorted(_OFFICIAL)}"
            )
        r, alpha, kl_ratio = _OFFICIAL[model, benchmark]
        return cls(
            r=r,
            lora_alpha=alpha,
            kl_ratio=kl_ratio,
            query_init="normal" if model == "llama" else "linear",
            pooling="max",
            mask_padding=False,
            grad_through_frozen=False,
        )

    def adapter_dtype(self, base: torch.dtype) -> torch.dtype:
        """The dtype of adapters, keys and router on weights of the floating-point dtype `base`."""
        return torch.promote_types(base, torch.float32) if self.autocast_adapter_dtype else base

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` gives the config back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SaptConfig":
        """Raises ValueError on an unknown field."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, "SaptConfig", f"unknown fields {unknown}", f"among {sorted(known)}")
        return cls(**values)


_OFFICIAL = {
    ("t5", "superni"): (4, 32, 0.5),
    ("t5", "long_sequence"): (8, 32, 0.1),
    ("llama", "superni"): (4, 32, 1.0),
    ("llama", "long_sequence"): (4, 32, 2.0),
}


class SaptRouter(Resident):
    """The query projection, shared by all tasks, and one key per task.

    Args:
        width: D, the width of the input embeddings.
        config: pooling, projection and keys.
        initializer_range: deviation of `query_init="normal"`.
    """

    query_mean: Tensor
    query_std: Tensor

    def __init__(
        self,
        width: int,
        config: SaptConfig,
        *,
        initializer_range: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        hidden = config.query_hidden_dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.down = ResidentLinear(width, hidden, bias=False, **place)
        self.up = ResidentLinear(hidden, width, bias=False, **place)
        self.norm = ResidentNorm(width, **place)
        device = self.norm.weight.device
        self.keys = RowStack(width, config.reserve_tasks, device=device, dtype=dtype)
        if config.query_init == "normal":
            nn.init.normal_(self.down.weight, std=initializer_range)
            nn.init.normal_(self.up.weight, std=initializer_range)
        if config.standardize_query:
            self.register_buffer("query_mean", torch.zeros(width, **place))
            self.register_buffer("query_std", torch.ones(width, **place))

    def add_key(self, key: Tensor | None = None) -> None:
        """A new trainable key, `key` [D] or uniform in (-1, 1); earlier keys freeze.

        Raises:
            ValueError: key has another shape; nothing has changed.
        """
        width = self.keys.width
        if key is not None and tuple(key.shape) != (width,):
            raise ValueError(f"key: got shape {tuple(key.shape)}, expected [{width}]")
        self.keys.append(1, lambda rows: rows.uniform_(-1, 1) if key is None else rows.copy_(key))

    def pool(
        self,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The pooled input embeddings [B, D] of token ids or of given embeddings."""
        pooling = self.config.pooling
        device = self.norm.weight.device  # hooks may move the model's inputs there only later
        input_ids, inputs_embeds, mask = (
            t if t is None or t.device == device else t.to(device)
            for t in (input_ids, inputs_embeds, mask)
        )
        if inputs_embeds is not None:
            pooled = pool_embeds(inputs_embeds, mask=mask, pooling=pooling)
        elif input_ids is None:
            raise ValueError("input_ids: got None and no inputs_embeds, expected one of them")
        elif isinstance(embedding, nn.Embedding) and only_looks_up(embedding):
            pooled = pool_tokens(input_ids, embedding.weight, mask=mask, pooling=pooling)
        else:
            pooled = pool_embeds(embedding(input_ids), mask=mask, pooling=pooling)
        if self.config.standardize_query:
            pooled = (pooled - self.query_mean) / self.query_std
        return pooled

    def scores(self, pooled: Tensor) -> Tensor:
        """Attention scores [B, K] of pooled embeddings; the projection and the newest key train."""
        with without_autocast(pooled.device):
            return route_scores(
                pooled, self._all_keys(), self.projection, temperature=self.config.temperature
            )

    def weights(self, pooled: Tensor) -> Tensor:
        """The mixture [B, K] of pooled embeddings."""
        config = self.config
        with without_autocast(pooled.device):
            return route(
                pooled,
                self._all_keys(),
                self.projection,
                temperature=config.temperature,
                top_k=config.top_k,
                threshold=config.threshold,
            )

    def _all_keys(self) -> Tensor:
        frozen, newest = self.keys.frozen, self.keys.trainable
        return torch.cat([frozen, newest]) if frozen.shape[0] else newest

    @property
    def projection(self) -> QueryProjection:
        """The parameters of the query projection."""
        norm = self.norm
        return QueryProjection(self.down.weight, self.up.weight, norm.weight, norm.bias, norm.eps)

    @torch.no_grad()
    def standardize(self, embedding: nn.Module, vocabulary: int) -> None:
        """Sets the statistics of `standardize_query` from pooled random token sequences.

        Their lengths run from 4 to 256, since a maximum grows with the length it is taken over.
        """
        generator = torch.Generator().manual_seed(0)
        count, longest = 256, 256
        ids = torch.randint(vocabulary, (count, longest), generator=generator)
        lengths = 2 ** (2 + 6 * torch.rand(count, 1, generator=generator))
        mask = (torch.arange(longest) < lengths).long()
        device = self.query_mean.device
        self.query_mean.zero_()
        self.query_std.fill_(1)
        # A few at a time, in case that the embedding has to be called.
        parts = zip(ids.to(device).split(32), mask.to(device).split(32), strict=True)
        pooled = torch.cat([self.pool(embedding, few, None, m) for few, m in parts])
        self.query_mean.copy_(pooled.mean(0))
        self.query_std.copy_(pooled.std(0).clamp(min=1e-6))


def only_looks_up(embedding: nn.Embedding) -> bool:
    """Whether its output is its table's rows, which are there without a call.

    They are not with ZeRO-3, nor where accelerate offloads them. FSDP2's subclass adds nothing but
    sharding.
    """
    if is_offloaded(embedding):
        return False
    own = [kind for kind in type(embedding).__mro__ if "forward" in vars(kind)]
    return own[0] is nn.Embedding and not any(map(is_partitioned, embedding.parameters()))


def _require(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")
