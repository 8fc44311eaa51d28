"""A faulty inference server: real HTTP on loopback, the log-probs of a real (tiny) model, and faults on demand.

It speaks as vLLM 0.32 and mlx-lm 0.32 do (compared with them), as SGLang's documentation says (it could not be
installed to compare), and as a server of OpenAI's API that knows no token ids. Model, sampling and adapters are plain
transformers, torch and PEFT: nothing of the project.
"""

from __future__ import annotations

import inspect
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

import tiny_models as models

# Loading a model patches transformers for a moment, which two threads must not do at once.
_LOADING = threading.Lock()

# Renamed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"

COMPLETIONS = ("/v1/completions", "/generate")

# What a fault does to a request: instead of an answer, to the answer's bytes, or to what was sampled.
INSTEAD = ("drop", "lose", "stall", "429", "429 later", "500", "503", "400")
RAW = ("garbage", "empty body", "half", "other json")
SAMPLED = (
    "short",
    "long",
    "nan",
    "positive",
    "no logprobs",
    "no choices",
    "two choices",
    "empty",
    "vocabulary",
    "abort",
)


@dataclass
class Request:
    """One request as it came. attempt: how often the same body had come to the same path before."""

    path: str
    body: dict[str, Any] | None
    attempt: int


@dataclass
class Sampled:
    tokens: list[int]
    logprobs: list[float | None]
    reason: str


@dataclass
class State:
    """What a server knows; a restart forgets it."""

    adapters: dict[str, Any] = field(default_factory=dict)
    seen_prompts: dict[tuple[int, ...], Any] = field(default_factory=dict)


class FakeServer:
    """Serves the model in `base`. fault(request) names one of the faults above, or None.

    stale: says that it loaded an adapter and goes on with its first. lie: nats added to what it reports of sampled
    tokens. raw_logprobs: reports them at temperature 1. old_cache: samples from a prompt with the adapter that the
    prompt was first seen with. max_rank, context, name, tokenizer: of the server.
    """

    def __init__(self, base: Path, form: str = "vllm", *, port: int = 0, **settings: Any) -> None:
        self.base, self.form = base, form
        self.tokenizer = AutoTokenizer.from_pretrained(settings.get("tokenizer", base))
        self.model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
        self.stale, self.lie = settings.get("stale", False), settings.get("lie", 0.0)
        self.raw_logprobs, self.old_cache = settings.get("raw_logprobs", False), settings.get("old_cache", False)
        self.context, self.max_rank = settings.get("context", 256), settings.get("max_rank", 16)
        self.name, self.delay = settings.get("name", str(base)), settings.get("delay", 0.0)
        self.tokenizes, self.loads = settings.get("tokenizes", True), settings.get("loads", True)
        self.fault: Callable[[Request], str | None] = settings.get("fault", lambda request: None)
        self.state, self.log = State(), []
        self.most_at_once = self._at_once = 0
        self._came: Counter[str] = Counter()
        self._connections: set[socket.socket] = set()
        self._lock, self._busy, self._released = threading.Lock(), threading.Lock(), threading.Event()
        self.port = port
        self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def completions(self) -> list[Request]:
        """The requests for completions, in the order in which they came."""
        return [
            request for request in self.log if request.path in COMPLETIONS and "prompt_logprobs" not in request.body
        ]

    def forget_attempts(self) -> None:
        """What comes next is a first attempt again."""
        self._came.clear()

    def _start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._connections.add(self.connection)

            def finish(self) -> None:
                fake._connections.discard(self.connection)
                super().finish()

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake._serve(self, None)

            def do_POST(self) -> None:
                fake._serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, *_: Any) -> None:
                """A client that has gone, or a connection that `stop` closed."""

        self._http = Server(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As when the process is killed: every connection breaks, and what it knew is forgotten."""
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.state = State()

    def restart(self) -> None:
        self._released.clear()
        self._start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- one request ------------------------------------------------------------------------------------------------

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        with self._lock:
            key = json.dumps([handler.path, body], sort_keys=True)
            request = Request(handler.path, body, self._came[key])
            self._came[key] += 1
            self.log.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._answer(handler, request, self.fault(request))
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request, fault: str | None) -> None:
        if fault == "drop":
            handler.close_connection = True
            return
        if fault == "stall":
            self._released.wait(30)
            handler.close_connection = True
            return
        if fault in INSTEAD and fault != "lose":
            status = int(fault.split()[0])
            headers = {"Retry-After": "0.4"} if fault == "429 later" else {}
            _send(handler, status, {"error": {"message": f"fault {fault}", "code": status}}, headers)
            return
        if self.delay:
            time.sleep(self.delay)
        with self._busy:
            status, content = self._respond(request, fault)
        if fault == "lose":
            handler.close_connection = True
            return
        if fault == "other json":
            content = ["nothing", {"of": "the", "sort": [1, 2]}]
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        if fault == "garbage":
            data = b"<html>\xff\xfe upstream"
        if fault == "empty body":
            data = b""
        if fault == "half":
            _send(handler, status, data[: len(data) // 2], promised=len(data))
            handler.close_connection = True
            return
        _send(handler, status, data)

    def _respond(self, request: Request, fault: str | None) -> tuple[int, Any]:
        body = request.body or {}
        prefix = "/v1" if self.form == "vllm" else ""
        match request.path:
            case "/health":
                return 200, ""
            case "/v1/models" if self.form != "mlx":
                return 200, {"object": "list", "data": self._models()}
            case "/tokenize" if self.tokenizes:
                ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
                return 200, {"count": len(ids), "max_model_len": self.context, "tokens": ids}
            case path if self.loads and path == f"{prefix}/load_lora_adapter":
                return self._load(body)
            case path if self.loads and path == f"{prefix}/unload_lora_adapter":
                return self._unload(body)
            case "/v1/completions" if self.form == "vllm":
                return self._vllm(body, fault)
            case "/v1/completions" if self.form == "mlx":
                return self._mlx(body, fault)
            case "/v1/completions" if self.form == "openai":
                return self._openai(body, fault)
            case "/generate" if self.form == "sglang":
                return self._sglang(body, fault)
        return 404, {"detail": "Not Found"}

    def _models(self) -> list[dict[str, Any]]:
        base = {"id": self.name, "root": str(self.base), "parent": None, "max_model_len": self.context}
        loaded = [{"id": name, "root": "", "parent": self.name, "max_model_len": None} for name in self.state.adapters]
        return [base, *loaded]

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        vllm = self.form == "vllm"
        if not (folder / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {folder}"
            return (404, _error(message)) if vllm else (400, {"success": False, "error_message": message})
        rank = json.loads((folder / "adapter_config.json").read_bytes())["r"]
        if rank > self.max_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            return (500, _error(message)) if vllm else (400, {"success": False, "error_message": message})
        if name in self.state.adapters and not body.get("load_inplace"):
            message = f"The lora adapter '{name}' has already been loaded."
            return 400, _error(message) if vllm else {"success": False, "error_message": message}
        if self.stale and self.state.adapters:
            self.state.adapters[name] = next(iter(self.state.adapters.values()))
        else:
            with _LOADING:
                self.state.adapters[name] = models.load_with_peft(self.base, folder)
        if vllm:
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        return 200, {"success": True, "loaded_adapters": {name: str(folder)}}

    def _unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if self.state.adapters.pop(name, None) is None:
            return (404 if self.form == "vllm" else 400), _error(f"The lora adapter '{name}' cannot be found.")
        return 200, "Success" if self.form == "vllm" else {"success": True}

    def _model_for(self, name: str | None) -> Any:
        """None where the name is not known."""
        return self.model if name in (None, self.name) else self.state.adapters.get(name)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, model: Any, prompt: list[int], *, max_tokens: int, temperature: float, seed: int, stop: list[int]
    ) -> Sampled:
        """What this server samples, and the log-probs it would report of it if it told the truth."""
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logprobs: list[float | None] = []
        cache, ids = None, prompt
        while len(tokens) < max_tokens:
            outputs = model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})
            raw, cache = outputs.logits[0, -1].float(), outputs[CACHE]
            logits = raw / (temperature or 1.0)
            p = torch.softmax(logits, -1)
            token = int(torch.multinomial(p, 1, generator=generator)) if temperature else int(logits.argmax())
            reported = raw if self.raw_logprobs else logits
            tokens.append(token)
            ids = [token]
            logprobs.append(torch.log_softmax(reported, -1)[token].item() + self.lie)
            if token in stop:
                return Sampled(tokens, logprobs, "stop")
        return Sampled(tokens, logprobs, "length")

    def _sampled(self, model: Any, prompt: list[int], fault: str | None, **settings: Any) -> Sampled:
        if self.old_cache:
            model = self.state.seen_prompts.setdefault(tuple(prompt), model)
        sampled = self.sample(model, prompt, **settings)
        if fault == "short":
            sampled.logprobs.pop()
        if fault == "long":
            sampled.tokens, sampled.logprobs = sampled.tokens * 99, sampled.logprobs * 99
        if fault == "nan":
            sampled.logprobs[0] = float("nan")
        if fault == "positive":
            sampled.logprobs[-1] = 0.25
        if fault == "empty":
            sampled.tokens, sampled.logprobs = [], []
        if fault == "vocabulary":
            sampled.tokens[0] = models.VOCAB
        if fault == "abort":
            sampled.reason = "abort"
        return sampled

    def _vllm(self, body: dict[str, Any], fault: str | None) -> tuple[int, Any]:
        model = self._model_for(body["model"])
        if model is None:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            scores = [None] + [
                {str(t): {"logprob": p}} for t, p in zip(prompt[1:], _scores(model, prompt), strict=True)
            ]
            choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": scores}
            return 200, {"model": body["model"], "choices": [choice]}
        # Whatever is left out would come from the model's generation_config.json.
        assert {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"} <= body.keys()
        sampled = self._sampled(model, prompt, fault, **_settings(body), stop=body["stop_token_ids"])
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(sampled.tokens),
            "token_ids": sampled.tokens,
            "prompt_token_ids": prompt,
            "finish_reason": sampled.reason,
            "logprobs": None if fault == "no logprobs" else {"token_logprobs": sampled.logprobs},
        }
        return 200, {
            "model": body["model"],
            "choices": _choices(choice, fault),
            "usage": {"prompt_tokens": len(prompt)},
        }

    def _sglang(self, body: dict[str, Any], fault: str | None) -> tuple[int, Any]:
        model = self._model_for(body.get("lora_path"))
        if model is None:
            return 400, {"error": {"message": f"The following LoRA adapters are not loaded: {body['lora_path']}"}}
        prompt, sampling = body["input_ids"], body["sampling_params"]
        if fault == "no choices":
            return 200, []
        settings = {
            "max_tokens": sampling["max_new_tokens"],
            "temperature": sampling["temperature"],
            "seed": sampling.get("sampling_seed", 0),
            "stop": sampling.get("stop_token_ids", []),
        }
        sampled = self._sampled(model, prompt, fault, **settings)
        length = {"type": "length", "length": settings["max_tokens"]}
        meta = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(sampled.tokens),
            "finish_reason": length if sampled.reason == "length" else {"type": sampled.reason, "matched": 1},
        }
        if fault != "no logprobs":
            pairs = zip(sampled.logprobs, sampled.tokens, strict=False)
            meta["output_token_logprobs"] = [[p, t, None] for p, t in pairs] + [[]] * (fault == "short")
        if body["logprob_start_len"] == 0:
            scores = [None, *_scores(model, prompt)]
            meta["input_token_logprobs"] = [[p, t, None] for p, t in zip(scores, prompt, strict=True)]
        answer = {"text": self.tokenizer.decode(sampled.tokens), "output_ids": sampled.tokens, "meta_info": meta}
        return 200, [answer, answer] if fault == "two choices" else answer

    def _openai(self, body: dict[str, Any], fault: str | None) -> tuple[int, Any]:
        eos = self.tokenizer.eos_token_id
        sampled = self._sampled(self.model, body["prompt"], fault, **_settings(body), stop=[eos])
        ended = sampled.reason == "stop"
        choice = {
            "text": self.tokenizer.decode(sampled.tokens[:-1] if ended else sampled.tokens),
            "finish_reason": sampled.reason,
            "logprobs": {"token_logprobs": sampled.logprobs, "tokens": None},
        }
        return 200, {"model": "another-name", "choices": _choices(choice, fault)}

    def _mlx(self, body: dict[str, Any], fault: str | None) -> tuple[int, Any]:
        """An adapter comes in with the request, as the path of its folder. Log-probs are at temperature 1."""
        prompt = self.tokenizer(body["prompt"])["input_ids"]
        model = self.state.adapters.get(body.get("adapters"), self.model)
        sampled = self._sampled(model, prompt, fault, **_settings(body), stop=[self.tokenizer.eos_token_id])
        pairs = zip(sampled.tokens, sampled.logprobs, strict=True)
        choice = {
            "text": self.tokenizer.decode(sampled.tokens),
            "finish_reason": sampled.reason,
            "logprobs": {"content": [{"id": t, "logprob": p} for t, p in pairs]},
        }
        return 200, {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def _scores(model: Any, ids: list[int]) -> list[float]:
    logprobs = torch.log_softmax(_logits(model, ids)[:-1], -1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in ("max_tokens", "temperature", "seed")}


def _choices(choice: dict[str, Any], fault: str | None) -> list[dict[str, Any]]:
    return {"no choices": [], "two choices": [choice, choice]}.get(fault or "", [choice])


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "InvalidUserInput", "param": None, "code": 400}}


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    content: Any,
    headers: dict[str, str] | None = None,
    *,
    promised: int | None = None,
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(data) if promised is None else promised))
    handler.end_headers()
    handler.wfile.write(data)
