"""SAPT on vision transformers: LoRA in query and value layers, routed by frozen image queries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vision import VISION, WIDTH, images, vision_model

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.ops.route import query
from sapt_fast.sites.image_queries import ImageQueries

FAMILIES = [
    pytest.param(name, marks=[] if name in ("vit", "dinov2", "clip") else pytest.mark.thorough)
    for name in VISION
]


def patched(family: str = "vit", tasks: int = 2, **config: Any) -> Any:
    model = sapt_fast.patch(
        vision_model(family), SaptConfig(r=2, modules_to_save=["classifier"], **config)
    )
    for index in range(tasks):
        model.sapt.add_task(f"task{index}")
        with torch.no_grad():
            for pool in model.sapt.pools.values():
                pool.b.trainable.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_mixes_by_the_query_of_each_image(family: str, tmp_path: Path) -> None:
    pixels, base = images(), vision_model(family).requires_grad_(False)
    model = patched(family).eval()
    assert all(
        path.rpartition(".")[2] in ("q_proj", "v_proj") for path in model.sapt.report.patched
    )
    expected = model.sapt.router.weights(ImageQueries(base)(pixels))
    with torch.no_grad():
        found = model(pixel_values=pixels).logits
        torch.testing.assert_close(model.sapt.attention, expected.detach())
        torch.testing.assert_close(model.sapt.route(pixel_values=pixels), expected)
        assert (expected[0] - expected[1]).abs().max() > 1e-4
        for row, weights in enumerate(expected):
            model.sapt.merge(weights)
            alone = model(pixel_values=pixels[row : row + 1]).logits[0]
            model.sapt.unmerge()
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)
        model.sapt.save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(vision_model(family), tmp_path).eval()
        assert torch.equal(loaded(pixel_values=pixels).logits, found)
        assert torch.equal(copy.deepcopy(model)(pixel_values=pixels).logits, found)
        sapt_fast.unpatch(model)
        assert torch.equal(model(pixel_values=pixels).logits, base(pixel_values=pixels).logits)


def gradients(model: Any, call: Any = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = (model if call is None else call)(pixel_values=images()).logits
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2])).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_trains_under_checkpointing_compile_and_autocast() -> None:
    model = patched().train()
    plain = gradients(model)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in plain}
    assert {"classifier", "keys", "a", "b"} <= names
    assert any("router.down" in name for name in plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model)
    model.gradient_checkpointing_disable()
    compiled = gradients(model, torch.compile(model, backend="eager"))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
        torch.testing.assert_close(compiled[name], gradient)
        assert rounded[name].isfinite().all()
    model.sapt.reflection_loss(pixel_values=images(), target=torch.tensor([0.9, 0.1])).backward()
    model.sapt.warmup([(2, 10), (1, 1)])


def test_one_task_needs_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(tasks=1)
    monkeypatch.setattr(ImageQueries, "__call__", lambda *args: pytest.fail("computed a query"))
    with torch.no_grad():
        assert model.sapt.route(pixel_values=images()).tolist() == [[1.0]]
    model.sapt.router.requires_grad_(False)  # as strategies with one shared adapter do
    assert model(pixel_values=images()).logits.shape == (3, 5)


def test_key_starts_at_the_mean_query_of_a_chosen_layer() -> None:
    model = patched(query_layer=1, query_pooling="mean", temperature=1.0)
    model.sapt.init_key(pixel_values=images())
    base = vision_model("vit").requires_grad_(False)
    router, pooled = model.sapt.router, ImageQueries(base, 1, "mean")(images())
    expected = query(pooled, router.projection).mean(0)
    torch.testing.assert_close(router.keys.trainable.detach()[0], expected.detach())
    assert pooled.shape == (3, WIDTH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sapt.route(), "pixel_values: got None"),
        (lambda m: m.sapt.reflection_loss(pixel_values=images()), "target: got None"),
        (lambda m: m(pixel_values=images()[:, :1]), r"pixel_values: got shape \(3, 1, 12, 12\)"),
        (lambda m: m(pixel_values=images(size=8)), "pixel_values: got images of 8 x 8"),
        (
            lambda m: sapt_fast.patch(vision_model("vit"), SaptConfig(standardize_query=True)),
            "standardize_query: got True for an image model",
        ),
        (
            lambda m: sapt_fast.patch(vision_model("siglip"), SaptConfig(query_pooling="cls")),
            "pooling: got 'cls'",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(patched())
