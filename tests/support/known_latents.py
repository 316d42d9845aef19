"""What is known of 64 latents, made by hand: text that tries to be more than text, signs, tokens that have no row."""

import numpy as np

from sae.pipeline.interpret.contexts import Contexts
from sae.pipeline.interpret.directions import Lens, Nearest
from sae.pipeline.interpret.examples import BINS
from sae.pipeline.interpret.statistics import Statistics, Tokens
from sae.pipeline.interpret.survey import WINDOWS
from sae.pipeline.interpret.together import Partners

D_SAE, LEVELS = 64, 8
NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "&amp;", "$body ${style}"]
VOCABULARY = [*NASTY, " the", "\n", "\t", "      ", "é", "plain", "\u202e", "😀", "<|endoftext|>"]
BEGIN = len(VOCABULARY) - 1
LINES = (  # band, value, peak, tokens: of every latent from 3 to 40
    (0, 4.0, 2, [BEGIN, 0, 1, 2]), (0, -2.0, 0, [5, 6, 7, 8, 9]), (2, 0.4, 1, [3, 4, 11, 12]),
)  # fmt: skip


def known() -> Statistics:
    """Latents 3 to 40 fire, the later the more often; the first token of a context has no row."""
    some = range(3, 41)
    fired = np.zeros(D_SAE, np.int64)
    fired[3:41] = np.arange(8, 8 + 38 * 20, 20)
    windows = np.tile(fired // WINDOWS, (WINDOWS, 1))
    lines = [line for _ in some for line in LINES]
    n = len(lines)
    tokens, values = np.zeros((n, 5), np.uint16), np.full((n, 5), np.nan, np.float32)
    for i, (_, value, peak, words) in enumerate(lines):
        tokens[i, : len(words)] = words
        values[i, 1 : len(words)] = 0
        values[i, peak] = value
    counts = np.clip(np.arange(D_SAE + 1) - 3, 0, len(some)) * len(LINES)
    contexts = Contexts(
        counts, np.array([b for b, *_ in lines], np.int8), np.array([v for _, v, *_ in lines], np.float32),
        np.arange(n) * 7, np.arange(n), np.array([p for _, _, p, _ in lines], np.int32),
        np.array([len(words) for *_, words in lines], np.int32), tokens, values,
    )  # fmt: skip
    histogram = np.zeros((D_SAE, BINS), np.int64)
    histogram[:, 32], histogram[:, 34] = windows.sum(0) - windows[0], windows[0]
    token = np.tile(np.arange(D_SAE)[:, None] % 13, (1, 2)).astype(np.int32)
    others = ((np.arange(D_SAE)[:, None] + np.array([1, 2])) % D_SAE).astype(np.int32)
    halves = np.full((D_SAE, 2), 0.5, np.float32)
    return Statistics(
        {"begin": BEGIN, "dictionary": "", "stores": ["gpt2-6.mlp_out-ab12"], "split": "train"}, windows,
        np.full(WINDOWS, 512), windows.sum(0) * 1.5, np.where(fired > 0, 4, 0).astype(np.float32), histogram, contexts,
        Tokens(token, np.minimum(windows.sum(0)[:, None], [[9, 3]]).astype(np.int32), np.full(D_SAE, 12, np.int32)),
        Partners(others, halves, halves, np.full((D_SAE, 2), 50, np.int32), 100, 200),
        Nearest(others, halves), Lens(others % 13, halves, token, -halves), [text.encode() for text in VOCABULARY],
    )  # fmt: skip
