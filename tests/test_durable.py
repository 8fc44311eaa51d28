"""Writes that are whole or not at all, on a disk that fails at any call and a process that dies at any call."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults import dying_everywhere, failing_everywhere, small_disk
from retrain.training import durable

OLD, NEW = b"old" * 5000, b"something new" * 7000


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [OLD, None])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "state.json"

    def reset():
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)

    reset()
    seen = []
    for _ in failing_everywhere(lambda _: durable.write_bytes(path, NEW)):
        seen.append(path.read_bytes() if path.exists() else None)
        assert names(tmp_path) == ([] if seen[-1] is None else ["state.json"])
        reset()
    # Opening, fsync and rename fail with the old file in place; the folder's own open and fsync with the new one.
    assert seen == [old, old, old, NEW, NEW]
    assert path.read_bytes() == NEW


def test_a_process_that_dies_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(OLD)
    seen = []
    for _ in dying_everywhere(lambda _: durable.write_bytes(path, NEW)):
        seen.append(path.read_bytes())
        path.write_bytes(OLD)
    assert seen == [OLD, OLD, OLD, NEW, NEW]
    assert path.read_bytes() == NEW
    assert names(tmp_path) == ["state.json"], "what a dead process left behind goes with the next write"


def test_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "state.json"
        durable.write_bytes(path, OLD)
        with pytest.raises(OSError, match="No space left"):
            durable.write_bytes(path, NEW)
        assert path.read_bytes() == OLD
        assert names(disk) == ["state.json"]
        durable.write_bytes(path, NEW[:20_000])
        assert path.read_bytes() == NEW[:20_000]


def test_json_is_finite_and_ends_in_a_line_break(tmp_path):
    path = tmp_path / "state.json"
    durable.write_json(path, {"a": [1, 2.5, None, "é"]})
    assert json.loads(path.read_bytes()) == {"a": [1, 2.5, None, "é"]}
    assert path.read_bytes().endswith(b"\n")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            durable.write_json(path, {"a": bad})
    assert json.loads(path.read_bytes()) == {"a": [1, 2.5, None, "é"]}
    assert names(tmp_path) == ["state.json"]


# ---------------------------------------------------------------- sealed folders

FILES = {"adapter.bin": bytes(range(256)) * 3, "empty": b"", "loop.json": b'{"step": 3}'}


@pytest.fixture
def sealed(tmp_path):
    return seal(tmp_path / "sealed")


def seal(folder):
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    durable.seal(folder, step=3)
    return folder


def test_a_sealed_folder_is_whole(sealed):
    assert durable.damage(sealed) is None
    manifest = json.loads((sealed / durable.MANIFEST).read_bytes())
    assert manifest["step"] == 3
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {k: len(v) for k, v in FILES.items()}
    # The digest of nothing, from the SHA-256 standard.
    assert manifest["files"]["empty"]["sha256"].startswith("e3b0c44298fc1c14")


def test_an_unsealed_folder_is_not_whole(tmp_path):
    assert durable.damage(tmp_path) == "manifest.json is missing"
    assert durable.damage(tmp_path / "none") == "manifest.json is missing"


def damaged(sealed, name, content):
    (sealed / name).unlink() if content is None else (sealed / name).write_bytes(content)
    return durable.damage(sealed)


def test_damage_is_named(sealed):
    whole = FILES["adapter.bin"]
    assert damaged(sealed, "adapter.bin", whole[:100]) == "adapter.bin has 100 of 768 bytes"
    assert damaged(sealed, "adapter.bin", b"") == "adapter.bin has 0 of 768 bytes"
    assert damaged(sealed, "adapter.bin", whole + b"\0") == "adapter.bin has 769 of 768 bytes"
    assert damaged(sealed, "adapter.bin", None) == "adapter.bin is missing"
    assert damaged(sealed, "adapter.bin", whole) is None
    (sealed / "more").write_bytes(b"a file that somebody put there is no damage")
    assert durable.damage(sealed) is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(sealed, data):
    name = data.draw(st.sampled_from([name for name, content in FILES.items() if content]))
    bit = data.draw(st.integers(0, 8 * len(FILES[name]) - 1))
    content = bytearray(FILES[name])
    content[bit // 8] ^= 1 << bit % 8
    assert damaged(sealed, name, content) == f"{name} does not match its checksum"
    assert damaged(sealed, name, FILES[name]) is None


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"\0" * 300,
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"3",
        b'{"files": 3}',
        b'{"files": ["loop.json"]}',
        b'{"files": {"loop.json": 3}}',
        b'{"files": {"loop.json": {"bytes": 11}}}',
    ],
)
def test_a_manifest_that_is_none(sealed, manifest):
    assert damaged(sealed, durable.MANIFEST, manifest) == "manifest.json is unreadable or altered"


def test_flipped_bits_of_the_manifest(sealed):
    content = (sealed / durable.MANIFEST).read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert damaged(sealed, durable.MANIFEST, bytes(flipped)) is not None, bit
    assert damaged(sealed, durable.MANIFEST, content) is None


def test_sealed_json_comes_back_and_any_change_is_found(tmp_path):
    path = tmp_path / "facts.json"
    durable.write_sealed_json(path, {"b": [1, 2.5, None, "é"], "a": {}})
    assert durable.read_sealed_json(path) == {"b": [1, 2.5, None, "é"], "a": {}}
    content = path.read_bytes()
    for bad in (b"", b"[]", b"{}", b'{"sha256": 3}', content[:-20], content.replace(b"2.5", b"2.6")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"checksum|Expecting|delimiter|Unterminated"):
            durable.read_sealed_json(path)


def test_sealing_fails_as_a_whole(tmp_path):
    counter = iter(range(1000))
    folder = tmp_path

    def work(_):
        nonlocal folder
        folder = tmp_path / str(next(counter))
        seal(folder)

    for _ in failing_everywhere(work):
        if folder.is_dir() and durable.damage(folder) is None:
            assert names(folder) == sorted([*FILES, durable.MANIFEST]), "only its folder's fsync can have failed"
        assert not list(folder.glob("*.tmp")) if folder.is_dir() else True
