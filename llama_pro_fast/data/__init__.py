"""From tokens on disk to packed batches: which documents share a sequence, and in which order sequences train."""
