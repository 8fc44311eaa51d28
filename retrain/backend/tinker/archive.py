"""A service's archive of an adapter to a plain PEFT adapter. What an archive holds is not trusted: nothing in it
decides where a file is written."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from retrain.types import RetrainError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def unpack_adapter(archive: Path, folder: Path, base_model: str) -> None:
    """Write the adapter in `archive` (a tar, plain or compressed) to `folder`, which exists.

    base_model: what the adapter's config is to name as its base. Only the two files of an adapter are taken, wherever
    in the archive they lie, and only where they are plain files. Raises RetrainError where they are not there.
    """
    try:
        with tarfile.open(archive) as tar:
            for name in (WEIGHTS, CONFIG):
                _extract(tar, name, folder / name)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # this machine's disk
        raise RetrainError(f"the service's archive of the adapter cannot be read: {error}") from error
    _complete(folder, base_model)


def _extract(tar: tarfile.TarFile, name: str, target: Path) -> None:
    members = [member for member in tar.getmembers() if member.isfile() and Path(member.name).name == name]
    source = tar.extractfile(members[0]) if len(members) == 1 else None
    if source is None:
        raise RetrainError(f"the service's archive of the adapter holds {len(members)} files {name}, not one")
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _complete(folder: Path, base_model: str) -> None:
    """Name base and target modules in the adapter's config: some services leave that to the reader, PEFT does not."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        with safe_open(folder / WEIGHTS, framework="numpy") as tensors:
            names = list(tensors.keys())
    except (ValueError, SafetensorError) as error:
        raise RetrainError(f"the service's archive of the adapter is damaged: {error}") from error
    config["base_model_name_or_path"] = base_model
    config["task_type"] = config.get("task_type") or "CAUSAL_LM"
    config["inference_mode"] = True
    config["target_modules"] = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
