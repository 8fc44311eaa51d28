"""Environments: waves of turns, conversations as token ids, and real verifiers environments."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import tiny_models as models
from retrain.assets import resolve_model
from retrain.config.build import build
from retrain.environment import Start, Turn, open_environment
from retrain.environment.chat import Chat, split_tool_calls
from retrain.environment.waves import EpisodeFailed, Waves
from retrain.types import Completion, ConfigError, RetrainError

ENVIRONMENTS = Path(__file__).parent / "environments"


# ---- waves ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def waves():
    opened = Waves(timeout_s=1.0)
    yield opened
    opened.close()


def turn(number, limit=4):
    return Turn(np.array([number]), number, limit)


def echo(batches):
    def sample(turns):
        batches.append([t.stream for t in turns])
        return [("answer", t.stream) for t in turns]

    return sample


def talker(number, turns, pause=None):
    async def episode(take):
        heard = []
        for t in range(turns):
            heard.append(await take(turn(100 * number + t)))
            if pause is not None:
                await asyncio.sleep(pause)
        return heard

    return episode


def test_turns_that_wait_together_are_sampled_together_in_the_order_of_the_episodes(waves):
    batches = []
    # The first takes longest between its turns: it comes first all the same, and the others wait for it.
    results = waves.play([talker(1, 3, pause=0.05), talker(2, 1), talker(3, 2)], echo(batches))
    assert batches == [[100, 200, 300], [101, 301], [102]]
    assert results == [[("answer", 100 * n + t) for t in range(turns)] for n, turns in ((1, 3), (2, 1), (3, 2))]


def test_an_episode_that_raises_or_hangs_ends_alone(waves):
    async def raises(take):
        await take(turn(7))
        raise ValueError("no")

    async def hangs(take):
        await take(turn(8))
        await asyncio.sleep(3600)

    async def fails_at_once(take):
        raise EpisodeFailed("nothing to do")

    batches = []
    start = time.monotonic()
    results = waves.play([talker(1, 2), raises, hangs, fails_at_once], echo(batches))
    assert time.monotonic() - start < 10
    assert [str(result) for result in results[1:]] == ["ValueError: no", "no turn within 1 s", "nothing to do"]
    assert results[0] == [("answer", 100), ("answer", 101)]
    assert batches == [[100, 7, 8], [101]]


def test_the_models_time_does_not_count(waves):
    def slow(turns):
        time.sleep(1.5)
        return [0 for _ in turns]

    assert waves.play([talker(1, 1)], slow) == [[0]]


def test_one_that_blocks_the_thread_is_named_and_the_next_round_goes_on(waves):
    async def blocks(take):
        await take(turn(1))
        time.sleep(12)

    results = waves.play([talker(2, 1), talker(1, 2), blocks], echo([]))
    assert results[0] == [("answer", 200)]
    assert all(isinstance(result, EpisodeFailed) for result in results[1:])
    assert "test_environment.py" in str(results[2])
    assert "(blocks)" in str(results[2])
    assert waves.play([talker(1, 1)], echo([])) == [[("answer", 100)]]


def test_what_the_engine_raises_ends_the_round(waves):
    def lost(turns):
        raise RetrainError("the server is gone")

    with pytest.raises(RetrainError, match="the server is gone"):
        waves.play([talker(1, 2), talker(2, 1)], lost)
    assert waves.play([talker(1, 1)], echo([])) == [[("answer", 100)]]


def test_a_signal_interrupts_the_waiting(waves):
    async def waits(take):
        await asyncio.sleep(0.9)

    class Stopped(Exception):
        pass

    def handler(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        threading.Timer(0.2, signal.raise_signal, [signal.SIGUSR1]).start()
        with pytest.raises(Stopped):
            waves.play([waits], echo([]))
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- conversations as ids -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml(model_folder, tmp_path):
    """A byte-level tokenizer with a ChatML template: the end of a turn is followed by a line break."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("qwen3"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")


QUESTION = [{"role": "user", "content": "One?"}]
REPLY = [{"role": "user", "content": "Two \u2713"}]


@pytest.mark.parametrize("ended", [True, False])
def test_turns_join_to_what_the_template_writes(chatml, ended):
    """Where the sampled ids are the template's own, the whole is the template's whole, token for token."""
    tokenizer, end = chatml
    chat = Chat(tokenizer, [end])
    said = tokenizer("Yes.", add_special_tokens=False)["input_ids"]
    sampled = [*said, end] if ended else said
    whole = [*chat.opening(QUESTION), *sampled, *chat.following(sampled, REPLY)]
    messages = [*QUESTION, {"role": "assistant", "content": "Yes."}, *REPLY]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_that_rewrites_earlier_turns_changes_nothing_that_was_sampled(chatml):
    """Qwen3's drops the reasoning of turns that are not the last."""
    tokenizer, end = chatml
    tokenizer.chat_template = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    chat = Chat(tokenizer, [end])
    sampled = [*tokenizer("<think>hm</think>Yes.", add_special_tokens=False)["input_ids"], end]
    following = tokenizer.decode(chat.following(sampled, REPLY))
    assert following == "\n<|im_start|>user\nTwo \u2713<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_template_is_refused(model_folder):
    with pytest.raises(ConfigError, match="chat template"):
        Chat(AutoTokenizer.from_pretrained(model_folder("qwen3")), [1])


def test_a_role_that_the_template_does_not_know(tiny):
    with pytest.raises(RetrainError, match=r"cannot write the conversation: .*tool"):
        Chat(tiny, [0]).following([0], [{"role": "tool", "content": "3"}])


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("Hello.", "Hello.", []),
        (
            'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "\u2713"}}\n</tool_call>',
            "Let me see.",
            [("add", '{"a": 1, "b": "\\u2713"}')],
        ),
        (
            '<tool_call>{"name": "a"}</tool_call> and <tool_call>{"name": "b", "arguments": {}}</tool_call>',
            "and",
            [("a", "{}"), ("b", "{}")],
        ),
        ('<tool_call>{"name": "a"', None, []),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ('<tool_call>["a"]</tool_call>', '<tool_call>["a"]</tool_call>', []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "a", "arguments": 1}</tool_call>', None, []),
    ],
)
def test_tool_calls_in_the_hermes_format(text, said, calls):
    assert split_tool_calls(text) == (text if said is None else said, calls)


# ---- verifiers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def environments(monkeypatch):
    for folder in ENVIRONMENTS.iterdir():
        monkeypatch.syspath_prepend(folder)
    yield
    for name in ("retrain_sums", "retrain_tool_sums", "retrain_tool_calls"):
        sys.modules.pop(name, None)


@pytest.fixture
def opened(environments, tiny):
    made = []

    def open_(name, *, timeout_s=5.0, max_turns=-1, context=512, tokenizer=tiny, **args):
        config = build(
            {},
            overrides={
                "environment.provider": "verifiers",
                "environment.id": name,
                "environment.args": args,
                "environment.timeout_s": timeout_s,
                "environment.max_turns": max_turns,
            },
        )
        eos = [tokenizer.eos_token_id]
        made.append(open_environment(config, tokenizer, eos_ids=eos, context=context))
        return made[-1]

    yield open_
    for each in made:
        each.close()


class Script:
    """Samples what it is told to say, turn by turn, and keeps what it was asked."""

    def __init__(self, tokenizer, *lines):
        self.tokenizer, self.lines, self.asked = tokenizer, lines, []

    def __call__(self, turns):
        said = self.lines[min(len(self.asked), len(self.lines) - 1)]
        self.asked.append(turns)
        ids = [*self.tokenizer(said, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return [
            Completion(
                tokens_T=np.array(ids[: t.max_tokens]),
                logprobs_T=np.full(len(ids[: t.max_tokens]), -0.5, dtype=np.float32),
                finish_reason="stop" if len(ids) <= t.max_tokens else "length",
                policy_version=3,
                text=said if len(ids) <= t.max_tokens else self.tokenizer.decode(ids[: t.max_tokens]),
            )
            for t in turns
        ]


def starts(environment, groups=1, size=2):
    return [[Start(environment.train[p], stream=1000 * p + g) for g in range(size)] for p in range(groups)]


def test_a_single_turn(opened, tiny):
    environment = opened("retrain_sums", examples=5)
    assert len(environment.train) == 5
    assert len(environment.eval) == 20
    problem = environment.train[1]
    assert problem.example.reference == problem.row["answer"]
    assert tiny.decode(problem.prompt_T) == f"<|user|>{problem.row['question']}<|end|><|assistant|>"
    script = Script(tiny, rf"\boxed{{{environment.train[0].row['answer']}}}")
    groups = environment.play(starts(environment, groups=2), script, max_tokens=40)
    assert [[outcome.score.value for outcome in group] for group in groups] == [[1, 1], [0, 0]]
    (turns,) = script.asked
    assert len({t.stream for t in turns}) == 4
    completion = groups[0][0].completion
    assert completion.sampled_T is None
    assert completion.policy_version == 3
    assert len(completion) == len(completion.tokens_T)


def test_several_turns_are_one_completion_with_the_environments_tokens_marked(opened, tiny):
    environment = opened("retrain_tool_sums", examples=3)
    answer = environment.train[0].row["answer"]
    script = Script(tiny, "Let me add.", rf"\boxed{{{answer}}}")
    ((outcome, _),) = environment.play(starts(environment), script, max_tokens=60)
    assert outcome.score.value == 1
    completion = outcome.completion
    first, second = ([*tiny(s, add_special_tokens=False)["input_ids"], tiny.eos_token_id] for s in script.lines)
    between = f"<|user|>The machine says {answer} \u2713. Write it in a box.<|end|><|assistant|>"
    middle = tiny(between, add_special_tokens=False)["input_ids"]
    assert completion.tokens_T.tolist() == [*first, *middle, *second]
    assert completion.sampled_T.tolist() == [True] * len(first) + [False] * len(middle) + [True] * len(second)
    assert completion.logprobs_T.tolist() == [-0.5] * len(first) + [0.0] * len(middle) + [-0.5] * len(second)
    assert len(completion) == len(first) + len(second)
    # The second turn was sampled after exactly these ids.
    context = script.asked[1][0].context_T.tolist()
    assert context == [*environment.train[0].prompt_T.tolist(), *first, *middle]
    assert script.asked[1][0].max_tokens == 60 - len(first)


class Lengths(Script):
    """Says something of another length in each episode."""

    def __call__(self, turns):
        return [Script(self.tokenizer, self.lines[turn.stream % len(self.lines)])([turn])[0] for turn in turns]


def test_a_rubric_that_compares_sees_the_group(opened, tiny):
    environment = opened("retrain_sums", compares=True)
    group = [[Start(environment.train[0], stream) for stream in range(8)]]
    ((*outcomes,),) = environment.play(group, Lengths(tiny, "a", "abc", "abcdef"), max_tokens=40)
    texts = [outcome.completion.text for outcome in outcomes]
    assert len(set(texts)) > 1
    shortest = min(map(len, texts))
    assert [outcome.score.value for outcome in outcomes] == [float(len(text) == shortest) for text in texts]
    ((*outcomes,),) = environment.play(group, Script(tiny, ""), max_tokens=40)
    assert all("ValueError: nothing was said" in outcome.score.error for outcome in outcomes)


TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"


def test_tools_are_offered_called_and_answered(opened, chatml):
    """verifiers' own ToolEnv: definitions through the template, calls out of the text, results as turns of a tool."""
    tokenizer, _ = chatml
    tokenizer.chat_template = TOOLS + CHATML
    tokenizer.eos_token = "<|im_end|>"
    environment = opened("retrain_tool_calls", tokenizer=tokenizer, context=2000)
    prompt = tokenizer.decode(environment.train[0].prompt_T)
    assert prompt.startswith("<|im_start|>system\nTools: [{")
    assert '"name": "add"' in prompt
    call = '<tool_call>{"name": "add", "arguments": {"a": 10, "b": 5}}</tool_call>'
    wrong = '<tool_call>{"name": "multiply", "arguments": {}}</tool_call>'
    script = Script(tokenizer, call, wrong, "It is 15.")
    ((outcome, _),) = environment.play(starts(environment), script, max_tokens=400)
    assert outcome.score.value == 1
    text = tokenizer.decode(outcome.completion.tokens_T)
    assert text.startswith(call + "<|im_end|>\n<|im_start|>tool\n15<|im_end|>\n<|im_start|>assistant\n" + wrong)
    assert "<|im_start|>tool\n'multiply'<|im_end|>" in text
    assert text.endswith("It is 15.<|im_end|>")
    sampled = outcome.completion.tokens_T[outcome.completion.sampled_T]
    assert tokenizer.decode(sampled) == "".join(f"{line}<|im_end|>" for line in script.lines)


def test_an_episode_ends_where_no_room_is_left(opened, tiny):
    environment = opened("retrain_tool_sums", examples=1)
    script = Script(tiny, "This is a long way of saying nothing.")
    ((outcome, _),) = environment.play(starts(environment), script, max_tokens=8)
    assert len(outcome.completion) == 8
    assert outcome.completion.finish_reason == "length"
    assert outcome.score.value == 0
    assert len(script.asked) == 1
    short = opened("retrain_tool_sums", examples=1, context=len(environment.train[0].prompt_T) + 12)
    ((outcome, _),) = short.play(starts(short), Script(tiny, "Hm."), max_tokens=100)
    assert len(outcome.completion.tokens_T) <= 12


def test_max_turns_caps(opened, tiny):
    script = Script(tiny, "Hm.")
    environment = opened("retrain_tool_sums", turns=5, max_turns=3)
    environment.play(starts(environment), script, max_tokens=100)
    assert len(script.asked) == 3
    again = Script(tiny, "Hm.")
    uncapped = opened("retrain_tool_sums", turns=2, max_turns=3)
    uncapped.play(starts(uncapped), again, max_tokens=100)
    assert len(again.asked) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "KeyError: 'broken'"),
        ("hang", "no turn within 2 s"),
        ("reward", "reward reward: ValueError: the judge is ill"),
        ("rewrite", "the environment rewrote the conversation"),
    ],
)
def test_what_goes_wrong_in_one_episode_is_its_own(opened, tiny, fault, reason):
    environment = opened("retrain_tool_sums", fault=fault, every=2, examples=2, timeout_s=2.0)
    bad, good = environment.play(starts(environment, groups=2, size=1), Script(tiny, "Hm."), max_tokens=100)
    assert bad[0].score.value is None
    assert reason in bad[0].score.error
    assert len(bad[0].completion) >= 1
    assert good[0].score.value == 0
    assert good[0].score.error is None


def test_the_runs_own_signal_handlers_stay(opened):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    opened("retrain_sums")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("retrain_sums", {"split": "eval"}, "no training set, it is for evaluation only"),
        ("retrain_sums", {"wrong": 1}, r"cannot be loaded with environment.args = \{'wrong': 1\}: TypeError: .*wrong"),
        ("owner/no-such-environment", {}, r"no module no_such_environment is installed; .*prime env install owner/"),
    ],
)
def test_what_cannot_be_trained_in(opened, name, args, message):
    with pytest.raises(ConfigError, match=message):
        opened(name, **args)


# ---- masks ----------------------------------------------------------------------------------------------------------


def masked(batch, positions):
    """The batch with the environment's tokens at `positions` of every completion."""
    from dataclasses import replace

    rollouts = []
    for rollout in batch.rollouts:
        sampled = np.ones(len(rollout.tokens_T), dtype=bool)
        sampled[positions] = False
        rollouts.append(replace(rollout, sampled_T=sampled))
    return replace(batch, rollouts=tuple(rollouts))


def test_the_environments_tokens_are_context_and_nothing_else(open_local):
    """A step with marked tokens is the step on the same positions' log-probs alone, computed plainly; what stands in
    the log-prob, planning and credit of a marked token is not read."""
    from dataclasses import replace

    batch = masked(models.random_batch(3, [5, 9], [[8, 12], [10]]), slice(3, 6))
    poisoned = replace(
        batch,
        rollouts=tuple(
            replace(
                r,
                logprobs_T=np.where(r.sampled_T, r.logprobs_T, np.nan).astype(np.float32),
                planning_T=np.where(r.sampled_T, r.planning_T, ~r.planning_T),
            )
            for r in batch.rollouts
        ),
    )
    options = {"algorithm__transform_mode": "gtpo_sepa_hicra", "loss__entropy_coef": 0.01, "loss__kl_coef": 0.1}
    results, weights = [], []
    for given in (batch, poisoned):
        backend = open_local(training__lr=1e-2, **options)
        results.append(backend.step(given, 0).metrics)
        weights.append({n: p.detach().clone() for n, p in backend.policy.peft.named_parameters() if p.requires_grad})
    assert results[0] == results[1]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_the_loss_of_a_masked_batch_is_that_of_its_sampled_tokens(open_local):
    """Against plain transformers: loss and gradient of -A log p over the sampled positions of whole sequences."""
    import torch

    backend = open_local(training__temperature=1.0, loss__kind="importance_sampling", training__max_grad_norm=0)
    batch = masked(models.random_batch(4, [6], [[9, 7]]), slice(2, 4))
    policy = backend.policy.peft.eval()
    expected = torch.zeros(())
    count = 0
    for rollout, logits in zip(batch.rollouts, models.separate_logprobs(policy, batch, 1.0), strict=True):
        chosen = logits.gather(1, torch.from_numpy(rollout.tokens_T)[:, None])[:, 0]
        ratio = torch.exp(chosen - torch.from_numpy(rollout.logprobs_T))
        expected = expected - (rollout.advantage * ratio)[torch.from_numpy(rollout.sampled_T)].sum()
        count += int(rollout.sampled_T.sum())
    expected = expected / count
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    backend.learner.optimizer.step = lambda: None
    metrics = backend.step(batch, 0).metrics
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
