"""Plug-ins that return a tensor: loaded once, and every answer checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrain.plugin import load_callable
from retrain.types import RetrainError


def load_tensor_function(path: str, *, what: str, parameters: Sequence[str]) -> Callable[..., Tensor]:
    """Load fn(*tensors) -> Tensor by dotted path, wrapped so that each result is checked.

    The wrapper is called as fn(*tensors, size=n): the result must be a finite vector [n], and comes back as float32,
    detached.
    Raises ConfigError where the function cannot be loaded; the wrapper raises RetrainError where it fails or returns
    something else.
    """
    function = load_callable(path, what=what, parameters=parameters)
    place = f'{what} = "{path}"'

    def call(*arguments: Tensor, size: int) -> Tensor:
        try:
            result = function(*arguments)
        except Exception as error:  # foreign code may fail in any way
            raise RetrainError(f"{place}: raised {type(error).__name__}: {error}") from error
        return _checked(result, place, size)

    return call


def _checked(result: object, place: str, size: int) -> Tensor:
    if not isinstance(result, Tensor):
        raise RetrainError(f"{place}: must return a torch.Tensor of shape [{size}], returned {type(result).__name__}")
    if result.shape != (size,):
        raise RetrainError(f"{place}: must return a tensor of shape [{size}], returned {list(result.shape)}")
    result = result.detach().to(torch.float32)
    if not torch.isfinite(result).all():
        raise RetrainError(f"{place}: returned values that are not finite: {result[~torch.isfinite(result)][0].item()}")
    return result
