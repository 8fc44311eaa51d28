"""The KV cache of a decoding batch, against attention computed row by row in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.inference import cache
from retrain.inference.cache import GroupCache

SCALE = 0.37


@st.composite
def scenes(draw):
    """Prompt lengths, rows of each, heads, head size, and after each step whether and which rows leave."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    size, kv_heads, queries = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    leave = draw(st.lists(st.lists(st.integers(0, 15), max_size=3), min_size=1, max_size=8))
    return lengths, size, kv_heads, queries, draw(st.sampled_from([4, 6])), leave


def attention(query, keys, values):
    """query [D], keys and values [n, D], all float64."""
    scores = keys @ query * SCALE
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@settings(deadline=None)
@given(scene=scenes(), seed=st.integers(0, 2**32 - 1), room=st.integers(1, 5))
def test_every_row_attends_to_its_prompt_and_to_itself(scene, seed, room):
    lengths, size, kv_heads, queries, dim, leave = scene
    rng = np.random.default_rng(seed)
    width, layers = max(lengths), 2
    prompts = rng.standard_normal((layers, 2, len(lengths), kv_heads, width, dim)).astype(np.float32)
    for p, length in enumerate(lengths):
        prompts[:, :, p, :, length:] = 1e30  # padding that must not be seen
    heads = queries * kv_heads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ROOM", room)
        pairs = [(torch.from_numpy(k), torch.from_numpy(v)) for k, v in prompts]
        own = GroupCache(pairs, torch.tensor(lengths), size, len(leave), heads)
        alive = [(p, [[], []]) for p in range(len(lengths)) for _ in range(size)]
        for gone in leave:
            for layer in range(layers):
                new = rng.standard_normal((len(alive), heads + 2 * kv_heads, dim)).astype(np.float32)
                got = own.attend(layer, torch.from_numpy(new), SCALE).view(len(alive), heads, dim)
                for row, (p, history) in enumerate(alive):
                    history[layer].append(new[row, heads:].reshape(2, kv_heads, dim).astype(np.float64))
                    for head in range(heads):
                        kv = head // queries
                        before = prompts[layer, :, p, kv, : lengths[p]].astype(np.float64)
                        after = np.stack([step[:, kv] for step in history[layer]], axis=1)
                        keys, values = np.concatenate((before, after), axis=1)
                        want = attention(new[row, head].astype(np.float64), keys, values)
                        np.testing.assert_allclose(got[row, head].numpy(), want, rtol=0, atol=2e-5)
            own.advance()
            stay = [row for row in range(len(alive)) if row not in gone]
            if stay and len(stay) < len(alive):
                own.keep(torch.tensor(stay))
                alive = [alive[row] for row in stay]


def test_a_prompt_is_kept_once_and_room_is_made_as_it_is_needed():
    prompt = torch.zeros(3, 2, 50, 8)
    own = GroupCache([(prompt, prompt)], torch.tensor([50, 50, 50]), 16, 1000, 4)
    assert [keys.shape for keys, _ in own.prompts] == [(6, 50, 8)]
    assert own.rows[0][0].shape == (96, cache.ROOM, 8)
    for _ in range(200):
        own.advance()
        held = own.rows[0][0].shape[1]
        assert own.tokens < held <= own.tokens + max(cache.ROOM, held // 8)
    own.keep(torch.tensor([0, 1, 40]))
    assert own.prompts[0][0].shape == (4, 50, 8)
    assert own.rows[0][0].shape[0] == 2 * 2 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_narrow_cache_holds_rounded_keys_and_values_and_computes_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(2, 1, 2, 5, 8, generator=generator).to(dtype)
    new = torch.randn(3, 1, 8, 8, generator=generator)
    narrow = GroupCache([(prompt[0], prompt[1])], torch.tensor([5]), 1, 3, 4)
    wide = GroupCache([(prompt[0].float(), prompt[1].float())], torch.tensor([5]), 1, 3, 4)
    for qkv in new:
        rounded = torch.cat((qkv[:, :4], qkv[:, 4:].to(dtype).float()), dim=1)
        torch.testing.assert_close(narrow.attend(0, qkv, SCALE), wide.attend(0, rounded, SCALE))
        narrow.advance()
        wide.advance()
    assert {part.dtype for part in (*narrow.rows[0], *narrow.prompts[0])} == {dtype}
