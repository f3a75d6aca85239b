"""Models that mix prompts: forward, losses and gradients against the bare model, one sample at a
time; patching, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PromptTuningConfig, get_peft_model
from tiny_models import CAUSAL, VOCABULARY, WIDTH, Padded, checkpointed, tiny, token_ids
from tiny_prompts import (
    ENCODER_DECODER,
    LENGTH,
    PromptOracle,
    bare,
    prompt_oracle,
    prompt_settings,
    prompted,
)
from torch import Tensor

import sapt_fast
from sapt_fast.sites import embeddings

FAMILIES = (*ENCODER_DECODER, *CAUSAL)
TARGETS = 4


def batch_of(model, batch: Padded) -> dict[str, Tensor]:
    """Inputs with labels: the decoder's, or the last tokens of each text."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if model.config.is_encoder_decoder:
        return {**given, "labels": token_ids(length=TARGETS, seed=3)}
    labels = torch.full_like(batch.ids, -100)
    for row, where in enumerate(batch.where):
        labels[row, where.stop - TARGETS : where.stop] = batch.ids[row][where][-TARGETS:]
    return {**given, "labels": labels}


def weights_by_hand(model, text: Tensor, keys: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """[K]: q = LayerNorm(SiLU(W_up W_down e)), softmax(K q / tau), e the mean of the embeddings."""
    norm = model.sapt.router.norm
    pooled = model.get_input_embeddings()(text)[0].mean(0)
    hidden = F.layer_norm(F.silu(up @ (down @ pooled)), (WIDTH,), norm.weight, norm.bias, norm.eps)
    return torch.softmax(keys @ hidden / model.sapt.config.temperature, -1)


def asked(model, text: Tensor) -> Tensor:
    """The tokens of a text that the router sees: those whose label is -100."""
    return text if model.config.is_encoder_decoder else text[:, :-TARGETS]


def loss_by_hand(
    oracle: PromptOracle, row: int, text: Tensor, weights: Tensor, labels: Tensor, prompts: Tensor
) -> tuple[Tensor, int]:
    """The sum of one sample's token losses and how many there are."""
    if oracle.encodes:
        shifted = oracle.base.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = oracle.logits(text, weights, shifted[row : row + 1], prompts)
        return F.cross_entropy(logits, labels[row], reduction="sum"), TARGETS
    logits = oracle.logits(text, weights, None, prompts)[-TARGETS - 1 : -1]
    return F.cross_entropy(logits, text[0, -TARGETS:], reduction="sum"), TARGETS


# --- one forward, its loss and its gradients ---


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_match_the_bare_model_of_each_sample(family, left):
    model = prompted(family)
    batch = Padded(model.config.is_encoder_decoder, left)
    inputs, oracle = batch_of(model, batch), prompt_oracle(model, family)
    out = model(**inputs)
    out.loss.backward()

    router, pool = model.sapt.router, model.sapt.prompts
    keys, down, up, rows = (
        t.detach().clone().requires_grad_()
        for t in (router.keys.rows(), router.down.weight, router.up.weight, pool.rows.rows())
    )
    prompts = rows.view(-1, LENGTH, WIDTH)
    losses, count = [], 0
    for row, text in enumerate(batch.texts):
        weights = weights_by_hand(model, asked(model, text), keys, down, up)
        torch.testing.assert_close(model.sapt.attention[row], weights.detach())
        loss, tokens = loss_by_hand(oracle, row, text, weights, inputs["labels"], prompts)
        losses.append(loss)
        count += tokens
        if oracle.encodes:
            shifted = oracle.base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
            expected = oracle.logits(text, weights, shifted[row : row + 1], prompts)
            got = out.logits[row]
        else:
            expected, got = (
                oracle.logits(text, weights, None, prompts),
                out.logits[row][batch.where[row]],
            )
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    loss = torch.stack(losses).sum() / count
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-5)
    loss.backward()
    options = {"atol": 1e-6, "rtol": 1e-3}
    torch.testing.assert_close(pool.rows.trainable.grad, rows.grad[-LENGTH:], **options)
    torch.testing.assert_close(router.keys.trainable.grad, keys.grad[-1:], **options)
    torch.testing.assert_close(router.down.weight.grad, down.grad, **options)
    torch.testing.assert_close(router.up.weight.grad, up.grad, **options)
    assert pool.rows.frozen.grad is None
    assert rows.grad[-LENGTH:].abs().max() > 1e-4
    assert up.grad.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_mixtures_of_other_samples_are_noticed(family):
    """A control of the test above: it tells one sample's mixture from another's."""
    model, ids = prompted(family), token_ids()
    weights = model.sapt.route(ids)
    labels = token_ids(length=TARGETS) if family == "t5" else ids
    expected, turned = (
        model(ids, labels=labels, mixture=w).logits for w in (weights, weights.roll(1, 0))
    )
    torch.testing.assert_close(model(ids, labels=labels).logits, expected)
    assert ((expected - turned).abs().amax((1, 2)) > 1e-2).all()


@pytest.mark.parametrize("family", CAUSAL)
def test_outputs_are_as_long_as_the_input(family):
    model, ids = prompted(bare(family, attn_implementation="eager")), token_ids()
    out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert out.logits.shape == (3, 9, VOCABULARY)
    assert {h.shape for h in out.hidden_states} == {(3, 9, WIDTH)}
    assert {a.shape[2:] for a in out.attentions} == {(9, LENGTH + 9)}
    assert out.past_key_values.get_seq_length() == LENGTH + 9
    inner = model.base_model(ids, return_dict=False)
    assert inner[0].shape == (3, 9, WIDTH)
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, out.logits[:, -2:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [True, False])
def test_given_position_ids_are_moved_on(family, masked):
    model, batch = prompted(family), Padded(False)
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    ids = batch.ids if masked else token_ids()
    positions = positions if masked else torch.arange(9)[None]
    given = {"attention_mask": batch.mask} if masked else {}
    torch.testing.assert_close(
        model(ids, **given, position_ids=positions).logits[:, -3:],
        model(ids, **given).logits[:, -3:],
    )
    assert positions.max() == 8


def test_a_parts_own_call_gets_the_prompt_too():
    model, ids = prompted("llama"), token_ids()
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(ids).logits)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_inputs_embeds(family):
    model, ids = prompted(family), token_ids()
    labels = {"labels": ids}
    embeds = model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embeds, **labels).logits
    torch.testing.assert_close(got, model(ids, **labels).logits)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_hooks_of_the_embedding_are_heard(family):
    """As NEFTune's noise is added."""
    model, ids = prompted(family), token_ids()
    expected = model(ids, labels=ids).logits
    noise = torch.randn(3, 9, WIDTH)
    module = model.get_encoder() if family == "t5" else model
    hook = module.get_input_embeddings().register_forward_hook(
        lambda _, args, out: out + noise if out.shape == noise.shape else out
    )
    with model.sapt.fixed(model.sapt.attention):
        noisy = model(ids, labels=ids).logits
        hook.remove()
        embeds = model.get_input_embeddings()(ids) + noise
        torch.testing.assert_close(noisy, model(inputs_embeds=embeds, labels=ids).logits)
    assert (noisy - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_task_alone_is_peft_prompt_tuning(family, count):
    """The loss, too: PEFT pads labels with -100 where ours leaves the prompt's logits out."""
    model, base, ids = prompted(family, tasks=count), bare(family), token_ids()
    config = PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        num_transformer_submodules=1,
    )
    reference = get_peft_model(base, config).eval()
    chosen = count - 1
    with torch.no_grad():
        reference.prompt_encoder["default"].embedding.weight.copy_(
            model.sapt.prompts.prompt(chosen)
        )
    labels = ids.clone()
    labels[:, :3] = -100
    mask = torch.ones_like(ids)
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    got = model(ids, attention_mask=mask, labels=labels, mixture=torch.eye(count)[chosen])
    skipped = expected.logits.shape[1] - 9
    assert skipped == (0 if family == "t5" else LENGTH)
    torch.testing.assert_close(got.logits, expected.logits[:, skipped:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    """Two forwards before one backward."""
    gradients = []
    for checkpoints in (False, True):
        model = prompted(family).train()
        if checkpoints:
            checkpointed(model, {"use_reentrant": reentrant})
        torch.manual_seed(0)
        losses = [model(ids, labels=ids).loss for ids in (token_ids(), token_ids(seed=4))]
        sum(losses).backward()
        gradients.append([p.grad for p in model.sapt.trainable_parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_threads_do_not_mix_their_prompts(family):
    model = prompted(family)
    batches = [token_ids(seed=seed) for seed in range(8)]

    @torch.no_grad()
    def run(ids):
        return model(ids, labels=ids).logits, model.sapt.attention

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, batches * 4))
    for got, wanted in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.thorough)])
def test_compiled_training_step(family):
    depth = {"num_layers": 1} if family == "t5" else {"num_hidden_layers": 1}
    model = prompted(bare(family, **depth))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (11, 5):
        batch = batch_of(model, Padded(family == "t5", seed=seed))
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            loss = run(**batch).loss
            loss.backward()
            gradients.append([loss, *(p.grad for p in model.sapt.trainable_parameters())])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_bfloat16(family):
    model = prompted(family).to(torch.bfloat16)
    model.sapt.add_task("later")
    assert {p.dtype for p in model.sapt.parameters()} == {torch.bfloat16}
    ids = token_ids()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.sapt.prompts.rows.trainable.grad.shape == (LENGTH, WIDTH)
    assert loss.isfinite()


def test_autocast():
    model, ids = prompted("llama"), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, labels=ids)
    got.loss.backward()
    torch.testing.assert_close(
        got.logits.float(), model(ids, labels=ids).logits, atol=0.3, rtol=0.1
    )


# --- patch and unpatch ---


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_everything(family):
    base, model, ids = bare(family), bare(family), token_ids()
    model.lm_head.weight.requires_grad_(False)
    attributes = {name: set(vars(m)) for name, m in base.named_modules()}
    prompted(model)
    model(ids, labels=ids).loss.backward()
    expected = {"encoder", "decoder"} if base.config.is_encoder_decoder else {"model"}
    report = model.sapt.report
    found = {path.rpartition(".")[2] for path in report.prompted}
    assert found == ({"transformer"} if family == "gpt2" else expected)
    assert report.patched == []
    assert str(report) == f"prompts are read by {', '.join(report.prompted)}; no layer is patched"
    sapt_fast.unpatch(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    state, before = model.state_dict(), base.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert {name.rpartition(".")[0] for name in frozen} == (
        {
            next(n for n, p in model.named_parameters() if p is model.lm_head.weight).rpartition(
                "."
            )[0]
        }
        if tied
        else {"lm_head"}
    )
    base.lm_head.weight.requires_grad_(False)
    assert torch.equal(model(ids, labels=ids).logits, base(ids, labels=ids).logits)


def test_nothing_happens_before_the_first_task():
    ids = token_ids()
    with torch.no_grad():
        for family in FAMILIES:
            model = sapt_fast.patch(bare(family), prompt_settings())
            assert torch.equal(model(ids, labels=ids).logits, bare(family)(ids, labels=ids).logits)
            model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_patching_twice_and_with_another_config():
    model = prompted("llama")
    assert sapt_fast.patch(model, prompt_settings()) is model
    with pytest.raises(ValueError, match="another config"):
        sapt_fast.patch(model, sapt_fast.SaptConfig())


def test_a_copy_is_a_model_of_its_own():
    model, ids = prompted("llama"), token_ids()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.sapt.prompts.rows.rows().zero_()
        other.sapt.prompts.realign()
    assert not torch.equal(model(ids).logits, other(ids).logits)
    assert torch.equal(other(ids, mixture=torch.ones(3)).logits, other(ids).logits)
    other.generate(ids, max_new_tokens=2)
    assert model.sapt.routing.pool is model.sapt.prompts
    assert other.sapt.routing.pool is other.sapt.prompts


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("bert"), "it is an encoder"),
        (
            lambda: transformers.T5EncoderModel(tiny("t5").config),
            "T5EncoderModel takes no past_key_values, position_ids",
        ),
        (
            lambda: transformers.WhisperForConditionalGeneration(
                transformers.WhisperConfig(
                    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                    vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ),
            "WhisperEncoder takes no input_ids, inputs_embeds",
        ),
    ],
    ids=["encoder", "t5_encoder", "whisper"],
)  # fmt: skip
def test_models_that_take_no_prompt_are_left_alone(model, message):
    model = model()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"adapter: got 'prompt' for .* {message}"):
        sapt_fast.patch(model, prompt_settings())
    assert not hasattr(model, "sapt")
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_length", 0),
        ("prompt_length", 2.5),
        ("adapter", "prefix"),
        ("target_modules", ["q"]),
        ("lora_dropout", 0.1),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: got"):
        prompt_settings(**{field: value})


# --- inputs that cannot work ---


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(3, 1, 9, 9)}, r"attention_mask: got \(3, 1, 9, 9\)"),
        ({"position_ids": torch.zeros(3, 3, 9).long()}, r"position_ids: got shape \(3, 3, 9\)"),
        ({"token_type_ids": torch.zeros(3, 9).long()}, "token_type_ids: got shape"),
        ({"mixture": torch.ones(2)}, r"weights: got shape \(2,\), expected \[3\]"),
        ({"mixture": torch.ones(3, 9, 3)}, "mixed for a whole sample"),
        ({"mixture": torch.full((3,), torch.nan)}, "non-finite"),
        ({"input_ids": token_ids(length=124)}, "got 124 tokens, expected at most 123"),
    ],
    ids=["mask", "positions", "types", "count", "per_token", "nan", "room"],
)
def test_bad_inputs_raise(inputs, message):
    model = prompted("gpt2", mask_padding=False)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": token_ids(), **inputs})
    model(token_ids())  # and nothing of it stays


def test_a_mask_of_another_length_than_the_encoder_outputs_raises():
    model, ids = prompted("t5"), token_ids()
    outputs = model.get_encoder()(ids)
    with pytest.raises(ValueError, match="attention_mask: got 6 tokens, expected 9"):
        model(encoder_outputs=outputs, attention_mask=torch.ones(3, 6).long(), labels=ids)


def test_a_prompt_in_the_middle_is_noticed(monkeypatch):
    """A control: where the prompt stands makes a difference."""
    model, ids = prompted("llama"), token_ids()
    expected, own = model(ids).logits, embeddings.moved_positions
    monkeypatch.setattr(embeddings, "moved_positions", lambda *args: own(*args) + 3)
    got = model(ids, position_ids=torch.arange(9).expand(3, 9)).logits
    assert (got - expected).abs().max() > 1e-3
