"""What differs between inference servers, as data and small functions: one `Dialect` for each of `inference.engine`.

vLLM: https://docs.vllm.ai (checked against 0.32). SGLang: https://docs.sglang.io (native API). MAX and others:
OpenAI's completions. mlx: `mlx_lm.server` (checked against 0.32). Tokens go in as ids and come out as ids wherever the
server knows them; where it gives text only, the text must tokenise back to as many tokens as it has log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.config.addresses import KEY_VARIABLES
from retrain.http import BadAnswer, Call
from retrain.inference.mlx import to_mlx
from retrain.types import RetrainError

# Every setting that shapes the distribution, spelt out: servers fill what is missing from the model's
# generation_config.json, and would then sample from another distribution than the one that is trained on.
NEUTRAL = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
OFF_TOP_K = -1


@dataclass(frozen=True)
class Adapter:
    """A published policy version. Its name is new for every version and every run: no answer, and no cached prefix,
    of one can be taken for another's."""

    name: str
    folder: Path
    version: int


@dataclass(frozen=True)
class Ask:
    """One completion, as any server is asked for it.

    text: the prompt as text, for servers that take no ids (else empty). stop_ids: token ids that end a completion.
    """

    prompt: list[int]
    text: str
    adapter: Adapter | None
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Sample:
    """One completion, as the server reported it. served_by: the model it names, None where it names none."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    served_by: str | None


class Unreproducible(Exception):
    """The server gave only text, and the text does not tell which tokens were sampled."""


@dataclass(frozen=True)
class Scoring:
    """How given tokens are scored: ask(adapter, model, ids), where model is the base's name on that server, and
    read(answer, ids) -> log-probs of ids[1:] at temperature 1, computed without the prefix cache."""

    ask: Callable[[Adapter | None, str, list[int]], Call]
    read: Callable[[Any, list[int]], list[float]]


@dataclass(frozen=True)
class Dialect:
    """How a kind of server is spoken to.

    ask, read: of one completion. ask(ask, model): model is the base's name on that server. read(answer, ask, tokenizer)
    raises BadAnswer or Unreproducible.
    load: the calls that make it serve an adapter; all but the last may be refused. unload: the call that drops one.
    in_request: the adapter goes into each request instead. obstacle: why no adapter can be served, where neither is
    there. convert: adds the server's own format to the PEFT adapter in a folder.
    listed: /v1/models names the adapters that are loaded. scoring: None where given tokens cannot be scored.
    by_name: it loads whichever model a request names. takes_text: prompts go in as text. seed_bits: of the seeds it
    takes. concurrent: most requests at a time.
    health: path that answers when the server is ready. tokenize: path that shows its tokenizer, "" where there is none.
    key_variable: environment variable with the key, "" for none. At the end, remedies for what a check may find.
    """

    engine: str
    ask: Callable[[Ask, str], Call]
    read: Callable[[Any, Ask, Any], Sample]
    load: Callable[[Adapter], tuple[Call, ...]] | None = None
    unload: Callable[[Adapter], Call] | None = None
    in_request: bool = False
    convert: Callable[[Path], None] | None = None
    obstacle: str = ""
    listed: bool = False
    scoring: Scoring | None = None
    by_name: bool = False
    takes_text: bool = False
    seed_bits: int = 31
    concurrent: int = 256
    health: str = "/health"
    tokenize: str = ""
    key_variable: str = ""
    enable_adapters: str = ""
    enable_logprobs: str = "use an engine that reports log-probabilities"
    enable_temperature: str = "set training.temperature = 1.0"
    same_dtype: str = "start it in the trainer's number format"


def prompt_text(ids: list[int], tokenizer: Any) -> str:
    """Text that a server's tokenizer, which adds its special tokens, turns into exactly these ids.

    Raises RetrainError where there is none.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(candidate)["input_ids"] == ids:
            return candidate
    raise RetrainError(
        f"no text tokenises to the ids of the prompt {text[:60]!r}, and this server takes text only. Use an engine "
        'that takes token ids ("vllm" or "sglang")'
    )


def at(answer: Any, *path: str | int) -> Any:
    """answer[path[0]][path[1]]...; BadAnswer names the first part that is not there."""
    for depth, key in enumerate(path, start=1):
        try:
            answer = answer[key]
        except (KeyError, IndexError, TypeError):
            raise BadAnswer(f"the answer has no {'.'.join(map(str, path[:depth]))}") from None
    return answer


def as_list(answer: Any, *path: str | int) -> list[Any]:
    found = at(answer, *path)
    if not isinstance(found, list):
        raise BadAnswer(f"{'.'.join(map(str, path))} is no list")
    return found


# ---- OpenAI's completions: vLLM, MAX, mlx and others ----------------------------------------------------------------


def _openai_body(ask: Ask, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": 1.0,
        "n": 1,
        "seed": ask.seed,
        "logprobs": 1,
    }


def _openai(ask: Ask, model: str) -> Call:
    return Call("/v1/completions", _openai_body(ask, model))


def _only_choice(answer: Any) -> Any:
    choices = as_list(answer, "choices")
    if len(choices) != 1:
        raise BadAnswer(f"{len(choices)} choices came, 1 was asked for")
    return choices[0]


def _stopped(finish_reason: Any) -> bool:
    if finish_reason not in ("stop", "length"):
        raise BadAnswer(f"the completion ended with finish_reason {finish_reason!r}")
    return finish_reason == "stop"


def _check_prompt(answer: Any, ask: Ask) -> None:
    """A server that adds or drops prompt tokens has sampled after another prompt."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if count is not None and count != len(ask.prompt):
        raise BadAnswer(f"the server counts {count} tokens in a prompt of {len(ask.prompt)}")


def _read_openai(answer: Any, ask: Ask, tokenizer: Any) -> Sample:
    choice = _only_choice(answer)
    _check_prompt(answer, ask)
    stopped = _stopped(at(choice, "finish_reason"))
    logprobs = as_list(choice, "logprobs", "token_logprobs")
    text = at(choice, "text")
    tokens = _tokens_of(text, logprobs, stopped, ask, tokenizer)
    return Sample(tokens, logprobs, stopped, served_by=None)


def _tokens_of(text: Any, logprobs: Sequence[float], stopped: bool, ask: Ask, tokenizer: Any) -> list[int]:
    """The sampled ids, from text alone: only where they are beyond doubt."""
    if not isinstance(text, str):
        raise BadAnswer("choices.0.text is no string")
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # The end of sequence is not in the text; its log-prob may be there.
    if stopped and len(logprobs) == len(tokens) + 1 and len(ask.stop_ids) == 1:
        tokens.append(ask.stop_ids[0])
    if len(tokens) != len(logprobs) or not tokens or tokenizer.decode(tokens, skip_special_tokens=True) != text:
        raise Unreproducible
    return tokens


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _vllm(ask: Ask, model: str) -> Call:
    own = {
        "top_k": OFF_TOP_K,
        "logprobs": 0,  # of the sampled token, and of no other
        "return_token_ids": True,
        "stop_token_ids": ask.stop_ids,
        "skip_special_tokens": False,
    }
    return Call("/v1/completions", _openai_body(ask, ask.adapter.name if ask.adapter else model) | NEUTRAL | own)


def _read_vllm(answer: Any, ask: Ask, tokenizer: Any) -> Sample:
    choice = _only_choice(answer)
    if at(choice, "prompt_token_ids") != ask.prompt:
        raise BadAnswer("the server sampled after another prompt than the one it was given")
    return Sample(
        tokens=as_list(choice, "token_ids"),
        logprobs=as_list(choice, "logprobs", "token_logprobs"),
        stopped=_stopped(at(choice, "finish_reason")),
        served_by=at(answer, "model"),
    )


def _load_vllm(adapter: Adapter) -> tuple[Call, ...]:
    # In place, so that it may be asked again when an answer was lost.
    body = {"lora_name": adapter.name, "lora_path": str(adapter.folder), "load_inplace": True}
    return (Call("/v1/load_lora_adapter", body, json=False),)


def _unload_vllm(adapter: Adapter) -> Call:
    return Call("/v1/unload_lora_adapter", {"lora_name": adapter.name}, json=False)


def _score_vllm(adapter: Adapter | None, model: str, ids: list[int]) -> Call:
    name = adapter.name if adapter else model
    body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    return Call("/v1/completions", body)


def _read_vllm_scores(answer: Any, ids: list[int]) -> list[float]:
    entries = as_list(_only_choice(answer), "prompt_logprobs")
    if len(entries) != len(ids):
        raise BadAnswer(f"{len(entries)} prompt log-probs came for {len(ids)} tokens")
    return [at(entry, str(token), "logprob") for entry, token in zip(entries[1:], ids[1:], strict=True)]


# ---- SGLang ---------------------------------------------------------------------------------------------------------


def _sglang_call(ids: list[int], adapter: Adapter | None, sampling: dict[str, Any], first_scored: int) -> Call:
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": first_scored}
    return Call("/generate", body | ({"lora_path": adapter.name} if adapter else {}))


def _sglang(ask: Ask, model: str) -> Call:
    sampling = NEUTRAL | {
        "top_k": OFF_TOP_K,
        "max_new_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "n": 1,
        "sampling_seed": ask.seed,
        "stop_token_ids": ask.stop_ids,
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
    return _sglang_call(ask.prompt, ask.adapter, sampling, -1)


def _read_sglang(answer: Any, ask: Ask, tokenizer: Any) -> Sample:
    meta = at(answer, "meta_info")
    if at(meta, "prompt_tokens") != len(ask.prompt):
        raise BadAnswer(f"the server counts {meta['prompt_tokens']} tokens in a prompt of {len(ask.prompt)}")
    entries = as_list(meta, "output_token_logprobs")
    return Sample(
        tokens=[at(entry, 1) for entry in entries],
        logprobs=[at(entry, 0) for entry in entries],
        stopped=_stopped(at(meta, "finish_reason", "type")),
        served_by=None,
    )


def _load_sglang(adapter: Adapter) -> tuple[Call, ...]:
    # It refuses a name that it has, which a lost answer would leave behind: dropped first, if it is there.
    body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
    return (_unload_sglang(adapter), Call("/load_lora_adapter", body))


def _unload_sglang(adapter: Adapter) -> Call:
    return Call("/unload_lora_adapter", {"lora_name": adapter.name})


def _score_sglang(adapter: Adapter | None, model: str, ids: list[int]) -> Call:
    return _sglang_call(ids, adapter, {"max_new_tokens": 1, "temperature": 1.0}, 0)


def _read_sglang_scores(answer: Any, ids: list[int]) -> list[float]:
    entries = as_list(answer, "meta_info", "input_token_logprobs")
    if [at(entry, 1) for entry in entries] != ids:
        raise BadAnswer("the input log-probs are of other tokens than those that were sent")
    return [at(entry, 0) for entry in entries[1:]]


# ---- mlx ------------------------------------------------------------------------------------------------------------


def _mlx(ask: Ask, model: str) -> Call:
    # The model by its own name: as "default_model" the server ignores `adapters`.
    body = _openai_body(ask, model) | {"prompt": ask.text, "logprobs": True, "top_k": 0, "min_p": 0.0}
    return Call("/v1/completions", body | ({"adapters": str(ask.adapter.folder)} if ask.adapter else {}))


def _read_mlx(answer: Any, ask: Ask, tokenizer: Any) -> Sample:
    choice = _only_choice(answer)
    _check_prompt(answer, ask)
    entries = as_list(choice, "logprobs", "content")
    return Sample(
        tokens=[at(entry, "id") for entry in entries],
        logprobs=[at(entry, "logprob") for entry in entries],
        stopped=_stopped(at(choice, "finish_reason")),
        served_by=None,
    )


# ---- the table ------------------------------------------------------------------------------------------------------

DIALECTS = {
    dialect.engine: dialect
    for dialect in (
        Dialect(
            "vllm",
            _vllm,
            _read_vllm,
            load=_load_vllm,
            unload=_unload_vllm,
            listed=True,
            scoring=Scoring(_score_vllm, _read_vllm_scores),
            seed_bits=63,
            tokenize="/tokenize",
            key_variable=KEY_VARIABLES["vllm"],
            enable_adapters="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
            enable_logprobs="start it without --max-logprobs 0",
            enable_temperature="start it with --logprobs-mode processed_logprobs",
            same_dtype="start it with --dtype float32",
        ),
        Dialect(
            "sglang",
            _sglang,
            _read_sglang,
            load=_load_sglang,
            unload=_unload_sglang,
            listed=True,
            scoring=Scoring(_score_sglang, _read_sglang_scores),
            tokenize="/tokenize",
            enable_adapters="start it with --enable-lora, --max-lora-rank and --lora-target-modules all",
            enable_temperature="start it without SGLANG_RETURN_ORIGINAL_LOGPROB",
            same_dtype="start it with --dtype float32",
        ),
        Dialect(
            "mlx",
            _mlx,
            _read_mlx,
            in_request=True,
            convert=to_mlx,
            by_name=True,
            takes_text=True,
            # With a seed it answers one request after the other.
            concurrent=1,
            enable_temperature="set training.temperature = 1.0: it reports log-probabilities at temperature 1 only",
        ),
        Dialect(
            "max",
            _openai,
            _read_openai,
            obstacle="MAX takes adapters for Llama 3 models on one GPU only, and this version does not publish to it",
            enable_logprobs="start it with --no-enable-overlap-scheduler",
        ),
        Dialect(
            "openai",
            _openai,
            _read_openai,
            obstacle="the OpenAI API has no route by which a new adapter reaches the server",
            health="/v1/models",
            key_variable=KEY_VARIABLES["openai"],
        ),
    )
}
