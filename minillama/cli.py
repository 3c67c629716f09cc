"""The command line: `minillama COMMAND`. Each command is a dataclass: its fields are the flags.

Only the command that runs imports torch, so that --help answers at once.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minillama.config import PRESETS, LlamaConfig, Sampling, TrainingConfig

if TYPE_CHECKING:
    from minillama.training.run import PretrainingRun

# Fields of a dataclass within a command are flags without a prefix: --steps, not --training.steps.
FLAT = tyro.conf.arg(name="")

# The recipe of the demo, and of the toy checkpoint that the notebooks show.
TOY_TRAINING = TrainingConfig()


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model on the tales of the toy world, and let it write three stories.

    The first two minutes of minillama: a tokenizer, a Llama, a loss curve, and stories that are
    checked for consistency. Example: minillama demo
    """

    out: Path = Path("runs/demo")  # folder for the checkpoint, loss.png, log.jsonl and config.json
    steps: int = TOY_TRAINING.steps  # optimiser steps
    seed: int = 0
    n_checked: int = 100  # stories to sample and check; the first three are shown

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
        run = PretrainingRun(self.out, stories, tales.corpus("valid"), tokenizer, config, training)
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
    """Pretrain a model on your own text; the last tenth of it is held out for validation.

    Example: minillama pretrain --text book.txt --out runs/book --steps 2000
    """

    text: tuple[Path, ...]  # UTF-8 text files; each is one document
    by_line: bool = False  # each line of the files is a document of its own
    out: Path = Path("runs/pretrain")  # a new folder
    preset: str = "toy"  # the model's sizes: see `minillama info`
    tokenizer: Path | None = None  # a tokenizer.model; without it, one is trained on the text
    vocab_size: int | None = None  # of the tokenizer that is trained; without it, the preset's
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one
    training: Annotated[TrainingConfig, FLAT] = field(default_factory=TrainingConfig)

    def run(self) -> None:
        from minillama.checkpoint import load_tokenizer
        from minillama.data.corpora import hold_out, read_documents
        from minillama.tokenizer import train_tokenizer
        from minillama.training.run import PretrainingRun

        config = LlamaConfig.preset(self.preset)
        _keep(self.out / "checkpoint")
        documents, held_out = hold_out(read_documents(self.text, self.by_line))
        if self.tokenizer:
            tokenizer = load_tokenizer(self.tokenizer)
        else:
            tokenizer = train_tokenizer(documents, self.vocab_size or config.vocab_size)
        config = replace(config, vocab_size=tokenizer.vocab_size)
        run = PretrainingRun(
            self.out, documents, held_out, tokenizer, config, self.training, _device(self.device)
        )
        _follow(run)
        print(f'Try it: minillama generate --model {self.out / "checkpoint"} "Once upon a time"')


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, and write the text as it comes.

    Example: minillama generate --model runs/demo/checkpoint --temperature 0.8 "Once upon a time"
    """

    prompt: tyro.conf.Positional[str] = ""  # without it, the model starts from BOS alone
    model: Path  # a checkpoint folder, or a llama2.c .bin
    tokenizer: Path | None = None  # where it does not lie beside the weights
    max_new_tokens: int = 200
    sampling: Annotated[Sampling, FLAT] = field(default_factory=Sampling)
    seed: int | None = None  # the same seed draws the same text
    stop: tuple[str, ...] = ()  # end before any of these strings
    device: str = "auto"  # cpu, cuda, mps; auto takes a GPU where there is one

    def run(self) -> None:
        from minillama import load, stream

        model, tokenizer = load(self.model, self.tokenizer, device=_device(self.device))
        pieces = stream(
            model,
            tokenizer,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.seed,
            stop=self.stop,
        )
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show sizes: all presets, or one preset or checkpoint in full.

    Example: minillama info llama2-7b
    """

    model: tyro.conf.Positional[str | None] = None  # a preset's name or a checkpoint

    def run(self) -> None:
        if self.model is None:
            print(f"{'preset':<15}{'parameters':>16}{'context':>9}{'heads':>7}{'KV heads':>10}")
            for name, config in PRESETS.items():
                print(
                    f"{name:<15}{config.n_parameters:>16,}{config.max_seq_len:>9,}"
                    f"{config.n_heads:>7}{config.n_kv_heads:>10}"
                )
            return
        if self.model not in PRESETS and Path(self.model).exists():
            from minillama.checkpoint import load_config

            config = load_config(self.model)
        else:
            config = LlamaConfig.preset(self.model)
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


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[TrainTokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command. A mistake of the user ends it with one text and exit code 2."""
    try:
        command = tyro.cli(
            Command,
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
        print(f"minillama: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nminillama: stopped; what was saved before is as it was.", file=sys.stderr)
        sys.exit(130)


def _follow(run: "PretrainingRun") -> None:
    """Train to the end, showing where it stands."""
    from tqdm import tqdm

    config = run.config
    tokens_per_step = config.batch_size * config.accumulation * config.seq_len
    print(
        f"Model: {run.model.config.n_parameters:,} parameters. "
        f"Data: {run.rows[:, 1:].size:,} tokens. "
        f"Training: {config.steps:,} steps of {tokens_per_step:,} tokens."
    )
    on_terminal = sys.stderr.isatty()
    bar = tqdm(run, total=config.steps, unit="step", disable=not on_terminal)
    for stats in bar:
        bar.set_postfix_str(f"loss {stats.loss:.3f}", refresh=False)
        if not on_terminal and (stats.step % max(config.steps // 10, 1) == 0 or stats.step == 1):
            print(f"step {stats.step:6,}  loss {stats.loss:.3f} nats per token", flush=True)
    print(
        f"Validation loss {run.validation_loss:.3f} nats per token. "
        f"{run.folder} holds checkpoint/, loss.png, log.jsonl and config.json."
    )


def _keep(path: Path) -> None:
    """Nothing that stands there is overwritten."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists and is not overwritten. Name another place with --out."
        )


def _device(name: str) -> str:
    """The device to use; "auto" is CUDA where there is a GPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}). "
            f"Choose cpu, or leave --device out."
        ) from None
    return name
