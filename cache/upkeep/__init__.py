"""Upkeep of stores that are there: verify and repair, clear up, measure, hand out to other tools."""
