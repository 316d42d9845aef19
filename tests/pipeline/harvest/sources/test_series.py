"""Time series: every step once and in order, nothing held out in training, one line for what is no series."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.signal import butter, sosfilt, sosfilt_zi
from support.command_line import done, sae
from support.small_stores import files, shrunk

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.pipeline.harvest.recordings import files as recorded
from sae.pipeline.harvest.recordings import treatment
from sae.pipeline.harvest.sources.series import SeriesConfig, SeriesSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.harvest.tables import base
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent

N, C = 400, 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small windows and blocks, so that all edges are met."""
    monkeypatch.setattr(base, "BYTES", 7 * 4 * C)
    monkeypatch.setattr(recorded, "STEPS", 11)
    with shrunk():
        yield


def walk(n: int = N, seed: int = 0, channels: int = C) -> np.ndarray:
    """A series [n, channels] of channels that differ in place and scale."""
    steps = np.random.default_rng(seed).normal(size=(n, channels))
    return (np.cumsum(steps, 0) * 0.3 + steps) * np.arange(1, channels + 1) + 100 * np.arange(channels)


def opened(*paths: Path, **settings: Any) -> SeriesSource:
    config = SeriesConfig(recordings=tuple(map(str, paths)), **settings)
    return SeriesSource.of_settings(config, Origins(paths[0].parent), Silent())


def stored(source: SeriesSource, root: Path) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
    """Positions and rows of each split, in time."""
    found = {}
    for split, (store, *_) in harvest(source, root, Silent()).stores.items():
        at = store.positions(0, store.n_rows)
        order = np.argsort(at)
        found[split] = at[order], store.rows(0, store.n_rows)[torch.from_numpy(order)]
    return found


def robust(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = np.median(steps, 0)
    return middle, 1.4826 * np.median(np.abs(steps - middle), 0)


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def test_every_step_is_a_row_scaled_by_training_alone(tmp_path: Path) -> None:
    steps = walk().astype(np.float32)
    found = stored(opened(npy(tmp_path / "x.npy", steps), validation=0.25, clip=None), tmp_path / "cache")
    middle, width = robust(steps[:300].astype(np.float64))
    assert found["train"][0].tolist() == list(range(300)) and found["validation"][0].tolist() == list(range(300, 400))
    rows = torch.cat([found["train"][1], found["validation"][1]])
    assert torch.allclose(rows, torch.from_numpy((steps - middle) / width).float(), atol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (5, 5), (5, 2), (3, 7), (40, 1)])
def test_windows_are_steps_of_one_part_and_follow_by_the_stride(tmp_path: Path, window: int, stride: int) -> None:
    """With the band-pass, held-out steps cannot be seen in training: its rows stay the same whatever they are."""
    steps = walk(150).astype(np.float32)
    settings: dict[str, Any] = {"window": window, "stride": stride, "band": (1.0, 20.0), "rate": 100.0, "order": 3}
    source = opened(npy(tmp_path / "x.npy", steps), validation=0.4, **settings)
    found = stored(source, tmp_path / "cache")
    sections = butter(3, (1.0, 20.0), "band", fs=100.0, output="sos")

    def expected(part: np.ndarray) -> np.ndarray:
        begun = sosfilt_zi(sections)[:, :, None] * part[0]
        return np.asarray(sosfilt(sections, part, axis=0, zi=begun)[0])

    middle, width = robust(steps[:90].astype(np.float64))
    parts = [expected(((part - middle) / width).clip(-20, 20)) for part in (steps[:90], steps[90:])]
    center, deviation = robust(parts[0])
    for (at, rows), part, first in zip(found.values(), parts, (0, 90), strict=True):
        begins = list(range(0, len(part) - window + 1, stride))
        assert at.tolist() == [first + begin for begin in begins]
        windows = np.stack([((part - center) / deviation)[begin : begin + window].reshape(-1) for begin in begins])
        assert torch.allclose(rows, torch.from_numpy(windows).float(), atol=1e-5)
    other = steps.copy()
    other[90:] = 1e6 * np.random.default_rng(1).normal(size=(60, C))
    changed = opened(npy(tmp_path / "y.npy", other), validation=0.4, **settings)
    assert torch.equal(stored(changed, tmp_path / "other")["train"][1], found["train"][1])


def test_recordings_are_held_out_whole_whatever_their_order(tmp_path: Path) -> None:
    paths = [npy(tmp_path / f"{i}.npy", walk(60 + i, seed=i)) for i in range(5)]
    there: list[torch.Tensor] = []
    for order in (paths, paths[::-1]):
        found = stored(opened(*order, validation=0.4, window=7), tmp_path / f"cache{len(there)}")
        assert {split: len(rows) for split, (_, rows) in found.items()} == {"train": 25, "validation": 17}
        at = np.sort(np.concatenate([found["train"][0], found["validation"][0]]))
        gaps = np.diff(at)
        assert len(gaps[gaps != 7]) == 4 and (gaps >= 7).all()  # no row of one follows on a row of another
        there += [found["validation"][1], found["train"][1]]
    assert torch.equal(there[0], there[2]) and torch.equal(there[1], there[3])
    split = stored(opened(*paths, split="time", validation=0.4), tmp_path / "time")
    assert len(split["validation"][0]) == sum(round(0.4 * (60 + i)) for i in range(5))


def test_the_same_steps_in_another_format_are_the_same_series(tmp_path: Path) -> None:
    steps = walk().astype(np.float32)
    head = "a,b,label,c\n"
    lines = [f"{a},{b},x,{c}\n" for a, b, c in steps.astype(float).tolist()]
    (tmp_path / "x.csv").write_text(head + "".join(lines))
    np.savez(tmp_path / "x.npz", one=steps, rate=np.array(100.0))
    sources = [
        opened(tmp_path / "x.csv", without=["label"]), opened(tmp_path / "x.npz"),
        opened(npy(tmp_path / "x.npy", steps)),
    ]  # fmt: skip
    assert len({source.identity()["steps"] for source in sources}) == 1
    assert sources[0].identity()["without"] == ["label"]
    assert len({source.recipe(source.streams[0], "train")["source"]["steps"] for source in sources}) == 1


def test_arrays_of_an_npz_are_recordings(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=walk(50), b=walk(70, seed=1), name=np.array("s1"))
    source = opened(tmp_path / "x.npz", validation=0.5)
    assert source.about()["recordings"] == 2
    assert {split: len(rows) for split, (_, rows) in stored(source, tmp_path / "c").items()} in (
        {"train": 50, "validation": 70},
        {"train": 70, "validation": 50},
    )
    assert len(stored(opened(tmp_path / "x.npz", array="b", validation=0.0), tmp_path / "c")["train"][0]) == 70


def test_outliers_are_said_and_clipped_before_the_filter(tmp_path: Path) -> None:
    steps = walk()
    steps[17, 1], steps[380, 2] = 1e7, -1e8
    npy(tmp_path / "x.npy", steps)
    made = done("synthesize series", tmp_path / "x.npy", "--cache", tmp_path / "c", "--rate", 100, "--band", "1,20")
    said = re.findall(r"outliers beyond 20 robust deviations: 1 1 up to [\d,]+ \(step 17\), 2 1 up to", made.err)
    assert said and "they are clipped to that" in made.err
    assert "far values: 1 1, 2 1" in made.out
    kept = done("synthesize series", tmp_path / "x.npy", "--cache", tmp_path / "c", "--set", "harvest.clip=null")
    assert "kept as they are; --clip 20 pulls them in" in kept.err
    clipped = stored(opened(tmp_path / "x.npy", clip=4.0), tmp_path / "c")["train"][1]
    assert clipped.abs().max() == 4
    assert stored(opened(tmp_path / "x.npy", clip=None), tmp_path / "c")["train"][1].abs().max() > 1e5


def test_medians_of_a_long_series_are_of_evenly_spaced_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = walk(1000).astype(np.float32)
    monkeypatch.setattr(treatment, "SAMPLE", 300)
    blocks = [steps[low : low + 13] for low in range(0, 1000, 13)]
    scale = treatment.robust(blocks, 1000, ["a", "b", "c"], "x")
    assert np.allclose(scale.center, np.median(steps[::10].astype(np.float64), 0))


def test_by_the_command_line_stored_trained_on_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        np.save(f"s{i}.npy", walk(100, seed=i))
    command = "synthesize series s0.npy s1.npy s2.npy --window 4 --stride 2 --band 2,30 --rate 100"
    made = done(f"{command} --json").json
    assert (made["rows"], made["d"], made["recordings"], made["rate"]) == (2 * 49, 4 * C, 3, 100.0)
    assert [one["slug"] for one in made["stores"]] == [
        "series-s0-and-2-float32", "series-s0-and-2-validation-float32",
    ]  # fmt: skip
    assert "all there already" in done(command).err
    done("train --d-sae 8 --k 2 --steps 5 --batch 32 --device cpu --threads 1 --name one")
    assert done("eval one --json --device cpu --set eval.dead_rows=0").json["rows"] == 49
    store = ActivationStore(Path(made["stores"][0]["path"]))
    whole = files(store.path)
    (store.path / "rows/c/0/0").unlink()
    done("cache verify --repair")
    assert files(store.path) == whole
    (tmp_path / "moved").mkdir()
    for i in range(3):
        (tmp_path / f"s{i}.npy").rename(tmp_path / "moved" / f"s{i}.npy")
    (store.path / "position/c/0").unlink()
    assert "s0.npy: cannot be read (No such file" in sae("cache verify --repair").complaint
    done("cache verify --repair --source moved")
    assert files(store.path) == whole
    np.save("moved/s1.npy", walk(100, seed=9))
    (store.path / "position/c/0").unlink()
    assert "has other steps than those series-s0-and-2" in sae("cache verify --repair --source moved").complaint


def test_a_series_of_known_noise_has_a_store_without_it(tmp_path: Path) -> None:
    def made(snr: float) -> dict[str, torch.Tensor]:
        config = SeriesConfig.model_validate({"noisy": {"channels": 4, "steps": 9000, "snr": snr}, "clip": None})
        source = SeriesSource.of_settings(config, Origins(tmp_path), Silent())
        stores = harvest(source, tmp_path / str(snr), Silent()).stores["train"]
        at = [np.argsort(store.positions(0, store.n_rows)) for store in stores]
        return {
            stream.name: store.rows(0, store.n_rows)[torch.from_numpy(order)]
            for stream, store, order in zip(source.streams, stores, at, strict=True)
        }

    for snr in (0.0, 10.0):
        found = made(snr)
        noise = found["noisy"] - found["clean"]
        assert 10 * torch.log10(found["clean"].var() / noise.var()) == pytest.approx(snr, abs=1.5)


def test_a_worker_opens_the_same_series(tmp_path: Path) -> None:
    source = opened(npy(tmp_path / "x.npy", walk()), window=3, band=(1.0, 20.0), rate=100.0)
    again = source.elsewhere()()
    assert again.identity() == source.identity()
    assert torch.equal(
        stored(source, tmp_path / "a")["train"][1],
        stored(again, tmp_path / "b")["train"][1],  # type: ignore[arg-type]
    )
    npy(tmp_path / "x.npy", walk(seed=3))
    with pytest.raises(SaeError, match="are other files there"):
        source.elsewhere()()
    with pytest.raises(SaeError, match="were changed while they were read"):
        harvest(source, tmp_path / "c", Silent())


def flat(values: np.ndarray, column: int) -> np.ndarray:
    values[:, column] = 5
    return values


def holed(values: np.ndarray, value: float) -> np.ndarray:
    values[7, 1] = value
    return values


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "ragged.csv": (lambda p: p.write_text("a,b\n1,2\n3\n" * 9), {}, "ragged.csv: rows 0 to "),
    "word.csv": (lambda p: p.write_text("a,b\n" + "1,x\n" * 9), {}, "name the columns of numbers"),
    "hole.csv": (lambda p: p.write_text("a,b\n1,2\n3,\n" + "1,2\n" * 9), {}, "row 1 has nan in column b"),
    "nan.npy": (lambda p: npy(p, holed(walk(), np.nan)), {}, "row 7 has nan in column 1"),
    "inf.npy": (lambda p: npy(p, holed(walk(), np.inf)), {}, "row 7 has inf in column 1"),
    "empty.csv": (lambda p: p.write_text(""), {}, "so no rows"),
    "flat.npy": (
        lambda p: npy(p, flat(walk(), 2)),
        {},
        "channel 2 is 5 in half of the training steps",
    ),
    "short.npy": (lambda p: npy(p, walk(9)), {"window": 10}, "harvest.window = 10: no training part of the series"),
    "one.npy": (lambda p: npy(p, walk(1, channels=1)), {}, "channel 0 is"),
    "wide.npy": (lambda p: npy(p, walk(2)), {}, "has 2 steps of 3 channels; a series is [steps, channels]"),
    "deep.npy": (lambda p: npy(p, np.ones((9, 2, 2))), {}, "has shape [9, 2, 2]"),
    "missing.npy": (lambda p: None, {}, "missing.npy: cannot be read (No such file"),
    "x.txt": (lambda p: p.write_text("1 2 3"), {}, "is no recording; give one of .npy"),
    "junk.npz": (lambda p: p.write_bytes(b"PK nothing"), {}, "cannot be read ("),
    "rateless.npy": (lambda p: npy(p, walk()), {"band": (1.0, 20.0)}, "is in no file; give `harvest.rate`"),
    "beyond.npy": (lambda p: npy(p, walk()), {"band": (1.0, 50.0), "rate": 100.0}, "lies between 0 and 50 Hz"),
    "turned.npy": (lambda p: npy(p, walk()), {"band": (20.0, 10.0), "rate": 100.0}, "its lower end first"),
    "narrow.npy": (lambda p: npy(p, walk()), {"band": (1e-9, 2e-9), "rate": 100.0}, "is not stable; widen it"),
    "named.npy": (lambda p: npy(p, walk()), {"without": ["AF3"]}, "has no column 'AF3'; there is 0, 1, 2"),
    "none.npy": (lambda p: npy(p, walk()), {"without": [0, 1, 2]}, "leaves no column"),
    "alone.npy": (lambda p: npy(p, walk()), {"split": "recording"}, "there is one recording; give several"),
    "tall.npy": (lambda p: npy(p, walk()), {"window": 1 << 22}, "rows would be too wide; lower it"),
    "all.npy": (lambda p: npy(p, walk()), {"validation": 0.9999}, "validation = 0.9999: leaves no step to train on"),
    "twice.npy": (lambda p: npy(p, walk()), {"columns": [0, 1, 0]}, "0 is there twice"),
    "same.npz": (lambda p: np.savez(p, a=walk(), b=walk()), {}, "same.npz (b): has the same steps as "),
    "mixed.csv": (lambda p: p.write_text("time,a\n1,2\n3,1\n2,5\n4,3\n"), {}, "time falls at step 2, so the steps"),
    "array.npy": (lambda p: npy(p, walk()), {"array": "a"}, "a .npy file has one table"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_series_is_one_line(tmp_path: Path, name: str) -> None:
    write, settings, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(SaeError, match=re.escape(message)) as caught:
        opened(tmp_path / name, **settings)
    assert "\n" not in str(caught.value) and "table = " not in str(caught.value)


def test_a_clock_among_the_channels_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.pipeline.harvest.recordings.files.STEPS", 8)  # it is looked for across blocks
    clock = np.arange(40.0) / 100
    clock[17:] += 3
    steps = np.column_stack([walk(40), clock])
    path = npy(tmp_path / "x.npy", steps)
    answer = sae(f"synthesize series {path} --cache {tmp_path / 'c'}")
    assert answer.code == 0
    assert "channel 3 only rises, as a clock does, and leaps at step 17" in answer.err
    assert "--without 3 leaves it out" in answer.err
    assert "only rises" not in sae(f"synthesize series {path} --without 3 --cache {tmp_path / 'c'}").err


def test_recordings_that_do_not_go_together(tmp_path: Path) -> None:
    a, b = npy(tmp_path / "a.npy", walk()), npy(tmp_path / "b.npy", walk(channels=2))
    copy = npy(tmp_path / "copy.npy", walk())
    for paths, message in {
        (a, b): "b.npy: has the channels 0, 1, and a.npy has 0, 1, 2; choose the same of each",
        (a, a): "a.npy: is named twice",
        (a, copy): f"copy.npy: has the same steps as {a}; give each once",
    }.items():
        with pytest.raises(SaeError, match=re.escape(message)):
            opened(*paths)
    assert opened(a, b, columns=["0", "1"], seed=1).channels == 2


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    path = npy(tmp_path / "x.npy", walk())
    for words, message in {
        f"{path} --set harvest.noisy.snr=3": "noisy: is of a series that is made",
        "--rate 100": "rate = 100.0: is of recordings; give files of them",
        "--split recording": "split = recording: a series of known noise is one recording",
        f"{path} --rate 100 --band 20,10": "lies between 0 and 50 Hz, its lower end first",
        f"{path} --band 3": "--band 3: input should be two frequencies, as [0.5, 45]",
        f"{path} --window 0": "--window 0: input should be greater",
        f"{path} --codec int4": "--codec int4: no such codec",
        f"{path} --split never": "--split never: ",
        "--set harvest.noisy.snr=1e9": "harvest.noisy.snr = ",
        "--set synthesize.rows=5": "--set synthesize.rows=5: ",
    }.items():
        answer = sae(f"synthesize series {words} --cache {tmp_path / 'c'}")
        assert (answer.code, message in answer.complaint) == (2, True), (words, answer.err)
    assert not (tmp_path / "c").exists()


def written_by_edfio(path: Path, steps: np.ndarray) -> None:
    """An EDF or BDF file of channels A, B, C, given in volts."""
    edfio = pytest.importorskip("edfio")
    kind, signal = (edfio.Edf, edfio.EdfSignal) if path.suffix == ".edf" else (edfio.Bdf, edfio.BdfSignal)
    named = zip("ABC", steps.T, strict=True)
    kind([signal(1e6 * values, 100, label=name, physical_dimension="uV") for name, values in named]).write(path)


def written_for_eeglab(path: Path, steps: np.ndarray) -> None:
    """An EEGLAB file of channels A, B, C, given in volts."""
    pytest.importorskip("pymatreader")
    locations = np.array([(name,) for name in "ABC"], dtype=[("labels", "O")])
    said = {"srate": 100.0, "nbchan": 3, "pnts": len(steps), "trials": 1, "xmin": 0.0, "xmax": (len(steps) - 1) / 100}
    empty: dict[str, Any] = {name: [] for name in ("event", "epoch", "urevent")}
    savemat(path, {"EEG": {"data": 1e6 * steps.T, "chanlocs": locations, **said, **empty}}, appendmat=False)


def test_without_mne_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mne", None)
    (tmp_path / "x.edf").write_bytes(b"0")
    with pytest.raises(
        SaeError, match=r"x.edf: needs the package mne, which is not installed; `pip install .sae-cache\[eeg\]"
    ):
        opened(tmp_path / "x.edf")


@pytest.mark.parametrize("suffix", [".edf", ".bdf", ".set"])
def test_what_mne_reads(tmp_path: Path, suffix: str) -> None:
    """The same steps as in an array of volts, but for what the format rounds; a damaged file is one line."""
    pytest.importorskip("mne")
    steps = 1e-6 * walk(600)
    path = tmp_path / f"x{suffix}"
    (written_for_eeglab if suffix == ".set" else written_by_edfio)(path, steps)
    source = opened(path, without=["B"], band=(1.0, 20.0))
    assert source.about()["rate"] == 100 and source.channels == 2
    array = opened(npy(tmp_path / "x.npy", steps[:, [0, 2]]), band=(1.0, 20.0), rate=100.0)
    rows, expected = (stored(one, tmp_path / "c")["train"][1] for one in (source, array))
    assert rows.shape == expected.shape and (rows - expected).abs().max() < 0.02
    with pytest.raises(SaeError, match=r"harvest.rate = 50: x.* says 100; leave it out"):
        opened(path, rate=50.0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SaeError, match=r"cannot be read \("):
        opened(path)


def test_the_help_names_every_setting_of_the_command() -> None:
    listed = {one["name"] for one in json.loads(done("list --settings --json").out)["settings"]}
    assert {f"harvest.{name}" for name in SeriesConfig.model_fields} - {"harvest.noisy"} <= listed
    assert "harvest.noisy.snr" in listed
