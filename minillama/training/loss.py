"""The next-token loss, with and without the logits in memory."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama

CHUNK = 512  # rows of logits that exist at one time


def next_token_loss(
    logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """-log p(target), *summed* over the targets that are not IGNORE, in nats.

    A sum, so that micro-batches add up: the mean of their means would weigh a target by how few
    others its micro-batch has.
    """
    return cross_entropy(
        rearrange(logits, "batch seq vocab -> (batch seq) vocab"),
        rearrange(targets, "batch seq -> (batch seq)"),
        ignore_index=IGNORE,
        reduction="sum",
    )


def batch_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The summed next-token loss of a batch, by the shortest way in memory that the model allows.

    A Llama with a plain output matrix never holds the logits of the whole batch
    (`fused_next_token_loss`); any other model, or head, is asked for them.
    """
    if isinstance(model, Llama) and type(model.output) is nn.Linear:
        return fused_next_token_loss(model.hidden(batch.tokens), model.output.weight, batch.targets)
    return next_token_loss(model(batch.tokens), batch.targets)


def fused_next_token_loss(
    hidden: Float[Tensor, "batch seq dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "batch seq"],
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """`next_token_loss(hidden @ weight.T, targets)` without the logits of the whole batch.

    With 32,000 words the logits are the largest tensor of the step: 8 * 256 positions take 262 MB,
    and their gradient as much again. Here they exist for `chunk` positions at a time; the gradient
    of the loss with respect to them, softmax(logits) - one_hot(target), is known at once, so it is
    multiplied back to `hidden` and `weight` in the forward pass and nothing is kept but these two.

    Can be differentiated once: the backward pass uses up what the forward pass kept.
    Shown in notebooks/08_pretraining.ipynb.
    """
    rows = rearrange(hidden, "batch seq dim -> (batch seq) dim")
    wanted = rearrange(targets, "batch seq -> (batch seq)")
    if torch.is_grad_enabled():
        return _FusedLoss.apply(rows, weight, wanted, chunk)
    return sum(
        (
            _chunk_loss(part @ weight.T, target)[0]
            for part, target in zip(rows.split(chunk), wanted.split(chunk), strict=True)
        ),
        start=torch.zeros((), device=rows.device),
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Float[Tensor, "rows dim"],
        weight: Float[Tensor, "vocab dim"],
        targets: Int[Tensor, " rows"],
        chunk: int,
    ) -> Float[Tensor, ""]:
        total = torch.zeros((), device=hidden.device)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            loss, logits_grad = _chunk_loss(part @ weight.T, target)
            total += loss
            logits_grad = logits_grad.to(part.dtype)
            hidden_grad[start : start + chunk] = logits_grad @ weight
            weight_grad += logits_grad.T @ part
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad: Float[Tensor, ""]):  # type: ignore[no-untyped-def]
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place: a second copy of the vocabulary's gradient is what this class is there to avoid.
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None, None


def _chunk_loss(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows vocab"]]:
    """The summed loss of a few rows, and its gradient, made in the place of the logits."""
    logits = logits.float()
    counts = targets != IGNORE
    target = targets.where(counts, 0)[:, None]
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    losses = (log_z - logits.gather(1, target)).where(counts[:, None], 0.0)
    gradient = logits.sub_(log_z).exp_()  # softmax
    gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand(target.shape))
    return losses.sum(), gradient.mul_(counts[:, None])
