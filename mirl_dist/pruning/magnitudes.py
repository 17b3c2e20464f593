"""Counts, collects and compares magnitudes by their bits.

The bits of a non-negative float32, read as an integer, order like its value. Comparing them is exact even where
subnormals are flushed to zero. On the CPU, numpy works in blocks that stay in the cache. On an accelerator whole
tensors are counted where they are, and the result of a pass reaches the host in one transfer: every wait for a device
costs as much as counting millions of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1 << 17
"""Weights processed at once on a CPU: the buffers for them fit its cache."""
CHUNK = 1 << 20
"""Weights processed at once on an accelerator: bounds the extra memory for tensors of any size."""
NOT_FINITE = 0x7F800000
"""The bits of inf; those of NaN are larger, those of finite magnitudes smaller."""
SAMPLED = 509
"""A sample has one of so many weights."""
_MAGNITUDE = 0x7FFFFFFF
_WIDTHS = {0: 11, 11: 10, 21: 10}
"""Known bits of the result -> number of bits that the next pass determines."""
_FIRST_BINS, _FIRST_SHIFT = 1 << 11, 20


class CountedPart(NamedTuple):
    """Weights to count. values: flat float32; surviving: flat bool of as many, which of them count; None: all."""

    values: Tensor
    surviving: Tensor | None = None


class BitSearch(NamedTuple):
    """State of the radix search: the top `known` of the 31 bits of the result are `prefix`; `below` magnitudes have a
    smaller prefix, `within` have this one, and the result is the `remaining`-th smallest (1-based) of these."""

    remaining: int
    prefix: int = 0
    known: int = 0
    below: int = 0
    within: int = 0

    @property
    def width(self) -> int:
        """The number of bits that the next pass determines; 0 when all are known."""
        return _WIDTHS.get(self.known, 0)

    def narrowed(self, counts: Tensor) -> BitSearch:
        """Return the state after a pass. counts: int64 (2**width,), the histogram over all magnitudes of all ranks."""
        upto = counts.cumsum(0)
        chosen = int(torch.searchsorted(upto, self.remaining))
        within = int(counts[chosen])
        before = int(upto[chosen]) - within
        prefix = (self.prefix << self.width) | chosen
        return BitSearch(self.remaining - before, prefix, self.known + self.width, self.below + before, within)


class Guess(NamedTuple):
    """Where a sample says that the result lies: the bins `first` to `last` of the first pass. is_rare: few of this
    rank's magnitudes lie there."""

    first: int
    last: int
    is_rare: bool

    @property
    def width(self) -> int:
        """The number of bins."""
        return self.last + 1 - self.first

    @property
    def begin(self) -> int:
        """The smallest bits inside."""
        return self.first << _FIRST_SHIFT


class Histogram(NamedTuple):
    """counts: of the next bits of what has the known prefix, int64 (2**width,) on the CPU; largest: bits of the largest
    magnitude of all that was looked at, surviving or not."""

    counts: Tensor
    largest: int


def count(parts: Sequence[CountedPart], search: BitSearch) -> Histogram:
    """Return the histogram of a pass over the parts, all of which are on one device."""
    return count_on_cpu(parts, search) if on_cpu(part.values for part in parts) else count_on_device(parts, search)


def count_on_cpu(parts: Iterable[CountedPart], search: BitSearch) -> Histogram:
    """Compute `count` block by block. Memory: a few times BLOCK weights."""
    size, shift = 1 << search.width, 31 - search.known - search.width
    counts, largest = np.zeros(size, dtype=np.int64), 0
    for bits, surviving in _blocks(parts):
        if search.known:
            bits = _with_prefix(bits, surviving, search)
            counts += np.bincount((bits >> shift) & (size - 1), minlength=size)
            continue
        largest = max(largest, int(bits.max()))
        np.right_shift(bits, shift, out=bits)
        if surviving is not None:  # the others join those whose bits are 0, and are subtracted from them
            np.multiply(bits, surviving.view(np.uint8), out=bits)
            counts[0] -= bits.size - np.count_nonzero(surviving)
        counts += np.bincount(bits, minlength=size)
    return Histogram(torch.from_numpy(counts), largest)


def count_on_device(parts: Iterable[CountedPart], search: BitSearch) -> Histogram:
    """Compute `count` on the parts' device, with one transfer to the host. Memory: some 30 bytes for CHUNK weights.

    Bits are counted by sorting: unlike adding into bins it is deterministic on every device, and needs no wait.
    """
    size, shift = 1 << search.width, 31 - search.known - search.width
    pieces: list[Tensor] = []
    for values, surviving in _groups(parts):
        bits = magnitude_bits(values)
        counted = (bits >> (31 - search.known)) == search.prefix
        if surviving is not None:
            counted &= surviving
        place = torch.where(counted, (bits >> shift) & (size - 1), size).to(torch.int16)
        edges = torch.arange(1, size + 1, dtype=torch.int16, device=place.device)
        upto = torch.searchsorted(place.sort().values, edges)
        pieces.append(torch.cat([upto, bits.amax().reshape(1)]))
    if not pieces:
        return Histogram(torch.zeros(size, dtype=torch.int64), 0)
    every = torch.stack(pieces)
    totals = torch.cat([every[:, :size].sum(0), every[:, size:].amax(0)]).cpu()
    return Histogram(torch.diff(totals[:size], prepend=totals.new_zeros(1)), int(totals[size]))


def sample(parts: Iterable[CountedPart]) -> list[CountedPart]:
    """Return every SAMPLED-th weight of each part, without copying."""
    places = slice(SAMPLED // 2, None, SAMPLED)
    large = (part for part in parts if part.values.numel() > SAMPLED // 2)
    return [CountedPart(values[places], None if mask is None else mask[places]) for values, mask in large]


def count_near(parts: Sequence[CountedPart], guess: Guess) -> tuple[Histogram, Sequence[CountedPart]]:
    """Return the histogram of the first pass with what lies below and above the guess in the bins next to it, and the
    parts that the next passes have to read: on a CPU, copies of what lies in the guess, if that is little.

    A few comparisons take a fraction of the time of a histogram with many bins.
    """
    if not on_cpu(part.values for part in parts):
        return _count_near_on_device(parts, guess), parts
    counts, largest, copies = np.zeros(_FIRST_BINS, dtype=np.int64), 0, []
    flags = np.empty(BLOCK, dtype=bool)
    for bits, surviving in _blocks(parts):
        chosen, offsets = flags[: bits.size], bits.view(np.uint32)
        largest = max(largest, int(bits.max()))
        np.less(bits, guess.begin, out=chosen)
        if surviving is not None:
            np.logical_and(chosen, surviving, out=chosen)
        below = np.count_nonzero(chosen)
        np.subtract(offsets, np.uint32(guess.begin), out=offsets)  # below, they wrap around and are large
        np.less(offsets, np.uint32(guess.width << _FIRST_SHIFT), out=chosen)
        if surviving is not None:
            np.logical_and(chosen, surviving, out=chosen)
        inside = bits.take(np.flatnonzero(chosen))  # faster than indexing by a mask
        total = bits.size if surviving is None else np.count_nonzero(surviving)
        counts[max(guess.first - 1, 0)] += below
        counts[guess.first : guess.last + 1] += np.bincount(inside >> _FIRST_SHIFT, minlength=guess.width)
        counts[guess.last + 1] += total - below - inside.size
        if guess.is_rare:
            copies.append(inside)
    histogram = Histogram(torch.from_numpy(counts), largest)
    if not guess.is_rare or not copies:
        return histogram, parts
    near = np.concatenate(copies)
    near += np.int32(guess.begin)
    return histogram, [CountedPart(torch.from_numpy(near).view(torch.float32))]


def _count_near_on_device(parts: Iterable[CountedPart], guess: Guess) -> Histogram:
    """Compute the histogram of `count_near` on the parts' device, with one transfer to the host."""
    edges = [0, *range(guess.first, guess.last + 2)]
    pieces = []
    for values, surviving in _groups(parts):
        bits = magnitude_bits(values)
        counted = torch.ones_like(bits, dtype=torch.bool) if surviving is None else surviving
        from_edge = [((bits >> _FIRST_SHIFT) >= edge).logical_and_(counted).count_nonzero() for edge in edges]
        pieces.append(torch.stack([*from_edge, bits.amax()]))
    counts = torch.zeros(_FIRST_BINS, dtype=torch.int64)
    if not pieces:
        return Histogram(counts, 0)
    every = torch.stack(pieces)
    totals = torch.cat([every[:, :-1].sum(0), every[:, -1:].amax(0)]).cpu()
    between = totals[:-1] - torch.cat([totals[1:-1], totals.new_zeros(1)])
    counts[max(guess.first - 1, 0)] += between[0]
    counts[guess.first : guess.last + 2] += between[1:]
    return Histogram(counts, int(totals[-1]))


def keep_from(scores: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Return a new mask of those of `mask` whose |score| has these bits or larger ones. Both flat, on one device."""
    if not on_cpu([scores]):
        return (magnitude_bits(scores) >= bits).logical_and_(mask)
    kept, surviving = np.empty(mask.numel(), dtype=bool), mask.numpy()
    for start, block in zip(range(0, kept.size, BLOCK), _blocks([CountedPart(scores)]), strict=True):
        here = slice(start, start + BLOCK)
        np.greater_equal(block[0], bits, out=kept[here])
        np.logical_and(kept[here], surviving[here], out=kept[here])
    return torch.from_numpy(kept)


def count_equal(scores: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Return how many |score| of `mask` have exactly these bits: an int64 scalar on the device of both, not awaited."""
    pieces = zip(torch.split(scores, CHUNK), torch.split(mask, CHUNK), strict=True)
    equal = [((magnitude_bits(s) == bits) & m).count_nonzero() for s, m in pieces]
    return torch.stack(equal).sum()


def drop_equal(scores: Tensor, mask: Tensor, bits: int, number: int) -> None:
    """Clear in `mask`, in place, the first `number` weights whose |score| has exactly these bits."""
    for kept, piece in zip(torch.split(mask, CHUNK), torch.split(scores, CHUNK), strict=True):
        if not number:
            return
        first = torch.nonzero(kept & (magnitude_bits(piece) == bits)).reshape(-1)[:number]
        kept[first] = False
        number -= first.numel()


def count_true(masks: Iterable[Tensor]) -> list[int]:
    """Return the number of True of each bool tensor, with one wait for those on an accelerator."""
    masks = list(masks)
    if on_cpu(masks):
        return [int(np.count_nonzero(mask.numpy())) for mask in masks]
    counts: list[int] = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
    return counts


def on_cpu(tensors: Iterable[Tensor]) -> bool:
    """Return whether all tensors are in the host's memory."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def magnitude_bits(values: Tensor) -> Tensor:
    """Return |values| as int32 bits, which order like them and distinguish subnormals even under flush-to-zero."""
    return values.contiguous().view(torch.int32) & _MAGNITUDE


def _blocks(parts: Iterable[CountedPart]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_] | None]]:
    """Yield the bits of magnitudes on the CPU, in memory that the next block overwrites, and which of them survive."""
    buffer = np.empty(BLOCK, dtype=np.int32)
    for values, surviving in parts:
        raw = values.detach().contiguous().view(torch.int32).numpy()
        mask = None if surviving is None else surviving.numpy()
        for start in range(0, raw.size, BLOCK):
            block = raw[start : start + BLOCK]
            bits = np.bitwise_and(block, np.int32(_MAGNITUDE), out=buffer[: block.size])
            yield bits, None if mask is None else mask[start : start + BLOCK]


def _with_prefix(bits: NDArray[np.int32], surviving: NDArray[np.bool_] | None, search: BitSearch) -> NDArray[np.int32]:
    """Return the bits of surviving magnitudes that have the known prefix."""
    chosen = np.right_shift(bits, 31 - search.known) == search.prefix
    if surviving is not None:
        np.logical_and(chosen, surviving, out=chosen)
    if chosen.all():
        return bits
    with_prefix: NDArray[np.int32] = bits.take(np.flatnonzero(chosen))
    return with_prefix


def _groups(parts: Iterable[CountedPart]) -> Iterator[CountedPart]:
    """Yield the parts joined, or cut, to at most CHUNK weights: a few large kernels in place of many small ones."""
    group: list[tuple[Tensor, ...]] = []
    size = 0
    for part in parts:
        tensors = [t.detach().reshape(-1) for t in part if t is not None]
        for pieces in zip(*(torch.split(t, CHUNK) for t in tensors), strict=True):
            if group and size + pieces[0].numel() > CHUNK:
                yield CountedPart(*map(torch.cat, zip(*group, strict=True)))
                group, size = [], 0
            if pieces[0].numel():
                group, size = [*group, pieces], size + pieces[0].numel()
    if group:
        yield CountedPart(*map(torch.cat, zip(*group, strict=True)))
