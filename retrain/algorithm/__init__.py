"""What is computed between a reward and a gradient: pure functions, no state but the SEPA controller's.

episode.py      episode advantages of scored groups
transform.py    token-level credit from episode advantages
uncertainty.py  the per-token uncertainty that credit is weighted by
sepa.py         the schedule of SEPA's lambda
overlong.py     DAPO's soft penalty on long completions
mismatch.py     weights that correct for a sampler that disagrees with the trainer
schedule.py     the learning rate of a step

This module imports nothing, so that the schedule and the penalty can be had without torch.
"""
