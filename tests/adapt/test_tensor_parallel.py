"""The plan, on a mesh of one process; tests/training/test_parallel.py has the real ones."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from small import small_config
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close

from minillama.adapt.tensor_parallel import check_shareable, tensor_parallel
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training.loss import batch_loss, fused_next_token_loss


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def new_model(**changes) -> Llama:
    return Llama(small_config(**changes), torch.Generator().manual_seed(0), init_std=0.2)


def random_batch() -> Batch:
    tokens, targets = torch.randint(300, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    targets[0, 4:] = IGNORE
    return Batch(tokens, targets)


def test_every_weight_is_cut_along_the_axis_of_its_heads_hidden_units_or_words(mesh):
    model = new_model()
    tensor_parallel(model, mesh)
    found = {name: parameter.placements for name, parameter in model.named_parameters()}
    expected = {"tok_embeddings": Shard(0), "output": Shard(0), "norm": Replicate()}
    for layer in ("layers.0.", "layers.1."):
        for name in ("attention.wq", "attention.wk", "attention.wv"):
            expected[layer + name] = Shard(0)  # outputs: heads
        for name in ("feed_forward.w1", "feed_forward.w3"):
            expected[layer + name] = Shard(0)  # outputs: hidden units
        for name in ("attention.wo", "feed_forward.w2"):
            expected[layer + name] = Shard(1)  # inputs
        for name in ("attention_norm", "ffn_norm"):
            expected[layer + name] = Replicate()
    assert found == {f"{name}.weight": (placement,) for name, placement in expected.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_shared_model_says_and_learns_the_same(mesh, tied):
    model, shared, batch = (
        new_model(tie_embeddings=tied),
        new_model(tie_embeddings=tied),
        random_batch(),
    )
    tensor_parallel(shared, mesh)
    assert (shared.output.weight is shared.tok_embeddings.weight) == tied
    assert_close(shared(batch.tokens), model(batch.tokens))

    losses = [batch_loss(one, batch) for one in (model, shared)]
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), shared.parameters(), strict=True):
        assert_close(other.grad.full_tensor(), parameter.grad, msg=name)


def test_the_stream_is_cut_by_positions_and_has_the_shape_of_the_whole(mesh):
    model, batch = new_model(), random_batch()
    tensor_parallel(model, mesh)
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, x: streams.append(x))
    hidden = model.hidden(batch.tokens)
    for x in (*streams, hidden):
        assert isinstance(x, DTensor)
        assert x.placements == (Shard(1),)
        assert x.shape == (3, 9, 32)


def test_words_of_a_group_give_the_loss_of_all_words(mesh):
    """One rank has all words here: a loss with a group is the loss without."""
    batch, generator = random_batch(), torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((3, 9, 8), (300, 8))
    )
    results = []
    for group in (None, mesh.get_group()):
        loss = fused_next_token_loss(hidden, weight, batch.targets, chunk=5, group=group)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("sizes", "n", "message"),
    [
        ({}, 4, r"tensor_parallel is 4, but must divide n_kv_heads \(2\): each of the 4 processes"),
        ({"hidden_dim": 65}, 2, r"must divide hidden_dim \(65\)"),
        ({"vocab_size": 301}, 2, r"must divide vocab_size \(301\).* whole\. Choose a divisor"),
    ],
)
def test_what_so_many_cannot_share_is_refused(sizes, n, message):
    with pytest.raises(ValueError, match=message):
        check_shareable(small_config(**sizes), n)


def test_what_they_can_share_is_not():
    check_shareable(small_config(), 1)
    check_shareable(small_config(), 2)
