"""The published task orders of the SAPT benchmarks.

Source: the task lists of the original script generators, circle-hit/SAPT
`gen_script_superni_{t5,llama}.py` (orders 1 and 2) and `gen_script_long_{t5,llama}.py` (orders 3
and 4). The LLaMA script numbers the Long Sequence lists 3 and 4, the T5 script 5 and 4: the lists
are the same, and the LLaMA script's numbers are used here.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ORDERS", "resolve_order"]

_SUPERNI_1 = (
    "task1572_samsum_summary",
    "task363_sst2_polarity_classification",
    "task1290_xsum_summarization",
    "task181_outcome_extraction",
    "task002_quoref_answer_generation",
    "task1510_evalution_relation_extraction",
    "task639_multi_woz_user_utterance_generation",
    "task1729_personachat_generate_next",
    "task073_commonsenseqa_answer_generation",
    "task1590_diplomacy_text_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation",
    "task1687_sentiment140_classification",
    "task875_emotion_classification",
)
_SUPERNI_2 = (
    "task748_glucose_reverse_cause_event_detection",
    "task073_commonsenseqa_answer_generation",
    "task1590_diplomacy_text_generation",
    "task639_multi_woz_user_utterance_generation",
    "task1572_samsum_summary",
    "task1687_sentiment140_classification",
    "task591_sciq_answer_generation",
    "task363_sst2_polarity_classification",
    "task1510_evalution_relation_extraction",
    "task1729_personachat_generate_next",
    "task181_outcome_extraction",
    "task511_reddit_tifu_long_text_summarization",
    "task002_quoref_answer_generation",
    "task1290_xsum_summarization",
    "task875_emotion_classification",
)
_LONG_SEQUENCE_3 = (
    "mnli",
    "cb",
    "wic",
    "copa",
    "qqp",
    "boolq",
    "rte",
    "imdb",
    "yelp",
    "amazon",
    "sst2",
    "dbpedia",
    "agnews",
    "multirc",
    "yahoo",
)
_LONG_SEQUENCE_4 = (
    "yelp",
    "amazon",
    "mnli",
    "cb",
    "copa",
    "qqp",
    "rte",
    "imdb",
    "sst2",
    "dbpedia",
    "agnews",
    "yahoo",
    "multirc",
    "boolq",
    "wic",
)

ORDERS: dict[str, tuple[str, ...]] = {
    "superni-1": _SUPERNI_1,
    "superni-2": _SUPERNI_2,
    "long_sequence-3": _LONG_SEQUENCE_3,
    "long_sequence-4": _LONG_SEQUENCE_4,
}
_BY_NUMBER = {name.rsplit("-", 1)[1]: name for name in ORDERS}


def resolve_order(order: str | int | Sequence[str]) -> tuple[str, ...]:
    """Returns the task names of an order, in the order they are learned.

    Args:
        order: a name in `ORDERS` (`"superni-1"`), its number (`1` or `"1"`; the four orders are
            numbered consecutively), task names separated by commas, or a sequence of task names.

    Returns:
        The task names, oldest first. They are not checked against files.

    Raises:
        TypeError: if `order` or one of its tasks has another type.
        ValueError: if there is no task, a name is empty, a number is unknown or a task is named
            twice.

    Example:
        >>> resolve_order("superni-2")[0]
        'task748_glucose_reverse_cause_event_detection'
        >>> resolve_order("sst2, copa")
        ('sst2', 'copa')
    """
    if isinstance(order, bool) or not isinstance(order, (str, int, Sequence)):
        raise TypeError(
            f"order: got {order!r}, expected a name, a number or a sequence of task names"
        )
    if isinstance(order, (str, int)):
        key = str(order).strip()
        name = _BY_NUMBER.get(key, key)
        if name in ORDERS:
            return ORDERS[name]
        if key.lstrip("-").isdigit():
            raise ValueError(f"order: got {key}, expected one of {', '.join(ORDERS)}")
        tasks = [task.strip() for task in key.split(",")]
    else:
        tasks = list(order)
        for task in tasks:
            if not isinstance(task, str):
                raise TypeError(f"order: got {task!r} among its tasks, expected strings")
    if not tasks or "" in tasks:
        raise ValueError(f"order: got {order!r}, expected at least one task and no empty name")
    repeated = sorted({task for task in tasks if tasks.count(task) > 1})
    if repeated:
        raise ValueError(
            f"order: got {', '.join(map(repr, repeated))} more than once, expected each task once"
        )
    return tuple(tasks)
