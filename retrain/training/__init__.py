"""The training loop and the run folder it writes.

run.py          a run from its config to its end: `train`;  start.py  anew, or from a checkpoint
loop.py         the loop
collect.py      prompts -> scored groups;  batching.py  scored groups -> batch
evaluate.py     pass@k;  heldout.py  on held-out examples, in a run or of an adapter
checkpoint.py   what a run can go on from;  durable.py  writes that survive a crash
folder.py       the run folder;  metrics.py, metadata.py, records.py  what is in it;  extent.py  how much is vouched for

Imports nothing here, so that a run folder can be read without torch.
"""
