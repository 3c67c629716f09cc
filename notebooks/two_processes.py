"""What the processes of notebook 19 do, each by itself; it starts them, as a shell would:

python two_processes.py FOLDER
torchrun --standalone --nproc-per-node 2 two_processes.py FOLDER
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from minillama.config import LlamaConfig, TrainingConfig
from minillama.data import tales
from minillama.data.packing import batches, pack
from minillama.model import Llama
from minillama.training import make_optimizer, train
from minillama.training.parallel import is_main, meet, shard

CONFIG = LlamaConfig.preset("tiny")  # 6 query heads, 2 KV heads, 128 hidden units, 512 words
STEPS = 15


def new_model() -> Llama:
    return Llama(CONFIG, torch.Generator().manual_seed(0), init_std=0.1)


def on_all_ranks(tensor_parallel: int = 1):
    """The model, dealt out among all processes, and who they are; one process has it whole."""
    training = TrainingConfig(
        steps=STEPS, batch_size=4, seq_len=32, warmup_steps=1, tensor_parallel=tensor_parallel
    )
    ranks, model = meet("cpu", CONFIG, training), new_model()
    if ranks.mesh is not None:
        shard(model, ranks, torch.float32, first=new_model)
    return model, ranks, training


def losses(tensor_parallel: int = 1) -> list[float]:
    """Train on bytes of the tales; the loss of each step, which all ranks know."""
    model, ranks, training = on_all_ranks(tensor_parallel)
    ids = [[3 + byte for byte in text.encode()] for text in tales.corpus("valid")[:50]]
    own = map(ranks.part, batches(pack(ids, training.seq_len, CONFIG.vocab_size), 4, seed=0))
    steps = train(model, make_optimizer(model, training), own, training, group=ranks.data_group)
    return [stats.loss for stats in steps]


def overlap() -> float:
    """How long computing and communicating take at the same time; one after the other is 1."""
    numbers, took = torch.ones(3), []
    for at_once in (False, True):
        dist.barrier()
        start = time.perf_counter()
        if not is_main():
            time.sleep(0.8)  # rank 1 is late, and rank 0 has to wait for its numbers
        work = dist.all_reduce(numbers, async_op=True)  # comes back before the sum is there
        if not at_once:
            work.wait()
        time.sleep(0.8)  # rank 0 computes something else
        work.wait()
        took.append(time.perf_counter() - start)
    assert numbers.tolist() == [4.0, 4.0, 4.0]
    return took[1] / took[0]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {"alone or rows": losses()}
    if dist.is_initialized():
        found["matrices"] = losses(tensor_parallel=2)
        found["overlap"] = overlap()
        model, _, _ = on_all_ranks(tensor_parallel=2)
        hidden = model.hidden(torch.arange(12)[None]).full_tensor()
        held = {name: p.to_local().contiguous() for name, p in model.named_parameters()}
        rank = dist.get_rank()
        save_file(held | {"hidden": hidden.contiguous()}, folder / f"rank{rank}.safetensors")
    if is_main():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
