"""A tokenizer from a run's own training text, for a base trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.sources import ResolvedSource, iterate_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""As in Llama 3, and not `<s>`, which pages of markup hold: text that spells a mark would be read as one."""

READ_CHARACTERS = 2**28
"""Text the merges are counted on at most, document by document over all sources: minutes, and they settle before."""


def train_tokenizer(
    sources: Sequence[ResolvedSource], *, vocab_size: int, held_out: float, bos: Any, eos: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the sources' training documents; held-out ones have no say in it.

    Every text can be encoded (each byte is a token) and comes back exactly; a document begins with BOS, as in Llama.

    Args:
        sources: those with a weight above 0 are read.
        vocab_size: of the model; the tokenizer has at most that many tokens.
        held_out: share of the documents that is held out.
        bos, eos: their ids in the config; 0 and 1, or 1 and 0.

    Raises:
        UserError: a source cannot be read, or the vocabulary is smaller than the alphabet of bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2 or [bos, eos] not in ([0, 1], [1, 0]):
        raise UserError(
            f"--model.tokenizer train: needs a vocab_size of at least {len(alphabet) + 2} (256 bytes, two marks) and "
            f"0 and 1 as bos_token_id and eos_token_id; config.json has {vocab_size}, {bos} and {eos}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [BOS, EOS] if bos == 0 else [EOS, BOS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_training_texts(sources, held_out), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a trained tokenizer so that any version of transformers, and what builds on one, reads it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a name of its own there that 4 does not know, and reads the old one as the same class.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _training_texts(sources: Sequence[ResolvedSource], held_out: float) -> Iterator[str]:
    """The training documents, one of each source in turn."""
    left = READ_CHARACTERS
    streams = [iterate_documents(source) for source in sources if source.trains]
    for document in chain.from_iterable(zip_longest(*streams)):
        if document is not None and not is_held_out(document.split_key, held_out):
            yield document.text
            left -= len(document.text)
            if left <= 0:
                return
