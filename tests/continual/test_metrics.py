import builtins
import math
import subprocess
import sys

import numpy as np
import pytest

from sapt_fast.continual.scores.metrics import (
    BENCHMARK_METRICS,
    average_performance,
    backward_transfer,
    check_score_matrix,
    continual_metrics,
    exact_match,
    forgetting_rate,
    forward_transfer,
    normalize_answer,
    rouge_l,
    score_predictions,
)

NAN = math.nan
# By hand: AP = (60+50+90)/3; task 0 falls from 80, task 1 from 70; diagonal 80, 65, 90.
MATRIX = [
    [80.0, NAN, NAN],
    [75.0, 65.0, NAN],
    [60.0, 50.0, 90.0],
]
ALONE = [78.0, 70.0, 84.0]


class TestMatrixMetrics:
    def test_by_hand(self):
        metrics = continual_metrics(MATRIX, ALONE)
        assert metrics.ap == pytest.approx(200 / 3)
        assert metrics.forgetting == pytest.approx((20 + 15) / 2)
        assert metrics.fwt == pytest.approx((2 - 5 + 6) / 3)
        assert metrics.bwt == pytest.approx((-20 - 15) / 2)
        assert metrics.as_dict() == {
            "AP": metrics.ap,
            "F.Ra": metrics.forgetting,
            "FWT": metrics.fwt,
            "BWT": metrics.bwt,
        }

    def test_forgetting_starts_from_the_best_score_not_from_the_diagonal(self):
        scores = [[40.0, NAN, NAN], [70.0, 30.0, NAN], [50.0, 45.0, 10.0]]
        assert forgetting_rate(scores) == pytest.approx(((70 - 50) + (30 - 45)) / 2)
        assert backward_transfer(scores) == pytest.approx(((50 - 40) + (45 - 30)) / 2)

    def test_the_last_row_is_not_part_of_the_best(self):
        assert forgetting_rate([[10.0, NAN], [90.0, 50.0]]) == pytest.approx(-80.0)

    def test_scores_before_learning_count_where_taken(self):
        scores = [[40.0, 99.0, 0.0], [40.0, 30.0, 0.0], [40.0, 30.0, 10.0]]
        assert forgetting_rate(scores) == pytest.approx((0 + 69) / 2)
        assert forgetting_rate(scores, variant="released") == pytest.approx(0.0)

    def test_released_variant(self):
        metrics = continual_metrics(MATRIX, ALONE, variant="released")
        assert metrics.ap == pytest.approx(200 / 3)
        assert metrics.forgetting == pytest.approx(17.5)
        assert metrics.fwt == pytest.approx(235 / 3 - 50.94)
        assert metrics.bwt == pytest.approx(-35 / 3)

    def test_released_forgetting_has_zeros_above_the_diagonal(self):
        scores = [[10.0, NAN, NAN], [5.0, -8.0, NAN], [0.0, -9.0, 1.0]]
        assert forgetting_rate(scores) == pytest.approx((10 + 1) / 2)
        assert forgetting_rate(scores, variant="released") == pytest.approx((10 + 9) / 2)

    def test_one_task(self):
        metrics = continual_metrics([[42.0]], [40.0])
        assert (metrics.ap, metrics.fwt) == (42.0, 2.0)
        assert math.isnan(metrics.forgetting)
        assert math.isnan(metrics.bwt)
        assert backward_transfer([[42.0]], variant="released") == 0.0

    def test_without_single_task_scores(self):
        assert math.isnan(continual_metrics(MATRIX).fwt)
        assert forward_transfer(MATRIX, variant="released") == pytest.approx(235 / 3 - 50.94)

    def test_the_argument_is_left_alone(self):
        scores = np.array(MATRIX)
        before = scores.copy()
        check_score_matrix(scores)[0, 0] = -1
        continual_metrics(scores, ALONE, variant="released")
        np.testing.assert_array_equal(scores, before)

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([], r"scores: got shape \[0\], expected \[T, T\] with T >= 1"),
            ([[1.0, 2.0]], r"got shape \[1, 2\]"),
            ([1.0, 2.0], r"got shape \[2\]"),
            ([[1.0], [1.0, 2.0]], "square matrix of numbers"),
            ([["a"]], "square matrix of numbers"),
            ([[1.0, NAN], [NAN, 2.0]], r"scores\[1\]\[0\]: got nan, .* task 0 was already learned"),
            ([[NAN]], r"scores\[0\]\[0\]: got nan"),
            ([[1.0, math.inf], [1.0, 2.0]], r"scores\[0\]\[1\]: got inf"),
        ],
    )
    @pytest.mark.parametrize(
        "function",
        [average_performance, forgetting_rate, forward_transfer, backward_transfer],
        ids=lambda function: function.__name__,
    )
    def test_bad_matrix(self, function, scores, message):
        with pytest.raises(ValueError, match=message):
            function(scores)

    @pytest.mark.parametrize("alone", [[1.0, 2.0], [1.0, 2.0, NAN], 3.0, ["a", "b", "c"]])
    def test_bad_single_task_scores(self, alone):
        with pytest.raises(ValueError, match=r"alone: .*expected 3 (finite )?numbers"):
            forward_transfer(MATRIX, alone)

    @pytest.mark.parametrize("function", [forgetting_rate, backward_transfer, continual_metrics])
    def test_bad_variant(self, function):
        with pytest.raises(
            ValueError, match="variant: got 'x', expected one of definition, released"
        ):
            function(MATRIX, variant="x")


class TestExactMatch:
    @pytest.mark.parametrize(
        ("prediction", "reference", "score"),
        [
            ("Good", "good", 1.0),
            (" very   negative.\n", "Very negative", 1.0),
            ("it's", "its", 1.0),
            ("the cat", "cat", 0.0),
            ("very-negative", "very negative", 0.0),
            ("", "A", 0.0),
        ],
    )
    def test_normalisation(self, prediction, reference, score):
        assert exact_match(prediction, reference) == score

    def test_normalize_answer(self):
        assert normalize_answer("  The, Cat's\n(hat)  ") == "the cats hat"

    def test_any_reference(self):
        assert exact_match("b", ["a", "B"]) == 1.0
        assert exact_match("c", ["a", "b"]) == 0.0


class TestRougeL:
    def test_by_hand(self):
        # Longest common subsequence "the cat on the mat": 5 of 6 words and 5 of 5.
        score = rouge_l("the cat on the mat", "the cat sat on the mat")
        assert score == pytest.approx(2 * (5 / 5) * (5 / 6) / (5 / 5 + 5 / 6))

    def test_order_of_words_counts(self):
        assert rouge_l("mat cat", "cat mat") == pytest.approx(0.5)

    def test_stemmer_is_on(self):
        assert rouge_l("jumping dogs", "jumped dog") == pytest.approx(1.0)

    def test_best_reference(self):
        assert rouge_l("a cat", ["two dogs", "a cat", "cat"]) == pytest.approx(1.0)

    def test_empty_prediction(self):
        assert rouge_l("", "a cat") == 0.0

    def test_missing_package(self, monkeypatch):
        real = builtins.__import__

        def without_rouge(name, *args, **kwargs):
            if name.startswith("rouge_score"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_rouge)
        with pytest.raises(ImportError, match="pip install rouge-score"):
            rouge_l("a", "a")
        assert score_predictions(["a"], ["a"], "exact_match") == 100.0


class TestScorePredictions:
    def test_mean_in_percent(self):
        references = ["good", ["bad", "Worse"], "good"]
        assert score_predictions(["good", "worse", "bad"], references, "exact_match") == (
            pytest.approx(200 / 3)
        )
        assert score_predictions(["a cat", "cow"], ["a cat", ["dog"]], "rouge_l") == 50.0

    def test_metric_of_each_benchmark(self):
        assert BENCHMARK_METRICS == {"SuperNI": "rouge_l", "Long_Sequence": "exact_match"}

    @pytest.mark.parametrize(
        ("predictions", "references", "metric", "message"),
        [
            (["a"], ["a"], "bleu", "metric: got 'bleu', expected one of rouge_l, exact_match"),
            (["a"], ["a", "b"], "exact_match", "got 1 and 2 entries, expected the same"),
            ([], [], "exact_match", "predictions: got none"),
            (["a"], [[]], "exact_match", "references: got none"),
            (["a"], [[]], "rouge_l", "references: got none"),
        ],
    )
    def test_bad_values(self, predictions, references, metric, message):
        with pytest.raises(ValueError, match=message):
            score_predictions(predictions, references, metric)

    @pytest.mark.parametrize("metric", ["exact_match", "rouge_l"])
    @pytest.mark.parametrize(
        ("predictions", "references"), [([1], ["a"]), (["a"], [[None]]), ("a", ["a"]), (["a"], "a")]
    )
    def test_bad_types(self, predictions, references, metric):
        with pytest.raises(TypeError, match=r"got .*, expected"):
            score_predictions(predictions, references, metric)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, sapt_fast.continual.data.rows, sapt_fast.continual.scores.metrics, "
        "sapt_fast.continual.data.orders, sapt_fast.continual.scores.run_report\n"
        "print([m for m in ('matplotlib', 'rouge_score', 'nltk', 'rich', 'datasets') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
