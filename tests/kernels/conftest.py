"""Fixtures of the kernel tests: where they run, and memory that shows when it was never written."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device():
    """The GPU where there is one; else the CPU, with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Every buffer that is taken without a value is full of NaN (of all ones, where there is no NaN)."""

    def poisoned(allocate):
        def make(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
            return tensor

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
