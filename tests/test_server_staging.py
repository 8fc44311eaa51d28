"""A version is staged while another is sampled from, in two threads: each keeps its adapter and its own proof."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

import tiny_models as models
from retrain.types import RetrainError
from server_rig import FORMS, PROMPTS, STREAMS, dies_at, expected_tokens, generate, in_thread, revive, tokens, wait_for

pytest_plugins = "server_fixtures"


def numbers(fake):
    return sorted(int(name.rpartition("-v")[2]) for name in fake.state.adapters)


def adapter(fake, version):
    (found,) = (loaded for name, loaded in fake.state.adapters.items() if name.endswith(f"-v{version}"))
    return found


def truth(fake, version, prompts=PROMPTS, streams=STREAMS):
    return [sampled.tokens for sampled in expected_tokens(fake, adapter(fake, version), prompts, streams)]


def versions(groups):
    return {completion.policy_version for group in groups for completion in group}


def sampling(engine, fake):
    """Generate in a thread; returns when the first request has come."""
    before = len(fake.completions())
    result = in_thread(lambda: generate(engine))
    wait_for(lambda: len(fake.completions()) > before, "the first request")
    return result


@pytest.mark.parametrize("form", FORMS)
def test_a_version_is_staged_while_another_is_sampled_from(serve, connect, tmp_path, form):
    fake = serve(form, delay=0.3)
    engine, backend = connect(fake)
    engine.publish(4)
    result = sampling(engine, fake)
    models.stir(backend.policy.peft)
    engine.stage(5)
    got = result()
    assert tokens(got) == truth(fake, 4)
    assert versions(got) == {4}
    assert engine.policy_version == 4
    assert numbers(fake) == [4, 5]
    assert tokens(generate(engine)) == tokens(got)
    engine.use(5)
    assert numbers(fake) == [5]
    assert [folder.name for folder in (tmp_path / "adapters").glob("*/*")] == ["v5"]
    later = generate(engine)
    assert versions(later) == {5} == {engine.policy_version}
    assert tokens(later) == truth(fake, 5) != tokens(got)


def test_two_versions_ahead(serve, connect):
    fake = serve(delay=0.1)
    engine, backend = connect(fake)
    engine.publish(0)
    result = sampling(engine, fake)
    for version in (1, 2):
        models.stir(backend.policy.peft)
        engine.stage(version)
    assert versions(result()) == {0}
    seen = []
    for version in (1, 2):
        engine.use(version)
        assert numbers(fake) == list(range(version, 3))
        seen.append(generate(engine))
        assert tokens(seen[-1]) == truth(fake, version)
        assert versions(seen[-1]) == {version}
    assert tokens(seen[0]) != tokens(seen[1])


def test_one_version_is_taken_up_while_the_next_is_being_staged(serve, connect, tmp_path):
    fake = serve(delay=0.1)
    engine, backend = connect(fake)
    engine.publish(0)
    models.stir(backend.policy.peft)
    engine.stage(1)
    models.stir(backend.policy.peft)
    before = len(fake.log)

    def take_up():
        wait_for(lambda: len(fake.log) > before, "the staging")
        engine.use(1)
        return generate(engine)

    result = in_thread(take_up)
    engine.stage(2)
    got = result()
    assert versions(got) == {1}
    assert tokens(got) == truth(fake, 1)
    assert numbers(fake) == [1, 2]
    assert sorted(folder.name for folder in (tmp_path / "adapters").glob("*/*")) == ["v1", "v2"]
    engine.use(2)
    assert tokens(generate(engine)) == truth(fake, 2)


def test_staging_does_not_wait_for_a_server_that_sampling_found_gone(serve, connect):
    """It hangs: the request that is out for the staging is hung up on as well."""
    good, hanging = serve(), serve()
    engine, _ = connect(good, hanging, request_timeout_s=6.0)
    engine.publish(0)
    hanging.fault = lambda request: "stall" if request.path == "/v1/completions" else None
    result = sampling(engine, hanging)
    time.sleep(4)
    began = time.monotonic()
    engine.stage(1)
    assert time.monotonic() - began < 5.5
    assert engine.servers_alive == 1
    assert len(tokens(result())) == 12


def test_what_is_staged_or_in_use_is_not_staged_again(serve, connect):
    fake = serve()
    engine, backend = connect(fake)
    engine.publish(0)
    models.stir(backend.policy.peft)
    engine.stage(1)
    before = len(fake.log)
    engine.stage(0)
    engine.stage(1)
    assert len(fake.log) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_restart_restores_every_version_each_judged_by_its_own_scores(serve, connect, form):
    fake = serve(form, delay=0.05)
    engine, backend = connect(fake)
    engine.publish(0)
    models.stir(backend.policy.peft)
    engine.stage(1)
    wanted = {version: truth(fake, version) for version in (0, 1)}
    assert wanted[0] != wanted[1]
    dies_at(fake, 4, "/v1/completions" if form == "vllm" else "/generate")
    result = in_thread(lambda: generate(engine))
    wait_for(lambda: not fake.state.adapters, "the end of the server")
    revive(fake)
    assert tokens(result()) == wanted[0]
    assert numbers(fake) == [0, 1]
    engine.use(1)
    assert tokens(generate(engine)) == wanted[1]


def test_a_restarted_server_with_the_staged_adapter_under_the_name_in_use_is_caught(serve, connect):
    """Version 1's scores are right for version 1 only."""
    fake = serve()
    engine, backend = connect(fake)
    engine.publish(0)
    models.stir(backend.policy.peft, 0.5)
    engine.stage(1)
    fake.stop()
    (folder,) = engine._store.folder.parent.glob("*/v0")
    (folder / "adapter_model.safetensors").write_bytes(
        (folder.parent / "v1" / "adapter_model.safetensors").read_bytes()
    )
    fake.restart()
    with pytest.raises(RetrainError, match="is another server now: with policy version 0"):
        generate(engine)


def test_a_server_that_is_away_while_a_version_is_staged_does_not_miss_it(serve, connect):
    there, away = serve(delay=0.05), serve(delay=0.05)
    engine, backend = connect(there, away)
    engine.publish(0)
    wanted = truth(there, 0)
    dies_at(away, 2)
    got = generate(engine)
    models.stir(backend.policy.peft)
    engine.stage(1)
    assert numbers(there) == [0, 1]
    revive(away)
    there.delay = 2.0  # long enough for a look at the other one, on a busy machine too
    assert tokens(got) == wanted
    wait_for(lambda: tokens(generate(engine)) == wanted and engine.servers_alive == 2, "the server", 60)
    assert numbers(away) == [0, 1]
    there.delay = 0.0
    engine.use(1)
    assert numbers(there) == numbers(away) == [1]
    before = len(away.completions())
    later = generate(engine, PROMPTS * 2, np.concatenate([STREAMS, STREAMS + 1]))
    assert tokens(later) == truth(there, 1, PROMPTS * 2, np.concatenate([STREAMS, STREAMS + 1]))
    assert len(away.completions()) > before


def test_a_version_that_is_not_confirmed_is_not_staged(serve, connect):
    fake = serve(stale=True)
    engine, backend = connect(fake)
    engine.publish(0)
    models.stir(backend.policy.peft)
    with pytest.raises(RetrainError, match="did not take up policy version 1"):
        engine.stage(1)
    with pytest.raises(KeyError):
        engine.use(1)
    assert engine.policy_version == 0


def test_servers_come_and_go_while_versions_are_staged_and_sampled_from(serve, connect):
    """Two of three are killed and started at random: whatever is returned is what its version samples."""
    fakes = [serve(delay=0.01) for _ in range(3)]
    engine, backend = connect(*fakes, request_timeout_s=20.0)
    engine.publish(0)
    chance, going = random.Random(3), True

    def havoc():
        while going:
            fake = fakes[chance.randrange(2)]
            fake.stop()
            time.sleep(chance.uniform(0.0, 0.6))
            fake.restart()
            time.sleep(chance.uniform(0.0, 0.6))

    ended = in_thread(havoc)
    try:
        for version in range(4):
            result = in_thread(lambda: generate(engine))
            models.stir(backend.policy.peft)
            engine.stage(version + 1)
            got = result()
            assert tokens(got) == truth(fakes[2], version)
            assert versions(got) == {version}
            engine.use(version + 1)
    finally:
        going = False
        ended()
    engine.publish(9)
    wait_for(lambda: generate(engine) and engine.servers_alive == 3, "everybody")
    assert [numbers(fake) for fake in fakes] == [[9]] * 3
