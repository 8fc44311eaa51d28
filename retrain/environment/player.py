"""The model's side of one episode: a verifiers client that asks the run's engine and keeps the token ids."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrain.environment.chat import Chat, Message, split_tool_calls
from retrain.environment.waves import EpisodeFailed, Take, Turn
from retrain.streams import stream_key
from retrain.types import Completion


class Player:
    """The conversation so far, as ids: `prompt_T`, then turns of the model and what the environment wrote between them.

    opening, tools: the messages and the tool definitions that `prompt_T` says.
    stream: of the episode; turn t samples with the stream (stream, t). max_tokens: most that the model samples in the
    episode. context: most tokens of the whole conversation.
    """

    take: Take

    def __init__(
        self,
        chat: Chat,
        prompt_T: np.ndarray,
        opening: Sequence[Message],
        tools: Sequence[Message],
        stream: int,
        max_tokens: int,
        context: int,
    ) -> None:
        self.chat, self.stream, self.context = chat, stream, context
        self.messages, self.tools = list(opening), list(tools)
        self.prompt, self.left = prompt_T.tolist(), max_tokens
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.sampled: list[bool] = []
        self.turns: list[Completion] = []

    async def answer(self, messages: Sequence[Message]) -> Completion | None:
        """The model's next turn after `messages`, the whole conversation; None where there is no room for one.

        Raises EpisodeFailed where the environment rewrote what was said before.
        """
        count = len(self.messages)
        goes_on = list(messages[:count]) == self.messages and (len(messages) > count) == bool(self.turns)
        if not goes_on:
            raise EpisodeFailed("the environment rewrote the conversation; only one that goes on can be trained on")
        new = self.chat.following(self.turns[-1].tokens_T.tolist(), messages[count:]) if self.turns else []
        context = [*self.prompt, *self.tokens, *new]
        room = min(self.left, self.context - len(context))
        if room < 1:
            return None
        stream = stream_key(self.stream, "turn", len(self.turns))
        turn = await self.take(Turn(np.array(context, dtype=np.int64), stream, room))
        self._extend(new, [0.0] * len(new), sampled=False)
        self._extend(turn.tokens_T.tolist(), turn.logprobs_T.tolist(), sampled=True)
        self.left -= len(turn)
        self.turns.append(turn)
        return turn

    def _extend(self, tokens: list[int], logprobs: list[float], *, sampled: bool) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.sampled += [sampled] * len(tokens)

    def completion(self) -> Completion:
        """All turns as one: sampled tokens, and the environment's between them."""
        sampled_T = np.array(self.sampled, dtype=bool)
        return Completion(
            tokens_T=np.array(self.tokens, dtype=np.int64),
            logprobs_T=np.array(self.logprobs, dtype=np.float32),
            finish_reason=self.turns[-1].finish_reason if self.turns else "stop",
            policy_version=self.turns[-1].policy_version if self.turns else -1,
            text=self.chat.tokenizer.decode(self.tokens, skip_special_tokens=True),
            sampled_T=None if sampled_T.all() else sampled_T,
        )


@functools.cache
def player_class() -> type[Player]:
    """`Player` as a client of verifiers, which is imported here and not before."""
    from verifiers.clients import Client  # pyright: ignore[reportMissingImports]
    from verifiers.errors import OverlongPromptError  # pyright: ignore[reportMissingImports]
    from verifiers.types import Response, ResponseMessage, ToolCall, Usage  # pyright: ignore[reportMissingImports]

    class VerifiersPlayer(Player, Client):
        def __init__(self, *args: Any) -> None:
            Player.__init__(self, *args)
            Client.__init__(self, None)

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Any:
            asked = {key: value for key, value in sampling_args.items() if value is not None}
            if asked:
                raise EpisodeFailed(f"the environment sets {asked}: how turns are sampled is the run's to say")
            if [as_dict(tool) for tool in tools or ()] != self.tools:
                raise EpisodeFailed("the environment changed its tools; only one that keeps them can be trained on")
            messages = [as_dict(message) for message in prompt]
            turn = await self.answer(messages)
            if turn is None:
                raise OverlongPromptError("no room is left for another turn")
            text = self.chat.tokenizer.decode(turn.tokens_T, skip_special_tokens=True)
            said, calls = split_tool_calls(text) if tools else (text, [])
            reply = ResponseMessage(
                content=said,
                tool_calls=[ToolCall(id=f"call_{n}", name=name, arguments=text) for n, (name, text) in enumerate(calls)]
                or None,
                finish_reason="tool_calls" if calls else turn.finish_reason,
                is_truncated=turn.finish_reason == "length",
            )
            self.messages = [*messages, as_dict(reply)]
            context = len(self.prompt) + len(self.tokens) - len(turn)
            usage = Usage(
                prompt_tokens=context,
                reasoning_tokens=0,
                completion_tokens=len(turn),
                total_tokens=context + len(turn),
            )
            return Response(id=uuid.uuid4().hex, created=int(time.time()), model=model, usage=usage, message=reply)

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
            return messages, {}

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def raise_from_native_response(self, response: Any) -> None: ...

        def setup_client(self, config: Any) -> Any: ...

        async def close(self) -> None: ...

    return VerifiersPlayer


def as_dict(message: Any) -> dict[str, Any]:
    """A message or a tool, from verifiers' own types or a plain mapping, as chat templates take it.

    Raises EpisodeFailed for content that is not text.
    """
    fields = dict(message) if isinstance(message, Mapping) else message.model_dump(exclude_none=True)
    if "parameters" in fields:
        fields.pop("strict", None)
        return {"type": "function", "function": fields}
    plain = {"role": fields["role"], "content": _text(fields.get("content"))}
    if fields.get("tool_calls"):
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in fields["tool_calls"]
        ]
    if fields.get("tool_call_id"):
        plain["tool_call_id"] = fields["tool_call_id"]
    return plain


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, str) else part.get("text") for part in content]
    if any(part is None for part in parts):
        raise EpisodeFailed("the conversation holds content that is not text")
    return "".join(parts)
