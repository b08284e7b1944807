"""Words and ranges of a call, for all samples or each, and what is refused."""

import numpy as np
import pytest

from diffusers_ext.vico import VicoConfig
from diffusers_ext.vico.words_of_call import SampleWords, words_by_sample


def words(groups, text_range=(1, 8), batch=1, **fields):
    return words_by_sample(groups, text_range, batch, VicoConfig(**fields))


def test_one_list_is_for_all_samples():
    assert words([[2], [4, 5]], batch=2) == [SampleWords(((2,), (4, 5)), (1, 8))] * 2


def test_each_sample_has_words_and_a_range_of_its_own():
    found = words([[[2], [4]], [[1], [2], [3]]], [(1, 8), (1, 4)], batch=2)
    assert found == [SampleWords(((2,), (4,)), (1, 8)), SampleWords(((1,), (2,), (3,)), (1, 4))]


def test_words_of_each_sample_may_share_a_range():
    assert [one.text_range for one in words([[[2]], [[3]]], batch=2)] == [(1, 8)] * 2


def test_other_integers_and_sequences_are_taken():
    assert words(((np.int64(2),), (3,)), (np.int32(1), 8)) == [SampleWords(((2,), (3,)), (1, 8))]


@pytest.mark.parametrize(
    ("groups", "text_range", "batch", "message"),
    [
        ([[[2]], [[3]]], (1, 8), 3, r"`token_groups`.*3 samples, got 2"),
        ([[2]], [(1, 8), (1, 8)], 1, r"`text_range`.*1 samples, got 2"),
        ([[2], []], (1, 8), 1, r"`token_groups\[1\]` is empty"),
        ([[[2], []]], (1, 8), 1, r"`token_groups\[1\]` is empty"),
        ([], (1, 8), 1, r"list of words.*got \[\]"),
        ([2, 3], (1, 8), 1, "list of words"),
        ("ab", (1, 8), 1, "list of words"),
        ([[2], [8]], (1, 8), 1, r"within `text_range`, 1 to 7, got 8"),
        ([[0]], (1, 8), 1, r"1 to 7, got 0"),
        ([["2"]], (1, 8), 1, r"got '2'"),
        ([[2], [3, 2]], (1, 8), 1, "position 2 twice"),
        ([[2]], (8, 1), 1, r"`text_range`.*\(8, 1\)"),
        ([[2]], 8, 1, r"`text_range`.*got 8"),
        ([[2]], (1, 8.0), 1, "`text_range`"),
    ],
)
def test_what_does_not_fit_is_refused(groups, text_range, batch, message):
    with pytest.raises(ValueError, match=message):
        words(groups, text_range, batch)


@pytest.mark.parametrize(
    "fields", [{"token_weights": (1.0, 2.0, 3.0)}, {"regions": (None,)}, {"negative_words": (2,)}]
)
def test_fields_with_an_entry_a_word_must_fit_every_sample(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`.*2 words"):
        words([[2], [3]], **fields)
