"""Campaigns: every condition with every seed, compared in pairs.

run.py         a campaign from its config to its report: `run_campaign`
folder.py      the folder: anew or continued, who may;  manifest.py  what it says of itself and its runs
placement.py   how many runs at a time, on which devices;  schedule.py  starting, watching and stopping them
local.py       runs as processes of this machine;  ray.py  on a Ray cluster
squeeze.py     the rank analysis of the first finished run's adapter
results.py     results.json from the runs' records;  statistics.py  intervals and tests;  table.py  as text
view.py        the terminal

Which runs there are is `retrain.config.campaign`'s matter. Imports nothing here, and no torch anywhere: each run is a
process of its own.
"""
