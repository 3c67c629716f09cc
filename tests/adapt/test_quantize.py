"""Codes by hand and by property, layers against the matrices that their codes stand for."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small import small_config, small_llama, small_tokenizer
from torch.nn.functional import linear
from torch.testing import assert_close

from minillama import Llama, generate, load, save
from minillama.adapt.quantize import (
    KINDS,
    Int4Linear,
    NF4Linear,
    absmax_int8,
    block_nf4,
    dequantized_product,
    empty_linear,
    group_int4,
    nf4_levels,
    quantization_of,
    quantize,
    quantize_linear,
    two_from_a_byte,
    two_in_a_byte,
)
from minillama.checkpoint import CheckpointError, open_checkpoint
from minillama.checkpoint.fetch import fetched
from minillama.data import tales
from minillama.data.packing import Batch
from minillama.plan import InferencePlan, quantized_bytes
from minillama.training import evaluate

MANY_ROWS = Int4Linear.kernel_rows + 1  # no kernel takes so many
# d_out, d_in: shapes that all kernels have, and such that groups, blocks or kernels do not divide.
REGULAR = [(64, 64), (192, 576), (288, 256), (80, 32)]
ODD = [(48, 172), (5, 7), (1, 1), (130, 33)]
THE_PAPERS_LEVELS = """
    -1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1.0
"""  # Dettmers et al. 2023, appendix E

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 80)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
).map(torch.from_numpy)


def random_weight(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def random_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- Codes ---------------------------------------------------------------------------------------


def test_int8_by_hand():  # the scale is 2 / 127
    codes, scale = absmax_int8(torch.tensor([[0.5, -2.0, 0.0, 0.01]]))
    assert codes.tolist() == [[32, -127, 0, 1]]
    assert_close(scale, torch.tensor([2 / 127]))


def test_int4_by_hand():  # from -4 to 3.5 are 15 steps of 0.5; the code 8 is -4 + 8 * 0.5
    row = torch.linspace(-4, 3.5, 16).repeat(2)
    codes, scale_and_zero = group_int4(row[None])
    assert codes.tolist() == [[*range(16), *range(16)]]
    assert scale_and_zero.tolist() == [[[0.5, 0.0]]]
    assert torch.equal(quantize_linear(row[None], "int4").dequantized(), row[None])


def test_nf4_by_hand():  # 0.22 of 0.4 is 0.55, nearest to 0.5626, the level 13
    codes, absmax = block_nf4(torch.tensor([0.22, -0.4, 0.0]))
    assert codes[:3].tolist() == [13, 0, 7]
    assert_close(absmax, torch.tensor([0.4]))


def test_the_levels_are_the_papers():  # of which it gives seven digits
    assert_close(
        nf4_levels(),
        torch.tensor([float(level) for level in THE_PAPERS_LEVELS.split()]),
        rtol=0,
        atol=2e-7,
    )


def test_two_codes_in_a_byte():  # as bitsandbytes has them: the first is the upper half
    assert two_in_a_byte(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x12, 0xF0]
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    assert torch.equal(two_from_a_byte(two_in_a_byte(codes)), codes)


@given(matrices)
@example(torch.tensor([[1.2967e-36]]))  # a scale below the least normal number
def test_int8_is_off_by_half_a_step_at_most(weight):
    codes, scale = absmax_int8(weight)
    assert (codes.abs().amax(-1)[weight.abs().amax(-1) > 1e-30] == 127).all()
    error = (codes * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    # With the scale of the layer, which is rounded to bfloat16.
    layer = quantize_linear(weight, "int8")
    step = layer.scale.float()[:, None]
    assert ((layer.dequantized() - weight).abs() <= 0.5001 * step + 1e-37).all()


@given(matrices)
def test_int4_is_off_by_little_more_than_half_a_step(weight):
    """Scale and zero are bfloat16, numbers of 8 bits: each is off by 1/256 of itself at most."""
    off = (quantize_linear(weight, "int4").dequantized() - weight).abs()
    for at in range(0, weight.shape[1], 32):
        group = weight[:, at : at + 32]
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / 15
        bound = 0.5 * step + 8 * step / 256 + group.abs().amax(1, keepdim=True) / 256
        assert (off[:, at : at + 32] <= 1.001 * bound + 1e-37).all()


@given(matrices)
def test_nf4_takes_the_nearest_level(weight):
    codes, absmax = block_nf4(weight.flatten())
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    share = (blocks / absmax[:, None]).nan_to_num(0.0)  # 0 / 0, in a block of zeros
    distance = (share[..., None] - nf4_levels()).abs()  # (blocks, 64, 16)
    taken = distance.gather(-1, codes.view(-1, 64, 1).long())[..., 0]
    assert_close(taken, distance.amin(-1), rtol=0, atol=1e-6)


def test_double_quantisation_is_off_by_half_a_constants_step():
    weight = random_weight(257, 192) * torch.linspace(0.1, 3, 257)[:, None]
    layer = quantize_linear(weight, "nf4")
    _, absmax = block_nf4(weight.flatten())
    assert layer.absmax_mean == absmax.mean()
    assert len(layer.absmax_scale) == 4  # 771 blocks
    half = layer.absmax_scale[torch.arange(len(absmax)) // 256] / 2
    found = layer._absmax(slice(0, len(absmax)))
    assert ((found - absmax).abs() <= 1.001 * half).all()
    assert not torch.equal(found, absmax)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_come_back_as_zeros(kind):
    weight = random_weight(128, 64)
    weight[3] = 0
    weight[:, 5] = 0
    weight[64:] = 0
    restored = quantize_linear(weight, kind).dequantized()
    assert (restored[3] == 0).all()
    assert (restored[64:] == 0).all()
    if kind != "int4":  # where 0 is no code, it is as near as any other number
        assert (restored[:, 5] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_bits(kind):
    """Of normally distributed weights; 3 bits less are about eight times the error."""
    weight = random_weight(256, 512)
    error = (quantize_linear(weight, kind).dequantized() - weight).norm() / weight.norm()
    low, high = {"int8": (0.005, 0.010), "int4": (0.07, 0.085), "nf4": (0.085, 0.1)}[kind]
    assert low < error < high


# --- Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_out", "d_in"), REGULAR + ODD)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (2, 50), (0,)])
def test_a_layer_multiplies_by_what_its_codes_stand_for(kind, d_out, d_in, shape):
    layer = quantize_linear(random_weight(d_out, d_in), kind)
    x = random_input(*shape, d_in)
    expected = linear(x, layer.dequantized())
    # A kernel reads and writes bfloat16, numbers of 8 bits: x and the product are rounded.
    atol = 0.02 * float(layer.dequantized().norm(dim=1).amax())
    product = layer(x)
    assert product.shape == (*shape, d_out)
    assert_close(product, expected, rtol=1 / 128, atol=atol)
    assert_close(dequantized_product(x, layer), expected)
    assert_close(layer.dequantized(), layer.dequantized())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_rows_go_through_a_kernel_and_many_do_not(kind):
    layer = quantize_linear(random_weight(64, 64), kind)

    def in_bfloat16(n_rows: int) -> bool:
        product = layer(random_input(n_rows, 64))
        return torch.equal(product, product.bfloat16().float())

    assert in_bfloat16(1)
    assert in_bfloat16(layer.kernel_rows)
    assert not in_bfloat16(layer.kernel_rows + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_has_the_dtype_of_x(kind, dtype):
    layer = quantize_linear(random_weight(64, 64), kind)
    for n_rows in (1, MANY_ROWS):
        x = random_input(n_rows, 64).to(dtype)
        assert layer(x).dtype == dtype
        expected = linear(x.float(), layer.dequantized())
        assert_close(layer(x).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_out", "d_in"), REGULAR + ODD)
def test_codes_in_a_kernels_order_come_back(kind, d_out, d_in):
    layer = quantize_linear(random_weight(d_out, d_in), kind)
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    whole = layer.dequantized()
    layer(random_input(1, d_in))
    assert torch.equal(layer.dequantized(), whole)
    assert layer.state_dict().keys() == before.keys()
    for name, buffer in layer.state_dict().items():
        assert torch.equal(buffer, before[name]), name
    layer(random_input(1, d_in))
    other = empty_linear(kind, d_in, d_out)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.dequantized(), whole)
    assert torch.equal(other(random_input(1, d_in)), layer(random_input(1, d_in)))


def test_codes_are_loaded_over_others_in_a_kernels_order():
    one, two = (quantize_linear(random_weight(64, 64, seed), "int4") for seed in (0, 1))
    one(random_input(1, 64))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(random_input(1, 64)), two(random_input(1, 64)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_many_blocks_of_rows_is_one_matrix(kind, monkeypatch):
    weight = random_weight(300, 96)
    layer = quantize_linear(weight, kind)
    monkeypatch.setattr("minillama.adapt.quantize._NUMBERS_AT_ONCE", 64 * 96)  # 64 rows at a time
    other = quantize_linear(weight, kind)
    assert len(list(other.row_blocks(torch.float32))) == 5
    for name, buffer in other.state_dict().items():
        assert torch.equal(buffer, layer.state_dict()[name]), name
    x = random_input(MANY_ROWS, 96)
    assert_close(other(x), layer(x))
    assert torch.equal(other(x[:2]), layer(x[:2]))
    x.requires_grad_()
    (found,) = torch.autograd.grad(other(x).square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x, layer.dequantized()).square().sum(), x)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 2, MANY_ROWS])
def test_the_gradient_of_the_input_is_that_of_the_dequantised_matrix(kind, n_rows):
    layer = quantize_linear(random_weight(48, 172), kind)
    x, upstream = random_input(2, n_rows, 172), random_input(2, n_rows, 48)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(found).backward(upstream)
    linear(expected, layer.dequantized()).backward(upstream)
    assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_the_backward_pass(kind):
    layer, kept = quantize_linear(random_weight(64, 64), kind), []
    x = random_input(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        layer(x).sum().backward()
    assert kept == []
    assert list(layer.parameters()) == []


def test_a_model_that_wrote_can_be_trained_through():
    """Its codes were put into the kernel's order in inference mode."""
    layer = quantize_linear(random_weight(64, 64), "int4")
    with torch.inference_mode():
        layer(random_input(1, 64))
    x = random_input(3, 64).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_of_the_model_leave_codes_and_scales(kind):
    layer = quantize_linear(random_weight(64, 64), kind)
    before = layer.state_dict()
    layer(random_input(1, 64))
    for convert in (layer.half, layer.bfloat16, layer.float, layer.double):
        convert()
        for name, buffer in layer.state_dict().items():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name]), (convert, name)
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_larger_groups_take_fewer_bytes_and_are_less_exact(group_size):
    weight = random_weight(64, 512)
    layer = quantize_linear(weight, "int4", group_size)
    n_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    assert 8 * n_bytes / weight.numel() == 4 + 32 / group_size
    error = (layer.dequantized() - weight).norm() / weight.norm()
    assert error > (
        quantize_linear(weight, "int4").dequantized() - weight
    ).norm() / weight.norm() or (group_size == 32)
    x = random_input(2, 512)
    assert_close(layer(x), dequantized_product(x, layer), rtol=1 / 128, atol=0.02)


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    weight = random_weight(256, 192)
    layer = quantize_linear(weight, "nf4")
    codes, _ = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(codes.flatten(), layer.codes)
    x = random_input(3, 192)
    assert_close(layer._product(x), dequantized_product(x, layer))


# --- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_of_the_blocks_and_the_head_is_quantised(kind, tied):
    model = small_llama(tie_embeddings=tied)
    embeddings = model.tok_embeddings.weight.clone()
    assert quantization_of(model) is None
    assert quantize(model, kind) is model
    assert quantization_of(model) == {"kind": kind, "group_size": 32}
    kinds = [layer.kind for layer in model.modules() if hasattr(layer, "kind")]
    assert kinds == [kind] * (7 * 2 + 1)
    assert torch.equal(model.tok_embeddings.weight, embeddings)
    assert {name for name, _ in model.named_parameters() if "norm" not in name} == {
        "tok_embeddings.weight"
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"hidden_dim": 172}, {"dim": 40, "vocab_size": 301}])
def test_the_plan_knows_the_bytes(kind, tied, sizes):
    config = small_config(tie_embeddings=tied, **sizes)
    model = quantize(small_llama(tie_embeddings=tied, **sizes), kind)
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    plan = InferencePlan(config=config, seq_len=1, dtype="float32", quantize=kind)
    assert plan.parts["weights"] == n_bytes
    layer = model.output
    found = sum(buffer.nbytes for buffer in layer.buffers())
    assert quantized_bytes(kind, layer.out_features, layer.in_features) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_says_nearly_the_same_and_writes(kind):
    model, tokens = small_llama(), torch.arange(2 * 40).view(2, 40)
    before = model(tokens).log_softmax(-1)
    quantize(model, kind)
    after = model(tokens).log_softmax(-1)
    assert (after.exp() * (after - before)).sum(-1).mean() < {"int8": 0.01}.get(kind, 1.0)  # nats
    (completion,) = generate(model, small_tokenizer(), ["Ada"], max_new_tokens=5)
    assert len(completion.token_ids) == 5


def test_gradients_flow_through_a_whole_model_to_its_norms():
    model = quantize(small_llama(), "nf4").requires_grad_(True)
    exact = small_llama()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            exact.get_submodule(name).weight = torch.nn.Parameter(layer.dequantized())
    exact.requires_grad_(True)
    tokens = torch.arange(40).view(2, 20)
    for one in (model, exact):
        one(tokens).log_softmax(-1)[..., 5].sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert len(found) == 2 * 2 + 1 + 1
    for name, grad in found.items():
        assert_close(grad, exact.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "group_size"), [("int8", 32), ("int4", 32), ("int4", 64), ("nf4", 32)]
)
def test_saved_and_loaded_to_the_bit(tmp_path, kind, group_size, tied):
    model = quantize(small_llama(tie_embeddings=tied, hidden_dim=172), kind, group_size)
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        before = model(tokens)  # which puts int4's codes into the kernel's order
    save(tmp_path / "folder", model, small_tokenizer())
    loaded, _ = load(tmp_path / "folder")
    assert quantization_of(loaded) == {"kind": kind, "group_size": group_size}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), before)
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_loading_quantises_as_quantize_does(tmp_path, kind, dtype, tied):
    save(tmp_path / "folder", small_llama(tie_embeddings=tied), small_tokenizer())
    loaded, _ = load(tmp_path / "folder", quantize=kind, dtype=dtype)
    expected = quantize(small_llama(tie_embeddings=tied), kind).to(dtype)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("format", ["huggingface", "meta", "llama2.c", "gguf"])
def test_other_formats_do_not_hold_it(tmp_path, format):
    model = quantize(small_llama(), "int4")
    with pytest.raises(
        ValueError, match=r"in int4, packed as minillama does .* Save them as native"
    ):
        save(tmp_path / "x", model, small_tokenizer(), format=format)
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantised_is_not_quantised_again(tmp_path):
    save(tmp_path / "folder", quantize(small_llama(), "int8"), small_tokenizer())
    with pytest.raises(ValueError, match="in int8 already, and what they lost is not regained"):
        load(tmp_path / "folder", quantize="int4")
    with pytest.raises(ValueError, match="no quantisation 'int3'"):
        load(tmp_path / "folder", quantize="int3")


@pytest.mark.parametrize(("name", "dtype"), [("scale", torch.float32), ("codes", torch.uint8)])
def test_codes_and_scales_of_another_dtype_are_refused(tmp_path, name, dtype):
    save(tmp_path / "folder", quantize(small_llama(), "int8"), small_tokenizer())
    checkpoint = open_checkpoint(tmp_path / "folder")
    key = f"layers.0.attention.wq.{name}"
    wrong = replace(checkpoint.weights[key], dtype=dtype)
    with pytest.raises(CheckpointError, match=f"{key} is of .*, which no weight can be: it must"):
        replace(checkpoint, weights={**checkpoint.weights, key: wrong})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_the_whole_is_never_in_memory_in_more_bits(tmp_path):
    """A checkpoint of 325 MB in float32; in a process of its own, so that nothing else counts."""
    sizes = {"dim": 1024, "n_layers": 6, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 2816}
    model = Llama(small_config(**sizes))
    save(tmp_path / "folder", model, small_tokenizer())
    for kind in KINDS:
        plan = InferencePlan(config=model.config, seq_len=1, dtype="bfloat16", quantize=kind)
        peak = run_python(f"""
import torch
from pathlib import Path
from minillama import load, save
from small import small_llama, small_tokenizer
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
torch.set_num_threads(1)
save(r"{tmp_path}/small", small_llama(), small_tokenizer())  # what libraries load at first
load(r"{tmp_path}/small", quantize="{kind}", dtype=torch.bfloat16)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model, _ = load(r"{tmp_path}/folder", quantize="{kind}", dtype=torch.bfloat16)
print(resident("VmHWM") - before)
""")
        # Beside them one matrix of 11.5 MB, what is computed of it, and holes that malloc leaves.
        assert int(peak) < 1.1 * plan.parts["weights"] + 50e6, kind
        assert int(peak) < 0.85 * 2 * model.config.n_parameters  # in 16 bits


# --- Real weights --------------------------------------------------------------------------------


def loss(model: Llama, rows: torch.Tensor) -> float:
    """Nats per token."""
    return evaluate(model, [Batch(row[None, :-1], row[None, 1:]) for row in rows])


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.005), ("int4", 0.05), ("nf4", 0.05)])
def test_the_toy_loses_little(kind, most):
    model, tok = load(Path(__file__).parents[2] / "data" / "toy" / "checkpoint")
    ids = [token for story in tales.corpus("valid")[:40] for token in tok.encode(story, bos=True)]
    rows = torch.tensor(ids[: 20 * 129]).view(20, 129)
    before = loss(model, rows)
    after = loss(quantize(model, kind), rows)
    assert 0 < abs(after / before - 1) < most


@pytest.mark.slow
def test_smollm2_loses_little(assets):
    """On 4,096 tokens of Shakespeare; NF4 is printed, and not held to anything but reason."""
    path = fetched("smollm2-135m-instruct")
    if path is None:
        pytest.skip("needs SmolLM2: minillama fetch smollm2-135m-instruct")
    model, tok = load(path, dtype=torch.float32)
    ids = tok.encode((assets / "tinyshakespeare.txt").read_text()[:20_000])
    rows = torch.tensor(ids[: 8 * 513]).view(8, 513)
    before = loss(model, rows)
    found = {}
    for kind in KINDS:
        model, _ = load(path, dtype=torch.float32, quantize=kind)
        found[kind] = loss(model, rows) / before - 1
    print({kind: f"{change:+.2%}" for kind, change in found.items()})
    assert abs(found["int8"]) < 0.005
    assert abs(found["int4"]) < 0.05
    assert abs(found["nf4"]) < 0.2


# --- What cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_refused(kind, bad):
    model = small_llama()
    model.layers[1].feed_forward.w2.weight[3, 7] = bad
    with pytest.raises(
        ValueError, match=r"^layers\.1\.feed_forward\.w2: 1 of the weight's 2048 num"
    ):
        quantize(model, kind)


def test_other_kinds_and_groups_are_refused():
    weight = random_weight(32, 32)
    with pytest.raises(ValueError, match=r"no quantisation 'int5'.*Known are: int8, int4, nf4"):
        quantize_linear(weight, "int5")
    with pytest.raises(ValueError, match="group_size is 48, but must be 32, 64, 128 or 256"):
        quantize_linear(weight, "int4", 48)
    with pytest.raises(ValueError, match="group_size is 64, but int8 has no groups: int4 does"):
        quantize_linear(weight, "int8", 64)


# --- Other processors, and compiled --------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_kernels_of_older_processors(capability):
    """They have other orders of int4's codes, and what is saved must not depend on it."""
    name = run_python(
        """
import torch
from minillama.adapt.quantize import KINDS, quantize_linear
weight = torch.randn(288, 160, generator=torch.Generator().manual_seed(0))
for kind in KINDS:
    layer = quantize_linear(weight, kind)
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    x = torch.ones(2, 160)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T, rtol=0.01, atol=0.1)
    for name, buffer in layer.state_dict().items():
        assert torch.equal(buffer, before[name]), (kind, name)
print(torch.backends.cpu.get_cpu_capability())
""",
        ATEN_CPU_CAPABILITY=capability,
    )
    assert name.strip().lower() in (capability, "default", "no avx")


@pytest.mark.slow
def test_compiled_it_is_one_graph_with_the_same_numbers():
    """In a process without checks of shapes: torch.compile does not look through them."""
    run_python("""
import torch
from minillama.adapt.quantize import KINDS, quantize
from small import small_llama
for kind in KINDS:
    block = quantize(small_llama(), kind).layers[0].feed_forward
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    for n_rows in (1, 100):
        x = torch.randn(1, n_rows, 32)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), block(x))
""")
