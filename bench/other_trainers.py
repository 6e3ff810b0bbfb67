"""Other trainers' own models of the same numbers: written as a checkpoint, read, patched and frozen by their code.

The optimizer, the loop and the tokens are the bench's, as for everybody.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import torch
from hugging_face import drawn_model, runner_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from workload import Runner, Workload


@contextlib.contextmanager
def checkpoint(workload: Workload) -> Iterator[str]:
    """A folder with the drawn model, in the compute dtype, and a tokenizer that is there only to be read."""
    with tempfile.TemporaryDirectory() as folder:
        drawn_model(workload, ()).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        yield folder


def build_llama_factory(workload: Workload) -> Runner:
    """LLaMA-Factory with ``use_llama_pro``: float32 masters of the layers it unfreezes, checkpointing as it likes.

    It derives which layers train from their number, and that must come to the same ones. Its check of versions is off,
    as it wants a transformers older than ours: 0.9.5 runs with 5.13, and fails in its checkpointing with 5.24.
    """
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    on_gpu = workload.device == "cuda"
    with checkpoint(workload) as folder:
        model_args, _, _, finetuning_args, _ = get_train_args({
            "model_name_or_path": folder,
            "output_dir": os.path.join(folder, "out"),
            "stage": "pt",
            "finetuning_type": "freeze",
            "freeze_trainable_layers": len(workload.trained_blocks),
            "use_llama_pro": True,
            "flash_attn": "sdpa",
            "cutoff_len": workload.seq,
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "report_to": "none",
        })  # fmt: skip
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        model = load_model(tokenizer, model_args, finetuning_args, is_trainable=True)
    new = {f"model.layers.{index}" for index in workload.trained_blocks}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if {name.rsplit(".", 3 if "_proj" in name else 2)[0] for name in trained} != new:
        raise ValueError(f"it trains {len(trained)} tensors, which are not those of {sorted(new)}")
    return runner_of(workload, model, list(model.named_parameters()))


def build_unsloth(workload: Workload) -> Runner:
    """Unsloth's model, all of it in bf16 as its full fine-tuning makes it, the old blocks frozen afterwards.

    Written from its source and not run: it refuses to be imported without a GPU.
    """
    from unsloth import FastLanguageModel

    with checkpoint(workload) as folder:
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=workload.seq,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            full_finetuning=True,
            use_gradient_checkpointing=False,
        )
    new = tuple(f"model.layers.{index}." for index in workload.trained_blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(new))
    return runner_of(workload, model.train(), list(model.named_parameters()), pure=True)
