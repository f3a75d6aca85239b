"""Models other than language models: patched and right, or refused in words; and their report."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import patched, settings, tiny, token_ids
from torch import nn

import sapt_fast

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SMALL, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
_TEXT = {**_SMALL, "intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 20}
_AUDIO = {
    **_SMALL, "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "vocab_size": 12,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    if name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION)).eval()
    if name == "beit":
        return transformers.BeitModel(transformers.BeitConfig(**_VISION)).eval()
    if name == "clip":
        config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION)
        return transformers.CLIPModel(config).eval()
    if name == "wav2vec2":
        return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**_AUDIO)).eval()
    if name == "canine":
        return transformers.CanineModel(transformers.CanineConfig(**_SMALL)).eval()
    if name == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            text_config=transformers.LlamaConfig(**{**_TEXT, "num_key_value_heads": 2}),
            image_token_index=49,
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**_TEXT), transformers.BertConfig(**_TEXT)
    )
    return transformers.EncoderDecoderModel(config).eval()


def inputs(name):
    torch.manual_seed(1)
    images, ids = torch.randn(3, 3, 8, 8), torch.randint(1, 40, (3, 6))
    if name in ("vit", "beit"):
        return {"pixel_values": images}
    if name == "clip":
        return {"pixel_values": images, "input_ids": ids}
    return {"input_values": torch.randn(3, 400)} if name == "wav2vec2" else {"input_ids": ids}


@pytest.mark.parametrize(
    ("name", "changed"),
    [(name, {"target_modules": "all-linear"}) for name in ("clip", "wav2vec2", "canine")]
    + [(name, {"adapter": "prompt"}) for name in ("vit", "beit", "clip", "wav2vec2", "canine")],
)
def test_models_without_token_embeddings(name, changed):
    model = build(name)
    kinds = [(type(m), sorted(vars(m))) for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"expected a table of token embeddings|got 'prompt'") as e:
        sapt_fast.patch(model, settings(**changed))
    assert type(model).__name__ in str(e.value)
    assert kinds == [(type(m), sorted(vars(m))) for m in model.modules()]
    assert trains == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("vit", ["q_proj", "v_proj", "query", "value"]),
        ("beit", ["q_proj", "v_proj", "query", "value"]),
        ("clip", ["q_proj", "v_proj"]),
        ("wav2vec2", ["q_proj", "v_proj"]),
        ("canine", ["query", "value"]),
        ("llava", ["q_proj", "v_proj"]),
    ],
)
def test_peft_adapters_by_given_weights(name, targets):
    """Each sample as PEFT computes it with that sample's mixture as its only adapter."""
    model, given = build(name), inputs(name)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft_model = get_peft_model(model, config, adapter_name="a")
    peft_model.add_adapter("b", config)
    peft_model.eval()
    plain = copy.deepcopy(peft_model)
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [-1.0, 2.0]])
    outcomes = []
    sapt_fast.patch(peft_model)
    with torch.no_grad():
        whole = main(peft_model(**given, mixture=weights))
        for row, own in enumerate(weights):
            plain.add_weighted_adapter(["a", "b"], own.tolist(), f"m{row}", "cat")
            plain.set_adapter(f"m{row}")
            outcomes.append(main(plain(**given))[row])
        torch.testing.assert_close(whole, torch.stack(outcomes), rtol=1e-4, atol=1e-5)
        with peft_model.sapt.fixed(weights[1]):
            plain.set_adapter("m1")
            torch.testing.assert_close(
                main(peft_model(**given)), main(plain(**given)), rtol=1e-4, atol=1e-5
            )


def main(output):
    """What a model computed of each sample."""
    if "image_embeds" in output:
        return torch.cat([output.image_embeds, output.text_embeds], 1)
    return output["logits" if "logits" in output else "last_hidden_state"]


# --- towers ---


@pytest.mark.parametrize("kind", ["sapt", "peft"])
@pytest.mark.parametrize(
    ("name", "targets", "towers"),
    [
        ("llava", ["q_proj"], ["model.vision_tower (2)", "model.language_model (2)"]),
        ("llava", ["q_proj", "up_proj"], ["model.vision_tower (2)", "model.language_model (2)"]),
        ("bert2bert", ["query"], ["encoder (2)", "decoder (4)"]),
    ],
)
def test_names_that_several_towers_have(name, targets, towers, kind, caplog):
    model = build(name)
    if kind == "sapt":
        report = sapt_fast.patch(model, settings(target_modules=targets)).sapt.report
    else:
        report = sapt_fast.patch(
            get_peft_model(model, LoraConfig(target_modules=targets))
        ).sapt.report
    [note] = report.notes
    assert all(tower in note for tower in towers)
    assert f"layers named {targets[0]} were" in note
    assert note in caplog.text
    assert note in str(report)


def test_the_advice_about_towers_works():
    model = build("llava")
    note = sapt_fast.patch(model, settings(target_modules=["q_proj"])).sapt.report.notes[0]
    pattern = note.rpartition("target_modules=r")[2].strip("'")
    sapt_fast.unpatch(model)
    report = sapt_fast.patch(model, settings(target_modules=pattern)).sapt.report
    assert len(report.patched) == 2
    assert not report.notes
    assert all(path.startswith("model.language_model.") for path in report.patched)


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "bert"])
def test_no_note_where_there_is_one_tower(family):
    notes = patched(family).sapt.report.notes
    assert [note for note in notes if "classifier is frozen" not in note] == []


# --- routers of PEFT models ---


def peft_llama():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    return sapt_fast.patch(model.eval())


def by_length(**given):
    share = given["attention_mask"].float().mean(1, keepdim=True)
    return torch.cat([share, 1 - share], 1)


@pytest.mark.parametrize("router", [by_length, lambda **given: by_length(**given)])
def test_a_function_as_a_router(router):
    model, ids = peft_llama(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    keys = list(model.state_dict())
    expected = model(input_ids=ids, attention_mask=mask, mixture=by_length(attention_mask=mask))
    model.sapt.router = router
    got = model(input_ids=ids, attention_mask=mask)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(model.sapt.attention, by_length(attention_mask=mask))
    assert list(model.state_dict()) == keys
    model.sapt.router = None
    assert model.sapt.router is None


@pytest.mark.parametrize("router", [3, "a", torch.ones(2)])
def test_routers_that_cannot_be_called(router):
    model = peft_llama()
    model.sapt.router = kept = nn.Identity()
    with pytest.raises(TypeError, match=f"router: got {type(router).__name__}, expected a module"):
        model.sapt.router = router
    assert model.sapt.router is kept
