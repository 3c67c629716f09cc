"""Documents in one row: each as if it were alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_llama
from torch import nn
from torch.testing import assert_close

from minillama.data.packing import IGNORE, Batch
from minillama.model import Packed
from minillama.training.loss import batch_loss

MODEL = small_llama()


class Wrapped(nn.Module):
    """No Llama, so it is asked for its logits."""

    def forward(self, *inputs):
        return MODEL(*inputs)


def positions(*rows: list[int]) -> torch.Tensor:
    """Of rows with documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_what_a_token_sees_by_hand():
    packed = Packed(positions([2, 3]))
    assert packed.positions(5).tolist() == [[0, 1, 0, 1, 2]]
    assert packed.visible(5).lengths == [[2, 3]]
    assert packed.mask().int()[0, 0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_rows_of_one_document_need_no_mask():
    tokens = torch.randint(300, (2, 6))
    packed = Packed(positions([6], [6]))
    assert packed.visible(6) is None
    assert torch.equal(MODEL(tokens, packed), MODEL(tokens))
    assert Packed(positions([6], [2, 4])).visible(6).lengths == [[6], [2, 4]]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_each_document_has_the_logits_that_it_has_alone(lengths, seed):
    tokens = torch.randint(300, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    together = MODEL(tokens, Packed(positions(lengths)))
    alone = [MODEL(document) for document in tokens.split(lengths, dim=1)]
    assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)  # logits reach 50


def test_a_mask_keeps_them_apart_as_well():  # as on a GPU
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    one_by_one, masked = (Packed(positions([5, 1, 6], [12])) for _ in range(2))
    masked.visible = lambda seq: masked.mask()
    model, results = small_llama().train().requires_grad_(), []
    for packed in (one_by_one, masked):
        logits = model(tokens, packed)
        gradients = torch.autograd.grad(logits.square().mean(), model.parameters())
        results.append([logits, *gradients])
    assert_close(*results, rtol=1e-4, atol=1e-4)


def test_without_it_a_document_sees_those_before_it():
    tokens = torch.randint(300, (1, 8))
    apart, across = MODEL(tokens, Packed(positions([4, 4]))), MODEL(tokens)
    assert_close(apart[:, :4], across[:, :4])
    assert (apart[:, 4:] - across[:, 4:]).abs().max() > 0.1


@pytest.mark.parametrize("model", [MODEL, Wrapped()], ids=["fused", "plain"])
def test_the_loss_of_packed_rows_is_the_sum_of_that_of_their_documents(model):
    rows = [[5, 3, 4], [12], [1, 11]]
    tokens = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, ::3] = IGNORE
    batch = Batch(tokens, targets, positions(*rows))
    alone = [
        batch_loss(model, Batch(document[None], target[None]))
        for row, lengths in enumerate(rows)
        for document, target in zip(
            tokens[row].split(lengths), targets[row].split(lengths), strict=True
        )
    ]
    assert_close(batch_loss(model, batch), sum(alone), rtol=1e-6, atol=0)
