"""Decoding: every architecture and option against PEFT on plain transformers; what is copied, shared and left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import tiny_models as models
from retrain.backend.local import LocalBackend
from retrain.inference import fused, pytorch
from retrain.inference.fused import FusedDecoder, obstacle
from retrain.inference.modules import ModuleDecoder
from retrain.inference.pytorch import PyTorchEngine
from retrain.types import ConfigError

PROMPTS = [np.arange(2, 2 + n) for n in (1, 40, 7)]
STREAMS = np.arange(12, dtype=np.uint64).reshape(3, 4)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
UNTIED = {"tie_word_embeddings": False}
FUSED = {
    "qwen3": models.CONFIGS["qwen3"],
    "llama": models.CONFIGS["llama"],
    "llama-biases": lambda: LlamaConfig(**models.SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama3-rope": lambda: LlamaConfig(**models.SIZES, rope_parameters=LLAMA3),
    "yarn-rope": lambda: Qwen3Config(**models.SIZES, head_dim=16, rope_parameters=YARN),
    "qwen2": lambda: Qwen2Config(**models.SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**models.SIZES | {"num_key_value_heads": 4}, sliding_window=None),
}
BY_MODULES = {
    "gpt2": (models.CONFIGS["gpt2"], "no fused form of gpt2"),
    "mistral-window": (models.CONFIGS["mistral-window"], "sliding window"),
    "gemma3-window": (models.CONFIGS["gemma3-window"], "no fused form of gemma3_text"),
    "dynamic-rope": (lambda: LlamaConfig(**models.SIZES, rope_parameters=DYNAMIC), 'rotary embedding is of type "dyn'),
}
EVERY = {**FUSED, **{kind: config for kind, (config, _) in BY_MODULES.items()}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models of this file on disk, made when they are first asked for."""
    made = {}

    def folder(kind):
        if kind not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(models.CONFIGS, kind, EVERY[kind])
                made[kind] = models.save_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def opened(folders):
    def open_backend(kind="qwen3", **overrides):
        backend = LocalBackend(models.config_for(folders(kind), **overrides), seed=0, say=lambda line: None)
        models.stir(backend.policy.peft)
        return backend

    return open_backend


def generate(engine, *, temperature=0.9, max_tokens=24):
    return engine.generate(PROMPTS, STREAMS, max_tokens=max_tokens, temperature=temperature)


def flat(groups):
    return [(completion.tokens_T, completion.logprobs_T) for group in groups for completion in group]


def gap(groups, model, temperature=0.9):
    """Largest distance of the completions' log-probs from a plain forward of `model` over each whole sequence."""
    return distances(groups, model, temperature).max()


def distances(groups, model, temperature=0.9):
    found = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            whole = torch.from_numpy(np.concatenate((prompt, completion.tokens_T)))[None]
            with torch.no_grad():
                logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
                logits = logits if logits.dtype == torch.float64 else logits.float()
            logprob = torch.log_softmax(logits / temperature, dim=-1)
            want = logprob.gather(1, torch.from_numpy(completion.tokens_T)[:, None])[:, 0].numpy()
            found.append(np.abs(want - completion.logprobs_T))
    return np.concatenate(found)


# ---- exact, whatever the architecture and the way -----------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "live"])
@pytest.mark.parametrize("kind", EVERY)
def test_what_is_sampled_is_what_peft_computes(kind, merged, opened, folders, tmp_path):
    """Against the saved adapter on a fresh base, which nothing of this project has touched; eager attention.

    In float64: in float32 the reference is itself 2e-5 off on some processors.
    """
    backend = opened(kind)
    backend.save_adapter(tmp_path)
    reference = models.load_with_peft(folders(kind), tmp_path)
    engine = PyTorchEngine(backend.policy, merged_copy=merged)
    assert gap(generate(engine), copy.deepcopy(reference).double()) < 1e-5
    greedy = generate(engine, temperature=0.0)
    for prompt, group in zip(PROMPTS, greedy, strict=True):
        output = reference.generate(
            input_ids=torch.from_numpy(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(backend.policy.eos_ids),
            pad_token_id=models.PAD,
        )
        for completion in group:
            assert completion.tokens_T.tolist() == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in place"])
def test_a_partly_adapted_model(packed, targets, opened, folders, tmp_path, monkeypatch):
    if not packed:
        monkeypatch.setattr(fused, "can_pack", lambda device, dtype: False)
    backend = opened("llama-biases", lora__target_modules=targets, lora__use_rslora=True, lora__alpha=7)
    backend.save_adapter(tmp_path)
    engine = PyTorchEngine(backend.policy)
    assert gap(generate(engine), models.load_with_peft(folders("llama-biases"), tmp_path)) < 1e-5
    layer, block = engine.decoder.layers[0], backend.policy.lm.model.layers[0]
    in_place = {
        layer.qkv: block.self_attn.q_proj,
        layer.out: block.self_attn.o_proj,
        layer.gate_up: block.mlp.gate_proj,
        layer.down: block.mlp.down_proj,
    }
    for projection, module in in_place.items():
        same = (
            not packed and projection.parts[0][0].data_ptr() == getattr(module, "base_layer", module).weight.data_ptr()
        )
        assert same == (not packed and not projection.adapted)


@pytest.mark.parametrize("kind", ["qwen3", "mistral-window"])
def test_prefix_caching_and_room_change_nothing(kind, opened, monkeypatch):
    backend = opened(kind)
    usual = flat(generate(PyTorchEngine(backend.policy)))
    monkeypatch.setattr("retrain.inference.cache.ROOM", 3)
    for (tokens, logprobs), (want, close) in zip(
        flat(generate(PyTorchEngine(backend.policy, prefix_caching=False))), usual, strict=True
    ):
        assert tokens.tolist() == want.tolist()
        np.testing.assert_allclose(logprobs, close, rtol=0, atol=1e-5)


# ---- which way, and that it is said --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED)
def test_the_fast_way_is_taken(kind, opened):
    engine = PyTorchEngine(opened(kind).policy)
    assert isinstance(engine.decoder, FusedDecoder)
    assert engine.path.startswith("fused")


@pytest.mark.parametrize("kind", BY_MODULES)
def test_what_the_fast_way_does_not_know_goes_through_the_modules(kind, opened):
    engine = PyTorchEngine(opened(kind).policy)
    assert isinstance(engine.decoder, ModuleDecoder)
    assert "merged copy" in engine.path
    assert BY_MODULES[kind][1] in engine.path


def test_a_model_that_the_fast_way_gets_wrong_goes_through_the_modules(opened, folders, tmp_path):
    """Its architecture is a known one, but a layer of it does something else."""
    backend = opened("llama")
    norm = backend.policy.lm.model.norm
    norm.forward = lambda x, forward=norm.forward: forward(x) * 1.01
    assert obstacle(backend.policy) is None
    engine = PyTorchEngine(backend.policy)
    assert "does not compute what the modules do" in engine.path
    assert gap(generate(engine), backend.policy.lm) < 1e-5


# ---- what is served, and what is left alone ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_merged_copy_is_a_snapshot_that_publishing_renews_without_drift(kind, opened):
    backend = opened(kind, training__lr=0.05)
    digest = backend.base_digest()
    engine = PyTorchEngine(backend.policy)
    before = flat(generate(engine))
    for version in range(1, 30):
        engine.publish(version)
    for (tokens, logprobs), (want, same) in zip(flat(generate(engine)), before, strict=True):
        assert tokens.tolist() == want.tolist()
        assert logprobs.tolist() == same.tolist()
    backend.step(models.random_batch(0, [4, 5], [[6, 6], [3, 9]]), 0)
    assert gap(generate(engine), backend.policy.lm) > 1e-2
    assert [tokens.tolist() for tokens, _ in flat(generate(engine))] == [tokens.tolist() for tokens, _ in before]
    engine.publish(30)
    assert gap(generate(engine), backend.policy.lm) < 1e-5
    assert {completion.policy_version for group in generate(engine) for completion in group} == {30}
    assert backend.base_digest() == digest


def test_merged_modules_share_what_the_adapter_leaves(opened):
    backend = opened("gpt2")
    own = dict(backend.policy.lm.named_parameters())
    copied = dict(PyTorchEngine(backend.policy).decoder.lm.named_parameters())
    assert not any("lora" in name for name in copied)
    for name, parameter in copied.items():
        source = own.get(name)
        if source is None:  # an adapted layer, which the model has one level deeper
            parent, _, leaf = name.rpartition(".")
            source = own[f"{parent}.base_layer.{leaf}"]
        adapted = name.endswith("weight") and name not in own
        assert (parameter.data_ptr() == source.data_ptr()) != adapted, name


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "live"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_sampling_in_between_leaves_training_as_it_is(kind, merged, opened):
    """Bit for bit, with gradient checkpointing and dropout, whose switches an engine could leave on or off."""
    batch = models.random_batch(3, [4, 9], [[6, 2], [3, 9]])
    trained = []
    for samples in (False, True):
        backend = opened(kind, training__gradient_checkpointing=True, lora__dropout=0.2, training__lr=0.01)
        engine = PyTorchEngine(backend.policy, merged_copy=merged) if samples else None
        torch.manual_seed(5)
        for step in range(2):
            if engine:
                engine.publish(step)
                generate(engine)
            backend.step(batch, step)
        trained.append([p.detach().clone() for p in backend.policy.adapter_parameters()])
    for plain, sampled in zip(*trained, strict=True):
        assert torch.equal(plain, sampled)


# ---- number formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_bf16_copy_of_a_float32_model(kind, opened):
    backend = opened(kind)
    digest = backend.base_digest()
    engine = PyTorchEngine(backend.policy, dtype="bf16")
    assert backend.base_digest() == digest
    assert {p.dtype for _, p in backend.policy.base_parameters()} == {torch.float32}
    if kind == "gpt2":
        assert {p.dtype for p in engine.decoder.lm.parameters()} == {torch.bfloat16}
    else:
        assert engine.decoder.cache_dtype == torch.bfloat16
    rounded = gap(generate(engine), backend.policy.lm)
    assert 1e-4 < rounded < 1.5
    engine.publish(1)
    assert gap(generate(engine), backend.policy.lm) == rounded


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_bf16_model_is_merged_no_worse_than_it_is_computed_beside_its_adapter(kind, opened):
    """Against the same model in float32: rounding W + scale B A once adds nothing to what bf16 costs anyway."""
    exact, narrow = opened(kind), opened(kind, training__dtype="bf16")

    def error(**options):
        answers = generate(PyTorchEngine(narrow.policy, **options))
        return distances(answers, exact.policy.lm).mean()  # the largest of so few is chance

    assert error() < 2 * error(merged_copy=False)


@pytest.mark.parametrize(("cache", "low", "high"), [("bf16", 1e-4, 1.0), ("fp8", 1e-2, 8.0)])
def test_a_narrow_cache_is_used_and_shows_in_the_log_probs(cache, low, high, opened):
    backend = opened("llama")
    assert low < gap(generate(PyTorchEngine(backend.policy, kv_cache_dtype=cache)), backend.policy.lm) < high


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", {"kv_cache_dtype": "bf16"}, r'kv_cache_dtype = "bf16".*no fused form of gpt2.*use "auto"'),
        ("qwen3", {"kv_cache_dtype": "fp8", "merged_copy": False}, r"kv_cache_dtype.*merged_copy = false"),
        ("qwen3", {"dtype": "bf16", "merged_copy": False}, r'inference.dtype = "bf16": only a merged copy'),
    ],
)
def test_formats_that_need_another_way_are_refused(kind, options, message, opened):
    with pytest.raises(ConfigError, match=message):
        PyTorchEngine(opened(kind).policy, **options)


def test_the_loop_ends_with_the_last_row(opened):
    """No step of the model after every row has ended."""
    backend = opened("qwen3")
    engine = PyTorchEngine(backend.policy)
    engine.policy = backend.policy.__class__(**{**vars(backend.policy), "eos_ids": tuple(range(models.VOCAB))})
    steps = []
    start = engine.decoder.start
    engine.decoder.start = lambda *arguments: counted(start(*arguments), steps)
    assert {len(tokens) for tokens, _ in flat(generate(engine))} == {1}
    assert steps == []


def counted(started, steps):
    logits, rows = started
    step = rows.step
    rows.step = lambda tokens: steps.append(len(tokens)) or step(tokens)
    return logits, rows


def test_ended_rows_leave_the_batch(opened):
    backend = opened("qwen3")
    engine = PyTorchEngine(backend.policy)
    engine.policy = backend.policy.__class__(**{**vars(backend.policy), "eos_ids": tuple(range(0, models.VOCAB, 9))})
    steps = []
    start = engine.decoder.start
    engine.decoder.start = lambda *arguments: counted(start(*arguments), steps)
    lengths = [len(tokens) for tokens, _ in flat(generate(engine, max_tokens=60))]
    for t, width in enumerate(steps, start=1):
        running = sum(length > t for length in lengths)
        assert running <= width
        assert running > pytorch.COMPACT_BELOW * width
