"""transformers' own saving and loading of a patched model loses nothing, and says what to call."""

import copy
import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import decoder_inputs, fill, patched, run, tiny, token_ids
from tiny_prompts import prompted
from tiny_tasks import make_model, make_settings, make_tasks
from torch import nn
from transformers import Trainer, TrainingArguments

import sapt_fast
from sapt_fast.continual.run.loop import evaluate_run, run_continual
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.storage.description import seal


def is_ours(name):
    """Whether a key of a state_dict is of the adapters or the router."""
    return ".sapt_pool." in name or name.startswith("sapt.") or ".sapt." in name


def base_keys(folder):
    return {name for path in folder.glob("model*.safetensors") for name in load_file(path)}


def from_both(model, folder):
    """What the warning says: the base from the folder, then the tasks from it."""
    return sapt_fast.load_pretrained(type(model).from_pretrained(folder), folder)


def assert_same(again, model):
    assert again.sapt.tasks == model.sapt.tasks
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    ids = token_ids()
    assert torch.equal(run(again, ids), run(model, ids))


WAYS = {
    "model": lambda m, f: m.save_pretrained(f),
    "positional": lambda m, f: m.save_pretrained(str(f), True, None, False, "1GB"),
    "sharded": lambda m, f: m.save_pretrained(f, max_shard_size="8KB"),
    "state_dict": lambda m, f: m.save_pretrained(f, state_dict=m.state_dict()),
    "base state_dict": lambda m, f: m.save_pretrained(
        f, state_dict={n: t for n, t in m.state_dict().items() if not is_ours(n)}
    ),
    "unwrapped": lambda m, f: (
        (a := Accelerator(cpu=True))
        .unwrap_model(a.prepare(m))
        .save_pretrained(f, is_main_process=a.is_main_process, save_function=a.save)
    ),
    "Trainer": lambda m, f: Trainer(
        m, TrainingArguments(str(f) + "-t", use_cpu=True, report_to="none")
    ).save_model(str(f)),
    "copy": lambda m, f: copy.deepcopy(m).save_pretrained(f),
    "compiled": lambda m, f: torch.compile(m).save_pretrained(f),
}


class TestSaving:
    @pytest.mark.parametrize("way", WAYS)
    def test_every_way_keeps_base_and_tasks(self, way, tmp_path, caplog):
        model = patched("llama", tasks=2)
        model.sapt.targets["task1"] = torch.tensor([0.25, 0.75])
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with caplog.at_level(logging.WARNING, "sapt_fast"):
            WAYS[way](model, tmp_path / "x")
        assert base_keys(tmp_path / "x") == {*tiny("llama").state_dict()}
        assert "sapt_fast.load_pretrained(LlamaForCausalLM.from_pretrained(" in caplog.text
        again = from_both(model, tmp_path / "x")
        assert_same(again, model)
        assert again.sapt.targets["task1"].tolist() == [0.25, 0.75]
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())

    @pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
    def test_every_family(self, family, tmp_path):
        model = patched(family)
        model.save_pretrained(tmp_path)
        assert not any(map(is_ours, base_keys(tmp_path)))
        assert_same(from_both(model, tmp_path), model)

    def test_prompts(self, tmp_path):
        model = prompted("llama")
        model.save_pretrained(tmp_path)
        assert not any(map(is_ours, base_keys(tmp_path)))
        again, ids = from_both(model, tmp_path), token_ids()
        assert torch.equal(again(ids).logits, model(ids).logits)

    def test_the_given_state_dict_is_what_is_saved(self, tmp_path):
        model, other = patched("llama", tasks=2), fill(patched("llama", tasks=2), seed=9)
        given = other.state_dict()
        model.save_pretrained(tmp_path, state_dict=given)
        assert given.keys() == other.state_dict().keys()  # not changed
        assert_same(from_both(model, tmp_path), other)
        lacking = {n: t for n, t in given.items() if "router" not in n}
        with pytest.raises(ValueError, match=r"state_dict: got some tensors .* not sapt\.router"):
            model.save_pretrained(tmp_path / "y", state_dict=lacking)
        assert not (tmp_path / "y").exists()

    def test_without_tasks_nothing_of_ours(self, tmp_path, caplog):
        model = patched("llama", tasks=0)
        model.save_pretrained(tmp_path / "x")
        names = ["config.json", "generation_config.json", "model.safetensors"]
        assert sorted(os.listdir(tmp_path / "x")) == names
        assert base_keys(tmp_path / "x") == {*tiny("llama").state_dict()}
        patched("llama").save_pretrained(tmp_path / "y")
        model.save_pretrained(tmp_path / "y")
        assert "contains the tasks of an earlier save" in caplog.text

    def test_merged(self, tmp_path):
        model = patched("llama", tasks=1)
        model.sapt.merge([1.0])
        for save in (model.save_pretrained, model.model.save_pretrained):
            with pytest.raises(RuntimeError, match="merged"):
                save(tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_a_part_of_the_model(self, tmp_path, caplog):
        model = patched("llama")
        model.model.save_pretrained(tmp_path)
        assert base_keys(tmp_path) == {*tiny("llama").model.state_dict()}
        assert "without the tasks" in caplog.text

    def test_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="cannot be replaced"):
            patched("llama").save_pretrained(".")
        assert os.listdir(tmp_path) == []

    def test_push_to_hub(self, tmp_path, monkeypatch):
        model, pushed = patched("llama", tasks=1), []
        monkeypatch.setattr(
            transformers.LlamaForCausalLM,
            "push_to_hub",
            lambda self, *args, **kwargs: pushed.append((args, kwargs)),
        )
        model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="me/y", private=True)
        assert pushed == [(("me/y",), {"private": True})]
        assert_same(from_both(model, tmp_path / "x"), model)

    def test_unpatch_gives_everything_back(self, tmp_path):
        model = sapt_fast.unpatch(patched("llama"))
        assert not any("save_pretrained" in vars(module) for module in model.modules())
        assert not model._load_state_dict_post_hooks
        model.save_pretrained(tmp_path)
        assert "sapt_config.json" not in os.listdir(tmp_path)

    def test_a_router_on_a_peft_model(self, tmp_path, caplog):
        base = tiny("llama")
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), adapter_name="a")
        sapt_fast.patch(model)
        model.save_pretrained(tmp_path)
        assert "router" not in caplog.text
        model.sapt.router = nn.Linear(2, 1)
        model.save_pretrained(tmp_path)
        assert "not model.sapt.router (Linear)" in caplog.text
        assert not any(map(is_ours, load_file(tmp_path / "a" / "adapter_model.safetensors")))
        sapt_fast.unpatch(model)
        assert "save_pretrained" not in vars(model)


class TestLoading:
    def test_the_base_alone_is_refused(self, tmp_path):
        model, base = patched("llama"), tiny("llama", seed=5).state_dict()
        tied = {n: t for n, t in base.items() if n != "lm_head.weight"}
        wrapped = nn.ModuleDict({"module": model})
        for load in (
            lambda: model.load_state_dict(base, strict=False),
            lambda: model.load_state_dict(base),
            lambda: wrapped.load_state_dict({f"module.{n}": t for n, t in base.items()}, False),
        ):
            with pytest.raises(
                RuntimeError, match=r"only the base model.*\['task0'.*load_pretrained"
            ):
                load()
        model.load_state_dict(tied, strict=False)  # a part may be loaded
        patched("llama", tasks=0).load_state_dict(base, strict=False)

    def test_tied_weights_count_as_loaded(self):
        model = patched(tiny("llama", tie_word_embeddings=True))
        state = {n: t for n, t in model.state_dict().items() if not is_ours(n)}
        del state["lm_head.weight"]
        with pytest.raises(RuntimeError, match="only the base model"):
            model.load_state_dict(state, strict=False)

    def test_the_base_in_parts_warns(self, caplog):
        model, base = patched("llama"), [*tiny("llama").state_dict().items()]
        model.load_state_dict(dict(base[:9]), strict=False)
        assert caplog.text == ""
        model.load_state_dict(dict(base[9:]), strict=False)
        assert "all of the base model was loaded, but" in caplog.text

    def test_whole_states_load_as_ever(self, tmp_path, caplog):
        model, other = patched("llama"), patched("llama", seed=2)
        torch.save(model.state_dict(), tmp_path / "x.pt")
        other.load_state_dict(torch.load(tmp_path / "x.pt"))
        assert_same(other, model)
        third, state = patched("llama", seed=3), [*model.state_dict().items()]
        for part in (state[:20], state[20:40], state[40:]):
            third.load_state_dict(dict(part), strict=False)
        assert_same(third, model)
        assert "load_state_dict" not in caplog.text

    @pytest.mark.parametrize("shards", [False, True])
    def test_a_trainer_loads_the_best_and_resumes(self, shards, tmp_path):
        """The values of the tasks are those of the checkpoint, not fresh ones."""
        ids = token_ids(8)
        rows = [{"input_ids": row, "labels": row} for row in ids]

        def trainer(folder, **changed):
            values = {
                "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2,
                "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.05,
            }  # fmt: skip
            arguments = TrainingArguments(folder, **{**values, **changed})
            return Trainer(patched("llama"), arguments, train_dataset=rows, eval_dataset=rows)

        best = trainer(
            tmp_path / "best", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="loss", greater_is_better=True,
        )  # fmt: skip
        best.train()
        worst = best.state.best_model_checkpoint
        assert not any(map(is_ours, load_file(f"{worst}/model.safetensors")))
        assert_same(from_both(best.model, worst), best.model)
        checkpoint = tmp_path / "best" / "checkpoint-2"
        stored = from_both(best.model, checkpoint)
        if shards:
            (checkpoint / "model.safetensors").unlink()
            tiny("llama").save_pretrained(checkpoint, max_shard_size="8KB")
        resumed = trainer(tmp_path / "again")
        resumed._load_from_checkpoint(str(checkpoint))  # as train(checkpoint) begins
        assert_same(resumed.model, stored)

    def test_a_trainers_checkpoint_of_other_tasks(self, tmp_path):
        model = patched("llama", tasks=1)
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", max_steps=1)
        Trainer(model, arguments).save_model(str(tmp_path / "checkpoint-1"))
        trainer = Trainer(patched("llama", tasks=2), arguments)
        with pytest.raises(ValueError, match=r"got tasks \['task0'\], expected \["):
            trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
        for name in ("sapt_config.json", "router.safetensors"):
            (tmp_path / "checkpoint-1" / name).unlink()
        with pytest.raises(RuntimeError, match="only the base model"):
            trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


class TestRuns:
    """Folders of continual runs, as `load_pretrained`, the loop and `eval` read them."""

    @pytest.mark.parametrize(
        "strategy",
        [
            *("olora", "l2p", "epi"),
            *(pytest.param(n, marks=pytest.mark.thorough) for n in ("progprompt", "seqlora")),
        ],
    )
    def test_checkpoints_name_their_strategy(self, strategy, tmp_path):
        tasks = make_tasks(2)
        settings = make_settings(strategy=strategy, steps=2)
        model = make_model("t5")
        results = run_continual(model, CharTokenizer(), tasks, tmp_path / "run", settings)
        folder = next((tmp_path / "run" / "checkpoints").glob("2-*"))
        assert json.loads((folder / "sapt_config.json").read_text())["strategy"] == strategy
        fresh = make_model("t5")
        loaded = sapt_fast.load_pretrained(fresh, folder)
        ids = torch.tensor([[5, 6, 7], [9, 8, 4]])
        got = [m(ids, **decoder_inputs(m, ids)).logits for m in (model.eval(), loaded.eval())]
        assert torch.equal(*got)
        answers = [m.generate(ids, max_new_tokens=4) for m in (model, loaded)]
        assert torch.equal(*answers)
        sapt_fast.unpatch(fresh)
        again = evaluate_run(fresh, CharTokenizer(), tasks, tmp_path / "run", settings)
        assert (again.scores[-1] == results.scores[-1]).all()

    def test_the_state_of_a_strategy_is_sealed_too(self, tmp_path):
        tasks, settings = make_tasks(2), make_settings(strategy="epi", steps=1)
        run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)
        path = next((tmp_path / "run" / "checkpoints").glob("2-*")) / "strategy.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"strategy\.safetensors: its SHA-256"):
            evaluate_run(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)

    def test_a_state_that_an_earlier_version_left_alone(self, tmp_path):
        """It wrote strategy.safetensors, and was killed before the adapters."""
        tasks, settings = make_tasks(2), make_settings(strategy="epi", steps=1)
        place = tmp_path / "run" / "checkpoints" / f"1-{tasks[0].name}"

        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sapt_fast.methods.sapt.SaptHandle.save_pretrained", killed)
            with pytest.raises(KeyboardInterrupt):
                run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)
        place.mkdir(parents=True)
        (place / "strategy.safetensors").write_bytes(b"old")
        run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)
        assert (place / "strategy.safetensors").read_bytes() != b"old"

    @pytest.mark.parametrize("strategy", ["olora", "epi", "l2p", "progprompt"])
    def test_an_earlier_run_whose_folders_have_digests_is_evaluated(self, strategy, tmp_path):
        """It stored the tasks of every strategy as those of SAPT."""
        tasks, settings = make_tasks(2), make_settings(strategy=strategy, steps=1)
        first = run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)
        for path in (tmp_path / "run" / "checkpoints").glob("*/sapt_config.json"):
            content = json.loads(path.read_text())
            fields = sapt_fast.SaptConfig().to_dict().keys()
            content["config"] = {n: v for n, v in content["config"].items() if n in fields}
            prompts = content["config"]["adapter"] == "prompt"
            content["method"] = "sapt_prompt" if prompts else "sapt"
            path.write_text(seal(content, content["files"]))
        model = make_model("t5")
        again = evaluate_run(model, CharTokenizer(), tasks, tmp_path / "run", settings)
        assert (again.scores[-1] == first.scores[-1]).all()
        sapt_fast.unpatch(model)
        shutil.copytree(path.parent, tmp_path / "copy")
        with pytest.raises(ValueError, match=f"strategy '{strategy}'"):
            sapt_fast.load_pretrained(model, tmp_path / "copy")

    def test_an_earlier_run_of_epi_is_evaluated(self, tmp_path):
        tasks, settings = make_tasks(2), make_settings(strategy="epi", steps=1)
        first = run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings)
        for config in (tmp_path / "run" / "checkpoints").glob("*/sapt_config.json"):
            content = json.loads(config.read_text())
            for name in ("method", "strategy", "files", "digest"):
                del content[name]
            config.write_text(json.dumps(content))
        model = make_model("t5")
        again = evaluate_run(model, CharTokenizer(), tasks, tmp_path / "run", settings)
        assert (again.scores[-1] == first.scores[-1]).all()
        sapt_fast.unpatch(model)
        shutil.copytree(config.parent, tmp_path / "copy")
        with pytest.raises(ValueError, match="strategy 'epi'"):
            sapt_fast.load_pretrained(model, tmp_path / "copy")


@pytest.mark.parametrize(
    "name",
    ["modules.safetensors", "Model-00001-of-00002.safetensors", "optimizer.pt", "README.md"],
)
def test_no_task_has_the_name_of_a_file_that_is_saved_beside_it(name):
    model = patched("t5", tasks=0)
    with pytest.raises(ValueError, match="is the name of a file that is saved beside it"):
        model.sapt.add_task(name)
    assert not model.sapt.tasks
