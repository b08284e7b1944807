"""Words of a prompt and their tokens, for tokenizers that begin with a token of their own and that do not."""

import sys
import types

import nltk
import pytest

from diffusers_ext.vico import resolve_tokens
from tests.tiny_checkpoints.parts import TEXT_LENGTH, clip_tokenizer, t5_tokenizer


PROMPT = "a red cat on a mat"


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def t5():
    return t5_tokenizer()


def shown(tokenizer, prompt, groups, max_length=None):
    """The characters that the tokens of each group stand for."""
    limits = {} if max_length is None else {"truncation": True, "max_length": max_length}
    spans = tokenizer(prompt, return_offsets_mapping=True, **limits)["offset_mapping"]
    return [[prompt[slice(*spans[token])].strip() for token in group] for group in groups]


# Where words are


def test_clip_counts_its_begin_token_and_t5_has_none(clip, t5):
    words = len(PROMPT.split())
    groups, text_range = resolve_tokens(clip, PROMPT, ["cat"])
    assert (groups, text_range) == ([[3]], (1, words + 1))
    assert shown(clip, PROMPT, groups) == [["cat"]]
    groups, (start, end) = resolve_tokens(t5, PROMPT, ["cat"])
    assert start == 0
    assert "".join(shown(t5, PROMPT, groups)[0]) == "cat"
    assert end == len(t5(PROMPT).input_ids) - 1, "its end token is not of the text"


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_phrase_has_the_tokens_of_all_its_words(kind, request):
    tokenizer = request.getfixturevalue(kind)
    groups, _ = resolve_tokens(tokenizer, PROMPT, ["red cat", "mat"])
    assert ["".join(group) for group in shown(tokenizer, PROMPT, groups)] == ["redcat", "mat"]


def test_a_word_that_is_split_has_all_its_tokens(clip):
    prompt = "a catdog on a mat"  # not in the vocabulary
    groups, _ = resolve_tokens(clip, prompt, ["catdog"])
    assert len(groups[0]) > 1
    assert "".join(shown(clip, prompt, groups)[0]) == "catdog"


def test_case_and_spaces_do_not_matter_and_punctuation_is_no_part(clip):
    prompt = "A Red   Cat, on a mat."
    groups, _ = resolve_tokens(clip, prompt, ["red cat", "MAT"])
    assert ["".join(group) for group in shown(clip, prompt, groups)] == ["RedCat", "mat"]


def test_a_word_is_found_at_its_first_place_and_never_inside_another(clip):
    prompt = "a catdog and a cat and a cat"
    groups, _ = resolve_tokens(clip, prompt, ["cat"])
    spans = clip(prompt, return_offsets_mapping=True)["offset_mapping"]
    assert [spans[token] for token in groups[0]] == [(15, 18)]
    with pytest.raises(ValueError, match=r"`subjects`.*'dog'.*not in 'a catdog'"):
        resolve_tokens(clip, "a catdog", ["dog"])


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_hyphen_and_an_apostrophe_end_a_word_but_digits_and_underscores_do_not(kind, request):
    tokenizer, prompt = request.getfixturevalue(kind), "a red-cat's mat"
    groups, _ = resolve_tokens(tokenizer, prompt, ["cat", "red", "mat"])
    assert ["".join(group) for group in shown(tokenizer, prompt, groups)] == ["cat", "red", "mat"]
    whole, _ = resolve_tokens(tokenizer, prompt, ["red-cat"])
    assert "".join(shown(tokenizer, prompt, whole)[0]) == "red-cat"
    with pytest.raises(ValueError, match="got 'cat', which is not in"):
        resolve_tokens(tokenizer, "cat2 cat_b bobcat", ["cat"])


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_letters_of_several_bytes_do_not_shift_the_words_behind_them(kind, request):
    """CLIP has a token a byte for them; T5 has one that stands for all letters it does not know."""
    tokenizer, prompt = request.getfixturevalue(kind), "É “cat” mat"
    groups, _ = resolve_tokens(tokenizer, prompt, ["mat", "cat"])
    assert ["".join(group) for group in shown(tokenizer, prompt, groups)] == ["mat", "cat"]


def test_the_words_of_a_phrase_stand_side_by_side(clip):
    prompt = "a red, cat"
    with pytest.raises(ValueError, match="got 'red cat', which is not in 'a red, cat'"):
        resolve_tokens(clip, prompt, ["red cat"])
    assert resolve_tokens(clip, prompt, ["red, cat"])[0] == [[2, 3, 4]]


def test_words_come_in_the_order_in_which_they_are_named(clip):
    assert resolve_tokens(clip, PROMPT, ["mat", "red", "cat"])[0] == [[6], [2], [3]]


def test_signs_in_a_phrase_are_taken_as_they_are(clip):
    with pytest.raises(ValueError, match=r"got 'c\.t'"):
        resolve_tokens(clip, PROMPT, ["c.t"])


def test_positions_are_taken_one_or_several_a_word(clip):
    assert resolve_tokens(clip, PROMPT, token_indices=[3, [2, 6]]) == ([[3], [2, 6]], (1, 7))


def test_prompts_of_a_list_have_words_of_their_own(clip):
    groups, ranges = resolve_tokens(clip, [PROMPT, "a dog"], [["cat", "mat"], ["dog"]])
    assert groups == [[[3], [6]], [[2]]]
    assert ranges == [(1, 7), (1, 3)]
    assert resolve_tokens(clip, [PROMPT], token_indices=[[2, 3]])[0] == [[[2], [3]]]


def test_no_subjects_are_no_words(clip):
    assert resolve_tokens(clip, PROMPT, []) == ([], (1, 7))


# Cut prompts


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_range_ends_where_the_prompt_is_cut(kind, request):
    tokenizer = request.getfixturevalue(kind)
    long = " ".join(["a red cat"] * 20)
    _, (start, end) = resolve_tokens(tokenizer, long, ["red"], max_length=TEXT_LENGTH)
    ids = tokenizer(long, truncation=True, max_length=TEXT_LENGTH).input_ids
    assert len(ids) == TEXT_LENGTH and end == TEXT_LENGTH - 1, "the last is the end token"


def test_the_limit_of_the_tokenizer_counts_unless_another_is_given(clip):
    long = " ".join(["a red cat"] * 20)
    assert resolve_tokens(clip, long, ["red"])[1] == (1, clip.model_max_length - 1)
    assert resolve_tokens(clip, long, ["red"], max_length=6)[1] == (1, 5)


def test_a_tokenizer_without_a_limit_cuts_nothing(t5):
    """Such a one says 10^30, which is no length that Rust could take."""
    unlimited = t5_tokenizer()
    unlimited.model_max_length = int(1e30)
    long = " ".join(["a red cat"] * 20) + " mat"
    groups, (start, end) = resolve_tokens(unlimited, long, ["mat"])
    assert (start, end) == (0, len(unlimited(long, truncation=False).input_ids) - 1)
    assert groups == [[end - 1]]
    with pytest.raises(ValueError, match="'mat'.*truncated away"):
        resolve_tokens(t5, long, ["mat"])


@pytest.mark.parametrize(("kind", "around"), [("clip", 2), ("t5", 1)])
def test_a_length_without_room_for_the_tokens_around_a_prompt_is_refused(kind, around, request):
    tokenizer = request.getfixturevalue(kind)
    for length in (around - 1, -1, 8.0, True, "8"):
        with pytest.raises(ValueError, match=f"`max_length`.*at least {around}.*got {length!r}"):
            resolve_tokens(tokenizer, PROMPT, ["cat"], max_length=length)
    with pytest.raises(ValueError, match=r"first 0 tokens.*got 'cat'.*What is left: none\."):
        resolve_tokens(tokenizer, PROMPT, ["cat"], max_length=around)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_an_empty_prompt_has_no_word_and_no_position(kind, request):
    tokenizer = request.getfixturevalue(kind)
    groups, (start, end) = resolve_tokens(tokenizer, "", [])
    assert groups == [] and start == end
    with pytest.raises(ValueError, match="got 'cat', which is not in ''"):
        resolve_tokens(tokenizer, "", ["cat"])
    with pytest.raises(ValueError, match=r"for '', got 0\. Its tokens: none\."):
        resolve_tokens(tokenizer, "", token_indices=[0])


def test_a_word_that_is_cut_in_two_is_not_enough(clip):
    prompt = "a catdog"
    assert len(clip(prompt).input_ids) > 4
    with pytest.raises(ValueError, match="first 2 tokens.*'catdog'.*truncated away.*1: 'a.*2: 'ca'"):
        resolve_tokens(clip, prompt, ["catdog"], max_length=4)


def test_a_word_that_is_cut_away_is_refused_with_what_is_left(clip):
    with pytest.raises(ValueError, match=r"first 4 tokens.*'mat'.*truncated away.*1: .*4: "):
        resolve_tokens(clip, PROMPT, ["mat"], max_length=6)


def test_half_a_phrase_is_not_enough(clip):
    with pytest.raises(ValueError, match="'cat on'.*truncated away"):
        resolve_tokens(clip, PROMPT, ["cat on"], max_length=5)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["dog"]}, r"`subjects`.*got 'dog', which is not in 'a red cat on a mat'"),
        ({"subjects": [" "]}, "empty phrase"),
        ({"subjects": "cat"}, "`subjects` must be a list.*got 'cat'"),
        ({"subjects": ["cat", 3]}, r"`subjects` must be a list.*\['cat', 3\]"),
        ({"subjects": ["red cat", "cat"]}, "`subjects` must not share.*'red cat' and 'cat' both have token 3, 'cat"),
        ({"subjects": ["cat", "CAT"]}, "`subjects` must not share tokens.*'cat' and 'CAT' both have token 3"),
        ({"token_indices": [0]}, r"in 1\.\.6.*got 0.*1: 'a.*2: 'red.*6: 'mat"),
        ({"token_indices": [7]}, r"in 1\.\.6.*got 7"),
        ({"token_indices": [[]]}, "empty group"),
        ({"token_indices": 3}, "`token_indices` must be a list.*got 3"),
        ({"token_indices": ["3"]}, "integers or lists.*got '3'"),
        ({"token_indices": [True]}, "integers or lists.*got True"),
        ({"token_indices": [-1]}, r"in 1\.\.6.*got -1"),
        ({"token_indices": [3.0]}, r"integers or lists.*got 3\.0"),
        ({"token_indices": [3, [2, 3]]}, r"`token_indices` must not share tokens.*\[3\] and \[2, 3\].*token 3"),
        ({"token_indices": [3], "subjects": ["cat"]}, "not both"),
    ],
)
def test_words_that_cannot_be_are_named(clip, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_tokens(clip, PROMPT, **options)


@pytest.mark.parametrize(
    "options", [{"subjects": ["cat"]}, {"subjects": [["cat"]]}, {"subjects": [["cat"], "dog"]}, {"token_indices": [3]}]
)
def test_lists_of_another_length_than_the_prompts_are_refused(clip, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be a list for each of the 2 prompts"):
        resolve_tokens(clip, [PROMPT, "a dog"], **options)


@pytest.mark.parametrize("prompt", [3, [], ["a", 3], None])
def test_a_prompt_is_a_string_or_a_list_of_them(clip, prompt):
    with pytest.raises(TypeError, match="`prompt` must be a string or a list"):
        resolve_tokens(clip, prompt, ["cat"])


def test_a_tokenizer_that_does_not_tell_characters_is_refused():
    with pytest.raises(TypeError, match="`tokenizer` must be a fast tokenizer.*got SimpleNamespace"):
        resolve_tokens(types.SimpleNamespace(is_fast=False), PROMPT, ["cat"])


# Nouns and verbs


@pytest.fixture
def tagger(monkeypatch):
    """NLTK's tagger needs data that is not there; this one knows the words of the tests."""
    tags = {"cat": "NN", "dogs": "NNS", "mat": "NN", "runs": "VBZ", "is": "VBZ", "red": "JJ"}
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, tags.get(word.lower(), "DT")) for word in words])


def test_nouns_and_verbs_are_found_once_each_and_auxiliaries_are_not(clip, tagger):
    prompt = "the Cat is red and runs on a mat, a cat"
    groups, _ = resolve_tokens(clip, prompt)
    assert shown(clip, prompt, groups) == [["Cat"], ["runs"], ["mat"]]


def test_a_found_word_that_is_cut_in_two_is_left_out(clip, monkeypatch):
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, "NN") for word in words])
    prompt = "mat catdog"
    groups, _ = resolve_tokens(clip, prompt, max_length=4)
    assert shown(clip, prompt, groups, 4) == [["mat"]]


def test_found_words_keep_their_places_beside_quotes_and_signs(clip, tagger):
    prompt = "the ``cat'' \"runs\" (mat)."
    groups, _ = resolve_tokens(clip, prompt)
    assert shown(clip, prompt, groups) == [["cat"], ["runs"], ["mat"]]


def test_a_prompt_without_nouns_and_verbs_has_no_words(clip, tagger):
    assert resolve_tokens(clip, "the red", None)[0] == []


def test_nouns_that_are_cut_away_are_left_out(clip, tagger):
    groups, _ = resolve_tokens(clip, PROMPT, max_length=6)
    assert shown(clip, PROMPT, groups, 6) == [["cat"]]


def test_each_prompt_of_a_list_has_its_own_nouns(clip, tagger):
    groups, _ = resolve_tokens(clip, ["a cat on a mat", "the dog runs"])
    assert [len(one) for one in groups] == [2, 1]


def test_without_the_taggers_data_it_says_what_to_do_and_downloads_nothing(clip, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.downloader, "download", download)
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ImportError, match=r"nltk\.downloader averaged_perceptron_tagger_eng.*`subjects="):
        resolve_tokens(clip, PROMPT)


def test_words_that_are_given_need_no_nltk(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert resolve_tokens(clip, PROMPT, ["cat"])[0] == resolve_tokens(clip, PROMPT, token_indices=[3])[0] == [[3]]


def test_without_nltk_it_says_what_to_do(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"diffusers-ext\[vico\].*`subjects="):
        resolve_tokens(clip, PROMPT)
