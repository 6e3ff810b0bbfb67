"""Digests of models: one for a set of tensors, whatever files they lie in."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

from llama_pro_fast.hf.folder import PretrainedFolder


def combined_digest(digests: dict[str, str]) -> str:
    """One digest for a set of tensors, whatever shards they lie in: SHA-256 over sorted ``name:digest`` lines."""
    lines = "".join(f"{name}:{digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def folder_digest(folder: PretrainedFolder) -> str:
    """One digest for all of a folder's tensors, read once, a few at a time side by side."""
    # hashlib lets go of the interpreter while it hashes.
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = dict(zip(folder.entries, pool.map(folder.digest, folder.entries), strict=True))
    return combined_digest(digests)
