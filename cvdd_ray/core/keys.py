"""Randomness as a pure function of (seed, place): no global generator, nothing depends on the order of work."""

import hashlib

import torch


def key(seed: int, *place: int | str) -> int:
    """Return a 63-bit number that depends on `seed` and every part of `place` (stage, image index, iteration ...)."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *place: int | str) -> torch.Generator:
    """Return a fresh CPU generator for one place; two calls with equal arguments draw equal numbers."""
    return from_key(key(seed, *place))


def from_key(number: int) -> torch.Generator:
    """Return the generator of a place whose key is known."""
    return torch.Generator().manual_seed(number)
