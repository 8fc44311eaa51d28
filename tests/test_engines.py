"""What each inference engine offers, and the command line's word about what it does not."""

from __future__ import annotations

import json
from itertools import product

import pytest

from retrain.config import InferenceConfig
from retrain.config.engines import OFFERS, inference_problems, parse_urls
from retrain.types import ConfigError

URL = {"url": "http://127.0.0.1:1"}
VALUES = {
    "attention_kernel": ("flash", "triton", "tk", "cutlass"),
    "dtype": ("bf16", "fp8", "fp4"),
    "kv_cache_dtype": ("bf16", "fp8", "int8"),
}


def section(engine, **keys):
    return InferenceConfig(engine=engine, **({} if engine == "pytorch" else URL), **keys)


@pytest.mark.parametrize("engine", OFFERS)
def test_every_value_is_offered_or_refused_with_who_offers_it(engine):
    assert list(inference_problems(section(engine))) == []
    for key, value in ((key, value) for key, values in VALUES.items() for value in values):
        messages = list(inference_problems(section(engine, **{key: value})))
        if value in OFFERS[engine].get(key, ()):
            assert messages == []
            continue
        (message,) = messages
        assert message.startswith(f"inference.{key} = {json.dumps(value)}: ")
        for other in ("vllm", "sglang"):
            assert (f'"{other}"' in message.partition("; use")[2]) == (value in OFFERS[other].get(key, ())), message


def test_each_refusal_has_its_own_message():
    messages = list(
        inference_problems(section("pytorch", attention_kernel="flash", dtype="fp8", kv_cache_dtype="int8"))
    )
    assert [message.split(" = ")[0] for message in messages] == [f"inference.{key}" for key in VALUES]


@pytest.mark.parametrize(("dtype", "cache"), list(product(["auto", "bf16"], ["auto", "fp8"])))
def test_formats_need_the_merged_copy(dtype, cache):
    keys = {"dtype": dtype, "kv_cache_dtype": cache}
    assert list(inference_problems(section("pytorch", **keys))) == []
    messages = list(inference_problems(section("pytorch", merged_copy=False, **keys)))
    assert len(messages) == (dtype != "auto") + (cache != "auto")
    assert all("inference.merged_copy = true" in message for message in messages)


@pytest.mark.parametrize("engine", [name for name in OFFERS if name != "pytorch"])
def test_a_server_has_an_address(engine):
    (message,) = inference_problems(InferenceConfig(engine=engine))
    assert message.startswith(f'inference.engine = "{engine}": needs inference.url')


@pytest.mark.parametrize(
    "url", ["localhost", "ftp://a", "http://", "http://a:0", "http://a:x", "http://a:1,http://a:1/"]
)
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match=r"inference\.url"):
        parse_urls(url, "vllm")


def test_addresses():
    assert parse_urls(" http://a:1/v1/, https://b ", "openai") == ["http://a:1", "https://b"]
