"""Two gloo processes give what one gives: DDP, FSDP2, saving and resuming."""

import json
from pathlib import Path

import pytest
import torch
from gloo_processes import Processes
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def processes():
    with Processes() as running:
        yield running


def same(one: dict, other: dict) -> None:
    """The two have equal losses and weights, and the weights are not all zero."""
    torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-6, atol=0)
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_two_tasks_in_turn(kind, processes, tmp_path):
    processes.run("train", 1, tmp_path, kind=kind, how="plain")
    one = torch.load(tmp_path / f"{kind}-plain.pt")
    assert len(set(one["losses"])) == 4
    for how in ("ddp", "fsdp"):
        processes.run("train", 2, tmp_path, kind=kind, how=how)
        same(one, torch.load(tmp_path / f"{kind}-{how}.pt"))


@pytest.mark.parametrize(
    "recompute", ["not reentrant", pytest.param("reentrant", marks=pytest.mark.thorough)]
)
def test_recomputed_activations(recompute, processes, tmp_path):
    processes.run("train", 1, tmp_path, kind="t5", how="plain")
    one = torch.load(tmp_path / "t5-plain.pt")
    for how in ("ddp", "fsdp"):
        processes.run("train", 2, tmp_path, kind="t5", how=how, recompute=recompute)
        same(one, torch.load(tmp_path / f"t5-{how}.pt"))


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("t5", "bfloat16"),
        ("llama", "float16"),
        pytest.param("t5", "float16", marks=pytest.mark.thorough),
        pytest.param("llama", "bfloat16", marks=pytest.mark.thorough),
    ],
)
def test_mixed_precision(kind, half, processes, tmp_path):
    """An overflow skips the step of all processes; the others move as one process does."""
    for world in (1, 2):
        processes.run("train_amp", world, tmp_path, kind=kind, half=half)
    one, two = (torch.load(tmp_path / f"amp-{world}.pt") for world in (1, 2))
    assert (two - one).norm() <= {"bfloat16": 2e-2, "float16": 5e-3}[half] * one.norm()


def test_accelerate_shards_a_model(processes, tmp_path):
    for world in (1, 2):
        processes.run("train_accelerate", world, tmp_path, kind="llama")
    same(*(torch.load(tmp_path / f"llama-{name}.pt") for name in ("plain", "accelerate")))
    for path in Path("task0", "adapter_model.safetensors"), Path("router.safetensors"):
        one, two = (load_file(tmp_path / name / path) for name in ("plain", "accelerate"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_peft_model(processes, tmp_path):
    processes.run("train_peft", 1, tmp_path, kind="llama", how="plain")
    one = torch.load(tmp_path / "llama-plain.pt")
    for how in ("ddp", "fsdp"):
        processes.run("train_peft", 2, tmp_path, kind="llama", how=how)
        same(one, torch.load(tmp_path / f"llama-{how}.pt"))


@pytest.mark.parametrize(
    ("first", "second"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.thorough)]
)
def test_resuming_with_another_number_of_processes(first, second, processes, tmp_path):
    processes.run("resume", 1, tmp_path, kind="t5", part="whole")
    processes.run("resume", first, tmp_path, kind="t5", part="first")
    processes.run("resume", second, tmp_path, kind="t5", part="second")
    one, two = (torch.load(tmp_path / f"{part}.pt") for part in ("whole", "second"))
    same({**one, "losses": one["losses"][2:]}, two)


def test_what_would_go_wrong_without_a_word_raises(processes, tmp_path):
    processes.run("refusals", 2, tmp_path)


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_a_sharded_model_saves_the_same_files(kind, processes, tmp_path):
    written = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        processes.run("save", world, folder, kind=kind)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert Path("tasks/task1/adapter_model.safetensors") in written[0]
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_trainer(kind, processes, tmp_path):
    """Losses, reflection and weights; resumed with the other number of processes as well."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        processes.run("run_trainer", world, folder, kind=kind)
        found[world] = torch.load(folder / f"trainer-{world}-False.pt")
        assert (folder / "saved" / "task2" / "adapter_model.safetensors").is_file()
    close(found[1], found[2])
    processes.run("run_trainer", 1, tmp_path / "2", kind=kind, resume=True)
    close(found[1], torch.load(tmp_path / "2" / "trainer-1-True.pt"))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("llama", "fsdp"),
        *((kind, how) for kind in ("t5", "llama") for how in ("zero2", "zero3")),
    ],
)
def test_trainer_that_shards(kind, how, processes, tmp_path):
    """As one process: losses, reflection, weights, the saved files; resumed as well."""
    if how != "fsdp":
        pytest.importorskip("deepspeed")
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"how": how} if world > 1 else {}
        processes.run("run_trainer", world, folder, timeout=240, kind=kind, **options)
        found[world] = torch.load(folder / f"trainer-{world}-False.pt")
    close(found[1], found[2])
    for path in Path("task2", "adapter_model.safetensors"), Path("router.safetensors"):
        one, two = (load_file(tmp_path / world / "saved" / path) for world in "12")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    resumed = {"kind": kind, "how": how, "resume": True}
    processes.run("run_trainer", 2, tmp_path / "2", timeout=240, **resumed)
    close(found[1], torch.load(tmp_path / "2" / "trainer-2-True.pt"))


def close(one: dict, other: dict) -> None:
    """`same`, for float32."""
    torch.testing.assert_close(
        other["losses"][: len(one["losses"])], one["losses"], rtol=1e-4, atol=1e-5
    )
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_continual_run(processes, tmp_path):
    """Two processes, and two that are stopped and go on as one, come to what one comes to."""
    processes.run("run_continual", 1, tmp_path, name="one")
    processes.run("run_continual", 2, tmp_path, name="two")
    processes.run("run_continual", 2, tmp_path, name="both", stop=1)
    processes.run("run_continual", 1, tmp_path, name="both")
    expected = json.loads((tmp_path / "one" / "results.json").read_text())
    weights = torch.load(tmp_path / "one-weights.pt")["state"]
    for name in ("two", "both"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["scores"] == expected["scores"]
        found = torch.load(tmp_path / f"{name}-weights.pt")
        assert found["losses"] == ([0, 1, 2] if name == "two" else [1, 2])
        for path, value in weights.items():
            torch.testing.assert_close(found["state"][path], value, rtol=1e-6, atol=1e-9)
        files = {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")}
        assert files == {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*")}


def test_comparison(processes, tmp_path):
    """Two processes come to the scores and weights of one and write the same files."""
    written = []
    for world in (1, 2):
        processes.run("run_comparison", world, tmp_path, timeout=240, name=str(world))
        folder = tmp_path / str(world)
        report = json.loads((folder / "compare.json").read_text())
        cells = {cell["row"]: (cell["scores"], cell["alone"]) for cell in report["cells"]}
        files = {p.relative_to(folder) for p in folder.rglob("*") if "tfevents" not in p.name}
        written.append((cells, files))
        assert len(list(folder.glob("tensorboard/*/*/*tfevents*"))) == 2
    assert written[0][0].keys() == {"sapt", "seqlora"}
    assert written[0] == written[1]
    paths = [path for path in written[0][1] if path.suffix == ".safetensors"]
    assert len(paths) > 8
    for path in paths:
        one, two = (load_file(tmp_path / name / path) for name in "12")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def test_continual_runs_that_need_one_process(processes, tmp_path):
    processes.run("refuse_continual", 2, tmp_path)


def test_commands_print_in_the_first_process_alone(processes, tmp_path):
    processes.run("run_commands", 2, tmp_path, timeout=240)
    first, second = (
        json.loads((tmp_path / f"printed-{rank}.json").read_text()) for rank in range(2)
    )
    assert second == dict.fromkeys(first, "")
    for command, text in (
        ("single", "last_first: "),
        ("train", "AP"),
        ("eval", "largest deviation from results.json: 0"),
        ("compare", "seqlora"),
    ):
        assert text in first[command]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_sharded_bank_is_that_of_one_process(world, processes, tmp_path):
    """Search with equal keys, training, saving; loaded by other numbers of processes as well."""
    processes.run("plain_bank", 1, tmp_path)
    plain = torch.load(tmp_path / "plain.pt")
    for size in (1, world):
        processes.run("sharded_bank", size, tmp_path)
        found = torch.load(tmp_path / f"sharded-{size}-float32.pt")
        assert torch.equal(found[1], plain[1])  # the chosen experts
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert (plain[1] == 2).any()
    processes.run("resharded_bank", world, tmp_path, saved=1)
    processes.run("resharded_bank", 1, tmp_path, saved=world)
    for first, second in zip(
        torch.load(tmp_path / f"loaded-1-{world}.pt"),
        torch.load(tmp_path / f"loaded-{world}-1.pt"),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_traffic_of_a_sharded_bank_is_that_of_its_page(processes, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "deploy" / "memory_experts.md"
    names = {}
    code = page.read_text().partition("```python\nfrom math import ceil")[2].partition("```")[0]
    exec("from math import ceil" + code, names)
    processes.run("bank_traffic", 2, tmp_path)
    found = json.loads((tmp_path / "traffic.json").read_text())
    assert found == list(names["received"](2, 4, 6, 4, 3, 4, reached=0.5).values())


def test_a_bank_killed_in_a_save_resumes_to_the_same_bits(processes, tmp_path):
    processes.run("killed_bank", 1, tmp_path)


@pytest.mark.thorough
def test_a_sharded_bank_repeats_bit_for_bit(processes, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        processes.run("sharded_bank", 3, tmp_path / name, dtype="bfloat16")
    one, other = (torch.load(tmp_path / name / "sharded-3-bfloat16.pt") for name in ("a", "b"))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_sharded_memory_is_that_of_one_process(world, processes, tmp_path):
    """Facts are trained, forgotten, answered and saved; loaded by other numbers of processes."""
    for size in (1, world):
        (tmp_path / str(size)).mkdir()
        processes.run("sharded_mome", size, tmp_path / str(size))
    one, two = (torch.load(tmp_path / str(size) / f"mome-{size}-0.pt") for size in (1, world))
    assert torch.equal(one[1], two[1])  # the experts
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)
    processes.run("sharded_mome", world, tmp_path / "1", loaded=1)
    for first, second in zip(one, torch.load(tmp_path / "1" / f"mome-{world}-1.pt"), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_a_sharded_memory_resumes_after_a_kill(processes, tmp_path):
    for at in ("whole", 0, 2):
        folder = tmp_path / str(at)
        folder.mkdir()
        if at != "whole":
            with pytest.raises(AssertionError, match="rank 1 of 2: status 9"):
                processes.run("killed_mome", 2, folder, timeout=200, at=at)
        processes.run("killed_mome", 2, folder, timeout=200)
        for process in range(2):
            banks = [torch.load(tmp_path / str(n) / f"rows-{process}.pt") for n in ("whole", at)]
            for one, other in zip(*banks, strict=True):
                assert all(map(torch.equal, one.values(), other.values()))
