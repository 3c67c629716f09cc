import weakref

import pytest
import torch
from small import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from minillama.config import CHECKPOINTING
from minillama.data.packing import Batch
from minillama.model import Llama
from minillama.training.checkpointing import checkpoint_activations
from minillama.training.loss import batch_loss

CONFIG = small_config(n_layers=6, hidden_dim=96)


def new_model(kind: str) -> Llama:
    model = Llama(CONFIG, torch.Generator().manual_seed(0))
    checkpoint_activations(model, kind)
    return model


def batch() -> Batch:
    ids = torch.randint(300, (4, 65), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:])


class Memory(TorchDispatchMode):
    """Bytes of all tensors alive that were made within: now, and at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, n = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.bytes += n
                    weakref.finalize(storage, self._free, key, n)
        self.peak = max(self.peak, self.bytes)
        return made

    def _free(self, key, n):
        if key in self.alive:
            self.alive.remove(key)
            self.bytes -= n


def kept_and_peak(kind: str) -> tuple[int, int]:
    """Bytes that the forward pass keeps, and the most that both passes need."""
    model = new_model(kind)
    with Memory() as memory:
        loss = batch_loss(model, batch())
        kept = memory.bytes
        loss.backward()
    return kept, memory.peak


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_no_bit_of_a_gradient_changes(kind):
    plain, model = new_model("none"), new_model(kind)
    losses = [batch_loss(m, batch()) for m in (plain, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_each_kind_keeps_what_it_says():
    (none, none_peak), (selective, selective_peak), (full, full_peak) = map(
        kept_and_peak, CHECKPOINTING
    )
    assert none > selective > full
    assert none_peak > selective_peak > full_peak
    # A block has 4 * 64 positions; selective keeps the outputs of its seven linear layers more.
    outputs = 2 * 32 + 2 * 16 + 32 + 2 * 96  # wq, wo; wk, wv; w2; w1, w3
    expected = CONFIG.n_layers * 4 * 64 * outputs * 4
    assert selective - full == pytest.approx(expected, rel=0.05)


def test_names_and_logits_stay():
    plain, model = new_model("none"), new_model("selective")
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(plain(batch().tokens), model(batch().tokens))


def test_an_unknown_kind_is_refused():
    with pytest.raises(
        ValueError, match=r"no kind of activation checkpointing 'selectiv'.* Did you"
    ):
        checkpoint_activations(Llama(CONFIG), "selectiv")
