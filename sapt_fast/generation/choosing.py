"""Chooses the next token of each text, each with its own random numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sapt_fast.generation.settings import SkeletonSettings

# Settings that would change tokens, with the values that do not.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


class Chooser:
    """Greedy search or sampling, as a model's generation config and the settings have it.

    Args:
        config: the model's generation config.
        settings: those of the call, which override it.
        processors: further logits processors, called with the tokens of one text [1, T].

    Attributes:
        ends: the tokens that end a text.
        min_tokens: tokens before which none of them is chosen.
        seed: of the random numbers.
    """

    def __init__(
        self,
        config: GenerationConfig,
        settings: SkeletonSettings,
        processors: Sequence[Any],
        min_tokens: int,
        seed: int,
    ) -> None:
        end = config.eos_token_id
        self.ends = frozenset([end] if isinstance(end, int) else end or ())
        self.min_tokens = min_tokens
        self.seed = seed
        self._samples = settings.do_sample
        self._of_text = LogitsProcessorList(_of_text(config))
        self._of_text.extend(processors)
        self._warpers = LogitsProcessorList(_warpers(config, settings) if self._samples else ())

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """Returns the random numbers of a text; None for greedy search.

        Args:
            index: of the text: the same for a point whatever it is decoded with.
            device: of the logits.
        """
        if not self._samples:
            return None
        return torch.Generator(device).manual_seed((self.seed * 1_000_003 + index) % 2**63)

    def choose(
        self,
        logits: Tensor,
        texts: Sequence[Callable[[], list[int]]],
        written: Sequence[int],
        generators: Sequence[torch.Generator | None],
    ) -> list[int]:
        """Returns the next token of each text.

        Args:
            logits: [n, V].
            texts: return the tokens of each, its prompt included.
            written: how many of them are new.
            generators: as `generator` returns them.
        """
        scores = logits
        if self._of_text:
            rows = []
            for row, text in enumerate(texts):
                ids: Any = torch.tensor([text()], device=logits.device)
                rows.append(self._of_text(ids, logits[row : row + 1].float()))
            scores = torch.cat(rows)
        early = [row for row, count in enumerate(written) if count < self.min_tokens]
        if early and self.ends:
            scores = scores.clone()
            scores[torch.tensor(early)[:, None], torch.tensor(sorted(self.ends))] = -torch.inf
        if not self._samples:
            tokens: list[int] = scores.argmax(-1).tolist()
            return tokens
        unread: Any = torch.empty(0, dtype=torch.long)
        warped = self._warpers(unread, scores.float())
        chances = warped.softmax(-1)
        return [
            int(torch.multinomial(chances[row], 1, generator=generator))
            for row, generator in enumerate(generators)
        ]


def not_applied(config: GenerationConfig) -> list[str]:
    """Returns the settings of a generation config that `Chooser` does not know, if they are set."""
    return [
        name for name, neutral in _UNKNOWN.items() if getattr(config, name, None) not in neutral
    ]


def _of_text(config: GenerationConfig) -> list[Any]:
    """The processors that look at a text, in the order in which `generate` applies them."""
    found: list[Any] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_id))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    return found


def _warpers(config: GenerationConfig, settings: SkeletonSettings) -> list[Any]:
    """The processors of sampling, in the order in which `generate` applies them."""

    def given(name: str) -> Any:
        own = getattr(settings, name, None)
        return getattr(config, name, None) if own is None else own

    found: list[Any] = []
    if given("temperature") not in (None, 1.0):
        found.append(TemperatureLogitsWarper(float(given("temperature"))))
    if given("top_k"):
        found.append(TopKLogitsWarper(given("top_k")))
    if given("top_p") is not None and given("top_p") < 1.0:
        found.append(TopPLogitsWarper(given("top_p")))
    if given("min_p") is not None:
        found.append(MinPLogitsWarper(given("min_p")))
    return found
