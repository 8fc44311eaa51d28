"""The estimated peak memory against that of real runs, in processes of their own."""

from __future__ import annotations

import pytest

from benchmarks import memory
from retrain import estimate

pytestmark = pytest.mark.scale


@pytest.mark.parametrize("name", ["tiny-quickstart", "tiny-checkpointing"])
def test_the_peak_is_that_of_a_real_run(name: str) -> None:
    found = memory.compare(memory.CASES[name])
    assert found["full_length"] == 1, "completions did not reach max_tokens, so the peak is not the config's"
    assert 0.8 < found["ratio"] < 1.2, found


def test_the_peak_on_a_gpu() -> None:
    case = memory.CASES["gpu-qwen3-4b"]
    if not memory.can_run(case):
        pytest.skip("needs a GPU")
    model = case.values["model.model"]
    if estimate.find_model_config(model) is None:
        pytest.skip(f"needs {model}: hf download {model}")
    assert 0.8 < memory.compare(case)["ratio"] < 1.2
