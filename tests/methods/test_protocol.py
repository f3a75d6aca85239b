"""A method of one file and one row: it plugs in, trains, generates, saves, loads and goes away."""

import copy
import json

import pytest
import torch
from output_gate import OutputGateConfig, OutputGateHandle
from tiny_models import run, tiny, token_ids

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.methods.base import handles
from sapt_fast.methods.l2p import L2pConfig
from sapt_fast.methods.lora_sum import LoraSumConfig
from sapt_fast.methods.registry import METHODS

CONFIG = OutputGateConfig(width=tiny("t5").config.d_model)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(METHODS, "output_gate", "output_gate:OutputGateHandle")


@torch.no_grad()
def fill(parameter):
    """Values that are the same in every run."""
    generator = torch.Generator().manual_seed(parameter.numel())
    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def gated(model=None):
    model = sapt_fast.patch(tiny("t5") if model is None else model, CONFIG)
    model.output_gate.grow("first")
    for gate in model.output_gate.gates().values():
        fill(gate)
    return model


def snapshot(model):
    return {
        path: (type(m), set(vars(m)), {*m._forward_hooks}, {*m._modules})
        for path, m in model.named_modules()
    }, {name: (p.data.clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_as_before(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (values, trains) in parameters.items():
        assert torch.equal(values, before[1][name][0])
        assert trains == before[1][name][1], name


def test_it_changes_nothing_until_it_grows_and_nothing_is_left_of_it():
    model, bare = tiny("t5"), tiny("t5")
    before = snapshot(model)
    expected = run(bare, token_ids())
    assert torch.equal(run(sapt_fast.patch(model, CONFIG), token_ids()), expected)
    assert not torch.equal(run(gated(model), token_ids()), expected)
    assert_as_before(sapt_fast.unpatch(model, "output_gate"), before)
    assert torch.equal(run(model, token_ids()), expected)


def test_it_computes_its_equation():
    model, bare = gated(), tiny("t5")
    for path, gate in model.output_gate.gates().items():
        bare.get_submodule(path).weight.data *= 1 + gate.data[:, None]
    torch.testing.assert_close(run(model, token_ids()), run(bare, token_ids()))
    ids = token_ids()
    assert torch.equal(*(m.generate(ids, max_new_tokens=5) for m in (model, bare)))


def test_it_trains_alone():
    model = gated()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith("sapt_output_gate.gate") for name in trained)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.output_gate.trainable_parameters())


@pytest.mark.parametrize("by", ["handle", "model"])
def test_it_is_saved_and_loaded(by, tmp_path):
    model = gated()
    folder = tmp_path / "saved"
    (model.output_gate if by == "handle" else model).save_pretrained(folder)
    loaded = sapt_fast.load_pretrained(tiny("t5"), folder)
    assert isinstance(sapt_fast.handle(loaded, OutputGateConfig), OutputGateHandle)
    assert loaded.output_gate.tasks == ["first"]
    assert torch.equal(run(loaded, token_ids()), run(model, token_ids()))
    if by == "model":  # the base model alone, as it was
        base = type(model).from_pretrained(folder).eval()
        assert torch.equal(run(base, token_ids()), run(tiny("t5"), token_ids()))


def test_a_copy_is_its_own():
    model = gated()
    other = copy.deepcopy(model)
    for gate in other.output_gate.gates().values():
        gate.data.zero_()
    assert torch.equal(run(other, token_ids()), run(tiny("t5"), token_ids()))
    assert not torch.equal(run(model, token_ids()), run(other, token_ids()))


class TestBesideSapt:
    """Two methods on one model."""

    def both(self, first):
        model = tiny("t5")
        for kind in (first, "gate" if first == "sapt" else "sapt"):
            if kind == "gate":
                gated(model)
                continue
            sapt_fast.patch(model, SaptConfig(r=2, reserve_tasks=2))
            for name in ("a", "b"):
                model.sapt.add_task(name)
                for pool in model.sapt.pools.values():
                    fill(pool.b.trainable)
        return model

    @pytest.mark.parametrize("first", ["sapt", "gate"])
    @pytest.mark.parametrize("leaving", ["sapt", "output_gate"])
    def test_either_leaves_the_other(self, first, leaving, tmp_path):
        model, bare = self.both(first), tiny("t5")
        before = snapshot(bare)
        assert {one.attribute for one in handles(model)} == {"sapt", "output_gate"}
        everything = run(model, token_ids())
        sapt_fast.unpatch(model, leaving)
        left = run(model, token_ids())
        assert not torch.equal(left, everything)
        if leaving == "sapt":
            assert torch.equal(left, run(gated(), token_ids()))
        assert not any(p.requires_grad for n, p in model.named_parameters() if n in before[1])
        assert torch.equal(
            model.generate(token_ids(), max_new_tokens=4)[:, :1] * 0, token_ids()[:, :1] * 0
        )
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(
            run(sapt_fast.load_pretrained(bare, tmp_path / "saved"), token_ids()), left
        )
        assert_as_before(sapt_fast.unpatch(model), before)

    @pytest.mark.parametrize("first", ["sapt", "gate"])
    def test_both_in_one_folder(self, first, tmp_path):
        model = self.both(first)
        expected = run(model, token_ids())
        model.sapt.save_pretrained(tmp_path / "saved")
        model.output_gate.save_pretrained(tmp_path / "saved")
        model.sapt.save_pretrained(tmp_path / "saved")  # which leaves the other's files alone
        loaded = sapt_fast.load_pretrained(tiny("t5"), tmp_path / "saved")
        assert torch.equal(run(loaded, token_ids()), expected)
        assert loaded.sapt.tasks == ["a", "b"]

    def test_a_folder_of_one_is_not_loaded_in_part(self, tmp_path):
        model = self.both("sapt")
        model.sapt.save_pretrained(tmp_path)
        model.output_gate.save_pretrained(tmp_path)
        path = tmp_path / "output_gate.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        other = tiny("t5")
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"output_gate\.safetensors: its SHA-256"):
            sapt_fast.load_pretrained(other, tmp_path)
        assert_as_before(other, before)


class TestBadInput:
    """Named before anything changes."""

    def refused(self, model, call, message, error=ValueError):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            call()
        assert_as_before(model, before)

    def test_two_methods_at_one_place(self):
        model = sapt_fast.patch(tiny("t5"), SaptConfig(r=2))
        self.refused(
            model,
            lambda: sapt_fast.patch(model, L2pConfig()),
            "'l2p' cannot be added, .*weights of the forward .*'sapt'.*unpatch",
        )
        other = gated()

        class Second(OutputGateHandle):
            method = attribute = "second"

        class SecondConfig(OutputGateConfig):
            method = "second"

        METHODS["second"] = "output_gate:Second"
        try:
            import output_gate

            output_gate.Second = Second
            Second.Config = SecondConfig
            self.refused(
                other,
                lambda: sapt_fast.patch(other, SecondConfig(CONFIG.width)),
                "'second' cannot be added, .* would change .*'output_gate' has patched.*unpatch",
            )
        finally:
            del METHODS["second"]

    def test_a_config_of_another_method(self):
        model = sapt_fast.patch(tiny("t5"), SaptConfig(r=2))
        self.refused(
            model, lambda: sapt_fast.patch(model, LoraSumConfig(r=2)), "patched with another config"
        )
        self.refused(
            model, lambda: sapt_fast.patch(model, object()), "config: got object", TypeError
        )
        self.refused(
            model,
            lambda: sapt_fast.handle(model, LoraSumConfig),
            r"not patched with LoraSumConfig \(it is patched with SaptConfig\)",
        )
        self.refused(
            model, lambda: sapt_fast.unpatch(model, "grace"), r"not patched with 'grace'.*has sapt"
        )

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("method", "of_tomorrow", "method is 'of_tomorrow', which this version"),
            ("method", 3, "method: got 3, expected a name"),
            ("format_version", 2, "format_version: got 2, expected 1"),
            ("config", {"width": 3, "depth": 1}, r"unknown fields \['depth'\]|digest"),
            ("values", {"tasks": ["other"]}, "does not match its digest"),
        ],
    )
    def test_folders(self, field, value, message, tmp_path):
        gated().output_gate.save_pretrained(tmp_path)
        path = tmp_path / "output_gate_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        model = tiny("t5")
        self.refused(model, lambda: sapt_fast.load_pretrained(model, tmp_path), message)

    def test_tensors_of_other_layers(self, tmp_path):
        gated().output_gate.save_pretrained(tmp_path)
        model = sapt_fast.patch(tiny("t5"), OutputGateConfig(CONFIG.width, ["q"]))
        self.refused(
            model, lambda: sapt_fast.load_pretrained(model, tmp_path), "patched with another config"
        )

    def test_names_that_match_nothing(self):
        model = tiny("t5")
        config = OutputGateConfig(CONFIG.width, ["nothing"])
        self.refused(model, lambda: sapt_fast.patch(model, config), "matches no module")

    def test_a_layer_that_fails_half_way(self, monkeypatch):
        model, calls = tiny("t5"), []
        own = OutputGateHandle.attach

        def attach(self, path):
            if calls:
                raise RuntimeError("no more")
            calls.append(path)
            own(self, path)

        monkeypatch.setattr(OutputGateHandle, "attach", attach)
        self.refused(model, lambda: sapt_fast.patch(model, CONFIG), "no more", RuntimeError)
