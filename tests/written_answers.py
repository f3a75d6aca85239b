"""A tokenizer of characters, and skeletons that untrained models are made to write."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

# 94 characters and the three special tokens of the tiny models.
CHARACTERS = "".join(map(chr, range(32, 127))).replace("~", "").replace("^", "\n")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2}
    vocabulary |= {c: 3 + i for i, c in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", bos_token="<s>", chat_template=template
    )


class Written(LogitsProcessor):
    """Makes a model write a text, then end.

    Args:
        text: after the opening "1.".
    """

    def __init__(self, text: str) -> None:
        self.tokens = [3 + CHARACTERS.index(c) for c in text] + [1]
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[self.step]] = 0
        self.step += 1
        return forced
