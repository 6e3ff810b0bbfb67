"""Hugging Face's side: model folders, configs, tensor names."""
