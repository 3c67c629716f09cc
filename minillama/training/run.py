"""A whole pretraining run: documents in, a folder with everything that came of it out."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import log as ln
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
import tomli_w
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

from minillama.checkpoint import CheckpointError, save
from minillama.checkpoint.native import check_replaceable
from minillama.checkpoint.weights import check_vocabulary, model_from
from minillama.config import LlamaConfig, RunConfig, TrainingConfig, override, read_toml
from minillama.data.mixture import Batches
from minillama.data.packing import Batch, as_batch, open_rows, write_tokens
from minillama.model import Llama
from minillama.plan import TrainingPlan, check_fits, free_memory
from minillama.tokenizer import Tokenizer
from minillama.training.checkpointing import checkpoint_activations
from minillama.training.loop import evaluate, train
from minillama.training.optimizer import make_optimizer
from minillama.training.parallel import (
    Ranks,
    all_or_none,
    from_main,
    is_main,
    meet,
    shard,
    whole_weights,
)
from minillama.training.state import (
    keep_newest,
    load_progress,
    load_tensors,
    newest_state,
    save_state,
    training_tensors,
)
from minillama.training.step import Diverged, StepStats, compile_blocks, precision

CONFIG, LOG, TOKENIZER, SIZES = "config.toml", "log.jsonl", "tokenizer.model", "sizes.json"
HELD_OUT = "held_out"  # what no step learns from, among the sources in tokens/
Documents = Iterable[str]


@dataclass(frozen=True)
class Validation:
    """How well the model predicts the held-out text."""

    loss: float  # nats per token
    bits_per_byte: float  # of UTF-8, so that models with different tokenizers can be compared


class PretrainingRun:
    """Pretrain a new model on documents. Iterating trains; at the end the folder is complete.

        config.toml    all settings; with tokens/ it is what `resume` needs
        tokens/        the documents as token ids, a file per source, and the tokenizer
        log.jsonl      a line per step, and one per validation
        states/        the newest states to resume from, one folder each
        loss.png       the curve
        checkpoint/    what `minillama.load` opens

    `documents` is one source, or several by name; then `shares` says in which proportions they are
    mixed. They are read once and need not fit into memory. What can fail early fails here, before
    the first step: a text shorter than a row, a tokenizer of another size, a folder that cannot be
    written, a batch that the processes cannot share equally. Two runs with equal arguments write
    equal bytes (on one machine, in one process), also when one of them was killed, at any moment,
    and resumed.

    Under torchrun all processes make the run, with equal arguments, and iterate in step: together
    they take the steps that one process would take (see `minillama.training.parallel`). Rank 0
    alone writes, so machines must share the folder, but for states/, where each saves its part.

    `origin` is kept in config.toml as its table [data]: where the text came from.
    Raises ValueError or OSError. Shown in notebooks/08_pretraining.ipynb.
    """

    RESULT: ClassVar[str] = "checkpoint"  # what the folder holds at the end
    KIND: ClassVar[str] = "pretrain"  # in config.toml: the command that resumes it
    # Of config.toml: what a run is, beside its training.
    _TABLES: ClassVar[tuple[str, ...]] = ("model", "shares")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        documents: Documents | Mapping[str, Documents],
        held_out: Documents,
        tokenizer: Tokenizer,
        model_config: LlamaConfig,
        config: TrainingConfig,
        device: str | torch.device = "cpu",
        saving: RunConfig | None = None,
        shares: Mapping[str, float] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {
            "model": model_config.to_dict(),
            "training": asdict(config),
            "saving": asdict(saving or RunConfig()),
            "shares": dict(shares or {"text": 1.0}),
            "data": dict(origin or {}),
        }
        self._start(Path(folder), documents, held_out, tokenizer, settings, device)

    def _start(
        self,
        folder: Path,
        documents: Any,
        held_out: Any,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
        device: str | torch.device,
    ) -> None:
        """Write what a new run begins with, once everything is checked, and open it."""
        model_config = LlamaConfig.from_dict(settings["model"])
        config = TrainingConfig(**settings["training"])
        _check_lengths(model_config, config)
        check_vocabulary(model_config, tokenizer)
        self._ranks = meet(device, model_config, config)
        _check_memory(self._plan(settings), self._ranks)
        sources = documents if isinstance(documents, Mapping) else {"text": documents}
        write = partial(self._write, tokenizer=tokenizer, seq_len=config.seq_len)
        from_main(lambda: _begin(folder, sources, held_out, tokenizer, write))
        self._open(folder, settings, tokenizer)
        if is_main():
            new = folder / f".{CONFIG}.new"  # a run is there to resume once this has its name
            new.write_text(tomli_w.dumps({"kind": self.KIND, **settings}))
            new.replace(folder / CONFIG)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        saving: RunConfig | None = None,
        tensor_parallel: int | None = None,
    ) -> "PretrainingRun":
        """Go on from the newest whole state of a run that was cut off, as if it had not been.

        What the log says beyond that state is taken back; those steps are taken again, and come out
        the same. A damaged state is named in a warning, and the one before it is used.

        The processes may be more or fewer than before; `tensor_parallel` then says how many of them
        share every matrix, where it is no longer as many as in config.toml.

        Raises FileNotFoundError if no run was started there, CheckpointError (a ValueError) if no
        state is whole, ValueError if config.toml or the data were changed meanwhile.
        """
        folder = Path(folder)
        settings = read_toml(folder / CONFIG)
        cls._check_kind(folder, settings)
        if saving:
            settings["saving"] = asdict(saving)
        if tensor_parallel:
            settings["training"]["tensor_parallel"] = tensor_parallel
        run = cls.__new__(cls)
        model_config = LlamaConfig.from_dict(settings["model"])
        where = f"{folder / CONFIG} [training]"
        config = override(TrainingConfig(), settings["training"], where)
        run._ranks = meet(device, model_config, config)
        _check_memory(run._plan(settings), run._ranks)
        run._open(folder, settings, Tokenizer(folder / "tokens" / TOKENIZER))
        if state := from_main(lambda: newest_state(folder / "states")):
            progress = from_main(lambda: load_progress(state))
            changed = _difference(progress["settings"], run._identity)
            if changed:
                raise ValueError(
                    f"{state} was saved by a run with other settings: {changed}. A run is resumed "
                    f"with the settings it was started with; restore {folder / CONFIG}, or start a "
                    f"new run."
                )
            load_tensors(state, training_tensors(run.model, run.optimizer))
            run.batches.load_state_dict(progress["batches"])
            run.step, run._log_size = progress["step"], progress["log_size"]
        return run

    @classmethod
    def _check_kind(cls, folder: Path, settings: Mapping[str, Any]) -> None:
        kind = settings.get("kind", cls.KIND)
        if kind != cls.KIND:
            command = f"minillama {kind.split()[0]}"
            raise ValueError(
                f"{folder} holds a run of `minillama {kind}`, and is resumed by that command: "
                f"{command} --resume --out {folder}"
            )
        for table in cls._TABLES:
            if table not in settings:
                raise ValueError(
                    f"{folder / CONFIG} has no table [{table}]: this is no run of "
                    f"`minillama {cls.KIND}`. Resume it with the command that started it."
                )

    def _open(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        """Everything that a new run and a resumed one have in common."""
        self.folder, self.tokenizer = folder, tokenizer
        where = f"{folder / CONFIG}"
        self.config = override(TrainingConfig(), settings["training"], f"{where} [training]")
        saving = override(RunConfig(), settings["saving"], f"{where} [saving]")
        self.saving = saving.of_steps(self.config.steps)
        self._identity = {
            **{name: settings[name] for name in self._TABLES},
            # The same steps are taken, however many processes take them.
            "training": {**settings["training"], "tensor_parallel": 1},
            "tokens": json.loads((folder / "tokens" / SIZES).read_text()),
        }
        self.batches = Batches(
            {source: self._rows(source) for source in settings["shares"]},
            settings["shares"],
            self.config.batch_size,
            self.config.seed,
            self._ranks.data_rank,
            self._ranks.n_data,
            to_batch=self._to_batch,
        )
        self.held_out_rows = self._rows(HELD_OUT)

        self.plan = self._plan(settings)
        self.model = self._model(settings)
        self.optimizer = make_optimizer(self.model, self.config)
        self.step = 0  # steps taken
        self._log_size = 0  # bytes of the log that belong to these steps

    def _plan(self, settings: Mapping[str, Any]) -> TrainingPlan:
        """What a step takes on each of the processes."""
        return TrainingPlan(
            config=LlamaConfig.from_dict(settings["model"]),
            training=TrainingConfig(**settings["training"]),
            device=self._ranks.device.type,
            data_parallel=self._ranks.n_data,
        )

    def _first_model(self, settings: Mapping[str, Any]) -> Llama:
        """The model before the first step."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return Llama(LlamaConfig.from_dict(settings["model"]), generator, self.config.init_std)

    def _model(self, settings: Mapping[str, Any]) -> Llama:
        first = partial(self._first_model, settings)
        if self._ranks.mesh is None:
            model = first().to(self._ranks.device)
        else:
            with torch.device("meta"):
                model = Llama(LlamaConfig.from_dict(settings["model"]))
        checkpoint_activations(model, self.config.checkpointing)
        if self.config.compile:
            compile_blocks(model)
        if self._ranks.mesh is not None:
            shard(model, self._ranks, self._dtype, first)
        return model

    @property
    def _dtype(self) -> torch.dtype:
        return precision(self.config.precision, self._ranks.device)

    @property
    def n_tokens(self) -> int:
        """Tokens to learn from, of all sources together."""
        sizes = self._identity["tokens"].items()
        return sum(size["tokens"] for source, size in sizes if source != HELD_OUT)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step learns from, on all processes together."""
        return self.config.batch_size * self.config.accumulation * self.config.seq_len

    @staticmethod
    def _write(path: Path, documents: Any, tokenizer: Tokenizer, seq_len: int) -> dict[str, int]:
        """Write a source to its file in tokens/, and count the tokens to learn and their bytes."""
        counted = _Counted(documents)
        n_tokens = write_tokens(path, counted, tokenizer)
        open_rows(path, seq_len, tokenizer.vocab_size, verify=False)
        return {"tokens": n_tokens, "bytes": counted.n_bytes}

    def _read(self, path: Path) -> np.ndarray:
        """The rows of such a file."""
        return open_rows(path, self.config.seq_len, self.tokenizer.vocab_size)

    def _to_batch(self, rows: np.ndarray) -> Batch:
        """What some of these rows mean."""
        return as_batch(rows)

    def _rows(self, source: str) -> np.ndarray:
        path = self.folder / "tokens" / f"{source}.safetensors"
        rows = self._read(path)
        if _digest(path) != self._identity["tokens"][source]["sha256"]:
            raise ValueError(
                f"{path} is whole, but not what this run was started with: its SHA-256 is not the "
                f"one in {SIZES}. Restore the file, or start a new run."
            )
        return rows

    def __iter__(self) -> Iterator[StepStats]:
        path = self.folder / LOG
        from_main(lambda: _take_back(path, self._log_size, self.step))
        with all_or_none(), (path if is_main() else Path(os.devnull)).open("a") as log:
            group = self._ranks.data_group
            steps = train(self.model, self.optimizer, self.batches, self.config, self.step, group)
            try:
                for stats in steps:
                    self.step = stats.step
                    _log(log, asdict(stats))
                    if self._due(self.saving.eval_every, at_the_end=True):
                        found = self.evaluate()
                        line = {"validation_loss": found.loss, "bits_per_byte": found.bits_per_byte}
                        _log(log, {"step": self.step} | line)
                    if self._due(self.saving.save_every, at_the_end=self.saving.save_every > 0):
                        self._save_state(log)
                    yield stats
            except Diverged as error:
                self._post_mortem(error)
                raise
        whole = self.whole_model()
        from_main(lambda: self._finish(whole))

    def _finish(self, model: Llama) -> None:
        save(self.folder / self.RESULT, model, self.tokenizer)
        plot_losses(self.log()).savefig(self.folder / "loss.png", dpi=100)

    def whole_model(self) -> Llama:
        """The model as one process has it, on rank 0.

        With many processes it is a copy on rank 0's CPU. All must call this; on the others the
        model that comes back has shapes and no numbers.
        """
        if self._ranks.mesh is None:
            return self.model
        weights = whole_weights(self.model)
        if is_main():
            return model_from(self.model.config, weights, self.folder)
        with torch.device("meta"):
            return Llama(self.model.config)

    def _due(self, every: int, at_the_end: bool) -> bool:
        return (every > 0 and self.step % every == 0) or (
            at_the_end and self.step == self.config.steps
        )

    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl so far."""
        return [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]

    def evaluate(self) -> Validation:
        """The loss on all held-out rows, with the weights as they are now."""
        size = self.config.batch_size
        batches = (
            self._ranks.part(self._to_batch(self.held_out_rows[i : i + size]))
            for i in range(0, len(self.held_out_rows), size)
        )
        with torch.compiler.set_stance("force_eager"):  # one pass is not worth compiling for
            loss = evaluate(self.model, batches, self._dtype, self._ranks.data_group)
        held_out = self._identity["tokens"][HELD_OUT]
        return Validation(loss, loss / ln(2) * held_out["tokens"] / held_out["bytes"])

    def _save_state(self, log: TextIO) -> None:
        if is_main():
            os.fsync(log.fileno())
        progress = {
            "step": self.step,
            "batches": self.batches.state_dict(),
            "log_size": log.tell(),  # bytes
            "settings": self._identity,
        }
        states = self.folder / "states"
        save_state(
            states / f"{self.step:09}", training_tensors(self.model, self.optimizer), progress
        )
        if is_main():
            keep_newest(states, self.saving.keep)

    def _post_mortem(self, error: Diverged) -> None:
        """Keep the weights and the batch that broke the run, for whoever wants to see why."""
        tensors = training_tensors(self.model, self.optimizer)
        for number, batch in enumerate(map(self._ranks.whole, error.micro_batches)):
            tensors[f"batch.{number}.tokens"] = batch.tokens
            tensors[f"batch.{number}.targets"] = batch.targets
            if batch.positions is not None:
                tensors[f"batch.{number}.positions"] = batch.positions
        folder = self.folder / "post-mortem"
        save_state(folder, tensors, {"step": self.step + 1, "settings": self._identity})
        error.args = (f"{error} The batch and the weights are kept in {folder}.",)


def plot_losses(log: list[dict[str, Any]]) -> Figure:
    """Training and validation loss over the steps of a log, in nats per token."""
    training = [(line["step"], line["loss"]) for line in log if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in log if "loss" not in line]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), linewidth=1, label="training")
    axes.plot(*zip(*validation, strict=True), "o-", label=f"validation: {validation[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _check_lengths(model_config: LlamaConfig, config: TrainingConfig) -> None:
    if config.seq_len > model_config.max_seq_len:
        raise ValueError(
            f"seq_len ({config.seq_len}) is longer than the model's context "
            f"({model_config.max_seq_len} tokens). Train on rows of at most that length."
        )


def _check_memory(plan: TrainingPlan, ranks: Ranks) -> None:
    """Refuse what does not fit, with numbers and ways out, before anything is allocated."""
    free = free_memory(str(ranks.device))
    if free is not None and ranks.device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of a machine share it
    check_fits(plan, free)


def _begin(
    folder: Path,
    sources: Mapping[str, Any],
    held_out: Any,
    tokenizer: Tokenizer,
    write: Callable[[Path, Any], dict[str, int]],
) -> None:
    """Write the tokens/ of a new run, unless its folder holds something that would be lost."""
    check_replaceable(folder / "checkpoint")
    if (folder / "states").exists():
        raise FileExistsError(
            f"{folder / 'states'} holds the states of an earlier run, which are not overwritten. "
            f"Resume that run, or name another folder."
        )
    is_new = not folder.exists()
    try:
        _write_tokens(folder / "tokens", sources, held_out, tokenizer, write)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _take_back(log: Path, size: int, step: int) -> None:
    """Shorten a log to what it was at a step."""
    log.touch()
    if log.stat().st_size < size:
        raise CheckpointError(
            f"{log} has {log.stat().st_size} bytes, but had {size} when the state of step {step} "
            f"was saved. Restore it, or remove states/ to start anew."
        )
    os.truncate(log, size)


def _write_tokens(
    folder: Path,
    sources: Mapping[str, Any],
    held_out: Any,
    tokenizer: Tokenizer,
    write: Callable[[Path, Any], dict[str, int]],
) -> None:
    """The folder tokens/ of a run: token ids of every source, their sizes, and the tokenizer."""
    if HELD_OUT in sources:
        raise ValueError(f"{HELD_OUT!r} is the name of the validation text; rename this source.")
    sizes = {}
    for source, documents in {**sources, HELD_OUT: held_out}.items():
        path = folder / f"{source}.safetensors"
        try:
            sizes[source] = {**write(path, documents), "sha256": _digest(path)}
        except ValueError as error:
            what = "text held out for validation" if source == HELD_OUT else f"source {source!r}"
            raise ValueError(f"The {what}: {error}") from None
    tokenizer.save(folder / TOKENIZER)
    (folder / SIZES).write_text(json.dumps(sizes, indent=2) + "\n")


def _digest(tokens: Path) -> str:
    """The SHA-256 that a file of token ids states of itself."""
    with safe_open(tokens, "np") as file:
        return file.metadata()["sha256"]


class _Counted:
    """Documents as they are, and how many bytes of UTF-8 went through."""

    def __init__(self, documents: Documents) -> None:
        self.documents, self.n_bytes = documents, 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            self.n_bytes += len(document.encode())
            yield document


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str = "") -> str:
    """The first thing in which two trees of settings differ, in words; "" if nothing does."""
    for key in sorted({*theirs, *ours}):
        one, other, path = theirs.get(key), ours.get(key), f"{name}.{key}".lstrip(".")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if found := _difference(one, other, path):
                return found
        elif one != other:
            return f"{path} was {one} and is {other} now"
    return ""


def _log(file: TextIO, line: Mapping[str, Any]) -> None:
    print(json.dumps(line), file=file, flush=True)
