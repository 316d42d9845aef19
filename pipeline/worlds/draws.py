"""Random numbers that stay the same for ever: raw outputs of PCG64, which NumPy promises, and what is made of them."""

import hashlib
from collections.abc import Callable

import numpy as np

Bits = Callable[[str], np.random.PCG64]  # random bits for a purpose


def seeded(text: str) -> np.random.PCG64:
    """The random bits that a text names."""
    return np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def uniform(bits: np.random.PCG64, n: int) -> np.ndarray:
    """float64 [n], above 0 and below 1."""
    return ((bits.random_raw(n) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(bits: np.random.PCG64, n: int) -> np.ndarray:
    """float64 [n] of variance 1 (Box and Muller, 1958)."""
    half = -(-n // 2)
    radius, angle = np.sqrt(-2 * np.log(uniform(bits, half))), 2 * np.pi * uniform(bits, half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
