"""Everything a training run needs to go on as if nothing had happened, in one folder.

state.safetensors  weights, AdamW's averages and its step count; nothing in it can be executed
state.json         the step, the position in the data, and what the run was
SHA256SUMS         of both
"""

import json
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minillama.checkpoint.folder import CheckpointError, replacing, unfinished, verify_sums
from minillama.training.parallel import from_main, is_main

PROGRESS = "state.json"


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and what the optimiser remembers of each, by name; views, not copies.

    An optimiser that has taken no step yet remembers zeros.
    """
    if not optimizer.state:
        _start(optimizer)
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def save_state(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write a folder that is whole or not there: `progress` is anything that JSON can hold.

    Many processes call it together, and each writes a file of its own with the parts it holds.

    Equal states are equal bytes. Raises OSError, and changes nothing, if it cannot be written.
    """
    if dist.is_initialized():
        _save_together(folder, tensors, progress | {"saved_by": dist.get_world_size()})
        return
    with replacing(folder) as new:
        file = new / "state.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        except SafetensorError as error:  # safetensors has its own name for a full disk
            raise OSError(
                f"{folder} could not be written ({error}); the states before it are as they were."
            ) from error
        file.chmod(0o644)  # safetensors makes it for the owner alone
        (new / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")


def _save_together(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    with ExitStack() as stack:  # rank 0 alone makes the folder, and gives it its name
        new = unfinished(folder)
        from_main(lambda: stack.enter_context(replacing(folder)))
        try:
            writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
        except dcp.api.CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise OSError(
                f"{folder} could not be written by process {rank} ({reason}); the states before it "
                f"are as they were."
            ) from error
        if is_main():
            (new / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
        from_main(stack.close)


def load_progress(folder: Path) -> dict[str, Any]:
    """What `save_state` was given as progress. Raises CheckpointError if anything is damaged."""
    try:
        verify_sums(folder, [PROGRESS])
        return json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no whole training state: {error}") from error


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, in place, with those of the same names that were saved.

    They may have been saved by another number of processes: each reads the parts it holds.
    Raises CheckpointError if a name is missing or a shape differs.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = {
        name: tuple(getattr(found, "size", ()))  # everything that we save is a tensor
        for name, found in reader.read_metadata().state_dict_metadata.items()
    }
    needed = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in needed if needed[name] != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder} is the state of another model: {wrong[0]} is {saved.get(wrong[0], 'absent')}"
            f" there, and {needed[wrong[0]]} here ({len(wrong)} tensors differ). Resume it with "
            f"the model it was saved with."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())


def newest_state(states: Path) -> Path | None:
    """The newest whole state in the folder `states`; None if there has never been one.

    A damaged one is named in a warning, and the one before it is taken.
    Raises CheckpointError if there are states, but none is whole.
    """
    found = _states(states)
    for folder in reversed(found):
        try:
            load_progress(folder)
        except CheckpointError as error:
            warnings.warn(f"{error}. The state before it is used.", stacklevel=2)
        else:
            return folder
    if found:
        raise CheckpointError(
            f"None of the {len(found)} states in {states} is whole, so there is nothing to go on "
            f"from. Copy one of them from a backup, or start a new run in another folder."
        )
    return None


def keep_newest(states: Path, n: int) -> None:
    """Remove all states but the newest n."""
    for folder in _states(states)[:-n]:
        shutil.rmtree(folder)


def _states(states: Path) -> list[Path]:
    """The states, by their step."""
    if not states.is_dir():
        return []
    return sorted(path for path in states.iterdir() if path.name.isdigit())


def _start(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimiser make its averages: a step along no gradient, at no rate, moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for remembered in optimizer.state.values():
        for value in remembered.values():
            value.zero_()  # AdamW has counted this step
