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
from sapt_fast.storage.pretrained_files import PretrainedFiles

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

    def both(self, first, **options):
        model = tiny("t5")
        for kind in (first, "gate" if first == "sapt" else "sapt"):
            if kind == "gate":
                gated(model)
                continue
            sapt_fast.patch(model, SaptConfig(r=2, reserve_tasks=2, **options))
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
        tokens = model.generate(token_ids(), max_new_tokens=4)
        model.save_pretrained(tmp_path / "saved")
        loaded = sapt_fast.load_pretrained(bare, tmp_path / "saved")
        assert torch.equal(run(loaded, token_ids()), left)
        assert torch.equal(loaded.generate(token_ids(), max_new_tokens=4), tokens)
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

    @pytest.mark.parametrize("first", ["sapt", "gate"])
    def test_values_of_a_state_dict_are_saved_of_both(self, first, tmp_path):
        model = self.both(first)
        expected = run(model, token_ids())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for handle in handles(model):
                for parameter in handle.trainable_parameters():
                    parameter.zero_()
        model.save_pretrained(tmp_path, state_dict=state)
        loaded = sapt_fast.load_pretrained(tiny("t5"), tmp_path)
        for pool, other in zip(
            loaded.sapt.pools.values(), self.both(first).sapt.pools.values(), strict=True
        ):
            assert torch.equal(pool.b.rows(), other.b.rows())
        gates = loaded.output_gate.gates()
        with torch.no_grad():
            for path, gate in gated().output_gate.gates().items():
                gates[path].copy_(gate)
        assert torch.equal(run(loaded, token_ids()), expected)

    @pytest.mark.parametrize("first", ["sapt", "gate"])
    @pytest.mark.parametrize("leaving", ["sapt", "output_gate", None])
    def test_modules_that_train_beside_the_adapters(self, first, leaving):
        model = self.both(first, modules_to_save=["lm_head"])
        before = snapshot(tiny("t5"))
        assert model.lm_head.weight.requires_grad
        sapt_fast.unpatch(model, leaving)
        assert model.lm_head.weight.requires_grad == (leaving != "sapt")
        if leaving is not None:
            sapt_fast.unpatch(model)
        assert_as_before(model, before)

    def test_a_base_that_was_trained_beside_the_adapters(self, tmp_path):
        model = self.both("sapt", modules_to_save=["lm_head"])
        fill(model.lm_head.weight)
        for handle in handles(model):
            handle.save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(tiny("t5"), tmp_path)
        assert torch.equal(run(loaded, token_ids()), run(model, token_ids()))

    def test_nothing_is_saved_while_a_mixture_is_merged(self, tmp_path):
        model = self.both("sapt")
        model.sapt.merge([0.5, 0.5])
        with pytest.raises(RuntimeError, match=r"model\.sapt\.unmerge"):
            model.output_gate.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_a_description_that_is_cut_off(self, tmp_path):
        model = self.both("sapt")
        for handle in handles(model):
            handle.save_pretrained(tmp_path)
        path = tmp_path / "output_gate_config.json"
        path.write_bytes(path.read_bytes()[:-20])
        other = tiny("t5")
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"output_gate_config\.json: broken JSON"):
            sapt_fast.load_pretrained(other, tmp_path)
        assert_as_before(other, before)

    @pytest.mark.parametrize("patched", [False, True])
    def test_a_method_that_cannot_be_restored(self, patched, tmp_path, monkeypatch):
        """Nothing of the others is in the model then."""
        model = self.both("sapt")
        for handle in handles(model):
            handle.save_pretrained(tmp_path)

        def restore(self, tensors, values):
            raise ValueError("tensors: got others")

        monkeypatch.setattr(OutputGateHandle, "restore", restore)
        other = tiny("t5")
        if patched:
            sapt_fast.patch(other, model.sapt.config)
        before = snapshot(other)
        with pytest.raises(ValueError, match="tensors: got others"):
            sapt_fast.load_pretrained(other, tmp_path)
        assert_as_before(other, before)

    def test_a_copy_has_both(self, tmp_path):
        model = self.both("gate")
        expected = run(model, token_ids())
        other = copy.deepcopy(model)
        assert_as_before(sapt_fast.unpatch(other), snapshot(tiny("t5")))
        assert torch.equal(run(model, token_ids()), expected)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(run(loaded, token_ids()), expected)
        loaded.save_pretrained(tmp_path / "saved")
        again = sapt_fast.load_pretrained(tiny("t5"), tmp_path / "saved")
        assert torch.equal(run(again, token_ids()), expected)

    def test_layers_inside_of_a_method_get_no_adapters(self):
        model = gated()
        layer = model.get_submodule(model.output_gate.report.patched[0])
        layer.sapt_output_gate.inside = torch.nn.Linear(4, 4)
        sapt_fast.patch(model, SaptConfig(r=2, target_modules="all-linear"))
        assert not any("sapt_output_gate" in path for path in model.sapt.report.patched)
        sapt_fast.unpatch(model, "sapt")
        with pytest.raises(ValueError, match="selects no layer"):
            sapt_fast.patch(model, SaptConfig(r=2, target_modules=["inside"]))


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

    def test_an_attribute_of_the_models_own(self):
        model = tiny("t5")
        model.output_gate = torch.nn.Linear(2, 2)
        self.refused(
            model, lambda: sapt_fast.patch(model, CONFIG), "has an attribute 'output_gate'"
        )

    @pytest.mark.parametrize("what", ["method", "layer"])
    def test_another_library_has_replaced(self, what):
        model = TestBesideSapt().both("sapt")
        if what == "method":
            model.generate = print
        else:
            path = model.output_gate.report.patched[0]
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], torch.nn.Sequential(parent.o))
        message = "generate: the method" if what == "method" else "without sapt_output_gate"
        self.refused(model, lambda: sapt_fast.unpatch(model), message)

    @pytest.mark.parametrize("config", [CONFIG, SaptConfig(r=2, modules_to_save=["lm_head"])])
    @pytest.mark.parametrize("beside", [False, True])
    def test_hooks_that_fail_half_way(self, config, beside, monkeypatch):
        model = tiny("t5")
        if beside:
            sapt_fast.patch(model, CONFIG if config is not CONFIG else SaptConfig(r=2))

        def install(self):
            raise RuntimeError("no more")

        monkeypatch.setattr(PretrainedFiles, "install", install)
        self.refused(model, lambda: sapt_fast.patch(model, config), "no more", RuntimeError)

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
