"""The k largest of every row of p [B, m], or the largest of all of it: exactly so many.

Numbers are compared as whole numbers of the same order. A row is cut into a few times k groups (a group takes every
so-many-th number): at least k of its numbers reach the k-th largest of the groups' maxima, and little more than k do.
These candidates are written down, and the choice is made among them. Where many are equal there may be more than there
is room for: then the row itself is gone through, which takes longer and gives the same.

Of equal numbers those that come first are kept, entries are in ascending order, and what is no number is above all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

GROUPS = 4
"""Groups of a row, at least, as a multiple of k."""

MOST_GROUPS = 4096
"""Groups of a row at most, which bounds k."""

CHUNK = 4096
"""Numbers of a row that are looked at together."""

BINS = 256
"""Values of a digit, when the largest of all rows are searched digit by digit."""

PROGRAMS = 528
"""Programs that count digits: four for each of 132 processors."""

TOGETHER = 64
"""Programs whose counts are added at once."""

LEAST = tl.constexpr(-(2**31))
NO_NUMBER = tl.constexpr(0x7FFF0000)


@triton.jit
def _key(values, SHIFT: tl.constexpr):
    """Numbers as whole ones of the same order: -0 is 0. SHIFT: bits at the end that are 0 in all of them."""
    values = values.to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(values != values, NO_NUMBER, key) >> SHIFT


@triton.jit
def _keys(row, at, m, SHIFT: tl.constexpr):
    """The keys of a row's numbers at some places; beyond its end, the least."""
    values = tl.load(row + at, mask=at < m, other=0.0)
    return tl.where(at < m, _key(values, SHIFT), LEAST >> SHIFT)


@triton.jit
def _between(low, high):
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _kth(keys, k, SHIFT: tl.constexpr):
    """The k-th largest of a few keys."""
    low = LEAST >> SHIFT
    high = (NO_NUMBER >> SHIFT) + 1
    for _ in range(33 - SHIFT):
        middle = _between(low, high)
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _group_maxima(row, m, SHIFT: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    best = tl.full([GROUPS], LEAST >> SHIFT, tl.int32)
    for start in range(0, m, CHUNK):
        key = _keys(row, start + tl.arange(0, CHUNK), m, SHIFT)
        best = tl.maximum(best, tl.max(tl.reshape(key, [CHUNK // GROUPS, GROUPS]), axis=0))
    return best


@triton.jit
def _maxima(p, out, counts, m, SHIFT: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """The maxima of a row's groups, and how many these are."""
    row = tl.program_id(0).to(tl.int64)
    best = _group_maxima(p + row * m, m, SHIFT, GROUPS, CHUNK)
    tl.store(out + row * GROUPS + tl.arange(0, GROUPS), best)
    tl.store(counts + row, GROUPS)


@triton.jit
def _candidates(p, bound, places, keys, counts, m, k, SHIFT: tl.constexpr, GROUPS: tl.constexpr, ROOM: tl.constexpr,
                CHUNK: tl.constexpr, BOUND: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """A row's numbers that reach a bound: the one that was found (BOUND), or the k-th largest of its groups' maxima.

    counts says how many there are, even where there is no room for them.
    """
    number = tl.program_id(0).to(tl.int64)
    row = p + number * m
    if BOUND:
        least = (tl.load(bound) << LAST) ^ LEAST
    else:
        least = _kth(_group_maxima(row, m, SHIFT, GROUPS, CHUNK), k, SHIFT)
    found = 0
    for start in range(0, m, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = _keys(row, at, m, SHIFT)
        take = (key >= least) & (at < m)
        place = found + tl.cumsum(take.to(tl.int32), 0) - 1
        store = take & (place < ROOM)
        tl.store(places + number * ROOM + place, at, mask=store)
        tl.store(keys + number * ROOM + place, key, mask=store)
        found += tl.sum(take.to(tl.int32))
    tl.store(counts + number, found)


@triton.jit
def _keep(p, places, keys, counts, out, m, k, SHIFT: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """The k largest of a row, out of its candidates or, where there was no room for these, out of the row."""
    number = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + number)
    if count <= ROOM:
        at = tl.arange(0, ROOM)
        key = tl.load(keys + number * ROOM + at, mask=at < count, other=LEAST >> SHIFT)
        least = _kth(key, k, SHIFT)
        above = (key > least) & (at < count)
        equal = (key == least) & (at < count)
        spare = k - tl.sum(above.to(tl.int32))
        kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
        place = tl.load(places + number * ROOM + at, mask=kept, other=0)
        tl.store(out + number * k + tl.cumsum(kept.to(tl.int32), 0) - 1, place.to(tl.int64), mask=kept)
    else:
        row = p + number * m
        low = LEAST >> SHIFT
        high = (NO_NUMBER >> SHIFT) + 1
        for _ in range(33 - SHIFT):
            middle = _between(low, high)
            enough = _reaching(row, middle, m, SHIFT, CHUNK) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        spare = k - _reaching(row, low + 1, m, SHIFT, CHUNK)
        _write(row, out, number * k, low, spare, m, SHIFT, CHUNK, 0)


@triton.jit
def _reaching(row, least, m, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a row's numbers reach a key."""
    found = 0
    for start in range(0, m, CHUNK):
        at = start + tl.arange(0, CHUNK)
        found += tl.sum(((_keys(row, at, m, SHIFT) >= least) & (at < m)).to(tl.int32))
    return found


@triton.jit
def _write(row, out, where, least, spare, m, SHIFT: tl.constexpr, CHUNK: tl.constexpr, first):
    """Write the places of a row's numbers above a key, and of the first `spare` that equal it, each plus `first`."""
    written = 0
    equals = 0
    for start in range(0, m, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = _keys(row, at, m, SHIFT)
        equal = (key == least) & (at < m)
        kept = ((key > least) & (at < m)) | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= spare))
        place = where + written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out + place, first + at.to(tl.int64), mask=kept)
        written += tl.sum(kept.to(tl.int32))
        equals += tl.sum(equal.to(tl.int32))


@triton.jit
def _digits(p, keys, counts, prefix, histograms, programs, rows, m, DIGIT: tl.constexpr, TOP: tl.constexpr,
            ROOM: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, FALL_BACK: tl.constexpr):  # fmt: skip
    """How often each value of a digit occurs among the candidates of some rows, those with the digits found before.

    DIGIT: the bit it begins at. TOP: whether it is the first. FALL_BACK: whether rows may have had too little room.
    """
    begun = 0
    if not TOP:
        begun = tl.load(prefix)
    total = tl.zeros([2 * BINS], tl.int32)
    for turn in range(tl.cdiv(rows, programs)):
        number = (tl.program_id(0) + turn * programs).to(tl.int64)
        count = tl.load(counts + number, mask=number < rows, other=0)
        whole = False
        if FALL_BACK:
            whole = count > ROOM
        if whole:
            row = p + number * m
            for start in range(0, m, CHUNK):
                at = start + tl.arange(0, CHUNK)
                total += _histogram(_keys(row, at, m, 0), at < m, begun, DIGIT, TOP, BINS)
        else:
            at = tl.arange(0, ROOM)
            key = tl.load(keys + number * ROOM + at, mask=at < count, other=0)
            total += _histogram(key, at < count, begun, DIGIT, TOP, BINS)
    tl.store(histograms + tl.program_id(0) * 2 * BINS + tl.arange(0, 2 * BINS), total)


@triton.jit
def _histogram(key, there, begun, DIGIT: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr):
    flipped = key ^ LEAST  # bits in the order of the numbers, the sign included
    digit = (flipped >> DIGIT) & (BINS - 1)
    if not TOP:
        there = there & ((flipped >> (DIGIT + 8)) == begun)
    return tl.histogram(tl.where(there, digit, BINS), 2 * BINS)


@triton.jit
def _narrow(histograms, prefix, needed, sought, programs, TOP: tl.constexpr, BINS: tl.constexpr,
            TOGETHER: tl.constexpr):  # fmt: skip
    """The digit of the number sought, the `sought`-th: prefix takes it up, and needed is which it is among its like."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros([TOGETHER, BINS], tl.int32)
    for start in range(0, programs, TOGETHER):  # so that loads do not wait for one another
        program = start + tl.arange(0, TOGETHER)
        at = histograms + program[:, None] * 2 * BINS + bins[None, :]
        counts += tl.load(at, mask=(program < programs)[:, None], other=0)
    total = tl.sum(counts, axis=0)
    seek = sought
    if not TOP:
        seek = tl.load(needed)
    reached = tl.sum(total) - tl.cumsum(total, 0) + total  # how many have this digit or a larger one
    digit = tl.max(tl.where(reached >= seek, bins, 0))
    above = tl.sum(tl.where(bins > digit, total, 0))
    tl.store(needed, seek - above)
    if TOP:
        digit = tl.where(digit >= BINS // 2, digit - BINS, digit)  # as a shift of a negative number leaves it
        tl.store(prefix, digit)
    else:
        tl.store(prefix, tl.load(prefix) * BINS + digit)


@triton.jit
def _count(p, keys, counts, prefix, above, equal, m, LAST: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a row's numbers are above the number sought, and how many are equal to it."""
    number = tl.program_id(0).to(tl.int64)
    least = (tl.load(prefix) << LAST) ^ LEAST
    count = tl.load(counts + number)
    if count <= ROOM:
        at = tl.arange(0, ROOM)
        key = tl.load(keys + number * ROOM + at, mask=at < count, other=LEAST)
        more = tl.sum(((key > least) & (at < count)).to(tl.int32))
        same = tl.sum(((key == least) & (at < count)).to(tl.int32))
    else:
        more = _reaching(p + number * m, least + 1, m, 0, CHUNK)
        same = _reaching(p + number * m, least, m, 0, CHUNK) - more
    tl.store(above + number, more)
    tl.store(equal + number, same)


@triton.jit
def _share(above, equal, equals, spare, begins, rows, CHUNK: tl.constexpr):
    """How many of each row's equals are kept, `equals` in all and the first ones, and where what it keeps begins."""
    left = tl.load(equals)
    begin = 0
    for start in range(0, rows, CHUNK):
        at = start + tl.arange(0, CHUNK)
        same = tl.load(equal + at, mask=at < rows, other=0)
        mine = tl.minimum(same, tl.maximum(left - tl.cumsum(same, 0) + same, 0))
        kept = tl.load(above + at, mask=at < rows, other=0) + mine
        tl.store(spare + at, mine, mask=at < rows)
        tl.store(begins + at, begin + tl.cumsum(kept, 0) - kept, mask=at < rows)
        left -= tl.sum(same)
        begin += tl.sum(kept)


@triton.jit
def _emit(p, places, keys, counts, prefix, spare, where, out, m, LAST: tl.constexpr, ROOM: tl.constexpr,
          CHUNK: tl.constexpr):  # fmt: skip
    """Write a row's places in the flattened p that are kept, from where[row] on; spare[row] of its equals are."""
    number = tl.program_id(0).to(tl.int64)
    least = (tl.load(prefix) << LAST) ^ LEAST
    begin = tl.load(where + number)
    left = tl.load(spare + number)
    count = tl.load(counts + number)
    if count <= ROOM:
        at = tl.arange(0, ROOM)
        key = tl.load(keys + number * ROOM + at, mask=at < count, other=LEAST)
        equal = (key == least) & (at < count)
        kept = ((key > least) & (at < count)) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        place = tl.load(places + number * ROOM + at, mask=kept, other=0)
        tl.store(out + begin + tl.cumsum(kept.to(tl.int32), 0) - 1, number * m + place, mask=kept)
    else:
        _write(p + number * m, out, begin, least, left, m, 0, CHUNK, number * m)


def fits(k: int) -> bool:
    """Return True for a k of which there can be enough groups."""
    return k <= MOST_GROUPS // GROUPS


def rows(p: Tensor, k: int) -> Tensor:
    """int64 [B, k]: where the k largest of every row of p [B, m] are."""
    (b, m), shift = p.shape, _unused_bits(p)
    groups, chunk = _sizes(m, k)
    places, keys = (p.new_empty(b, groups, dtype=torch.int32) for _ in range(2))
    counts, out = p.new_empty(b, dtype=torch.int32), p.new_empty(b, k, dtype=torch.int64)
    launch(
        _candidates, (b,), p, counts, places, keys, counts, m, k, SHIFT=shift, GROUPS=groups, ROOM=groups, CHUNK=chunk,
        BOUND=False, LAST=0,
    )  # fmt: skip
    launch(_keep, (b,), p, places, keys, counts, out, m, k, SHIFT=shift, ROOM=groups, CHUNK=chunk)
    return out


def batch(p: Tensor, count: int) -> Tensor:
    """int64 [count]: where the largest of all of p [B, m] are, ascending places in the flattened p."""
    (b, m), last = p.shape, _unused_bits(p)
    groups, chunk = _sizes(m, -(-count // b))
    sizes = {"ROOM": groups, "CHUNK": chunk}
    maxima, places, keys = (p.new_empty(b, groups, dtype=torch.int32) for _ in range(3))
    counts, above, equal, spare, begins = (p.new_empty(b, dtype=torch.int32) for _ in range(5))
    launch(_maxima, (b,), p, maxima, counts, m, SHIFT=0, GROUPS=groups, CHUNK=chunk)
    bound, _ = _nth(p, maxima, counts, count, sizes, fall_back=False)
    launch(
        _candidates, (b,), p, bound, places, keys, counts, m, 0, SHIFT=0, GROUPS=groups, BOUND=True, LAST=last, **sizes
    )
    least, equals = _nth(p, keys, counts, count, sizes, fall_back=True)
    launch(_count, (b,), p, keys, counts, least, above, equal, m, LAST=last, **sizes)
    launch(_share, (1,), above, equal, equals, spare, begins, b, CHUNK=covering(b, 16, CHUNK))
    out = p.new_empty(count, dtype=torch.int64)
    launch(_emit, (b,), p, places, keys, counts, least, spare, begins, out, m, LAST=last, **sizes)
    return out


def _nth(
    p: Tensor, keys: Tensor, counts: Tensor, count: int, sizes: dict[str, int], *, fall_back: bool
) -> tuple[Tensor, Tensor]:
    """The `count`-th largest of the candidates of all rows, and how many of its equals are among so many largest.

    Both int32 [1] on the device; the first is the key's bits down to the last digit there is.
    """
    prefix, needed = keys.new_empty(1), keys.new_empty(1)
    programs = min(PROGRAMS, len(keys))
    histograms = keys.new_empty(programs, 2 * BINS)
    for digit in range(24, _unused_bits(p) - 1, -8):
        top = digit == 24
        launch(
            _digits, (programs,), p, keys, counts, prefix, histograms, programs, len(keys), p.shape[1], DIGIT=digit,
            TOP=top, BINS=BINS, FALL_BACK=fall_back, **sizes,
        )  # fmt: skip
        launch(
            _narrow, (1,), histograms, prefix, needed, count, programs, TOP=top, BINS=BINS, TOGETHER=TOGETHER,
            num_warps=16,
        )  # fmt: skip
    return prefix, needed


def _unused_bits(p: Tensor) -> int:
    """Bits at the end of a float32 that are 0 for numbers of p's type."""
    return 16 if p.dtype == torch.bfloat16 else 0


def _sizes(m: int, k: int) -> tuple[int, int]:
    """Groups of a row, and numbers of it that are looked at together."""
    groups = covering(GROUPS * k, 16, MOST_GROUPS)
    return groups, covering(m, groups, max(CHUNK, groups))
