"""Text -> tokens on disk -> packed batches.

    resolve_sources(config.data)        which files, with which weight
    tokenize_source(source, tokenizer)  their tokens in the cache, split into training and held-out: a TokenStore
    PackedDataset(stores and weights)   batch(start, count) for training, a pure function of (seed, start, count)
    HeldOutSample(store)                what is measured

Reading and tokenising import pyarrow and transformers when they need them; packing needs only NumPy and PyTorch.
"""
