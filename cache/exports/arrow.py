"""A Hugging Face dataset on disk (`datasets.load_from_disk`), in the layout that SAELens trains from.

A record is RECORD rows: the column that is named as the hook point, an Array2D (RECORD, d), with `position` and,
where asked, `token_ids` beside it, each [RECORD]. SAELens reads it by `use_cached_activations=True`,
`cached_activations_path` and `context_size=128`. Rows beyond the last whole record are left out.
"""

from __future__ import annotations

import json
import re
from typing import ClassVar

from sae.cache.disk.durable import write_in
from sae.cache.errors import SaeError

from .base import ABOUT, Export, Part, Writer

RECORD = 128  # rows of a record, the `context_size` of SAELens


class Rows(Writer):
    """A file for about a quarter of a gigabyte of rows."""

    made: ClassVar[re.Pattern[str]] = re.compile(r"data-\d{5}\.arrow|(?:state|dataset_info)\.json(?:\..*)?")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, export: Export) -> None:
        from datasets import Array2D, Features, Sequence, Value

        if export.n < RECORD:
            raise SaeError(f"format = arrow: a record is {RECORD} rows, and there are {export.n}; take another format")
        n = export.n // RECORD * RECORD
        super().__init__(export._replace(n=n, about=export.about | {"rows": n, "rows_a_record": RECORD}))
        self._features = Features({
            export.hook: Array2D((RECORD, export.d), export.dtype), "position": Sequence(Value("int64"), length=RECORD),
            "token_ids": Sequence(Value("int32"), length=RECORD),
        })  # fmt: skip
        self._files: list[str] = []

    @property
    def size(self) -> int:
        return max(RECORD, super().size // RECORD * RECORD)

    def add(self, part: Part) -> None:
        from datasets.arrow_writer import ArrowWriter

        count = len(part.positions) // RECORD
        if not count:
            return
        if part.tokens is None:
            self._features.pop("token_ids", None)
        columns = {self.export.hook: part.rows.numpy(), "position": part.positions, "token_ids": part.tokens}
        name = f"data-{len(self._files):05}.arrow"
        with ArrowWriter(features=self._features, path=str(self.export.folder / name)) as writer:
            writer.write_batch({
                key: values[: count * RECORD].reshape(count, RECORD, *values.shape[1:])
                for key, values in columns.items()
                if values is not None
            })  # fmt: skip
            writer.finalize()
        self._files.append(name)

    def close(self) -> None:
        from datasets import DatasetInfo

        DatasetInfo(features=self._features).write_to_directory(str(self.export.folder))
        state = {
            "_data_files": [{"filename": name} for name in self._files], "_fingerprint": self.export.about["store"],
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
            "_split": None,
        }  # fmt: skip
        write_in(self.export.folder, "state.json", json.dumps(state).encode())
        write_in(self.export.folder, ABOUT, json.dumps(self.export.about, indent=2).encode())
