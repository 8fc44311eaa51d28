"""Keys and values of a decoding batch: those of a prompt once for its whole group, those of its completions in place.

Shape suffixes: P prompts, B rows (completions) in the order of their prompts, S prompt width, H query heads, K key and
value heads, Q = H / K, N = H + 2 K, D head size, C room for tokens. G is the largest number of rows that a prompt has
left, and Z = P * K * G counts the *slots*: rows and heads as attention computes them, grouped by prompt. A prompt with
fewer rows leaves slots over; what is computed there, nobody reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens for which room is made at a time, or an eighth of what is there. Room that is not used yet lies between the
# tokens of one slot and the next, where reading pays for it: half-empty buffers take twice the time of full ones.
ROOM = 16


class GroupCache:
    """The cache of one `generate` call, for every layer of the model.

    prompts: (keys, values) of each layer, both [P, K, S, D], padded on the right. lengths_P: int64, without padding.
    size: rows of each prompt. limit: most tokens that a row takes up after its prompt. heads: query heads.
    The number format of `prompts` is that of the whole cache; attention is computed in float32.
    """

    def __init__(
        self, prompts: list[tuple[Tensor, Tensor]], lengths_P: Tensor, size: int, limit: int, heads: int
    ) -> None:
        self.heads, self.kv_heads = heads, prompts[0][0].shape[1]
        self.prompts = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in prompts]
        self.lengths_P = lengths_P
        self.limit = limit
        self.tokens = 0
        self.owner_B = torch.arange(len(lengths_P), device=lengths_P.device).repeat_interleave(size)
        self._lay_out()
        self.rows = [(self._buffer(keys, ROOM), self._buffer(keys, ROOM)) for keys, _ in self.prompts]

    def attend(self, layer: int, qkv_BND: Tensor, scale: float) -> Tensor:
        """Attend to the prompt and to the row's own tokens, this step's included, which are taken up: [B, H * D].

        qkv_BND: the H queries, K keys and K values of each row.
        """
        rows, _, size = qkv_BND.shape
        keys_ZCD, values_ZCD = self.rows[layer]
        qkv_ZND = qkv_BND[self.row_Z[:, None], self.heads_ZN]
        keys_ZCD[:, self.tokens], values_ZCD[:, self.tokens] = qkv_ZND[:, -2], qkv_ZND[:, -1]
        own_keys, own_values = (part[:, : self.tokens + 1].float() for part in (keys_ZCD, values_ZCD))
        prompt_keys, prompt_values = (part.float() for part in self.prompts[layer])
        pairs, width, _ = prompt_keys.shape

        query_ZQD = qkv_ZND[:, :-2].float() * scale
        slots = len(query_ZQD)
        # The queries of a group stand below each other: one product a prompt instead of one a row.
        shared = torch.baddbmm(self.bias, query_ZQD.view(pairs, -1, size), prompt_keys.transpose(1, 2))
        own = torch.bmm(query_ZQD, own_keys.transpose(1, 2))
        weights = torch.softmax(torch.cat((shared.view(slots, -1, width), own), dim=-1), dim=-1)
        seen = torch.bmm(weights[:, :, :width].view(pairs, -1, width), prompt_values)
        seen = torch.baddbmm(seen.view(slots, -1, size), weights[:, :, width:], own_values)
        return seen[self.slot_BK].view(rows, -1).to(qkv_BND.dtype)

    def advance(self) -> None:
        """This step's keys and values are in, in every layer: make room for the next."""
        self.tokens += 1
        capacity = self.rows[0][0].shape[1]
        if capacity == self.tokens < self.limit:
            capacity += max(ROOM, capacity // 8)
            for layer, (keys, values) in enumerate(self.rows):
                self.rows[layer] = (self._grown(keys, capacity), self._grown(values, capacity))

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows of these positions, int64 and ascending, alone."""
        before_BK = self.slot_BK[rows]
        asked = self.owner_B[rows].unique()
        self.owner_B = torch.searchsorted(asked, self.owner_B[rows])
        if len(asked) < len(self.lengths_P):
            self.lengths_P = self.lengths_P[asked]
            pairs = (asked[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=asked.device)).flatten()
            self.prompts = [(keys[pairs], values[pairs]) for keys, values in self.prompts]
        self._lay_out()
        source_Z = before_BK[self.row_Z, self.head_Z]
        for layer, (keys, values) in enumerate(self.rows):
            self.rows[layer] = (self._moved(keys, source_Z), self._moved(values, source_Z))

    def _lay_out(self) -> None:
        """Number the slots: slot_BK of each row and head; row_Z and head_Z of each slot, some row where it is over."""
        device, count = self.owner_B.device, len(self.lengths_P)
        sizes_P = self.owner_B.bincount(minlength=count)
        first_P = sizes_P.cumsum(0) - sizes_P
        largest = int(sizes_P.max())
        head_K, rank_G = torch.arange(self.kv_heads, device=device), torch.arange(largest, device=device)
        rank_B = torch.arange(len(self.owner_B), device=device) - first_P[self.owner_B]
        self.slot_BK = (self.owner_B[:, None] * self.kv_heads + head_K) * largest + rank_B[:, None]
        row_PG = first_P[:, None] + torch.minimum(rank_G, sizes_P[:, None] - 1)
        shape = (count, self.kv_heads, largest)
        self.row_Z = row_PG[:, None].expand(shape).flatten()
        self.head_Z = head_K[:, None].expand(shape).flatten()
        # Of each slot: its queries, its key and its value among the heads that `attend` is given.
        query_KQ = torch.arange(self.heads, device=device).view(self.kv_heads, -1)
        key_K1 = self.heads + head_K[:, None]
        self.heads_ZN = torch.cat((query_KQ, key_K1, key_K1 + self.kv_heads), dim=1)[self.head_Z]
        place_S = torch.arange(self.prompts[0][0].shape[1], device=device)
        bias_PS = torch.zeros(count, len(place_S), device=device)
        bias_PS.masked_fill_(place_S >= self.lengths_P[:, None], -torch.inf)
        self.bias = bias_PS.repeat_interleave(self.kv_heads, dim=0)[:, None]

    def _buffer(self, like: Tensor, capacity: int) -> Tensor:
        return like.new_empty(len(self.row_Z), min(capacity, self.limit), like.shape[-1])

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = self._buffer(old, capacity)
        new[:, : self.tokens] = old[:, : self.tokens]
        return new

    def _moved(self, buffer: Tensor, source_Z: Tensor) -> Tensor:
        """The buffer with the slots of `source_Z` in front, in place, and no others."""
        kept = buffer[source_Z, : self.tokens]
        buffer = buffer[: len(source_Z)]
        buffer[:, : self.tokens] = kept
        return buffer
