"""Which tokens of a prompt are the words to equalise, and which tokens share the attention at all.

A word of a prompt is no token: it may be several, a prompt may be cut, and models put other tokens around it. Here
words are found by the characters that each token stands for, which fast tokenizers tell.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


TokenGroups = list[list[int]]
TextRange = tuple[int, int]
# Penn Treebank tags of nouns and verbs begin so.
_NOUNS_AND_VERBS = ("NN", "VB")
# Forms of to be and to have: verbs that name no subject and no motion.
_AUXILIARIES = frozenset("am are be been being do does did had has have is was were 's 're 've 'm".split())
# A tokenizer without a limit has a number like 10^30 for one.
_LONGEST = 10**6


@dataclass(frozen=True)
class _Text:
    """A prompt as its tokens between those that begin and end it: `start`.. in the prompt's positions."""

    prompt: str
    start: int
    tokens: list[str]
    spans: list[tuple[int, int]]

    @property
    def range(self) -> TextRange:
        return self.start, self.start + len(self.tokens)

    @property
    def table(self) -> str:
        return ", ".join(f"{index}: {token!r}" for index, token in enumerate(self.tokens, self.start)) or "none"


def resolve_tokens(
    tokenizer: Any,
    prompt: str | Sequence[str],
    subjects: Sequence[str] | Sequence[Sequence[str]] | None = None,
    token_indices: Sequence[int | Sequence[int]] | Sequence[Sequence[int | Sequence[int]]] | None = None,
    *,
    max_length: int | None = None,
) -> tuple[TokenGroups, TextRange] | tuple[list[TokenGroups], list[TextRange]]:
    """The groups of tokens to equalise, and the range of tokens between those that begin and end the prompt.

    Args:
        tokenizer: of transformers, a fast one; its own limit cuts the prompt unless `max_length` is given.
        prompt: one, or a list of them.
        subjects: words or phrases of the prompt, in their order the words of `VicoConfig`; found without regard to
            case, as whole words, at their first place. For a list of prompts: a list for each.
        token_indices: instead, positions of tokens, with BOS (CLIP) at 0; each entry one token or the tokens of one
            word. For a list of prompts: a list for each.
        max_length: tokens to which the pipeline cuts prompts, with those that begin and end them.

    Neither given: the nouns and verbs that NLTK finds, each word once.

    Returns:
        (token_groups, text_range), positions and a half-open range of positions; for a list of prompts, lists of both.

    Raises:
        ValueError: a phrase that is not there or is cut away, an index outside of the range (the message has the
            tokens), a word without tokens, tokens in two words, `subjects` and `token_indices` both, lists of another
            length than `prompt`, or a `max_length` that leaves no room for the tokens around the prompt.
        TypeError: a prompt that is no string, a tokenizer that does not tell characters.
        ImportError: neither given, and NLTK or its data is missing.
    """
    if subjects is not None and token_indices is not None:
        raise ValueError("Give `subjects` or `token_indices`, not both.")
    if isinstance(prompt, str):
        return _resolve_one(tokenizer, prompt, subjects, token_indices, max_length)
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
    by_prompt = []
    for name, given in (("subjects", subjects), ("token_indices", token_indices)):
        entries = [None] * len(prompt) if given is None else given
        listed = isinstance(entries, Sequence) and not isinstance(entries, str) and len(entries) == len(prompt)
        if not listed or not (given is None or all(_is_list(entry) for entry in entries)):
            raise ValueError(f"`{name}` must be a list for each of the {len(prompt)} prompts, got {given!r}.")
        by_prompt.append(entries)
    found = [
        _resolve_one(tokenizer, text, names, indices, max_length)
        for text, names, indices in zip(prompt, *by_prompt, strict=True)
    ]
    return [groups for groups, _ in found], [text_range for _, text_range in found]


def _resolve_one(
    tokenizer: Any, prompt: str, subjects: Any, token_indices: Any, max_length: int | None
) -> tuple[TokenGroups, TextRange]:
    text = _tokenize(tokenizer, prompt, max_length)
    argument = "`subjects`"
    if token_indices is not None:
        argument, groups = "`token_indices`", _given_groups(text, token_indices)
    elif subjects is None:
        argument, groups = "the prompt", _found_groups(text)
    elif not _is_list(subjects) or not all(isinstance(phrase, str) for phrase in subjects):
        raise ValueError(f"`subjects` must be a list of words or phrases of the prompt, got {subjects!r}.")
    else:
        groups = [_phrase_tokens(text, phrase) for phrase in subjects]
    _check_distinct(text, argument, groups, subjects or groups)
    return groups, text.range


def _tokenize(tokenizer: Any, prompt: str, max_length: int | None) -> _Text:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"`tokenizer` must be a fast tokenizer of transformers, which tells the characters of each token, got "
            f"{type(tokenizer).__name__}."
        )
    around = tokenizer.num_special_tokens_to_add()
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < around
    ):
        raise ValueError(
            f"`max_length` must be None or an integer of at least {around}, the tokens around a prompt, got "
            f"{max_length!r}."
        )
    limit = tokenizer.model_max_length if max_length is None else max_length
    cut = {"truncation": True, "max_length": limit} if limit < _LONGEST else {}
    encoded = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True, **cut)
    places = [place for place, special in enumerate(encoded["special_tokens_mask"]) if not special]
    start = places[0] if places else max(0, len(encoded["special_tokens_mask"]) - 1)  # of no text: before EOS
    return _Text(
        prompt,
        start,
        tokenizer.convert_ids_to_tokens([encoded["input_ids"][place] for place in places]),
        [tuple(encoded["offset_mapping"][place]) for place in places],
    )


def _given_groups(text: _Text, token_indices: Any) -> TokenGroups:
    if not _is_list(token_indices):
        raise ValueError(f"`token_indices` must be a list of token positions, got {token_indices!r}.")
    groups = [list(entry) if _is_list(entry) else [entry] for entry in token_indices]
    first, end = text.range
    for group in groups:
        if not group:
            raise ValueError("`token_indices` must have at least one token for each word, got an empty group.")
        for index in group:
            if isinstance(index, bool) or not isinstance(index, int):
                raise ValueError(f"`token_indices` must be integers or lists of them, got {index!r}.")
            if not first <= index < end:
                raise ValueError(
                    f"`token_indices` must be in {first}..{end - 1} for {text.prompt!r}, got {index}. Its tokens: "
                    f"{text.table}."
                )
    return groups


def _phrase_tokens(text: _Text, phrase: str) -> list[int]:
    """Positions of the tokens that stand for any of the phrase's characters."""
    words = phrase.split()
    if not words:
        raise ValueError("`subjects` must not hold an empty phrase.")
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    match = re.search(pattern, text.prompt, re.IGNORECASE)
    if match is None:
        raise ValueError(f"`subjects` must be words of the prompt, got {phrase!r}, which is not in {text.prompt!r}.")
    return _span_tokens(text, *match.span())


def _span_tokens(text: _Text, start: int, end: int) -> list[int]:
    found = [place for place, (low, high) in enumerate(text.spans) if max(low, start) < min(high, end)]
    if not found or text.spans[found[-1]][1] < end:
        raise ValueError(
            f"`subjects` must be among the first {len(text.tokens)} tokens of the prompt, got "
            f"{text.prompt[start:end]!r}, which is truncated away. What is left: {text.table}."
        )
    return [text.start + place for place in found]


def _found_groups(text: _Text) -> TokenGroups:
    """Of nouns and verbs, each word at its first place; those that are truncated away are left out."""
    spans: dict[str, tuple[int, int]] = {}
    end_of_text = text.spans[-1][1] if text.spans else 0
    for start, end in _noun_and_verb_spans(text.prompt):
        if end <= end_of_text:
            spans.setdefault(text.prompt[start:end].lower(), (start, end))
    return [_span_tokens(text, *span) for span in spans.values()]


def _noun_and_verb_spans(prompt: str) -> list[tuple[int, int]]:
    """Characters of the nouns and verbs by NLTK's tagger, but for auxiliaries.

    Raises:
        ImportError: NLTK or the tagger's data is missing; it is never downloaded from here.
    """
    advice = "or name the words: `subjects=[...]`."
    try:
        import nltk
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise ImportError(
            f'Finding nouns and verbs needs NLTK. Install it with `pip install "diffusers-ext[vico]"`, {advice}'
        ) from error
    spans = list(NLTKWordTokenizer().span_tokenize(prompt))
    words = [prompt[start:end] for start, end in spans]
    try:
        tags = [tag for _, tag in nltk.pos_tag(words)]
    except LookupError as error:
        raise ImportError(
            "Finding nouns and verbs needs the data of NLTK's tagger. Download it with `python -m nltk.downloader "
            f"averaged_perceptron_tagger_eng`, {advice}"
        ) from error
    return [
        span
        for span, word, tag in zip(spans, words, tags, strict=True)
        if tag.startswith(_NOUNS_AND_VERBS) and word.lower() not in _AUXILIARIES
    ]


def _check_distinct(text: _Text, argument: str, groups: TokenGroups, names: Sequence[Any]) -> None:
    owner: dict[int, Any] = {}
    for group, name in zip(groups, names, strict=True):
        for token in group:
            if token in owner:
                raise ValueError(
                    f"Words of {argument} must not share tokens, but {owner[token]!r} and {name!r} both have token "
                    f"{token}, {text.tokens[token - text.start]!r}."
                )
            owner[token] = name


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
