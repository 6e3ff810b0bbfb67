"""What can be wrong with a tokenizer before a token is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES = (
    "The quick brown fox's 12345 jumps, isn't it?  Two spaces\tand a tab.",
    "def f(x):\n    return x ** 2  # 3.14159\n\n\nclass A:\n        pass\r\n",
    "Größe naïve Ωμέγα Привет мир 你好世界 こんにちは 안녕 مرحبا नमस्ते ไทย",
    "a\u0301 🙂👩‍👩‍👧 ½ № …—–“”  \u00a0\u200b ﬁ ①",
)
"""Where pre-tokenizers and normalisers differ: digits, spaces, contractions, scripts, what Unicode folds."""


def warnings(tokenizer: PreTrainedTokenizerFast, folder: Path, config: Any) -> Iterator[str]:
    """A line for each fault that trains a worse model without an error.

    Args:
        folder: the model's.
        config: transformers' config of the model.
    """
    if tokenizer.eos_token_id is None:
        eos = getattr(config, "eos_token_id", None)
        named = tokenizer.convert_ids_to_tokens(eos) if isinstance(eos, int) else None
        add = repr(named) if named else "its name"
        yield (
            f"{folder}: the tokenizer names no EOS, so nothing in the text says where a document ends, and the model "
            f"will not learn to stop: put `eos_token`: {add} into tokenizer_config.json"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    for sample in SAMPLES:
        loaded = tokenizer(sample, add_special_tokens=False)["input_ids"]
        written = own.encode(sample, add_special_tokens=False).ids
        if loaded != written:
            yield (
                f"{folder}: transformers' {type(tokenizer).__name__} makes other tokens ({len(loaded)}) than the "
                f"folder's own tokenizer.json ({len(written)}), for one of {sample!r}: the base was trained with one "
                "of them; set `tokenizer_class` in tokenizer_config.json to PreTrainedTokenizerFast for the file's"
            )
            return
