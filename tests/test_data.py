"""Examples: read or refused with a place and a remedy, split by content, met in an order that a resume continues."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain import data
from retrain.config import Config
from retrain.types import ConfigError, Example

SECTION = Config().data
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
EXAMPLES = st.lists(st.builds(Example, TEXT, TEXT), min_size=1, max_size=30)


def section(source, **keys):
    return SECTION.model_copy(update={"source": str(source), **keys})


def write(tmp_path, content, **keys):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return section(path, **keys)


def refusal(given):
    with pytest.raises(ConfigError) as error:
        data.load(given)
    return str(error.value)


# ---------------------------------------------------------------- the order


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(count, seed, epoch):
    ordinals = range(epoch * count, (epoch + 1) * count)
    met = [data.position(i, count, seed=seed, shuffle=True) for i in ordinals]
    assert sorted(met) == list(range(count))
    assert [data.position(i, count, seed=seed, shuffle=False) for i in ordinals] == list(range(count))


@settings(max_examples=50)
@given(count=st.integers(1, 30), seed=st.integers(0, 99), batch=st.integers(1, 70), stop=st.integers(0, 6))
def test_stopping_and_going_on_neither_repeats_nor_skips(count, seed, batch, stop):
    """Only the ordinal of the next prompt is kept over a stop; whatever was asked before leaves no trace."""

    def batches(first, number):
        return [data.position(i, count, seed=seed, shuffle=True) for i in range(first, first + number * batch)]

    whole = batches(0, 8)
    data._epoch_order.cache_clear()
    part = batches(0, stop)
    data.position(10**9, 7, seed=seed + 1, shuffle=True)
    data._epoch_order.cache_clear()
    assert part + batches(stop * batch, 8 - stop) == whole
    full_epochs = len(whole) // count * count
    assert set(Counter(whole[:full_epochs]).values()) <= {full_epochs // count}


def test_epochs_and_seeds_differ_and_are_well_mixed():
    orders = {
        tuple(data.position(epoch * 50 + i, 50, seed=seed, shuffle=True) for i in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    # Over many epochs every example comes first about equally often: 2000 epochs, 10 examples, 200 +- 5 sigma.
    firsts = Counter(data.position(epoch * 10, 10, seed=3, shuffle=True) for epoch in range(2000))
    assert all(abs(firsts[i] - 200) < 5 * (2000 * 0.09) ** 0.5 for i in range(10))


def test_order_is_pinned():
    assert [data.position(i, 6, seed=7, shuffle=True) for i in range(12)] == [5, 2, 1, 0, 3, 4, 0, 3, 4, 5, 2, 1]


# ---------------------------------------------------------------- the split


@given(examples=EXAMPLES, fraction=st.floats(0, 0.99), more=st.floats(0, 0.99))
def test_split_goes_by_the_prompt_alone(examples, fraction, more):
    for example in examples:
        out = data.is_held_out(example, fraction)
        assert data.is_held_out(Example(example.prompt, "another reference"), fraction) == out
        assert not data.is_held_out(example, 0.0)
        if more >= fraction and out:
            assert data.is_held_out(example, more), "a larger fraction only adds"


@settings(max_examples=30)
@given(examples=EXAMPLES, added=EXAMPLES, fraction=st.floats(0.05, 0.6))
def test_split_never_moves_when_data_is_added(tmp_path_factory, examples, added, fraction):
    folder = tmp_path_factory.mktemp("data")

    def split(rows):
        lines = "".join(json.dumps({"prompt": e.prompt, "reference": e.reference}) + "\n" for e in rows)
        try:
            return data.load(write(folder, lines, eval_fraction=fraction))
        except ConfigError as error:
            assert "holds out all" in str(error)
            return None

    before, after = split(examples), split(added + examples)
    if before is None or after is None:
        return
    assert set(before.eval) <= set(after.eval)
    assert set(before.train) <= set(after.train)
    assert not {e.prompt for e in after.train} & {e.prompt for e in after.eval}
    assert {*after.train, *after.eval} == {*added, *examples}


def test_split_has_the_size_it_was_asked_for():
    loaded = data.load(section("arithmetic", eval_fraction=0.1))
    total = len(loaded.train) + len(loaded.eval)
    assert total == 12_105
    assert abs(len(loaded.eval) - 0.1 * total) < 5 * (total * 0.09) ** 0.5


def test_duplicates_count_in_training_and_once_in_evaluation(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "reference": str(i % 40)} for i in range(120)]
    given = write(tmp_path, "\n".join(map(json.dumps, rows)), eval_fraction=0.3)
    loaded = data.load(given)
    assert set(Counter(loaded.train).values()) == {3}
    assert set(Counter(loaded.eval).values()) == {1}
    assert len(loaded.train) + 3 * len(loaded.eval) == 120


def test_max_examples_takes_the_first_and_leaves_the_evaluation_alone():
    everything = data.load(section("arithmetic", eval_fraction=0.2))
    some = data.load(section("arithmetic", eval_fraction=0.2), max_examples=7)
    assert some.train == everything.train[:7]
    assert some.eval == everything.eval
    assert data.load(section("arithmetic:words"), max_examples=10**6) == data.load(section("arithmetic:words"))


def test_everything_held_out(tmp_path):
    held = next(e for e in data.load(section("arithmetic", eval_fraction=0.5)).eval)
    line = json.dumps({"prompt": held.prompt, "reference": held.reference})
    message = refusal(write(tmp_path, line, eval_fraction=0.5))
    assert "data.eval_fraction = 0.5" in message
    assert "Lower it" in message


# ---------------------------------------------------------------- files


def test_jsonl_is_read(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"q": "one", "a": "1", "more": [1, 2]}\r\n',
        b"\n",
        b'  {"q": "two\\n\\u00e9", "a": 2}\n',
        '{"q": "d\u2028r\u0085ei \u2603 \U0001f600", "a": 3.5}'.encode(),
    ]
    loaded = data.load(write(tmp_path, b"".join(lines), prompt_field="q", reference_field="a"))
    assert loaded.train == (
        Example("one", "1"),
        Example("two\n\u00e9", "2"),
        Example("d\u2028r\u0085ei \u2603 \U0001f600", "3.5"),
    )
    assert loaded.eval == ()


GOOD = '{"prompt": "p", "reference": "r"}\n'
BAD_LINES = {
    "no prompt field": ('{"question": "p", "reference": "r"}', ['no field "prompt"', "question", "data.prompt_field"]),
    "no reference": ('{"prompt": "p", "answer": "r"}', ['no field "reference"', "answer", "data.reference_field"]),
    "empty object": ("{}", ['no field "prompt"', "no field at all"]),
    "cut short": ('{"prompt": "p", "refer', ["not JSON", "column 17"]),
    "two objects": ('{"prompt": "p", "reference": "r"} {}', ["not JSON", "Extra data", "one object a line"]),
    "list": ('["p", "r"]', ["must be a JSON object", '["p", "r"]']),
    "not UTF-8": (b'{"prompt": "caf\xe9", "reference": "r"}', ["not UTF-8", "byte 16"]),
    "nested": ("[" * 200_000, ["not usable JSON"]),
    "long number": ('{"prompt": "p", "reference": ' + "9" * 10_000 + "}", ["not usable JSON"]),
    "prompt is a number": ('{"prompt": 5, "reference": "r"}', ['"prompt" must be a non-empty string, not 5']),
    "prompt is null": ('{"prompt": null, "reference": "r"}', ['"prompt" must be', "not null"]),
    "prompt is empty": ('{"prompt": "", "reference": "r"}', ['"prompt" must be a non-empty string']),
    "prompt is blank": ('{"prompt": " \\n", "reference": "r"}', ['"prompt" must be a non-empty string']),
    "reference is null": ('{"prompt": "p", "reference": null}', ['"reference" must be', "not null"]),
    "reference is a truth value": ('{"prompt": "p", "reference": true}', ['"reference" must be', "not true"]),
    "reference is a list": ('{"prompt": "p", "reference": ["r"]}', ['"reference" must be', 'not ["r"]']),
    "reference is empty": ('{"prompt": "p", "reference": ""}', ['"reference" must be a non-empty string']),
    "reference is not a number": ('{"prompt": "p", "reference": NaN}', ['"reference" must be', "not NaN"]),
    "half a surrogate pair": ('{"prompt": "\\ud800", "reference": "r"}', ["surrogate"]),
}


@pytest.mark.parametrize(("line", "needles"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, needles):
    line = line if isinstance(line, bytes) else line.encode()
    message = refusal(write(tmp_path, GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode()))
    assert f"{tmp_path / 'data.jsonl'}:3: " in message
    for needle in needles:
        assert needle in message
    assert len(message) < 400


@pytest.mark.parametrize("content", ["", "\n\n  \n", "\ufeff"])
def test_empty_file(tmp_path, content):
    message = refusal(write(tmp_path, content))
    assert "data.jsonl" in message
    assert "no example" in message


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refusal(section(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl" in refusal(section(tmp_path / "folder.jsonl"))


def test_unknown_source_is_not_taken_for_a_plugin():
    assert "not a dotted path" in refusal(section("arithmetics"))


# ---------------------------------------------------------------- dotted paths

PLUGIN = """
from retrain.types import Example

def pairs():
    return [("p", "1"), Example("q", "2")]

def lazy():
    yield ("p", "1")
    yield Example("q", "2")

def dies():
    raise RuntimeError("no network")

def dies_later():
    yield ("p", "1")
    raise OSError("connection lost")

def nothing():
    return None

def none_at_all():
    return []

def wrong_item():
    return [("p", "1"), {"prompt": "p"}]

def wrong_type():
    return [("p", 1)]

def empty_prompt():
    return [("p", "1"), ("", "2")]

def invalid():
    return [Example("", "2")]

def needs(arguments):
    return []

value = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_source"
    sys.modules.pop("my_source", None)


@pytest.mark.parametrize("name", ["pairs", "lazy"])
def test_dotted_path(plugin, name):
    assert data.load(section(f"{plugin}.{name}")).train == (Example("p", "1"), Example("q", "2"))


@pytest.mark.parametrize(
    ("name", "needles"),
    [
        ("dies", ["RuntimeError: no network"]),
        ("dies_later", ["OSError: connection lost"]),
        ("nothing", ["NoneType", "iterable"]),
        ("none_at_all", ["no example"]),
        ("wrong_item", ["item 1", "{'prompt': 'p'}", "(prompt, reference)"]),
        ("wrong_type", ["item 0", "the reference must be a string, this is int"]),
        ("empty_prompt", ["item 1", "the prompt is empty"]),
        ("invalid", ["the prompt is empty"]),
        ("needs", ["signature"]),
        ("value", ["not a function"]),
        ("missing", ["has no 'missing'"]),
    ],
)
def test_bad_plugins_are_named(plugin, name, needles):
    message = refusal(section(f"{plugin}.{name}"))
    assert f'data.source = "my_source.{name}"' in message
    for needle in needles:
        assert needle in message


def test_missing_module():
    assert "no_such_module" in refusal(section("no_such_module.load"))


# ---------------------------------------------------------------- examples


def test_ids_tell_examples_apart_and_are_pinned():
    assert Example("What is 47 + 38?", "85").id == "6b85609005b607c7"
    ids = {Example(p, r).id for p in ("a", "ab", "a b") for r in ("", "b", "bc")}
    assert len(ids) == 9


@pytest.mark.parametrize("arguments", [("", "r"), (" \n", "r"), (1, "r"), ("p", None), ("p", 1.0), ("\ud800", "r")])
def test_what_is_no_example(arguments):
    with pytest.raises(ValueError, match=r"the (prompt|reference)"):
        Example(*arguments)
