"""Several servers: one that goes is dropped, its work is done by the others, and it comes back with what is served now.

The answers of the "sglang" form follow SGLang's documentation; it could not be installed to compare with.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as models
from retrain.http import run, together
from retrain.inference import ServerLost
from retrain.inference.dialects import DIALECTS, Adapter, Ask
from retrain.inference.fleet import Fleet, Version
from retrain.inference.replicas import Turns, room
from retrain.types import ConfigError, RetrainError
from server_rig import FORMS, PROMPTS, STREAMS, dies_at, generate, in_thread, revive, tokens, wait_for

pytest_plugins = "server_fixtures"

MANY, MANY_STREAMS = PROMPTS * 4, np.arange(48, dtype=np.uint64).reshape(12, 4)
PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}


def generate_many(engine):
    return generate(engine, MANY, MANY_STREAMS, max_tokens=3)


def loaded(fake):
    return sorted(name.rpartition("-v")[2] for name in fake.state.adapters)


def lines(engine, fake, text):
    return [line for line in engine.said if line.startswith(fake.url) and text in line]


def few_at_once(monkeypatch, form="vllm", concurrent=4):
    monkeypatch.setitem(DIALECTS, form, dataclasses.replace(DIALECTS[form], concurrent=concurrent))


# ---- dropped --------------------------------------------------------------------------------------------------------


def test_one_of_three_is_killed_while_it_samples(serve, connect):
    fakes = [serve(delay=0.02) for _ in range(3)]
    engine, backend = connect(*fakes)
    engine.publish(0)
    truth = generate_many(engine)
    served = [server.served for server in engine.servers]
    assert sum(served) == 48
    dies_at(fakes[1], 6)
    before = [len(fake.completions()) for fake in fakes]
    assert tokens(generate_many(engine)) == tokens(truth)
    # Each completion is used once, and what the killed one had answered is not asked again.
    assert sum(server.served for server in engine.servers) == 96
    asked = Counter(
        request.body["seed"] for fake, n in zip(fakes, before, strict=True) for request in fake.completions()[n:]
    )
    assert set(asked) == set(range(48))
    kept = engine.servers[1].served - served[1]
    assert sum(asked.values()) == 48 - kept + len(fakes[1].completions()) - before[1]
    (said,) = lines(engine, fakes[1], "is dropped after")
    assert f"after {engine.servers[1].served} completions (" in said and "2 of 3 servers left" in said
    assert engine.servers_alive == 2
    models.stir(backend.policy.peft)
    engine.publish(1)
    assert tokens(generate_many(engine)) != tokens(truth)
    assert [loaded(fake) for fake in fakes] == [["1"], [], ["1"]]


@pytest.mark.parametrize("fault", ["500", "garbage", "drop", "short"])
def test_one_that_gives_nothing_usable_is_dropped(serve, connect, fault):
    good, bad = serve(), serve()
    engine, _ = connect(good, bad, retries=1)
    engine.publish(0)
    truth = generate(engine)
    bad.fault = lambda request: fault
    assert tokens(generate(engine)) == tokens(truth)
    assert len(lines(engine, bad, "is dropped after")) == 1
    assert engine.servers_alive == 1


def test_one_that_hangs_is_dropped_and_what_it_was_asked_is_asked_elsewhere_at_once(serve, connect):
    good, hanging = serve(), serve()
    engine, _ = connect(good, hanging, request_timeout_s=3.0, retries=5)
    engine.publish(0)
    truth = generate(engine)
    hanging.fault = lambda request: "stall"
    began = time.monotonic()
    assert tokens(generate(engine)) == tokens(truth)
    # One time-out, not one for each of six attempts.
    assert 3 <= time.monotonic() - began < 9
    (said,) = lines(engine, hanging, "is dropped after")
    assert "no answer within 3 s" in said


def test_one_whose_engine_hangs_behind_a_healthy_front_stays_out_until_it_scores(serve, connect):
    good, hanging = serve(), serve()
    engine, _ = connect(good, hanging, request_timeout_s=3.0)
    engine.publish(0)
    truth = generate(engine)
    hanging.fault = lambda request: "stall" if request.path == "/v1/completions" else None
    assert tokens(generate(engine)) == tokens(truth)
    good.delay = 0.5
    assert tokens(generate(engine)) == tokens(truth)
    assert engine.servers_alive == 1
    assert not lines(engine, hanging, "is back")
    hanging.fault = lambda request: None
    wait_for(lambda: tokens(generate(engine)) == tokens(truth) and engine.servers_alive == 2, "the server that hung")


def test_a_refusal_by_one_of_two_is_an_error_that_names_it(serve, connect):
    good, bad = serve(), serve()
    engine, _ = connect(good, bad)
    engine.publish(0)
    bad.fault = lambda request: "400" if request.path == "/v1/completions" else None
    with pytest.raises(RetrainError, match=f"{bad.url} refuses a request: HTTP 400") as caught:
        generate(engine)
    assert not isinstance(caught.value, ServerLost)


def test_a_rank_that_one_of_two_refuses_is_an_error_that_names_it(serve, connect):
    good, bad = serve(), serve(max_rank=2)
    engine, _ = connect(good, bad)
    with pytest.raises(ConfigError, match=rf"{bad.url} does not load the adapter.*--max-lora-rank 4 or more"):
        engine.publish(0)


def test_at_the_start_all_have_to_be_there(serve, connect):
    there, away = serve(), serve()
    away.stop()
    with pytest.raises(ConfigError, match=f"inference.url: {away.url} does not answer"):
        connect(there, away)
    away.restart()


def test_the_last_one_is_waited_for_and_then_the_run_ends(serve, connect):
    fakes = [serve() for _ in range(3)]
    engine, _ = connect(*fakes, request_timeout_s=1.5)
    engine.publish(0)
    for fake in fakes:
        fake.stop()
    began = time.monotonic()
    with pytest.raises(ServerLost, match=r"does not answer: .*request_timeout_s = 1.5.*resume the run"):
        generate(engine)
    assert 1.5 < time.monotonic() - began < 8
    assert engine.servers_alive == 1
    assert len([line for line in engine.said if "is dropped after" in line]) == 2
    assert len([line for line in engine.said if "waiting for it" in line]) == 1
    for fake in fakes:
        fake.restart()
    assert len(tokens(generate(engine))) == 12


def test_while_the_last_one_is_waited_for_another_may_come_back(serve, connect):
    fakes = [serve() for _ in range(2)]
    engine, _ = connect(*fakes, request_timeout_s=20.0)
    engine.publish(0)
    truth = generate(engine)
    for fake in fakes:
        fake.stop()
    result = in_thread(lambda: generate(engine))
    wait_for(lambda: engine.servers_alive == 1, "the first drop")
    back = next(fake for fake, server in zip(fakes, engine.servers, strict=True) if not server.alive)
    back.restart()
    assert tokens(result()) == tokens(truth)
    assert lines(engine, back, "is back and serves policy version 0")
    next(fake for fake in fakes if fake is not back).restart()


def test_one_that_dies_while_a_version_is_staged(serve, connect):
    fakes = [serve() for _ in range(3)]
    engine, backend = connect(*fakes)
    engine.publish(0)
    models.stir(backend.policy.peft)
    dies_at(fakes[0], 1, "/v1/load_lora_adapter")
    engine.publish(1)
    assert len(lines(engine, fakes[0], "is dropped after")) == 1
    truth = generate(engine)
    revive(fakes[0])
    models.stir(backend.policy.peft)
    engine.publish(2)
    assert lines(engine, fakes[0], "is back and serves policy version 2: 3 of 3 servers take part")
    assert [loaded(fake) for fake in fakes] == [["2"]] * 3
    assert tokens(generate(engine)) != tokens(truth)


def test_one_that_dies_between_its_readings(serve, connect):
    """After it has loaded the adapter, when it is asked to score."""
    fakes = [serve() for _ in range(2)]
    engine, _ = connect(*fakes)
    dies_at(fakes[0], 1)
    engine.publish(0)
    assert engine.servers_alive == 1
    assert len(tokens(generate(engine))) == 12
    revive(fakes[0])


# ---- back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_comes_back_with_the_adapter_of_now_proven_and_gets_work(serve, connect, form):
    fakes = [serve(form) for _ in range(3)]
    engine, backend = connect(*fakes)
    engine.publish(0)
    dies_at(fakes[1], 2, PATHS[form])
    generate_many(engine)
    models.stir(backend.policy.peft)
    engine.publish(1)
    before = len(fakes[1].log)
    revive(fakes[1])
    fakes[0].delay = fakes[2].delay = 0.8
    truth = generate_many(engine)
    assert engine.servers_alive == 3
    fakes[0].delay = fakes[2].delay = 0.0
    asked = [request.path for request in fakes[1].log[before:]]
    assert "/tokenize" in asked and any(path.endswith("/load_lora_adapter") for path in asked)
    scored = [r for r in fakes[1].log[before:] if r.path == PATHS[form] and r not in fakes[1].completions()]
    assert scored or form == "sglang"  # whose scoring is a request like another
    assert loaded(fakes[1]) == ["1"]
    (said,) = lines(engine, fakes[1], "is back")
    assert said == f"{fakes[1].url} is back and serves policy version 1: 3 of 3 servers take part"
    served = engine.servers[1].served
    assert tokens(generate_many(engine)) == tokens(truth)
    assert engine.servers[1].served >= served + 8


def test_one_that_comes_back_takes_its_share_of_what_is_left(serve, connect, monkeypatch):
    few_at_once(monkeypatch)
    fakes = [serve(delay=0.1) for _ in range(2)]
    engine, _ = connect(*fakes)
    engine.publish(0)
    truth = generate_many(engine)
    dies_at(fakes[0], 5)
    result = in_thread(lambda: generate_many(engine))
    wait_for(lambda: engine.servers_alive == 1, "the drop")
    served = engine.servers[0].served
    revive(fakes[0])
    assert tokens(result()) == tokens(truth)
    assert engine.servers[0].served > served


def test_one_that_was_only_out_of_reach_gives_up_what_was_withdrawn_meanwhile(serve, connect):
    """Its process went on, with the adapters it had."""
    there, away = serve(), serve()
    engine, backend = connect(there, away, retries=1)
    engine.publish(0)
    away.fault = lambda request: "503"
    generate(engine)
    models.stir(backend.policy.peft)
    engine.publish(1)
    assert loaded(away) == ["0"]
    away.fault = lambda request: None
    models.stir(backend.policy.peft)
    engine.publish(2)
    assert engine.servers_alive == 2
    assert loaded(away) == loaded(there) == ["2"]


def another_model(fake, other):
    fake.model, fake.base = other.model, other.base


def another_tokenizer(fake, other):
    fake.tokenizer.add_tokens(["train"])


def another_context(fake, other):
    fake.context = 16


def no_adapters(fake, other):
    fake.loads = False


@pytest.mark.parametrize(
    "change, message",
    [
        (another_model, "was restarted and is another server now: with policy version 0"),
        (another_tokenizer, "came back, and is not as it was: .*has another tokenizer"),
        (another_context, "came back, and is not as it was: .*context of 16 tokens"),
        (no_adapters, "came back, and is not as it was: HTTP 404"),
    ],
)
def test_one_that_comes_back_as_another_is_refused_by_name(serve, connect, change, message):
    good, bad, other = serve(), serve(), serve(kind="llama")
    engine, _ = connect(good, bad)
    engine.publish(0)
    dies_at(bad, 1)
    generate(engine)
    change(bad, other)
    revive(bad)
    good.delay = 5.0
    with pytest.raises(RetrainError, match=f"{bad.url} {message}") as caught:
        generate(engine)
    assert not isinstance(caught.value, ServerLost | ConfigError)


def test_one_that_comes_and_goes_again_and_again(serve, connect, monkeypatch):
    """It passes every look and fails every completion: its turns are done by the other, and the looks become rare."""
    few_at_once(monkeypatch)
    good, bad = serve(delay=0.1), serve()
    engine, _ = connect(good, bad, retries=0)
    engine.publish(0)
    truth = generate_many(engine)
    bad.fault = lambda request: "500" if request in bad.completions() else None
    assert tokens(generate_many(engine)) == tokens(truth)
    drops = lines(engine, bad, "is dropped after")
    assert len(drops) >= 2
    assert len(drops) - 1 <= len(lines(engine, bad, "is back")) <= len(drops)
    first, second, *_ = [index for index, line in enumerate(engine.said) if line in drops]
    assert first < second
    assert engine.servers[1].look_at - time.monotonic() < 60
    bad.fault = lambda request: None
    wait_for(lambda: generate_many(engine) and engine.servers_alive == 2, "the end of it", 30)


def test_a_request_that_no_server_can_answer_ends_the_run(serve, connect):
    """Not a loop of drops and returns."""
    fakes = [serve() for _ in range(2)]
    engine, _ = connect(*fakes, retries=0)
    engine.publish(0)
    for fake in fakes:
        fake.fault = lambda request: "500" if request.body and request.body.get("seed") == 7 else None
    with pytest.raises(ServerLost, match="HTTP 500"):
        generate_many(engine)


@pytest.mark.parametrize("form", ["vllm", "mlx", "openai"])
def test_the_base_model_is_proven_too(serve, connect, form):
    """As `retrain eval` asks for it: nothing is ever published."""
    there, away = serve(form), serve(form)
    engine, _ = connect(there, away)
    truth = generate(engine)
    dies_at(away, 1)
    assert tokens(generate(engine)) == tokens(truth)
    assert engine.servers_alive == 1
    revive(away)
    there.delay = 0.3
    wait_for(lambda: tokens(generate(engine)) == tokens(truth) and engine.servers_alive == 2, "the server")
    assert lines(engine, away, "is back and serves the base model")


@pytest.mark.parametrize("form", ["vllm", "mlx"])
def test_another_base_model_takes_no_part(serve, connect, form):
    """It is refused; or, where only what it samples can be looked at and is another text, it stays away."""
    there, away, other = serve(form), serve(form), serve(form, kind="llama")
    engine, _ = connect(there, away)
    dies_at(away, 1)
    generate(engine)
    another_model(away, other)
    revive(away)
    there.delay = 0.5
    try:
        wait_for(lambda: generate(engine) and lines(engine, away, "cannot take part yet"), "the refusal")
        assert form == "mlx" and engine.servers_alive == 1
    except RetrainError as error:
        assert f"{away.url} was restarted and is another server now" in str(error)


# ---- balance --------------------------------------------------------------------------------------------------------


def test_a_slow_server_gets_less_where_work_queues(serve, connect, monkeypatch):
    few_at_once(monkeypatch)
    fast, slow = serve(delay=0.1), serve(delay=0.5)
    engine, _ = connect(fast, slow)
    prompts, streams = PROMPTS * 12, np.arange(144, dtype=np.uint64).reshape(36, 4)
    began = time.monotonic()
    generate(engine, prompts, streams, max_tokens=1)
    took = time.monotonic() - began
    served = [server.served for server in engine.servers]
    assert sum(served) == 144
    assert 2 <= served[0] / served[1] <= 8, served
    # 4 at a time: 40 and 8 a second, hence 3 s; divided equally, the slow one alone would take 9.
    assert took < 8.5, took


def test_a_slow_server_gets_less_once_its_pace_is_known():
    """All is asked at once: the first call is divided equally, the next by what was measured."""
    fleet = Fleet("ab", lambda line: None)
    seconds = dict(zip(fleet.servers, (0.002, 0.01), strict=True))  # for each completion, one after the other
    asks = [Ask([1] * 10, "", None, 6, 1.0, seed, []) for seed in range(4)]

    async def call():
        turns, busy = Turns(fleet, 256), {server: asyncio.Lock() for server in fleet.servers}
        given = Counter()

        async def piece():
            async with turns.next(asks) as server:
                given[server.url] += 1
                async with busy[server]:
                    await asyncio.sleep(len(asks) * seconds[server])
                turns.delivered[server] += sum(map(room, asks))

        await together(piece() for _ in range(24))
        assert not any(turns.outstanding.values())
        turns.measure()
        return given["a"], given["b"]

    shares = [run(call) for _ in range(4)]
    assert shares[0] == (12, 12)
    # The paces are 5 to 1; half of what is known is kept from one call to the next.
    assert shares[-1][0] >= 3 * shares[-1][1], shares


def test_groups_larger_than_a_servers_limit_keep_every_server_busy(serve, connect, monkeypatch):
    few_at_once(monkeypatch, concurrent=1)
    fakes = [serve(delay=0.05) for _ in range(2)]
    engine, _ = connect(*fakes)
    generate(engine, PROMPTS[:2], STREAMS[:2])
    assert [server.served for server in engine.servers] == [4, 4]
    assert [fake.most_at_once for fake in fakes] == [1, 1]


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_at_the_end_it_is_said_who_served_how_much(serve, connect):
    fakes = [serve() for _ in range(2)]
    engine, _ = connect(*fakes)
    engine.publish(0)
    generate(engine)
    engine.close()
    a, b = engine.servers
    assert a.served + b.served == 12
    assert engine.said[-1] == f"completions served: {a.served} by {a.url}, {b.served} by {b.url}"


# ---- who takes part, and with what ----------------------------------------------------------------------------------

ACTIONS = st.lists(st.tuples(st.sampled_from(["drop", "give", "admit", "expect", "forget"]), st.integers(0, 2)))


@given(ACTIONS)
def test_somebody_always_takes_part_and_has_every_version_that_it_was_told_of(actions):
    fleet = Fleet("abc", lambda line: None)
    fleet.complete = True
    number = 0
    for action, index in actions:
        server = fleet.servers[index]
        if action == "drop":
            assert fleet.drop(server, server.life, "why") == (not fleet.is_last(server))
        elif action == "give":
            server.has |= {version.name for version in fleet.versions.values()} or {""}
        elif action == "admit":
            missing = fleet.admit(server)
            assert server.alive or missing
        elif action == "expect":
            number += 1
            version = Version(number, Adapter(f"v{number}", models.__file__, number), None)
            told = fleet.expect(version)
            assert told == [each for each in fleet.servers if each.alive]
            for each in told:
                each.has.add(version.name)
        else:
            fleet.forget(list(fleet.versions)[:index])
        assert fleet.alive
        names = {version.name for version in fleet.versions.values()}
        assert all(names <= each.has for each in fleet.alive)


def test_a_failure_of_an_earlier_life_drops_nobody():
    fleet = Fleet("ab", lambda line: None)
    fleet.complete = True
    server = fleet.servers[0]
    fleet.restored(server)
    assert fleet.drop(server, 0, "late news")
    assert server.alive
    assert fleet.drop(server, 1, "news")
    assert not server.alive


def test_two_threads_say_one_line_after_the_other(serve, connect):
    from retrain.inference.server import one_at_a_time

    inside, most = 0, 0

    def say(line):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1

    said = one_at_a_time(say)
    threads = [threading.Thread(target=lambda: [said("x") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
