"""What can be typed after `sae`, by what it is for. Each command opens what it needs, calls one stage, and prints.

Heavy imports happen inside the commands; `cli` puts them together.
"""
