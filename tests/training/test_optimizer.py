import numpy as np
import torch
from small import small_config
from torch import nn
from torch.testing import assert_close

from minillama.config import TrainingConfig
from minillama.model import Llama
from minillama.training import make_optimizer


def adamw(w, gradients, config: TrainingConfig, decay: float):
    """Loshchilov & Hutter 2017, algorithm 2, in NumPy: the weight after each gradient."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        step = m_hat / (np.sqrt(v_hat) + config.eps)
        w = w - config.learning_rate * (step + decay * w)  # the decay is no part of the gradient
    return w


class Weights(nn.Module):
    def __init__(self, matrix, vector) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.from_numpy(matrix.copy()))
        self.vector = nn.Parameter(torch.from_numpy(vector.copy()))


def test_three_steps_equal_the_papers_equations():
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(3, 4)), rng.normal(size=4)
    # Gradients as small as eps, where it matters that eps is 1e-5 and stands outside the root.
    gradients = [(1e-5 * rng.normal(size=(3, 4)), 1e-5 * rng.normal(size=4)) for _ in range(3)]
    config = TrainingConfig(learning_rate=0.1)
    model = Weights(matrix, vector)
    optimizer = make_optimizer(model, config)
    for of_matrix, of_vector in gradients:
        model.matrix.grad, model.vector.grad = map(torch.from_numpy, (of_matrix, of_vector))
        optimizer.step()
    expected = adamw(matrix, [g for g, _ in gradients], config, decay=0.1)
    assert_close(model.matrix.detach().numpy(), expected)
    expected = adamw(vector, [g for _, g in gradients], config, decay=0.0)
    assert_close(model.vector.detach().numpy(), expected)


def test_the_papers_settings_are_the_defaults():
    optimizer = make_optimizer(Llama(small_config()), TrainingConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-5)
    assert TrainingConfig().weight_decay == 0.1
    assert TrainingConfig().max_grad_norm == 1.0


def test_matrices_are_decayed_and_norms_are_not():
    model = Llama(small_config())
    decayed, plain = make_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all("norm" in names[p] for p in plain["params"])
    assert not any("norm" in names[p] for p in decayed["params"])
    assert {*decayed["params"], *plain["params"]} == set(model.parameters())


def test_a_tied_matrix_is_updated_once():
    model = Llama(small_config(tie_embeddings=True))
    groups = make_optimizer(model, TrainingConfig()).param_groups
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = Llama(small_config())
    model.tok_embeddings.requires_grad_(False)
    groups = make_optimizer(model, TrainingConfig()).param_groups
    assert not any(p is model.tok_embeddings.weight for g in groups for p in g["params"])
