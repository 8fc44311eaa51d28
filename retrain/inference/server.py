"""`engine = "vllm"`, `"sglang"`, `"mlx"`, `"max"`, `"openai"`: completions from servers over HTTP.

Each policy version is written to a folder, loaded by every server, and proven to be served before anything is sampled
from it. Who does what: `dialects.py` knows the servers' words, `session.py` attempts and outages, `fleet.py` who is
alive and has to serve what, `replicas.py` the balance and the return of servers, `probe.py` the proof, `start.py` the
checks before the first step.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from retrain.config.engines import parse_urls
from retrain.http import BadAnswer, open_client, run, together
from retrain.inference import Engine, Serving
from retrain.inference.adapters import AdapterStore
from retrain.inference.dialects import DIALECTS, Adapter, Ask, Sample, Unreproducible, prompt_text
from retrain.inference.fleet import Fleet, Reference, Server, Version
from retrain.inference.probe import (
    SAMPLED_STREAM,
    SAMPLED_TOKENS,
    TOLERANCE,
    Claim,
    Scores,
    base_complaint,
    make_probe,
    number_format,
    return_complaint,
    sample_complaint,
    score_complaint,
)
from retrain.inference.replicas import readmit, spread, watched
from retrain.inference.session import Gone, NotLoaded, Session, Terms, read_scores
from retrain.inference.start import look_at
from retrain.types import Completion, ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.backend import Backend
    from retrain.config import InferenceConfig

T = TypeVar("T")

# Log-probs of the fixed text, and a sampled completion: each None where the server cannot tell.
Reading = tuple[list[float] | None, Sample | None]


class ServerEngine(Engine):
    """See `retrain.inference.Engine`. dropped: completions left out so far because their text was ambiguous."""

    def __init__(self, section: InferenceConfig, backend: Backend, serving: Serving) -> None:
        """Looks at every server. Raises ConfigError where one cannot be reached or does not fit the config."""
        say = one_at_a_time(serving.say)
        self.section, self.backend, self.serving = section, backend, replace(serving, say=say)
        self.dialect = DIALECTS[section.engine]
        self.overlaps, self.dropped = True, 0
        self._terms = Terms(
            self.dialect,
            backend.tokenizer,
            backend.vocab_size,
            timeout_s=section.request_timeout_s,
            retries=section.retries,
            say=say,
            prove=self._prove,
        )
        self._format = number_format(backend.describe()["dtype"], section)
        self._probe = make_probe(backend.tokenizer, backend.context)
        # Of each server by its url: the reading at which its numbers last changed.
        self._scores: dict[str, Scores] = {}
        self._store: AdapterStore | None = None
        # Of the calls under way, in whichever thread: `close` gives them up.
        self._running: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = set()
        # What the servers may still hold, by version: a publication can end half way.
        self._held: dict[int, Adapter] = {}
        self.fleet = Fleet(parse_urls(section.url, section.engine), say)
        self._look_at_all()
        self._using, self.policy_version = self.fleet.base, 0

    def _look_at_all(self) -> None:
        greeting, servers = self._probe_ask(None), self.fleet.servers
        samples = self._run(lambda session: together(look_at(session, s, greeting, self.serving) for s in servers))
        told = [self._confirm_base(server, sample) for server, sample in zip(servers, samples, strict=True)]
        scored = self._scored_reference(adapter=False)
        self.fleet.base = Version(0, None, scored or next(filter(None, told), None))
        self.fleet.complete = True

    @property
    def servers(self) -> list[Server]:
        return self.fleet.servers

    @property
    def servers_alive(self) -> int | None:
        return len(self.fleet.alive)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """Raises ServerLost where the last server is gone for too long, RetrainError where one refuses."""
        self._check_room(prompts, max_tokens)
        # Another thread may stage versions meanwhile: all of this call is of one.
        version = self._using
        groups = [
            [
                self._ask(prompt, version.adapter, stream=int(stream), max_tokens=max_tokens, temperature=temperature)
                for stream in streams
            ]
            for prompt, streams in zip(prompts, streams_PG, strict=True)
        ]
        samples = self._run(
            lambda session: watched(session, self.fleet, self.serving, spread(session, self.fleet, groups))
        )
        kept = [[sample for sample in group if sample is not None] for group in samples]
        self._count_dropped(sum(map(len, groups)), sum(map(len, kept)))
        return [tuple(self._completion(sample, version.number) for sample in group) for group in kept]

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

    def _completion(self, sample: Sample, version: int) -> Completion:
        tokens = np.array(sample.tokens, dtype=np.int64)
        ended = sample.stopped or sample.tokens[-1] in self.backend.eos_ids
        return Completion(
            tokens_T=tokens,
            logprobs_T=np.minimum(np.array(sample.logprobs, dtype=np.float32), 0),
            finish_reason="stop" if ended else "length",
            policy_version=version,
            text=self.backend.tokenizer.decode(tokens, skip_special_tokens=True),
        )

    def _check_room(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
        longest = max(map(len, prompts))
        for server in self.fleet.alive:
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
        if version in self.fleet.versions:
            return
        self._store = self._store or AdapterStore(self.serving.adapter_path)
        adapter = self._held[version] = self._store.write(version, self._write)
        staged = Version(version, adapter, self._scored_reference())
        servers = self.fleet.expect(staged)
        try:
            sampled = self._take_up(staged, servers)
        except BaseException:
            self.fleet.forget([version])
            raise
        if staged.reference is None:
            self.fleet.expect(replace(staged, reference=sampled))

    def use(self, version: int) -> None:
        """Only while nothing is sampled."""
        self._using, self.policy_version = self.fleet.versions[version], version
        self._withdraw([held for held in tuple(self._held) if held < version])

    def _write(self, folder: Path) -> None:
        self.backend.save_adapter(folder)
        if self.dialect.convert is not None:
            self.dialect.convert(folder)

    def _take_up(self, staged: Version, servers: Sequence[Server]) -> Reference | None:
        """Have these servers serve it, and confirm each; look again at those that were dropped. What was sampled."""

        async def work(session: Session) -> list[Reading | None]:
            dropped = [server for server in self.servers if server not in servers]
            looks = (readmit(session, self.fleet, self.serving, server) for server in dropped)
            readings = (self._read(session, server, staged) for server in servers)
            return (await together([*readings, *looks]))[: len(servers)]

        sampled = None
        readings = self._run(lambda session: watched(session, self.fleet, self.serving, work(session)))
        for server, reading in zip(servers, readings, strict=True):
            if reading is not None:
                scores, sample = reading
                expected = staged.reference.expected if staged.reference else None
                now = None if scores is None or expected is None else Scores(self._continuation(scores), expected)
                sampled = self._confirm(server, staged.number, now, sample) or sampled
        return sampled

    async def _read(self, session: Session, server: Server, staged: Version) -> Reading | None:
        """Load the version on a server, and take both readings of it; None where the server is dropped over it."""
        try:
            if self.dialect.load is not None:
                await session.load(server, staged)
            scores = await session.score(server, staged.adapter, self._probe.ids)
            return scores, await session.sample(server, self._probe_ask(staged.adapter))
        except Gone:
            return None
        except NotLoaded as error:
            assert staged.adapter is not None
            raise self._fault(self._why_not_loaded(server, staged.adapter, str(error))) from error

    def _probe_ask(self, adapter: Adapter | None) -> Ask:
        """What is sampled as proof: of a version as in the run, of the base model at temperature 1."""
        stream, temperature = (SAMPLED_STREAM, self.serving.temperature) if adapter else (0, 1.0)
        room = min(SAMPLED_TOKENS, self.backend.context - len(self._probe.prompt))
        return self._ask(self._probe.prompt, adapter, stream=stream, max_tokens=room, temperature=temperature)

    def _scored_reference(self, *, adapter: bool = True) -> Reference | None:
        if self.dialect.scoring is None:
            return None
        tokens = self._probe.continuation
        return Reference(tokens.tolist(), self.backend.logprobs(self._probe.prompt, tokens, adapter=adapter))

    def _continuation(self, scores: list[float]) -> np.ndarray:
        return np.array(scores[len(self._probe.prompt) - 1 :], dtype=np.float32)

    def _claim(self, server: Server, version: int) -> Claim:
        return Claim(
            server.url,
            version,
            self._format,
            (self.serving.model, server.model),
            self.dialect.same_dtype,
            self.dialect.enable_temperature,
        )

    def _confirm_base(self, server: Server, sample: Sample | None) -> Reference | None:
        if sample is None:
            self.serving.say(f"{server.url}: its text does not tell its tokens, so its model cannot be compared")
            return None
        expected = self.backend.logprobs(self._probe.prompt, np.array(sample.tokens), adapter=False)
        complaint = base_complaint(sample.logprobs, expected, self._claim(server, 0))
        if complaint is not None:
            raise ConfigError(complaint)
        return Reference(sample.tokens, expected)

    def _confirm(self, server: Server, version: int, now: Scores | None, sample: Sample | None) -> Reference | None:
        """Raises RetrainError where either reading is not as it has to be."""
        claim = self._claim(server, version)
        before, sampled = self._scores.get(server.url), None
        complaint = score_complaint(now, before, claim) if now is not None else None
        if complaint is None and sample is not None:
            tokens, temperature = np.array(sample.tokens), self.serving.temperature
            expected = self.backend.logprobs(self._probe.prompt, tokens, temperature=temperature)
            sampled = Reference(sample.tokens, expected)
            at_one = self.backend.logprobs(self._probe.prompt, tokens)
            complaint = sample_complaint(sample.logprobs, expected, at_one, temperature, claim)
        if complaint is not None:
            raise self._fault(complaint)
        if now is not None and (before is None or not np.array_equal(now.served, before.served)):
            self._scores[server.url] = now
        return sampled

    async def _prove(self, session: Session, server: Server, version: Version) -> None:
        """See `Terms`. Held against the version's own reference: the trainer may be further by now, or at work."""
        if version.reference is None:
            if version.adapter is None:
                return  # as at the start, where it was said
            raise BadAnswer("what it serves cannot be compared yet")
        expected, tolerance = version.reference.expected, TOLERANCE[self._format]
        scoring = self.dialect.scoring
        if scoring is not None:
            answer = await session.send(server, scoring.ask(version.adapter, server.model, self._probe.ids))
            got = self._continuation(read_scores(scoring, self._probe.ids, answer))
        else:
            ask = self._probe_ask(version.adapter)
            answer = await session.send(server, self.dialect.ask(ask, server.model))
            try:
                sample = session.read_sample(ask, answer)
            except Unreproducible:
                raise BadAnswer("its text does not tell its tokens") from None
            # Rounding may part the paths, and what is sampled after that is another text.
            pairs = zip(sample.tokens, version.reference.tokens, strict=False)
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            if same == 0:
                raise BadAnswer("it samples other tokens than before")
            got, expected, tolerance = sample.logprobs[:same], expected[:same], tolerance / min(1.0, ask.temperature)
        complaint = return_complaint(server.url, version.number, got, expected, tolerance)
        if complaint is not None:
            raise RetrainError(complaint)

    def _fault(self, message: str) -> RetrainError:
        """Before anything was served it is the config, or how the server was started, that is wrong."""
        return ConfigError(message) if self._using.adapter is None else RetrainError(message)

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
        """Give up what another thread is sampling, and take every adapter from the servers and from the disk. Servers
        that are gone are left alone."""
        if len(self.servers) > 1:
            served = ", ".join(f"{server.served} by {server.url}" for server in self.servers)
            self.serving.say(f"completions served: {served}")
        for loop, task in tuple(self._running):
            assert task is not None
            with suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
        self._using = self.fleet.base
        self._withdraw(tuple(self._held))
        if self._store is not None:
            self._store.close()

    def _withdraw(self, versions: Sequence[int]) -> None:
        """Take these adapters from the servers and from the disk."""
        self.fleet.forget(versions)
        adapters = [self._held.pop(version) for version in versions]
        pairs = [(server, adapter) for server in self.fleet.alive for adapter in adapters]
        if pairs:
            self._run(lambda session: together(session.unload(server, adapter) for server, adapter in pairs))
        for adapter in adapters:
            shutil.rmtree(adapter.folder, ignore_errors=True)

    def _run(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        async def main() -> T:
            running = (asyncio.get_running_loop(), asyncio.current_task())
            self._running.add(running)
            try:
                async with open_client(os.environ.get(self.dialect.key_variable, "")) as client:
                    return await work(Session(client, self._terms, self.fleet))
            finally:
                self._running.discard(running)

        return run(main)


def one_at_a_time(say: Callable[[str], None]) -> Callable[[str], None]:
    """The thread that samples and the one that trains both have something to say."""
    lock = threading.Lock()

    def said(line: str) -> None:
        with lock:
            say(line)

    return said
