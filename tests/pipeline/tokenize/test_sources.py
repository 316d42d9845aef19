"""Sources of text: what they yield, that they resume exactly, what they refuse and how they say it."""

import csv
import gzip
import io
import itertools
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.cache.errors import SaeError
from sae.pipeline.runtime import network
from sae.pipeline.tokenize.sources import (
    TextSource,
    formats,
    hub,
    is_validation,
    lines,
    python_library,
    registered,
    row_groups,
    text_source,
)
from sae.pipeline.tokenize.sources.base import well_formed
from sae.pipeline.tokenize.sources.opened import File

TEXTS = [
    "one",
    "two\nlines\n",
    "drei \u00fc",
    "\u56db",
    " five ",
    "6",
    "a \u2028 b",
    "x" * 3000,
    "tab\there",
    "\U0001f600",
]


def source(spec: object, **options: Any) -> TextSource:
    return text_source(str(spec), offline=True, **options)


def refused(spec: object, **options: Any) -> str:
    """The message of the SaeError that reading `spec` to its end ends with; always one line."""
    with pytest.raises(SaeError) as caught:
        list(source(spec, **options).open())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("source = ")
    return message


# How to write the same documents in every format.


def _lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": t}).encode() + b"\n" for i, t in enumerate(texts))


def _array(texts: list[str]) -> bytes:
    return json.dumps([{"text": t} for t in texts], indent=1, ensure_ascii=False).encode()


def _separated(texts: list[str]) -> bytes:
    return "".join(t + "\n<|endoftext|>\n" for t in texts).encode()


def _parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(
        pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path, row_group_size=3
    )


def _csv(texts: list[str], delimiter: str = ",") -> bytes:
    held = io.StringIO()
    rows = csv.writer(held, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    rows.writerows([["n", "text"], *enumerate(texts)])
    return held.getvalue().encode()


def _arrow(path: Path, texts: list[str], form: Callable[..., Any] = pa.ipc.new_stream) -> None:
    table = pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    with form(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.parquet": _parquet,
    "a.jsonl": lambda path, texts: path.write_bytes(_lines(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(_lines(texts))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(
        # two frames, as parallel compressors write them
        zstandard.compress(_lines(texts)[:50]) + zstandard.compress(_lines(texts)[50:])
    ),
    "a.json": lambda path, texts: path.write_bytes(_array(texts)),
    "lines.json": lambda path, texts: path.write_bytes(_lines(texts)),
    "bom.json": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf\n " + _array(texts)),
    "a.arrow": _arrow,
    "file.arrow": lambda path, texts: _arrow(path, texts, pa.ipc.new_file),
    "a.csv": lambda path, texts: path.write_bytes(_csv(texts)),
    "a.csv.gz": lambda path, texts: path.write_bytes(gzip.compress(_csv(texts))),
    "a.csv.zst": lambda path, texts: path.write_bytes(zstandard.compress(_csv(texts))),
    "a.tsv": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf" + _csv(texts, "\t")),
    "a.txt": lambda path, texts: path.write_bytes(_separated(texts)),
    "a.txt.gz": lambda path, texts: path.write_bytes(gzip.compress(_separated(texts))),
    "a.txt.zst": lambda path, texts: path.write_bytes(zstandard.compress(_separated(texts))),
}


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    WRITERS[request.param](path, TEXTS)
    return path


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("shared")


class TestFiles:
    def test_yields_the_documents_in_order(self, written: Path) -> None:
        assert list(source(written).open()) == TEXTS

    def test_resumes_from_every_place(self, written: Path) -> None:
        assert_resumes(source(written))

    def test_resumes_across_files_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name, texts in [
            ("b.jsonl", TEXTS[:3]),
            ("a.jsonl", TEXTS[3:5]),
            ("sub/c.jsonl", TEXTS[5:]),
            ("0.jsonl", []),
        ]:
            (tmp_path / name).write_bytes(_lines(texts))
        (tmp_path / "README.md").write_text("not data")
        found = source(tmp_path)
        assert list(found.open()) == TEXTS[3:5] + TEXTS[:3] + TEXTS[5:]
        assert_resumes(found)

    def test_a_glob_and_a_folder_of_one_kind(self, tmp_path: Path) -> None:
        for i, text in enumerate(["zero", "one", "two"]):
            (tmp_path / f"part-{i}.txt").write_text(text)
        (tmp_path / "other.json").write_text("[]")
        found = source(tmp_path / "part-*.txt")
        assert list(found.open()) == ["zero", "one", "two"]
        assert found.slug == "part"
        assert [file["name"] for file in found.recipe()["files"]] == ["part-0.txt", "part-1.txt", "part-2.txt"]
        assert ".json and .txt" in refused(tmp_path)

    def test_plain_text_without_separators_is_one_document_exactly(self, tmp_path: Path) -> None:
        text = "a line\r\n\n  <|endoftext|> inside a line\n"
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert list(source(tmp_path / "a.txt").open()) == [text]

    @given(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), min_size=1, max_size=8)
    )
    @settings(max_examples=25, deadline=None)
    def test_separated_text_round_trips(self, shared_tmp: Path, texts: list[str]) -> None:
        path = shared_tmp / "a.txt"
        path.write_bytes("\n<|endoftext|>\n".join(["", *texts, "last"]).encode())
        texts = [*texts, "last"]
        assert list(source(path).open()) == [t for t in texts if t != "<|endoftext|>"]

    @given(st.lists(st.text(), max_size=12), st.integers(1, 40))
    @settings(max_examples=40, deadline=None)
    def test_an_array_is_parsed_through_a_buffer_of_any_size(
        self, shared_tmp: Path, texts: list[str], size: int
    ) -> None:
        path = shared_tmp / "a.json"
        path.write_text(json.dumps([{"n": [1, {"x": None}], "text": t} for t in texts]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "READ", size)
            assert [text for text, _ in formats.read(File("a.json", path), 0, "text")] == texts

    def test_null_and_empty_records_are_left_out(self, tmp_path: Path) -> None:
        records = [{"text": None}, {"text": "a"}, {"text": ""}, {"text": "b"}, {"text": None}]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
        _parquet(tmp_path / "a.parquet", [r["text"] for r in records])  # type: ignore[misc]
        for name in ("a.jsonl", "a.parquet"):
            assert list(source(tmp_path / name).open()) == ["a", "b"]
            assert_resumes(source(tmp_path / name))

    def test_one_object_over_several_lines_and_bare_strings(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps({"text": "whole", "more": [1]}, indent=2))
        (tmp_path / "b.jsonl").write_text('"x"\n"y"\n')
        assert list(source(tmp_path / "a.json").open()) == ["whole"]
        assert_resumes(source(tmp_path / "a.json"))
        assert list(source(tmp_path / "b.jsonl").open()) == ["x", "y"]

    def test_lone_surrogates_become_replacement_characters(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
        assert list(source(tmp_path / "a.jsonl").open()) == ["x\ufffdy"]

    def test_another_column(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "b", "n": 1}\n')
        assert list(source(tmp_path / "a.jsonl", column="body").open()) == ["b"]
        assert "body, n" in refused(tmp_path / "a.jsonl")
        assert "holds int" in refused(tmp_path / "a.jsonl", column="n")
        assert source(tmp_path / "a.jsonl", column="n").recipe() != source(tmp_path / "a.jsonl").recipe()

    def test_a_missing_parquet_column_lists_those_there_are(self, tmp_path: Path) -> None:
        _parquet(tmp_path / "a.parquet", ["x"])
        assert "n, text" in refused(tmp_path / "a.parquet", column="body")

    def test_the_recipe_follows_content_and_not_place(self, tmp_path: Path) -> None:
        for folder in ("here", "there", "changed"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text("text" if folder != "changed" else "texT")
        here, there, changed = (source(tmp_path / f / "a.txt").recipe() for f in ("here", "there", "changed"))
        assert here == there != changed
        assert str(tmp_path) not in json.dumps(here)

    def test_memory_does_not_grow_with_the_file(self, tmp_path: Path) -> None:
        """Reading 9 MB of records takes a few MB, array or lines."""
        import tracemalloc

        record = {"text": "x" * 3000}
        (tmp_path / "a.json").write_text("[" + ",".join([json.dumps(record)] * 3_000) + "]")
        (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 3_000)
        for name in ("a.json", "a.jsonl"):
            next(source(tmp_path / name).open())  # what is imported on first use is not the reader's memory
            tracemalloc.start()
            count = sum(1 for _ in source(tmp_path / name).open())
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert count == 3_000
            assert peak < 6e6

    def test_real_text(self, shared_data: Path) -> None:
        found = source(shared_data / "text" / "openwebtext_1000.parquet")
        documents = list(found.open())
        assert len(documents) == 1000
        assert found.slug == "openwebtext_1000"
        assert_resumes(found, places=[0, 1, 255, 256, 257, 999, 1000])


def assert_resumes(found: TextSource, places: list[int] | None = None) -> None:
    """From every place (or those named), through JSON, a new stream gives exactly the rest; asking does not disturb."""
    expected = list(found.open())
    for n in places if places is not None else range(len(expected) + 1):
        stream = found.open()
        assert list(itertools.islice(stream, n)) == expected[:n]
        state = json.loads(json.dumps(stream.state()))
        rest = found.open(state)
        assert json.loads(json.dumps(rest.state())) == state
        assert list(rest) == expected[n:]
        assert list(stream) == expected[n:]


class TestRefusals:
    def test_what_is_not_there(self, tmp_path: Path) -> None:
        assert "no such file" in refused(tmp_path / "missing.parquet")
        assert "no file matches" in refused(tmp_path / "*.txt")
        assert "in this folder" in refused(tmp_path)
        assert "not a source" in refused("nonsense")
        assert "empty" in refused("")

    def test_what_is_of_no_known_kind(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_bytes(b"%PDF")
        assert "a.pdf is not parquet" in refused(tmp_path / "a.pdf")

    def test_what_is_empty(self, tmp_path: Path) -> None:
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_bytes(b"")
            assert "holds no text" in refused(tmp_path / name)
        _parquet(tmp_path / "a.parquet", [])
        assert "holds no text" in refused(tmp_path / "a.parquet")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
    def test_what_is_not_utf8(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b'["caf\xe9"]' if name == "a.json" else b'"ok"\n"caf\xe9"\n')
        message = refused(tmp_path / name)
        assert "not UTF-8" in message
        assert "iconv" in message
        if name != "a.json":
            assert "0xe9 at offset 9" in message

    @pytest.mark.parametrize("name", sorted(WRITERS))
    def test_a_truncated_file_is_an_error_or_still_whole_documents(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        WRITERS[name](path, TEXTS)
        path.write_bytes(path.read_bytes()[:-7])
        if name == "a.txt":  # nothing in plain text says where it ends
            assert list(source(path).open())[:-1] == TEXTS[:-1]
        else:
            refused(path)

    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.jsonl"])
    def test_what_is_not_what_its_name_says(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"this is nothing of the kind\n" * 3)
        refused(tmp_path / name)

    def test_records_that_are_not_records(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("[1, 2]\n")
        assert "JSON list" in refused(tmp_path / "a.jsonl")

    def test_a_bad_array_is_not_read_to_its_end_first(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": oops}, ' + '{"text": "b"},' * 1000 + "]")
        assert "element 1" in refused(tmp_path / "a.json")

    def test_a_file_one_may_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("x")

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
        assert "Permission denied" in refused(tmp_path / "a.txt")
        with pytest.raises(SaeError, match="Permission denied"):
            source(tmp_path / "a.txt").recipe()


ODD = {
    "digits.jsonl": b'{"text": "fine", "n": %s}\n' % (b"1" * 5000),
    "digits.json": b'[{"text": "fine", "n": -%s}]' % (b"1" * 5000),
    "whole.json": b'{"text": "fine",\n"n": %s}' % (b"1" * 5000),
    "numbers.jsonl": b'{"a": NaN, "b": 1e999, "c": -Infinity, "text": "fine"}\n',
    "twice.jsonl": b'{"text": "first", "text": "fine"}\n',
    "marks.csv": b'n,text\r\n\r\n"1","fine"\r\n\r\n',
    "nested.jsonl": b'{"text": "fine", "x": %s}\n' % (b"[" * 300 + b"]" * 300),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_beside_the_text_is_no_matter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ODD[name])
    assert list(source(tmp_path / name).open()) == ["fine"]


REFUSED = {
    "deep.jsonl": (
        b'{"text": "fine"}\n{"text": %s}\n' % (b"[" * 100_000),
        "nested too deeply in the line at offset 17",
    ),
    "deep.json": (b'[{"text": "fine"}, {"text": %s}]' % (b"[" * 100_000), "nested too deeply in element 1"),
    "wide.json": (b'{"text":\n%s' % (b"[" * 100_000), "nested too deeply in the whole file"),
    "first.json": (b"{" + b'"a":{' * 100_000, "nested too deeply in the line at offset 0"),
    "number.jsonl": (b'{"text": %s}' % (b"1" * 5000), "holds float (the line at offset 0), neither text nor token ids"),
    "negative.jsonl": (b'{"text": [1, -2]}', "holds -2 (the line at offset 0), which is not a token id"),
    "large.jsonl": (b'{"text": [1, 4294967296]}', "holds 4294967296 (the line at offset 0), which is not a token id"),
    "mixed.jsonl": (b'{"text": [1, 2.5, true]}', "holds list of bool and float and int (the line at offset 0)"),
    "words.jsonl": (b'{"text": ["a", "b"]}', "holds list of str"),
    "inside.jsonl": (b'{"text": {"a": "b"}}', "holds dict"),
    "wide.txt": ("a text".encode("utf-16"), "iconv -f utf-16"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "iconv -f utf-16"),
    "wide.csv": ("text\nb".encode("utf-16"), "iconv -f utf-16"),
    "open.csv": (b'n,text\n1,"never closed\n2,b\n', "not CSV in the row at offset 7: unexpected end of data"),
    "quoted.csv": (b'text\n"a"b\n', "not CSV in the row at offset 5"),
    "short.csv": (b"n,text\n1,a\n2\n", "the row at offset 11 has 1 fields, the first row of the file 2"),
    "double.csv": (b"text,text\n1,a\n", "has 2 columns 'text'"),
    "other.csv": (b"n;text\n1;a\n", "no column 'text'; it has n;text"),
    "latin.csv": (b"text\ncaf\xe9\n", "byte 0xe9 at offset 8"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "empty.arrow": (b"", "damaged, or not what its name says"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_a_string_column_of_other_bytes_and_a_column_of_no_text(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")]
    )
    pq.write_table(pa.table({"text": bad, "when": pa.array([1, 2], pa.timestamp("ns"))}), tmp_path / "a.parquet")
    assert "not UTF-8 text (rows 0 to 1)" in refused(tmp_path / "a.parquet")
    assert "'when' holds timestamp[ns], neither text nor token ids" in refused(tmp_path / "a.parquet", column="when")


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), min_size=1, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_csv_gives_back_what_was_written_and_resumes(shared_tmp: Path, texts: list[str], tabs: bool) -> None:
    path = shared_tmp / ("a.tsv" if tabs else "a.csv")
    path.write_bytes(_csv(texts, "\t" if tabs else ","))
    assert list(source(path).open()) == texts
    assert_resumes(source(path))


class TestFields:
    @pytest.fixture(params=["a.jsonl", "a.parquet", "a.arrow", "a.json"])
    def nested(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """Records whose text lies two names deep, beside one that has a full stop in its name."""
        rows = [
            {"doc": {"n": i, "of": {"text": f"t{i}"} if i % 3 else None}, "a.b": f"dotted {i}", "a": {"b": "c"}}
            for i in range(7)
        ]
        path: Path = tmp_path / request.param
        if path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        else:
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(str(path), table.schema) as out:
                out.write_table(table, max_chunksize=2)
        return path

    def test_a_field_inside_others(self, nested: Path) -> None:
        found = source(nested, column="doc.of.text")
        assert list(found.open()) == ["t1", "t2", "t4", "t5"]
        assert_resumes(found)
        assert list(source(nested, column="a.b").open()) == [f"dotted {i}" for i in range(7)]

    def test_one_that_is_not_there(self, nested: Path) -> None:
        assert "doc.n" in refused(nested, column="doc.body")
        assert "no column 'doc.n.text'" in refused(nested, column="doc.n.text")
        assert "neither text nor token ids" in refused(nested, column="doc")


IDS = [[5, 6, 7], [], [1], [2**16, 3], None, [8] * 400]


class TestTokenIds:
    @pytest.fixture(params=["a.jsonl", "list.parquet", "large.parquet", "a.arrow"])
    def made(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path: Path = tmp_path / request.param
        kind = pa.large_list(pa.int64()) if "large" in path.name else pa.list_(pa.int32())
        table = pa.table({"input_ids": pa.array(IDS, kind)})
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in IDS))
        elif path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=4)
        else:
            with pa.ipc.new_file(str(path), table.schema) as out:
                out.write_table(table, max_chunksize=2)
        return path

    def test_are_documents(self, made: Path) -> None:
        found = source(made, column="input_ids")
        documents = list(found.open())
        assert [one.tolist() for one in documents if not isinstance(one, str)] == [ids for ids in IDS if ids]
        for n in range(len(documents) + 1):
            stream = found.open()
            list(itertools.islice(stream, n))
            rest = [one.tolist() for one in found.open(stream.state()) if not isinstance(one, str)]
            assert rest == [ids for ids in IDS if ids][n:]

    def test_fall_to_a_split_by_what_they_are(self) -> None:
        ids = [np.arange(i, i + 5, dtype=np.uint32) for i in range(5000)]
        assert sum(is_validation(one, 0.1) for one in ids) == pytest.approx(500, rel=0.2)
        assert [is_validation(one, 0.1) for one in ids] == [is_validation(one.astype(np.int64), 0.1) for one in ids]

    @pytest.mark.parametrize(("ids", "message"), [([1, -1], "holds -1"), ([1, None], "null among its token ids")])
    def test_that_are_none(self, tmp_path: Path, ids: list[Any], message: str) -> None:
        pq.write_table(pa.table({"text": pa.array([ids])}), tmp_path / "a.parquet")
        assert message in refused(tmp_path / "a.parquet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    datasets.disable_progress_bars()
    folder: Path = tmp_path_factory.mktemp("saved")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(folder / "one"), num_shards=3)
    data.select([4, 1]).save_to_disk(str(folder / "selected"))
    parts = {"test": data.select([0]), "train": data.select(range(1, 10))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "splits"))
    datasets.DatasetDict({"b": parts["test"], "a": parts["train"]}).save_to_disk(str(folder / "others"))
    return folder


class TestFolders:
    def test_what_datasets_saves(self, saved: Path) -> None:
        assert list(source(saved / "one").open()) == TEXTS
        assert_resumes(source(saved / "one"))
        assert list(source(saved / "selected").open()) == [TEXTS[4], TEXTS[1]]

    def test_of_several_splits_the_training_one(self, saved: Path) -> None:
        found = source(saved / "splits")
        assert list(found.open()) == TEXTS[1:]
        assert [file["name"] for file in found.recipe()["files"]] == ["train/data-00000-of-00001.arrow"]
        assert list(source(saved / "splits" / "test").open()) == TEXTS[:1]
        assert "holds the splits b, a; give one of them, as" in refused(saved / "others")

    def test_what_is_not_whole(self, saved: Path, tmp_path: Path) -> None:
        state = json.loads((saved / "one" / "state.json").read_text())
        for changed, message in [
            (state, "data-00000-of-00003.arrow, which state.json names, is not there"),
            ({**state, "_data_files": [{}]}, "does not name its data files"),
            ({**state, "_indices_data_files": [{"filename": "x"}]}, "flatten_indices"),
        ]:
            (tmp_path / "state.json").write_text(json.dumps(changed))
            assert message in refused(tmp_path)

    @pytest.mark.parametrize("says", ["dataset_infos.json", "README.md"])
    def test_a_clone_of_a_data_set(self, tmp_path: Path, says: str) -> None:
        content = "{}" if says.endswith("json") else "---\nlicense: mit\ndataset_info:\n  a: b\n---\ntext"
        (tmp_path / says).write_text(content)
        (tmp_path / "data").mkdir()
        for split, texts in (("train", TEXTS[:6]), ("test", TEXTS[6:])):
            _parquet(tmp_path / "data" / f"{split}-00000-of-00001-0abc.parquet", texts)
        assert list(source(tmp_path).open()) == TEXTS[:6]
        (tmp_path / "more").mkdir()
        _parquet(tmp_path / "more" / "train-0.parquet", TEXTS)
        assert "holds data, more; give one of these folders" in refused(tmp_path)

    def test_a_folder_that_says_nothing_is_read_whole(self, tmp_path: Path) -> None:
        for name, texts in (("train.jsonl", TEXTS[:6]), ("test.jsonl", TEXTS[6:])):
            (tmp_path / name).write_bytes(_lines(texts))
        (tmp_path / "README.md").write_text("# a title\ndataset_info: no front matter")
        assert list(source(tmp_path).open()) == TEXTS[6:] + TEXTS[:6]


class TestHub:
    """The hub is not reachable in a test; its streams are datasets', which local files give as well."""

    @pytest.fixture
    def local(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.HubSource:
        import datasets

        for i in range(2):
            _parquet(tmp_path / f"{i}.parquet", [*TEXTS[i * 5 : i * 5 + 5], None, ""])  # type: ignore[list-item]
        files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
        monkeypatch.setattr(
            hub.HubSource,
            "_load",
            lambda self: datasets.load_dataset(
                "parquet", data_files=files, split=self.split, streaming=True, cache_dir=str(tmp_path / "cache")
            ),
        )
        monkeypatch.setattr(hub.HubSource, "_parquet", lambda self: None)
        monkeypatch.setattr(hub.HubSource, "_reach", lambda self: None)
        return hub.HubSource("hub:org/name", "text")

    def test_streams_and_resumes(self, local: hub.HubSource) -> None:
        assert list(local.open()) == TEXTS
        assert_resumes(local)

    def test_a_missing_column_and_an_unknown_split(self, local: hub.HubSource) -> None:
        local.column = "body"
        with pytest.raises(SaeError, match="n, text"):
            local.open()
        local.column, local.split = "text", "nothing"
        with pytest.raises(SaeError, match="nothing") as caught:
            local.open()
        assert "\n" not in str(caught.value)

    def test_names(self) -> None:
        one = hub.HubSource("hub:org/na.me@0123456789012345678901234567890123456789:conf:test", "text")
        assert (one.repo, one.config, one.split, one.slug) == ("org/na.me", "conf", "test", "na.me-conf")
        assert one.recipe()["revision"] == "0123456789012345678901234567890123456789"
        two = hub.HubSource("org/name::validation", "text")
        assert (two.config, two.split, two.slug) == (None, "validation", "name")
        with pytest.raises(SaeError, match="hub:org/name:config"):
            hub.HubSource("hub:name", "text")

    def test_a_connection_that_breaks_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def broken(*_: object, **__: object) -> None:
            # The HTTP library's own error: not an OSError, and under a name that has changed.
            raise network.hub_errors()[0]("timed out\nand more")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", broken)
        monkeypatch.setattr(network, "PAUSE", 0.0)
        monkeypatch.setattr(hub.HubSource, "_reach", lambda self: None)
        with pytest.raises(SaeError, match="org/name: timed out; check the name"):
            hub.HubSource("org/name", "text").recipe()

    @pytest.mark.parametrize("spec", ["fineweb", "org/name", "hub:org/name:config"])
    def test_offline_is_said_at_once(self, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(hub, "reachable", lambda url: pytest.fail("asked the network"))
        assert "source = python" in refused(spec)

    def test_no_network_is_said_within_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
        with pytest.raises(SaeError, match=r"127\.0\.0\.1:9 cannot be reached.*`source = python`"):
            text_source("fineweb", offline=False).recipe()

    def test_a_network_that_swallows_everything_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wake = threading.Event()

        def connect(*_: object, **__: object) -> None:
            wake.wait()
            raise TimeoutError

        monkeypatch.setattr(network, "PATIENCE", -0.99)  # the wait is a second longer
        monkeypatch.setattr(socket, "create_connection", connect)
        assert network.reachable("https://huggingface.co") is False
        wake.set()

    def test_the_proxy_is_asked_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def connect(address: tuple[str, int], **_: object) -> None:
            asked.append(address)
            raise ConnectionRefusedError

        monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
        monkeypatch.setattr(socket, "create_connection", connect)
        assert network.reachable("https://huggingface.co") is False
        assert asked == [("proxy.example", 3128)]

    def test_fineweb_is_the_ten_billion_token_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(hub, "reachable", lambda url: True)
        found = text_source("fineweb", offline=False)
        assert isinstance(found, hub.HubSource)
        assert (found.repo, found.config, found.split) == ("HuggingFaceFW/fineweb", "sample-10BT", "train")
        assert found.slug == "fineweb-10BT"


COMMIT = "0123456789012345678901234567890123456789"


class Remote:
    """Stands in for the hub's file system: files of a folder, and which bytes of them were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent, self.opened, self.broken = folder, 0, 0, ""

    def __call__(self) -> "Remote":
        return self

    def open(self, url: str, **_: Any) -> "Asked":
        name = url.removeprefix(f"hf://datasets/org/name@{COMMIT}/")
        if name == self.broken:
            raise network.hub_errors()[0]("connection lost")
        self.opened += 1
        return Asked(self, self.folder / name)


class Asked(io.FileIO):
    def __init__(self, owner: Remote, path: Path) -> None:
        super().__init__(path)
        self._owner = owner

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(-1 if size is None else size)
        self._owner.sent += len(found)
        return found


class TestRowGroups:
    """Parquet files of the hub are read by row groups, not by datasets."""

    GROUP = 20

    @pytest.fixture
    def remote(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
        import huggingface_hub

        for number in range(3):
            texts = [None if i % 7 == 3 else f"{number} {i} " + "words " * 50 for i in range(200)]
            other = [random.Random(i).randbytes(2000) for i in range(200)]
            table = pa.table({"other": other, "text": texts, "doc": [{"ids": [i, number]} for i in range(200)]})
            pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=self.GROUP)
        found = Remote(tmp_path)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", found)
        monkeypatch.setattr(network, "PAUSE", 0.0)
        monkeypatch.setattr(hub.HubSource, "_reach", lambda self: None)
        monkeypatch.setattr(
            hub.HubSource, "_parquet", lambda self: [f"hf://datasets/org/name@{COMMIT}/{i}.parquet" for i in range(3)]
        )
        return found

    def source(self, column: str = "text") -> hub.HubSource:
        return hub.HubSource(f"org/name@{COMMIT}", column)

    def test_all_documents_in_order_from_any_place(self, remote: Remote) -> None:
        expected = [f"{n} {i} " + "words " * 50 for n in range(3) for i in range(200) if i % 7 != 3]
        assert list(self.source().open()) == expected
        assert_resumes(self.source(), places=[0, 1, 16, 17, 18, 19, 171, 172, 173, 400, 512, 513])

    def test_growth_reads_what_is_new(self, remote: Remote) -> None:
        stream = self.source().open()
        for _ in range(500):
            next(stream)
        whole, remote.sent = remote.sent, 0
        assert len(list(self.source().open(stream.state()))) == 513 - 500
        assert 0 < remote.sent < whole / 3
        assert whole < sum(path.stat().st_size for path in remote.folder.glob("*.parquet")) / 2  # one column of three

    def test_reading_ahead_is_bounded(self, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = self.source().open()
        next(stream)
        stream._pool.shutdown()  # type: ignore[attr-defined]
        assert remote.opened <= row_groups.AHEAD_GROUPS + 2  # and the footers of two files
        monkeypatch.setattr(row_groups, "AHEAD_BYTES", 1)
        remote.opened = 0
        stream = self.source().open()
        next(stream)
        stream._pool.shutdown()  # type: ignore[attr-defined]
        assert remote.opened <= 3

    def test_a_field_of_token_ids(self, remote: Remote) -> None:
        ids = [one.tolist() for one in self.source("doc.ids").open() if not isinstance(one, str)]
        assert ids == [[i, number] for number in range(3) for i in range(200)]

    def test_what_is_refused(self, remote: Remote) -> None:
        with pytest.raises(SaeError, match=r"org/name/0\.parquet: no column 'body'; it has other, text, doc\.ids"):
            next(self.source("body").open())
        with pytest.raises(SaeError, match="'other' holds binary, neither text nor token ids"):
            next(self.source("other").open())
        remote.broken = "1.parquet"
        stream = self.source().open()
        with pytest.raises(SaeError, match=r"org/name: stopped after 171 documents \(connection lost\); repeat"):
            list(stream)
        remote.broken = ""
        assert len(list(self.source().open(stream.state()))) + stream.state()["documents"] == 513


def test_a_place_of_datasets_is_continued_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of before hold such places."""
    import datasets

    _parquet(tmp_path / "a.parquet", TEXTS)
    load = lambda self: datasets.load_dataset(  # noqa: E731
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True, cache_dir=str(tmp_path / "c")
    )
    monkeypatch.setattr(hub.HubSource, "_load", load)
    monkeypatch.setattr(hub.HubSource, "_reach", lambda self: None)
    rows = load(None)
    list(itertools.islice(rows, 4))
    monkeypatch.setattr(hub.HubSource, "_parquet", lambda self: pytest.fail("looked for files"))
    state = {"place": rows.state_dict(), "documents": 4}
    assert list(hub.HubSource(f"org/name@{COMMIT}", "text").open(state)) == TEXTS[4:]


def test_a_data_set_of_an_earlier_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.HubSource, "revision", "f" * 40)
    now = hub.HubSource("org/name:conf", "text", "slug")
    monkeypatch.undo()
    recipe = {**hub.HubSource(f"org/name@{COMMIT}:conf", "text").recipe()}
    then = now.earlier(recipe)
    assert then is not None and then.recipe() == recipe and then.slug == "slug"
    assert str(then) == f"hub:org/name@{COMMIT}:conf" and hub.HubSource(str(then), "text").recipe() == recipe
    assert str(hub.HubSource(f"org/name@{COMMIT}::test", "text")) == f"hub:org/name@{COMMIT}::test"
    for other in (
        {"config": None},
        {"split": "test"},
        {"column": "body"},
        {"dataset": "org/other"},
        {"source": "files"},
    ):
        assert now.earlier({**recipe, **other}) is None
    assert then.earlier({**recipe, "revision": "e" * 40}) is None  # a commit stays what it is


class TestPython:
    def test_has_the_reference_the_library_and_the_docstrings(self) -> None:
        documents = list(source("python").open())
        assert len(documents) > 300
        assert sum(map(len, documents)) > 5e6
        assert any(text.startswith('The "assert" statement') for text in documents)
        assert any("class ThreadPoolExecutor" in text for text in documents)
        assert any(text.startswith("module math\n") for text in documents)
        assert not any("import unittest.mock as mock_under_test" in text for text in documents)

    def test_no_document_twice_and_both_splits(self) -> None:
        documents = list(source("python").open())
        assert len(set(documents)) == len(documents)
        held_out = [text for text in documents if is_validation(text, 0.1)]
        assert 0.03 < len(held_out) / len(documents) < 0.2

    def test_resumes(self) -> None:
        n = len(python_library.library().documents)
        assert_resumes(source("python"), places=[0, 1, n // 2, n])

    def test_the_recipe_is_the_same_in_another_process_whatever_hooks_it_has(self) -> None:
        program = (
            "import sys, os, json; sys.excepthook = lambda *a: None; sys.breakpointhook = print; import builtins; "
            "builtins.added = lambda: None; from sae.pipeline.tokenize.sources import text_source; "
            "print(json.dumps(text_source('python', offline=True).recipe()))"
        )
        root = Path(__file__).resolve().parents[3]
        run = subprocess.run([sys.executable, "-S", "-c", _PATH + program], cwd=root, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout) == source("python").recipe()

    def test_a_module_that_is_not_here_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(python_library, "_C_MODULES", ("math", "no_such_module"))
        found = python_library.library.__wrapped__()
        assert found.skipped["module not here"] == 1


# -S leaves out site-packages, which hold what the source itself imports.
_PATH = f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]!r}; "


class TestSplit:
    @given(st.text(), st.floats(0, 1), st.floats(0, 1))
    def test_a_larger_fraction_only_adds(self, text: str, a: float, b: float) -> None:
        assert is_validation(text, min(a, b)) <= is_validation(text, max(a, b))
        assert is_validation(text, 0) is False
        assert is_validation(text, 1) is True

    def test_is_the_fraction_it_says(self) -> None:
        assert sum(is_validation(str(i), 0.1) for i in range(20_000)) == pytest.approx(2000, rel=0.1)

    def test_is_fixed_for_ever(self) -> None:
        """Stores and the embedded model's held-out figures rest on it."""
        assert [i for i in range(100) if is_validation(f"document {i}", 0.1)] == FIXED


FIXED = [40, 44, 59, 70, 81]


@given(st.text())
def test_well_formed_text_has_a_utf8_form_and_good_text_is_untouched(text: str) -> None:
    assert well_formed(text) == text
    assert well_formed("a\ud800" + text).encode()


def test_every_source_has_a_line_of_help_and_a_name_of_its_own() -> None:
    entries = registered()
    assert {"python", "fineweb", "files"} <= {entry.name for entry in entries}
    assert len({entry.name for entry in entries}) == len(entries)
    assert all(entry.help for entry in entries)


def test_a_long_text_without_separators_is_cut_at_blank_lines(tmp_path: Path) -> None:
    """So that a corpus in one file still shuffles and splits; nothing but blank lines is lost, and resuming agrees."""
    paragraphs = [f"Paragraph {i}. " + "words and more words. " * (i % 7 * 10) for i in range(400)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    source = text_source(str(tmp_path / "long.txt"), offline=True)
    stream = source.open()
    documents, states = [], []
    for document in stream:
        documents.append(document)
        states.append(stream.state())
    assert len(documents) > 20
    assert all(len(document) >= 1000 for document in documents[:-1])
    assert [line for d in documents for line in d.split("\n") if line] == [p.rstrip("\n") for p in paragraphs]
    for i in (0, 7, len(documents) - 2):
        assert list(source.open(states[i])) == documents[i + 1 :]


def test_a_short_text_stays_whole(tmp_path: Path) -> None:
    text = "one\n\ntwo\n\n" * 100
    (tmp_path / "short.txt").write_text(text)
    assert list(text_source(str(tmp_path / "short.txt"), offline=True).open()) == [text]
