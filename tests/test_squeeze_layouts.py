"""Every layout of PEFT's: squeezed, loaded by PEFT and compared with a dense SVD of its own dW; or refused by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models as models
from retrain.squeeze import analyze, compress
from retrain.squeeze.layouts import CARRIED, RECOMPUTED, REFUSED
from retrain.types import ConfigError
from squeeze_adapters import IDS, adapted, edit_config, load, make_net, save, truncated, updates

LAYOUTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["wide", "narrow", "embed"],
        "rank_pattern": {"wide": 5, "^narrow": 2},
        "alpha_pattern": {"narrow|embed": 7},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"wide": 6}, "alpha_pattern": {"narrow": 5}},
    "embedding": {"target_modules": ["embed", "wide"]},
    "convolution": {"target_modules": ["conv", "narrow"]},
    "attention": {"target_modules": ["attend", "wide"]},
    "experts": {"target_modules": ["wide"], "target_parameters": ["experts.up", "experts.down"]},
    "trained modules": {"modules_to_save": ["head"], "bias": "all"},
    "bias of B": {"lora_bias": True, "lora_alpha": 5},
    "no linear layer": {"target_modules": [], "target_parameters": ["experts.up"]},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "MiCA": {"init_lora_weights": "mica", "r": 4},
    "VeLoRA": {"velora_config": {"num_groups": 8}},
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    options = LAYOUTS[request.param]
    model = adapted(**options)
    return model, save(model, tmp_path / "source")


def test_squeezed_to_a_rank(layout, tmp_path):
    """What is loaded by PEFT is the truncation of what PEFT merges; the rest of the adapter is as it was."""
    model, folder = layout
    done = compress(folder, tmp_path / "out", rank=3)
    squeezed = load(tmp_path / "out")
    rest = {
        name: p.clone() for name, p in model.named_parameters() if "lora_" not in name or "lora_B.default.bias" in name
    }
    for name, parameter in squeezed.named_parameters():
        if name in rest:
            assert torch.equal(parameter, rest[name]), name
    source, found = updates(model), updates(squeezed)
    assert found.keys() == source.keys() and len(source) == len(done.ranks)
    layers = {layer.name: layer for layer in done.analysis.layers}
    for name, delta in source.items():
        expected = truncated(delta, 3)
        assert (found[name] - expected).norm() <= 2e-6 * delta.norm(), name
        variance = 1 - ((delta - expected).norm() / delta.norm()).item() ** 2
        assert layers[name].kept(3) == pytest.approx(variance, abs=1e-6)


def test_squeezed_layer_by_layer(tmp_path):
    """Different ranks in one adapter: PEFT finds each layer's in the patterns."""
    model = adapted(target_modules=["embed", "wide", "conv", "attend", "narrow"], use_rslora=True)
    folder = save(model, tmp_path / "source")
    done = compress(folder, tmp_path / "out", per_layer=True, min_variance_retention=0.8)
    assert len(set(done.ranks.values())) > 1
    # The two layers in an attention module share its rank.
    assert done.ranks["attend"] == done.ranks["attend.base_layer.out_proj"]
    found = updates(load(tmp_path / "out"))
    spectra = {layer.name: layer for layer in done.analysis.layers}
    for name, delta in updates(model).items():
        rank = done.ranks[name]
        assert (found[name] - truncated(delta, rank)).norm() <= 2e-6 * delta.norm()
        assert spectra[name].kept(rank) >= 0.8
        assert name.startswith("attend") or rank == 1 or spectra[name].kept(rank - 1) < 0.8
    assert done.min_variance == min(spectra[name].kept(rank) for name, rank in done.ranks.items())


def test_patterns_are_for_one_module_each(tmp_path):
    """`wide` is the end of another module's name: PEFT matches patterns at the end."""
    base = torch.nn.ModuleDict(
        {"wide": torch.nn.Linear(12, 12), "x": torch.nn.ModuleDict({"wide": torch.nn.Linear(12, 12)})}
    )
    model = get_peft_model(base, LoraConfig(r=6, target_modules=["wide"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # One direction suffices for the first; the other needs all of them.
                parameter.copy_(torch.eye(12, 6) if ".x." in name else torch.eye(12, 6) * 10.0 ** -torch.arange(6))
    model.save_pretrained(tmp_path / "source")
    done = compress(tmp_path / "source", tmp_path / "out", per_layer=True)
    assert done.ranks["wide"] < done.ranks["x.wide"]
    config = LoraConfig.from_pretrained(tmp_path / "out")
    fresh = get_peft_model(
        torch.nn.ModuleDict(
            {"wide": torch.nn.Linear(12, 12), "x": torch.nn.ModuleDict({"wide": torch.nn.Linear(12, 12)})}
        ),
        config,
    )
    assert {
        name: module.r["default"]
        for name, module in fresh.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    } == done.ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_rounded_once_to_their_own_dtype(tmp_path, dtype):
    model = adapted(target_modules=["embed", "wide", "narrow"], modules_to_save=["head"], dtype=dtype)
    folder = save(model, tmp_path / "source")
    compress(folder, tmp_path / "out", rank=4)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    found = updates(load(tmp_path / "out"))
    for name, delta in updates(model).items():
        expected = truncated(delta, 4)
        assert (found[name] - expected).norm() <= torch.finfo(dtype).eps / 2 * expected.norm()


def test_the_function_is_that_of_the_truncated_product(tmp_path):
    """Log-probs of the squeezed model against those of a model into which the truncated products are merged."""
    model = adapted(target_modules=["embed", "wide", "narrow"], modules_to_save=["head"])
    folder = save(model, tmp_path / "source")
    compress(folder, tmp_path / "out", rank=4)
    squeezed = load(tmp_path / "out").double()
    merged = make_net().double()
    merged.head = model.get_base_model().head.modules_to_save["default"].double()
    with torch.no_grad():
        for name, delta in updates(model).items():
            weight = merged.get_submodule(name).weight
            weight += truncated(delta, 4)[0]
        expected = torch.log_softmax(merged(IDS), -1)
        found = torch.log_softmax(squeezed.get_base_model()(IDS), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (expected - torch.log_softmax(make_net().double()(IDS), -1)).abs().max() > 0.1


def test_layers_within_the_rank_stay_bit_for_bit(tmp_path):
    folder = save(adapted(rank_pattern={"wide": 3}, dtype=torch.bfloat16), tmp_path / "source")
    compress(folder, tmp_path / "out", rank=4)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    same = {key for key in before if before[key].shape == after[key].shape and torch.equal(before[key], after[key])}
    assert same == {key for key in before if ".wide." in key}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {"^wide": 3})


def test_the_scale_of_every_layer_stays(tmp_path):
    """alpha falls with the rank, as an int where it can be one: 16 / 8 = 8 / 4."""
    folder = save(adapted(), tmp_path / "source")
    compress(folder, tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 8, {})
    assert isinstance(config["lora_alpha"], int)


def test_squeezing_twice_is_squeezing_once(tmp_path):
    folder = save(adapted(), tmp_path / "source")
    compress(folder, tmp_path / "five", rank=5)
    compress(tmp_path / "five", tmp_path / "two", rank=2)
    compress(folder, tmp_path / "once", rank=2)
    once, twice = updates(load(tmp_path / "once")), updates(load(tmp_path / "two"))
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=0, atol=1e-6)


def test_pickled_weights_are_never_read(tmp_path):
    folder = save(adapted(), tmp_path / "source")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin: a pickle.* never opened"):
        analyze(folder)


def test_every_field_of_peft_is_decided():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == RECOMPUTED | CARRIED | set(REFUSED)
    assert not (RECOMPUTED & CARRIED or (RECOMPUTED | CARRIED) & set(REFUSED))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, r"use_dora\). DoRA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"monteclora_config": {}}, None),
        ({"monteclora_config": {"n": 1}}, "MonteCLoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" changes the base'),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"init_lora_weights": "lora_ga"}, "changes the base"),
        ({"use_tomorrow": 3}, "sets use_tomorrow, which this version of retrain does not know"),
        ({"use_tomorrow": False}, None),
        ({"alora_invocation_tokens": [3]}, None),
        ({"target_parameters": ["x"], "rank_pattern": {"wide": 8}}, "target_parameters together with rank_pattern"),
        ({"r": 0}, "no usable r"),
        ({"r": 16}, "gives narrow rank 16, but its weights have 8"),
    ],
)
def test_configs(tmp_path, values, message):
    folder = save(adapted(), tmp_path)
    edit_config(folder, **values)
    if message is None:
        analyze(folder)
        return
    with pytest.raises(ConfigError, match=message):
        analyze(folder)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AdaLoraConfig(target_modules=["wide"], total_step=10, tinit=1, tfinal=2), "ADALORA"),
        (LoHaConfig(target_modules=["wide"]), "LOHA"),
        (IA3Config(target_modules=["wide"], feedforward_modules=[]), "IA3"),
    ],
)
def test_other_kinds_of_adapters(tmp_path, config, kind):
    get_peft_model(make_net(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"is an adapter of type {kind}, not LoRA"):
        analyze(tmp_path)


def test_dora_by_its_tensors(tmp_path):
    folder = save(adapted(use_dora=True), tmp_path)
    edit_config(folder, use_dora=False)
    with pytest.raises(ConfigError, match="has a tensor lora_magnitude_vector"):
        analyze(folder)


def test_a_grouped_convolution(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=2))
    with pytest.warns(UserWarning, match="groups"):
        model = get_peft_model(net, LoraConfig(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="0 is a grouped convolution"):
        analyze(tmp_path)


def test_damaged_weights(tmp_path):
    folder = save(adapted(), tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    broken = {key: value.clone() for key, value in tensors.items()}
    next(iter(broken.values()))[0, 0] = float("nan")
    save_file(broken, path)
    with pytest.raises(ConfigError, match="is not finite"):
        analyze(folder)
    lost = next(key for key in tensors if "lora_A" in key)
    save_file({key: value for key, value in tensors.items() if key != lost}, path)
    with pytest.raises(ConfigError, match="without its other factor"):
        analyze(folder)
    save_file({"base_model.model.head.weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="no LoRA layer"):
        analyze(folder)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="its weights are damaged"):
        analyze(folder)
    path.unlink()
    with pytest.raises(ConfigError, match="an adapter without weights"):
        analyze(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        analyze(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no adapter_config\.json"):
        analyze(folder)
    with pytest.raises(ConfigError, match="no such adapter folder"):
        analyze(folder / "nowhere")


def test_tied_embeddings_with_tied_adapters(tmp_path, model_folder):
    """`ensure_weight_tying`: the head has the embedding's factors, transposed."""
    base = model_folder("qwen3")
    config = LoraConfig(r=6, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    models.stir(model)
    folder = save(model, tmp_path / "source")
    compress(folder, tmp_path / "out", rank=2)
    squeezed = models.load_with_peft(base, tmp_path / "out")
    source, found = updates(model), updates(squeezed)
    assert len(source) == 4
    for name, delta in source.items():
        torch.testing.assert_close(found[name], truncated(delta, 2), rtol=0, atol=1e-5)
