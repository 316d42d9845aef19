"""The places where a stage looks for what stores are made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origins:
    """The places of what stores are made of, as far as the user says; None: where their makers found it.

    `loaded` holds language models by their canonical recipe, so that several stores of one model load it once.
    """

    root: Path
    tokens: str | None = None
    model: str | None = None
    source: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    offline: bool = False
    loaded: dict[str, Any] = field(default_factory=dict)
