"""Rows of a dataset on the Hugging Face hub, through `datasets`: fetched once, then read from its cache."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.data.records import Row
from retrain.types import ConfigError


def read_rows(source: str, path: str, name: str | None, split: str, *, instead: str = "") -> Iterator[Row]:
    """The rows of `split` of the dataset `path`, in its configuration `name`.

    source: the `[data] source`, for messages. instead: what else could be written where there is no network.
    A place is "path:name[split][row]", rows counted from 0. Raises ConfigError where `datasets` is missing or fails.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f'data.source = "{source}" is read through datasets, which is not installed: pip install "retrain[data]"'
        ) from None
    try:
        table = datasets.load_dataset(path, name, split=split)
    except ConnectionError as error:
        ways = "Load it once with the network on: afterwards it is read from the cache" + (instead and f". {instead}")
        raise ConfigError(f'data.source = "{source}": {_short(error)}. {ways}') from error
    except Exception as error:  # an unknown id, configuration or split, a full disk: datasets fails in any way
        raise ConfigError(
            f'data.source = "{source}", data.split = "{split}": datasets says {type(error).__name__}: {_short(error)}'
        ) from error
    place = f"{path}:{name}" if name else path
    for index, row in enumerate(table):
        yield f"{place}[{split}][{index}]", row  # pyright: ignore[reportReturnType] - rows of a Dataset are dicts


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or "no reason given")[:300].rstrip(".")
