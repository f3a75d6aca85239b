"""Checkpoints of the original SAPT code: recorded ones, and hostile or damaged ones."""

import dataclasses
import importlib.util
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny

import sapt_fast
from sapt_fast import SaptConfig

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "data" / "oracle"
KINDS = ("t5", "llama")

_spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def base_model(kind):
    """(the model that a recorded run started from, the run's tensors)."""
    recording = parity.Recording(ORACLE / kind)
    return recording.base_model(), recording.tensors


def folders(root, count=3):
    return [root / f"task{task}" / "saved_weights" for task in range(count)]


@pytest.fixture
def copied(tmp_path):
    """(the folders of the T5 run in a place of their own)."""
    shutil.copytree(ORACLE / "t5", tmp_path / "run")
    return folders(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
class TestRecorded:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_attention_and_generated_tokens(self, kind, count):
        model, tensors = base_model(kind)
        assert sapt_fast.load_official(model, folders(ORACLE / kind, count)) is model
        task = f"task{count - 1}.eval"
        ids = tensors[f"{task}.input_ids"]
        with torch.no_grad():
            attention = model.sapt.route(input_ids=ids)
        expected = tensors[f"{task}.attention"].flip(-1)
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=parity.NEW_TOKENS,
            do_sample=False,
        )
        assert torch.equal(generated, tensors[f"{task}.generated"])

    def test_config_names_and_targets(self, kind):
        model, tensors = base_model(kind)
        sapt_fast.load_official(model, folders(ORACLE / kind))
        assert model.sapt.config == SaptConfig.official(kind, "superni")
        assert model.sapt.tasks == ["task0", "task1", "task2"]
        for index, (name, target) in enumerate(model.sapt.targets.items()):
            expected = tensors[f"{name}.eval.attention"].mean(0).flip(0)
            assert target.shape == (index + 1,)
            torch.testing.assert_close(target, expected, rtol=0, atol=1e-5)

    def test_through_our_own_format(self, kind, tmp_path):
        model, _ = base_model(kind)
        sapt_fast.load_official(model, folders(ORACLE / kind))
        model.sapt.save_pretrained(tmp_path)
        again, _ = base_model(kind)
        sapt_fast.load_pretrained(again, tmp_path)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
        assert all(torch.equal(again.sapt.targets[n], t) for n, t in model.sapt.targets.items())

    def test_patched_model_without_tasks(self, kind):
        model, _ = base_model(kind)
        config = SaptConfig.official(kind, "superni")
        config.kl_ratio = 7.0
        sapt_fast.patch(model, config)
        sapt_fast.load_official(model, folders(ORACLE / kind))
        assert model.sapt.config.kl_ratio == 7.0
        assert len(model.sapt.tasks) == 3


def test_released_tasks_in_float32_on_a_bfloat16_model():
    plain, _ = base_model("t5")
    sapt_fast.load_official(plain, folders(ORACLE / "t5"))
    model, _ = base_model("t5")
    config = dataclasses.replace(plain.sapt.config, autocast_adapter_dtype=True)
    sapt_fast.load_official(model.bfloat16(), folders(ORACLE / "t5"), config)
    assert model.shared.weight.dtype == torch.bfloat16
    for path, pool in model.sapt.pools.items():
        for got, expected in zip(pool.adapter(2), plain.sapt.pools[path].adapter(2), strict=True):
            assert torch.equal(got, expected)
    for name, value in plain.sapt.router.state_dict().items():
        assert torch.equal(model.sapt.router.state_dict()[name], value)


class TestNames:
    @pytest.mark.parametrize("inner", ["saved_weights", ""], ids=["saved_weights", "bare"])
    def test_number_of_the_order_is_left_out(self, inner, tmp_path):
        task = tmp_path / "1-task1572_samsum_summary" / inner
        shutil.copytree(ORACLE / "t5" / "task0" / "saved_weights", task)
        model, _ = base_model("t5")
        sapt_fast.load_official(model, [str(task)])
        assert model.sapt.tasks == ["task1572_samsum_summary"]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def change(path, edit):
    value = torch.load(path, weights_only=True)
    torch.save(edit(value), path)


def write_pickle(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))


def without(name):
    return lambda entries: {k: v for k, v in entries.items() if not k.endswith(name)}


def renamed(old, new):
    return lambda entries: {k.replace(old, new): v for k, v in entries.items()}


SPOILED = {
    "no folder": (lambda f: shutil.rmtree(f[1]), FileNotFoundError, "is not a folder"),
    **{
        f"no {name}": (lambda f, name=name: (f[1] / name).unlink(), FileNotFoundError, name)
        for name in (
            "trans_input.pt", "lora_weights_A.pt", "lora_weights_B.pt", "prompts_keys_till_now.pt",
            "attention_weights.pkl",
        )
    },
    "truncated tensors": (
        lambda f: (f[2] / "lora_weights_A.pt").write_bytes(
            (f[2] / "lora_weights_A.pt").read_bytes()[:3000]
        ),
        ValueError, r"lora_weights_A.pt: damaged",
    ),
    "empty tensors": (
        lambda f: (f[2] / "lora_weights_A.pt").write_bytes(b""), ValueError, "damaged"
    ),
    "truncated attention": (
        lambda f: (f[2] / "attention_weights.pkl").write_bytes(
            (f[2] / "attention_weights.pkl").read_bytes()[:100]
        ),
        ValueError, "not a pickled numpy array",
    ),
    "attention of another length": (
        lambda f: shutil.copy(f[1] / "attention_weights.pkl", f[2]), ValueError, "expected 3 finite"
    ),
    "attention with NaN": (
        lambda f: write_pickle(f[2] / "attention_weights.pkl", np.full(3, np.nan, np.float32)),
        ValueError, "expected 3 finite",
    ),
    "attention of objects": (
        lambda f: write_pickle(f[2] / "attention_weights.pkl", np.array([1, "x", None], object)),
        ValueError, "expected floats",
    ),
    "attention is a list": (
        lambda f: write_pickle(f[2] / "attention_weights.pkl", [0.2, 0.3, 0.5]),
        ValueError, "not a pickled numpy array",
    ),
    "another run": (
        lambda f: change(
            f[1] / "lora_weights_A.pt", lambda x: {k: v + 1 for k, v in x.items()}
        ),
        ValueError, "does not continue",
    ),
    "other keys": (
        lambda f: change(f[0] / "prompts_keys_till_now.pt", lambda x: x + 1),
        ValueError, "does not continue",
    ),
    "keys of another count": (
        lambda f: change(f[2] / "prompts_keys_till_now.pt", lambda x: x[1:]),
        ValueError, r"expected keys \[3, D\]",
    ),
    "keys of another width": (
        lambda f: [change(x / "prompts_keys_till_now.pt", lambda x: x[:, 1:]) for x in f],
        ValueError, r"prompts_keys_till_now\.pt, router: keys: got",
    ),
    "projection of other names": (
        lambda f: change(f[2] / "trans_input.pt", without("3.bias")), ValueError, "3.weight"
    ),
    "projection of another shape": (
        lambda f: change(f[2] / "trans_input.pt", lambda x: {**x, "1.weight": torch.ones(3, 3)}),
        ValueError, "up.weight",
    ),
    "one of the previous missing": (
        lambda f: change(
            f[2] / "lora_weights_A.pt", without("SelfAttention.previous_lora_weights_q.1.lora_A")
        ),
        ValueError, "expected A and B of 3 tasks",
    ),
    "foreign entry": (
        lambda f: change(f[2] / "lora_weights_A.pt", lambda x: {**x, "a.weight": torch.ones(2, 2)}),
        ValueError, "not a LoRA entry",
    ),
    "adapters of another shape": (
        lambda f: [
            change(x / "lora_weights_B.pt", lambda x: {k: v[1:] for k, v in x.items()}) for x in f
        ],
        ValueError, "expected floats of shape",
    ),
    "layers that the model lacks": (
        lambda f: [
            change(x / f"lora_weights_{s}.pt", renamed("block.1", "block.7"))
            for x in f for s in "AB"
        ],
        ValueError, "has no layer",
    ),
    "layers that the config leaves out": (
        lambda f: [
            change(x / f"lora_weights_{s}.pt", renamed("_q", "_o")) for x in f for s in "AB"
        ],
        ValueError, "other layers",
    ),
}  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize("name", SPOILED)
    def test_spoiled_folder(self, name, copied):
        spoil, error, message = SPOILED[name]
        spoil(copied)
        model, _ = base_model("t5")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(error, match=message):
            sapt_fast.load_official(model, copied)
        assert not hasattr(model, "sapt")
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    def test_wrong_order(self, copied):
        with pytest.raises(ValueError, match="expected keys"):
            sapt_fast.load_official(base_model("t5")[0], copied[::-1])

    def test_arguments(self, copied):
        model, _ = base_model("t5")
        with pytest.raises(TypeError, match="directories: got"):
            sapt_fast.load_official(model, str(copied[0]))
        with pytest.raises(ValueError, match="directories: got none"):
            sapt_fast.load_official(model, [])
        with pytest.raises(ValueError, match="expected distinct"):
            sapt_fast.load_official(model, [copied[0], copied[0]])
        with pytest.raises(ValueError, match="config: got r=8"):
            sapt_fast.load_official(model, copied, SaptConfig.official("t5", "long_sequence"))
        config = SaptConfig.official("t5", "superni")
        config.standardize_query = True
        with pytest.raises(ValueError, match="query_mean, query_std missing"):
            sapt_fast.load_official(model, copied, config)
        assert not hasattr(model, "sapt")

    @pytest.mark.parametrize(
        ("family", "message"),
        [("llama", "has no layer"), ("gpt2", "has no settings"), ("t5", "floats of shape")],
    )
    def test_another_model(self, family, message, copied):
        model = tiny(family)
        with pytest.raises(ValueError, match=message):
            sapt_fast.load_official(model, copied)
        assert not hasattr(model, "sapt")

    def test_model_with_tasks(self, copied):
        model, _ = base_model("t5")
        sapt_fast.load_official(model, copied)
        with pytest.raises(ValueError, match="got one with tasks"):
            sapt_fast.load_official(model, copied)


class TestHostileFiles:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in an array"])
    def test_pickle(self, protocol, wrapped, copied, tmp_path):
        mark = tmp_path / "executed"
        value = np.array([Hostile(mark), 1, 2], object) if wrapped else Hostile(mark)
        write_pickle(copied[2] / "attention_weights.pkl", value, protocol)
        with pytest.raises(ValueError, match="not a pickled numpy array"):
            sapt_fast.load_official(base_model("t5")[0], copied)
        assert not mark.exists()
        pickle.loads((copied[2] / "attention_weights.pkl").read_bytes())
        assert mark.exists(), "the file does nothing when it is trusted"

    @pytest.mark.parametrize(
        "name", ["trans_input", "lora_weights_A", "lora_weights_B", "prompts_keys_till_now"]
    )
    def test_torch_file(self, name, copied, tmp_path):
        mark = tmp_path / "executed"
        torch.save({"x": Hostile(mark)}, copied[2] / f"{name}.pt")
        with pytest.raises(ValueError, match="damaged, or contains more than tensors"):
            sapt_fast.load_official(base_model("t5")[0], copied)
        assert not mark.exists()

    @pytest.mark.parametrize(
        "name",
        ["numpy.ndarray.tofile", "numpy.load", "builtins.eval", "numpy.core.multiarray.scalar"],
    )
    def test_other_names(self, name, copied):
        module, _, attribute = name.rpartition(".")
        module, _, owner = module.rpartition(".") if "ndarray" in name else (module, "", "")
        attribute = f"{owner}.{attribute}" if owner else attribute
        text = b"".join(
            b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)
        )
        (copied[2] / "attention_weights.pkl").write_bytes(b"\x80\x04" + text + b"\x93.")
        with pytest.raises(ValueError, match="refuses " + name.replace(".", r"\.")):
            sapt_fast.load_official(base_model("t5")[0], copied)

    @pytest.mark.parametrize("protocol", [3, 4, 5])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
    def test_what_numpy_writes_is_read(self, protocol, dtype, copied):
        vector = np.array([0.25, 0.25, 0.5], dtype)
        write_pickle(copied[2] / "attention_weights.pkl", vector, protocol)
        model, _ = base_model("t5")
        sapt_fast.load_official(model, copied)
        assert model.sapt.targets["task2"].tolist() == [0.5, 0.25, 0.25]
