"""Settings of an architecture that can be sparse in one of several ways, each with settings of its own."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import model_validator

from .config import Config


class WaysConfig(Config):
    """Settings of which `sparsity` says those that count: where it is not given, the first way whose settings are."""

    ways: ClassVar[dict[str, type[Config]]]
    """By what `sparsity` says, the settings of that way, of which those that are not common to all are its own."""

    sparsity: str

    @model_validator(mode="before")
    @classmethod
    def _the_way_that_is_meant(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "sparsity" in given:
            return given
        named = {name for name in given if any(name in cls._own(way) for way in cls.ways)}
        fitting = [way for way in cls.ways if named and named <= cls._own(way)]
        return given | ({"sparsity": fitting[0]} if fitting else {})

    @model_validator(mode="after")
    def _nothing_idle_is_said(self) -> Self:
        for name in sorted(self.idle):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                meant = " or ".join(way for way in self.ways if name in self._own(way))
                raise ValueError(f"{name}: {value} counts for nothing with sparsity: {self.sparsity}; take {meant}")
        return self

    @property
    def idle(self) -> frozenset[str]:
        every = {name for way in self.ways for name in self._own(way)}
        return frozenset(every - self._own(self.sparsity))

    @classmethod
    def _own(cls, way: str) -> set[str]:
        return {*cls.ways[way].model_fields} - {*Config.model_fields}

    def of_the_way(self, **changes: Any) -> Config:
        """The settings of the way alone, for the architecture that has only it."""
        kind = self.ways[self.sparsity]
        said = {name: getattr(self, name) for name in kind.model_fields if name != "arch"}
        return kind.model_validate(said | changes)
