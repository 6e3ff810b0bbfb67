"""llama-pro-fast: post-pretraining by block expansion (LLaMA Pro, arXiv 2401.02415)."""

__version__ = "0.1.0"
