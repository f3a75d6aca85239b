"""Tiny models with a pool of prompts, and the one-sample oracle: the bare model, given a mixture of
prompts and the embeddings by hand."""

import torch
from tiny_models import WIDTH, tiny
from torch import Tensor
from transformers import PreTrainedModel

import sapt_fast

LENGTH = 5
ENCODER_DECODER = ("t5", "t5_narrow", "bart")


def prompt_settings(**changed) -> sapt_fast.SaptConfig:
    """A config whose weights differ much from sample to sample."""
    options = {"adapter": "prompt", "prompt_length": LENGTH, "temperature": 1.0, **changed}
    return sapt_fast.SaptConfig(**options)


@torch.no_grad()
def bare(family: str, seed: int = 0, **config) -> PreTrainedModel:
    """A `tiny` whose layers weigh enough for what they attend to to decide what comes out."""
    model = tiny(family, seed, **config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        inputs = parameter.shape[0 if family == "gpt2" else -1]
        if parameter.dim() == 2 and ("layer" in name or ".h." in name) and "bias" not in name:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 1.5 / inputs**0.5)
    return model


def prompted(
    family: str | PreTrainedModel, tasks: int = 3, seed: int = 0, **changed
) -> PreTrainedModel:
    """A patched `bare` (or the given model) whose prompts change much."""
    model = bare(family, seed) if isinstance(family, str) else family
    torch.manual_seed(seed)
    sapt_fast.patch(model, prompt_settings(**changed))
    for k in range(tasks):
        model.sapt.add_task(f"task{k}")
    with torch.no_grad():
        rows = model.sapt.prompts.rows.rows()
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(7)))
    return model


class PromptOracle:
    """What one sample alone must give.

    Args:
        model: patched. base: an unpatched model of the same weights.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel) -> None:
        self.base = base
        self.encodes = base.config.is_encoder_decoder
        rows = model.sapt.prompts.rows.rows().detach().clone()
        self.prompts = rows.view(-1, LENGTH, WIDTH)

    def embeds(self, text: Tensor, weights: Tensor, prompts: Tensor | None = None) -> Tensor:
        """[1, P + T, D], the mixed prompt and the embeddings of a text [1, T]."""
        prompts = self.prompts if prompts is None else prompts
        mixed = torch.einsum("k,kpd->pd", weights, prompts)
        return torch.cat([mixed[None], self.base.get_input_embeddings()(text)], 1)

    def logits(
        self, text: Tensor, weights: Tensor, decoder_ids: Tensor | None = None, prompts=None
    ) -> Tensor:
        """[T, V] of the text's own positions, or of the decoder's."""
        embeds = self.embeds(text, weights, prompts)
        if self.encodes:
            return self.base(inputs_embeds=embeds, decoder_input_ids=decoder_ids).logits[0]
        return self.base(inputs_embeds=embeds).logits[0, LENGTH:]

    def generate(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        """[returned, new tokens] (an encoder-decoder's with the start token)."""
        embeds = self.embeds(text, weights)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.base.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def prompt_oracle(model: PreTrainedModel, family: str, seed: int = 0) -> PromptOracle:
    """The oracle of `prompted(family, seed=seed)`."""
    return PromptOracle(model, bare(family, seed))
