"""The run folder: one writer, records that are cut exactly at a step, and reading them from the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults import small_disk
from retrain.training import folder, records
from retrain.training.folder import GENERATIONS, METRICS, RECORDS, RunFolder, holds_run, owner, verify_records
from retrain.types import ConfigError, RetrainError

HOLD = """
import sys, time
from pathlib import Path
from retrain.training.folder import RunFolder
held = RunFolder(Path(sys.argv[1]))
held.append("metrics.jsonl", [{"step": 1}])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def opened(tmp_path):
    run = RunFolder(tmp_path / "run")
    yield run
    run.close()


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder `run` open."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


# ---------------------------------------------------------------- the lock


def test_another_process_is_refused_by_its_id_until_it_is_killed(tmp_path, holder):
    log_dir = tmp_path / "run"
    assert owner(log_dir) == holder.pid
    with pytest.raises(ConfigError) as error:
        RunFolder(log_dir)
    assert f"in use by process {holder.pid}" in str(error.value)
    assert str(log_dir) in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner(log_dir) is None
    run = RunFolder(log_dir)
    assert owner(log_dir) == os.getpid()
    run.close()
    assert owner(log_dir) is None
    assert (log_dir / METRICS).read_text() == '{"step": 1}\n'


def test_a_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    """As the reward's workers might, when the run is killed."""
    code = HOLD.replace("time.sleep(60)", "import subprocess; subprocess.Popen(['sleep', '5']); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    RunFolder(tmp_path).close()


def test_a_folder_without_a_run_has_no_owner(tmp_path):
    assert owner(tmp_path) is None
    assert owner(tmp_path / "none") is None
    assert not (tmp_path / folder.LOCK).exists(), "looking writes nothing"


def test_somebody_who_only_looks_does_not_keep_a_run_from_starting(tmp_path):
    RunFolder(tmp_path).close()
    with (tmp_path / folder.LOCK).open() as looking:
        assert folder._lock(looking, folder.fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: folder.fcntl.flock(looking, folder.fcntl.LOCK_UN)).start()
        RunFolder(tmp_path).close()


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError) as error:
            RunFolder(place)
        assert f"logging.log_dir = {place}" in str(error.value)
        assert "--log-dir" in str(error.value)


def test_holds_run(tmp_path):
    assert not holds_run(tmp_path / "none")
    RunFolder(tmp_path).close()
    assert not holds_run(tmp_path)
    for name in (*RECORDS, "config.toml", "metadata.json", "trainer_state.json"):
        (tmp_path / name).write_text("")
        assert holds_run(tmp_path)
        (tmp_path / name).unlink()


# ---------------------------------------------------------------- writing records


def test_rows_are_there_as_soon_as_they_are_written(opened):
    opened.append(METRICS, [{"step": 1, "text": "é \u2028 😀"}])
    opened.append(METRICS, [{"step": 2}, {"step": 3}])
    opened.sync()
    text = (opened.path / METRICS).read_bytes().decode()
    assert [json.loads(line) for line in text.split("\n")[:-1]] == [
        {"step": 1, "text": "é \u2028 😀"},
        {"step": 2},
        {"step": 3},
    ]
    assert "é" in text, "readable as it is"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(opened, bad):
    opened.append(METRICS, [{"step": 1}])
    with pytest.raises(ValueError, match="JSON"):
        opened.append(METRICS, [{"step": 2}, {"step": 3, "loss": bad}])
    opened.append(METRICS, [{"step": 2, "loss": None}])
    assert (opened.path / METRICS).read_text() == '{"step": 1}\n{"step": 2, "loss": null}\n'


def test_text_that_is_not_unicode_comes_back(opened):
    opened.append(GENERATIONS, [{"step": 1, "error": "bad \ud800 byte"}])
    assert list(records.rows(opened.path / GENERATIONS)) == [{"step": 1, "error": "bad \ud800 byte"}]


def test_full_disk_is_said_once(tmp_path):
    """Closing does not try again to write what did not fit, and so cannot hide the first error."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        run, facts = RunFolder(disk / "run"), {}
        with pytest.raises(OSError, match="No space left"):
            for step in range(1, 1000):
                run.append(METRICS, [{"step": step, "text": "x" * 1000}])
                facts = json.loads(run.extents()) if step == 20 else facts
        run.close()
        steps = [row["step"] for row in records.rows(disk / "run" / METRICS)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 30
        run = RunFolder(disk / "run")
        run.adopt(disk / "run", verify_records(disk / "run", facts))
        assert records.last_row(disk / "run" / METRICS)["step"] == 20
        run.append(METRICS, [{"step": 21}])
        run.close()
        assert [row["step"] for row in records.rows(disk / "run" / METRICS)] == list(range(1, 22))


# ---------------------------------------------------------------- cutting records


def row(step, size=0):
    return {"step": step, "text": "é" * size}


def lines(rows):
    return [(json.dumps(each, ensure_ascii=False) + "\n").encode() for each in rows]


def records_of(log_dir):
    return {name: (log_dir / name).read_bytes() for name in RECORDS if (log_dir / name).exists()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    per_step=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    data=st.data(),
    torn=st.integers(0, 60),
    same=st.booleans(),
)
def test_cut_exactly_at_the_checkpoint(tmp_path, per_step, data, torn, same):
    """per_step: generations of each step, which may be none. torn: bytes of a last line that a crash cut short."""
    source = Path(tempfile.mkdtemp(dir=tmp_path))
    run, points = RunFolder(source), []
    for step, count in enumerate(per_step, start=1):
        run.append(METRICS, [row(step, 5)])
        run.append(GENERATIONS, [row(step, 30)] * count)
        points.append((run.extents(), records_of(source)))
    run.close()
    with (source / METRICS).open("ab") as file:
        file.write(lines([row(99, 25)])[0][:torn])
    before = records_of(source)
    facts, expected = data.draw(st.sampled_from(points))
    target = source if same else Path(tempfile.mkdtemp(dir=tmp_path))
    again = RunFolder(target)
    again.adopt(source, verify_records(source, json.loads(facts)))
    assert {name: content for name, content in records_of(target).items() if content} == {
        name: content for name, content in expected.items() if content
    }
    assert again.extents() == facts
    again.append(METRICS, [row(100)])
    again.close()
    assert (target / METRICS).read_bytes() == expected[METRICS] + lines([row(100)])[0]
    verify_records(target, json.loads(again.extents()))
    if not same:
        assert records_of(source) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * 70 - 1))
def test_any_flipped_bit_before_the_checkpoint_is_found_and_behind_it_cut_off(tmp_path, bit):
    log_dir = Path(tempfile.mkdtemp(dir=tmp_path))
    run = RunFolder(log_dir)
    run.append(METRICS, [row(1, 10), row(2)])
    facts = json.loads(run.extents())
    run.append(METRICS, [row(3)])
    run.close()
    size, content = facts[METRICS]["bytes"], bytearray((log_dir / METRICS).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (log_dir / METRICS).write_bytes(content)
    if bit // 8 < size:
        with pytest.raises(RetrainError) as error:
            verify_records(log_dir, facts)
        assert str(error.value) == f"{log_dir / METRICS} is damaged: its first {size} bytes do not match their checksum"
    else:
        assert verify_records(log_dir, facts)[METRICS].size == size


def test_records_that_are_short_or_missing_are_named(tmp_path):
    run = RunFolder(tmp_path)
    run.append(METRICS, [row(1)])
    facts = json.loads(run.extents())
    run.close()
    (tmp_path / METRICS).write_bytes(b"{")
    with pytest.raises(
        RetrainError, match=rf"metrics\.jsonl is damaged: it has 1 bytes, and had {len(lines([row(1)])[0])}"
    ):
        verify_records(tmp_path, facts)
    (tmp_path / METRICS).unlink()
    with pytest.raises(RetrainError, match=r"metrics\.jsonl is missing"):
        verify_records(tmp_path, facts)


def test_records_that_are_not_there_are_not_made(tmp_path):
    run = RunFolder(tmp_path / "a")
    fork = RunFolder(tmp_path / "b")
    fork.adopt(tmp_path / "a", verify_records(tmp_path / "a", json.loads(run.extents())))
    assert fork.extents() == run.extents()
    assert records_of(tmp_path / "b") == {}
    run.close()
    fork.close()


# ---------------------------------------------------------------- reading records


def test_nothing_to_read(tmp_path):
    path = tmp_path / METRICS
    assert records.last_row(path) is None
    assert list(records.rows(path)) == []
    for content in (b"", b'{"step": 1', b'{"step": 1}'):
        path.write_bytes(content)
        assert records.last_row(path) is None
        assert list(records.rows(path)) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12), torn=st.integers(0, 300), chunk=st.integers(1, 90))
def test_last_row_is_the_last_of_all_rows(tmp_path, sizes, torn, chunk):
    """Lines shorter and longer than a chunk, chunks that begin anywhere in a line."""
    path = tmp_path / METRICS
    rows = [row(step, size) for step, size in enumerate(sizes, start=1)]
    path.write_bytes(b"".join(lines(rows)) + lines([row(99, 200)])[0][:torn])
    before, records._CHUNK = records._CHUNK, chunk
    try:
        assert records.last_row(path) == rows[-1]
    finally:
        records._CHUNK = before
    assert list(records.rows(path)) == rows


def test_a_line_of_many_chunks(tmp_path):
    path = tmp_path / METRICS
    rows = [row(1), row(2, 20 * records._CHUNK)]
    path.write_bytes(b"".join(lines(rows)) + b"\0" * 3 * records._CHUNK)
    began = time.process_time()
    assert records.last_row(path) == rows[-1]
    assert time.process_time() - began < 1


def test_damage_at_the_end_is_said(tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(lines([row(1)])[0] + b"\0\0\0\n")
    with pytest.raises(RetrainError, match=r"metrics\.jsonl: its last line"):
        records.last_row(path)
    with pytest.raises(RetrainError, match=r"metrics\.jsonl:2 is not a record"):
        list(records.rows(path))
