"""Files of every format give the same examples, or one message with the place; unusable references are counted."""

from __future__ import annotations

import csv
import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain import data
from retrain.config import Config
from retrain.data.records import MAX_UNUSABLE_SHARE
from retrain.types import ConfigError, Example

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "reference": TEXT}), min_size=1, max_size=8)


def section(source, **keys):
    return Config().data.model_copy(update={"source": str(source), **keys})


def load(path, **keys):
    """The examples of a file, and the lines that were said about them."""
    said: list[str] = []
    return data.load(section(path, **keys), say=said.append).train, said


def refusal(path, **keys):
    with pytest.raises(ConfigError) as error:
        load(path, **keys)
    return str(error.value)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_jsonl(rows):
    return "\n".join(map(json.dumps, rows))


FORMATS = {"x.jsonl": as_jsonl, "x.json": json.dumps, "x.csv": as_csv, "x.parquet": as_parquet}


# ---------------------------------------------------------------- formats


@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_every_format_holds_the_same_examples(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    expected = tuple(Example(row["prompt"], row["reference"]) for row in rows)
    for name, written in FORMATS.items():
        assert load(write(folder, name, written(rows)))[0] == expected, name


def test_numbers_are_text_as_a_model_writes_them(tmp_path):
    values = [145.0, 7, -3.0, 3.5, 1e300, 2**70, 0.0]
    rows = [{"prompt": f"p{i}", "reference": value} for i, value in enumerate(values)]
    texts = ["145", "7", "-3", "3.5", "1e+300", str(2**70), "0"]
    assert [example.reference for example in load(write(tmp_path, "x.json", json.dumps(rows)))[0]] == texts
    floats = [row for row in rows if isinstance(row["reference"], float)]
    parquet = load(write(tmp_path, "x.parquet", as_parquet(floats)))[0]
    assert [example.reference for example in parquet] == ["145", "-3", "3.5", "1e+300", "0"]


def test_json_that_holds_its_rows_in_one_list(tmp_path):
    rows = [{"prompt": "p", "reference": "r"}]
    path = write(tmp_path, "x.json", b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": rows}).encode())
    assert load(path)[0] == (Example("p", "r"),)
    path = write(tmp_path, "y.json", json.dumps({"data": [{"prompt": "p"}]}))
    assert f'{path}["data"][0]: no field "reference"; it has prompt. ' in refusal(path)


def test_csv_cells_may_hold_lines_and_commas(tmp_path):
    content = '\ufeffprompt,reference\r\n"one, ""two""\nthree",1\r\n\r\nfour,2\r\n'
    assert load(write(tmp_path, "x.csv", content))[0] == (Example('one, "two"\nthree', "1"), Example("four", "2"))


BAD = {
    "json: bad": ("x.json", '[{"prompt": "p",\n "reference" 1}]', ["not JSON", "line 2, column 14", "a list of obj"]),
    "json: not UTF-8": ("x.json", b'[\n{"p": "caf\xe9"}]', ["not UTF-8", "line 2, byte 11"]),
    "json: text": ("x.json", '"p"', ["must be a list of objects", 'this is "p"']),
    "json: no list": ("x.json", '{"prompt": "p"}', ["one list of rows", "no list"]),
    "json: two lists": ("x.json", '{"a": [], "b": []}', ["one list of rows", "lists at a, b"]),
    "json: row": ("x.json", '[{"prompt": "p", "reference": "r"}, 7]', ["x.json[1]", "a JSON object, this is 7"]),
    "json: nested": ("x.json", "[" * 200_000, ["not usable JSON"]),
    "json: empty": ("x.json", " \n", ["no example"]),
    "json: empty list": ("x.json", "[]", ["no example"]),
    "csv: not UTF-8": ("x.csv", b"prompt,reference\np,caf\xe9\n", ["not UTF-8", "line 2, byte 6"]),
    "csv: more cells": ("x.csv", "prompt,reference\np,1\nq,1,000\n", ["x.csv:3:", "3 cells", "2 columns", "Quote"]),
    "csv: fewer cells": ("x.csv", 'prompt,reference\n"a\nb",1\nq\n', ["x.csv:4:", "1 cells"]),
    "csv: open quote": ("x.csv", 'prompt,reference\np,1\n"q,2\n', ["x.csv:3:", "not CSV"]),
    "csv: column": ("x.csv", "question,reference\np,1\n", ["x.csv:2:", 'no field "prompt"', "question, reference"]),
    "csv: twice": ("x.csv", "prompt,a,a\np,1,2\n", ["x.csv:1:", 'names the column "a" twice']),
    "csv: empty prompt": ("x.csv", "prompt,reference\n ,1\n", ["x.csv:2:", '"prompt" must be a non-empty string']),
    "csv: header only": ("x.csv", "prompt,reference\n", ["no example"]),
    "csv: empty": ("x.csv", "", ["no example"]),
    "parquet: other": ("x.parquet", "prompt,reference", ["x.parquet", "not Parquet"]),
    "parquet: empty": ("x.parquet", "", ["x.parquet", "not Parquet"]),
}


@pytest.mark.parametrize(("name", "content", "needles"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, needles):
    path = write(tmp_path, name, content)
    message = refusal(path)
    assert str(path) in message
    for needle in needles:
        assert needle in message
    assert len(message) < 500


def test_missing_columns_of_a_parquet_file(tmp_path):
    path = write(tmp_path, "x.parquet", as_parquet([{"question": "p", "answer": "r"}]))
    message = refusal(path)
    assert f'{path}[0]: no field "prompt"; it has question, answer. Set data.prompt_field' in message
    assert load(path, prompt_field="question", reference_field="answer")[0] == (Example("p", "r"),)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path, "x.parquet", as_parquet([{"prompt": "p", "reference": "r"}]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "retrain[data]"' in refusal(path)


# ---------------------------------------------------------------- prompts from several fields


def test_a_template_joins_fields(tmp_path):
    rows = [{"Body": "Ann has 3.", "Question": "How many {x}?", "n": 2.0, "reference": "3"}]
    path = write(tmp_path, "x.jsonl", as_jsonl(rows))
    template = "{Body} {Question} ({n})\nAnswer in \\boxed{}, as in \\boxed{7} {} \\fbox{x}. \\boxed{"
    (example,) = load(path, prompt_template=template)[0]
    assert example.prompt == "Ann has 3. How many {x}? (2)" + template.removeprefix("{Body} {Question} ({n})")


def test_a_template_that_names_no_field(tmp_path):
    path = write(tmp_path, "x.jsonl", as_jsonl([{"Body": "b", "Question": None, "reference": "3"}]))
    message = refusal(path, prompt_template="\\boxed{7} {Boddy}")
    assert f'{path}:1: no field "Boddy"; it has Body, Question, reference. Set data.prompt_template' in message
    message = refusal(path, prompt_template="{Body} {Question}")
    assert '"Question" must be a non-empty string or a number, not null; data.prompt_template needs it' in message


# ---------------------------------------------------------------- references that cannot be used


def rows_with(unusable, total, value=None):
    return [{"prompt": f"p{i}", "reference": value if i in unusable else "r"} for i in range(total)]


@pytest.mark.parametrize("value", [None, "", " \n", True, [1], float("nan"), float("inf"), {}])
def test_an_unusable_reference_is_left_out_and_said(tmp_path, value):
    path = write(tmp_path, "x.jsonl", as_jsonl(rows_with({3}, 10, value)))
    examples, said = load(path)
    assert [example.prompt for example in examples] == [f"p{i}" for i in range(10) if i != 3]
    assert len(said) == 1
    assert said[0].startswith("1 of 10 examples are left out")
    assert f'{path}:4: "reference" must be a non-empty string or a number, not ' in said[0]


@given(total=st.integers(1, 60), data_=st.data())
@settings(max_examples=40, deadline=None)
def test_too_many_unusable_references_are_refused(tmp_path_factory, total, data_):
    unusable = data_.draw(st.sets(st.integers(0, total - 1), min_size=1))
    path = write(tmp_path_factory.mktemp("share"), "x.jsonl", as_jsonl(rows_with(unusable, total)))
    if len(unusable) > MAX_UNUSABLE_SHARE * total:
        assert f"{len(unusable)} of {total} references cannot be used, more than 10%" in refusal(path)
    else:
        examples, (line,) = load(path)
        assert len(examples) == total - len(unusable)
        assert line.count(str(path)) == min(len(unusable), 3)
        assert line.endswith("...") == (len(unusable) > 3)


# ---------------------------------------------------------------- rows that contradict each other


def test_the_same_row_twice_is_nothing_special(tmp_path):
    examples, said = load(write(tmp_path, "x.jsonl", as_jsonl([{"prompt": "p", "reference": "r"}] * 3)))
    assert examples == (Example("p", "r"),) * 3
    assert said == []


def test_one_prompt_with_two_references_is_said(tmp_path):
    rows = [{"prompt": p, "reference": r} for p, r in (("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "4"))]
    path = write(tmp_path, "x.jsonl", as_jsonl(rows))
    examples, said = load(path)
    assert len(examples) == 5
    assert said == [f'1 prompt stands with different references, such as "a": "1" at {path}:1, "3" at {path}:4']


def test_an_id_that_stands_twice_is_refused(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}", "reference": "r"} for i in (5, None, 6, None, 5)]
    path = write(tmp_path, "x.jsonl", as_jsonl(rows))
    assert f"{path}:5: the id 5 stands at {path}:1 already" in refusal(path)
    path = write(tmp_path, "x.csv", "id,prompt,reference\na,p,1\na,p,1\n")
    assert f'{path}:3: the id "a" stands at {path}:2 already' in refusal(path)
    assert len(load(write(tmp_path, "y.jsonl", as_jsonl(rows[:4])))[0]) == 4
