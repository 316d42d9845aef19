"""A legal value other than the default for every field of a settings class, and what it takes beside it to be legal."""

import itertools
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

Values = dict[str, Any]


def other_values(model: type[BaseModel]) -> dict[str, Values]:
    """For every field but the tags: settings in which it is not its default, as plain data."""
    schema = model.model_json_schema()
    candidates = {name: list(_candidates(field, schema)) for name, field in schema["properties"].items()}
    tags = {name for name, field in schema["properties"].items() if "const" in field}
    return {name: _legal(model, name, candidates) for name in candidates if name not in tags}


def _legal(model: type[BaseModel], name: str, candidates: dict[str, list[Any]]) -> Values:
    default = model.model_fields[name].get_default(call_default_factory=True)
    others = [{key: value} for key, values in candidates.items() if key != name for value in values]
    for beside in itertools.chain([()], itertools.combinations(others, 1), itertools.combinations(others, 2)):
        for value in candidates[name]:
            values: Values = {name: value}
            for one in beside:
                values = {**one, **values}
            try:
                if getattr(model.model_validate(values), name) != default:
                    return values
            except ValidationError:
                continue
    raise AssertionError(f"{model.__name__}.{name}: no legal value but the default among {candidates[name]}")


def _candidates(field: Values, schema: Values) -> Iterator[Any]:
    """Values of a JSON schema's field."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    for key in ("anyOf", "allOf", "oneOf"):
        for one in field.get(key, ()):
            yield from _candidates(one, schema)
    yield from field.get("enum", ())
    match field.get("type"):
        case "boolean":
            yield from (True, False)
        case "integer":
            yield from (7, 2, 1, 65)
        case "number":
            yield from (0.25, 2.5, 0.001)
        case "string" if "enum" not in field and "const" not in field:
            yield from ("bfloat16", "abc")
        case "array" if "prefixItems" in field:
            first, *others = (list(_candidates(item, schema)) for item in field["prefixItems"])
            yield from ([value, *(other[-1] for other in others)] for value in first)
        case "array":
            for value in _candidates(field["items"], schema):
                yield [value]
        case "object" if "properties" in field:
            tag = {name: inner["const"] for name, inner in field["properties"].items() if "const" in inner}
            yield tag
            for name, inner in field["properties"].items():
                for value in [] if name in tag else _candidates(inner, schema):
                    yield {**tag, name: value}
