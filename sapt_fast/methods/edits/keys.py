"""What prompts are looked up by, for `look_up_by`: functions for which paraphrases are near."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.sites.features import HiddenMean, PrincipalComponents
from sapt_fast.storage.tensors import read_tensors, require_finite, write_tensors

__all__ = ["HiddenKeys", "SentenceKeys", "features_of"]


class SentenceKeys:
    """Looks up prompts by what a sentence encoder makes of their text.

    A language model's hidden states follow the words of a prompt more than what it asks for, so
    that paraphrases of an edited prompt are far from its key. A sentence encoder is trained on
    paraphrases. Pass this object to `model.grace.look_up_by`.

    Args:
        encoder: a transformers encoder, whose last hidden states are averaged over the text.
        encoder_tokenizer: the encoder's tokenizer.
        tokenizer: the edited model's tokenizer, which decodes prompts.
        pattern: a regular expression whose first group is the part of the decoded prompt (special
            tokens included) to encode, for example the question in a chat template. None: all of
            it, without special tokens. A prompt that does not match is encoded whole.

    Example:
        >>> from sapt_fast.methods.edits.keys import SentenceKeys
        >>> keys = SentenceKeys(encoder, encoder_tokenizer, tokenizer)  # doctest: +SKIP
        >>> model.grace.look_up_by(keys)  # doctest: +SKIP
    """

    def __init__(
        self, encoder: Any, encoder_tokenizer: Any, tokenizer: Any, pattern: str | None = None
    ) -> None:
        self.encoder = encoder.eval()
        self.encoder_tokenizer = encoder_tokenizer
        self.tokenizer = tokenizer
        self.pattern = None if pattern is None else re.compile(pattern, re.DOTALL)

    @torch.no_grad()
    def __call__(self, texts: list[Tensor]) -> Tensor:
        """Returns [B, D] float32 of length 1, for the tokens [T_b] of each prompt."""
        questions = [self._question(text.tolist()) for text in texts]
        inputs = self.encoder_tokenizer(
            questions, padding=True, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        hidden = self.encoder(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    def _question(self, tokens: list[int]) -> str:
        whole = self.tokenizer.decode(tokens, skip_special_tokens=self.pattern is None)
        found = None if self.pattern is None else self.pattern.search(whole)
        return str(whole if found is None else found.group(1))


class HiddenKeys:
    """Looks up prompts by the model's own low layers, without an encoder.

        k(x) = normalize((f(x) - m) V^T)

    f(x) is the mean of the question's hidden states at the input of a low block (`HiddenMean`). m
    and V are the mean and the first principal components of other prompts' f; they are not
    whitened. Among edits, a paraphrase's nearest key is its own more often than at higher layers.
    Another question about the same entity may still be nearer than the paraphrase: `ProjectedKeys`
    over `keys.features` tells them apart.

    Computing a key runs the embeddings and `layer` blocks of the base model, once per prompt.
    `keys.features(texts)` [B, D] and `keys.components` are the parts, for other uses than editing.

    Args:
        model, layer, tokenizer, pattern: as in `sapt_fast.sites.features.HiddenMean`.
        normalize: whether keys have the length 1, so that a radius is at most 2.

    Attributes:
        features: the `HiddenMean`.
        components: the `PrincipalComponents`; None before `fit`.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.edits.keys import HiddenKeys
        >>> from sapt_fast.methods.grace import GraceConfig
        >>> model = sapt_fast.patch(load_backbone(), GraceConfig(keys="function", radius=0.2))
        >>> keys = HiddenKeys(model).fit([[5, 6, 7], [8, 9], [4, 11, 12], [13]], components=3)
        >>> model.grace.look_up_by(keys)
        >>> edit = model.grace.edit([5, 6, 7], [9, 1])
    """

    def __init__(
        self,
        model: Any,
        layer: int = 2,
        tokenizer: Any = None,
        pattern: str | None = None,
        normalize: bool = True,
    ) -> None:
        self.features = HiddenMean(model, layer, tokenizer, pattern)
        self.normalize = normalize
        self.components: PrincipalComponents | None = None

    def fit(self, prompts: Sequence[Any], components: int = 64) -> HiddenKeys:
        """Computes mean and components, and returns itself.

        Args:
            prompts: tokens of many different prompts, other than those that are looked up later.
                Fit before the first edit: another fit makes other keys.
            components: C, the width of keys.

        Raises:
            ValueError: if there are not more different prompts than components.
            ValueError: if the hidden states of a prompt are not finite.
        """
        vectors = features_of(self.features, prompts)
        self.components = PrincipalComponents.fit(vectors, components)
        return self

    def __call__(self, texts: list[Tensor]) -> Tensor:
        """Returns [B, C] float32, for the tokens [T_b] of each prompt.

        Raises:
            RuntimeError: before `fit`.
        """
        if self.components is None:
            raise RuntimeError("HiddenKeys: mean and components are unknown; call fit(prompts)")
        keys = self.components(self.features(texts))
        return torch.nn.functional.normalize(keys, dim=1) if self.normalize else keys

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes mean and components to a safetensors file; errors as in `__call__`."""
        if self.components is None:
            raise RuntimeError("HiddenKeys: mean and components are unknown; call fit(prompts)")
        write_tensors(Path(path), self.components._asdict(), self._settings())

    def load(self, path: str | os.PathLike[str]) -> HiddenKeys:
        """Reads what `save` wrote, and returns itself.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or was saved with other settings or for another width.
        """
        tensors, settings = read_tensors(Path(path))
        settings = {name: settings.get(name, "none") for name in self._settings()}
        if settings != self._settings():
            raise ValueError(f"{path}: got {settings}, expected {self._settings()}")
        require_finite(path, tensors)
        width = self.features.width
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count = shapes.get("components", (0,))[0]
        expected = {"mean": (width,), "components": (count, width)}
        if shapes != expected:
            raise ValueError(f"{path}: got shapes {shapes}, expected {expected}")
        self.components = PrincipalComponents(tensors["mean"], tensors["components"])
        return self

    def _settings(self) -> dict[str, str]:
        features = self.features
        return {
            "keys": "hidden",
            "layer": str(features.layer),
            "pattern": str(features.pattern),
            "normalize": str(self.normalize),
        }


@torch.no_grad()
def features_of(function: Any, prompts: Sequence[Any], batch_size: int = 32) -> Tensor:
    """Returns what a function makes of prompts, [N, D] float32.

    Args:
        function: returns one vector per prompt, [B, D], for the tokens [T_b] of each.
        prompts: tokens, as lists or tensors [T_n].
        batch_size: how many are computed together.
    """
    texts = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    if not texts:
        raise ValueError("prompts: got none, expected at least one")
    parts = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
    return torch.cat([function(part).float() for part in parts])
