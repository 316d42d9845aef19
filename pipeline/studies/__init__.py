"""Questions asked of many dictionaries at once: a file each, found by being there; `study` says how one is written.

A study is a composition of stages: `lab` opens the runs, trains what is not finished and judges what is not judged
(`results`); `tables` writes what was found. Runs are named by their settings, so whatever was done is taken up, by
another study as well.
"""
