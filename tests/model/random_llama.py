"""A small model whose weights make a comparison mean something."""

import torch

from minillama.config import LlamaConfig
from minillama.model import Llama


def small_config(n_heads: int = 8, n_kv_heads: int = 2, **changes) -> LlamaConfig:
    """Two layers, 8 channels a head. 8 / 2 heads: the group (4) is not the number of KV heads (2),
    and wk's 16 rows would also split into 8 heads: whoever takes one for the other gets numbers.
    eps = 0.01 is large enough to be seen: at 1e-5 any place for it would look right.
    """
    sizes = {"dim": 8 * n_heads, "n_layers": 2, "hidden_dim": 96, "vocab_size": 128}
    others = {"max_seq_len": 512, "norm_eps": 1e-2}
    return LlamaConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, **(sizes | others | changes))


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """Matrices that keep the size of what passes, so that logits and attention scores are of order
    1 and no path through the model is negligible; norm weights that differ from 1.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = 1.0 if name == "tok_embeddings.weight" else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def random_tokens(config: LlamaConfig, batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, seq), generator=generator)
