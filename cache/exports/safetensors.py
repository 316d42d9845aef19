"""Shards that can be mapped: rows-00000.safetensors has `rows` [n, d], `position` [n] and, where asked, `token` [n]."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from safetensors.torch import save_file

from .base import Export, Part, Writer


class Rows(Writer):
    """A file for a quarter of a gigabyte of rows."""

    made: ClassVar[re.Pattern[str]] = re.compile(r"rows-\d{5}\.safetensors")

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._shard = 0

    def add(self, part: Part) -> None:
        tensors = {"rows": part.rows.contiguous(), "position": torch.from_numpy(part.positions)}
        if part.tokens is not None:
            tensors["token"] = torch.from_numpy(part.tokens)
        save_file(tensors, self.export.folder / f"rows-{self._shard:05}.safetensors")
        self._shard += 1
