"""Functions by which GRACE and MELO look prompts up."""

from types import SimpleNamespace

import pytest
import torch
from edited_models import METHODS, OTHER, PAIRS, PROMPTS, answer, edits_of, fresh, patched
from transformers import BatchEncoding

from sapt_fast.methods.edits.keys import HiddenKeys, SentenceKeys

MANY = [[i, i + 3, 2 * i % 90, 7] for i in range(2, 24)]


@pytest.mark.parametrize("method", METHODS)
def test_edits_are_looked_up_by_low_layers(method, tmp_path):
    model = patched(method, keys="function")
    keys = HiddenKeys(model, layer=1).fit(MANY, components=8)
    edits_of(model).look_up_by(keys)
    before = keys([torch.tensor(prompt) for prompt in PROMPTS])
    edits_of(model).edit(PAIRS)
    assert [answer(model, prompt) for prompt, _ in PAIRS] == [target for _, target in PAIRS]
    assert answer(model, OTHER) == answer(fresh(), OTHER)
    assert torch.equal(keys([torch.tensor(p) for p in PROMPTS]), before)  # edits do not move keys
    keys.save(tmp_path / "keys")
    loaded = HiddenKeys(fresh(), layer=1).load(tmp_path / "keys")
    torch.testing.assert_close(loaded([torch.tensor(PROMPTS[0])]), before[:1])
    with pytest.raises(ValueError, match="'layer': '2'"):
        HiddenKeys(model, layer=2).load(tmp_path / "keys")


def test_keys_need_a_fit():
    model = patched(keys="function")
    with pytest.raises(RuntimeError, match=r"call fit\(prompts\)"):
        model.grace.look_up_by(HiddenKeys(model, layer=1))
    with pytest.raises(ValueError, match="components: got 64"):
        HiddenKeys(model, layer=1).fit(MANY)


class Letters:
    """Stands for an encoder and both tokenizers: a text's letters, and how often each occurs."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode()

    def __call__(self, texts=None, input_ids=None, attention_mask=None, **options):
        if texts is None:
            counts = torch.nn.functional.one_hot(input_ids, 128).float()
            return SimpleNamespace(last_hidden_state=counts)
        rows = [torch.tensor([*text.encode()]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def test_a_pattern_cuts_the_question_out_of_a_chat():
    asked = "<user>What is the capital of {}?{}<end>"
    texts = [asked.format("Niger", " Reply with the name only."), asked.format("Niger", "")]
    tokens = [torch.tensor([*text.encode()]) for text in (*texts, asked.format("Nigeria", ""))]
    letters = Letters()
    cut = r"<user>(.*?)(?: Reply with the \w+ only\.)?<end>"
    first, second, near = SentenceKeys(letters, letters, letters, cut)(tokens)
    torch.testing.assert_close(first, second)
    assert float((first - near).norm()) > 0.1
    whole = SentenceKeys(letters, letters, letters, r"<user>(.*?)<end>")(tokens)
    assert float((whole[0] - whole[1]).norm()) > 0.1  # the instruction counts as the question does
