"""Keys by a sentence encoder, for which paraphrases are near and other entities far."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["SentenceKeys"]


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
