"""Parts of vision transformers, and the queries of images."""

import copy

import pytest
import torch
import transformers
from tiny_vision import PATCHES, SIZE, VISION, WIDTH, images, vision_model

from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.image_queries import ImageQueries

PREFIX = {"deit": 2, "registers": 3, "siglip": 0}


@pytest.mark.parametrize("family", VISION)
def test_parts_and_queries_of_every_family(family):
    model = vision_model(family).requires_grad_(False)
    parts, pixels = vision_parts(model), images()
    hidden = []
    parts.layers[1].register_forward_hook(lambda m, a, y: hidden.append(y))
    parts.norm.register_forward_hook(lambda m, a, y: hidden.append(y))
    last = parts.tower(pixels).last_hidden_state
    assert (parts.prefix, parts.width) == (PREFIX.get(family, 1), WIDTH)
    assert parts.image_size == (SIZE, SIZE)
    assert parts.classifier is model.classifier
    assert last.shape == (3, parts.prefix + PATCHES, WIDTH) == hidden[0].shape
    model.train()  # dropout takes no part, nor do hooks
    second = ImageQueries(model, layer=2, pooling="mean")(pixels)
    torch.testing.assert_close(second, hidden[0][:, parts.prefix :].mean(1), atol=1e-6, rtol=1e-5)
    final = ImageQueries(model)(pixels)
    expected = last
    if family in ("clip", "beit"):  # which norm what they pool of the hidden states
        expected = torch.nn.functional.layer_norm(
            last, (WIDTH,), parts.norm.weight, parts.norm.bias, parts.norm.eps
        )
    expected = expected.mean(1) if family == "siglip" else expected[:, 0]
    torch.testing.assert_close(final, expected, atol=1e-6, rtol=1e-5)
    assert len(hidden) == 2
    assert not final.requires_grad


def test_images_of_another_size():
    vit, dino, larger = vision_model("vit"), vision_model("dinov2"), images(size=SIZE + 4)
    vit.requires_grad_(False), dino.requires_grad_(False)
    expected = vit.base_model(larger, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(ImageQueries(vit)(larger, interpolate_pos_encoding=True), expected)
    expected = dino.base_model(larger).last_hidden_state[:, 0]
    torch.testing.assert_close(ImageQueries(dino)(larger), expected)
    with pytest.raises(ValueError, match="got images of 16 x 16, expected 12 x 12"):
        ImageQueries(vit)(larger)


def test_an_encoder_takes_the_place_of_the_model():
    class Colours(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model, pixels = vision_model("vit"), images()
    queries = ImageQueries(model, encoder=Colours().eval())
    assert queries.width == 3
    torch.testing.assert_close(queries(pixels), pixels.mean((2, 3)))
    queries.encoder.train()
    with pytest.raises(RuntimeError, match=r"expected encoder\.eval"):
        queries(pixels)
    with pytest.raises(ValueError, match="the encoder pools its own features"):
        ImageQueries(model, layer=1, encoder=Colours())


def test_queries_follow_the_weights_of_their_own_copy():
    model, pixels = vision_model("vit").requires_grad_(False), images()
    model.queries = ImageQueries(model)
    before = model.queries(pixels)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.embeddings.cls_token += 1
    assert not torch.equal(other.queries(pixels), before)
    assert torch.equal(model.queries(pixels), before)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 1, 12, 12), "expected .B, 3, H, W."),
        ((3, 12, 12), "got shape"),
        ((2, 3, 2, 12), "one patch"),
    ],
)
def test_images_that_do_not_fit_are_named(shape, expected):
    with pytest.raises(ValueError, match=f"pixel_values: .*{expected}"):
        vision_parts(vision_model("dinov2")).require_images(torch.zeros(shape))


def test_models_that_do_not_fit_are_named():
    resnet = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"
    )
    with pytest.raises(ValueError, match=r"model type 'resnet'\) with no vision transformers"):
        vision_parts(transformers.ResNetModel(resnet))
    model = vision_model("siglip")
    with pytest.raises(ValueError, match="pooling: got 'cls' for SiglipVisionModel"):
        ImageQueries(model, pooling="cls")
    with pytest.raises(ValueError, match="layer: got 4, expected 1 to 3"):
        ImageQueries(model, layer=4)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        ImageQueries(model)(images())
    model.requires_grad_(False)
    vision_parts(model).norm.bias.requires_grad_(True)  # above the layers
    ImageQueries(model, layer=3)(images())
    with pytest.raises(RuntimeError, match="bias requires a gradient"):
        ImageQueries(model)(images())
    with pytest.raises(TypeError, match=r"pixel_values: got torch\.uint8"):
        vision_parts(model).require_images(images().byte())
