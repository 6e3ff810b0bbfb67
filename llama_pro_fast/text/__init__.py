"""From text, wherever it lies, to tokens on disk. Nothing here imports PyTorch, so that worker processes start fast.

resolve_sources(config.data)    which files of which sources
units_of(source)                the work in pieces: some files, or a stretch of one
read_unit(unit)                 its documents, one at a time, and what could not be read
tokenize_source(source, ...)    their tokens in the cache, made by worker processes: a TokenStore
"""
