"""Products with a single vector: the same numbers from the same memory."""

import pytest
import torch
from small import small_llama
from torch import nn
from torch.testing import assert_close

from minillama.adapt.lora import Adapters, new_adapter
from minillama.config import LoRAConfig
from minillama.generation import Decoder
from minillama.generation.vector import VectorProduct, for_one_row

HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def n_vector_products(model: nn.Module) -> int:
    return sum(isinstance(module, VectorProduct) for module in model.modules())


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_model_for_one_row_has_the_same_memory_and_gives_the_same_logits(dtype, compiled, tied):
    model = small_llama(tie_embeddings=tied).to(dtype)
    twin = for_one_row(model, compiled)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert n_vector_products(model) == 0  # it is left as it was
    tokens = torch.tensor([[7]])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    logits = model(tokens)
    assert_close(twin(tokens), logits, rtol=tolerance, atol=tolerance * logits.abs().max().item())


def test_only_what_is_slow_is_replaced():
    whole = 2 * 7 + 1  # the linear layers of two blocks, and the head
    halves = small_llama().half()
    assert for_one_row(halves) is halves  # PyTorch has no better kernel without a compiler
    assert n_vector_products(for_one_row(halves, compiled=True)) == whole
    brain = small_llama().bfloat16()
    assert n_vector_products(for_one_row(brain)) == whole * HAS_BFLOAT16
    elsewhere = small_llama().bfloat16().to("meta")
    assert for_one_row(elsewhere, compiled=True) is elsewhere


@KINDS
@torch.inference_mode()
def test_16_bits_are_added_up_in_float32(dtype):
    weight, x = torch.randn(5, 999).to(dtype), torch.randn(1, 1, 999).to(dtype)
    exact = weight.double() @ x.double().flatten()
    product = VectorProduct(weight)(x)
    assert product.shape == (1, 1, 5)
    assert product.dtype == dtype
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert_close(product.flatten().double(), exact, rtol=rounding, atol=1e-4)


def test_adapters_are_chosen_in_the_model_for_one_row_too():
    model = small_llama().bfloat16()
    adapter = new_adapter(model.config, LoRAConfig(rank=2, targets=("wq", "wv")))
    for low in adapter.layers.values():
        low.b.normal_()
    adapters = Adapters(model, {"one": adapter})
    with torch.inference_mode():
        decoder = Decoder(model, rows=1, max_len=8)
        logits = []
        for name in (None, "one"):
            adapters.choose([name])
            decoder.lengths[0] = 0
            decoder.prefill(0, [[5]])
            logits.append(decoder.step([6]))
    assert not torch.equal(*logits)
