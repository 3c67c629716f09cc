"""The whole model: embeddings, blocks, a last norm, and a head."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillama.config import LlamaConfig
from minillama.model.attention import Attention
from minillama.model.cache import KVCache, LayerCache
from minillama.model.feed_forward import FeedForward
from minillama.model.norm import RMSNorm
from minillama.model.packed import Documents, Packed
from minillama.model.rope import rope_angles


class Block(nn.Module):
    """One layer: x + Attention(norm(x)), then x + FeedForward(norm(x)).

    Pre-normalisation: the sub-layers read a normalised copy and *add* to the stream, so a gradient
    reaches every layer through a path of plain additions.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        angles: Float[Tensor, "#batch 1 seq half_head_dim"],
        visible: Bool[Tensor, "#batch 1 seq k_len"] | Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x), angles, visible, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A Llama of any size: token ids in, logits of the next token out.

    `model(tokens)` is the head on top of the body `model.hidden(tokens)`; a loss or a decoder that
    needs only some of the logits calls the two itself. Parameter names are Meta's, so official
    weights load as they are.

    `generator` draws the initial weights (torch's global one where it is None), with standard
    deviation `init_std`; see `TrainingConfig` for when 0.02 is too little.
    Source: Touvron et al. 2023a, sec. 2.2 (arXiv:2302.13971). Built in notebooks/06_llama.ipynb.
    """

    def __init__(
        self,
        config: LlamaConfig,
        generator: torch.Generator | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        if not self.output.weight.is_meta:  # else there is nothing to draw into yet
            self._init_weights(generator, init_std)

    def forward(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache | Packed | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        return self.output(self.hidden(tokens, cache)).float()

    def hidden(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache | Packed | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """The normalised residual stream after the last layer.

        With a cache, `tokens` continue what it holds, and it grows by them; `Packed` in its place
        keeps the documents of a row apart.
        Raises ValueError for tokens of another shape, for more of them than the context, and on the
        CPU for ids outside the vocabulary (a GPU checks indices itself, and aborts).
        """
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, but must be int64 ids "
                f"of shape (batch, seq). A single sequence is torch.tensor([ids])."
            )
        if cache and len(cache.lengths) != len(tokens):
            raise ValueError(
                f"tokens have {len(tokens)} rows, but the cache was made for {len(cache.lengths)}."
            )
        seq, past = tokens.shape[1], max(cache.lengths) if cache else 0
        room = min(self.config.max_seq_len, cache.max_len) if cache else self.config.max_seq_len
        if past + seq > room:
            raise ValueError(
                f"{past} tokens read and {seq} more are {past + seq}, but there is room for {room} "
                f"(the model's max_seq_len is {self.config.max_seq_len}). Shorten the text."
            )
        positions = cache.positions(seq) if cache else torch.arange(seq, device=tokens.device)[None]
        angles = rope_angles(positions, self.config.head_dim, self.config.rope_theta)[:, None]
        visible = cache.visible(seq) if cache else None

        x = self._embed(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, visible, cache.layer(index) if cache else None)
        if cache:
            cache.advance(seq)
        return self.norm(x)

    def _embed(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq dim"]:
        try:
            return self.tok_embeddings(tokens)
        except IndexError:
            raise ValueError(
                f"The token ids lie between {tokens.min()} and {tokens.max()}, but the model's "
                f"vocabulary has the ids 0 to {self.config.vocab_size - 1}. Was the text encoded "
                f"with the tokenizer of another model? (pad_id -1 is no token either.)"
            ) from None

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None, std: float) -> None:
        """normal(0, std); what writes to the residual stream is divided by sqrt(2 * n_layers).

        Meta never published its initialisation. This is GPT-2's: 2 * n_layers sub-layers add to
        the stream, and the division keeps its variance independent of depth.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                shrink = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
                parameter.normal_(0.0, std * shrink, generator=generator)
