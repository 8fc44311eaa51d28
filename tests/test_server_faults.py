"""Servers that fail: nothing is lost, nothing comes twice, an outage is waited out, and what lasts ends clearly.

The answers of the "sglang" form follow SGLang's documentation; it could not be installed to compare with.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

import tiny_models as models
from fake_server import INSTEAD, RAW, SAMPLED
from retrain.inference import ServerLost
from retrain.types import ConfigError, RetrainError
from server_rig import FORMS, PROMPTS, STREAMS, dies_at, generate, in_thread, revive, tokens, wait_for

pytest_plugins = "server_fixtures"

PASSING = [fault for fault in (*INSTEAD, *RAW, *SAMPLED) if fault not in ("400", "stall")]


def once(fault):
    """Every completion fails at its first attempt."""
    return lambda request: fault if request.path in ("/v1/completions", "/generate") and request.attempt == 0 else None


def always(fault, path=None):
    return lambda request: fault if path is None or request.path == path else None


def seeds(requests):
    return Counter(r.body.get("seed", r.body.get("sampling_params", {}).get("sampling_seed")) for r in requests)


@pytest.mark.parametrize("form", FORMS)
def test_what_fails_once_is_asked_again_and_used_once(serve, connect, form):
    fake = serve(form)
    engine, _ = connect(fake)
    engine.publish(0)
    prompts, streams = PROMPTS[:2], STREAMS[:2, :2]
    truth = generate(engine, prompts, streams)
    for fault in PASSING:
        before = len(fake.completions())
        fake.fault = once(fault)
        fake.forget_attempts()
        assert tokens(generate(engine, prompts, streams)) == tokens(truth), fault
        asked = seeds(fake.completions()[before:])
        assert list(asked.values()) == [2] * 4, fault


@pytest.mark.parametrize("form", FORMS)
def test_a_stall_is_given_up_and_asked_again(serve, connect, form):
    fake = serve(form)
    engine, _ = connect(fake, request_timeout_s=0.4)
    truth = generate(engine, PROMPTS[:1], STREAMS[:1])
    fake.fault = once("stall")
    fake.forget_attempts()
    assert tokens(generate(engine, PROMPTS[:1], STREAMS[:1])) == tokens(truth)


def test_what_lasts_ends_with_the_reason(serve, connect):
    fake = serve()
    engine, _ = connect(fake, retries=1)
    engine.publish(0)
    for fault in PASSING:
        fake.fault = always(fault, "/v1/completions")
        with pytest.raises(ServerLost, match=rf"inference.url: {fake.url} .*retries = 1.*resume the run") as caught:
            generate(engine, PROMPTS[:1], STREAMS[:1, :2])
        assert len(str(caught.value)) < 500
        assert fault not in RAW + SAMPLED or fault == "half" or "gives no usable answer" in str(caught.value), fault
    fake.fault = always(None)
    assert len(tokens(generate(engine))) == 12


def test_a_stall_that_lasts(serve, connect):
    fake = serve()
    engine, _ = connect(fake, retries=1, request_timeout_s=0.3)
    fake.fault = always("stall", "/v1/completions")
    with pytest.raises(ServerLost, match=r"no answer within 0\.3 s"):
        generate(engine)


def test_a_refusal_is_not_asked_again(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    engine.publish(0)
    fake.fault = always("400", "/v1/completions")
    before = len(fake.completions())
    with pytest.raises(RetrainError, match="refuses a request: HTTP 400: fault 400") as caught:
        generate(engine, PROMPTS[:1], STREAMS[:1])
    assert not isinstance(caught.value, ServerLost)
    assert len(fake.completions()) - before <= 4


def test_retry_after_is_waited_for(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    engine.publish(0)
    fake.fault = once("429 later")
    began = time.monotonic()
    generate(engine, PROMPTS[:1], STREAMS[:1])
    assert time.monotonic() - began >= 0.4


def test_faults_while_publishing_are_overcome(serve, connect):
    fake = serve()
    engine, backend = connect(fake)
    for version, fault in enumerate(("drop", "lose", "500", "garbage")):
        fake.fault = lambda request, fault=fault: fault if request.attempt == 0 and request.body is not None else None
        models.stir(backend.policy.peft)
        engine.publish(version)
        # One attempt to drop the version before is enough: what stays behind does no harm.
        assert str(version) in [name.rpartition("-v")[2] for name in fake.state.adapters]


# ---- outages --------------------------------------------------------------------------------------------------------


def later(seconds, act):
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_is_killed_and_comes_back_is_waited_for(serve, connect, form):
    fake = serve(form, delay=0.02)
    engine, _ = connect(fake)
    engine.publish(4)
    truth = generate(engine)
    began = len(fake.completions())
    dies_at(fake, 4, "/v1/completions" if form == "vllm" else "/generate")
    result = in_thread(lambda: generate(engine))
    wait_for(lambda: not fake.state.adapters, "the end of the server")
    time.sleep(0.6)
    revive(fake)
    got = result()
    assert tokens(got) == tokens(truth)
    assert all(c.policy_version == 4 for group in got for c in group)
    assert len(fake.completions()) - began > 12
    assert [name[-3:] for name in fake.state.adapters] == ["-v4"]
    waiting, *_, back = engine.said[1:]
    assert waiting.startswith(f"{fake.url} does not answer (") and "waiting for it" in waiting
    assert back == f"{fake.url} was restarted: the adapter is loaded again"
    assert len(engine.said) == 3


def test_a_server_that_stays_away_ends_the_wait(serve, connect):
    fake = serve()
    engine, _ = connect(fake, request_timeout_s=2.0)
    engine.publish(0)
    fake.stop()
    began = time.monotonic()
    with pytest.raises(ServerLost, match=rf"{fake.url} does not answer: .*request_timeout_s = 2"):
        generate(engine)
    assert 2 < time.monotonic() - began < 6
    assert len([line for line in engine.said if "waiting for it" in line]) == 1
    fake.restart()
    assert len(tokens(generate(engine))) == 12


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_was_restarted_between_two_steps(serve, connect, form):
    fake = serve(form)
    engine, backend = connect(fake)
    engine.publish(0)
    truth = generate(engine)
    fake.stop()
    fake.restart()
    assert tokens(generate(engine)) == tokens(truth)
    fake.stop()
    fake.restart()
    models.stir(backend.policy.peft)
    engine.publish(1)
    assert tokens(generate(engine)) != tokens(truth)
    assert [name[-3:] for name in fake.state.adapters] == ["-v1"]


def test_a_server_that_comes_back_as_another(serve, connect, model_folder):
    fake, other = serve(), serve(kind="llama")
    engine, _ = connect(fake)
    engine.publish(0)
    fake.stop()
    fake.model, fake.base = other.model, other.base
    fake.restart()
    with pytest.raises(RetrainError, match=f"{fake.url} was restarted and is another server now") as caught:
        generate(engine)
    assert not isinstance(caught.value, ServerLost)


def test_a_server_that_comes_back_without_the_adapter_route(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    engine.publish(0)
    fake.stop()
    fake.loads = False
    fake.restart()
    with pytest.raises(RetrainError, match=f"{fake.url} was restarted, and is not as it was: HTTP 404"):
        generate(engine)


def test_one_of_two_servers_goes_and_comes_back(serve, connect):
    fakes = [serve(delay=0.02) for _ in range(2)]
    engine, _ = connect(*fakes)
    engine.publish(0)
    truth = generate(engine)

    def bounce():
        fakes[0].stop()
        time.sleep(0.3)
        fakes[0].restart()

    timer = later(0.05, bounce)
    assert tokens(generate(engine)) == tokens(truth)
    timer.join()


def test_closing_does_not_wait_for_a_server_that_is_gone(serve, connect, tmp_path):
    fake = serve()
    engine, _ = connect(fake)
    engine.publish(0)
    fake.stop()
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 2
    assert not list((tmp_path / "adapters").iterdir())
    fake.restart()


# ---- the start ------------------------------------------------------------------------------------------------------


def test_nobody_at_the_url(connect):
    with pytest.raises(ConfigError, match=r"inference.url: http://127.0.0.1:9 does not answer.*retrain serve"):
        connect(engine="vllm", url="http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["", " , ", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a:99999"])
def test_no_address(connect, url):
    with pytest.raises(ConfigError, match=r"inference.url"):
        connect(engine="vllm", url=url)


def test_one_server_twice(connect):
    with pytest.raises(ConfigError, match="names a server twice"):
        connect(engine="vllm", url="http://a:1, http://a:1/v1/")


def test_urls_may_end_as_people_write_them(serve, connect):
    fake = serve()
    engine, _ = connect(engine="vllm", url=f" {fake.url}/v1/ ")
    assert [server.url for server in engine.servers] == [fake.url]


def test_another_kind_of_server(serve, connect):
    with pytest.raises(ConfigError, match=r"does not answer as a \"vllm\" server|refuses a request: HTTP 404"):
        connect(serve("sglang"), engine="vllm")


def test_a_server_without_log_probs(serve, connect):
    fake = serve(fault=always("no logprobs", "/v1/completions"))
    with pytest.raises(ConfigError, match=r"no logprobs.*--max-logprobs"):
        connect(fake, retries=0)


def test_another_tokenizer(serve, connect, tmp_path):
    models.save_tokenizer(tmp_path / "other")
    fake = serve(tokenizer=tmp_path / "other", name="other-model")
    fake.tokenizer.add_tokens(["train"])
    with pytest.raises(ConfigError, match=r"another tokenizer than model.model = .*it calls its model other-model"):
        connect(fake)


def test_an_older_server_that_does_not_show_its_tokenizer(serve, connect):
    engine, _ = connect(serve(tokenizes=False))
    engine.publish(0)


def test_a_context_without_room(serve, connect):
    with pytest.raises(ConfigError, match=r"its context of 16 tokens has no room .*training.max_tokens = 16"):
        connect(serve(context=16))


def test_a_prompt_that_does_not_fit_the_servers_context(serve, connect):
    engine, _ = connect(serve(context=40))
    with pytest.raises(RetrainError, match=r"a prompt of 30 tokens and training.max_tokens = 20 .* context of 40"):
        generate(engine, max_tokens=20)


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_above_the_servers_limit(serve, connect, form):
    engine, _ = connect(serve(form, max_rank=2))
    with pytest.raises(
        ConfigError, match=r"rank 4 is greater.*--max-lora-rank 4 or more, or lower model.lora_rank = 4"
    ):
        engine.publish(0)


@pytest.mark.parametrize("form, remedy", [("vllm", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"), ("sglang", "--enable-lora")])
def test_a_server_that_takes_no_adapters(serve, connect, form, remedy):
    engine, _ = connect(serve(form, loads=False))
    with pytest.raises(ConfigError, match=rf"does not load the adapter.*Not Found.*{remedy}"):
        engine.publish(0)


def test_a_folder_that_the_server_cannot_read(serve, connect):
    fake = serve()
    engine, backend = connect(fake)
    save = backend.save_adapter
    backend.save_adapter = lambda folder: (save(folder), (folder / "adapter_config.json").unlink())
    with pytest.raises(ConfigError, match=r"No adapter found for .*set backend.adapter_path to one that it can"):
        engine.publish(0)


def test_an_adapter_path_that_cannot_be_written(serve, connect, tmp_path):
    engine, _ = connect(serve())
    (tmp_path / "adapters").write_text("a file")
    with pytest.raises(ConfigError, match=r"backend.adapter_path = .*cannot be written to"):
        engine.publish(0)


def test_messages_of_the_start(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    assert engine.said == [f"{fake.url} serves {fake.base}, with a context of 256 tokens"]
