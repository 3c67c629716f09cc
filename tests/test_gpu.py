"""What runs on the CPU runs on a GPU, with the same numbers. Nothing here runs without one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import STORIES, small_config, small_llama, small_tokenizer
from torch.testing import assert_close

from minillama import Llama, load, save
from minillama.adapt.lora import Adapters, new_adapter
from minillama.adapt.quantize import KINDS, quantize
from minillama.config import LoRAConfig, RunConfig, Sampling, TrainingConfig
from minillama.data.packing import Batch
from minillama.generation import Engine, Request, generate
from minillama.plan import TrainingPlan
from minillama.training import make_optimizer, train_step
from minillama.training.checkpointing import checkpoint_activations
from minillama.training.run import PretrainingRun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENS = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(1))
PROMPTS = ["Ada had", "Ben", "Clara took the"]
TRAINING = TrainingConfig(steps=6, batch_size=8, seq_len=32, learning_rate=1e-3, warmup_steps=2)


@torch.inference_mode()
def test_logits_are_those_of_the_cpu():
    model = small_llama()
    expected = model(TOKENS)
    assert_close(model.cuda()(TOKENS.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    halves = model.bfloat16()(TOKENS.cuda()).cpu()
    assert_close(halves, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_are_those_of_the_cpu(temperature):
    """Also what is drawn: the generators are the CPU's on every device."""
    settings = {"max_new_tokens": 20, "temperature": temperature, "seed": 3, "rows": 2}
    expected = generate(small_llama(), small_tokenizer(), PROMPTS, **settings)
    assert generate(small_llama().cuda(), small_tokenizer(), PROMPTS, **settings) == expected


def test_a_draft_on_the_gpu_changes_nothing():
    draft = small_llama(n_layers=1).cuda()
    texts = [
        [c.text for c in generate(small_llama().cuda(), small_tokenizer(), PROMPTS, 20, draft=d)]
        for d in (None, draft)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_quantised_products_are_those_of_their_numbers(kind):
    model = quantize(small_llama(dim=64, hidden_dim=128).cuda(), kind)
    found = model(TOKENS.cuda()).cpu()
    exact = quantize(small_llama(dim=64, hidden_dim=128), kind)
    for layer in exact.modules():
        layer.kernel_rows = 0  # by dequantising, in float32
    expected = exact(TOKENS)
    assert_close(found, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


def test_adapters_are_chosen_per_request():
    def written(device):
        model = small_llama().to(device)
        adapter = new_adapter(model.config, LoRAConfig(rank=2, targets=("wq", "w2")))
        generator = torch.Generator().manual_seed(5)
        for low in adapter.layers.values():
            low.a.normal_(generator=generator)
            low.b.normal_(generator=generator)
        adapters = Adapters(model, {"one": adapter})
        engine = Engine(model, small_tokenizer(), rows=2, adapters=adapters)
        tickets = [engine.submit(Request("Ada had", 12, adapter=name)) for name in (None, "one")]
        while engine.busy:
            engine.step()
        return [ticket.token_ids for ticket in tickets]

    assert written("cuda") == written("cpu")
    assert written("cuda")[0] != written("cuda")[1]


COMPILED = """
import torch
from small import small_llama, small_tokenizer
from minillama.adapt.quantize import quantize
from minillama.generation import CompiledDecoder, Decoder, generate
from torch.testing import assert_close
torch.set_grad_enabled(False)
for kind in ("float32", "bfloat16", "int8", "int4"):
    for rows in (1, 3):
        logits = []
        for decoder in (Decoder, CompiledDecoder):
            model = small_llama(dim=64, hidden_dim=128).cuda()
            if kind.startswith("int"):
                quantize(model.bfloat16(), kind)
            elif kind == "bfloat16":
                model.bfloat16()
            d = decoder(model, rows, max_len=40)
            found = [d.prefill(0, [[1, 5, 7]] * rows)]
            for token in range(10, 30):
                found.append(d.step([token] * rows))
            logits.append(torch.stack(found))
        tolerance = 1e-4 if kind == "float32" else 5e-2
        atol = tolerance * logits[0].abs().max()
        assert_close(logits[1], logits[0], rtol=tolerance, atol=float(atol))
prompts = ["Ada had", "Ben", "Clara took the"]
plain, compiled = (
    generate(small_llama().cuda(), small_tokenizer(), prompts, 20, rows=2, compile=compile)
    for compile in (False, True)
)
assert plain == compiled
"""


def test_a_recorded_step_gives_the_logits_of_the_plain_one():
    in_a_process("-c", COMPILED)  # it cannot be compiled under checks of shapes


def in_a_process(*arguments: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def losses_of(device: str, precision: str, checkpointing: str = "none") -> list[float]:
    model = small_llama().to(device).requires_grad_(True)
    checkpoint_activations(model, checkpointing)
    optimizer = make_optimizer(model, TRAINING)
    batch = Batch(TOKENS.to(device)[:, :-1], TOKENS.to(device)[:, 1:])
    dtype = getattr(torch, precision)
    return [train_step(model, [batch], optimizer, 1.0, dtype=dtype).loss for _ in range(5)]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_training_goes_as_on_the_cpu(checkpointing):
    expected = losses_of("cpu", "float32")
    found = losses_of("cuda", "float32", checkpointing)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    halves = losses_of("cuda", "bfloat16", checkpointing)
    assert_close(torch.tensor(halves), torch.tensor(expected), rtol=0.05, atol=0.05)


def run_in(folder: Path, **changes) -> PretrainingRun:
    return PretrainingRun(
        folder,
        STORIES * 20,
        STORIES,
        small_tokenizer(),
        small_config(),
        replace(TRAINING, **changes),
        device="cuda",
        saving=RunConfig(save_every=2, eval_every=3),
    )


def whole_and_cut(folder: Path) -> list[Path]:
    """The weights of a run, and of one that was cut off and resumed."""
    for _ in run_in(folder / "whole"):
        pass
    steps = iter(run_in(folder / "cut"))
    for _ in range(5):
        next(steps)
    del steps
    for _ in PretrainingRun.resume(folder / "cut"):
        pass
    return [folder / name / "checkpoint" / "model.safetensors" for name in ("whole", "cut")]


def test_a_run_resumes_where_it_was(tmp_path):
    """To rounding: the gradients of attention are added up in whatever order they come."""
    whole, cut = map(load_file, whole_and_cut(tmp_path))
    for name, tensor in whole.items():
        assert_close(cut[name], tensor, rtol=0, atol=1e-4)


def test_a_checkpoint_opens_on_the_gpu(tmp_path):
    save(tmp_path / "model", small_llama(), small_tokenizer())
    for settings in ({}, {"dtype": torch.bfloat16}, {"quantize": "int8"}):
        model, tokenizer = load(tmp_path / "model", device="cuda", **settings)
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
        assert generate(model, tokenizer, "Ada", 5)[0].token_ids


def test_torchrun_shards_over_one_gpu(tmp_path):
    """NCCL, FSDP and a distributed checkpoint, as far as one GPU goes."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(STORIES * 40))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "minillama", "pretrain", "--text", str(text), "--out", str(tmp_path / "run")]
    command += ["--steps", "4", "--seq-len", "64", "--batch-size", "4", "--warmup-steps", "1"]
    command += ["--preset", "tiny", "--vocab-size", "300", "--device", "cuda"]
    in_a_process(*command)
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()


def test_memory_is_what_plan_says():
    config = small_config(
        dim=1024, n_layers=8, n_heads=16, n_kv_heads=16, hidden_dim=2816, vocab_size=32_000,
        max_seq_len=1024,
    )  # fmt: skip
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = Llama(config)
    optimizer = make_optimizer(model, TRAINING)
    ids = torch.randint(32_000, (4, 1025), device="cuda")
    for _ in range(2):
        batch = Batch(ids[:, :-1], ids[:, 1:])
        train_step(model, [batch], optimizer, 1.0, dtype=torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    training = replace(TRAINING, batch_size=4, seq_len=1024)
    planned = TrainingPlan(config=config, training=training, device="cuda").peak
    print(f"peak {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB, {peak / planned:.2f}")
    assert 0.85 < peak / planned < 1.15


def test_sampling_settings_of_rows_differ():
    model = small_llama().cuda()
    engine = Engine(model, small_tokenizer(), rows=3)
    cold, warm = Sampling(), Sampling(temperature=2.0, top_k=20, min_p=0.01, repetition_penalty=1.2)
    tickets = [engine.submit(Request("Ada", 15, s, seed=1)) for s in (cold, warm, cold)]
    while engine.busy:
        engine.step()
    assert tickets[0].token_ids == tickets[2].token_ids != tickets[1].token_ids
