"""What a method gains in a domain and forgets elsewhere: methods at equal tokens, on a real base.

    python tools/gguf_base.py SmolLM2-135M-Instruct.Q4_1.gguf WORK/base
    python bench/forgetting.py --work WORK --root ROOT --budget 3600

The base is SmolLM2-135M-Instruct, the domain German, which it hardly knows (tools/forgetting_texts.py makes the texts).
Every method sees the same tokens in the same order, in as many steps, computed in bfloat16 from float32 weights, and
each has rates of its own. Models are kept and measured in float32: rounded to bfloat16, a weight that moved by less
than the rounding is back at the base's, which costs full fine-tuning at small rates a part of its gain.

    expansion   six new blocks, one after every fifth block
    upper       six new blocks in the upper half
    muon        as expansion, matrices by Muon
    taught      as expansion, with KL to the base on what is replayed; own-text with text for it that the base wrote
    full        full fine-tuning; merged with its base in the picture of the dials
    blocks      the six highest blocks of the base, as many parameters as six new ones
    lora-70     PEFT's LoRA on every linear layer, as many parameters; lora-256 of the rank that is recommended
    english     as expansion, on nothing but the text for replay: what any training does to this base

First every rate with a fifth of each step replayed, by what it tells; then of each method's best rate (most gained less
forgotten) two more seeds and a run without replay, and the dial: new blocks times A, or the weights A of the way from
the base. A run is a row of the result, which is read back: a bench that was stopped goes on with what is missing.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import common
import pictures
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast import train
from llama_pro_fast.config import (
    DataConfig,
    EvalConfig,
    ExpandConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Source,
    TrainConfig,
)
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.alternatives import lora_estimate
from llama_pro_fast.planning.cost import step_cost
from llama_pro_fast.planning.job import Job, expanded_shape
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.schedule import settle_schedule
from llama_pro_kernels import select_attention_backend

sys.path.insert(0, str(common.ROOT / "tools"))
from forgetting_texts import DOMAIN, GENERAL, LEARNED, REPLAYED, write_texts

SEQ_LEN, BATCH, DTYPE = 512, 4, torch.bfloat16
SIZES = {"cpu": 65_536, "cpu-long": 262_144, "gpu": 4_194_304}
"""Tokens of a run."""
MEASURED = 4096
"""Tokens of each text."""
REPLAY = 0.2
SPAWN = multiprocessing.get_context("spawn")
SCALES = (0.25, 0.5, 0.75)


class Method(NamedTuple):
    """How it is trained.

    Attributes:
        rates: to be swept.
        expand, parameters, blocks, optimizer: of the trainer's configuration.
        kl_weight: with it the base is the teacher on what is replayed.
        own_text: whether the base wrote that itself.
        rank: of LoRA, which is trained here instead.
    """

    title: str
    rates: tuple[float, ...]
    expand: ExpandConfig = ExpandConfig()
    parameters: str = "new_blocks"
    blocks: str | None = None
    optimizer: str = "adamw"
    kl_weight: float = 0.0
    own_text: bool = False
    rank: int = 0


SIX = ExpandConfig(groups=6)
METHODS = {
    "expansion": Method("new blocks", (5e-4, 1e-3, 2e-3), SIX),
    "full": Method("full fine-tuning", (5e-5, 1e-4, 3e-4), parameters="all"),
    "lora-70": Method("LoRA, rank 70", (3e-4, 1e-3, 3e-3), rank=70),
    "blocks": Method("six old blocks", (1e-4, 3e-4, 1e-3), parameters="blocks", blocks="24,25,26,27,28,29"),
    "upper": Method("new blocks, upper half", (5e-4, 1e-3, 2e-3), ExpandConfig(after="16,18,20,23,26,29")),
    "lora-256": Method("LoRA, rank 256", (3e-4, 1e-3, 3e-3), rank=256),
    "muon": Method("new blocks, Muon", (1e-3, 3e-3, 1e-2), SIX, optimizer="muon"),
    "taught": Method("new blocks, the base as teacher", (5e-4, 1e-3, 2e-3), SIX, kl_weight=1.0),
    "own-text": Method("the same on text by the base", (5e-4, 1e-3, 2e-3), SIX, kl_weight=1.0, own_text=True),
    "english": Method("new blocks, English only", (1e-3,), SIX),
}
MAIN = ("expansion", "full", "lora-70", "blocks", "taught", "own-text")
"""That get three seeds."""
DIALS = ("expansion", "full", "lora-70")


@dataclass(frozen=True)
class Asked:
    """A run: of a method, or with a scale the model between its base and that run."""

    method: str
    rate: float
    replay: float = REPLAY
    seed: int = 0
    scale: float = 1.0

    def is_row(self, row: dict[str, Any]) -> bool:
        return all(row[key] == value for key, value in vars(self).items())


def wanted(rows: list[dict[str, Any]], methods: list[str]) -> Iterator[Asked]:
    """All runs, in the order of their worth; of later ones only those whose rate is found."""
    for turn in range(3):  # the middle rate first, so that every method has a row early
        for name in methods:
            rates = METHODS[name].rates
            order = sorted(rates, key=lambda rate: abs(rates.index(rate) - len(rates) // 2))
            if turn < len(order):
                yield Asked(name, order[turn])
    best = {name: rate for name in methods if (rate := best_rate(rows, name)) is not None}
    for seed in (1, 2):
        yield from (Asked(name, best[name], seed=seed) for name in MAIN if name in best)
    of_replay = ("taught", "own-text", "english")
    yield from (Asked(name, rate, replay=0.0) for name, rate in best.items() if name not in of_replay)
    yield from (Asked(name, best[name], scale=scale) for name in DIALS if name in best for scale in SCALES)


def best_rate(rows: list[dict[str, Any]], name: str) -> float | None:
    """At which most is gained less what is forgotten; None before every rate was tried."""
    tried = {rate: [row for row in rows if Asked(name, rate).is_row(row)] for rate in METHODS[name].rates}
    return max(tried, key=lambda rate: balance(rows, tried[rate][0])) if all(tried.values()) else None


def balance(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    gain, forgotten = gain_and_forgotten(rows, row)
    return gain - forgotten


def gain_and_forgotten(rows: list[dict[str, Any]], row: dict[str, Any]) -> tuple[float, float]:
    """Nats per token, means over the texts of the domain and over the others."""
    base = next(each for each in rows if each["method"] == "base")["loss"]
    gain, rise = ([row["loss"][text] - base[text] for text in texts] for texts in (DOMAIN, GENERAL))
    return -mean(gain), mean(rise)


class Bench:
    """The runs of one size, in a folder that keeps texts, runs and rows.

    Args:
        out: the rows, read back if they are there.
    """

    def __init__(self, size: str, work: Path, out: Path) -> None:
        self.steps = SIZES[size] // (SEQ_LEN * BATCH)
        self.base, self.texts, self.work, self.out = work / "base", work / "texts", work, out
        self.rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []

    def row(self, asked: Asked | None) -> None:
        """Do a run, or with None measure the base, and keep its row."""
        started = time.perf_counter()
        if asked is None:
            folder, facts = self.base, {"method": "base", "parameters": None}
        elif asked.scale != 1.0:
            folder, facts = self.between(asked), vars(asked)
        else:
            folder = self.trained(asked)
            facts = vars(asked) | {"seconds": round(time.perf_counter() - started, 1)}
        self.rows.append(facts | {"loss": self.losses(folder)} | common.provenance(common.found_device("auto")))
        common.write_json(self.out, self.rows)

    def folder(self, asked: Asked) -> Path:
        return self.work / f"{asked.method}-{asked.rate:g}-replay-{asked.replay:g}-seed-{asked.seed}"

    def config(self, asked: Asked) -> RunConfig:
        method, english = METHODS[asked.method], asked.method == "english"
        general: str | list[Source] = str(self.texts / f"{REPLAYED}.jsonl")
        if method.own_text:  # once as much as is replayed
            documents = round(REPLAY * self.steps * BATCH * SEQ_LEN / 400)
            general = [Source(path="base:samples", documents=documents)]
        return RunConfig(
            model=ModelConfig(path=str(self.base)),
            expand=method.expand,
            data=DataConfig(
                domain=str(self.texts / f"{REPLAYED if english else LEARNED}.jsonl"),
                general=general,
                replay=0.0 if english else asked.replay,
                cache=str(self.work / "tokens"),
            ),
            optim=OptimConfig(name=method.optimizer, lr=asked.rate),
            train=TrainConfig(
                seq_len=SEQ_LEN,
                batch_size=BATCH,
                steps=self.steps,
                seed=asked.seed,
                dtype="bfloat16",
                parameters=method.parameters,
                blocks=method.blocks,
                kl_weight=method.kl_weight if asked.replay else 0.0,
            ),
            # Every method's model is measured here, in the same way.
            eval=EvalConfig(every=self.steps, tokens=SEQ_LEN),
            output=str(self.folder(asked)),
        )

    def trained(self, asked: Asked) -> Path:
        """The model that a run makes, as a folder; made before if it is there."""
        folder, config, rank = self.folder(asked), self.config(asked), METHODS[asked.method].rank
        model = folder if rank else folder / "export"
        if not (model / "config.json").exists():
            with SPAWN.Pool(1) as pool:  # so that nothing of a run is left in memory
                if rank:
                    pool.apply(train_lora, (rank, config, folder))
                else:
                    pool.apply(train, (str(folder) if (folder / "config.yaml").exists() else config,))
        return model

    def between(self, asked: Asked) -> Path:
        """A model between the base and a run's: new blocks times the scale; of another method its weights that much of
        the way, which for LoRA is its own scale."""
        run = self.folder(asked)
        folder = self.work / f"{run.name}-scale-{asked.scale:g}"
        if folder.exists():
            return folder
        if METHODS[asked.method].expand.wanted:
            export_run(run, folder, scale=asked.scale)
            return folder
        end = PretrainedFolder(self.trained(asked))
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        for name, weight in model.named_parameters():
            weight.data.lerp_(end.tensor(name).float(), asked.scale)
        save(model, self.base, folder)
        return folder

    def losses(self, folder: Path) -> dict[str, float]:
        """Nats per token on each text."""
        config = PretrainedFolder(folder).config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = select_attention_backend(device, torch.float32, head_dim=block_spec(config, 0).head_dim)
        model = load_model(PretrainedFolder(folder), device=device, max_length=SEQ_LEN, attention=attention)
        return {name: evaluate(model, self.batches(name)).loss for name in (*DOMAIN, *GENERAL, REPLAYED)}

    @functools.cache  # noqa: B019
    def batches(self, name: str) -> list[PackedBatch]:
        """MEASURED tokens of a text, of each document at most a sequence."""
        rows = [json.loads(line)["text"] for line in (self.texts / f"{name}.jsonl").open(encoding="utf-8")]
        random.Random(0).shuffle(rows)
        tokenizer, documents, left = AutoTokenizer.from_pretrained(self.base), [], MEASURED
        while left > 1:
            documents.append(tokenizer(rows.pop())["input_ids"][: min(SEQ_LEN, left)])
            left -= len(documents[-1])
        return [PackedBatch.from_documents(documents[at : at + 8]) for at in range(0, len(documents), 8)]


def train_lora(rank: int, config: RunConfig, folder: Path) -> None:
    """PEFT's LoRA on the steps that the trainer would make, by its optimizer; saved merged."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    size = {"seq_len": SEQ_LEN, "seed": config.train.seed, "batch_size": BATCH}
    text = Corpus.prepare(config.data, tokenizer, **size, default_general=False).train
    torch.manual_seed(config.train.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=DTYPE).to(device)
    # Alpha is the rank: the adapters' sum as it is. PEFT keeps them in float32.
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(model, trained, settle_schedule(config.optim, config.train.steps), config.train.steps)
    for step in range(config.train.steps):
        batches = [text.batch(step * BATCH + number, 1).to(device) for number in range(BATCH)]
        valid, losses = sum(batch.num_valid for batch in batches), []
        for batch in batches:
            with torch.autocast(device, DTYPE):
                # One row whose positions begin anew: transformers keeps the documents apart by them.
                found = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
            loss = F.cross_entropy(found.logits[0].float(), batch.labels, reduction="sum") / valid
            loss.backward()
            losses.append(loss.detach())
        optimizer.step(step, torch.stack(losses).sum())
    save(model.float().merge_and_unload(), config.model.path, folder)  # a merge in bf16 would round what was learned


def save(model: torch.nn.Module, base: Path | str, folder: Path) -> None:
    """In the dtype of the exports of the others; the folder comes into being whole."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)


def cost(method: Method, base: Any) -> tuple[float, float]:
    """GFLOP of a token in training, and where it is served; LoRA is merged by then."""
    layers, plan = base.num_hidden_layers, None
    if method.rank:
        job = Job(config=base, trained=Trained.all_of(layers), seq_len=SEQ_LEN)
        training = lora_estimate(job, rank=method.rank, micro_batch_size=1, usable=2**62).cost
    else:
        if method.expand.wanted:
            plan = ExpansionPlan.from_config(layers, method.expand)
        trained = what_trains({}, layers, parameters=method.parameters, blocks=method.blocks, plan=plan, name="")
        base = base if plan is None else expanded_shape(base, plan)
        training = step_cost(base, trained, seq_len=SEQ_LEN, taught=REPLAY if method.kl_weight else 0.0)
    return training.total / 1e9, step_cost(base, Trained(base.num_hidden_layers, ()), seq_len=SEQ_LEN).forward / 1e9


def summary(rows: list[dict[str, Any]], base: Any) -> list[tuple[str, ...]]:
    """A line for each method, rate, replay and scale: means over seeds, and their standard deviation."""
    lines, groups = [], {}
    for row in rows[1:]:
        groups.setdefault((row["method"], row["rate"], row["replay"], row["scale"]), []).append(row)
    for (method, *how), of_seeds in groups.items():
        points = [gain_and_forgotten(rows, row) for row in of_seeds]
        cells = [
            f"{mean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
            for values in zip(*points, strict=True)
        ]
        losses = [f"{mean(row['loss'][text] for row in of_seeds):.3f}" for text in (*DOMAIN, *GENERAL)]
        work = [f"{gflop:.2f}" for gflop in cost(METHODS[method], base)]
        lines.append((METHODS[method].title, *(f"{value:g}" for value in how), *cells, *losses, *work))
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gain against forgetting: left every method at its rates, right the dials at their best ones."""
    figure = pictures.sheet(11, 5)
    for axes, title, key in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        (f"at several rates, {REPLAY:.0%} replay (bars: over seeds)", "between the base and the best run"),
        ("rate", "scale"),
        strict=True,
    ):
        for number, (name, method) in enumerate(METHODS.items()):
            best = best_rate(rows, name)
            groups: dict[float, list[tuple[float, float]]] = {0.0: [(0.0, 0.0)]} if key == "scale" else {}
            for row in rows[1:]:
                is_kind = row["scale"] == 1 if key == "rate" else row["rate"] == best and row["seed"] == 0
                if row["method"] == name and row["replay"] == REPLAY and is_kind:
                    groups.setdefault(row[key], []).append(gain_and_forgotten(rows, row))
            if key == "scale" and len(groups) < 3:
                continue
            color, middle = f"C{number}", []
            for value, points in sorted(groups.items()):
                (gain, forgotten), spread = map(mean, zip(*points, strict=True)), [0.0, 0.0]
                if len(points) > 1:
                    spread = [stdev(values) for values in zip(*points, strict=True)]
                middle.append((forgotten, gain))
                axes.errorbar(forgotten, gain, xerr=spread[1], yerr=spread[0], fmt="o", ms=4, color=color, capsize=2)
                axes.annotate(
                    f"{value:g}", middle[-1], xytext=(4, -10), textcoords="offset points", fontsize=7, color=color
                )
            if middle:
                axes.plot(*zip(*middle, strict=True), "-", color=color, label=method.title)
        axes.plot(0, 0, "k*", markersize=10)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("forgotten: rise of the loss on other texts, nats per token")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.set_ylabel("gained: fall of the loss on German, nats per token")
    pictures.save(figure, path)


def main() -> None:
    parser = common.parser(__doc__, out="forgetting-SIZE-DEVICE", device=False)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, 1 GB each, with the base in base/")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the texts' packages are unpacked")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these only; default: all")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run is begun")
    options = parser.parse_args()
    started, work = time.monotonic(), options.work.resolve()
    out = options.out or common.result_file(
        f"forgetting-{options.size}", common.device_name(common.found_device("auto"))
    )
    if not (work / "texts").exists():
        write_texts(options.root, work / "texts")
    bench, config = Bench(options.size, work, out), PretrainedFolder(work / "base").config
    if not bench.rows and options.budget:
        bench.row(None)
    while time.monotonic() - started < options.budget:
        missing = (
            asked
            for asked in wanted(bench.rows, options.methods.split(","))
            if not any(asked.is_row(row) for row in bench.rows[1:])
        )
        if (asked := next(missing, None)) is None:
            break
        bench.row(asked)
        print(*summary(bench.rows[:1] + bench.rows[-1:], config)[0], flush=True)
    if not bench.rows:
        return
    columns = ("method", "rate", "replay", "scale", "gained", "forgotten", *DOMAIN, *GENERAL, "train", "serve")
    print(common.table(columns, summary(bench.rows, config)), "\nlosses in nats per token, work in GFLOP per token")
    draw(bench.rows, common.ROOT / "docs" / "pictures" / f"forgetting-{options.size}.png")


if __name__ == "__main__":
    main()
