"""Where else a training's figures go: one file a service, found by being there.

`metrics.jsonl` is written whatever is logged elsewhere, and what is logged elsewhere is what is written there. A run
folder keeps which loggers were asked for (`loggers.json`), so a resumed run goes on in the same place without asking.
"""
