"""What the processes of test_parallel.py do; started by torchrun, or called by the test itself.

    torchrun --nproc-per-node N tests/training/many.py {two,four,die} FOLDER

Each function does the same in one process and in many, and returns what JSON can hold.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the tests, conftest.py has done so
    from jaxtyping import install_import_hook

    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    install_import_hook("minillama", checker)

import torch
from small import STORIES, small_config, small_tokenizer

from minillama.config import RunConfig, TrainingConfig
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training import make_optimizer, train
from minillama.training.loss import batch_loss
from minillama.training.parallel import from_main, is_main, meet, shard
from minillama.training.run import PretrainingRun
from minillama.training.state import training_tensors
from minillama.training.step import Diverged

SETTINGS = {
    "steps": 20,
    "batch_size": 4,
    "seq_len": 16,
    "warmup_steps": 2,
    "learning_rate": 3e-3,
}
MODELS = {
    "grouped": small_config(),  # 4 query heads on 2 KV heads, an output matrix of its own
    "tied": small_config(n_kv_heads=4, tie_embeddings=True),
}


def new_run(folder: Path, model: str, save_every: int = 0, **changes: Any) -> PretrainingRun:
    return PretrainingRun(
        folder,
        STORIES[:20],
        STORIES[20:],
        small_tokenizer(),
        MODELS[model],
        TrainingConfig(**(SETTINGS | changes)),
        saving=RunConfig(save_every=save_every),
    )


def log_of(run: PretrainingRun) -> list[dict[str, float]]:
    """Take all steps that are left, and tell the whole log."""
    for _ in run:
        pass
    return run.log()


def pretrain(folder: Path, model: str, **changes: Any) -> list[dict[str, float]]:
    return log_of(new_run(folder, model, **changes))


def masked(model: str, tensor_parallel: int = 1) -> list[list[float]]:
    """Steps on batches of which some rows, hence some ranks, have hardly a target."""
    config = TrainingConfig(**(SETTINGS | {"accumulation": 2, "tensor_parallel": tensor_parallel}))
    ranks = meet("cpu", MODELS[model], config)
    trained = placed(model, ranks)

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(3)
        while True:
            tokens, targets = torch.randint(300, (2, 4, 16), generator=generator)
            targets[1:][torch.rand(3, 16, generator=generator) < 0.9] = IGNORE
            yield ranks.part(Batch(tokens, targets))

    optimizer = make_optimizer(trained, config)
    steps = train(trained, optimizer, batches(), config, group=ranks.data_group)
    return [[stats.loss, stats.grad_norm, stats.n_targets] for stats in steps]


def placed(model: str, ranks: Any) -> Llama:
    def first() -> Llama:
        return Llama(MODELS[model], torch.Generator().manual_seed(1), 0.1)

    if ranks.mesh is None:
        return first()
    with torch.device("meta"):
        trained = Llama(MODELS[model])
    shard(trained, ranks, torch.float32, first)
    return trained


def logits_and_gradients(model: str, tensor_parallel: int = 1) -> dict[str, Any]:
    """What the model says, and the whole gradient of every weight, on rank 0."""
    config = TrainingConfig(**(SETTINGS | {"tensor_parallel": tensor_parallel}))
    ranks = meet("cpu", MODELS[model], config)
    trained = placed(model, ranks)
    tokens, targets = torch.randint(300, (2, 4, 16), generator=torch.Generator().manual_seed(2))
    targets[1, 3:] = targets[2] = IGNORE
    part = ranks.part(Batch(tokens, targets))
    batch_loss(trained, part).backward()
    gradients = {}
    for name, parameter in trained.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if ranks.mesh else gradient
        gradients[name] = whole.tolist()
    tied = trained.output.weight is trained.tok_embeddings.weight
    return {"logits": trained(part.tokens).tolist(), "gradients": gradients, "tied": tied}


def diverge(folder: Path, tensor_parallel: int = 1) -> str:
    """A run whose loss is NaN."""
    run = new_run(folder, "grouped", tensor_parallel=tensor_parallel)
    with torch.no_grad():
        run.model.layers[0].ffn_norm.weight.mul_(float("nan"))
    try:
        list(run)
    except Diverged as error:
        return str(error)
    return "it did not"


def full_disk(folder: Path) -> list[Any]:
    """A run that can save the state of step 1, and then one rank's disk is full."""
    import torch.distributed.checkpoint as dcp

    def refuse_to_write(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run, original = (
        new_run(folder, "grouped", save_every=1),
        dcp.HuggingFaceStorageWriter.write_data,
    )
    steps = iter(run)
    next(steps)
    if not is_main():
        dcp.HuggingFaceStorageWriter.write_data = refuse_to_write
    try:
        next(steps)
    except OSError as error:
        return [str(error), sorted(path.name for path in (folder / "states").iterdir())]
    finally:
        dcp.HuggingFaceStorageWriter.write_data = original
    return ["nothing was raised", []]


def refuse() -> str:
    """An error that rank 0 alone can know."""

    def make() -> None:
        raise ValueError("There is no text.")

    try:
        from_main(make)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def held(model: str, tensor_parallel: int) -> list[int]:
    """How many numbers this rank keeps, for weights and moments, and how many there are."""
    config = TrainingConfig(**(SETTINGS | {"tensor_parallel": tensor_parallel}))
    trained = placed(model, meet("cpu", MODELS[model], config))
    tensors = training_tensors(trained, make_optimizer(trained, config)).values()
    here = sum(tensor.to_local().numel() for tensor in tensors if hasattr(tensor, "to_local"))
    return [here, sum(tensor.numel() for tensor in tensors)]


def four(folder: Path) -> dict[str, Any]:
    return {
        "both, grouped": pretrain(folder / "saved", "grouped", tensor_parallel=2, save_every=10),
        "both, tied": pretrain(
            folder / "tied", "tied", tensor_parallel=2, batch_size=2, accumulation=2
        ),
        "both, masked": masked("grouped", tensor_parallel=2),
        "from one": log_of(PretrainingRun.resume(folder / "saved by one", tensor_parallel=2)),
        "held": held("grouped", tensor_parallel=2),
        "refused": refuse(),
    }


def two(folder: Path) -> dict[str, Any]:
    selective = {"checkpointing": "selective", "tensor_parallel": 2}
    return {
        "rows, grouped": pretrain(folder / "1", "grouped", checkpointing="full", accumulation=2),
        "rows, tied": pretrain(folder / "2", "tied"),
        "matrices, grouped": pretrain(folder / "3", "grouped", **selective),
        "matrices, tied": pretrain(folder / "4", "tied", tensor_parallel=2, seq_len=13),
        "rows, masked": masked("tied"),
        "bfloat16": pretrain(folder / "5", "grouped", precision="bfloat16", tensor_parallel=1),
        "resumed as rows": log_of(PretrainingRun.resume(folder / "cut 1", tensor_parallel=1)),
        "resumed as matrices": log_of(PretrainingRun.resume(folder / "cut 2")),
        "rows, gradients, grouped": logits_and_gradients("grouped"),
        "rows, gradients, tied": logits_and_gradients("tied"),
        "matrices, gradients, grouped": logits_and_gradients("grouped", tensor_parallel=2),
        "matrices, gradients, tied": logits_and_gradients("tied", tensor_parallel=2),
        "diverged": diverge(folder / "diverged"),
        "full disk": full_disk(folder / "full disk"),
    }


def die(folder: Path, how: str) -> None:
    """Rank 1 stops in the third step."""
    run = new_run(folder, "grouped")
    for stats in run:
        if stats.step == 2 and not is_main():
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("Rank 1 has had enough.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "die":
        try:
            die(Path(folder), *rest)
        except (ValueError, OSError) as error:
            sys.exit(f"minillama: {error}")
    found = {"two": two, "four": four}[what](Path(folder))
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
