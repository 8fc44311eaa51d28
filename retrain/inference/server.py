"""`engine = "vllm"`, `"sglang"`, `"mlx"`, `"max"`, `"openai"`: completions from servers over HTTP.

Each policy version is written to a folder, loaded by every server, and proven to be served before anything is sampled
from it. Who does what: `dialects.py` knows the servers' words, `session.py` attempts and outages, `probe.py` the proof,
`start.py` the checks before the first step.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from retrain.config.engines import parse_urls
from retrain.http import open_client, run, together
from retrain.inference import Engine, Serving
from retrain.inference.adapters import AdapterStore
from retrain.inference.dialects import DIALECTS, Adapter, Ask, Sample, prompt_text
from retrain.inference.probe import (
    SAMPLED_STREAM,
    SAMPLED_TOKENS,
    TOLERANCE,
    Claim,
    Scores,
    base_complaint,
    gap,
    make_probe,
    number_format,
    sample_complaint,
    score_complaint,
)
from retrain.inference.session import NotLoaded, Recheck, Server, Session, Terms
from retrain.inference.start import look_at
from retrain.types import Completion, ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.backend import Backend
    from retrain.config import InferenceConfig

T = TypeVar("T")


class ServerEngine(Engine):
    """See `retrain.inference.Engine`. dropped: completions left out so far because their text was ambiguous."""

    def __init__(self, section: InferenceConfig, backend: Backend, serving: Serving) -> None:
        """Looks at every server. Raises ConfigError where one cannot be reached or does not fit the config."""
        self.section, self.backend, self.serving = section, backend, serving
        self.dialect = DIALECTS[section.engine]
        self.policy_version, self.overlaps, self.dropped = 0, True, 0
        self._terms = Terms(
            self.dialect,
            backend.tokenizer,
            backend.vocab_size,
            timeout_s=section.request_timeout_s,
            retries=section.retries,
            say=serving.say,
        )
        self._format = number_format(backend.describe()["dtype"], section)
        self._probe = make_probe(backend.tokenizer, backend.context)
        self._scores: dict[str, Scores] = {}
        self._store: AdapterStore | None = None
        self._adapter: Adapter | None = None
        self._staged: dict[int, Adapter] = {}
        # What the servers may still hold, the adapter that is served included: a publication can end half way.
        self._held: list[Adapter] = []
        urls = parse_urls(section.url, section.engine)
        greeting = self._ask(self._probe.prompt, None, stream=0, max_tokens=self._room, temperature=1.0)
        looks = self._run(None, lambda session: together(look_at(session, url, greeting, serving) for url in urls))
        self.servers = [server for server, _ in looks]
        for server, sample in looks:
            self._confirm_base(server, sample)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """Raises ServerLost where a server is gone for too long, RetrainError where one refuses."""
        self._check_room(prompts, max_tokens)
        groups = [
            [
                self._ask(prompt, self._adapter, stream=int(stream), max_tokens=max_tokens, temperature=temperature)
                for stream in streams
            ]
            for prompt, streams in zip(prompts, streams_PG, strict=True)
        ]
        samples = self._run(self._adapter, lambda session: spread(session, self.servers, groups), self._recheck())
        kept = [[sample for sample in group if sample is not None] for group in samples]
        self._count_dropped(sum(map(len, groups)), sum(map(len, kept)))
        return [tuple(map(self._completion, group)) for group in kept]

    def _ask(
        self, prompt: np.ndarray, adapter: Adapter | None, *, stream: int, max_tokens: int, temperature: float
    ) -> Ask:
        ids = prompt.tolist()
        return Ask(
            prompt=ids,
            text=prompt_text(ids, self.backend.tokenizer) if self.dialect.takes_text else "",
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=stream & (2**self.dialect.seed_bits - 1),
            stop_ids=list(self.backend.eos_ids),
        )

    def _completion(self, sample: Sample) -> Completion:
        tokens = np.array(sample.tokens, dtype=np.int64)
        ended = sample.stopped or sample.tokens[-1] in self.backend.eos_ids
        return Completion(
            tokens_T=tokens,
            logprobs_T=np.minimum(np.array(sample.logprobs, dtype=np.float32), 0),
            finish_reason="stop" if ended else "length",
            policy_version=self.policy_version,
            text=self.backend.tokenizer.decode(tokens, skip_special_tokens=True),
        )

    def _check_room(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
        longest = max(map(len, prompts))
        for server in self.servers:
            if server.context is not None and longest + max_tokens > server.context:
                raise RetrainError(
                    f"{server.url}: a prompt of {longest} tokens and training.max_tokens = {max_tokens} do not fit its "
                    f"context of {server.context}. Start it with a longer one, or lower training.max_prompt_tokens"
                )

    def _count_dropped(self, asked: int, kept: int) -> None:
        self.dropped += asked - kept
        if kept == 0:
            raise RetrainError(
                f'inference.engine = "{self.section.engine}": the server reports text only, and none of {asked} texts '
                'tokenises back to what was sampled. Use an engine that returns token ids ("vllm" or "sglang")'
            )
        if kept < asked:
            self.serving.say(f"{asked - kept} of {asked} completions dropped: their text does not tell their tokens")

    # ---- publishing -------------------------------------------------------------------------------------------------

    def stage(self, version: int) -> None:
        """Raises ConfigError (the first time) or RetrainError where a server does not serve it, ServerLost where one is
        gone; the version before is then still the one that is sampled from."""
        if self.dialect.load is None and not self.dialect.in_request:
            raise ConfigError(
                f'inference.engine = "{self.section.engine}": {self.dialect.obstacle}, so every step would be sampled '
                'from the base model. Use "vllm" or "sglang"'
            )
        if version in self._staged:
            return
        self._store = self._store or AdapterStore(self.serving.adapter_path)
        adapter = self._store.write(version, self._write)
        self._held.append(adapter)
        expected = self.backend.logprobs(self._probe.prompt, self._probe.continuation)
        readings = self._run(adapter, lambda session: together(self._take_up(session, s) for s in self.servers))
        for server, (scores, sample) in zip(self.servers, readings, strict=True):
            now = None if scores is None else Scores(self._continuation(scores), expected)
            self._confirm(server, version, now, sample)
        self._staged[version] = adapter

    def use(self, version: int) -> None:
        self._adapter, self.policy_version = self._staged[version], version
        self._staged = {staged: adapter for staged, adapter in self._staged.items() if staged >= version}
        self._withdraw([held for held in self._held if held not in self._staged.values()])

    def _write(self, folder: Path) -> None:
        self.backend.save_adapter(folder)
        if self.dialect.convert is not None:
            self.dialect.convert(folder)

    async def _take_up(self, session: Session, server: Server) -> tuple[list[float] | None, Sample | None]:
        """Load the session's adapter, and take both readings of it."""
        assert session.adapter is not None
        if self.dialect.load is not None:
            try:
                await session.load(server)
            except NotLoaded as error:
                raise self._fault(self._why_not_loaded(server, session.adapter, str(error))) from error
        ask = self._ask(
            self._probe.prompt,
            session.adapter,
            stream=SAMPLED_STREAM,
            max_tokens=self._room,
            temperature=self.serving.temperature,
        )
        return await session.score(server, self._probe.ids), await session.sample(server, ask)

    def _continuation(self, scores: list[float]) -> np.ndarray:
        return np.array(scores[len(self._probe.prompt) - 1 :], dtype=np.float32)

    @property
    def _room(self) -> int:
        return min(SAMPLED_TOKENS, self.backend.context - len(self._probe.prompt))

    def _claim(self, server: Server, version: int) -> Claim:
        return Claim(
            server.url,
            version,
            self._format,
            (self.serving.model, server.model),
            self.dialect.same_dtype,
            self.dialect.enable_temperature,
        )

    def _confirm_base(self, server: Server, sample: Sample | None) -> None:
        if sample is None:
            self.serving.say(f"{server.url}: its text does not tell its tokens, so its model cannot be compared")
            return
        expected = self.backend.logprobs(self._probe.prompt, np.array(sample.tokens), adapter=False)
        complaint = base_complaint(sample.logprobs, expected, self._claim(server, 0))
        if complaint is not None:
            raise ConfigError(complaint)

    def _confirm(self, server: Server, version: int, now: Scores | None, sample: Sample | None) -> None:
        claim = self._claim(server, version)
        before = self._scores.get(server.url)
        complaint = score_complaint(now, before, claim) if now is not None else None
        if complaint is None and sample is not None:
            tokens, temperature = np.array(sample.tokens), self.serving.temperature
            expected = self.backend.logprobs(self._probe.prompt, tokens, temperature=temperature)
            at_one = self.backend.logprobs(self._probe.prompt, tokens)
            complaint = sample_complaint(sample.logprobs, expected, at_one, temperature, claim)
        if complaint is not None:
            raise self._fault(complaint)
        if now is not None and (before is None or not np.array_equal(now.served, before.served)):
            self._scores[server.url] = now

    def _recheck(self) -> Recheck:
        def judge(server: Server, scores: list[float]) -> None:
            distance = gap(self._continuation(scores), self._scores[server.url].served)
            if distance > TOLERANCE[self._format]:
                raise RetrainError(
                    f"{server.url} was restarted and is another server now: with policy version {self.policy_version} "
                    f"its log-probabilities of a fixed text differ from before by up to {distance:.2g} nats. Start it "
                    "with the same model and options, and resume the run"
                )

        return Recheck(self._probe.ids, judge)

    def _fault(self, message: str) -> RetrainError:
        """Before anything was served it is the config, or how the server was started, that is wrong."""
        return ConfigError(message) if self._adapter is None else RetrainError(message)

    def _why_not_loaded(self, server: Server, adapter: Adapter, reason: str) -> str:
        message = f"{server.url} does not load the adapter in {adapter.folder}: {reason}. "
        if "rank" in reason.lower():
            rank = json.loads((adapter.folder / "adapter_config.json").read_bytes())["r"]
            return message + f"Start it with --max-lora-rank {rank} or more, or lower model.lora_rank = {rank}"
        return message + (
            f"Either {self.dialect.enable_adapters}; or, where it cannot read that folder, set backend.adapter_path to "
            "one that it can"
        )

    def close(self) -> None:
        """Take every adapter from the servers and from the disk. Servers that are gone are left alone."""
        self._adapter = None
        self._withdraw(self._held)
        if self._store is not None:
            self._store.close()

    def _withdraw(self, adapters: Sequence[Adapter]) -> None:
        pairs = [(server, adapter) for server in self.servers for adapter in adapters]
        if pairs:
            self._run(None, lambda session: together(session.unload(server, adapter) for server, adapter in pairs))
        for adapter in adapters:
            shutil.rmtree(adapter.folder, ignore_errors=True)
        self._held = [adapter for adapter in self._held if adapter not in adapters]

    def _run(
        self, adapter: Adapter | None, work: Callable[[Session], Awaitable[T]], recheck: Recheck | None = None
    ) -> T:
        async def main() -> T:
            async with open_client(os.environ.get(self.dialect.key_variable, "")) as client:
                return await work(Session(client, self._terms, adapter, recheck))

        return run(main)


async def spread(
    session: Session, servers: Sequence[Server], groups: Sequence[Sequence[Ask]]
) -> list[list[Sample | None]]:
    """Every completion, from the server that owes the fewest tokens when its turn comes.

    A group stays together, so that its prompt is computed once; it is split only where servers would stand idle.
    """
    pieces = math.ceil(len(servers) / len(groups))
    size = math.ceil(max(map(len, groups)) / pieces)
    turns = asyncio.Semaphore(math.ceil(len(servers) * session.terms.dialect.concurrent / size))

    async def piece(asks: Sequence[Ask]) -> list[Sample | None]:
        async with turns:
            server = min(servers, key=lambda server: server.outstanding)
            owed = sum(len(ask.prompt) + ask.max_tokens for ask in asks)
            server.outstanding += owed
            try:
                return await together(session.sample(server, ask) for ask in asks)
            finally:
                server.outstanding -= owed

    async def group(asks: Sequence[Ask]) -> list[Sample | None]:
        parts = await together(piece(asks[start : start + size]) for start in range(0, len(asks), size))
        return [sample for part in parts for sample in part]

    return await together(map(group, groups))
