"""The decoder: packed batches, blocks, what trains. PyTorch alone: no file, no transformers config."""
