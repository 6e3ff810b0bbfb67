"""The shapes of well-known models by their hub id, so that a run on one can be planned before anything is downloaded.

What decides memory and work, as each model's published config.json has it; no weights, nothing that a run reads.
"""

from __future__ import annotations

from typing import Any


def model_shape(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """Keys of a transformers config."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | more


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_QWEN_3 = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_MISTRAL = {
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}

SHAPES = {
    "meta-llama/Llama-2-7b-hf": model_shape("llama", 32, 4096, 11_008, 32, 32, 32_000, **_LLAMA_2),
    "meta-llama/Llama-2-70b-hf": model_shape("llama", 80, 8192, 28_672, 64, 8, 32_000, **_LLAMA_2),
    "meta-llama/Llama-3.2-1B": model_shape(
        "llama", 16, 2048, 8192, 32, 8, 128_256, head_dim=64, tie_word_embeddings=True, **_llama3(32.0)
    ),
    "meta-llama/Llama-3.1-8B": model_shape("llama", 32, 4096, 14_336, 32, 8, 128_256, **_llama3(8.0)),
    "meta-llama/Llama-3.1-70B": model_shape("llama", 80, 8192, 28_672, 64, 8, 128_256, **_llama3(8.0)),
    "Qwen/Qwen3-8B-Base": model_shape(
        "qwen3", 36, 4096, 12_288, 32, 8, 151_936, max_position_embeddings=32_768, **_QWEN_3
    ),
    "Qwen/Qwen3-8B": model_shape("qwen3", 36, 4096, 12_288, 32, 8, 151_936, max_position_embeddings=40_960, **_QWEN_3),
    "Qwen/Qwen3-32B": model_shape("qwen3", 64, 5120, 25_600, 64, 8, 151_936, max_position_embeddings=40_960, **_QWEN_3),
    "mistralai/Mistral-7B-v0.3": model_shape("mistral", 32, 4096, 14_336, 32, 8, 32_768, **_MISTRAL),
}
