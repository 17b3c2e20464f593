"""Seeded random numbers: one generator per key, reproducible in every process and independent of call order."""

from __future__ import annotations

import hashlib
import threading

import numpy as np


def rng(*words: int | str) -> np.random.Generator:
    """Return a counter-based generator (Philox) keyed by the SHA-256 of the words.

    The encoding is unambiguous: ("ab", "c"), ("a", "bc"), (1,) and ("1",) are four different keys.
    Raise TypeError for words that are neither int nor str.
    """
    return rng_from_digest(_digest(words))


def rng_from_digest(digest: bytes) -> np.random.Generator:
    """Return the generator keyed by the first 16 bytes of a digest, for keys encoded by the caller."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def shared_rng(*words: int | str) -> np.random.Generator:
    """Return the same generator as `rng`, but valid only until the next call in this thread, which re-keys it.

    Constructing a Philox draws system entropy that the key then replaces; re-keying one is six times faster.
    """
    _SHARED.state["state"]["key"] = np.frombuffer(_digest(words)[:16], "<u8")
    _SHARED.bits.state = _SHARED.state
    return _SHARED.rng


class _SharedRng(threading.local):
    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.state = self.bits.state  # initial state: counter at 0, nothing drawn yet
        self.rng = np.random.Generator(self.bits)


_SHARED = _SharedRng()


def _digest(words: tuple[int | str, ...]) -> bytes:
    parts = []
    for word in words:
        if type(word) is int:
            text, kind = str(word).encode(), b"i"
        elif isinstance(word, str):
            text, kind = word.encode("utf-8", "surrogateescape"), b"s"
        else:
            raise TypeError(f"a generator is keyed by int and str, not by {type(word).__name__} ({word!r})")
        parts += [kind, str(len(text)).encode(), b":", text]
    return hashlib.sha256(b"".join(parts)).digest()
