"""own_lora: each sample with its adapter alone, against float64."""

import pytest
import torch
from ops.cases.own_lora import (
    TOLERANCE,
    assert_right,
    expected,
    expected_whole,
    make,
    make_base,
)

from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora


@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reference(dtype, lora_dtype):
    y, x, adapters = make((4, 3, 5), (2, 3, 1), dtype, lora_dtype)
    owner = [2, -1, 0, 0]
    want = expected(y, x, adapters, owner)
    got = add_own_lora_(y, x, adapters, owner, backend="reference")
    assert got is y
    assert_right(got, want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reference_with_the_base_product(dtype):
    _, x, adapters = make((4, 3, 5), (2, 3, 1), dtype)
    weight, bias = make_base(x)
    owner = [2, -1, 0, 0]
    want = expected_whole(x, weight, bias, adapters, owner)
    got = own_lora(x, weight, bias, adapters, owner, backend="reference")
    assert got.shape == (4, 3, 7)
    assert got.dtype == dtype
    assert_right(got, want, dtype)


def test_bad_base():
    _, x, adapters = make((4, 3, 5), (2, 3))
    weight, bias = make_base(x)
    owner = [0, 1, 0, -1]
    for error, match, given in [
        (ValueError, r"weight: got shape \(5,\), expected \[O, I\]", (x, weight[0], bias)),
        (ValueError, r"x: got width 5, expected 7 \(that of weight\)", (x, weight.t(), bias)),
        (ValueError, r"bias: got shape \(6,\), expected \[7\]", (x, weight, bias[:6])),
        (TypeError, r"weight: got dtype", (x, weight.half(), bias)),
        (TypeError, r"bias: got dtype", (x, weight, bias.half())),
        (ValueError, r"adapters\[0\]: got A", (x, weight[:6], None)),
        (ValueError, r"x: got shape \(5,\)", (x[0, 0], weight, bias)),
        (ValueError, "require gradients", (x, weight.clone().requires_grad_(), bias)),
        (TypeError, r"x: got dtype", (x.int(), weight.int(), bias.int())),
        (ValueError, "weight: got device meta, expected cpu", (x, weight.to("meta"), bias)),
        (ValueError, "bias: got device meta, expected cpu", (x, weight, bias.to("meta"))),
    ]:
        with pytest.raises(error, match=match):
            own_lora(*given, adapters, owner)


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_changes_nothing(backend):
    y, x, adapters = make((20, 5), (2, 3))
    base, owner = make_base(x), [0, 1] * 10
    want = own_lora(x, *base, adapters, owner, backend=backend)
    added = add_own_lora_(y.clone(), x, adapters, owner, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own_lora(x, *base, adapters, owner, backend=backend), want)
        assert torch.equal(add_own_lora_(y, x, adapters, owner, backend=backend), added)


def test_bad_input_changes_nothing():
    y, x, adapters = make((4, 3, 5), (2, 3))
    before = y.clone()
    owner = [0, 1, 0, -1]
    swapped = Adapter(adapters[0].b, adapters[0].a, 1.0)
    elsewhere = [adapters[0], adapters[1]._replace(a=adapters[1].a.to("meta"))]
    narrow = Adapter(adapters[0].a.half(), adapters[0].b.half(), 1.0)
    for error, match, given in [
        (ValueError, r"owner: got 3 samples, expected 4", (y, x, adapters, [0, 1, 0])),
        (ValueError, r"owner: got .*, expected -1 to 1", (y, x, adapters, [0, 2, 0, 0])),
        (ValueError, r"owner: got", (y, x, adapters, [0, -2, 0, 0])),
        (ValueError, r"y: got shape", (y[:, :2], x, adapters, owner)),
        (ValueError, r"y: got shape", (y.transpose(0, 1), x.transpose(0, 1), adapters, owner)),
        (TypeError, r"x: got dtype", (y, x.double(), adapters, owner)),
        (ValueError, r"adapters\[0\]: got A", (y, x[..., :4], adapters, owner)),
        (
            ValueError,
            r"adapters\[1\]",
            (y, x, [adapters[0], swapped], owner),
        ),
        (
            TypeError,
            r"adapters: got",
            (y, x, [narrow], [0] * 4),
        ),
        (ValueError, "require gradients", (y, x.clone().requires_grad_(), adapters, owner)),
        (ValueError, "y: got device meta", (y.to("meta"), x, adapters, owner)),
        (ValueError, r"adapters\[1\]: got A on meta and B on cpu", (y, x, elsewhere, owner)),
    ]:
        with pytest.raises(error, match=match):
            add_own_lora_(*given)
        assert torch.equal(y, before)


def test_no_samples_and_no_adapters():
    y, x, adapters = make((0, 3, 5), (2,))
    assert add_own_lora_(y, x, adapters, []).shape == (0, 3, 7)
    assert own_lora(x, *make_base(x), adapters, []).shape == (0, 3, 7)
    y, x, _ = make((2, 3, 5), ())
    before = y.clone()
    assert torch.equal(add_own_lora_(y, x, [], [-1, -1]), before)
