"""Which implementation runs, and what is said where one cannot."""

from __future__ import annotations

import pytest
import torch

from retrain_kernels import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of some compute capability, as far as the choice of an implementation can tell."""

    def make(capability, hip=None):
        dispatch._too_old.cache_clear()
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")

    yield make
    dispatch._too_old.cache_clear()


@pytest.mark.parametrize(("capability", "hip"), [((8, 0), None), ((9, 0), None), ((10, 0), None), ((9, 4), "6.4")])
def test_auto_is_triton_on_cuda_and_rocm(gpu, capability, hip):
    gpu(capability, hip)
    assert dispatch.resolve("auto", GPU) == "triton"
    assert dispatch.resolve("triton", GPU) == "triton"
    assert dispatch.resolve("reference", GPU) == "reference"
    assert dispatch.resolve("auto", GPU, float64=True) == "reference"
    assert dispatch.resolve("auto", CPU) == "reference"


def test_auto_is_the_reference_on_the_cpu_even_where_triton_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("auto", CPU) == "reference"
    assert dispatch.resolve("triton", CPU) == "triton"


def test_an_old_gpu(gpu):
    gpu((7, 5))
    assert dispatch.resolve("auto", GPU) == "reference"
    with pytest.raises(RuntimeError, match=r"Some GPU has compute capability \(7, 5\), the kernels need \(8, 0\)"):
        dispatch.resolve("triton", GPU)


def test_triton_missing(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch.resolve("auto", GPU) == "reference"
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"):
        dispatch.resolve("triton", GPU)


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_triton_on_other_devices_says_why_not(monkeypatch, device):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=f'impl="triton" cannot run: Triton runs on CUDA .* these are on {device}'):
        dispatch.resolve("triton", torch.device(device))


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="compute in float32 and a tensor is float64"):
        dispatch.resolve("triton", CPU, float64=True)


def test_unknown_name():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'triton', got 'fast'"):
        dispatch.resolve("fast", CPU)
