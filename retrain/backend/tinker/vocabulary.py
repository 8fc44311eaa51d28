"""What this process needs of a model that lives elsewhere: its tokenizer, its end of sequence, its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from retrain.assets import resolve_model
from retrain.backend.model import cannot_load, context_of, eos_ids_of

if TYPE_CHECKING:
    from retrain.config import ModelConfig


@dataclass(frozen=True)
class Vocabulary:
    """See `retrain.backend.Backend`."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    vocab_size: int
    context: int


def load_vocabulary(model: ModelConfig) -> Vocabulary:
    """Raises ConfigError where tokenizer or config cannot be loaded."""
    name, code = model.model, {"trust_remote_code": model.trust_remote_code}
    path = str(Path(resolve_model(name)).expanduser()) if name.startswith((".", "~")) else resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(path, **code)
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise cannot_load(name, error) from error
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:
        generation = None  # many models have none
    ends = eos_ids_of(config, generation, tokenizer, name)
    return Vocabulary(tokenizer, ends, config.get_text_config().vocab_size, context_of(config, tokenizer))
