"""What every registry asks of what is put into it."""

from typing import Any

import pytest

from sae.pipeline.analyses import analysis
from sae.pipeline.declared.importing import enter, in_files
from sae.pipeline.formats import base as formats
from sae.pipeline.harvest.sources import base as sources
from sae.pipeline.metrics import metric
from sae.pipeline.saes import base as saes
from sae.pipeline.studies import study


@pytest.mark.parametrize(
    ("what", "module", "registry"),
    [
        ("analysis", analysis, analysis.ANALYSES), ("study", study, study.STUDIES),
        ("format", formats, formats.FORMATS), ("source", sources, sources.SOURCES),
        ("architecture", saes, saes.ARCHITECTURES),
        ("metric", metric, metric.METRICS),
    ],
)  # fmt: skip
def test_a_name_is_taken_once(what: str, module: Any, registry: dict[str, Any]) -> None:
    name, one = next(iter(in_files(module.__package__, registry).items()))
    with pytest.raises(ValueError, match=f"^{what} {name}: there is one of that name$"):
        module.register(one if isinstance(one, type) else type(one))
    assert registry[name] is one


def test_a_registry_is_in_order() -> None:
    registry = {"b": 1}
    enter(registry, "number", "a", 2)
    assert [*in_files("sae.pipeline.declared", registry).items()] == [("a", 2), ("b", 1)]
