"""Our numbers against recorded runs of the original SAPT code."""

import json
import sys
from pathlib import Path

import parity
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sapt_fast
from sapt_fast import SaptConfig

ROOT = Path(__file__).parents[1]
ORACLE = ROOT / "tests" / "data" / "oracle"
RECORDINGS = sorted(ORACLE.glob("*_K*_seed*.safetensors"))


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recorded(request):
    """(patched model with the recorded pool, tensors): adapters in learning order."""
    with safe_open(request.param, "pt") as file:
        meta = file.metadata()
    tensors = load_file(request.param)
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    config = json.loads(meta["config"])
    released = json.loads(meta["prompt_config"])
    kind = config["model_type"]
    model = parity.build_model(config, weights)
    sapt = SaptConfig.official(kind, "superni")
    sapt.r, sapt.lora_alpha = released["lora_r"], released["lora_alpha"]
    sapt.query_hidden_dim = released["trans_hidden_dim"]
    sapt_fast.patch(model, sapt)
    past = released["task_id"]
    for task in range(past + 1):
        model.sapt.add_task(f"task{task}")
        age = past - task  # 0 is the newest
        parity.set_newest_task(model, weights if age == 0 else _earlier(weights, age - 1))
    return model, tensors


def _earlier(weights, index):
    """The weights with adapter `index` of the earlier ones in the newest one's place."""
    own = dict(weights)
    for name in weights:
        if ".lora_q." in name or ".lora_v." in name:
            which = "q" if ".lora_q." in name else "v"
            own[name] = weights[
                name.replace(f".lora_{which}.", f".previous_lora_weights_{which}.{index}.")
            ]
    stem = "encoder" if "encoder.prompt_key" in weights else "model"
    keys = weights[f"{stem}.previous_prompts_keys"]
    own[f"{stem}.prompt_key"] = keys[index : index + 1]
    return own


def _forward(model, tensors):
    if model.config.is_encoder_decoder:
        names = ("input_ids", "attention_mask", "labels")
        return model(**{name: tensors[name] for name in names})
    return model(
        input_ids=tensors["full_ids"], attention_mask=tensors["full_mask"], labels=tensors["labels"]
    )


def _gradients(model, prefix, tensors):
    """(name, ours, recorded) of every recorded gradient."""
    rows = []
    for name, expected in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        router = model.sapt.router
        if "lora_" in name:
            parent, lora, matrix = name.rsplit(".", 2)
            suffix = "" if model.config.is_encoder_decoder else "_proj"
            layer = f"{parent}.{lora.removeprefix('lora_')}{suffix}"
            pool = model.sapt.pools[layer]
            ours = pool.a.trainable.grad if matrix == "lora_A" else pool.b.trainable.grad.t()
        elif name.endswith("prompt_key"):
            ours = router.keys.trainable.grad
        else:
            short = name.split("trans_input.")[1]
            ours = {
                "0.weight": router.down.weight,
                "1.weight": router.up.weight,
                "3.weight": router.norm.weight,
                "3.bias": router.norm.bias,
            }[short].grad
        rows.append((name, ours, expected))
    return rows


def test_all_recordings_are_here():
    assert len(RECORDINGS) == 3


def test_forward_equals_the_release(recorded):
    model, tensors = recorded
    with torch.no_grad():
        output = _forward(model, tensors)
    torch.testing.assert_close(output.logits, tensors["logits"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.loss, tensors["loss"][0], rtol=1e-5, atol=0)
    ours = model.sapt.attention.flip(-1)
    torch.testing.assert_close(ours, tensors["attention"], rtol=0, atol=1e-6)


def test_generation_equals_the_release(recorded):
    model, tensors = recorded
    generated = model.generate(
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        do_sample=False,
        max_new_tokens=tensors["generated"].shape[1],
    )
    recorded_tokens = tensors["generated"]
    assert torch.equal(generated[:, : recorded_tokens.shape[1]], recorded_tokens)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_gradient_equals_the_release(recorded, backend, monkeypatch):
    model, tensors = recorded
    from sapt_fast import dispatch

    resolve = dispatch.resolve
    chosen = []

    def pick(op, device, requested=None, dtype=None, *few, **lacked):
        mixes = op == "mixed_lora"
        made = resolve(op, device, backend if mixes else requested, dtype, *few, **lacked)
        if mixes:
            chosen.append(made)
        return made

    monkeypatch.setattr(dispatch, "resolve", pick)
    model.train()
    _forward(model, tensors).loss.backward()
    assert set(chosen) == {backend}
    rows = _gradients(model, "grad.", tensors)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(rows) == len(trained)
    for name, ours, expected in rows:
        error = (ours - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "recorded",
    [path for path in RECORDINGS if "_K1_" not in path.stem],  # one key has nothing to reflect on
    ids=lambda path: path.stem,
    indirect=True,
)
def test_reflection_loss_and_its_gradients_equal_the_release(recorded):
    model, tensors = recorded
    loss = model.sapt.reflection_loss(tensors["input_ids"], tensors["kl.target"].flip(-1))
    torch.testing.assert_close(loss, tensors["kl.loss"][0], rtol=1e-4, atol=1e-6)
    loss.backward()
    rows = _gradients(model, "klgrad.", tensors)
    assert len(rows) == 5
    for name, ours, expected in rows:
        error = (ours - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_continual_run_equals_the_release(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity.py", str(ORACLE / kind)])
    assert parity.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert result["generated_mismatches"] == 0


def test_a_nan_is_no_agreement():
    assert parity._relative([float("nan")], [1.0]) == float("inf")
    assert parity._relative([1.0], [2.0]) == 0.5
