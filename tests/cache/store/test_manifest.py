"""The list of committed windows: where windows begin, and that a changed line is noticed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.activations import WINDOWS
from sae.cache.errors import DamagedStore
from sae.cache.store.manifest import MANIFEST, Manifest, Window, Windows, close, commit

layouts = st.builds(
    lambda first, doublings, odd: Windows(first * odd, first * odd << doublings),
    st.integers(0, 10).map(lambda n: 1 << n), st.integers(0, 8), st.sampled_from([1, 3]),
)  # fmt: skip


def test_the_boundaries_of_activation_windows() -> None:
    boundaries = [WINDOWS.start(window) for window in range(9)]
    assert boundaries == [0, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576, 1_572_864]
    assert WINDOWS.bounds(4) == (131_072, 262_144)


def test_a_layout_of_equal_windows() -> None:
    assert [Windows(8, 8).start(window) for window in range(4)] == [0, 8, 16, 24]


@some
@given(layouts, st.integers(0, 1 << 24))
def test_windows_are_consistent(windows: Windows, rows: int) -> None:
    count = windows.count(rows)
    assert windows.start(count) >= rows
    assert count == 0 or windows.start(count - 1) < rows
    assert windows.round_up(rows) == windows.start(count)
    assert windows.round_up(windows.round_up(rows)) == windows.round_up(rows)


@some
@given(layouts, st.integers(0, 40))
def test_windows_tile_the_rows(windows: Windows, window: int) -> None:
    start, stop = windows.bounds(window)
    assert stop == windows.start(window + 1)
    assert windows.first <= stop - start <= windows.largest
    assert start % windows.first == 0
    assert windows.count(start + 1) == windows.count(stop) == window + 1


def filled(folder: Path, windows: int = 3, *, ended: bool = False) -> list[Window]:
    """A manifest of a few windows."""
    made = []
    for index in range(windows):
        files = {f"rows/c/{index}/0": (1000 + index, f"{index:08x}"), f"position/c/{index}": (77, "deadbeef")}
        made.append(Window(index, 8 * index, 8 * index + 8, files, {"next": {"context": index, "state": None}}))
        commit(folder, made[-1])
    if ended:
        close(folder, 8 * windows)
    return made


def test_what_is_committed_is_read(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) == Manifest()
    made = filled(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert manifest == Manifest(tuple(made), closed=False)
    assert (manifest.rows, manifest.stored_bytes) == (24, 1000 + 1001 + 1002 + 3 * 77)
    close(tmp_path, 24)
    assert Manifest.read(tmp_path) == Manifest(tuple(made), closed=True)


def test_any_flipped_bit_of_a_whole_line_is_noticed(tmp_path: Path) -> None:
    commit(tmp_path, Window(0, 0, 8, {"rows/c/0/0": (10, "0123abcd")}, {}))
    close(tmp_path, 8)
    path = tmp_path / MANIFEST
    data = path.read_bytes()
    for place in range(len(data) - 1):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            with pytest.raises(DamagedStore, match=r"manifest\.jsonl: line \d+ "):
                Manifest.read(tmp_path)
    path.write_bytes(data[:-1] + b"\x0b")  # without its newline the last line never happened
    assert Manifest.read(tmp_path).closed is False


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    made = filled(tmp_path, 2)
    path = tmp_path / MANIFEST
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(first, len(data)):
        path.write_bytes(data[:length])
        assert Manifest.read(tmp_path).windows == tuple(made[:1])
    commit(tmp_path, made[1])  # a writer cuts the torn line off
    assert path.read_bytes() == data


def reordered(lines: list[bytes], order: list[int]) -> bytes:
    return b"".join(lines[i] for i in order)


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 1, 1], [1, 0], [0, 1, 2, 3, 3], [0, 1, 3], [0, 1, 2, 3, 2]])
def test_lines_that_do_not_follow_are_refused(tmp_path: Path, order: list[int]) -> None:
    """Windows out of order, twice or left out; an end that is not the end."""
    filled(tmp_path, 3, ended=True)
    path = tmp_path / MANIFEST
    path.write_bytes(reordered(path.read_bytes().splitlines(keepends=True), order))
    with pytest.raises(DamagedStore):
        Manifest.read(tmp_path)


def test_a_window_of_another_number_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, Window(1, 0, 8, {}, {}))
    with pytest.raises(DamagedStore, match="line 1 does not follow the line before it"):
        Manifest.read(tmp_path)


notes = st.dictionaries(
    st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5) | st.booleans(), max_size=3
)


@some
@given(
    notes,
    st.dictionaries(
        st.text(max_size=8), st.tuples(st.integers(0, 1 << 62), st.text("0123456789abcdef", min_size=8, max_size=8)),
        max_size=3,
    ),
)  # fmt: skip
def test_any_notes_survive(tmp_path_factory: Any, notes: dict[str, Any], files: dict[str, tuple[int, str]]) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    window = Window(0, 0, 8, files, notes)
    commit(folder, window)
    assert Manifest.read(folder).windows == (window,)
