"""Loading models and attaching adapters; what is refused, what is saved, and that the base is never written."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as models
from retrain.backend import devices
from retrain.backend.local import ADAPTER_WEIGHTS, LocalBackend
from retrain.backend.model import base_digest
from retrain.backend.packing import can_share_prompts
from retrain.inference.pytorch import PyTorchEngine
from retrain.types import ConfigError, RetrainError

BATCH = models.random_batch(1, [3, 11], [[5, 1, 9], [4, 12]])


def open_folder(folder, **overrides):
    return LocalBackend(models.config_for(folder, **overrides), seed=0, say=lambda line: None)


def adapter(backend):
    return {name: p.detach().clone() for name, p in backend.policy.peft.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def copied(model_folder, tmp_path):
    """A copy of a model folder that a test may damage."""

    def copy(kind="qwen3"):
        return shutil.copytree(model_folder(kind), tmp_path / "copied")

    return copy


# ---- the base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", models.PLAIN)
def test_dropout_of_the_base_is_off_while_training(kind, open_local):
    policy = open_local(kind).policy
    tokens = torch.arange(2, 22)[None]
    with torch.no_grad():
        quiet = policy.hidden(tokens)
        policy.peft.train()
        torch.testing.assert_close(policy.hidden(tokens), quiet, rtol=0, atol=0)


@pytest.mark.parametrize("kind", models.PLAIN)
def test_nothing_writes_the_base(kind, open_local, tmp_path):
    backend = open_local(kind, training__lr=0.1, loss__kl_coef=0.1, training__gradient_checkpointing=True)
    engine = PyTorchEngine(backend.policy)
    before = backend.base_digest()
    start = adapter(backend)
    for step in range(2):
        backend.step(BATCH, step)
        engine.publish(step)
        engine.generate([np.arange(2, 9)], np.arange(3)[None], max_tokens=4, temperature=1.0)
    backend.save(tmp_path)
    backend.load(tmp_path)
    assert not equal(adapter(backend), start)
    assert backend.base_digest() == before
    name, weight = backend.policy.base_parameters()[0]
    weight.data.view(-1)[0] += 1e-6 + weight.data.view(-1)[0].abs() * 1e-6
    assert base_digest(backend.policy) != before, name


def test_the_digest_is_that_of_the_files(open_local, model_folder):
    """Adapters, their rank and their seed are no part of it."""
    digests = {open_local("llama", seed=seed, model__lora_rank=rank).base_digest() for seed, rank in ((0, 2), (1, 8))}
    assert len(digests) == 1
    assert digests.isdisjoint({open_local("qwen3").base_digest()})


def test_bfloat16_base_with_a_float32_adapter(open_local):
    backend = open_local("llama", training__dtype="bf16", training__temperature=1.0)
    assert {p.dtype for _, p in backend.policy.base_parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter(backend).values()} == {torch.float32}
    assert math.isfinite(backend.step(BATCH, 0).metrics["loss"])


@pytest.mark.parametrize(("kind", "context"), [("qwen3", 256), ("gpt2", 256)])
def test_end_of_sequence_and_context(kind, context, open_local):
    policy = open_local(kind).policy
    assert (policy.eos_ids, policy.context) == ((models.EOS,), context)


def test_several_ends_of_sequence_come_from_the_generation_config(copied):
    folder = copied()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5, 9]}))
    assert open_folder(folder).policy.eos_ids == (models.EOS, 5, 9)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma3-cap"])
def test_scaled_or_capped_logits_are_refused(kind, open_local):
    with pytest.raises(ConfigError, match="not a plain linear head"):
        open_local(kind)


@pytest.mark.parametrize("kind", [*models.PLAIN, "mistral-window", "gemma3-window"])
def test_prompts_are_shared_where_the_model_computes_the_same(kind, open_local):
    backend = open_local(kind)
    assert can_share_prompts(backend.policy) is (kind in models.PLAIN)
    assert backend.describe()["shared_prompts"] is (kind in models.PLAIN)


def test_a_model_that_ignores_the_mask_does_not_share_prompts(open_local, monkeypatch):
    policy = open_local("qwen3").policy
    inner = policy.lm.base_model.forward
    monkeypatch.setattr(policy.lm.base_model, "forward", lambda **kw: inner(**{**kw, "attention_mask": None}))
    assert can_share_prompts(policy) is False


# ---- what cannot be loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no-such-folder"])
def test_a_missing_folder(name):
    with pytest.raises(ConfigError, match=r"no model in that folder \(there is no config.json\)"):
        open_folder(name)


def test_an_unknown_built_in():
    with pytest.raises(ConfigError, match='did you mean "builtin:tiny"'):
        open_folder("builtin:tinny")


def test_a_tokenizer_without_end_of_sequence(tmp_path):
    with pytest.raises(ConfigError, match="end-of-sequence"):
        open_folder(models.save_model("qwen3", tmp_path, eos=False))


def test_damaged_weights(copied):
    folder = copied()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_folder(folder)


def test_a_damaged_config(copied):
    folder = copied()
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_folder(folder)


def test_a_damaged_tokenizer(copied):
    folder = copied()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_folder(folder)


def test_missing_weights_are_not_drawn_at_random(copied):
    folder = copied("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for model\.norm\.weight"):
        open_folder(folder)


# ---- the adapter --------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_first_adapter(open_local):
    first, again, other = (adapter(open_local("qwen3", stir=False, seed=seed)) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)
    assert all((value == 0).all() for name, value in first.items() if "lora_B" in name)


def test_targets_by_name(open_local):
    backend = open_local("qwen3", lora__target_modules=["q_proj", "down_proj"])
    assert {name.split(".")[-4] for name in adapter(backend)} == {"q_proj", "down_proj"}
    assert {name.split(".")[-4] for name in adapter(open_local("gpt2", lora__target_modules=["c_attn"]))} == {"c_attn"}


@pytest.mark.parametrize("kind", models.PLAIN)
def test_all_linear_layers_but_the_head(kind, open_local):
    names = adapter(open_local(kind))
    assert len(names) == 2 * 2 * (4 if kind == "gpt2" else 7)
    assert not [name for name in names if "head" in name]


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("qwen3", ["q_porj"], r'"q_porj" matches no linear layer.*did you mean "q_proj"\?'),
        ("gpt2", ["xyz"], r'"xyz" matches no linear layer of the model; the model has c_attn, c_fc, c_proj'),
        ("qwen3", ["q_proj", "lm_head"], r'"lm_head" is the output head'),
        ("llama", ["embed_tokens"], r'"embed_tokens" matches no linear layer'),
    ],
)
def test_targets_that_cannot_be(kind, targets, message, open_local):
    with pytest.raises(ConfigError, match=message):
        open_local(kind, lora__target_modules=targets)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", models.PLAIN)
def test_peft_alone_loads_the_adapter_and_gives_the_same_log_probs(
    kind, use_rslora, open_local, model_folder, tmp_path
):
    backend = open_local(kind, lora__use_rslora=use_rslora, lora__alpha=6, training__lr=0.05)
    backend.step(BATCH, 0)
    backend.save_adapter(tmp_path)
    with torch.no_grad():
        own = models.separate_logprobs(backend.policy.lm, BATCH, 1.0)
        fresh = models.load_with_peft(model_folder(kind), tmp_path)
        theirs = models.separate_logprobs(fresh, BATCH, 1.0)
        with fresh.disable_adapter():
            base = models.separate_logprobs(fresh, BATCH, 1.0)
    torch.testing.assert_close(theirs, own, rtol=0, atol=2e-5)
    assert (base[0] - own[0]).abs().max() > 1e-2


def test_the_adapter_config_has_no_order_of_chance(open_local, tmp_path):
    """PEFT keeps a set of names, which has another order in each process."""
    backend = open_local("qwen3")
    backend.save_adapter(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(backend.policy.peft.peft_config["default"].target_modules)
    assert saved["inference_mode"] is True
    assert backend.policy.peft.peft_config["default"].inference_mode is False


def test_loading_an_adapter_restores_it_and_refuses_another_shape(open_local, tmp_path):
    backend = open_local("qwen3")
    saved = adapter(backend)
    backend.save_adapter(tmp_path)
    fresh = open_local("qwen3", stir=False)
    fresh.load_adapter(tmp_path)
    assert equal(adapter(fresh), saved)
    for other in (
        open_local("qwen3", model__lora_rank=8),
        open_local("qwen3", lora__target_modules=["q_proj"]),
        open_local("gpt2"),
    ):
        before = adapter(other)
        with pytest.raises(RetrainError, match="does not fit this config"):
            other.load_adapter(tmp_path)
        assert equal(adapter(other), before)


def test_a_missing_or_damaged_adapter(open_local, tmp_path):
    backend = open_local("qwen3")
    with pytest.raises(RetrainError, match="no adapter in"):
        backend.load_adapter(tmp_path)
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"short")
    with pytest.raises(RetrainError, match="is damaged"):
        backend.load_adapter(tmp_path)


def test_a_run_goes_on_bit_for_bit_after_save_and_load(open_local, tmp_path):
    """With dropout in the adapter, the random streams count as well as the optimizer's moments."""
    options = {"lora__dropout": 0.3, "training__lr": 0.01, "training__weight_decay": 0.1, "stir": False}
    straight = open_local("qwen3", **options)
    for step in range(2):
        straight.step(BATCH, step)
    straight.save(tmp_path)
    want = [straight.step(BATCH, step) for step in (2, 3)]
    torch.rand(5)
    resumed = open_local("qwen3", **options)
    resumed.load(tmp_path)
    assert [resumed.step(BATCH, step) for step in (2, 3)] == want
    assert equal(adapter(resumed), adapter(straight))
    assert want[0].metrics["loss"] != straight.step(BATCH, 2).metrics["loss"]


# ---- devices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    def have(*, gpus=0, metal=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: metal)

    return have


def resolve(name):
    said = []
    return str(devices.resolve_device(name, said.append)), said


def test_devices_that_are_there(machine):
    machine(gpus=2)
    assert [resolve(name) for name in ("cpu", "gpu:0", "cuda:1", "gpu", " gpu:1")] == [
        ("cpu", []),
        ("cuda:0", []),
        ("cuda:1", []),
        ("cuda:0", []),
        ("cuda:1", []),
    ]
    machine(metal=True)
    assert resolve("mps") == ("mps", [])


@pytest.mark.parametrize(("metal", "runs_on"), [(False, "cpu"), (True, "mps")])
def test_the_default_device_falls_back_and_says_so_once(machine, metal, runs_on):
    machine(metal=metal)
    device, said = resolve("gpu:0")
    assert device == runs_on
    assert said == [f"no CUDA or ROCm GPU on this machine: gpu:0 runs on {runs_on}"]


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("gpu:1", 0, 'has no GPU; use "cpu"'),
        ("gpu:2", 2, "this machine has gpu:0 to gpu:1"),
        ("gpu:1", 1, "this machine has gpu:0$"),
        ("mps", 1, 'no Metal device; use "cpu"'),
        ("tpu:0", 1, 'write "cpu", "mps" or "gpu:N"'),
        ("gpu:-1", 1, 'write "cpu", "mps" or "gpu:N"'),
    ],
)
def test_devices_that_are_not(machine, name, gpus, message):
    machine(gpus=gpus)
    with pytest.raises(ConfigError, match=message):
        resolve(name)


def test_a_run_without_a_gpu_says_so_exactly_once(machine, model_folder):
    machine()
    said = []
    LocalBackend(models.config_for(model_folder("gpt2"), backend__devices="gpu:0"), seed=0, say=said.append)
    assert len([line for line in said if "runs on cpu" in line]) == 1


def test_number_formats():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert devices.resolve_dtype("auto", cpu) == torch.float32
    assert devices.resolve_dtype("auto", gpu) == torch.bfloat16
    assert devices.resolve_dtype("bf16", cpu) == torch.bfloat16
    assert devices.resolve_dtype("fp32", gpu) == torch.float32


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < devices.peak_memory_bytes(torch.device("cpu")) < 2**40


@pytest.mark.parametrize(
    ("device", "parameters", "omp", "threads"),
    [
        ("cpu", devices.SMALL_MODEL - 1, None, 1),
        ("cpu", devices.SMALL_MODEL, None, None),
        ("cpu", 1000, "2", None),
        ("cuda:0", 1000, None, None),
    ],
)
def test_a_small_model_runs_on_one_thread(device, parameters, omp, threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    devices.settle_threads(torch.device(device), parameters)
    assert chosen == ([] if threads is None else [threads])
