"""A whole pretraining run: documents in, a folder with everything that came of it out."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt
from matplotlib.figure import Figure

from minillama.checkpoint import save
from minillama.checkpoint.native import check_replaceable, check_vocabulary
from minillama.config import LlamaConfig, TrainingConfig
from minillama.data.packing import as_batch, batches, pack
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from minillama.training.loop import evaluate, train
from minillama.training.optimizer import make_optimizer
from minillama.training.step import StepStats


class PretrainingRun:
    """Pretrain a new model on documents. Iterating trains; at the end the folder is complete.

        config.json    the model's and the training's settings
        log.jsonl      a line per step, written as it happens; the last one has the validation loss
        loss.png       the curve
        checkpoint/    what `minillama.load` opens

    Everything that can fail early does so here, before the first step: a text shorter than a row,
    a tokenizer of another size, a folder that cannot be written. Two runs with equal arguments
    write equal bytes (on one machine).

    Raises ValueError or OSError. Shown in notebooks/00_tour.ipynb.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        documents: Sequence[str],
        held_out: Sequence[str],
        tokenizer: Tokenizer,
        model_config: LlamaConfig,
        config: TrainingConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        if config.seq_len > model_config.max_seq_len:
            raise ValueError(
                f"seq_len ({config.seq_len}) is longer than the model's context "
                f"({model_config.max_seq_len} tokens). Train on rows of at most that length."
            )
        check_vocabulary(model_config, tokenizer)
        self.folder, self.tokenizer, self.config = Path(folder), tokenizer, config
        check_replaceable(self.folder / "checkpoint")
        self.rows = self._pack("text to learn from", documents)
        self.held_out_rows = self._pack("text held out for validation", held_out)
        generator = torch.Generator().manual_seed(config.seed)
        self.model = Llama(model_config, generator, config.init_std).to(device)
        self.validation_loss = float("nan")  # nats per token, when the run is over

        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"model": model_config.to_dict(), "training": asdict(config)}
        (self.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _pack(self, name: str, documents: Sequence[str]) -> UInt[np.ndarray, "rows row_len"]:
        ids = self.tokenizer.encode_batch(documents, bos=True, eos=True)
        try:
            return pack(ids, self.config.seq_len, self.tokenizer.vocab_size)
        except ValueError as error:
            raise ValueError(f"The {name}: {error}") from None

    def __iter__(self) -> Iterator[StepStats]:
        optimizer = make_optimizer(self.model, self.config)
        source = batches(self.rows, self.config.batch_size, self.config.seed)
        losses = []
        with (self.folder / "log.jsonl").open("w") as log:
            for stats in train(self.model, optimizer, source, self.config):
                losses.append(stats.loss)
                print(json.dumps(asdict(stats)), file=log, flush=True)
                yield stats
            size = self.config.batch_size
            starts = range(0, len(self.held_out_rows), size)
            self.validation_loss = evaluate(
                self.model, (as_batch(self.held_out_rows[i : i + size]) for i in starts)
            )
            print(json.dumps({"validation_loss": self.validation_loss}), file=log)
        save(self.folder / "checkpoint", self.model, self.tokenizer)
        plot_losses(losses, self.validation_loss).savefig(self.folder / "loss.png", dpi=100)


def plot_losses(losses: Sequence[float], validation_loss: float) -> Figure:
    """The training loss over the steps, and the validation loss at the end, in nats per token."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1, label="training")
    axes.plot(len(losses), validation_loss, "o", label=f"validation: {validation_loss:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
