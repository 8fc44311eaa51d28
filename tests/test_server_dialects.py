"""What servers are asked and how their answers are read: recorded answers, and answers that make no sense.

vLLM's and mlx's answers were recorded from the real servers (vllm 0.32.0 on a CPU, mlx-lm 0.32.2). SGLang's follow its
documentation; it could not be installed to record any.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tiny_models as models
from retrain.http import BadAnswer
from retrain.inference import probe
from retrain.inference.checks import check_sample, choose_model
from retrain.inference.dialects import DIALECTS, Adapter, Ask, Unreproducible, prompt_text
from retrain.inference.probe import Scores, is_stale, make_probe, number_format
from retrain.types import ConfigError, RetrainError
from server_rig import PROMPTS, expected_tokens, generate, tokens

pytest_plugins = "server_fixtures"

ADAPTER = Adapter("retrain-ab12-v3", Path("/adapters/ab12/v3"), 3)
ASK = Ask(
    prompt=[5, 6, 7, 8, 9],
    text="five",
    adapter=ADAPTER,
    max_tokens=4,
    temperature=0.7,
    seed=11,
    stop_ids=[1, 2],
)

VLLM = {
    "id": "cmpl-a6d113101ab15b59",
    "object": "text_completion",
    "created": 1795186320,
    "model": "retrain-ab12-v3",
    "choices": [
        {
            "index": 0,
            "text": " Wait \\boxed{",
            "logprobs": {
                "text_offset": [0, 5, 7, 12],
                "token_logprobs": [
                    -3.0783088207244873,
                    -0.5678571462631226,
                    -1.1920928244535389e-07,
                    -1.5497195136049413e-06,
                ],
                "tokens": [" Wait", " \\", "boxed", "{"],
                "top_logprobs": [{" Wait": -3.0783088207244873}, {" \\": -0.56}, {"boxed": -1.1e-07}, {"{": -1.5e-06}],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [312, 267, 269, 95],
            "prompt_logprobs": None,
            "prompt_token_ids": [5, 6, 7, 8, 9],
            "routed_experts": None,
        }
    ],
    "system_fingerprint": "vllm-0.32.0-842d32ee",
    "usage": {"prompt_tokens": 5, "total_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None},
}
VLLM_PROMPT_LOGPROBS = [
    None,
    {"6": {"logprob": -9.14691162109375, "rank": 128, "decoded_token": '"'}},
    {"7": {"logprob": -9.657057762145996, "rank": 289, "decoded_token": "#"}},
    {"8": {"logprob": -9.63892650604248, "rank": 252, "decoded_token": "$"}},
    {"9": {"logprob": -9.838335990905762, "rank": 326, "decoded_token": "%"}},
]
SGLANG = {
    "text": " Wait",
    "output_ids": [312, 1],
    "meta_info": {
        "id": "0c5f",
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": 5,
        "weight_version": "default",
        "completion_tokens": 2,
        "cached_tokens": 4,
        "e2e_latency": 0.02,
        "input_token_logprobs": [[None, 5, None], [-9.1, 6, None], [-9.6, 7, None], [-9.7, 8, None], [-9.8, 9, None]],
        "output_token_logprobs": [[-3.07, 312, None], [-0.5, 1, None]],
    },
}


class Words:
    """A tokenizer of words: ids are positions in the list; what it does not know is lost."""

    bos_token = None
    known = ("<pad>", "<eos>", "a", "b", "ab", "c")

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.known.index(word) for word in text.split() if word in self.known]}

    def decode(self, ids, skip_special_tokens=False, **_):
        return " ".join(self.known[i] for i in ids if not (skip_special_tokens and i < 2))


def body(engine, ask=ASK, model="base"):
    return DIALECTS[engine].ask(ask, model).body


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_vllm_is_asked_for_ids_and_for_the_distribution_as_it_is():
    assert DIALECTS["vllm"].ask(ASK, "base").path == "/v1/completions"
    assert body("vllm") == {
        "model": "retrain-ab12-v3",
        "prompt": [5, 6, 7, 8, 9],
        "max_tokens": 4,
        "temperature": 0.7,
        "n": 1,
        "seed": 11,
        "logprobs": 0,
        "return_token_ids": True,
        "stop_token_ids": [1, 2],
        "skip_special_tokens": False,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_sglang_is_asked_for_ids_and_for_the_distribution_as_it_is():
    """By its documentation, basic_usage/sampling_params."""
    assert DIALECTS["sglang"].ask(ASK, "base").path == "/generate"
    assert body("sglang") == {
        "input_ids": [5, 6, 7, 8, 9],
        "lora_path": "retrain-ab12-v3",
        "return_logprob": True,
        "logprob_start_len": -1,
        "sampling_params": {
            "max_new_tokens": 4,
            "temperature": 0.7,
            "n": 1,
            "sampling_seed": 11,
            "stop_token_ids": [1, 2],
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        },
    }


@pytest.mark.parametrize("engine", ["vllm", "sglang", "mlx"])
def test_without_an_adapter_the_base_is_asked(engine):
    base = body(engine, dataclasses.replace(ASK, adapter=None))
    assert base.get("model", "base") == "base"
    assert not {"lora_path", "adapters"} & base.keys()


def test_mlx_gets_the_prompt_as_text_and_the_adapter_as_a_folder():
    asked = body("mlx", model="/models/tiny")
    assert asked["prompt"] == "five"
    assert asked["adapters"] == "/adapters/ab12/v3"
    assert asked["model"] == "/models/tiny"  # "default_model" would make it ignore the adapter
    assert asked["logprobs"] is True


@pytest.mark.parametrize("engine", ["openai", "max"])
def test_others_are_asked_for_nothing_that_openai_does_not_know(engine):
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "logprobs"}
    assert body(engine).keys() == known


def test_how_adapters_are_loaded():
    (load,) = DIALECTS["vllm"].load(ADAPTER)
    assert load.path == "/v1/load_lora_adapter"
    assert load.body == {"lora_name": "retrain-ab12-v3", "lora_path": "/adapters/ab12/v3", "load_inplace": True}
    unload, load = DIALECTS["sglang"].load(ADAPTER)
    assert (unload.path, unload.body) == ("/unload_lora_adapter", {"lora_name": "retrain-ab12-v3"})
    assert (load.path, load.body) == (
        "/load_lora_adapter",
        {"lora_name": "retrain-ab12-v3", "lora_path": "/adapters/ab12/v3"},
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_recorded_answer_of_vllm():
    sample = DIALECTS["vllm"].read(VLLM, ASK, None)
    check_sample(sample, ASK, 347)
    assert sample.tokens == [312, 267, 269, 95]
    assert sample.logprobs[0] == -3.0783088207244873
    assert not sample.stopped
    assert sample.served_by == "retrain-ab12-v3"


def test_a_recorded_answer_of_vllm_with_prompt_log_probs():
    answer = {"choices": [{**VLLM["choices"][0], "prompt_logprobs": VLLM_PROMPT_LOGPROBS}]}
    scores = DIALECTS["vllm"].scoring.read(answer, [5, 6, 7, 8, 9])
    assert scores == [-9.14691162109375, -9.657057762145996, -9.63892650604248, -9.838335990905762]
    with pytest.raises(BadAnswer):
        DIALECTS["vllm"].scoring.read(answer, [5, 6, 7, 8, 10])


def test_an_answer_of_sglang_as_documented():
    sample = DIALECTS["sglang"].read(SGLANG, ASK, None)
    check_sample(sample, ASK, 347)
    assert (sample.tokens, sample.logprobs, sample.stopped) == ([312, 1], [-3.07, -0.5], True)
    assert DIALECTS["sglang"].scoring.read(SGLANG, [5, 6, 7, 8, 9]) == [-9.1, -9.6, -9.7, -9.8]
    with pytest.raises(BadAnswer, match="other tokens"):
        DIALECTS["sglang"].scoring.read(SGLANG, [5, 6, 7, 8, 10])


def test_an_answer_of_another_adapter_is_no_answer():
    sample = DIALECTS["vllm"].read({**VLLM, "model": "retrain-ab12-v2"}, ASK, None)
    with pytest.raises(BadAnswer, match="from retrain-ab12-v2, retrain-ab12-v3 was asked for"):
        check_sample(sample, ASK, 347)


def test_a_prompt_that_was_changed_is_no_answer():
    choice = {**VLLM["choices"][0], "prompt_token_ids": [0, 5, 6, 7, 8, 9]}
    with pytest.raises(BadAnswer, match="another prompt"):
        DIALECTS["vllm"].read({**VLLM, "choices": [choice]}, ASK, None)
    meta = {**SGLANG["meta_info"], "prompt_tokens": 6}
    with pytest.raises(BadAnswer, match="6 tokens in a prompt of 5"):
        DIALECTS["sglang"].read({**SGLANG, "meta_info": meta}, ASK, None)


def text_answer(text, logprobs, reason="length"):
    return {"choices": [{"text": text, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}]}


@pytest.mark.parametrize(
    "text, logprobs, reason, expected",
    [
        ("a b", [-1, -2], "length", [2, 3]),
        ("a b", [-1, -2], "stop", [2, 3]),
        ("a b", [-1, -2, -3], "stop", [2, 3, 1]),  # the end of sequence has a log-prob and no text
        ("a b", [-1, -2, -3], "length", None),
        ("ab c", [-1, -2, -3], "length", None),  # sampled as "a", "b", "c", say
        ("a z", [-1], "length", None),
        ("", [], "stop", None),
    ],
)
def test_text_alone_counts_where_it_leaves_no_doubt(text, logprobs, reason, expected):
    ask = dataclasses.replace(ASK, stop_ids=[1])
    answer = text_answer(text, logprobs, reason)
    if expected is None:
        with pytest.raises(Unreproducible):
            DIALECTS["openai"].read(answer, ask, Words())
    else:
        assert DIALECTS["openai"].read(answer, ask, Words()).tokens == expected


def test_with_several_ends_of_sequence_text_does_not_tell_which():
    with pytest.raises(Unreproducible):
        DIALECTS["openai"].read(text_answer("a b", [-1, -2, -3], "stop"), ASK, Words())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw, answer):
    """A good answer with one part, anywhere in it, replaced or taken out."""
    answer = json.loads(json.dumps(answer))
    place = answer
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(json_values)
        return answer


@pytest.mark.parametrize(
    "engine, answer",
    [("vllm", VLLM), ("sglang", SGLANG), ("openai", text_answer("a b c ab", [-1.0] * 4)), ("max", VLLM)],
)
def test_whatever_comes_is_a_sound_sample_or_a_bad_answer(engine, answer):
    """Nothing else is raised, and what passes can be trained on."""

    @given(damaged(answer) | json_values)
    def check(answer):
        try:
            sample = DIALECTS[engine].read(answer, ASK, Words())
            check_sample(sample, ASK, 347)
        except (BadAnswer, Unreproducible):
            return
        assert 1 <= len(sample.tokens) == len(sample.logprobs) <= ASK.max_tokens
        array = np.array(sample.tokens, dtype=np.int64)
        assert ((array >= 0) & (array < 347)).all()
        logprobs = np.array(sample.logprobs, dtype=np.float64)
        assert (np.isfinite(logprobs) & (logprobs <= 1e-6)).all()

    check()


@pytest.mark.parametrize("engine, answer", [("vllm", VLLM), ("sglang", SGLANG)])
def test_whatever_comes_for_scores_is_a_list_or_a_bad_answer(engine, answer):
    answer = json.loads(json.dumps(answer))
    if engine == "vllm":
        answer["choices"][0]["prompt_logprobs"] = VLLM_PROMPT_LOGPROBS

    @given(damaged(answer) | json_values)
    def check(answer):
        try:
            scores = DIALECTS[engine].scoring.read(answer, ASK.prompt)
        except BadAnswer:
            return
        assert len(scores) == 4

    check()


# ---- the served model -----------------------------------------------------------------------------------------------


def listed(*names, **fields):
    return [{"id": name, "parent": None, **fields} for name in names]


def test_the_only_model_may_have_any_name():
    assert choose_model("u", "org/model", listed("alias", root="org/model", max_model_len=64)) == ("alias", 64)
    assert choose_model("u", "org/model", listed("alias")) == ("alias", None)


def test_among_several_the_name_decides():
    assert choose_model("u", "org/b", listed("org/a", "org/b")) == ("org/b", None)
    assert choose_model("u", "builtin:tiny", listed("x", models_path("tiny")))[0].endswith("tiny")
    with pytest.raises(ConfigError, match=r"serves org/a, org/c, and none of them is model.model = org/b"):
        choose_model("u", "org/b", listed("org/a", "org/c"))


def test_adapters_are_no_models():
    cards = [*listed("base"), {"id": "retrain-1-v1", "parent": "base"}]
    assert choose_model("u", "m", cards) == ("base", None)
    with pytest.raises(ConfigError, match="no base model"):
        choose_model("u", "m", [])


def models_path(name):
    from retrain.assets import BUILTIN

    return str(BUILTIN[f"builtin:{name}"].resolve())


# ---- the proof ------------------------------------------------------------------------------------------------------


def scores(served, expected):
    return Scores(np.array(served, dtype=np.float32), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize(
    "now, stale",
    [
        (([-1, -2], [-1, -2]), False),  # nothing moved
        (([-1, -2], [-1, -2.000001]), False),  # less than counts
        (([-1, -2], [-1, -2.0005]), True),  # moved, within the tolerance, and not a bit of it followed
        (([-1, -2.0004], [-1, -2.0005]), False),
        (([-1.0001, -2.0001], [-1, -2.5]), True),  # not exactly as before, but not as now either
        (([-1, -2.5], [-1, -2.5]), False),
        (([-3, -4], [-1, -2.5]), False),  # wrong, but not as before
    ],
)
def test_what_is_stale(now, stale):
    assert is_stale(scores(*now), scores([-1, -2], [-1, -2]), 1e-3) is stale


@pytest.mark.parametrize(
    "trainer, keys, expected",
    [
        ("float32", {}, "float32"),
        ("bfloat16", {}, "bfloat16"),
        ("float32", {"dtype": "bf16"}, "bfloat16"),
        ("float32", {"kv_cache_dtype": "bf16"}, "bfloat16"),
        ("float32", {"dtype": "fp8"}, "8 bits"),
        ("bfloat16", {"kv_cache_dtype": "int8"}, "8 bits"),
        ("bfloat16", {"dtype": "fp4", "kv_cache_dtype": "fp8"}, "4 bits"),
    ],
)
def test_the_coarsest_format_sets_the_tolerance(trainer, keys, expected):
    from retrain.config import InferenceConfig

    assert number_format(trainer, InferenceConfig(**keys)) == expected
    assert probe.TOLERANCE[expected] > 0


@pytest.mark.parametrize("context", [4, 9, 60, 4096])
def test_the_probe_fits_the_context(context, model_folder):
    from transformers import AutoTokenizer

    made = make_probe(AutoTokenizer.from_pretrained(model_folder("qwen3")), context)
    assert len(made.prompt) >= 1
    assert len(made.continuation) >= 1
    assert len(made.ids) < context
    assert len(made.prompt) + 1 <= context


# ---- servers that give text, and mlx --------------------------------------------------------------------------------


def test_a_server_of_text_is_used_where_its_text_round_trips(serve, connect):
    """The double's tokens are bytes: half of a character decodes to text that does not tell them."""
    fake = serve("openai")
    engine, _ = connect(fake)
    groups = generate(engine, max_tokens=1, temperature=2.0)
    wanted = [sampled.tokens for sampled in expected_tokens(fake, fake.model, max_tokens=1, temperature=2.0)]
    got = tokens(groups)
    assert engine.dropped == 12 - len(got) > 0
    assert all(ids in wanted for ids in got)
    decoded = [fake.tokenizer.decode(ids) for ids in wanted]
    assert len(got) == sum(text not in ("", "\ufffd") for text in decoded)
    assert f"{engine.dropped} of 12 completions dropped" in engine.said[-1]


def test_a_server_whose_text_never_round_trips(serve, connect):
    fake = serve("openai")
    engine, _ = connect(fake)
    with pytest.raises(RetrainError, match="none of 12 texts tokenises back"):
        generate(engine, max_tokens=60, temperature=3.0)


@pytest.mark.parametrize(
    "engine, reason", [("openai", "no route by which a new adapter"), ("max", "for Llama 3 models")]
)
def test_servers_without_an_adapter_route_refuse_to_publish(serve, connect, engine, reason):
    opened, _ = connect(serve("openai"), engine=engine)
    with pytest.raises(ConfigError, match=rf'inference.engine = "{engine}": .*{reason}.*Use "vllm" or "sglang"'):
        opened.publish(0)


def test_prompt_text_round_trips(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("qwen3"))
    for prompt in PROMPTS:
        assert tokenizer(prompt_text(prompt.tolist(), tokenizer))["input_ids"] == prompt.tolist()
    half = tokenizer("é")["input_ids"][:1]
    with pytest.raises(RetrainError, match="takes text only"):
        prompt_text(half, tokenizer)


def test_mlx_gets_each_version_in_its_own_format(serve, connect, tmp_path):
    """The double cannot read mlx's format: it is given the same adapter as PEFT reads it, before it was converted."""
    fake = serve("mlx")
    engine, backend = connect(fake, temperature=1.0)
    (tmp_path / "peft").mkdir()
    backend.save_adapter(tmp_path / "peft")
    fake.state.adapters = AnyFolder(models.load_with_peft(fake.base, tmp_path / "peft"))
    engine.publish(2)
    groups = generate(engine, temperature=1.0)
    assert tokens(groups) == [s.tokens for s in expected_tokens(fake, fake.state.adapters.model, temperature=1.0)]
    (folder,) = (tmp_path / "adapters").glob("*/v2")
    assert {request.body.get("adapters") for request in fake.completions()[-12:]} == {str(folder)}
    assert groups[0][0].policy_version == 2
    assert fake.most_at_once == 1


class AnyFolder(dict):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def get(self, key, default=None):
        return default if key is None else self.model


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_that_mlx_reads_is_the_one_that_peft_reads(open_local, tmp_path, rslora):
    """mlx computes x a b times the scale, PEFT x A' B' times its own."""
    from retrain.inference.mlx import to_mlx

    backend = open_local(lora__use_rslora=rslora, lora__alpha=12)
    backend.save_adapter(tmp_path)
    peft = load_file(tmp_path / "adapter_model.safetensors")
    to_mlx(tmp_path)
    mlx = load_file(tmp_path / "adapters.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    assert len(mlx) == len(peft) == 2 * len(settings["keys"])
    assert settings["rank"] == 4
    for module in settings["keys"]:
        layer = backend.policy.lm.get_submodule(module)
        delta = settings["scale"] * mlx[f"{module}.lora_a"] @ mlx[f"{module}.lora_b"]
        np.testing.assert_allclose(delta.T, layer.get_delta_weight("default").detach().numpy(), atol=1e-6)
