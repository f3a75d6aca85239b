"""Image folders: splits, transforms, the class mask, and bad input, which is named."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_images import write_images

from sapt_fast.continual.data.classes import ClassSpace, mask_other_classes
from sapt_fast.continual.data.image_folders import draw_images, read_image_tasks
from sapt_fast.continual.data.image_transform import ImageTransform, _random_box
from sapt_fast.continual.image_bench import ImageRows
from sapt_fast.demo.images import DEMO_CLASSES

TRANSFORM = ImageTransform((16, 16), (16, 16))
FOUR = DEMO_CLASSES[:4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", FOUR, 4)
    write_images(tmp_path / "test", FOUR, 2)
    return tmp_path


def read(folder: Path, **options: Any) -> Any:
    return read_image_tasks(folder, **{"classes_per_task": 2, "transform": TRANSFORM, **options})


def test_classes_are_cut_into_tasks_by_the_seed(folder: Path) -> None:
    tasks = read(folder)
    assert [task.name for task in tasks] == ["classes1", "classes2"]
    assert sorted(label for task in tasks for label in task.labels) == sorted(FOUR)
    orders = {tuple(t.labels for t in read(folder, seed=seed)) for seed in range(5)}
    assert len(orders) > 1
    assert [task.labels for task in read(folder, class_order="sorted")] == [FOUR[:2], FOUR[2:]]
    for task in tasks:
        assert {row.output for row in task.test} == set(task.labels)
        # One of four training images of each class is held out for dev.
        assert (len(task.train), len(task.dev), len(task.test)) == (6, 2, 4)
        assert not {row.input for row in task.train} & {row.input for row in task.dev}
    assert read(folder)[0].describe() == tasks[0].describe()
    shared = read(folder, dev="in_train")[0]
    assert (len(shared.train), len(shared.dev)) == (8, 2)
    file = folder / tasks[0].train[0].input
    before = tasks[0].describe()["digest"]
    Image.open(file).rotate(90).save(file)
    assert read(folder)[0].describe()["digest"] != before


def test_warns_of_test_images_that_are_trained_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(folder)
    assert not caplog.records
    (folder / "test/checks/1.png").write_bytes((folder / "train/checks/0.png").read_bytes())
    read(folder, dev="in_train")
    assert "1 test images are also training images" in caplog.text
    assert "test/checks/1.png" in caplog.text


def test_one_folder_of_classes_holds_test_images_out(tmp_path: Path) -> None:
    write_images(tmp_path, FOUR[:2], 10)
    (task,) = read(tmp_path)
    parts = [{row.input for row in getattr(task, part)} for part in ("train", "dev", "test")]
    assert [len(part) for part in parts] == [14, 2, 4]
    assert len(set.union(*parts)) == 20


def test_domains_and_tasks(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_images(tmp_path / "domains" / name, FOUR[:2], 4)
    for name, labels in (("x", FOUR[:2]), ("y", FOUR[2:])):
        write_images(tmp_path / "tasks" / name, labels, 4)
    domains = read(tmp_path / "domains", split="domains", classes_per_task=None)
    assert [(task.name, task.labels) for task in domains] == [("a", FOUR[:2]), ("b", FOUR[:2])]
    tasks = read(tmp_path / "tasks", split="tasks", classes_per_task=None, tasks="y,x")
    assert [(task.name, task.labels) for task in tasks] == [("y", FOUR[2:]), ("x", FOUR[:2])]
    with pytest.raises(ValueError, match="b: has the class 'checks', as has the task 'a'"):
        read(tmp_path / "domains", split="tasks", classes_per_task=None)
    with pytest.raises(ValueError, match="y: differs from x in the classes"):
        read(tmp_path / "tasks", split="domains", classes_per_task=None)


def test_training_images_are_drawn_evenly_over_classes(folder: Path) -> None:
    image = (folder / "train" / FOUR[0] / "0.png").read_bytes()
    for number in range(40):
        (folder / "train" / FOUR[0] / f"more{number}.png").write_bytes(image)
    (task,) = read(folder, classes_per_task=4)  # 40 of a class, 3 of others
    for seed, limit in ((0, 4), (1, 4), (0, 6), (0, 20)):
        drawn = draw_images(task, limit, 2, seed)
        counts = [sum(row.output == label for row in drawn.train) for label in task.labels]
        assert sum(counts) == limit
        assert min(counts) >= min(3, limit // 4)
        assert (len(drawn.dev), len(drawn.test)) == (2, 2)
        assert drawn == draw_images(task, limit, 2, seed)
    assert draw_images(task, 4, None, 0).train != draw_images(task, 4, None, 1).train
    assert draw_images(task, 400, None, 0) == task
    with pytest.raises(ValueError, match="max_train: got 3 for the 4 classes of task 'classes1'"):
        draw_images(task, 3, None, 0)


def _linked(folder: Path) -> None:
    (folder / "train" / "zebra").symlink_to(folder / "train" / "checks")


def _grey(folder: Path) -> None:
    Image.new("L", (16, 16)).save(folder / "train/checks/1.png")


def _transparent(folder: Path) -> None:
    Image.new("RGBA", (16, 16)).save(folder / "train/checks/1.png")


def _damaged(folder: Path) -> None:
    file = folder / "train/checks/1.png"
    file.write_bytes(file.read_bytes()[:-200])


def _emptied(folder: Path) -> None:
    for file in (folder / "train/checks").iterdir():
        file.unlink()


def _unknown(folder: Path) -> None:
    write_images(folder / "test", ["upper"], 1)


def _text(folder: Path) -> None:
    (folder / "train/checks/notes.txt").write_text("notes")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_linked, r"train/zebra: got the same folder as .*train/checks, expected a folder of its"),
        (_grey, r"train/checks/1.png: got an image of mode 'L', expected 'RGB'"),
        (_transparent, r"train/checks/1.png: got an image of mode 'RGBA', expected 'RGB'"),
        (_damaged, r"train/checks/1.png: cannot be read as an image"),
        (_emptied, r"train/checks: got a class without images"),
        (_unknown, r"test: got classes \['upper'\] that train/ lacks"),
        (_text, r"train/checks/notes.txt: got a file in the folder of a class"),
    ],
)
def test_bad_folders_are_named(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_bad_options_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes_per_task: got 3 for 4 classes"):
        read(folder, classes_per_task=3)
    with pytest.raises(ValueError, match=r"0.png: got an image of 16 x 16 pixels, expected 8 x 8"):
        read(folder, transform=ImageTransform((8, 8)))
    with pytest.raises(ValueError, match="got no folders of classes"):
        read(folder / "train/checks")


def test_transform_equals_the_models_own_processor() -> None:
    from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

    values = np.random.default_rng(0).integers(0, 256, (41, 30, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    for processor in (
        ViTImageProcessorPil(size={"height": 16, "width": 12}),
        CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}),
    ):
        transform = ImageTransform.of_processor(processor.to_dict())
        expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-5)


STORED = {"size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_crops_of_long_images_have_the_ratio_that_is_nearest() -> None:
    assert _random_box(300, 3, random.Random(0)) == (148, 0, 152, 3)  # as torchvision's
    assert _random_box(3, 300, random.Random(0)) == (0, 148, 3, 152)


def test_values_that_a_processor_leaves_out_are_its_defaults() -> None:
    clip = ImageTransform.of_processor(
        {**STORED, "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 12}
    )
    assert (clip.resize, clip.size, clip.resample) == (16, (12, 12), 3)  # of the shorter edge
    deit = ImageTransform.of_processor(
        {**STORED, "feature_extractor_type": "DeiTFeatureExtractor", "crop_size": 12}
    )
    assert (deit.resize, deit.size, deit.resample) == ((16, 16), (12, 12), 3)
    plain = ImageTransform.of_processor(STORED)
    assert (plain.resize, plain.size, plain.resample) == ((16, 16), (16, 16), 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": None}, "got no image_mean"),
        ({"do_center_crop": True}, "got no crop_size"),
        ({"size": {"shortest_edge": 16}}, "size: got shortest_edge 16 without a crop"),
        ({"size": {"shortest_edge": 16, "longest_edge": 20}}, "size: got {'shortest_edge'"),
        ({"size": "16"}, "size: got '16'"),
        ({"resample": 9}, "resample: got 9"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "std: got nan"),
    ],
)
def test_processors_that_cannot_be_followed_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform.of_processor({**STORED, **values})


def test_converts_where_asked_and_augments_by_the_seed() -> None:
    convert = ImageTransform((2, 2), convert=True)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    torch.testing.assert_close(convert(clear), torch.ones(3, 2, 2))  # white
    marked = Image.new("RGB", (2, 2), (10, 20, 30))
    marked.info["transparency"] = (10, 20, 30)
    torch.testing.assert_close(convert(marked), torch.ones(3, 2, 2))
    grey = Image.new("L", (2, 2), 51)
    torch.testing.assert_close(convert(grey), torch.full((3, 2, 2), 0.2))
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    transform = ImageTransform((4, 4))
    whole = transform(image)
    flips = [transform.augmented(image, "flip", random.Random(seed)) for seed in range(8)]
    assert {torch.equal(made, whole) for made in flips} == {True, False}
    assert all(torch.equal(made, whole) or torch.equal(made, whole.flip(2)) for made in flips)
    crops = [transform.augmented(image, "crop_flip", random.Random(3)) for _ in range(2)]
    assert torch.equal(*crops)
    assert not torch.equal(crops[0], whole)


def test_mask_leaves_the_classes_of_the_task_alone() -> None:
    logits = torch.randn(5, 1, 4, requires_grad=True)
    space = ClassSpace(("a", "b", "c", "d")).of_task(("d", "b"))
    own = [1, 3]

    class Outputs:
        logits: torch.Tensor

    outputs = Outputs()
    outputs.logits = logits[:, 0]
    trained = space.logits(outputs, {})
    labels = torch.tensor([1, 3, 3, 1, 3])
    F.cross_entropy(trained[:, 0], labels).backward()
    assert logits.grad is not None
    assert not logits.grad[..., [0, 2]].any()
    expected = F.cross_entropy(logits[:, 0, own], torch.tensor([0, 1, 1, 0, 1]))
    torch.testing.assert_close(F.cross_entropy(trained[:, 0], labels), expected)
    assert torch.equal(replace(space, own=None).logits(outputs, {}), logits)
    assert ClassSpace(("a", "b")).of_task(("b", "a")).own is None
    with pytest.raises(ValueError, match=r"own: got torch.bool \[4\] with 0 classes"):
        mask_other_classes(logits, torch.zeros(4, dtype=torch.bool))


def test_augmentation_depends_on_seed_epoch_and_image(folder: Path) -> None:
    task = read(folder)[0]

    def drawn(epoch: int, seed: int = 0) -> list[bool]:
        rows = ImageRows(task.train, TRANSFORM, ClassSpace(task.labels), "flip", seed)
        rows.set_epoch(epoch)
        return [torch.equal(rows[i]["pixel_values"], TRANSFORM(task.train[i].image()))
                for i in range(len(rows))]  # fmt: skip

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(epoch)) for epoch in range(4)}) > 1
    assert drawn(0) != drawn(0, seed=1)
