"""What is known of every latent of a dictionary: how often, how strongly, where and with whom it fires.

This is what to read a latent from: `statistics_of(run, ...)` (in `stage`) gives it, from the run folder where it has
been gathered before, and `feature(123)` is everything about one latent in plain records. `table()` has a row a latent,
as columns of numbers. Tokens are ids; `text(token)` is their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from sae.cache.arguments import checked
from sae.cache.disk.tensors import read_tensors, write_tensors
from sae.cache.errors import SaeError
from sae.cache.runs import STATISTICS, Run
from sae.pipeline.interpret.contexts import QUARTERS, Contexts
from sae.pipeline.interpret.directions import Lens, Nearest
from sae.pipeline.interpret.examples import (
    EDGES,
    Band,
    Bin,
    Example,
    Feature,
    Group,
    Neighbour,
    Partner,
    TokenCount,
    TokenWeight,
)
from sae.pipeline.interpret.statistics_file import HEADER, PLAIN, expect_shapes, to_be_removed
from sae.pipeline.interpret.together import Partners


class Stability(NamedTuple):
    """How alike the densities of all latents are in one part of the rows and the next."""

    pearson: float
    spearman: float


class Tokens(NamedTuple):
    """The tokens under a sample of each latent's firings, most frequent first: [d_sae, n], times 0 where no more."""

    token: np.ndarray
    times: np.ndarray
    sampled: np.ndarray  # [d_sae]


@dataclass(frozen=True)
class Statistics:
    """Everything that is known of latents; arrays have a row a latent, shapes as where they are made.

    of: what they were computed from, as JSON: the dictionary's checksum, `stores`, `split`, `rows`, `settings`, the
    token that begins a document (`begin`; None where rows come from no text). vocabulary: the bytes of every token.
    """

    of: dict[str, Any]
    windows: np.ndarray
    window_rows: np.ndarray
    total: np.ndarray
    max: np.ndarray
    histogram: np.ndarray
    contexts: Contexts
    frequent: Tokens
    partners: Partners
    nearest: Nearest | None
    lens: Lens | None
    vocabulary: list[bytes]

    # Of all latents

    @property
    def d_sae(self) -> int:
        return len(self.total)

    @cached_property
    def rows(self) -> int:
        """Rows that were looked at."""
        return int(self.window_rows.sum())

    @cached_property
    def fired(self) -> np.ndarray:
        """int64 [d_sae]: rows in which each fired."""
        return self.windows.sum(0)

    @property
    def density(self) -> np.ndarray:
        """float64 [d_sae]: share of rows in which each fired."""
        return self.fired / max(self.rows, 1)

    @property
    def mean(self) -> np.ndarray:
        """float64 [d_sae]: mean magnitude where it fired; 0 where it never did."""
        return self.total / np.maximum(self.fired, 1)

    @property
    def live(self) -> np.ndarray:
        """Latents that fired, ascending."""
        return np.flatnonzero(self.fired)

    @property
    def rates(self) -> np.ndarray:
        """float64 [windows, d_sae]: densities in each part of the rows that holds any."""
        there = self.window_rows > 0
        return self.windows[there] / self.window_rows[there, None]

    def stability(self) -> list[Stability]:
        """Correlations of the densities of consecutive parts, NaN where they do not vary."""
        from scipy.stats import rankdata

        def correlation(one: np.ndarray, other: np.ndarray) -> float:
            one, other = one - one.mean(), other - other.mean()
            size = float(np.sqrt((one @ one) * (other @ other)))
            return float(one @ other) / size if size else float("nan")

        rates = self.rates
        ranks = [rankdata(rate) for rate in rates]
        return [
            Stability(correlation(rates[i], rates[i + 1]), correlation(ranks[i], ranks[i + 1]))
            for i in range(len(rates) - 1)
        ]

    def table(self) -> dict[str, list[Any]]:
        """Columns with a value a latent: feature, fired, density, max, mean, and its most frequent token (or None)."""
        token = np.where(self.frequent.times[:, :1] > 0, self.frequent.token[:, :1].astype(np.int64), -1)
        tokens = token[:, 0].tolist() if token.size else [-1] * self.d_sae
        return {
            "feature": list(range(self.d_sae)),
            "fired": self.fired.tolist(),
            "density": self.density.tolist(),
            "max": self.max.tolist(),
            "mean": self.mean.tolist(),
            "token": [None if one < 0 else one for one in tokens],
        }

    def text(self, token: int) -> bytes:
        """The bytes a token stands for."""
        return self.vocabulary[token]

    # Of one

    @checked
    def feature(self, latent: int, group: Group = "asked") -> Feature:
        """Everything about a latent. Raises SaeError for one that is not there."""
        expect_latents([latent], self.d_sae)
        fired, counts = int(self.fired[latent]), self.frequent
        common = zip(counts.token[latent].tolist(), counts.times[latent].tolist(), strict=True)
        bands = [
            Band(low=low, high=high, examples=examples)
            for band, (low, high) in enumerate(QUARTERS, 1)
            if (examples := self.examples(latent, band))
        ]
        return Feature(
            latent=latent, group=group, fired=fired, density=short(self.density[latent]), max=short(self.max[latent]),
            mean=short(self.mean[latent]), histogram=self.bins(latent), sampled=int(counts.sampled[latent]),
            frequent=[TokenCount(token=token, count=count) for token, count in common if count],
            top=self.examples(latent), bands=bands, rates=[short(rate) for rate in self.rates[:, latent]],
            partners=self.partners_of(latent), nearest=self.nearest_to(latent), promoted=self.tokens_of(latent),
            suppressed=self.tokens_of(latent, down=True),
        )  # fmt: skip

    def examples(self, latent: int, band: int = 0) -> list[Example]:
        """The contexts of a latent: its strongest, or of a band (1: the highest quarter of its values, ... 4)."""
        c = self.contexts
        first, stop = c.start[latent], c.start[latent + 1]
        return [self._example(int(i)) for i in first + np.flatnonzero(c.band[first:stop] == band)]

    def bins(self, latent: int) -> list[Bin]:
        """The histogram of a latent's magnitudes, from the first to the last bin that holds anything."""
        counts = self.histogram[latent]
        filled = np.flatnonzero(counts)
        if not len(filled):
            return []
        inside = range(int(filled[0]), int(filled[-1]) + 1)
        return [Bin(low=short(EDGES[i]), high=short(EDGES[i + 1]), count=int(counts[i])) for i in inside]

    def partners_of(self, latent: int) -> list[Partner]:
        """The latents that fire most in the same rows."""
        p = self.partners
        columns = (column[latent].tolist() for column in (p.latent, p.jaccard, p.phi, p.union))
        return [
            Partner(
                latent=other, jaccard=short(jaccard), phi=None if phi != phi else short(phi),
                error=0.0 if p.rows == p.seen else short((jaccard * (1 - jaccard) / union) ** 0.5),
            )
            for other, jaccard, phi, union in zip(*columns, strict=True)
            if other >= 0
        ]  # fmt: skip

    def nearest_to(self, latent: int) -> list[Neighbour]:
        """The latents of the nearest decoder directions; empty where latents have none."""
        if self.nearest is None:
            return []
        pairs = zip(self.nearest.latent[latent].tolist(), self.nearest.cosine[latent].tolist(), strict=True)
        return [Neighbour(latent=other, cosine=short(cosine)) for other, cosine in pairs if other >= 0]

    def tokens_of(self, latent: int, *, down: bool = False) -> list[TokenWeight]:
        """The tokens that a latent's direction makes likelier (or less likely), most so first; empty where unknown."""
        if self.lens is None:
            return []
        which, weight = self.lens[2:] if down else self.lens[:2]
        pairs = zip(which[latent].tolist(), weight[latent].tolist(), strict=True)
        return [TokenWeight(token=token, weight=short(value)) for token, value in pairs]

    def _example(self, i: int) -> Example:
        c = self.contexts
        n = int(c.length[i])
        around = [None if value != value else short(value) for value in c.activations[i, :n].tolist()]
        return Example(
            position=int(c.position[i]), document=int(c.document[i]), value=short(c.value[i]), peak=int(c.peak[i]),
            tokens=c.tokens[i, :n].tolist(), activations=around,
        )  # fmt: skip

    # On disk

    def write(self, run: Run) -> None:
        """Put it into a run folder, whole or not at all."""
        arrays: dict[str, np.ndarray] = {name: getattr(self, name) for name in PLAIN}
        sampled = {"rows": self.partners.rows, "seen": self.partners.seen}
        parts: dict[str, Any] = {"contexts": self.contexts, "frequent": self.frequent, "partners": self.partners}
        parts |= {"nearest": self.nearest, "lens": self.lens}
        for name, part in parts.items():
            columns = {} if part is None else part._asdict()
            arrays |= {f"{name}.{key}": value for key, value in columns.items() if isinstance(value, np.ndarray)}
        lengths = np.array([len(token) for token in self.vocabulary], np.int64)
        arrays |= {"vocabulary.end": lengths.cumsum(), "vocabulary.bytes": np.array([*b"".join(self.vocabulary)], "u1")}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        write_tensors(run.path, STATISTICS, tensors, {HEADER: json.dumps(self.of | {"sampled": sampled})})

    @classmethod
    def read(cls, run: Run) -> Self | None:
        """What is in a run folder; None where nothing is. Raises DamagedStore where it is not what was written."""
        path = run.path / STATISTICS
        if not path.exists():
            return None
        with to_be_removed(path):
            tensors, header = read_tensors(path)
            return cls._of(tensors, json.loads(header.get(HEADER, "null")))

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], of: Any) -> Self:
        """Raises ValueError for tensors that do not fit together."""
        if not isinstance(of, dict) or not isinstance(of.get("sampled"), dict):
            raise ValueError("it does not say what it is of")
        sampled = of.pop("sampled")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        expect_shapes(arrays)
        ends, data = arrays.pop("vocabulary.end"), arrays.pop("vocabulary.bytes").tobytes()
        starts = [0, *ends.tolist()][:-1]
        words = [data[a:b] for a, b in zip(starts, ends.tolist(), strict=True)]

        def part(kind: Any, name: str, **more: int) -> Any:
            names = [key for key in kind._fields if key not in more]
            return kind(*(arrays[f"{name}.{key}"] for key in names), **more)

        plain = {name: arrays[name] for name in PLAIN}
        rows, seen = int(sampled["rows"]), int(sampled["seen"])
        return cls(
            of, **plain, contexts=part(Contexts, "contexts"), frequent=part(Tokens, "frequent"),
            partners=part(Partners, "partners", rows=rows, seen=seen),
            nearest=part(Nearest, "nearest") if "nearest.latent" in arrays else None,
            lens=part(Lens, "lens") if "lens.up" in arrays else None, vocabulary=words,
        )  # fmt: skip

    def with_lens(self, lens: Lens) -> Self:
        """The same, with the tokens that latents make likelier."""
        return replace(self, lens=lens)

    def said_of(self, of: dict[str, Any]) -> Self:
        """The same, saying more about what it was computed from."""
        return replace(self, of=self.of | of)


def expect_latents(latents: Iterable[int], d_sae: int) -> None:
    """Raise SaeError for latents that a dictionary has not."""
    if beyond := [latent for latent in latents if not 0 <= latent < d_sae]:
        raise SaeError(f"latents = {', '.join(map(str, beyond))}: the dictionary has latents 0 to {d_sae - 1}")


def short(value: float) -> float:
    """Round to six significant digits, as many as float32 arithmetic makes certain."""
    return float(f"{value:.6g}")
