"""Random streams named by what they are for, so that no draw depends on the rank or on what was drawn before."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded with a hash of ``key``, for example ``(seed, "lane", lane, step)``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
