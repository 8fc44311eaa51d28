"""Server engines on the double of `fake_server`: what their tests ask of them."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import tiny_models as models
from retrain.types import Batch, Rollout

PROMPTS = [np.arange(20, 20 + n) for n in (1, 30, 7)]
STREAMS = (np.arange(12, dtype=np.uint64) * 0x9E3779B97F4A7C15).reshape(3, 4)
FORMS = ["vllm", "sglang"]
SEED_BITS = {"vllm": 63, "sglang": 31, "mlx": 31, "openai": 31}
TEMPERATURE = 0.8


def generate(engine, prompts=PROMPTS, streams=STREAMS, *, max_tokens=6, temperature=TEMPERATURE):
    return engine.generate(prompts, streams, max_tokens=max_tokens, temperature=temperature)


def tokens(groups):
    return [completion.tokens_T.tolist() for group in groups for completion in group]


def step(backend, groups, prompts=PROMPTS, *, number=0):
    """A training step that favours the first half of each group."""
    rollouts = tuple(
        Rollout(p, c.tokens_T, c.logprobs_T, 1.0 if g < len(group) / 2 else -1.0, np.zeros(len(c), dtype=bool))
        for p, group in enumerate(groups)
        for g, c in enumerate(group)
    )
    return backend.step(Batch(tuple(prompts), rollouts), number)


def expected_tokens(fake, adapter, prompts=PROMPTS, streams=STREAMS, *, max_tokens=6, temperature=TEMPERATURE):
    """What the double samples when it is asked directly, nothing of the project in between."""
    settings = {"max_tokens": max_tokens, "temperature": temperature, "stop": [models.EOS]}
    mask = 2 ** SEED_BITS[fake.form] - 1
    return [
        fake.sample(adapter, prompt.tolist(), seed=int(stream) & mask, **settings)
        for prompt, group in zip(prompts, streams, strict=True)
        for stream in group
    ]


def dies_at(fake, count, path="/v1/completions"):
    """Kill the server when its `count`-th request to this path comes, from now on; that one is not answered."""
    came = itertools.count(1)

    def fault(request):
        if request.path == path and next(came) == count:
            threading.Thread(target=fake.stop).start()
            return "stall"
        return None

    fake.fault = fault


def revive(fake):
    """Start a killed server again, without faults."""
    fake.fault = lambda request: None
    fake.restart()


def in_thread(work):
    """Run `work` in a thread; the function that is returned waits for its result."""
    pool = ThreadPoolExecutor(1)
    result = pool.submit(work)
    pool.shutdown(wait=False)
    return lambda: result.result(60)


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)
