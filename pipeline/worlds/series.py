"""A multivariate series whose noise is known: what is measured, and what would be without noise.

The signal is a few sources mixed into channels: sinusoids whose amplitude drifts, and first-order autoregressions. The
noise is each channel's own: white, pink (a sum of autoregressions of several lengths), the mains of one frequency in
all channels, and blinks, short bumps that come rarely and are higher in the first channels than in the last. Its power
is that of the signal over 10^(snr / 10), as expected of endless series.

Step i is a function of the settings and of i alone, but an autoregression has all steps before it in it: the series is
made from its beginning on.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from pydantic import Field

from sae.configs.base import Settings
from sae.pipeline.worlds.draws import normal, seeded, uniform

GENERATOR = 1  # part of the recipe: raised when the same settings give another series
BLOCK = 4096  # steps made at a time
MAINS, BLINKS = 50.0, 0.25  # Hz; blinks a second
BLINK = 0.3  # seconds
SLOW = (0.9, 0.99, 0.999)  # of the autoregressions whose sum is nearly pink
NOISE = {"white": 0.4, "pink": 0.4, "mains": 0.1, "blinks": 0.1}  # shares of its power


class Noisy(Settings):
    """A series of known noise."""

    channels: int = Field(14, ge=1, le=4096, description="channels")
    sources: int = Field(4, ge=1, le=256, description="sources of the signal: half oscillate, half drift")
    steps: int = Field(100_000, ge=2, le=10**10, description="steps, the held-out ones among them")
    rate: float = Field(128.0, ge=16, le=1e6, description="steps a second")
    snr: float = Field(0.0, ge=-60, le=60, description="power of the signal over that of the noise, in dB")
    seed: int = Field(0, ge=0, description="seed of mixture, signal and noise")


class Steps(NamedTuple):
    """Steps of a series, float64 [n, channels] each."""

    noisy: np.ndarray
    clean: np.ndarray


class NoisySeries:
    """The series of some settings."""

    def __init__(self, config: Noisy) -> None:
        self.config = config

    @cached_property
    def mixture(self) -> np.ndarray:
        """float64 [sources, channels], of columns whose squares sum to 1: so the signal has a variance of 1."""
        config = self.config
        mixed = normal(self._bits("mixture"), config.sources * config.channels).reshape(config.sources, -1)
        return mixed / np.linalg.norm(mixed, axis=0)

    def blocks(self) -> Iterator[Steps]:
        """The whole series, from its first step on, in blocks of `BLOCK` steps."""
        config, state = self.config, _Autoregressions()
        noise = 10 ** (-config.snr / 20)
        for block in range(-(-config.steps // BLOCK)):
            n = min(BLOCK, config.steps - block * BLOCK)
            clean = (self._sources(block, state) @ self.mixture)[:n]
            yield Steps(clean + noise * self._noise(block, state)[:n], clean)

    def _sources(self, block: int, state: "_Autoregressions") -> np.ndarray:
        """float64 [BLOCK, sources], each of variance 1: the first half sinusoids of 2 to 20 Hz."""
        config, waves = self.config, -(-self.config.sources // 2)
        drawn = uniform(self._bits("waves"), 2 * waves).reshape(2, -1)
        hertz = np.minimum(2 * 10 ** drawn[0], config.rate / 4)
        time = (block * BLOCK + np.arange(BLOCK))[:, None] / config.rate
        drift = state("amplitude", np.full(waves, 0.999), self._normal("amplitude", block, waves))
        oscillating = np.sin(2 * np.pi * (hertz * time + drawn[1])) * (1 + 0.5 * drift) * (2 / 1.25) ** 0.5
        rest = config.sources - waves
        drifting = state("sources", np.full(rest, 0.97), self._normal("sources", block, rest))
        return np.concatenate([oscillating, drifting], axis=1)

    def _noise(self, block: int, state: "_Autoregressions") -> np.ndarray:
        """float64 [BLOCK, channels], each of variance 1."""
        config, channels = self.config, self.config.channels
        time = (block * BLOCK + np.arange(BLOCK))[:, None] / config.rate
        slow = np.repeat(SLOW, channels)
        pink = state("pink", slow, self._normal("pink", block, len(slow))).reshape(BLOCK, len(SLOW), channels)
        phase = uniform(self._bits("mains"), channels)
        parts = {
            "white": self._normal("white", block, channels),
            "pink": pink.sum(1) / len(SLOW) ** 0.5,
            "mains": 2**0.5 * np.sin(2 * np.pi * (min(MAINS, config.rate / 3) * time + phase)),
            "blinks": self._blinks(block)[:, None] * np.linspace(1.5, 0.5, channels) / self._spread(channels),
        }
        return sum((NOISE[name] ** 0.5 * part for name, part in parts.items()), np.zeros((BLOCK, channels)))

    def _spread(self, channels: int) -> float:
        """Root of the mean square of a blink's height over channels."""
        return float(np.sqrt(np.mean(np.linspace(1.5, 0.5, channels) ** 2)))

    def _blinks(self, block: int) -> np.ndarray:
        """float64 [BLOCK]: bumps of half a sine, of variance 1; they begin at any step with the same chance."""
        rate = self.config.rate
        length = max(2, round(BLINK * rate))
        bump = np.sin(np.pi * (np.arange(length) + 0.5) / length)
        begin = np.concatenate([self._begun(block - 1)[-(length - 1) :], self._begun(block)])
        return np.convolve(begin, bump, "valid") / np.sqrt(BLINKS / rate * (bump**2).sum())

    def _begun(self, block: int) -> np.ndarray:
        """float64 [BLOCK]: 1 or -1 where a blink begins; there is none before the first block."""
        drawn = uniform(self._bits(f"blinks {block}"), BLOCK) if block >= 0 else np.ones(BLOCK)
        chance = BLINKS / self.config.rate
        return (drawn < chance / 2).astype(float) - ((drawn >= chance / 2) & (drawn < chance))

    def _normal(self, purpose: str, block: int, columns: int) -> np.ndarray:
        return normal(self._bits(f"{purpose} {block}"), BLOCK * columns).reshape(BLOCK, columns)

    def _bits(self, purpose: str) -> np.random.PCG64:
        return seeded(f"series {GENERATOR} {self.config.seed} {purpose}")


class _Autoregressions:
    """First-order autoregressions of variance 1 that go on from block to block, by name."""

    def __init__(self) -> None:
        self._last: dict[str, np.ndarray] = {}

    def __call__(self, name: str, memory: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Steps x_t = a x_{t-1} + sqrt(1 - a^2) e_t of memories a [c], given e [n, c]; the first begins as e_0."""
        from scipy.signal import lfilter

        scale = np.sqrt(1 - memory**2)
        before = self._last.get(name, drawn[0])
        columns = [
            lfilter([scale[c]], [1.0, -memory[c]], drawn[:, c], zi=[memory[c] * before[c]])[0]
            for c in range(len(memory))
        ]
        out = np.stack(columns, axis=1) if columns else drawn
        self._last[name] = out[-1] if len(out) else before
        return out
