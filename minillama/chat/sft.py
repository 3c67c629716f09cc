"""Supervised fine-tuning: dialogues become rows of token ids, of which a model learns the answers.

    dialogues ─tokenise→ list[DialogTokens] ─pack→ rows ─batches→ Iterator[Batch] ─train→ StepStats

`SftRun` does what comes behind `tokenise`, with a folder, states and a checkpoint at the end;
`LoRASftRun` does it with an adapter.

Source: Touvron et al. 2023b, sec. 3.1 (arXiv:2307.09288). Built in notebooks/10_sft.ipynb.
"""

import copy
import hashlib
import os
import warnings
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minillama.chat.dialog import DialogTokens, Message, check_format, encode_dialog
from minillama.chat.jsonl import Faults
from minillama.checkpoint import open_checkpoint
from minillama.checkpoint.weights import Checkpoint, llama_from
from minillama.config import LoRAConfig, RunConfig, TrainingConfig, known_name
from minillama.data.dialogues import as_messages, corpus
from minillama.data.mixture import Batches
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.plan import LINEARS
from minillama.tokenizer import Tokenizer
from minillama.training.lora_run import LoRARun, base_digest, check_base, lora_settings
from minillama.training.run import PretrainingRun

Dialogue: TypeAlias = Sequence[Message]
TOKENS, TARGETS, POSITIONS = range(3)  # the lines of a packed row
FILLER = 0  # the id behind the last dialogue of a row: nobody looks at it


# --- Dialogues to examples ------------------------------------------------------------------------


def toy_dialogues(split: str, n: int | None = None) -> list[list[Message]]:
    """The toy world's dialogues of a split (`minillama.data.dialogues.corpus`) as messages."""
    return [
        [Message(**each) for each in as_messages(dialogue)]  # type: ignore[arg-type]
        for dialogue in corpus(split, n)
    ]


def tokenise(
    dialogues: Iterable[Dialogue] | Mapping[str, Dialogue],
    tokenizer: Tokenizer,
    chat_format: str = "llama2",
    seq_len: int | None = None,
) -> list[DialogTokens]:
    """Dialogues as examples of which a model learns the answers, and the pieces that end them.

    What users and system say is read and never learned. Error messages name the places where the
    dialogues stand if these are given, and count them otherwise.

    One that is longer than ``seq_len`` is cut behind its last answer that fits; one whose first
    answer does not fit is left out. A warning tells which.

    Raises ValueError, naming up to ten places at once, for dialogues that do not end with an
    answer, have an empty one, or that `encode_dialog` refuses.
    """
    check_format(tokenizer, chat_format)
    if not isinstance(dialogues, Mapping):
        dialogues = {f"Dialogue {n}": dialogue for n, dialogue in enumerate(dialogues, 1)}
    examples, cut, dropped = [], list[str](), list[str]()
    faults = Faults()
    for place, dialogue in dialogues.items():
        with faults.at(place):
            _check_answers(dialogue)
            example = encode_dialog(dialogue, tokenizer, chat_format)
            if seq_len is not None and len(example.ids) > seq_len:
                example = _cut(example, seq_len)
                (cut if example.ids else dropped).append(place)
            if example.ids:
                examples.append(example)
    faults.check()
    if cut or dropped:
        warnings.warn(
            f"Of {len(dialogues)} dialogues, {len(cut) + len(dropped)} are longer than seq_len "
            f"({seq_len} tokens): {len(cut)} are cut behind the last answer that fits"
            f"{_named(cut)}, and {len(dropped)} are left out, for not even the first one fits"
            f"{_named(dropped)}. Raise seq_len to keep them whole.",
            stacklevel=2,
        )
    return examples


def _cut(example: DialogTokens, size: int) -> DialogTokens:
    """As many of the first turns as take no more than ``size`` tokens; of no turn, no tokens.

    They are the first tokens of the whole (see `encode_dialog`).
    """
    ends = [
        place
        for place, (role, following) in enumerate(pairwise([*example.roles, "user"]), 1)
        if (role, following) == ("assistant", "user")
    ]
    end = max((end for end in ends if end <= size), default=0)
    return DialogTokens(example.ids[:end], example.roles[:end], example.learned[:end])


def _check_answers(dialogue: Dialogue) -> None:
    if not dialogue or dialogue[-1].role != "assistant":
        raise ValueError(
            "The dialogue does not end with an answer of the assistant's: there is nothing to "
            "learn behind its last message. Add the answer, or take that message out."
        )
    for place, message in enumerate(dialogue, 1):
        if message.role == "assistant" and not message.content.strip():
            raise ValueError(
                f"Message {place} (assistant) is empty: a model would learn to say nothing. Write "
                f"the answer, or take the turn out."
            )


def _named(places: list[str], most: int = 3) -> str:
    """Some of the places, in brackets."""
    if not places:
        return ""
    return f" ({', '.join(places[:most])}{', ...' * (len(places) > most)})"


# --- Examples to rows, rows to batches ------------------------------------------------------------


def pack(examples: Iterable[DialogTokens], seq_len: int) -> Int[np.ndarray, "rows 3 seq"]:
    """Put the examples into as few rows of ``seq_len`` tokens as one easily finds.

    A row has three lines: token ids; at each, its target, the next id where that is learned and
    `IGNORE` elsewhere; and its position, counted from 0 on in each example.
    No example is cut. The longest come first, each into the fullest row that has room for it
    (best-fit decreasing), so that rows are filled nearly to the end; the rest has no targets.

    An example of which nothing is learned is left out, with a warning.
    Raises ValueError if none is left, or for one that is longer than a row.
    Source: Krell et al. 2021 (arXiv:2107.02027). Built in notebooks/10_sft.ipynb.
    """
    given = list(examples)
    useful = [example for example in given if any(example.learned[1:])]
    if len(useful) < len(given):
        warnings.warn(
            f"Of {len(given)} examples, {len(given) - len(useful)} have nothing that is learned: "
            f"they are left out.",
            stacklevel=2,
        )
    if not useful:
        raise ValueError(
            "There is no example to learn from: give dialogues with at least one answer that fits."
        )
    rows = list[list[DialogTokens]]()
    room = list[tuple[int, int]]()  # (tokens, row) of all rows, by how much room they have
    for example in sorted(useful, key=lambda example: len(example.ids), reverse=True):
        size = len(example.ids)
        if size > seq_len:
            raise ValueError(
                f"An example has {size} tokens, but a row {seq_len} (seq_len). Raise seq_len, or "
                f"have `tokenise` cut the dialogues to it."
            )
        fullest = bisect_left(room, (size, 0))
        if fullest == len(room):
            room.append((seq_len, len(rows)))
            rows.append([])
        left, row = room.pop(fullest)
        rows[row].append(example)
        insort(room, (left - size, row))
    return np.stack([_packed(row, seq_len) for row in rows])


def _packed(examples: Sequence[DialogTokens], seq_len: int) -> Int[np.ndarray, "3 seq"]:
    row = np.full((3, seq_len), IGNORE, dtype=np.int32)
    row[TOKENS] = FILLER
    # What fills the row goes on counting: a row of one example is a text as any other.
    start, row[POSITIONS] = 0, np.arange(seq_len)
    for example in examples:
        end = start + len(example.ids)
        row[TOKENS, start:end] = example.ids
        following = np.where(example.learned[1:], example.ids[1:], IGNORE)
        row[TARGETS, start : end - 1] = following
        row[POSITIONS, start:] = np.arange(seq_len - start)
        start = end
    return row


def as_batch(rows: Int[np.ndarray, "batch 3 seq"], across: bool = False) -> Batch:
    """Packed rows as a batch. With ``across`` a row is one text: examples see those before them."""
    ids = torch.from_numpy(rows.astype(np.int64))
    tokens, targets, positions = ids.unbind(1)
    return Batch(tokens, targets, None if across else positions)


def batches(
    rows: Int[np.ndarray, "rows 3 seq"], batch_size: int, seed: int, across: bool = False
) -> Batches:
    """Batches of packed rows without end; each epoch shows every row once, in an order of its own.

    For `minillama.training.train`, where no folder is wanted; see `as_batch` for ``across``.
    """
    to_batch = partial(as_batch, across=across)
    return Batches({"examples": rows}, {"examples": 1.0}, batch_size, seed, to_batch=to_batch)


# --- A run ----------------------------------------------------------------------------------------


class _PackedRun(PretrainingRun):
    """What runs on dialogues have in common: their sources are packed rows."""

    @staticmethod
    def _write(path: Path, rows: np.ndarray, tokenizer: Tokenizer, seq_len: int) -> dict[str, int]:
        learned = [[id for id in row[TARGETS].tolist() if id != IGNORE] for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save({"rows": rows}, {"sha256": _digest(rows)}))
        return {
            "tokens": sum(map(len, learned)),
            "bytes": sum(len(tokenizer.decode(ids).encode()) for ids in learned),
        }

    def _read(self, path: Path) -> np.ndarray:
        try:
            with safe_open(path, "np") as file:
                rows = file.get_tensor("rows")
                intact = file.metadata()["sha256"] == _digest(rows)
        except SafetensorError:
            intact = False
        if not intact:
            raise ValueError(
                f"{path} is damaged: its rows are not those that were written. Copy it again, or "
                f"start a new run."
            )
        return rows

    def _to_batch(self, rows: np.ndarray) -> Batch:
        return as_batch(rows, self._identity["packing"]["across"])


class SftRun(_PackedRun):
    """Fine-tune the model in a checkpoint on examples, whole, in a run like those of pretraining.

    It takes the same steps, leaves the same folder, saves the same states, and resumes as exactly;
    the examples are packed into rows of `config.seq_len` tokens. `base` is what `open_checkpoint`
    takes; it is read again to resume, and never written. Where the longest example has more tokens
    than its context, the new model has a context of that many: RoPE has angles for every position,
    and training gives them their sense (Llama 2's authors did so with LLaMA 1). Longer rows give it
    none, as positions begin anew in each example. The checkpoint keeps the tokenizer's chat format.

    With `epochs` the run has as many steps as it takes to learn every row so often, and
    `config.steps` does not count. `across` lets the examples of a row see those before them.
    `held_out` are examples to measure the loss on; validation is in nats per learned token, and in
    bits per byte of what is learned. `trained` names the matrices of the blocks that change, such
    as "wq", and all else stays as it is; where it is empty, every weight changes.

    Raises ValueError or OSError; also for a base whose weights are in few bits.
    Source: Touvron et al. 2023b, sec. 3.1. Shown in notebooks/10_sft.ipynb.
    """

    KIND: ClassVar[str] = "sft"
    _TABLES: ClassVar[tuple[str, ...]] = ("model", "shares", "base", "packing")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        examples: Sequence[DialogTokens],
        held_out: Sequence[DialogTokens],
        tokenizer: Tokenizer,
        base: str | os.PathLike[str],
        config: TrainingConfig,
        epochs: float | None = None,
        across: bool = False,
        device: str | torch.device = "cpu",
        saving: RunConfig | None = None,
        origin: Mapping[str, Any] | None = None,
        trained: Sequence[str] = (),
    ) -> None:
        path = Path(base).absolute() if Path(base).exists() else base  # or a name
        checkpoint = _open_base(base)
        longest = config.seq_len if across else max((len(each.ids) for each in examples), default=0)
        rows, held_out_rows, config = _packed_all(examples, held_out, config, epochs)
        settings = {
            "model": _for_rows(checkpoint, config.seq_len).config.to_dict(),
            "training": asdict(config),
            "saving": asdict(saving or RunConfig()),
            "shares": {"examples": 1.0},
            "base": {
                "path": str(path),
                "trained": [known_name("matrix of the blocks", t, LINEARS) for t in trained],
                "sha256": base_digest(checkpoint.path),
            },
            "packing": {
                "across": across,
                "epochs": epochs or 0.0,  # 0: so many steps
                "context": max(checkpoint.config.max_seq_len, longest),  # tokens, of the new model
                "chat_format": tokenizer.chat_format or "",
            },
            "data": dict(origin or {}),
        }
        self._start(Path(folder), {"examples": rows}, held_out_rows, tokenizer, settings, device)

    def _first_model(self, settings: Mapping[str, Any]) -> Llama:
        checkpoint = _for_rows(_open_base(settings["base"]["path"]), self.config.seq_len)
        check_base(checkpoint, settings)
        model = llama_from(checkpoint, dtype=torch.float32)
        if trained := settings["base"]["trained"]:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.split(".")[-2] in trained)
        return model

    @property
    def context(self) -> int:
        """The new model's context, in tokens."""
        context: int = self._identity["packing"]["context"]
        return context

    def _finish(self, model: Llama) -> None:
        model = copy.copy(model)  # in the same memory
        model.config = replace(model.config, max_seq_len=self.context)
        self.tokenizer = self.tokenizer.for_chat(self._identity["packing"]["chat_format"] or None)
        super()._finish(model)


class GattRun(SftRun):
    """An `SftRun` on examples of Ghost Attention (`minillama.chat.gatt`)."""

    KIND: ClassVar[str] = "gatt"


class LoRASftRun(_PackedRun, LoRARun):
    """Train an adapter of the model in a checkpoint on examples: a `LoRARun` on packed rows.

    The base is frozen, and may be in few bits (QLoRA); its context stays as it is, so
    `config.seq_len` must not be more. `epochs`, `across` and `held_out` are as for `SftRun`. The
    folder's adapter/ is spoken with in the chat format of the examples.

    Raises ValueError or OSError, as both do. Source: Dettmers et al. 2023, sec. 4
    (arXiv:2305.14314).
    """

    KIND: ClassVar[str] = "lora --data"
    _TABLES: ClassVar[tuple[str, ...]] = (*LoRARun._TABLES, "packing")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        examples: Sequence[DialogTokens],
        held_out: Sequence[DialogTokens],
        tokenizer: Tokenizer,
        base: str | os.PathLike[str],
        adapter: LoRAConfig,
        config: TrainingConfig,
        epochs: float | None = None,
        across: bool = False,
        device: str | torch.device = "cpu",
        saving: RunConfig | None = None,
        quantize: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        rows, held_out_rows, config = _packed_all(examples, held_out, config, epochs)
        settings = lora_settings(base, adapter, config, saving, quantize, origin)
        settings |= {
            "shares": {"examples": 1.0},
            "packing": {"across": across, "epochs": epochs or 0.0},
        }
        self._start(Path(folder), {"examples": rows}, held_out_rows, tokenizer, settings, device)


def _packed_all(
    examples: Sequence[DialogTokens],
    held_out: Sequence[DialogTokens],
    config: TrainingConfig,
    epochs: float | None,
) -> tuple[np.ndarray, np.ndarray, TrainingConfig]:
    """The rows of both, and the config with the steps that so many epochs take."""
    rows = pack(examples, config.seq_len)
    if epochs is not None:
        config = replace(config, steps=_steps(epochs, len(rows), config))
    try:
        return rows, pack(held_out, config.seq_len), config
    except ValueError as error:
        raise ValueError(f"The examples held out for validation: {error}") from None


def _steps(epochs: float, n_rows: int, config: TrainingConfig) -> int:
    """How many steps see every row so often."""
    if not 0 < epochs < inf:
        raise ValueError(f"epochs is {epochs}, but must be above 0.")
    return ceil(epochs * n_rows / (config.batch_size * config.accumulation))


def _open_base(base: str | os.PathLike[str]) -> Checkpoint:
    """The model to start from."""
    checkpoint = open_checkpoint(base)
    if checkpoint.quantization:
        raise ValueError(
            f"{base} holds weights in {checkpoint.quantization['kind']}, and what has a few bits "
            f"cannot move by a little. Take the model it was made of; or train an adapter of it: "
            f"minillama lora {base} --data FILE.jsonl"
        )
    return checkpoint


def _for_rows(checkpoint: Checkpoint, seq_len: int) -> Checkpoint:
    """The model as it is trained: with room for rows of so many tokens."""
    context = max(checkpoint.config.max_seq_len, seq_len)
    return replace(checkpoint, config=replace(checkpoint.config, max_seq_len=context))


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()
