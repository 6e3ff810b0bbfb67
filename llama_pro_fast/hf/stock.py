"""Models as stock transformers loads and runs them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers

from llama_pro_fast.hf.folder import no_progress_bars


def stock_model(folder: Path, dtype: torch.dtype) -> Any:
    """A folder's causal language model, on the CPU, for evaluation. Two folders of equal tensors compute alike, to the
    last bit."""
    with no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        # Loading maps the files, and a CPU product may round otherwise where its weights start off a cache line: two
        # folders would differ by where their tensors happen to lie. A copy of one's own is aligned.
        parameter.data = parameter.data.clone()
    return model


def leave_out_blocks(model: Any, blocks: Collection[int]) -> None:
    """Take some of its decoder blocks out of a model of :func:`stock_model`; the others move up."""
    decoder, config = model.get_decoder(), model.config
    kept = [index for index in range(config.num_hidden_layers) if index not in blocks]
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in kept)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in the cache of keys and values
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
