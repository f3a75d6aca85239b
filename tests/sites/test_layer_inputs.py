"""What layers do with inputs of a wrong width, and with inputs without a batch."""

import contextlib

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

import sapt_fast
from sapt_fast.methods.peft.layers import mixed
from sapt_fast.ops import mixed_lora
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora
from sapt_fast.pools.lora import AdapterPool

BACKENDS = ["reference", "cpu", "triton"]
WIDTHS = [1, 24, 31, 48, 4_000_000]  # of layers that are 32 wide


def _pool(outputs: int = 40) -> AdapterPool:
    pool = AdapterPool(32, outputs)
    for rank in (2, 3):
        pool.add(rank, 0.5)
    for stack in (pool.a, pool.b):
        nn.init.normal_(stack.rows())
    return pool


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
class TestWidthOfPools:
    @pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
    @pytest.mark.parametrize("weight", [True, False])
    def test_any_rows(self, backend, width, mode, weight):
        pool, w = _pool(), torch.randn(40, 32)
        context = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
        for rows in (1, 2) if width > 100 else (1, 6, 200):
            with context.get(mode, torch.inference_mode)():
                x = torch.randn(rows, 1, width)
                with pytest.raises(ValueError, match=f"x: got width {width}, expected 32"):
                    pool(x, w if weight else None, None, torch.ones(1, 2), backend=backend)

    def test_the_op(self, backend, width):
        x = torch.randn(2, width)
        with pytest.raises(ValueError, match=f"expected \\[R, {width}\\]"):
            mixed_lora(
                *(x, torch.ones(4, 32), torch.ones(4, 40), torch.ones(2, 2)),
                ranks=2,
                backend=backend,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_do_not_divide_the_rows(backend):
    pool, x = _pool(), torch.randn(4, 32)
    with pytest.raises(ValueError, match="mixture: got weights of 3 samples"):
        pool(x, None, None, torch.ones(3, 2), backend=backend)
    with pytest.raises(ValueError, match="weight: got shape"):
        pool(x, torch.randn(41, 32), None, torch.ones(1, 2), backend=backend)
    with pytest.raises(ValueError, match="bias: got shape"):
        pool(x, torch.randn(40, 32), torch.randn(39), torch.ones(1, 2), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_width_of_own_adapters(backend, width):
    adapters, x = [Adapter(torch.ones(2, 32), torch.ones(4, 2), 1.0)], torch.ones(2, width)
    with pytest.raises(ValueError, match=f"x: got width {width}, expected 32"):
        own_lora(x, torch.ones(4, 32), None, adapters, [0, -1], backend=backend)
    with pytest.raises(ValueError, match=rf"adapters\[0\].*expected \[r, {width}\]"):
        add_own_lora_(torch.zeros(2, 4), x, adapters, [0, -1], backend=backend)


def _t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip


def _patched(kind: str) -> tuple[nn.Module, dict]:
    model = _t5()
    if kind == "sapt":
        model = sapt_fast.patch(model, sapt_fast.SaptConfig(r=2, target_modules=["k", "v"]))
        model.sapt.add_task("a")
        return model, {}
    config = peft.LoraConfig(r=2, target_modules=["k", "v"], init_lora_weights=False)
    model = peft.get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    sapt_fast.patch(model.eval())
    return model, {"adapter_names": ["a"]} if kind == "names" else {}


@pytest.mark.parametrize("kind", ["sapt", "peft", "names"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("width", "tokens"), [(48, 4), (16, 4), (48, 200), (4_000_000, 1)])
def test_encoder_outputs_of_another_width(kind, grad, width, tokens):
    """PEFT alone raises; here too, and nothing is read past the end."""
    model, named = _patched(kind)
    outputs = BaseModelOutput(last_hidden_state=torch.randn(1, tokens, width))
    fixed = model.sapt.fixed(torch.ones(1)) if kind == "sapt" else contextlib.nullcontext()
    with (
        torch.set_grad_enabled(grad),
        fixed,
        pytest.raises((ValueError, RuntimeError), match=rf"{width}.*expected 32|cannot be mult"),
    ):
        model(
            encoder_outputs=outputs,
            attention_mask=torch.ones(1, tokens, dtype=torch.long),
            decoder_input_ids=torch.tensor([[0, 5]]),
            **named,
        )


class _Layers(nn.Module):
    """Layers that are given what the model is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(32, 24), Conv1D(24, 32)


@pytest.fixture
def sapt_layers():
    """A model's layers with a SAPT pool, by names."""
    model = _t5()
    sapt_fast.patch(model, sapt_fast.SaptConfig(r=2, target_modules=["q", "k", "v", "o"]))
    for name in ("a", "b"):
        model.sapt.add_task(name)
    attention = model.encoder.block[0].layer[0].SelfAttention
    for layer in (attention.q, attention.k, attention.o):
        nn.init.normal_(layer.sapt_pool.b.rows())
    return model, attention


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_without_a_batch(sapt_layers, grad):
    model, attention = sapt_layers
    x, weights = torch.randn(32), torch.tensor([0.25, 0.75])
    with torch.set_grad_enabled(grad), model.sapt.fixed(weights):
        for layer in (attention.q, attention.k, attention.o):
            y = layer(x)
            assert y.shape == (32,)
            torch.testing.assert_close(y, layer(x.unsqueeze(0))[0])
            with pytest.raises(RuntimeError):
                layer(torch.tensor(1.0))
    with (
        torch.set_grad_enabled(grad),
        model.sapt.fixed(torch.softmax(torch.randn(3, 2), -1)),
        pytest.raises(RuntimeError, match=r"shape \(32,\) for mixture weights of shape \(3, 2\)"),
    ):
        attention.q(x)


@pytest.mark.parametrize("module", ["linear", "conv"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_without_a_batch_and_peft(module, grad):
    config = peft.LoraConfig(
        r=2, target_modules=[module], init_lora_weights=False, fan_in_fan_out=module == "conv"
    )
    tuner = peft.tuners.lora.LoraModel(_Layers().eval(), {"a": config}, "a")
    layer, x = getattr(tuner.model, module), torch.randn(32)
    plain = layer(x.unsqueeze(0))[0].detach()
    with torch.set_grad_enabled(grad):
        y = mixed(layer, x, ["a"], torch.ones(1, 1))
    assert y.shape == (24,)
    torch.testing.assert_close(y.detach(), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pools_without_a_batch(backend):
    pool, w, bias, x = _pool(), torch.randn(40, 32), torch.randn(40), torch.randn(32)
    mixture = torch.tensor([[0.5, 2.0]])
    want = pool(x.unsqueeze(0), w, bias, mixture, backend="reference")[0]
    torch.testing.assert_close(pool(x, w, bias, mixture, backend=backend), want)
    with pytest.raises(ValueError, match="mixture"):
        pool(x, w, bias, torch.ones(2, 2), backend=backend)
    with pytest.raises(RuntimeError, match="x: got a tensor without dimensions"):
        pool(torch.tensor(1.0), w, bias, mixture, backend=backend)
