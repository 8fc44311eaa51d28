"""Examples to prompt tokens: the chat template, the model's context, the cap on prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.training.prompts import encode_prompts
from retrain.types import ConfigError, Example


class Words:
    """A tokenizer with a token for each word: its length as the id. A beginning-of-sequence token, 99, where asked."""

    chat_template = None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[99] * add_special_tokens + [len(word) for word in text.split()] for text in texts]}


class Chat(Words):
    chat_template = "user ... assistant"

    def apply_chat_template(self, conversations, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        texts = []
        for turns in conversations:
            assert [turn["role"] for turn in turns] == ["user"]
            texts.append(f"[] {turns[0]['content']} [assistant]")
        return texts


class Bare(Words):
    """No beginning-of-sequence token either: a prompt may have no tokens at all."""

    def __call__(self, texts, add_special_tokens):
        return super().__call__(texts, add_special_tokens=False)


def examples(*prompts):
    return [Example(prompt, "r") for prompt in prompts]


def encode(given, tokenizer=None, *, context=100, max_tokens=10, max_prompt_tokens=0):
    said = []
    limits = {"context": context, "max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
    kept, tokens = encode_prompts(given, tokenizer or Words(), **limits, say=said.append)
    return kept, [ids.tolist() for ids in tokens], said


def refusal(given, tokenizer=None, **limits):
    with pytest.raises(ConfigError) as error:
        encode(given, tokenizer, **limits)
    return str(error.value)


def test_without_a_template_the_plain_text():
    given = examples("a bb", "ccc")
    assert encode(given) == (given, [[99, 1, 2], [99, 3]], [])


def test_with_a_template_its_special_tokens_and_no_others():
    given = examples("a bb", "ccc")
    assert encode(given, Chat()) == (given, [[2, 1, 2, 11], [2, 3, 11]], [])


def test_tokens_are_int64():
    _, (tokens,) = encode_prompts(
        examples("a"), Words(), context=9, max_tokens=1, max_prompt_tokens=0, say=lambda line: None
    )
    assert tokens.dtype == np.int64
    assert tokens.shape == (2,)


def test_no_examples():
    assert encode([]) == ([], [], [])


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    context=st.integers(1, 20),
    max_tokens=st.integers(1, 20),
    cap=st.integers(0, 14),
)
def test_what_is_kept_fits_and_what_is_refused_does_not(lengths, context, max_tokens, cap):
    given = examples(*(f"{i}" + " w" * (length - 1) for i, length in enumerate(lengths)))
    admitted = [i for i, length in enumerate(lengths) if not cap or length <= cap]
    fits = bool(admitted) and max(lengths[i] for i in admitted) + max_tokens <= context
    if not fits:
        refusal(given, Bare(), context=context, max_tokens=max_tokens, max_prompt_tokens=cap)
        return
    kept, tokens, said = encode(given, Bare(), context=context, max_tokens=max_tokens, max_prompt_tokens=cap)
    assert kept == [given[i] for i in admitted]
    assert [len(ids) for ids in tokens] == [lengths[i] for i in admitted]
    assert len(said) == (len(admitted) < len(lengths))


def test_the_cap_says_what_it_leaves_out():
    kept, _, said = encode(examples("a b c d", "a b", "a b c d e"), max_prompt_tokens=3)
    assert [example.prompt for example in kept] == ["a b"]
    assert said == ["2 of 3 examples are left out: longer than training.max_prompt_tokens"]


def test_the_cap_leaves_nothing():
    message = refusal(examples("a b c d", "a b c"), max_prompt_tokens=3)
    assert "training.max_prompt_tokens = 3" in message
    assert "the shortest has 4 tokens" in message


def test_a_prompt_that_does_not_fit_the_context():
    given = examples("a b", "the long\none " + "w " * 20, "the longest one " + "w " * 30)
    message = refusal(given, context=30, max_tokens=10)
    for fact in (
        "34 tokens",
        "training.max_tokens = 10",
        "context of 30",
        "max_prompt_tokens = 20",
        "'the longest one w",
    ):
        assert fact in message
    assert "\n" not in message
    # The remedy that it names works.
    assert encode(given, context=30, max_tokens=10, max_prompt_tokens=20)[0] == given[:1]


@pytest.mark.parametrize("max_tokens", [28, 30, 31, 100_000])
def test_no_prompt_fits_beside_max_tokens(max_tokens):
    """Then a cap on prompts is no remedy (0 would even mean none)."""
    message = refusal(examples("a b"), context=30, max_tokens=max_tokens)
    assert "lower training.max_tokens" in message
    assert "max_prompt_tokens" not in message


def test_exactly_the_context():
    assert encode(examples("a b"), context=13, max_tokens=10)[1] == [[99, 1, 1]]
    assert "context of 12" in refusal(examples("a b"), context=12, max_tokens=10)


def test_a_prompt_without_tokens():
    class Nothing(Bare):
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[] if text == "\u200b" else [1] for text in texts]}

    message = refusal(examples("a", "\u200b"), Nothing())
    assert "has no tokens" in message


def test_with_the_built_in_models_own_tokenizer():
    """The tokens are those of the chat template applied by hand."""
    from transformers import AutoTokenizer

    from retrain.assets import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    given = examples("What is 47 + 38?", "What is 90 - 12?")
    _, tokens, _ = encode(given, tokenizer)
    for example, ids in zip(given, tokens, strict=True):
        turns = [{"role": "user", "content": example.prompt}]
        assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert example.prompt in tokenizer.decode(ids)
