"""Functions by which GRACE and MELO look prompts up."""

import pytest
import torch
from edited_models import METHODS, OTHER, PAIRS, PROMPTS, answer, edits_of, fresh, patched

from sapt_fast.methods.edits.keys import HiddenKeys

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
