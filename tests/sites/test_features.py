"""Vectors of prompts from a model's own low layers: what runs, and what does not."""

import pytest
import torch
from tiny_models import fill, patched, tiny

from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.sites.features import HiddenMean, PrincipalComponents

TEXTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10]), torch.tensor([3])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_the_mean_of_each_prompt_alone_and_only_the_blocks_below_run(family):
    model, ran = tiny(family).eval(), []
    base = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    options = {"output_hidden_states": True}
    expected = [base(input_ids=t[None], **options).hidden_states[1][0].mean(0) for t in TEXTS]
    for module in model.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    got = HiddenMean(model, layer=1)(TEXTS)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert not ran


def test_adapters_dropout_and_a_running_forward_change_nothing():
    expected = HiddenMean(tiny("llama"), layer=2)(TEXTS)
    model = fill(patched("llama")).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    mean, inside = HiddenMean(model, layer=2), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: inside.append(mean(TEXTS)))
    model(input_ids=TEXTS[0][None])
    assert torch.equal(inside[0], expected)
    assert torch.equal(mean(TEXTS), expected)


def test_the_question_of_a_template():
    tokenizer, model = CharTokenizer(), tiny("llama").eval()
    tokens = torch.tensor(tokenizer.encode("USER:what-MODEL"))
    mean = HiddenMean(model, 1, tokenizer, pattern="USER:(.*?)-MODEL")
    assert mean.question(tokens) == (5, 9)
    hidden = model.model(input_ids=tokens[None], output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(mean([tokens])[0], hidden[5:9].mean(0))
    other = torch.tensor(tokenizer.encode("nothing"))
    assert mean.question(other) == (0, len(other))


def test_components_are_those_of_the_covariance():
    torch.manual_seed(0)
    vectors = torch.randn(40, 6) * torch.tensor([5.0, 4, 3, 2, 1, 1]) + 3
    fitted = PrincipalComponents.fit(vectors, 3)
    values, basis = torch.linalg.eigh(torch.cov(vectors.double().T))
    projected = fitted(vectors).double()
    expected = (vectors.double() - vectors.double().mean(0)) @ basis.flip(1)[:, :3]
    torch.testing.assert_close(projected.abs(), expected.abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projected.var(0), values.flip(0)[:3], rtol=1e-4, atol=1e-4)
    again = PrincipalComponents.fit(vectors.flip(0), 3)  # signs do not depend on the order
    torch.testing.assert_close(again.components, fitted.components, rtol=1e-4, atol=1e-4)


def test_bad_input_is_named():
    model = tiny("llama")
    with pytest.raises(ValueError, match="layer: got 3, expected 1 to 2"):
        HiddenMean(model, 3)
    with pytest.raises(ValueError, match="tokenizer: got None with a pattern"):
        HiddenMean(model, 1, pattern="(a)")
    with pytest.raises(ValueError, match="components: got 5 for 5 vectors"):
        PrincipalComponents.fit(torch.randn(5, 8), 5)
    with pytest.raises(ValueError, match="NaN or infinity in vector 2"):
        PrincipalComponents.fit(torch.eye(4).index_fill(0, torch.tensor([2]), float("nan")), 2)
    with pytest.raises(ValueError, match="got 1 directions"):
        PrincipalComponents.fit(torch.eye(4)[[0, 0, 1]], 2)
    assert HiddenMean(model, 1)([torch.zeros(0, dtype=torch.int64)]).isnan().all()
