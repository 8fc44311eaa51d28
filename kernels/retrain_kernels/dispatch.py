"""Which implementation of an operation runs: the one meaning of the `impl` argument."""

from __future__ import annotations

IMPLEMENTATIONS = ("auto", "reference", "triton")


def resolve(impl: str) -> str:
    """Name the implementation that `impl` stands for.

    "reference" is plain PyTorch and runs on any device. "auto" is the fastest implementation that runs here: the
    reference. Raises RuntimeError for "triton", which is not available yet, and ValueError for any other name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "triton":
        raise RuntimeError('impl="triton": the Triton implementation is not available yet; use impl="auto"')
    return "reference"
