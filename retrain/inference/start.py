"""What is asked of a server before anything is published to it: whether it is the one that the config means."""

from __future__ import annotations

from retrain.assets import resolve_model
from retrain.http import Broken, Call, Failure, Refused
from retrain.inference import Serving
from retrain.inference.checks import choose_model
from retrain.inference.dialects import Ask, Sample, as_list
from retrain.inference.fleet import Server
from retrain.inference.probe import TOKENIZER_TEXT
from retrain.inference.session import Session
from retrain.types import ConfigError, RetrainError


async def look_at(session: Session, server: Server, greeting: Ask, serving: Serving) -> Sample | None:
    """What the server, once it fits the config, made of `greeting`, a request to the base model; None where its text
    does not tell the tokens.

    Raises ConfigError, with the remedy, where it does not.
    """
    try:
        await identify(session, server, serving)
    except Failure as failure:
        engine = session.terms.dialect.engine
        raise ConfigError(
            f'inference.url: {server.url} does not answer as a "{engine}" server does: {failure}. '
            "Start it (`retrain serve CONFIG` does), or correct inference.url or inference.engine"
        ) from failure
    sample = await _greet(session, server, greeting)
    context = "" if server.context is None else f", with a context of {server.context} tokens"
    serving.say(f"{server.url} serves {server.model}{context}")
    return sample


async def identify(session: Session, server: Server, serving: Serving) -> None:
    """Find the server's model and context. Raises a Failure where it does not answer, ConfigError where it does not fit
    the config."""
    await session.is_healthy(server)
    if session.terms.dialect.by_name:
        server.model = resolve_model(serving.model)
    else:
        server.model, server.context = choose_model(server.url, serving.model, await session.models(server))
    if server.context is not None and server.context <= serving.max_tokens:
        raise ConfigError(
            f"{server.url}: its context of {server.context} tokens has no room for a prompt and training.max_tokens = "
            f"{serving.max_tokens}. Start it with a longer one, or lower training.max_tokens"
        )
    await _compare_tokenizers(session, server, serving)


async def _compare_tokenizers(session: Session, server: Server, serving: Serving) -> None:
    path = session.terms.dialect.tokenize
    if not path:
        return
    body = {"model": server.model, "prompt": TOKENIZER_TEXT, "add_special_tokens": False}
    try:
        theirs = as_list(await session.once(server, Call(path, body)), "tokens")
    except Refused:
        return  # an older server does not offer it; the log-probs of the first publication have to do
    if theirs != list(session.terms.tokenizer(TOKENIZER_TEXT, add_special_tokens=False)["input_ids"]):
        raise ConfigError(
            f"{server.url} has another tokenizer than model.model = {serving.model}; it calls its model "
            f"{server.model}. Start it with the config's model, or correct model.model or inference.url"
        )


async def _greet(session: Session, server: Server, greeting: Ask) -> Sample | None:
    try:
        return await session.sample(server, greeting)
    except RetrainError as error:
        if isinstance(error.__cause__, Broken):
            raise
        remedy = session.terms.dialect.enable_logprobs
        raise ConfigError(f"{error}. Where it is log-probabilities that it does not give: {remedy}") from error
