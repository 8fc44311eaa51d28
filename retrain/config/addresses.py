"""Addresses of servers: what is one, and which may be spoken to in the clear."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from retrain.config.schema import Config

# The usual names of this machine.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# Where the key of each kind of server is looked for; the others take none.
KEY_VARIABLES = {
    "vllm": "VLLM_API_KEY",
    "openai": "OPENAI_API_KEY",
    "judge": "OPENAI_API_KEY",
    "tinker": "TINKER_API_KEY",
}


def address_problem(place: str, url: str, server: str, *, allow_http: bool) -> str | None:
    """What is wrong with the address that `place` (a key, or an environment variable) names; None where nothing is.

    server: an engine, "judge" or "tinker". allow_http: whether it may be http:// to another machine. An address that
    may hold a secret is not repeated in the message.
    """
    if "@" in url or "?" in url or "#" in url:
        variable = KEY_VARIABLES.get(server)
        remedy = f"set {variable} in the environment or in .env" if variable else "take it out"
        return f"{place}: must not hold a password; {remedy}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        return f'{place} = "{url}": must begin with http:// or https://, as in "http://127.0.0.1:8000"'
    if not (allow_http or parts.scheme == "https" or is_loopback(parts.hostname or "")):
        return (
            f'{place} = "{url}": prompts, completions and the key would go over the network in the clear; use '
            "https://, a tunnel to 127.0.0.1, or inference.allow_http = true where you trust the network"
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host stays on this machine: 127.0.0.0/8, ::1, localhost."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_problems(config: Config) -> Iterator[str]:
    """A message for everything that is wrong with the addresses that this config would speak to, `inference.url` apart.

    That one may name several: see `engines.parse_urls`.
    """
    reward, allow_http = config.reward, config.inference.allow_http
    named = [
        ("model.base_url", config.model.base_url, "tinker"),
        ("reward.judge_url", reward.judge_url, "judge"),
        *((f"reward.parts[{i}].judge_url", part.judge_url, "judge") for i, part in enumerate(reward.parts)),
    ]
    problems = (address_problem(*each, allow_http=allow_http) for each in named if each[1])
    yield from (problem for problem in problems if problem)
