"""Generation: one prompt or many, through a static KV cache, as a list or as a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.config import Sampling
from minillama.generation.sampling import sample
from minillama.generation.stop import StopFilter
from minillama.model import KVCache, Llama
from minillama.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What the model wrote behind one prompt."""

    text: str  # without the prompt, and without the stop string
    token_ids: list[int]  # as drawn, without EOS
    finish_reason: FinishReason  # "stop": EOS or a stop string; "length": no more tokens allowed
    logprobs: list[float] | None = None  # of the tokens, in nats, before temperature and cuts


@torch.inference_mode()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
) -> list[Completion]:
    """Continue each prompt; an empty one starts from BOS alone.

    A completion depends on its own prompt and seed and never on its neighbours: prompts of any
    lengths can share a call. One `seed` serves every prompt; to sample one prompt several times,
    give a seed for each. None draws fresh ones. A completion also ends, with reason "length", where
    the model's context is full.

    Raises ValueError for a prompt that leaves no room in the context, for a tokenizer of another
    model, and for settings that mean nothing. Shown in notebooks/00_tour.ipynb.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seed] * len(prompts) if seed is None or isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(
            f"There are {len(prompts)} prompts, but {len(seeds)} seeds: give one each."
        )
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = [
        _Row(model, tokenizer, prompt, max_new_tokens, sampling, row_seed, stop)
        for prompt, row_seed in zip(prompts, seeds, strict=True)
    ]
    for _ in _advance(model, rows):
        pass
    return [
        Completion(
            "".join(row.pieces), row.new_ids, row.finish_reason, row.logprobs if logprobs else None
        )
        for row in rows
    ]


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """The pieces of `generate`'s text, each as soon as it is certain; together they are the text.

    Raises as `generate` does, before the first piece.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    row = _Row(model, tokenizer, prompt, max_new_tokens, sampling, seed, stop)

    def pieces() -> Iterator[str]:
        shown = 0
        for _ in _advance(model, [row]):
            yield from row.pieces[shown:]
            shown = len(row.pieces)

    return pieces()


class _Row:
    """One prompt on its way: what it has drawn, and the text that is certain so far."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        prompt: str,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        stop: str | Sequence[str],
    ) -> None:
        context = model.config.max_seq_len
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}: they do not belong together."
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, but must be at least 0 and below 2**63.")
        self.prompt_ids = tokenizer.encode(prompt, bos=True)
        if len(self.prompt_ids) >= context:
            raise ValueError(
                f"The prompt has {len(self.prompt_ids)} tokens, but the model's context holds "
                f"{context}, the answer included. Shorten the prompt to less than {context} tokens."
            )
        self.limit = min(max_new_tokens, context - len(self.prompt_ids))
        self.sampling = sampling
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.eos_id = tokenizer.eos_id
        self.new_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.ended = False
        self.finish_reason: FinishReason = "length"  # when the row has ended
        self._decoder = StreamDecoder(tokenizer)
        for token in self.prompt_ids:  # the answer's first space is then not taken for the text's
            self._decoder.push(token)
        self._stop = StopFilter(stop)

    def take(self, logits: Float[Tensor, " vocab"]) -> None:
        """Draw the next token, and tell whether the row has ended."""
        token = sample(logits, self.sampling, self.generator)
        if token == self.eos_id:
            self._end("stop")
            return
        self.new_ids.append(token)
        self.logprobs.append(logits.log_softmax(-1)[token].item())
        self.pieces.append(self._stop.push(self._decoder.push(token)))
        if self._stop.stopped or len(self.new_ids) == self.limit:
            self._end("length")

    def _end(self, reason: FinishReason) -> None:
        self.pieces.append(self._stop.push(self._decoder.flush()) + self._stop.flush())
        self.ended, self.finish_reason = True, "stop" if self._stop.stopped else reason


@torch.inference_mode()
def _advance(model: Llama, rows: list[_Row]) -> Iterator[None]:
    """Give every row one token per iteration, until all have ended.

    The prompts are read in one call, padded on the right; see `KVCache` why that needs no mask.
    The head is computed for the last position of each row only, and a row that has ended is
    dropped from the batch.
    """
    if not rows:
        return
    weight = model.output.weight
    lengths = [len(row.prompt_ids) for row in rows]
    room = max(len(row.prompt_ids) + row.limit for row in rows)
    cache = KVCache(model.config, len(rows), room, weight.device, weight.dtype)
    padded = [row.prompt_ids + [0] * (max(lengths) - len(row.prompt_ids)) for row in rows]
    hidden = model.hidden(torch.tensor(padded, device=weight.device), cache)
    cache.lengths = list(lengths)
    last = hidden[torch.arange(len(rows)), torch.tensor(lengths) - 1]  # (batch, dim)
    while True:
        for row, logits in zip(rows, model.output(last).float(), strict=True):
            row.take(logits)
        yield
        going = [index for index, row in enumerate(rows) if not row.ended]
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[index] for index in going]
            cache.keep(going)
        newest = torch.tensor([[row.new_ids[-1]] for row in rows], device=weight.device)
        last = model.hidden(newest, cache)[:, -1]
