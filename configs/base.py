"""The class that every settings class descends from."""

import functools
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sae.cache.errors import SaeError
from sae.configs.problems import Origins, explained

WHOLE = 2**63  # whole numbers are smaller: they go into files and generators of random numbers
MOST = 10**9  # of what makes one side of a table in memory: two of them have a size that can be counted
REAL = 1e30  # so are others, and the inverses of small ones: float32 ends at 3e38
Item = TypeVar("Item")
Amount = Annotated[int, Field(ge=1)] | Literal["all"]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _OneLine
else:

    class _OneLine(type(BaseModel)):
        """The class of settings classes: what a program gives wrongly is refused in one line, as what a file says."""

        def __call__(cls, *args: Any, **given: Any) -> Any:
            try:
                return super().__call__(*args, **given)
            except ValidationError as error:
                raise SaeError(explained(cls, error, Origins(cls.__name__.removesuffix("Config"), [], {}))) from error


class Settings(BaseModel, metaclass=_OneLine):
    """Settings. Unknown keys, empty words and numbers that are none, or out of any sense, are refused.

    A call of the class raises SaeError for such; `model_validate`, which reads files, pydantic's ValidationError.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()  # one of them takes the place of what lower layers say
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """Take true for a word where no yes or no is asked for; pydantic would take it for 1."""
        if not isinstance(values, dict):
            return values
        asked = _yes_or_no(cls)
        return {name: value if name in asked else _worded(value) for name, value in values.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _of_some_sense(cls, value: Any) -> Any:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) >= WHOLE:
                raise ValueError("input should fit into 64 bits")
            if isinstance(item, float) and item and not 1 / REAL <= abs(item) <= REAL:
                raise ValueError(f"input should be 0, or between {1 / REAL:g} and {REAL:g}")
        return value


@functools.cache
def _yes_or_no(kind: type[BaseModel]) -> frozenset[str]:
    """Names of the settings of a class that may be true or false."""
    return frozenset(name for name, field in kind.model_fields.items() if bool in _types(field.annotation))


def _worded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_worded(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


def _types(annotation: Any) -> set[Any]:
    """The plain types in an annotation."""
    inner = get_args(annotation)
    return {kind for one in inner for kind in _types(one)} if inner else {annotation}


def distinct(items: tuple[Item, ...]) -> tuple[Item, ...]:
    twice = next((item for i, item in enumerate(items) if item in items[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice")
    return items


Distinct = AfterValidator(distinct)
"""Of a list: nothing stands in it twice."""
