"""A conversation as token ids: the model's turns as they were sampled, all else as the chat template writes it.

Nothing that the model sampled is tokenised again: what follows a turn is what the template writes after *some* turn of
the assistant, so that templates which rewrite earlier turns (dropping their reasoning, say) change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.types import ConfigError, RetrainError

Message = Mapping[str, Any]

# What stands for the model's turn where the template is asked what comes after one.
_STAND_IN = "stand-in"
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Chat:
    """tokenizer: with a chat template; ConfigError where it has none."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("an environment's turns need a chat template, and this model's tokenizer has none")
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The prompt: all messages, and the beginning of the model's turn."""
        return self._encode(self._render(messages, tools, opens=True))

    def following(self, sampled: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """What stands between a turn of the model, `sampled`, and its next one: the rest of the turn's end, the
        environment's messages, and the beginning of the next turn."""
        asked = [{"role": "user", "content": _STAND_IN}, {"role": "assistant", "content": _STAND_IN}]
        before = self._render(asked, (), opens=False)
        after = self._render([*asked, *messages], (), opens=True)
        if not after.startswith(before):
            raise RetrainError("the chat template writes an earlier turn differently once a message follows it")
        tail = before[before.rindex(_STAND_IN) + len(_STAND_IN) :]
        ids = self._encode(tail + after[len(before) :])
        ended = bool(sampled) and sampled[-1] in self.eos_ids
        # The end of the turn was sampled already; a turn that was cut is ended by the template.
        return ids[1:] if ended and ids and ids[0] in self.eos_ids else ids

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, opens: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=opens
            )
        except Exception as error:  # a template raises what it likes
            raise RetrainError(f"the model's chat template cannot write the conversation: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def split_tool_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What is said, and (name, arguments as JSON) of every call: `<tool_call>{"name": ..., "arguments": {...}}`.

    The Hermes format, as Qwen and others are taught. A call that is no such JSON stays part of what is said.
    """
    calls: list[tuple[str, str]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        calls.append((name, json.dumps(arguments)))
        return ""

    return _TOOL_CALL.sub(take, text).strip(), calls
