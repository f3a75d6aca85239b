"""The packaged backbone: its files, its initial choices and what it has learned."""

import random
from importlib import resources

import pytest
import torch

from sapt_fast.demo.backbone import (
    collate,
    exact_match,
    instruction_rows,
    load_backbone,
    new_backbone,
    save_backbone,
)
from sapt_fast.demo.tasks import (
    DEMO_RULES,
    PRETRAINING_RULES,
    CharTokenizer,
    Example,
    make_example,
    random_payload,
)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


def draw_rows(rules, count):
    rng = random.Random("unseen payloads")
    return {
        name: [make_example(rule, random_payload(rng), rng) for _ in range(count)]
        for name, rule in rules.items()
    }


class TestPackagedFiles:
    def test_size(self):
        files = list((resources.files("sapt_fast.demo") / "backbone").iterdir())
        assert {file.name for file in files} == {"config.json", "model.safetensors"}
        assert sum(len(file.read_bytes()) for file in files) <= 3_000_000

    def test_parameters(self, backbone):
        assert sum(p.numel() for p in backbone.parameters()) == 797_056
        assert backbone.config.vocab_size == CharTokenizer().vocab_size

    def test_embeddings_are_tied(self, backbone):
        table = backbone.shared.weight
        assert backbone.get_input_embeddings().weight is table
        assert backbone.encoder.embed_tokens.weight is table
        assert backbone.decoder.embed_tokens.weight is table
        assert backbone.lm_head.weight is table


class TestLoad:
    def test_default_is_float32_in_evaluation_mode(self, backbone):
        assert {p.dtype for p in backbone.parameters()} == {torch.float32}
        assert not backbone.training

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_dtype(self, backbone, dtype):
        model = load_backbone(dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model.shared.weight.float(), backbone.shared.weight)

    @pytest.mark.parametrize("dtype", [torch.int64, "float32", None], ids=str)
    def test_bad_dtype(self, dtype):
        with pytest.raises(TypeError, match="expected a floating-point"):
            load_backbone(dtype)

    def test_leaves_the_random_state(self):
        state = torch.get_rng_state()
        load_backbone()
        assert torch.equal(torch.get_rng_state(), state)

    def test_round_trip(self, backbone, tmp_path):
        save_backbone(backbone, tmp_path)
        again = load_backbone(folder=tmp_path)
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
            load_backbone(folder=tmp_path)

    def test_weights_of_another_architecture(self, tmp_path):
        save_backbone(new_backbone(0), tmp_path)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"num_layers": 3', '"num_layers": 4'))
        with pytest.raises(ValueError, match="does not fit its config"):
            load_backbone(folder=tmp_path)


class TestNewBackbone:
    def test_seed(self):
        first, again, other = new_backbone(0), new_backbone(0), new_backbone(1)
        assert torch.equal(first.shared.weight, again.shared.weight)
        assert not torch.equal(first.shared.weight, other.shared.weight)

    def test_heads_start_at_one_offset(self):
        model = new_backbone(0)
        for stack, offsets in ((model.encoder, (-1, 1, -2, 0)), (model.decoder, (-1, 0, -2, -3))):
            attention = stack.block[0].layer[0].SelfAttention
            bias = attention.compute_bias(12, 12)[0]  # [heads, query, key]
            for head, offset in enumerate(offsets):
                expected = torch.diag(torch.full((12 - abs(offset),), 4.0), offset)
                if stack.is_decoder:  # later positions share the bucket of 0 and are never attended
                    assert torch.equal(bias[head].tril(), expected)
                else:
                    assert torch.equal(bias[head], expected)

    def test_instruction_rows_are_larger(self):
        table = new_backbone(0).shared.weight.detach()
        ratio = table[instruction_rows()].std() / table[3:29].std()
        assert 2.8 < ratio < 3.2


class TestWhatItLearned:
    def test_solves_the_pretraining_rules(self, backbone):
        scores = {
            name: exact_match(backbone, rows)
            for name, rows in draw_rows(PRETRAINING_RULES, 40).items()
        }
        assert sum(scores.values()) / len(scores) >= 0.97, scores
        assert min(scores.values()) >= 0.8, scores

    def test_does_not_know_the_demo_rules(self, backbone):
        for name, rows in draw_rows(DEMO_RULES, 40).items():
            assert exact_match(backbone, rows) <= 0.5, name

    def test_instructions_differ_in_the_embedding_table(self, backbone):
        """The scale of the instruction letters survives pretraining; the router rests on it."""
        norms = backbone.shared.weight.norm(dim=1)
        assert norms[instruction_rows()].mean() > 2 * norms[3:29].mean()


class TestExactMatch:
    def test_equals_greedy_decoding(self, backbone):
        tokenizer = CharTokenizer()
        drawn = draw_rows(PRETRAINING_RULES | DEMO_RULES, 2)
        rows = [row for rows in drawn.values() for row in rows]
        batch = collate(rows)
        answers = tokenizer.batch_decode(
            backbone.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=10,
                do_sample=False,
            )
        )
        correct = sum(answer == row.target for answer, row in zip(answers, rows, strict=True))
        assert 0 < correct < len(rows)
        assert exact_match(backbone, rows, batch_size=7) == pytest.approx(correct / len(rows))

    def test_collate(self):
        batch = collate([Example("AB:ab", "ba"), Example("A:a", "-")])
        assert batch["input_ids"].tolist() == [[29, 30, 65, 3, 4, 1], [29, 65, 3, 1, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
        assert batch["labels"].tolist() == [[4, 3, 1], [66, 1, -100]]

    def test_no_rows(self, backbone):
        with pytest.raises(ValueError, match="got none"):
            exact_match(backbone, [])
