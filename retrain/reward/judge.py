"""The `judge` reward: a model behind an OpenAI-compatible chat API says whether a response is right, or how good."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from retrain import http
from retrain.config.addresses import KEY_VARIABLES, address_problem
from retrain.http import BadAnswer, Broken, Busy, Call, Failure, Refused
from retrain.reward.rubric import messages, read_verdict, response_format
from retrain.types import ConfigError, RetrainError, Score

if TYPE_CHECKING:
    import httpx2

    from retrain.config.rewards import RewardKeys

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE, URL_VARIABLE = KEY_VARIABLES["judge"], "OPENAI_BASE_URL"

# What a server or a model may not know, and how a refusal names it: it is then left out of all further requests.
OPTIONAL = {"response_format": ("response_format", "json_schema"), "temperature": ("temperature",)}

Question = tuple[str, str, str]  # response, reference, prompt


@dataclass
class _Tally:
    """Of the requests since the figures were last asked for. Times are of answers that came."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    seconds: float = 0.0


class JudgeScorer:
    """Asks `[reward] judge_model` about each response, `judge_concurrency` at a time.

    A request that fails, or an answer that is no verdict, is tried again `judge_retries` times with growing delays;
    what still fails is an error with its reason, never a zero. The same response to the same problem is asked about
    once in a scorer's life. Raises ConfigError where the API needs a key and the environment has none, and where the
    environment names an address that a config could not.
    """

    def __init__(self, keys: RewardKeys) -> None:
        self._keys = keys
        self._url = (keys.judge_url or _url_of_environment() or OPENAI).rstrip("/")
        self._api_key = os.environ.get(KEY_VARIABLE, "")
        if self._url == OPENAI and not self._api_key:
            raise ConfigError(
                f'reward.type = "judge": {OPENAI} needs a key; set {KEY_VARIABLE} in the environment or in .env, or '
                "reward.judge_url to a server that needs none"
            )
        self._optional: dict[str, Any] = {"response_format": response_format(keys.judge_verdict), "temperature": 0}
        self._verdicts: dict[bytes, float] = {}
        self._tally = _Tally()

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        """One score a response. Without prompts the judge sees the reference and the response alone."""
        questions = list(zip(responses, references, prompts or [""] * len(responses), strict=True))
        new = [question for question in dict.fromkeys(questions) if _digest(question) not in self._verdicts]
        self._tally.cached += len(questions) - len(new)
        answers: dict[Question, Score] = (
            dict(zip(new, http.run(lambda: self._ask_all(new)), strict=True)) if new else {}
        )
        self._verdicts |= {_digest(q): score.value for q, score in answers.items() if score.value is not None}
        return [answers.get(q) or Score(self._verdicts[_digest(q)]) for q in questions]

    def check(self) -> None:
        """Ask once about a trifle. Raises ConfigError where the API refuses, RetrainError where it fails."""
        try:
            http.run(lambda: self._with_client(lambda client: self._ask(client, (r"\boxed{1}", "1", "What is 1?"))))
        except Refused as refusal:
            hint = f" (is {KEY_VARIABLE} right?)" if refusal.status in (401, 403) and self._api_key else ""
            hint = f" (set {KEY_VARIABLE})" if refusal.status in (401, 403) and not self._api_key else hint
            raise ConfigError(f"{self._place} refuses: {refusal}{hint}") from refusal
        except Failure as failure:
            raise RetrainError(f"{self._place} gives no verdict: {failure}. Look at reward.judge_url") from failure

    def figures(self) -> dict[str, float | None]:
        """judge_requests: with retries. judge_cached: verdicts that took none. judge_latency_s: mean of an answer's
        time. Tokens are as the server counts them, 0 where it does not say."""
        tally, self._tally = self._tally, _Tally()
        return {
            "judge_requests": tally.requests,
            "judge_cached": tally.cached,
            "judge_prompt_tokens": tally.prompt_tokens,
            "judge_completion_tokens": tally.completion_tokens,
            "judge_latency_s": tally.seconds / tally.answers if tally.answers else None,
        }

    def close(self) -> None:
        """Nothing is held: connections last for one call of `score`."""

    @property
    def _place(self) -> str:
        return f'reward.judge_model = "{self._keys.judge_model}": {self._url}'

    async def _ask_all(self, questions: Sequence[Question]) -> list[Score]:
        slots = asyncio.Semaphore(self._keys.judge_concurrency)

        async def one(client: httpx2.AsyncClient, question: Question) -> Score:
            async with slots:
                try:
                    return Score(await self._ask(client, question))
                except Failure as failure:
                    return Score(None, f"judge {self._keys.judge_model}: {failure}")

        return await self._with_client(lambda client: http.together(one(client, question) for question in questions))

    async def _with_client(self, work: Any) -> Any:
        async with http.open_client(self._api_key) as client:
            return await work(client)

    async def _ask(self, client: httpx2.AsyncClient, question: Question) -> float:
        """The reward. Raises the last attempt's Failure."""
        attempt = 0
        while True:
            body = self._body(question)
            try:
                return self._read(await self._send(client, body))
            except Refused as refusal:
                if not self._learn(body, refusal):
                    raise
            except (Broken, Busy, BadAnswer) as failure:
                if attempt == self._keys.judge_retries:
                    raise
                await asyncio.sleep(http.delay_before(attempt, failure, longest_s=self._keys.judge_timeout_s))
                attempt += 1

    def _body(self, question: Question) -> dict[str, Any]:
        keys = self._keys
        chat = messages(*question, rubric=keys.judge_rubric, verdict=keys.judge_verdict)
        return {"model": keys.judge_model, "messages": chat, **self._optional}

    def _learn(self, body: dict[str, Any], refusal: Refused) -> bool:
        """Leave out what the refusal names from now on. False where this request had nothing of it."""
        reason = str(refusal)
        named = [field for field, names in OPTIONAL.items() if field in body and any(name in reason for name in names)]
        for field in named:
            self._optional.pop(field, None)
        return bool(named)

    async def _send(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Any:
        self._tally.requests += 1
        began = time.monotonic()
        answer = await http.send(
            client, self._url, Call("/chat/completions", body), timeout_s=self._keys.judge_timeout_s
        )
        self._tally.answers += 1
        self._tally.seconds += time.monotonic() - began
        return answer

    def _read(self, answer: Any) -> float:
        try:
            content, usage = answer["choices"][0]["message"]["content"], answer.get("usage") or {}
            self._tally.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self._tally.completion_tokens += int(usage.get("completion_tokens") or 0)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise BadAnswer("the answer is not a chat completion") from None
        return read_verdict(content, self._keys.judge_verdict)


def _url_of_environment() -> str:
    url = os.environ.get(URL_VARIABLE, "")
    problem = address_problem(URL_VARIABLE, url, "judge", allow_http=False) if url else None
    if problem:
        raise ConfigError(f"{problem}. What the config says in reward.judge_url comes first")
    return url


def _digest(question: Question) -> bytes:
    """A key of fixed size: a run's completions would fill the memory."""
    return sha256("\0".join(f"{len(part)}:{part}" for part in question).encode(errors="surrogatepass")).digest()
