"""What a model's own low layers make of a prompt: vectors to look prompts up by."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sapt_fast.ops._common import without_autocast
from sapt_fast.pools.own import Own
from sapt_fast.sites.linear import Mixed, base_kind

__all__ = ["HiddenMean", "PrincipalComponents", "bare"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


class HiddenMean:
    """The mean of a prompt's hidden states at the input of a low block, as a function of tokens.

        f(x) = 1 / |Q| sum_{t in Q} h_t,  Q the tokens of the question (all, without a pattern)

    Only the embeddings and the blocks below run. They run as those of the base model: what methods
    have added (adapters, edits, prompts, hooks) takes no part, and dropout is off. So the vectors
    do not move while a method trains, and the function may be called inside a forward of the model.

    Args:
        model: a transformers model with a list of blocks, patched or not. Of an encoder-decoder
            model the encoder runs.
        layer: how many blocks run, 1 to all of them. 2: the input of the third block.
        tokenizer: the model's, which finds the question; needed with `pattern` only.
        pattern: a regular expression whose first group is the question in the decoded prompt
            (special tokens included), for example in a chat template. A prompt that does not match
            counts whole. None: every prompt counts whole.

    Raises:
        ValueError: if the model has no list of blocks, or not so many.
        ValueError: if there is a pattern without tokenizer, or it is no regular expression.

    Example:
        >>> import torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.sites.features import HiddenMean, PrincipalComponents
        >>> mean = HiddenMean(load_backbone(), layer=2)
        >>> vectors = mean([torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([4])])
        >>> components = PrincipalComponents.fit(vectors, 2)
        >>> components(vectors).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, model: Any, layer: int = 2, tokenizer: Any = None, pattern: str | None = None
    ) -> None:
        blocks = _blocks_of(_backbone_of(model))
        if type(layer) is not int or not 1 <= layer <= len(blocks):
            raise ValueError(f"layer: got {layer!r}, expected 1 to {len(blocks)}, blocks to run")
        if pattern is not None and tokenizer is None:
            raise ValueError("tokenizer: got None with a pattern, expected the model's tokenizer")
        try:
            self._pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern: got {pattern!r}: {error}") from None
        self.model = model
        self.layer = layer
        self.tokenizer = tokenizer
        self.pattern = pattern

    @torch.no_grad()
    def __call__(self, texts: Sequence[Tensor]) -> Tensor:
        """Returns [B, D] float32 on the model's device, for the tokens [T_b] int64 of each prompt.

        The row of a prompt without tokens is NaN. Under autocast the blocks compute in its dtype:
        the vectors differ a little from those without it.
        """
        device = self.model.device
        texts = [text.to(device) for text in texts]
        if not any(len(text) for text in texts):
            return torch.full((len(texts), self.width), float("nan"), device=device)
        ids = pad_sequence([*texts], batch_first=True)
        place = torch.arange(ids.shape[1], device=device)[None]
        lengths = torch.tensor([len(text) for text in texts], device=device)[:, None]
        mask = (place < lengths).long()
        hidden = _low_states(_backbone_of(self.model), self.layer, ids, mask)
        spans = [self.question(text) for text in texts]
        first, end = torch.tensor(spans, device=device)[..., None].unbind(1)  # [B, 1]
        inside = (place >= first) & (place < end)  # [B, T]
        kept = torch.where(inside[..., None], hidden.float(), 0.0)
        return kept.sum(1) / inside.sum(1, keepdim=True)

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.get_text_config().hidden_size)

    def question(self, tokens: Tensor) -> tuple[int, int]:
        """Returns the first token of the question in tokens [T], and the one behind its last."""
        whole = 0, len(tokens)
        if self._pattern is None:
            return whole
        ids = tokens.tolist()
        found = self._pattern.search(self._text(ids))
        if found is None or found.start(1) == found.end(1):
            return whole
        first = self._tokens_within(ids, found.start(1) + 1) - 1
        return first, self._tokens_within(ids, found.end(1))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _tokens_within(self, ids: list[int], characters: int) -> int:
        """Returns how many of the first tokens it takes for so many characters, by bisection."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._text(ids[:middle])) >= characters:
                high = middle
            else:
                low = middle + 1
        return low


class PrincipalComponents(NamedTuple):
    """Centres vectors and keeps their directions of largest variance, which are not rescaled.

        p(f) = (f - m) V^T

    Whitened vectors would follow the rare words of a prompt.

    Attributes:
        mean: m, [D] float32.
        components: V, [C, D] float32, orthonormal rows, that of the largest variance first.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, count: int) -> PrincipalComponents:
        """Returns those of vectors [N, D].

        Args:
            vectors: of many different prompts; best others than those that are looked up later.
            count: C, at most D and N - 1.

        Raises:
            ValueError: if a vector is not finite.
            ValueError: if there are too few vectors, or too few that differ.
        """
        number, width = vectors.shape
        if type(count) is not int or count < 1:
            raise ValueError(f"components: got {count!r}, expected at least 1")
        if count > min(width, number - 1):
            raise ValueError(
                f"components: got {count} for {number} vectors of width {width}, expected at most "
                f"{max(0, min(width, number - 1))}"
            )
        wrong = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(f"vectors: got NaN or infinity in vector {wrong[0]}, expected finite")
        wide = vectors.double()
        mean = wide.mean(0)
        _, sizes, rows = torch.linalg.svd(wide - mean, full_matrices=False)
        if sizes[count - 1] <= 1e-6 * sizes[0]:
            raise ValueError(
                f"vectors: got {int((sizes > 1e-6 * sizes[0]).sum())} directions in which they "
                f"differ, expected at least {count}; give more different prompts"
            )
        rows = rows[:count]
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        return cls(mean.float(), (rows * largest.sign()).float())  # an SVD's signs are arbitrary

    def __call__(self, vectors: Tensor) -> Tensor:
        """Returns [..., C] float32 of vectors [..., D]."""
        mean, components = (t.to(vectors.device) for t in self)
        with without_autocast(vectors.device):  # else keys that are near would be rounded to one
            return (vectors.float() - mean) @ components.T


def _backbone_of(model: Any) -> Any:
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model.base_model


def _blocks_of(backbone: nn.Module) -> nn.ModuleList:
    """Returns the outermost list of blocks; raises ValueError if there is none."""
    for _, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return module
    raise ValueError(f"model: got {type(backbone).__name__} without a list of blocks")


def _low_states(backbone: Any, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Runs the embeddings and the first blocks: [B, T, D] of ids and mask [B, T].

    The modules that run are shallow copies, made for this call, which share all tensors: other
    threads may run the model meanwhile, and it may be moved or patched between calls.
    """
    blocks = _blocks_of(backbone)
    kept = nn.ModuleList([bare(block) for block in [*blocks][:layer]])
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    kept[-1].register_forward_hook(keep)
    bare(backbone, blocks, kept)(input_ids=ids, attention_mask=mask)
    return found[0]


def bare(module: Any, old: Any = None, new: Any = None) -> Any:
    """Returns a copy with the same tensors, without hooks, dropout and what methods have added.

    Args:
        module: the module.
        old, new: what stands in the copy where the module has `old`.
    """
    if module is old:
        return new
    if hasattr(module, "get_base_layer"):  # PEFT's
        module = module.get_base_layer()
    state = dict(vars(module))
    if "_hf_hook" in state:
        raise ValueError(
            f"model: got a {type(module).__name__} that accelerate has dispatched or offloaded, "
            "expected a model on one device"
        )
    for name in ("forward", "_compiled_call_impl"):
        state.pop(name, None)  # of an instance: stand-ins of this library, compiled forwards
    for name in (*_HOOKS, *_HOOK_FLAGS):
        state[name] = OrderedDict()
    children = module._modules.items()
    state["_modules"] = {
        name: None if child is None else bare(child, old, new)
        for name, child in children
        if not isinstance(child, Own)
    }
    given: nn.Module = module
    kind = base_kind(given) if isinstance(module, Mixed) else type(given)
    copied: Any = object.__new__(kind)
    vars(copied).update(state, training=False)
    return copied
