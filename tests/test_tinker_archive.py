"""Archives of adapters, as services send them: unpacked for PEFT, and never trusted."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch

import tiny_models as models
from retrain.backend.tinker.archive import CONFIG, WEIGHTS, unpack_adapter
from retrain.types import RetrainError


def pack(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


@pytest.fixture
def adapter(open_local, tmp_path):
    """A stirred adapter of the local backend: (backend, its files)."""
    backend = open_local("qwen3", training__temperature=1.0)
    folder = tmp_path / "saved"
    folder.mkdir()
    backend.save_adapter(folder)
    return backend, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("mode", "prefix"), [("w", ""), ("w:gz", "./"), ("w:gz", "run/weights/")])
def test_peft_loads_what_a_service_sends(mode, prefix, adapter, model_folder, tmp_path):
    backend, files = adapter
    config = json.loads(files[CONFIG])
    # SkyRL's server leaves these to the reader.
    config |= {"target_modules": None, "task_type": None, "base_model_name_or_path": "elsewhere"}
    members = [
        (f"{prefix}{WEIGHTS}", files[WEIGHTS]),
        (f"{prefix}{CONFIG}", json.dumps(config).encode()),
        ("checkpoint_complete", b""),
    ]
    out = tmp_path / "out"
    out.mkdir()
    unpack_adapter(pack(tmp_path / "a.tar", members, mode), out, str(model_folder("qwen3")))
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]
    assert json.loads((out / CONFIG).read_bytes())["base_model_name_or_path"] == str(model_folder("qwen3"))
    peft = models.load_with_peft(model_folder("qwen3"), out)
    prompt, completion = np.array([5, 9, 17]), np.array([30, 4, 8])
    with torch.no_grad():
        logits = peft(input_ids=torch.from_numpy(np.concatenate((prompt, completion)))[None]).logits[0, 2:-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(completion)[:, None])[:, 0]
    assert backend.logprobs(prompt, completion) == pytest.approx(expected.numpy(), abs=1e-5)


def test_nothing_in_an_archive_decides_where_it_is_written(adapter, tmp_path):
    _, files = adapter
    out = tmp_path / "inner" / "out"
    out.mkdir(parents=True)
    evil = [
        (f"../../{WEIGHTS}", files[WEIGHTS]),
        (f"/{CONFIG}", files[CONFIG]),
        ("../../evil", b"x"),
        ("../escape", (tarfile.SYMTYPE, "/etc/passwd")),
    ]
    archive = pack(tmp_path / "a.tar", evil)
    before = sorted(tmp_path.rglob("*"))
    unpack_adapter(archive, out, "base")
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [out / CONFIG, out / WEIGHTS]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_link_is_no_adapter(kind, adapter, tmp_path):
    _, files = adapter
    archive = pack(tmp_path / "a.tar", [(CONFIG, files[CONFIG]), (WEIGHTS, (kind, "/etc/passwd"))])
    with pytest.raises(RetrainError, match=r"holds 0 files adapter_model\.safetensors"):
        unpack_adapter(archive, tmp_path, "base")
    assert not (tmp_path / WEIGHTS).exists()


def damaged_archives():
    config = (CONFIG, b"{}")
    yield "no tar", b"not a tar", "cannot be read"
    yield "empty", [], "holds 0 files"
    yield "twice", [(WEIGHTS, b"x"), (f"a/{WEIGHTS}", b"x"), config], "holds 2 files"
    yield "no tensors", [(WEIGHTS, b"not safetensors"), config], "damaged"
    yield "no config", [(WEIGHTS, b"x"), (CONFIG, b"{")], "damaged"


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in damaged_archives()], ids=[case[0] for case in damaged_archives()]
)
def test_a_damaged_archive(content, message, tmp_path):
    archive = tmp_path / "a.tar"
    if isinstance(content, bytes):
        archive.write_bytes(content)
    else:
        pack(archive, content)
    with pytest.raises(RetrainError, match=message):
        unpack_adapter(archive, tmp_path, "base")


def test_an_archive_that_was_cut(adapter, tmp_path):
    _, files = adapter
    archive = pack(tmp_path / "a.tar", list(files.items()))
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(RetrainError, match="cannot be read"):
        unpack_adapter(archive, tmp_path, "base")
