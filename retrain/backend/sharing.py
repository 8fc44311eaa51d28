"""Which rank trains on which rollouts of a batch."""

from __future__ import annotations

from retrain.types import Batch


def shares(batch: Batch, ranks: int, *, share_prompts: bool) -> list[frozenset[int]]:
    """Positions in `batch.rollouts` for each rank, which together are all, each once: the same wherever it is computed.

    A group stays together, so that its prompt is computed once. The largest goes first, to the rank that has least; so
    no rank has more than the mean and one group. A rank may be left without any.

    share_prompts: whether a prompt is computed once for its group.
    """
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(batch.rollouts):
        groups.setdefault(rollout.group, []).append(i)
    tokens = {
        group: sum(len(batch.rollouts[i].tokens_T) for i in members)
        + len(batch.prompts[group]) * (1 if share_prompts else len(members))
        for group, members in groups.items()
    }
    loads = [0] * ranks
    found: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=lambda group: (-tokens[group], group)):
        rank = loads.index(min(loads))
        loads[rank] += tokens[group]
        found[rank] += groups[group]
    return [frozenset(members) for members in found]
