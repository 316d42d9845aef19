"""Labelled texts from files of every kind, from the layout of the sae-probes wheel, and what is wrong with them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sae.cache.errors import SaeError
from sae.pipeline.probing.labelled import Labelled, in_memory, of_file, of_sae_probes, sets_of

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "é 中"]
LABELS = [0, 1, 1, 0]
COLUMNS = ("text", "label")


def csv_of(texts: list[str] = TEXTS, labels: list[object] | list[int] = LABELS, names: str = "text,label") -> bytes:
    rows = ['"' + text.replace('"', '""') + f'",{label}' for text, label in zip(texts, labels, strict=True)]
    return "\n".join([names, *rows, ""]).encode()


def json_lines(texts: list[str] = TEXTS) -> bytes:
    records = [{"text": text, "label": label, "more": [1]} for text, label in zip(texts, LABELS, strict=True)]
    return b"\n".join(json.dumps(one).encode() for one in records)


def parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress
    files: dict[str, bytes] = {
        "a.csv": csv_of(), "b.csv.zst": packed(csv_of()), "c.jsonl": json_lines(),
        "d.json": b"[" + json_lines().replace(b"\n", b",") + b"]",
        "e.tsv": csv_of(names="text\tlabel").replace(b'",0', b'"\t0').replace(b'",1', b'"\t1'),
        "f.csv": b"\xef\xbb\xbf" + csv_of(),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    parquet(tmp_path / "g.parquet", text=TEXTS, label=LABELS)
    parquet(tmp_path / "h.parquet", text=TEXTS, label=[float(one) for one in LABELS])  # as where one was missing once
    found = [of_file(path, COLUMNS).read() for path in sorted(tmp_path.iterdir())]
    assert len(found) == 8 and [one.name for one in found] == list("abcdefgh")
    for one in found:
        assert one.texts == TEXTS and one.labels == ["0", "1", "1", "0"], one.name
        assert one.digest == found[0].digest
    swapped = Labelled("x", "", TEXTS, ["1", "0", "1", "0"])
    assert swapped.digest != found[0].digest
    assert in_memory("x", TEXTS, np.array(LABELS)).labels == found[0].labels  # type: ignore[arg-type]


WRONG = {
    "empty.csv": (b"", "has no column 'text'; it has none"),
    "rows.csv": (b"text,label\n", "has no rows"),
    "class.csv": (csv_of(labels=["x"] * 4), "every label is 'x'; there is nothing to tell apart"),
    "few.csv": (csv_of(), "has 2 texts of the class '0'; a probe takes 4"),
    "column.csv": (
        b"prompt,label\na,b\n",
        "no column 'text'; it has prompt, label; say which with `probe.text_column`",
    ),
    "twice.csv": (b"text,text,label\na,b,c\n", "2 columns 'text'"),
    "missing.csv": (b"text,label\na,0\nb,\n", "row 2: has no label in column 'label'"),
    "nan.csv": (b"text,label\na,0\nb,NaN\n", "row 2: has no label"),
    "blank.csv": (b"text,label\n  ,0\n", "row 1: has no text"),
    "ragged.csv": (b"text,label\na,b,0\n", "row 1 has 3 fields, the first line 2"),
    "open.csv": (b'text,label\n"a,0\n', "is damaged, or not what its name says: unexpected end of data"),
    "latin.csv": ("text,label\né,0\n".encode("latin1"), "is not UTF-8 text"),
    "cut.csv.zst": (zstandard.ZstdCompressor().compress(csv_of() * 9)[:-9], "is damaged"),
    "not.parquet": (b"PAR1", "is damaged, or not what its name says"),
    "not.jsonl": (b'{"text": \n', "line 1: is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: is a JSON list, not a record"),
    "other.jsonl": (b'{"text": "a"}\n', "no column 'label'; it has text"),
    "numbers.jsonl": (
        b'{"text": 3, "label": 1}\n',
        "row 1: holds a int in column 'text'; name the column of the texts",
    ),
    "nested.jsonl": (b'{"text": "a", "label": {"b": 1}}\n', "row 1: holds a dict in column 'label'"),
    "null.jsonl": (b'{"text": "a", "label": null}\n', "row 1: has no label"),
    "what.txt": (b"words", "is not CSV, TSV, JSON lines, JSON or parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_place(name: str, tmp_path: Path) -> None:
    data, said = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SaeError) as error:
        of_file(tmp_path / name, COLUMNS).read().expect_classes(20)
    assert said in str(error.value) and str(error.value).startswith(f"data = {tmp_path / name}"), str(error.value)
    assert "\n" not in str(error.value)


def test_more_that_is_wrong(tmp_path: Path) -> None:
    calls: dict[str, Callable[[], object]] = {
        "no such file": lambda: of_file(tmp_path / "no.csv", COLUMNS),
        "has 4 texts and 1 labels": lambda: in_memory("x", TEXTS, [1]),
        "has 30 different labels, as numbers have": lambda: Labelled(
            "x", "data = x", ["a"] * 30, [str(i) for i in range(30)]
        ).expect_classes(20),
        "holds no cleaned_data": lambda: of_sae_probes(tmp_path / "none", None),
        "no such file or folder; give the wheel": lambda: of_sae_probes(tmp_path / "no.whl", None),
    }
    for name in ("a", "none"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "a.csv.gz", tmp_path / "a" / "a.csv"):
        path.write_bytes(b"")
    calls["there are two sets of the name 'a'"] = lambda: sets_of(
        [tmp_path / "a.csv.gz", tmp_path / "a" / "a.csv"], None, None, COLUMNS
    )
    for said, call in calls.items():
        with pytest.raises(SaeError, match=said):
            call()


def test_the_sets_of_sae_probes_from_its_wheel_and_from_a_folder(tmp_path: Path) -> None:
    """A wheel of its layout: zstandard CSV of prompt, prompt_len, target; sets in the order of their numbers."""
    rows = "prompt,prompt_len,target\n" + "".join(f'"a text, {i}",{i},{["ham", "spam"][i % 2]}\n' for i in range(8))
    packed = zstandard.ZstdCompressor().compress(rows.encode())
    folder = tmp_path / "unpacked" / "sae_probes" / "data" / "cleaned_data"
    folder.mkdir(parents=True)
    wheel = tmp_path / "sae_probes-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sae_probes/data/probing_datasets_MASTER.csv.zst", packed)
        archive.writestr("sae_probes/data/OOD data/96_spam_is_OOD.csv.zst", packed)
        for name in ("100_news", "9_age group", "96_spam_is"):
            archive.writestr(f"sae_probes/data/cleaned_data/{name}.csv.zst", packed)
            (folder / f"{name}.csv.zst").write_bytes(packed)
    for source in (wheel, tmp_path / "unpacked", folder):
        sets = of_sae_probes(source, None)
        assert [one.name for one in sets] == ["9_age group", "96_spam_is", "100_news"]
        read = sets[1].read()
        assert read.texts[1] == "a text, 1" and read.classes == ["ham", "spam"] and len(read.labels) == 8
        assert [one.name for one in of_sae_probes(source, ["100", "96_spam_is"])] == ["100_news", "96_spam_is"]
        with pytest.raises(SaeError, match="sets = 7: no such set; there is 9_age group, 96_spam_is"):
            of_sae_probes(source, ["7"])
    with pytest.raises(SaeError, match="is damaged, or not what its name says: File is not a zip file"):
        of_sae_probes(folder / "100_news.csv.zst", None)
