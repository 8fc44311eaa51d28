"""Which characters of a decoded text each token of an arbitrary token sequence stands for.

A fast tokenizer gives offsets when it *encodes*; what a model samples is another matter. Its tokens need not be the
ones the tokenizer would choose, they split characters (an emoji is up to four byte tokens) and may be no valid UTF-8.
So each token is translated to the bytes it contributes, and the characters of the joined bytes are counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Piece(NamedTuple):
    """What one token contributes to the decoded bytes. byte_token: its neighbours may change that (see _byte_run)."""

    data: bytes
    byte_token: bool = False


class TokenOffsets:
    """Texts of token sequences, and the character spans of their tokens, for one transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._piece = _byte_level_piece if _decodes_byte_level(tokenizer) else _sentencepiece_piece
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._pieces: dict[int, _Piece] = {}

    def text(self, token_ids: list[int]) -> str:
        """The decoded text that spans refer to: special tokens left out, nothing cleaned up."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def name(self, token_id: int) -> str:
        """What the tokenizer calls a token, "" for an id beyond its vocabulary."""
        return self._tokenizer.convert_ids_to_tokens(token_id) or "" if token_id in self._special else ""

    def spans(self, token_ids: list[int], text: str) -> np.ndarray:
        """int64 [T, 2]: token t stands for text[start:end]; `text` is `self.text(token_ids)`.

        Every character lies in the span of some token. A token that contributes only part of a character spans all of
        it, so neighbours may share one; a token that contributes nothing (a special one) has start = end.
        """
        spans = self._spans_by_bytes(token_ids, text) if self._tokenizer.is_fast else None
        return self._spans_by_prefixes(token_ids, text) if spans is None else spans

    def _spans_by_bytes(self, token_ids: list[int], text: str) -> np.ndarray | None:
        """Exact spans in linear time; None where the tokens' bytes do not add up to the text."""
        pieces = self._bytes_of(token_ids)
        decoded, char_of_byte = _characters(b"".join(pieces))
        dropped = len(decoded) - len(text)  # sentencepiece-like decoders drop the space in front of the first word
        if dropped < 0 or decoded[dropped:] != text or decoded[:dropped].strip(" "):
            return None
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = np.append(0, ends)[:-1]
        first = np.append(char_of_byte, len(decoded))[starts]
        last = np.append(-1, char_of_byte)[ends]
        spans = np.stack([first, np.where(ends > starts, last + 1, first)], axis=1)
        return np.maximum(spans - dropped, 0)

    def _bytes_of(self, token_ids: list[int]) -> list[bytes]:
        """The bytes that each token contributes to the decoded text."""
        for i in set(token_ids) - self._pieces.keys():
            special = i in self._special
            self._pieces[i] = _Piece(b"") if special else self._piece(self._tokenizer.convert_ids_to_tokens(i))
        contributions = [self._pieces[i].data for i in token_ids]
        # Special tokens and ids beyond the vocabulary are taken out before decoding: they end no run of byte tokens.
        contributing = [t for t, data in enumerate(contributions) if data]
        for byte_token, run in groupby(contributing, key=lambda t: self._pieces[token_ids[t]].byte_token):
            if byte_token:
                positions = list(run)
                for t, data in zip(positions, _byte_run([contributions[t] for t in positions]), strict=True):
                    contributions[t] = data
        return contributions

    def _spans_by_prefixes(self, token_ids: list[int], text: str) -> np.ndarray:
        """Spans for any decoder, by decoding every prefix: quadratic time.

        A character counts as finished by the first prefix from which on it stays; replacement characters at the end of
        a prefix are unfinished ones. Such spans may hold a replacement character or a leading space too many.
        """
        prefixes = [self.text(token_ids[:t]) for t in range(len(token_ids))]
        agreed = [_agreement(prefix.rstrip(_REPLACEMENT), text) for prefix in prefixes] + [len(text)]
        finished = np.minimum.accumulate(agreed[::-1])[::-1].astype(np.int64)
        spans = np.stack([finished[:-1], finished[1:]], axis=1)
        for t, (start, end) in enumerate(spans):
            without = token_ids[:t] + token_ids[t + 1 :]
            if start == end and self.text(without) != text:  # it is part of the character that comes next
                spans[t, 1] = min(start + 1, len(text))
        return spans


def overlapping(tokens: np.ndarray, marked: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [T]: which of the tokens' character spans (int64 [T, 2]) have a character in common with a marked one."""
    size = max(tokens.max(initial=0), *(end for _, end in marked), 0)
    edges = np.zeros(size + 1, dtype=np.int64)
    for start, end in marked:
        edges[start] += 1
        edges[end] -= 1
    marked_before = np.append(0, np.cumsum(np.cumsum(edges) > 0))
    starts, ends = tokens.T
    return marked_before[ends] > marked_before[starts]


def _decodes_byte_level(tokenizer: Any) -> bool:
    return tokenizer.is_fast and "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes (GPT-2): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_piece(token: str | None) -> _Piece:
    """token: None for an id beyond the vocabulary (embeddings are padded), which decodes to nothing."""
    try:
        return _Piece(bytes([_ALPHABET[char] for char in token or ""]))
    except KeyError:  # an added token, spelt out
        return _Piece((token or "").encode())


def _sentencepiece_piece(token: str | None) -> _Piece:
    """token: as above; one like <0xF0> stands for that byte, "▁" for a space."""
    byte = _BYTE_PIECE.fullmatch(token or "")
    return _Piece(bytes([int(byte[1], 16)]), True) if byte else _Piece((token or "").replace("▁", " ").encode())


def _byte_run(run: list[bytes]) -> list[bytes]:
    """Adjacent byte tokens decode together; where they are not valid UTF-8, each becomes a replacement character."""
    try:
        b"".join(run).decode()
    except UnicodeDecodeError:
        return [_REPLACEMENT.encode()] * len(run)
    return run


def _agreement(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _characters(data: bytes) -> tuple[str, np.ndarray]:
    """The text of UTF-8 data, and for each byte the index of its character (int64).

    Invalid bytes become replacement characters as in Unicode 3.9, "substitution of maximal subparts".
    """
    text = data.decode(errors="replace")
    begins = np.frombuffer(data, dtype=np.uint8) & 0xC0 != 0x80
    position = 0
    while position < len(data):
        try:
            data[position:].decode()
            break
        except UnicodeDecodeError as error:
            begins[position + error.start : position + error.end] = False
            begins[position + error.start] = True
            position += error.end
    return text, np.cumsum(begins) - 1
