"""The commands of `sae`, a file each. A command opens what it needs, calls one stage, and prints.

Heavy imports happen inside the commands; `cli` puts them together.
"""
