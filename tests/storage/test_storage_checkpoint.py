"""Saved folders: digests, damage, names, strategies, and PEFT's own configs."""

import errno
import json
import logging
import os
import re
import resource
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import patched, run, tiny, token_ids

import sapt_fast
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.files.names import require_folder_name
from sapt_fast.storage import description
from sapt_fast.storage.task_saving import renew_digests

CONFIG, ROUTER = "sapt_config.json", "router.safetensors"
WEIGHTS = "adapter_model.safetensors"
FAMILY = "llama"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(a patched model with two tasks of one shape, where it is saved)."""
    model = patched(FAMILY, tasks=2)
    model.sapt.targets["task1"] = torch.tensor([0.25, 0.75])
    folder = tmp_path_factory.mktemp("original") / "saved"
    model.sapt.save_pretrained(folder)
    return model, folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original[1], tmp_path / "saved")


def load(folder):
    return sapt_fast.load_pretrained(tiny(FAMILY), folder)


def refused(folder, message, kind=ValueError):
    model = tiny(FAMILY)
    with pytest.raises(kind, match=message) as error:
        sapt_fast.load_pretrained(model, folder)
    assert str(folder) in str(error.value)
    assert not hasattr(model, "sapt")


def edit(folder, change, name=CONFIG):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def age(folder, **fields):
    """Makes a folder one of an earlier version, without digests."""
    edit(folder, lambda c: [c.pop(n) for n in ("method", "strategy", "files", "digest")])
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class TestDigests:
    @pytest.mark.parametrize("name", [ROUTER, f"task0/{WEIGHTS}", "task1/adapter_config.json"])
    @pytest.mark.parametrize("place", [0.5, 0.9, -1])
    def test_one_flipped_bit_anywhere(self, name, place, saved):
        data = bytearray((saved / name).read_bytes())
        data[int(place * len(data)) if place > 0 else -1] ^= 4
        (saved / name).write_bytes(bytes(data))
        refused(saved, re.escape(name))

    def test_one_flipped_bit_of_the_config(self, saved):
        text = (saved / CONFIG).read_text()
        changed = text.replace('"kl_ratio": 0.5', '"kl_ratio": 0.4')
        assert changed != text
        (saved / CONFIG).write_text(changed)
        refused(saved, "content does not match its digest.*renew_digests")

    def test_two_task_folders_exchanged(self, saved):
        for old, new in (("task0", "x"), ("task1", "task0"), ("x", "task1")):
            (saved / old).rename(saved / new)
        refused(saved, 'task0.*got the weights of task "task1"')

    def test_a_file_of_another_save(self, saved, tmp_path):
        other = patched(FAMILY, tasks=2, seed=5)
        other.sapt.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / ROUTER, saved)
        refused(saved, f"{ROUTER}: its SHA-256")

    def test_edited_on_purpose(self, saved, original):
        rewrite(saved / ROUTER, lambda t: t["keys"].mul_(2))
        refused(saved, "renew_digests")
        renew_digests(saved)
        keys = load(saved).sapt.router.keys.rows()
        assert torch.equal(keys, original[0].sapt.router.keys.rows() * 2)

    def test_an_earlier_versions_folder_loads_with_one_warning(self, saved, original, caplog):
        age(saved)
        with caplog.at_level(logging.WARNING):
            model = load(saved)
            load(saved)
        assert [str(saved) in m and "without digests" in m for m in caplog.messages] == [True]
        assert torch.equal(run(model, token_ids()), run(original[0], token_ids()))

    @pytest.mark.parametrize("lost", ["method", "strategy", "files", "digest"])
    def test_a_field_of_the_seal_is_missing(self, lost, saved):
        edit(saved, lambda c: c.pop(lost))
        refused(saved, "fields")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("file", "entry"),
    [
        (f"task1/{WEIGHTS}", None),
        (ROUTER, "keys"),
        (ROUTER, "up.weight"),
        (ROUTER, "targets.task1"),
    ],
)
def test_values_that_are_not_finite(file, entry, value, saved):
    def change(tensors):
        tensors[entry or sorted(tensors)[0]].view(-1)[-1] = value

    rewrite(saved / file, change)
    age(saved)
    refused(saved, f"{re.escape(file)}.*NaN or infinite")


def test_values_that_the_models_dtype_cannot_hold(saved):
    rewrite(saved / f"task0/{WEIGHTS}", lambda t: t[sorted(t)[0]].fill_(1e30))
    age(saved)
    with pytest.raises(ValueError, match=r"task 'task0'.*NaN or infinite"):
        sapt_fast.load_pretrained(tiny(FAMILY).half(), saved)


@pytest.mark.parametrize("scaling", [1e308, -1e308, 10**400, 2.0**31, True, None, "NaN"])
def test_scalings_that_are_not_plausible(scaling, saved):
    if scaling == "NaN":
        text = (saved / CONFIG).read_text().replace('"scaling": 2.0', '"scaling": NaN', 1)
        (saved / CONFIG).write_text(text)
        refused(saved, "NaN is not a JSON number")
        return
    edit(saved, lambda c: c["tasks"][0].update(scaling=scaling))
    refused(saved, "scaling: got")


def test_add_task_and_restore_task_refuse_such_scalings():
    model = patched(FAMILY, tasks=0, r=1, lora_alpha=2**31 - 1)
    with pytest.raises(ValueError, match="scaling: got 2147483647"):
        model.sapt.add_task("a")
    assert model.sapt.tasks == []
    adapters = {
        path: (torch.zeros(1, pool.a.width), torch.zeros(1, pool.b.width), 1e300)
        for path, pool in model.sapt.pools.items()
    }
    with pytest.raises(ValueError, match="scaling: got 1e"):
        model.sapt.restore_task("a", adapters, torch.zeros(32))
    assert all(not pool.ranks for pool in model.sapt.pools.values())


HOSTILE = {
    "deep": b'{"config": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000,
    "zeros": b"\0" * 5000,
    "not UTF-8": b'{"format_version": "\xff"}',
    "key twice": b'{"format_version": 1, "format_version": 1}',
    "infinity": b'{"format_version": Infinity}',
    "digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "huge version": b'{"format_version": ' + b"9" * 400 + b"}",
    "a number": b"1e999",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("file", [CONFIG, "task0/adapter_config.json"])
def test_hostile_json(name, file, saved):
    (saved / file).write_bytes(HOSTILE[name])
    refused(saved, re.escape(file))


@pytest.mark.parametrize("file", [CONFIG, ROUTER, f"task0/{WEIGHTS}", "task0/adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_what_is_no_regular_file_of_sane_size(kind, file, saved):
    path = saved / file
    if kind == "huge":
        with open(path, "r+b") as opened:
            opened.truncate(2**36)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    missing = kind != "huge" and file == CONFIG
    refused(saved, re.escape(file), FileNotFoundError if missing else ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["tasks"][0].update(rank=10**12), "rank: got 1000000000000"),
        (lambda c: c["tasks"][0].update(rank=10**9), "expected floats of shape"),
        (lambda c: c["config"].update(r=10**12), "config: r: got"),
        (lambda c: c["config"].update(reserve_tasks=10**12), "config: reserve_tasks"),
        (lambda c: c["config"].update(query_hidden_dim=60_000), "router: down.weight: got"),
        (lambda c: c["config"].update(lora_alpha=10**400), "config: lora_alpha"),
        (lambda c: c["config"].update(temperature=10**400), "config: temperature"),
        (lambda c: c["base_model"]["weights"]["input embedding"]["values"].__setitem__(0, 10**400),
         "base_model is incomplete"),
        (lambda c: c["tasks"][0].update(name="a\0b"), "expected a folder name"),
        (lambda c: c["tasks"][0].update(name="\ud800"), "not JSON"),
        (lambda c: c["tasks"][0].update(name="x" * 300), "expected a folder name"),
        (lambda c: c.update(method="grace"), "method is 'grace', which this version"),
        (lambda c: c.update(method="sapt_prompt"), "method: got 'sapt_prompt', expected 'sapt'"),
        (lambda c: c.update(files={"../../etc/passwd": "0"}), "content does not match its digest"),
    ],
)  # fmt: skip
def test_numbers_and_names_that_no_folder_has(change, message, saved):
    edit(saved, change)
    refused(saved, message)


class TestPeftConfig:
    """What PEFT would compute otherwise is refused, with and without digests."""

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("lora_alpha", 99999), ("lora_alpha", 1e308), ("lora_alpha", None), ("r", 8), ("r", 0),
            ("rank_pattern", {"q_proj": 2}),
            ("alpha_pattern", {"^model.layers.0.self_attn.q_proj": 1}),
            ("alpha_pattern", {"(a+)+": 1}), ("use_rslora", True), ("use_dora", True),
            ("fan_in_fan_out", True), ("bias", "all"), ("lora_bias", True), ("lora_dropout", 0.5),
            ("target_modules", ["q_proj"]), ("target_modules", ["q_proj", "v_proj", "o_proj"]),
            ("target_modules", "all-linear"), ("exclude_modules", ["v_proj"]),
            ("layers_to_transform", [0]), ("modules_to_save", ["lm_head"]),
            ("peft_type", "LOHA"), ("init_lora_weights", "pissa"), ("layer_replication", [[0, 2]]),
            ("target_parameters", ["x"]), ("alora_invocation_tokens", [5]), ("a_new_one", 3),
        ],
    )  # fmt: skip
    def test_disagreement(self, field, value, saved):
        edit(saved, lambda c: c.update({field: value}), "task1/adapter_config.json")
        age(saved)
        refused(saved, rf"task1/adapter_config\.json.*{field}")

    @pytest.mark.parametrize(
        "changed",
        [
            {"lora_alpha": 99999, "alpha_pattern": {"q_proj": 8, "v_proj": 8}},
            {"r": 1, "rank_pattern": {"0.self_attn.v_proj": 4, "v_proj": 4, "q_proj": 4}},
            {"use_rslora": True, "lora_alpha": 4},
            {"target_modules": ["v_proj", "0.self_attn.q_proj", "1.self_attn.q_proj"]},
            {"inference_mode": False, "task_type": None, "base_model_name_or_path": "elsewhere"},
        ],
    )  # fmt: skip
    def test_other_words_for_the_same(self, changed, saved, original):
        edit(saved, lambda c: c.update(changed), "task1/adapter_config.json")
        age(saved)
        ids, model = token_ids(), load(saved)
        assert torch.equal(run(model, ids), run(original[0], ids))
        alone = run(PeftModel.from_pretrained(tiny(FAMILY), saved / "task1").eval(), ids)
        with model.sapt.fixed(torch.tensor([0.0, 1.0])):
            torch.testing.assert_close(alone, run(model, ids), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("num_virtual_tokens", 7), ("token_dim", 8), ("num_transformer_submodules", 2),
         ("peft_type", "PREFIX_TUNING"), ("prompt_tuning_init", "TEXT")],
    )  # fmt: skip
    def test_prompts(self, field, value, tmp_path):
        config = sapt_fast.SaptConfig(adapter="prompt", prompt_length=3)
        model = sapt_fast.patch(tiny(FAMILY), config)
        model.sapt.add_task("a")
        model.sapt.save_pretrained(tmp_path)
        assert load(tmp_path).sapt.tasks == ["a"]
        edit(tmp_path, lambda c: c.update({field: value}), "a/adapter_config.json")
        refused(tmp_path, rf"a/adapter_config\.json.*{field}")


class TestNames:
    BAD = (
        "", " ", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\nb", "a\x7f", "x" * 300, "é" * 150,
        "\ud800", "end.", "end ", "Router.safetensors", "SAPT_CONFIG.JSON", "config.json",
        "strategy.safetensors", "T0", "Cafe\u0301", "caf\u00e9", 5, None,
    )  # fmt: skip

    @pytest.mark.parametrize("name", BAD, ids=lambda n: repr(n)[:12].encode("ascii", "replace"))
    def test_refused_when_the_task_is_added(self, name):
        model = patched(FAMILY, tasks=0)
        for there in ("t0", "Caf\u00e9"):
            model.sapt.add_task(there)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        for add in (
            lambda: model.sapt.add_task(name),
            lambda: model.sapt.restore_task(name, {}, torch.zeros(32)),
        ):
            with pytest.raises(ValueError, match="name: got"):
                add()
        assert model.sapt.tasks == ["t0", "Caf\u00e9"]
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())

    def test_what_is_accepted_can_be_saved(self, tmp_path):
        names = ["x" * 255, "é" * 127, "a b", "數學", "task-1.v2", "ﬁ", "2", "²"]
        model = patched(FAMILY, tasks=0)
        for name in names:
            model.sapt.add_task(name)
        model.sapt.save_pretrained(tmp_path / "saved")
        assert load(tmp_path / "saved").sapt.tasks == names

    def test_room_for_what_is_appended(self):
        require_folder_name("n", "x" * 215, appended=40)
        with pytest.raises(ValueError, match="more than 215"):
            require_folder_name("n", "x" * 216, appended=40)

    def test_earlier_folders_with_names_that_differ_by_case_load(self, saved):
        (saved / "task1").rename(saved / "Task0")
        edit(saved, lambda c: c["tasks"][1].update(name="Task0"))
        age(saved)
        rewrite(saved / ROUTER, lambda t: t.update({"targets.Task0": t.pop("targets.task1")}))
        assert load(saved).sapt.tasks == ["task0", "Task0"]


class TestStrategies:
    OWN_WAY = ("olora", "epi", "l2p", "progprompt")

    @pytest.mark.parametrize("strategy", OWN_WAY)
    def test_named_in_the_folder(self, strategy, original, saved):
        original[0].sapt.strategy = strategy
        try:
            original[0].sapt.save_pretrained(saved)
        finally:
            original[0].sapt.strategy = None
        refused(saved, f"strategy '{strategy}'.*evaluate_run")

    @pytest.mark.parametrize("strategy", OWN_WAY)
    def test_named_by_the_run_around_an_earlier_folder(self, strategy, saved, tmp_path):
        age(saved)
        place = tmp_path / "run" / "checkpoints" / "1-task"
        shutil.copytree(saved, place)
        (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"strategy": strategy}}))
        refused(place, f"strategy '{strategy}'")
        (tmp_path / "run" / "run.json").write_text("{")
        with pytest.raises(ValueError, match=r"run\.json"):
            load(place)

    @pytest.mark.parametrize(("strategy", "entry"), [("epi", "scatter"), ("l2p", "picked")])
    def test_known_by_what_an_earlier_folder_holds(self, strategy, entry, saved):
        age(saved)
        save_file({entry: torch.ones(2)}, saved / "strategy.safetensors")
        refused(saved, f"strategy '{strategy}'")

    @pytest.mark.parametrize("strategy", ["sapt", "sapt_prompt", "seqlora", "ewc", "lwf", "replay"])
    def test_those_that_predict_as_the_router_does_load(self, strategy, original, saved):
        original[0].sapt.strategy = strategy
        try:
            original[0].sapt.save_pretrained(saved)
        finally:
            original[0].sapt.strategy = None
        assert torch.equal(run(load(saved), token_ids()), run(original[0], token_ids()))

    def test_an_unknown_one(self, original, saved):
        original[0].sapt.strategy = "of tomorrow"
        try:
            original[0].sapt.save_pretrained(saved)
        finally:
            original[0].sapt.strategy = None
        refused(saved, "strategy is 'of tomorrow', which this version")

    def test_all_strategies_are_known(self):
        known = (*description._ROUTED, *description._NOT_ROUTED)
        assert sorted(known) == sorted(STRATEGIES)


class TestFullDisk:
    def test_a_limit_on_the_size_of_files(self, saved, original):
        before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                original[0].sapt.save_pretrained(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
        assert os.listdir(saved.parent) == ["saved"]

    @pytest.mark.parametrize("call", [1, 4, 6])
    def test_no_space(self, call, saved, original, monkeypatch):
        before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
        sync, calls = os.fsync, []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            original[0].sapt.save_pretrained(saved)
        assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
        assert os.listdir(saved.parent) == ["saved"]
