import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minillama.adapt.quantize import quantize
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training import fused_next_token_loss, loss, next_token_loss
from minillama.training.loss import batch_loss

BATCH, SEQ, DIM, VOCAB = 3, 7, 8, 50


def inputs(ignored: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, SEQ, DIM, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=dtype)
    targets = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    targets[torch.rand(BATCH, SEQ, generator=generator) < ignored] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_the_loss_by_hand():  # -log(3/4) and -log(1/4), the third is ignored
    logits = torch.tensor([[[math.log(3), 0.0]] * 3])
    loss = next_token_loss(logits, torch.tensor([[0, 1, IGNORE]]))
    assert_close(loss, torch.tensor(-math.log(3 / 4) - math.log(1 / 4)))


def test_a_uniform_guess_costs_log_vocab_per_target():
    loss = next_token_loss(torch.zeros(2, 5, 32), torch.zeros(2, 5, dtype=torch.long))
    assert_close(loss, torch.tensor(10 * math.log(32)))


@given(chunk=st.integers(1, 25), ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_fused_equals_the_loss_of_all_logits_and_its_gradients(chunk, ignored, seed):
    hidden, weight, targets = inputs(ignored, seed)
    expected = next_token_loss(hidden @ weight.T, targets)
    gradients = torch.autograd.grad(expected / 3, (hidden, weight))
    loss = fused_next_token_loss(hidden, weight, targets, chunk)
    # The loss itself is computed in float32, as the model's logits are.
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(loss / 3, (hidden, weight)), gradients, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_gradients_it_is_the_same_number():
    hidden, weight, targets = inputs(dtype=torch.float32)
    expected = fused_next_token_loss(hidden, weight, targets, 4)
    with torch.inference_mode():
        assert_close(fused_next_token_loss(hidden, weight, targets, 4), expected.detach())


def test_it_is_differentiated_once():
    hidden, weight, targets = inputs()
    loss = fused_next_token_loss(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.n = max(self.n, tensor.numel())
        return made


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_changes_no_bit_and_costs_no_product():
    hidden, weight, targets = inputs(0.0, dtype=torch.float32)
    found, products = [], []
    for trained in (True, False):
        with Operations() as operations:
            loss = fused_next_token_loss(hidden, weight.requires_grad_(trained), targets, 4)
            gradients = torch.autograd.grad(loss, (hidden, weight) if trained else (hidden,))
        found.append((loss.detach(), gradients[0]))
        products.append(sum(name.startswith(("mm", "addmm")) for name in operations.names))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert products == [18, 12]  # of 6 chunks: logits, gradient of hidden, gradient of weight


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_logits_of_the_whole_batch_never_exist(with_gradients):
    rows, vocab = 4 * 64, 2000
    model = Llama(small_config(n_layers=1, vocab_size=vocab))
    tokens = torch.arange(rows).reshape(4, 64) % vocab
    with LargestTensor() as largest, torch.set_grad_enabled(with_gradients):
        loss = fused_next_token_loss(model.hidden(tokens), model.output.weight, tokens, chunk=16)
        if with_gradients:
            loss.backward()
    assert largest.n == model.output.weight.numel()  # 32 * 2000; all logits are 256 * 2000
    with LargestTensor() as largest:
        next_token_loss(model(tokens), tokens)
    assert largest.n == rows * vocab  # the measure sees them where they are


def test_under_autocast_the_products_are_bfloat16_and_the_loss_is_float32():
    hidden, weight, targets = inputs(dtype=torch.float32)
    expected = fused_next_token_loss(hidden, weight, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_next_token_loss(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss != expected
    assert_close(loss, expected, rtol=1e-2, atol=0)
    for one, other in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_llama_equals_that_of_its_logits(tied):
    model = Llama(small_config(tie_embeddings=tied), torch.Generator().manual_seed(0))
    tokens = torch.randint(300, (2, 10), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:].clone())
    batch.targets[0, :4] = IGNORE
    expected = next_token_loss(model(batch.tokens), batch.targets)
    assert_close(batch_loss(model, batch), expected)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantised_head_needs_no_logits_of_the_whole_batch_either(kind):
    model = Llama(small_config(n_layers=1, vocab_size=2000), torch.Generator().manual_seed(0))
    tokens = torch.randint(2000, (16, 64), generator=torch.Generator().manual_seed(1))
    expected = next_token_loss(quantize(model, kind)(tokens), tokens)
    model.layers[0].attention_norm.weight.requires_grad_()
    with LargestTensor() as largest:
        loss = batch_loss(model, Batch(tokens, tokens))
        loss.backward()
    assert_close(loss, expected, rtol=1e-4, atol=0)
    assert largest.n == tokens.numel() // 2 * 2000


def test_a_head_that_is_no_plain_matrix_is_asked_for_its_logits():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Llama(small_config())
    model.output = Doubled(32, 300, bias=False)
    batch = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    assert_close(batch_loss(model, batch), next_token_loss(model(batch.tokens), batch.targets))


def test_positions_without_a_target_have_no_logits(monkeypatch):
    rows = []

    class Counting(loss._Chunk):
        def __init__(self, logits, *others):
            rows.append(len(logits))
            super().__init__(logits, *others)

    monkeypatch.setattr(loss, "_Chunk", Counting)
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4)
    targets = torch.full((2, 5), IGNORE)
    targets[0, 1], targets[1, 3:] = 2, 6
    fused_next_token_loss(hidden, weight, targets, chunk=2).backward()
    assert rows == [2, 1]
    assert hidden.grad.any(-1).tolist() == (targets != IGNORE).tolist()
    fused_next_token_loss(hidden, weight, torch.full((2, 5), IGNORE)).backward()  # of none at all
