"""Ways to generate with a patched model, against what each sample's own model gives."""

from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import Padded, token_ids
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from sapt_fast.methods.tasks import pool_of

NEW = 8
GREEDY = {"do_sample": False}
BEAMS = {"do_sample": False, "num_beams": 4}
FOLLOWED = ("do_sample", "num_beams", "num_return_sequences")  # options the oracle also gets
MODES = {
    "greedy": GREEDY,
    "beams": BEAMS,
    "several_returned": {**BEAMS, "num_return_sequences": 3},
    "static_cache": {**GREEDY, "cache_implementation": "static"},
    "static_cache_beams": {**BEAMS, "cache_implementation": "static"},
    "no_cache": {**GREEDY, "use_cache": False},
    "no_cache_beams": {**BEAMS, "use_cache": False},
}


class Setting:
    """A patched model, a padded batch of prompts and the weights that each of them gets.

    Args:
        family: of the model.
        model: patched.
    """

    last_fill = 0  # of the tokens that may follow an end; those up to it

    def __init__(self, family: str, model: PreTrainedModel) -> None:
        self.family = family
        self.model = model
        self.encodes = model.config.is_encoder_decoder
        self.batch = Padded(self.encodes)
        with torch.no_grad():
            route = pool_of(model).route
            self.weights = torch.cat([route(text) for text in self.batch.texts])

    def alone(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        """[returned, length], what the own model of a text [1, T] with weights [K] generates."""
        raise NotImplementedError

    def logits(self, text: Tensor, weights: Tensor, decoder_ids: Tensor | None = None) -> Tensor:
        """[T, V], what that model gives at a text's positions, or at the decoder's."""
        raise NotImplementedError

    def expected(self, row: int, **options) -> Tensor:
        """`alone` of a row of the batch."""
        options = {k: v for k, v in options.items() if k in FOLLOWED}
        text, weights = self.batch.texts[row], self.weights[row]
        return self.alone(text, weights, max_new_tokens=NEW, **options)

    def generated(self, rows: int = 3, **options) -> Tensor:
        """[rows, returned, length]"""
        ids, mask = self.batch.ids[:rows], self.batch.mask[:rows]
        inputs = {"input_ids": ids, "attention_mask": mask, **options}
        tokens = self.model.generate(**inputs, max_new_tokens=NEW)
        tokens = tokens if self.encodes else tokens[:, ids.shape[1] :]
        return tokens.view(rows, -1, tokens.shape[1])

    def check(self, rows: int = 3, **options) -> None:
        """Each row of the batch gets what its own model generates."""
        got = self.generated(rows, **options)
        for row in range(rows):
            expected = self.expected(row, **options)
            length = expected.shape[1]
            assert got[row, :, :length].tolist() == expected.tolist(), f"row {row}"
            fill = got[row, :, length:]
            assert (fill <= self.last_fill).all(), f"row {row} goes on after its end"

    def check_sampling(self, copies: int) -> None:
        """What each token was drawn from is what the row's own model gives after those before."""
        torch.manual_seed(5)
        ids, mask = self.batch.ids, self.batch.mask
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True,
            num_return_sequences=copies, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits = torch.stack(out.logits, 1)  # [rows * returned, steps, vocabulary]
        steps = logits.shape[1]
        for i, (tokens, drawn_from) in enumerate(zip(out.sequences, logits, strict=True)):
            text, weights = self.batch.texts[i // copies], self.weights[i // copies]
            with torch.no_grad():
                if self.encodes:
                    expected = self.logits(text, weights, tokens[None, :steps])
                else:
                    whole = torch.cat([text, tokens[None, ids.shape[1] :]], 1)
                    expected = self.logits(whole, weights)[text.shape[1] - 1 :][:steps]
            alive = (tokens[-steps:] != 0).sum()  # what follows the end token is padding
            torch.testing.assert_close(drawn_from[:alive], expected[:alive], atol=1e-4, rtol=1e-4)

    def check_inputs_embeds(self) -> None:
        """The embeddings of the tokens in their place give the same."""
        embeds = self.model.get_input_embeddings()(self.batch.ids)
        tokens = self.model.generate(
            inputs_embeds=embeds, attention_mask=self.batch.mask, max_new_tokens=NEW, **BEAMS
        )
        assert tokens.tolist() == self.generated(**BEAMS)[:, 0].tolist()

    def check_compiled(self) -> None:
        """generate() compiles the decoding step; further prompts run in the same graphs."""
        config = CompileConfig(backend="eager", fullgraph=True, mode=None)
        config._compile_all_devices = True  # not on accelerators alone
        compiles = {"cache_implementation": "static", "compile_config": config}
        torch._dynamo.reset()  # what other tests compiled
        counters["stats"].clear()
        graphs = []
        for ids in (self.batch.ids, token_ids(seed=4), token_ids(seed=5)):
            options = {"input_ids": ids, "attention_mask": None, **GREEDY}
            got = self.generated(**options, **compiles)
            assert got.tolist() == self.generated(**options).tolist()
            graphs.append(counters["stats"]["unique_graphs"])
        # The second prompt may show dynamo what is dynamic, the third nothing new.
        assert graphs[2] == graphs[1] > 0
        assert graphs[1] - graphs[0] <= 1


def made_once(kind: type[Setting]) -> Any:
    """The fixture `setting`, one of each family."""
    made = cache(kind)

    @pytest.fixture
    def setting(request: pytest.FixtureRequest) -> Setting:
        return made(request.param)

    return setting


def on(*families: str):
    """The fixture `setting` of these families."""
    return pytest.mark.parametrize("setting", families, indirect=True)


def repeated(weights: Tensor, rows: int) -> Tensor:
    """Weights for `rows` rows in a wrong order: all samples, then all again."""
    return weights.repeat(rows // weights.shape[0], 1)
