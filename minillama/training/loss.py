"""The next-token loss, with and without the logits in memory."""

import torch
import torch.distributed as dist
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
    if not (isinstance(model, Llama) and type(model.output) is nn.Linear):
        return next_token_loss(model(batch.tokens), batch.targets)
    hidden, weight, group = model.hidden(batch.tokens), model.output.weight, None
    if dist.is_initialized() and hasattr(hidden, "device_mesh"):  # under tensor parallelism
        hidden, weight, group = _own_words(hidden, weight)
    return fused_next_token_loss(hidden, weight, batch.targets, group=group)


def _own_words(
    hidden: Tensor, weight: Tensor
) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "words dim"], dist.ProcessGroup]:
    """All positions, this rank's rows of the output matrix, and the ranks with the others."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(hidden, DTensor)
    assert isinstance(weight, DTensor)
    gathered = hidden.redistribute(placements=[Replicate()])
    # Each rank's words give a part of the gradient with respect to `hidden`: these are added up.
    positions = gathered.to_local(grad_placements=[Partial()])
    return positions, weight.to_local(), hidden.device_mesh.get_group()


def fused_next_token_loss(
    hidden: Float[Tensor, "batch seq dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "batch seq"],
    chunk: int = CHUNK,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """`next_token_loss(hidden @ weight.T, targets)` without the logits of the whole batch.

    With 32,000 words the logits are the largest tensor of the step: 8 * 256 positions take 262 MB,
    and their gradient as much again. Here they exist for `chunk` positions at a time; the gradient
    of the loss with respect to them, softmax(logits) - one_hot(target), is known at once, so it is
    multiplied back to `hidden` and `weight` in the forward pass and nothing is kept but these two.

    With a `group` the words are dealt out among its ranks, equally many to each: `weight` is this
    rank's part, and the gradient of `hidden` is the part that these words contribute. Two numbers
    a position go round instead of the logits.

    Can be differentiated once: the backward pass uses up what the forward pass kept.
    Shown in notebooks/08_pretraining.ipynb.
    """
    rows = rearrange(hidden, "batch seq dim -> (batch seq) dim")
    wanted = rearrange(targets, "batch seq -> (batch seq)")
    if torch.is_grad_enabled():
        return _FusedLoss.apply(rows, weight, wanted, chunk, group)
    return sum(
        (
            _chunk_loss(part @ weight.T, target, group)[0]
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
        group: dist.ProcessGroup | None,
    ) -> Float[Tensor, ""]:
        total = torch.zeros((), device=hidden.device)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            loss, logits_grad = _chunk_loss(part @ weight.T, target, group)
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
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None, None, None


def _chunk_loss(
    logits: Float[Tensor, "rows words"],
    targets: Int[Tensor, " rows"],
    group: dist.ProcessGroup | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows words"]]:
    """The summed loss of a few rows, and its gradient, made in the place of the logits."""
    logits = logits.float()
    target = targets[:, None]
    own = counts = target != IGNORE
    if group is not None:
        target = target - group.rank() * logits.shape[1]  # among this rank's words, or outside
        own = (target >= 0) & (target < logits.shape[1])
    target = target.where(own, 0)
    score = logits.gather(1, target).where(own, 0.0)
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    if group is not None:
        dist.all_reduce(score, group=group)
        everywhere = [torch.empty_like(log_z) for _ in range(group.size())]
        dist.all_gather(everywhere, log_z, group=group)
        log_z = torch.cat(everywhere, dim=-1).logsumexp(dim=-1, keepdim=True)
    losses = (log_z - score).where(counts, 0.0)
    gradient = logits.sub_(log_z).exp_()  # softmax
    gradient.scatter_add_(1, target, -own.to(gradient.dtype))
    return losses.sum(), gradient.mul_(counts)
