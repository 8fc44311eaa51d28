"""Kills, damages and starves the real command, and compares what comes out of it with a run that was left alone.

faults.py        inside the process under test: counts its write points, and ends it at one of them
command.py       runs the command, in a fork of this process or in a fresh one, and does what its messages advise
compare.py       two run folders, bit for bit
kills.py         killed at every write point and at random moments
damage.py        every file of a run, damaged in every way
surroundings.py  full disk, read-only folder, two processes, jumping clock, changed configs, forks

`python -m scripts.torture --help`
"""
