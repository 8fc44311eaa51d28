# ruff: noqa: RUF001 - curly apostrophes are what some of this is about
"""Planning tokens: grams in text, characters of tokens, and the two together, against brute force."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from retrain.planning import detect, open_detector
from retrain.planning.offsets import TokenOffsets
from retrain.planning.regex import DEFAULT_GRAMS, compile_grams, occurrences, parse_grams
from retrain.types import ConfigError

TEXT = "Wait, let me check 😀: that’s naïve. 2+2 = 4 🎉 … Hmm, that's not right; we start over. Double check, café!\n"


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken(" ✓ over", normalized=False)])  # spelt out, not in the byte alphabet
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_tokenizer(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    words = [
        "▁let",
        "▁me",
        "▁wait",
        "let",
        "me",
        "▁check",
        "ing",
        "▁start",
        "▁over",
        "night",
        "that",
        "’s",
        "▁not▁right",
    ]
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", *words, *"abcdefghijklmnopqrstuvwxyz'’é.,!"]
    vocab = [(piece, -float(len(pieces) - len(piece))) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


BYTE_LEVEL = byte_level_tokenizer()
LLAMA_LIKE = sentencepiece_tokenizer(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
GEMMA_LIKE = sentencepiece_tokenizer(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
)
METASPACE = sentencepiece_tokenizer(decoders.Metaspace())
TOKENIZERS = {"byte_level": BYTE_LEVEL, "llama": LLAMA_LIKE, "gemma": GEMMA_LIKE, "metaspace": METASPACE}


def sequences(tokenizer) -> st.SearchStrategy[list[int]]:
    """Random tokens, ids beyond the vocabulary, special tokens, single bytes, and stretches of gram-like text."""
    texts = [
        "let me check",
        " Wait let me",
        "that’s not right",
        "start over",
        "overnight",
        "😀",
        "é",
        " ",
        "let",
        "me",
        "er",
    ]
    stretches = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    stretches += [[i] for i in tokenizer.all_special_ids] + [[len(tokenizer) + 3]]
    byte_tokens = [i for t, i in tokenizer.get_vocab().items() if len(t) == 1 or re.fullmatch("<0x..>", t)]
    stretches += [byte_tokens_of(tokenizer, text) for text in ("😀", "wait let me", "that’s")]
    chunk = st.one_of(
        st.integers(0, len(tokenizer) - 1).map(lambda i: [i]),
        st.sampled_from(byte_tokens).map(lambda i: [i]),
        st.sampled_from(stretches),
        st.sampled_from(stretches).flatmap(lambda s: st.integers(0, len(s)).map(lambda n: s[:n])),
    )
    return st.lists(chunk, max_size=14).map(lambda chunks: [i for chunk in chunks for i in chunk])


def byte_tokens_of(tokenizer, text: str) -> list[int]:
    spell = bytes_to_unicode().__getitem__ if tokenizer is BYTE_LEVEL else "<0x{:02X}>".format
    return [tokenizer.convert_tokens_to_ids(spell(byte)) for byte in text.encode()]


def owned_characters(tokenizer, token_ids: list[int]) -> list[tuple[str, set[int]]]:
    """Each character of the text with the positions of the tokens that wrote it, byte by byte from the vocabulary."""
    backwards = {char: byte for byte, char in bytes_to_unicode().items()}
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    contributing = [(t, tokenizer.convert_ids_to_tokens(i)) for t, i in enumerate(token_ids) if i not in specials]
    contributing = [(t, token) for t, token in contributing if token is not None]
    characters: list[tuple[str, set[int]]] = []
    if tokenizer is BYTE_LEVEL:
        owned = []
        for t, token in contributing:
            literal = any(char not in backwards for char in token)
            owned += [(t, b) for b in (token.encode() if literal else [backwards[char] for char in token])]
        return utf8_characters(owned)
    run: list[tuple[int, int]] = []
    for t, token in [*contributing, (-1, "")]:
        if re.fullmatch("<0x..>", token):
            run.append((t, int(token[3:5], 16)))
            continue
        decoded = utf8_characters(run)
        try:
            bytes(byte for _, byte in run).decode()
        except UnicodeDecodeError:
            decoded = [("�", {owner}) for owner, _ in run]
        characters += decoded + [(char.replace("▁", " "), {t}) for char in token]
        run = []
    if tokenizer is LLAMA_LIKE and characters and characters[0][0] == " ":
        characters = characters[1:]
    return characters


def utf8_characters(owned: list[tuple[int, int]]) -> list[tuple[str, set[int]]]:
    """Longest valid prefix of a sequence, or the whole character, one after another (Unicode 3.9, table 3-8)."""
    characters = []
    while owned:
        whole = next((n for n in range(1, 5) if is_utf8(owned[:n])), None)
        if whole:
            taken, char = whole, bytes(b for _, b in owned[:whole]).decode()
        else:
            taken, char = max((n for n in range(1, 4) if can_continue(owned[:n])), default=1), "�"
        characters.append((char, {t for t, _ in owned[:taken]}))
        owned = owned[taken:]
    return characters


def is_utf8(owned: list[tuple[int, int]]) -> bool:
    try:
        return len(bytes(b for _, b in owned).decode()) == 1
    except UnicodeDecodeError:
        return False


def can_continue(owned: list[tuple[int, int]]) -> bool:
    """Whether some completion of these bytes is a character (trying the extreme second and later bytes suffices)."""
    prefix = [b for _, b in owned]
    tails = ([], [0x80], [0xBF], [0x90], [0x9F], [0xA0], [0x8F])
    return any(is_utf8([(0, b) for b in prefix + tail + [0x80] * extra]) for tail in tails for extra in range(3))


def marked_by_hand(text: str, grams: tuple[str, ...]) -> list[bool]:
    """Characters within an occurrence of a gram, found by walking through the lower-cased text."""
    plain = "".join("'" if c in "’‘ʼ＇" else c.lower() if len(c.lower()) == 1 else c for c in text)
    marks = [False] * len(plain)
    word = lambda i: 0 <= i < len(plain) and (plain[i].isalnum() or plain[i] == "_")  # noqa: E731
    for gram in grams:
        for start in range(len(plain)):
            position, fits = start, not word(start - 1)
            for n, part in enumerate(gram.replace("’", "'").lower().split()):
                spaces = 0
                while n and position < len(plain) and plain[position].isspace():
                    position, spaces = position + 1, spaces + 1
                fits = fits and (n == 0 or spaces > 0) and plain.startswith(part, position)
                position += len(part)
            if fits and not word(position):
                marks[start:position] = [True] * (position - start)
    return marks


def planning_by_prefixes(tokenizer, token_ids: list[int], marks: list[bool]) -> list[bool]:
    """A token stands for what changes between the decoded text before it and after it."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    planning = []
    for t, i in enumerate(token_ids):
        before = tokenizer.decode(token_ids[:t], skip_special_tokens=True)
        after = tokenizer.decode(token_ids[: t + 1], skip_special_tokens=True)
        agreed = 0
        while agreed < min(len(before), len(text)) and before[agreed] == text[agreed]:
            agreed += 1
        empty = tokenizer.decode([i], skip_special_tokens=True) == ""
        planning.append(not empty and any(marks[agreed : len(after)]))
    return planning


@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_are_the_characters_each_token_wrote(name):
    tokenizer = TOKENIZERS[name]
    offsets = TokenOffsets(tokenizer)

    @settings(max_examples=300, deadline=None)
    @given(sequences(tokenizer))
    def check(token_ids):
        text = offsets.text(token_ids)
        assert text == tokenizer.decode(token_ids, skip_special_tokens=True)
        spans = offsets.spans(token_ids, text)
        assert spans.shape == (len(token_ids), 2) and spans.dtype == np.int64
        if name == "metaspace":  # writes byte tokens by their names: each character belongs to one token
            assert "".join(text[start:end] for start, end in spans).lstrip() == text.lstrip()
        else:
            characters = owned_characters(tokenizer, token_ids)
            assert "".join(char for char, _ in characters) == text  # the oracle agrees with the tokenizer
            for t, (start, end) in enumerate(spans):
                assert list(range(start, end)) == [c for c, (_, owners) in enumerate(characters) if t in owners]
        covered = sorted({c for start, end in spans for c in range(start, end)})
        assert covered == list(range(len(text)))
        assert (np.diff(spans[:, 0]) >= 0).all()

    check()


@settings(max_examples=300, deadline=None)
@given(sequences(BYTE_LEVEL))
@example(byte_tokens_of(BYTE_LEVEL, "😀")[:2] + byte_tokens_of(BYTE_LEVEL, "wait let me")[:11])
@example(byte_tokens_of(BYTE_LEVEL, "that’s not right"))
def test_planning_mask_is_that_of_brute_force(token_ids):
    text = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    expected = planning_by_prefixes(BYTE_LEVEL, token_ids, marked_by_hand(text, DEFAULT_GRAMS))
    assert detect("regex", token_ids, BYTE_LEVEL).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(sequences(LLAMA_LIKE))
def test_planning_mask_of_a_sentencepiece_tokenizer(token_ids):
    characters = owned_characters(LLAMA_LIKE, token_ids)
    marks = marked_by_hand("".join(char for char, _ in characters), DEFAULT_GRAMS)
    planning = {t for (_, owner), mark in zip(characters, marks, strict=True) if mark for t in owner}
    mask = detect("regex", token_ids, LLAMA_LIKE)
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == sorted(planning)


gram_text = st.lists(
    st.sampled_from(
        [*"letmchk'’\n\t .,_9É", "let", "me", "check", "wait", "that's", "not", "right", " ", "start", "over"]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(gram_text, st.sampled_from([DEFAULT_GRAMS, ("me", "let me", "let me check"), ("me che", "t let", "that’s not")]))
def test_occurrences_are_those_found_by_hand(text, grams):
    marks = [False] * len(text)
    for start, end in occurrences(compile_grams(grams), text):
        marks[start:end] = [True] * (end - start)
    assert marks == marked_by_hand(text, grams)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so LET\n  Me\tcheck it", ["LET\n  Me\tcheck"]),
        ("restart overnight; start overnight; restart over", []),
        ("start over!", ["start over"]),
        ("_start over", []),
        ("that’s not right, that's not right", ["that’s not right", "that's not right"]),
        ("wait let me think", ["wait let me", "let me think"]),  # overlapping
        ("the key insight is the key", ["the key insight"]),
        ("letme check", []),
        ("", []),
    ],
)
def test_default_grams(text, found):
    assert [text[a:b] for a, b in occurrences(compile_grams(DEFAULT_GRAMS), text)] == found


def test_of_grams_that_begin_alike_the_longest_counts():
    text = "let me check, let me"
    for grams in (["let me", "let me check"], ["let me check", "let me"]):
        assert list(occurrences(compile_grams(grams), text)) == [(0, 12), (14, 20)]


def test_there_are_eighteen_default_grams_and_each_is_found():
    assert len(set(DEFAULT_GRAMS)) == 18
    for gram in DEFAULT_GRAMS:
        assert list(occurrences(compile_grams(DEFAULT_GRAMS), gram.upper())) == [(0, len(gram))]


def test_a_gram_may_begin_or_end_with_punctuation():
    assert list(occurrences(compile_grams(["hmm...", "(a)"]), "hmm... x(A)b hmm")) == [(0, 6), (8, 11)]


def test_grams_split_over_tokens_and_tokens_that_stand_near_one():
    tokens = byte_tokens_of(BYTE_LEVEL, "so let me check 😀")
    expected = [False] * 3 + [True] * len("let me check") + [False] * 5
    assert detect("regex", tokens, BYTE_LEVEL).tolist() == expected
    sampled = BYTE_LEVEL.encode("restart overnight, then start", add_special_tokens=False)
    assert not detect("regex", sampled, BYTE_LEVEL).any()


def test_a_token_with_part_of_a_gram_plans_as_a_whole():
    tokens = LLAMA_LIKE.encode("wait let me", add_special_tokens=False)
    assert LLAMA_LIKE.convert_ids_to_tokens(tokens) == ["▁wait", "▁let", "▁me"]
    assert detect("regex", tokens, LLAMA_LIKE).tolist() == [True] * 3
    assert detect("regex", tokens, LLAMA_LIKE, grams=["let"]).tolist() == [False, True, False]


def test_a_special_token_within_a_character_or_a_gram_is_empty():
    end = BYTE_LEVEL.eos_token_id
    smile = byte_tokens_of(BYTE_LEVEL, "😀")
    offsets = TokenOffsets(BYTE_LEVEL)
    tokens = [*smile[:2], end, *smile[2:]]
    assert offsets.text(tokens) == "😀"
    assert offsets.spans(tokens, "😀").tolist() == [[0, 1], [0, 1], [0, 0], [0, 1], [0, 1]]
    gram = byte_tokens_of(BYTE_LEVEL, "start over")
    assert detect("regex", [*gram[:4], end, *gram[4:]], BYTE_LEVEL).tolist() == [True] * 4 + [False] + [True] * 6


@pytest.mark.timeout(20)  # decoding every prefix would take minutes
def test_long_completions_take_linear_time():
    token_ids = np.random.default_rng(0).integers(0, len(BYTE_LEVEL), 20_000).tolist()
    offsets = TokenOffsets(BYTE_LEVEL)
    text = offsets.text(token_ids)
    assert text.count("�") > 1000
    assert offsets.spans(token_ids, text)[-1, 1] == len(text)


def test_no_tokens():
    mask = detect("regex", [], BYTE_LEVEL)
    assert mask.shape == (0,) and mask.dtype == bool
    assert TokenOffsets(BYTE_LEVEL).spans([], "").shape == (0, 2)


WORDS = ["[UNK]", "[SEP]", "start", "over", "re", "##start", "##over", "let", "me", "##t", "."]


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(cleanup=False), decoders.BPEDecoder(suffix="t")])
def test_other_decoders_are_followed_prefix_by_prefix(decoder):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    offsets = TokenOffsets(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
    def check(token_ids):
        text = offsets.text(token_ids)
        spans = offsets.spans(token_ids, text)
        joined = "".join(text[start:end] for start, end in spans)
        assert joined == text
        marks = marked_by_hand(text, DEFAULT_GRAMS)
        expected = planning_by_prefixes(tokenizer, token_ids, marks)
        assert detect("regex", token_ids, tokenizer).tolist() == expected

    check()


def test_a_slow_tokenizer_of_bytes():
    tokenizer = ByT5Tokenizer()
    tokens = [*tokenizer.encode("é 😀 start over", add_special_tokens=False), tokenizer.eos_token_id]
    offsets = TokenOffsets(tokenizer)
    assert offsets.text(tokens) == "é 😀 start over"
    ends = [1, 1, 2, 3, 3, 3, 3, *range(4, 15)]
    assert offsets.spans(tokens, offsets.text(tokens)).tolist() == [[e - 1, e] for e in ends] + [[14, 14]]
    assert detect("regex", tokens, tokenizer).tolist() == [False] * 8 + [True] * 10 + [False]


def test_wordpiece_gram_over_continued_words():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    at = WORDS.index
    assert detect("regex", [at("let"), at("start"), at("over"), at(".")], tokenizer).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert not detect("regex", [at("re"), at("##start"), at("over")], tokenizer).any()


@pytest.mark.parametrize(
    ("text", "grams"),
    [
        ("", DEFAULT_GRAMS),
        ("  \n ", DEFAULT_GRAMS),
        ("hmm, let me see", ("hmm", "let me see")),
        ('["hmm, well", "let me see"]', ("hmm, well", "let me see")),
        ('"hmm, well", let me see', ("hmm, well", "let me see")),
        ("hmm,\n  let me\n  see", ("hmm", "let me see")),
    ],
)
def test_grams_are_read_from_json_or_csv(text, grams):
    assert parse_grams(text) == grams


@pytest.mark.parametrize("text", ['["a", ', "[1]", "[]", "a,,b", '["a", ""]', "...", '"a', '["a"] b', "[[]]"])
def test_unusable_grams_are_an_error_with_the_place(text):
    with pytest.raises(ConfigError, match=r"^logging\.strategic_grams: .*; write ") as error:
        parse_grams(text)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^logging\.strategic_grams"):
        open_detector("regex", BYTE_LEVEL, grams=text)


def test_unusable_detectors():
    with pytest.raises(ConfigError, match='"regxe" is unknown; did you mean "regex"'):
        open_detector("regxe", BYTE_LEVEL)
    with pytest.raises(ConfigError, match="strategic_grams"):
        detect("regex", [1], BYTE_LEVEL, grams=[])


def test_a_detector_takes_its_grams_and_serves_many_completions():
    detector = open_detector("regex", BYTE_LEVEL, grams="naïve, 2+2")
    for text, share in [("so naïve", 6), ("2+2", 3), ("let me check", 0), ("naïve 2+2", 9)]:
        tokens = np.array(byte_tokens_of(BYTE_LEVEL, text))
        other, mask = detector([tokens[:0], tokens])
        assert mask.sum() == share and mask.shape == tokens.shape and other.shape == (0,)
