"""What saves a patched model's state_dict loses none of it."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_models import patched, token_ids
from transformers import Trainer, TrainingArguments

from sapt_fast.pools.lora import RowStack


def ours(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "sapt" in n}


def step(model, optimizer):
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize(("tasks", "reserve"), [(1, 1), (1, 16), (3, 16)])
def test_accelerate_saves_and_loads_its_state(family, tasks, reserve, tmp_path):
    model = patched(family, tasks=tasks, reserve_tasks=reserve)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=0.01)
    called, optimizer = accelerator.prepare(model, optimizer)
    step(called, optimizer)
    accelerator.save_state(tmp_path)
    saved, losses = ours(model), [step(called, optimizer) for _ in range(2)]
    assert losses[0] != losses[1]
    assert saved.keys() <= load_file(tmp_path / "model.safetensors").keys()
    accelerator.load_state(tmp_path)
    for name, value in ours(model).items():
        assert torch.equal(value, saved[name]), name
    assert [step(called, optimizer) for _ in range(2)] == losses


@pytest.mark.parametrize("family", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_transformers_trainer_resumes(family, tmp_path):
    ids = token_ids(8)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(checkpoint=None):
        model = patched(family)
        arguments = TrainingArguments(
            tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(checkpoint)
        return ours(model)

    whole, resumed = trained(), trained(str(tmp_path / "checkpoint-2"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_safetensors_saves_and_loads_a_model(tmp_path):
    model, other = patched("llama"), patched("llama", seed=3)
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    for name, value in ours(model).items():
        assert torch.equal(ours(other)[name], value), name
    save_file(model.state_dict(), tmp_path / "state.safetensors")


def test_a_state_dict_is_the_parameters_own_memory():
    """As torch says of every module: writing to it writes to the module."""
    stack = RowStack(3, 8, device=torch.device("cpu"), dtype=torch.bfloat16)
    stack.append(2, lambda rows: rows.fill_(1))
    stack.append(3, lambda rows: rows.fill_(2))
    state = stack.state_dict()
    for name, rows in state.items():
        assert rows.data_ptr() == getattr(stack, name).data_ptr()
        assert rows.untyped_storage().nbytes() == rows.nbytes
    state["trainable"].fill_(5)
    assert stack.rows()[:, 0].tolist() == [1, 1, 5, 5, 5]
    kept = stack.state_dict(keep_vars=True)
    assert kept["trainable"] is stack.trainable
    del stack, kept
    assert state["frozen"].tolist() == [[1] * 3] * 2
    meta = RowStack(3, 8, device=torch.device("meta"), dtype=torch.float32)
    assert meta.state_dict()["frozen"].is_meta
