"""Packing: every token is predicted from its own prompt and its own completion, whatever shares its row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models as models
from retrain.backend import packing
from retrain.backend.packing import pack

CPU = torch.device("cpu")
PAD = 999

lengths = st.integers(1, 30)
ragged = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=6)), min_size=1, max_size=4)


def contexts(micro):
    """By token of the micro-batch: the (token, position) pairs that its predictor attends to."""
    width = micro.tokens_RS.shape[1]
    for at in micro.predictor_N.tolist():
        row, column = divmod(at, width)
        if micro.mask is None:
            visible = torch.arange(column + 1)
            positions = visible
        else:
            visible = micro.mask[row, 0, column].nonzero().squeeze(1)
            positions = micro.positions_RS[row, visible]
        yield list(zip(micro.tokens_RS[row, visible].tolist(), positions.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(shape=ragged, budget=st.sampled_from([1, 40, 100, 10_000]), share=st.booleans(), data=st.data())
def test_each_token_sees_its_prompt_and_its_completion_so_far_and_nothing_else(shape, budget, share, data):
    batch = models.random_batch(0, [p for p, _ in shape], [c for _, c in shape])
    members = data.draw(st.lists(st.sampled_from(range(len(batch.rollouts))), unique=True, min_size=1))
    micros = pack(batch, members, budget=budget, share_prompts=share, pad_id=PAD, device=CPU)
    assert sorted(i for micro in micros for i in micro.members) == sorted(members)
    for micro in micros:
        rollouts = [batch.rollouts[i] for i in micro.members]
        expected = [
            list(zip(seen, range(len(seen)), strict=True))
            for rollout in rollouts
            for t in range(len(rollout.tokens_T))
            for seen in [[*batch.prompts[rollout.group].tolist(), *rollout.tokens_T[:t].tolist()]]
        ]
        assert list(contexts(micro)) == expected
        assert micro.targets_N.tolist() == np.concatenate([r.tokens_T for r in rollouts]).tolist()
        assert micro.planning_N.tolist() == np.concatenate([r.planning_T for r in rollouts]).tolist()
        np.testing.assert_array_equal(micro.sampler_logprob_N, np.concatenate([r.logprobs_T for r in rollouts]))
        assert micro.advantages_B.tolist() == [np.float32(r.advantage) for r in rollouts]
        assert micro.cu_seqlens.tolist() == [0, *np.cumsum([len(r.tokens_T) for r in rollouts])]
        one_rollout = len(micro.members) == 1
        assert micro.tokens_RS.numel() <= budget or one_rollout


@settings(max_examples=100, deadline=None)
@given(prompt=st.integers(1, 3000), completions=st.integers(1, 20_000))
def test_the_number_of_rows_costs_about_the_least(prompt, completions):
    def cost(rows):
        return rows * (prompt + completions / rows) ** 2 + packing.TOKEN_COST * (rows * prompt + completions)

    chosen = packing._row_count(prompt, completions)
    assert cost(chosen) <= 1.03 * min(map(cost, range(1, 200)))


def test_completions_spread_evenly_over_the_rows_of_a_group():
    batch = models.random_batch(0, [12], [[30] * 16])
    (micro,) = pack(batch, range(16), budget=10_000, share_prompts=True, pad_id=PAD, device=CPU)
    rows, width = micro.tokens_RS.shape
    assert 1 < rows < 8 and width <= 12 + 30 * -(-16 // rows)
    assert (micro.tokens_RS[:, :12] == torch.from_numpy(batch.prompts[0])).all()


def test_rows_of_very_different_width_are_not_padded_together():
    batch = models.random_batch(0, [5] * 12, [[4]] * 10 + [[150], [160]])
    shapes = [
        tuple(micro.tokens_RS.shape)
        for micro in pack(batch, range(12), budget=10_000, share_prompts=False, pad_id=PAD, device=CPU)
    ]
    assert shapes == [(10, 9), (2, 165)]


@pytest.mark.parametrize("share", [True, False])
def test_order_within_a_micro_batch_does_not_depend_on_the_order_asked_for(share):
    batch = models.random_batch(0, [5, 9], [[3, 8, 2], [7, 1, 4]])
    asked = [pack(batch, m, budget=30, share_prompts=share, pad_id=PAD, device=CPU) for m in (range(6), range(6))]
    assert [m.members for m in asked[0]] == [m.members for m in asked[1]]
