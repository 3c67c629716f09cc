"""Train an adapter of a checkpoint: a pretraining run in which nearly everything is frozen."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch

from minillama.adapt.lora import adapter_of, attach, new_adapter
from minillama.checkpoint import open_checkpoint
from minillama.checkpoint.hub import transformers_name
from minillama.checkpoint.peft import save_adapter
from minillama.checkpoint.weights import Checkpoint, llama_from
from minillama.config import LoRAConfig, RunConfig, TrainingConfig, override
from minillama.model import Llama
from minillama.plan import LINEARS, TrainingPlan
from minillama.tokenizer import Tokenizer
from minillama.training.checkpointing import checkpoint_activations
from minillama.training.run import Documents, PretrainingRun, plot_losses
from minillama.training.step import StepStats, compile_blocks

MIB = 2**20


class LoRARun(PretrainingRun):
    """Train an adapter of the model in a checkpoint. At the end the folder has

        adapter/    what `load_adapter` and peft open, in place of checkpoint/

    and all else that a `PretrainingRun` leaves: it takes the same steps, saves states of what is
    trained, and resumes as exactly. `base` is what `open_checkpoint` takes; it is read again to
    resume, and never written. With `quantize` its matrices are held in few bits (QLoRA).

    Raises ValueError or OSError; also where there are several processes, as one trains an adapter.
    Shown in notebooks/18_lora.ipynb.
    """

    RESULT: ClassVar[str] = "adapter"
    KIND: ClassVar[str] = "lora --text"
    _TABLES: ClassVar[tuple[str, ...]] = ("model", "shares", "base", "adapter")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        documents: Documents | Mapping[str, Documents],
        held_out: Documents,
        tokenizer: Tokenizer,
        base: str | os.PathLike[str],
        adapter: LoRAConfig,
        config: TrainingConfig,
        device: str | torch.device = "cpu",
        saving: RunConfig | None = None,
        quantize: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        settings = lora_settings(base, adapter, config, saving, quantize, origin)
        self._start(Path(folder), documents, held_out, tokenizer, settings, device)

    def _plan(self, settings: Mapping[str, Any]) -> TrainingPlan:
        if self._ranks.mesh is not None:
            raise ValueError(
                f"An adapter is trained by one process, but {self._ranks.mesh.size()} were "
                f"started: run the command without torchrun."
            )
        adapter, base = _adapter(settings), open_checkpoint(settings["base"]["path"])
        quantized = base.quantization or {"kind": settings["base"]["quantize"] or None}
        inner = tuple(name for name in adapter.targets if name in LINEARS)  # of the blocks
        plan = super()._plan(settings)
        return plan.changed(lora=adapter.rank, targets=inner, quantize=quantized["kind"])

    def _model(self, settings: Mapping[str, Any]) -> Llama:
        self.base, self.adapter = settings["base"]["path"], _adapter(settings)
        checkpoint = open_checkpoint(self.base)
        check_base(checkpoint, settings)
        quantize = settings["base"]["quantize"] or None
        model = llama_from(checkpoint, self._ranks.device, self._dtype, quantize)
        generator = torch.Generator().manual_seed(self.config.seed)
        attach(model, new_adapter(model.config, self.adapter, generator))
        checkpoint_activations(model, self.config.checkpointing)
        if self.config.compile:
            compile_blocks(model)
        return model

    def __iter__(self) -> Iterator[StepStats]:
        steps, device = super().__iter__(), self._ranks.device
        devices = [device] if device.type == "cuda" else []
        while True:
            with torch.random.fork_rng(devices):  # dropout's, so that a resumed run draws the same
                torch.manual_seed((1_000_003 * self.config.seed + self.step) % 2**63)
                stats = next(steps, None)
            if stats is None:
                return
            yield stats

    def _finish(self, model: Llama) -> None:
        base = transformers_name(self.base)
        save_adapter(self.folder / self.RESULT, adapter_of(model), model.config, base)
        plot_losses(self.log()).savefig(self.folder / "loss.png", dpi=100)


def lora_settings(
    base: str | os.PathLike[str],
    adapter: LoRAConfig,
    config: TrainingConfig,
    saving: RunConfig | None,
    quantize: str | None,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What config.toml says of a run of an adapter; its text is one source."""
    path = Path(base).absolute() if Path(base).exists() else base  # or a name
    checkpoint = open_checkpoint(base)
    return {
        "model": checkpoint.config.to_dict(),
        "training": asdict(config),
        "saving": asdict(saving or RunConfig()),
        "shares": {"text": 1.0},
        "base": {
            "path": str(path),
            "quantize": quantize or "",
            "sha256": base_digest(checkpoint.path),
        },
        "adapter": asdict(adapter) | {"targets": list(adapter.targets)},
        "data": dict(origin or {}),
    }


def base_digest(path: Path) -> str:
    """A SHA-256 that tells the weights of a checkpoint (a file or a folder) from others.

    It is of the names, sizes and bytes of its weights' files. Of a file of more than 1 GiB the
    first of every 16 MiB is read, which takes a second for 13 GB: any training changes these, too,
    but a few numbers may be changed unseen.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file == path or file.suffix in (".safetensors", ".bin", ".pth"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as numbers:
                for start in range(0, size, MIB if size <= 1024 * MIB else 16 * MIB):
                    numbers.seek(start)
                    digest.update(numbers.read(MIB))
    return digest.hexdigest()


def check_base(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if config or weights are not those that the run was started with."""
    found = base_digest(checkpoint.path)
    other_weights = settings["base"].get("sha256", found) != found
    if other_weights or checkpoint.config.to_dict() != settings["model"]:
        raise ValueError(
            f"{checkpoint.path} holds another model than when this run was started"
            f"{': its weights were changed' * other_weights}. Restore it, or start a new run."
        )


def _adapter(settings: Mapping[str, Any]) -> LoRAConfig:
    values = settings["adapter"] | {"targets": tuple(settings["adapter"]["targets"])}
    return override(LoRAConfig(), values, "[adapter]")
