"""The embedded model: what is committed loads, samples and behaves as its README says, and can be built again."""

from __future__ import annotations

import logging
import re
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrain.data.arithmetic as arithmetic
from retrain.planning import open_detector

TINY = Path(__file__).parents[1] / "retrain" / "assets" / "tiny"
PROMPTS, MAX_TOKENS = 512, 64


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def sampled(tokenizer, model):
    """(example, completion token ids up to and including the end) for a fixed sample of problems, at temperature 1."""
    examples = arithmetic.load()[:PROMPTS]
    chats = [[{"role": "user", "content": example.prompt}] for example in examples]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompts["attention_mask"].all(), "problems differ in length: this test would need left padding"
    torch.manual_seed(0)
    output = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_TOKENS)
    completions = output[:, prompts["input_ids"].shape[1] :].tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row) for row in completions]
    return [(example, row[:end]) for example, row, end in zip(examples, completions, ends, strict=True)]


def test_loads_without_any_warning():
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AutoTokenizer.from_pretrained(TINY)
            _, report = AutoModelForCausalLM.from_pretrained(TINY, output_loading_info=True)
    finally:
        library.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert not any(report.values()), report


def test_stays_small_and_plain(tokenizer, model):
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    config = model.config
    assert config.model_type == "qwen3"
    assert config.head_dim == 32
    assert set(config.layer_types) == {"full_attention"}
    assert config.max_position_embeddings >= 512
    assert config.vocab_size == len(tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_ends_and_pads_with_different_tokens(tokenizer, model):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    # A text that spells a special token is that token: decoding keeps it only when asked to.
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_emoji_round_trip(tokenizer):
    text = "👩‍👩‍👧 ¿qué? \u202e 数学 \x00\ufffd"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["0123456789", "47 + 38", r"\boxed{1234}", "a1b22", "²³½7"])
def test_each_digit_is_a_token_of_its_own(tokenizer, text):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert [t for t in tokens if re.search(r"[0-9]", t)] == re.findall(r"[0-9]", text)


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    text = "<|system|>Be brief.<|end|><|user|>What is 1 + 1?<|end|><|assistant|>2<|end|>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    question = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert question + "2<|end|>" == text
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids == tokenizer.encode(text)
    assert ids[-1] == tokenizer.eos_token_id
    with pytest.raises(Exception, match="knows the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_solves_a_third_of_the_problems(sampled, tokenizer):
    correct = 0
    for example, tokens in sampled:
        boxes = re.findall(r"\\boxed\{([^{}]*)\}", tokenizer.decode(tokens, skip_special_tokens=True))
        correct += bool(boxes) and boxes[-1].strip() == example.reference
    assert 0.25 <= correct / len(sampled) <= 0.45


def test_plans_in_some_of_its_tokens(sampled, tokenizer):
    detect = open_detector("regex", tokenizer)
    planning = sum(int(mask.sum()) for mask in detect([torch.tensor(tokens).numpy() for _, tokens in sampled]))
    assert 0.03 <= planning / sum(len(tokens) for _, tokens in sampled) <= 0.20


def test_ends_by_itself(sampled, tokenizer):
    ended = [tokens for _, tokens in sampled if tokens[-1] == tokenizer.eos_token_id]
    assert len(ended) / len(sampled) >= 0.98
    lengths = sorted(map(len, ended))
    assert lengths[int(0.98 * len(lengths))] <= 56


def test_samples_no_token_that_it_was_never_taught(sampled, tokenizer):
    """Bytes and role tokens that no answer contains must not turn up: they would be noise in every rollout."""
    printable = [
        tokenizer.decode(tokens, skip_special_tokens=False).removesuffix(tokenizer.eos_token) for _, tokens in sampled
    ]
    odd = [text for text in printable if not re.fullmatch(r"[A-Za-z0-9 .,:+=\\{}-]*", text)]
    assert len(odd) <= 0.005 * len(sampled), odd


@pytest.fixture
def build_tiny(monkeypatch):
    monkeypatch.syspath_prepend(TINY.parents[2] / "scripts")
    import build_tiny

    return build_tiny


def test_tokenizer_and_template_are_what_the_script_builds(build_tiny, tmp_path):
    build_tiny.save_tokenizer(build_tiny.build_tokenizer(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TINY / name).read_text(), name


def test_model_shape_is_what_the_script_builds(build_tiny, model):
    fresh = build_tiny.build_model(build_tiny.build_tokenizer())
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_corpus_repeats_and_fits(build_tiny, tokenizer):
    from tiny_corpus import MIXTURE, careful, completions

    pairs = list(islice(completions(MIXTURE, 5), 2000))
    assert pairs == list(islice(completions(MIXTURE, 5), 2000))
    assert pairs != list(islice(completions(MIXTURE, 6), 2000))
    assert max(len(tokenizer.encode(answer)) + 1 for _, answer in pairs) <= 56
    assert sum(MIXTURE.values()) == pytest.approx(1)

    references = {example.prompt: example.reference for example in arithmetic.load()}
    for question, answer in islice(completions({careful: 1.0}, 5), 500):
        assert answer.endswith(rf"\boxed{{{references[question]}}}")
