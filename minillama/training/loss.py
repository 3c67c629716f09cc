"""The next-token loss, with and without the logits in memory."""

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minillama.adapt.quantize import QuantizedLinear
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama, Packed

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

    A Llama whose output matrix is plain, or quantised, never holds the logits of the whole batch
    (`fused_next_token_loss`); any other model, or head, is asked for them. The documents of a row
    are kept apart where the batch tells them apart (`Packed`).
    """
    packed = [] if batch.positions is None else [Packed(batch.positions)]
    head: nn.Module | None = model.output if isinstance(model, Llama) else None
    if not isinstance(model, Llama) or not (
        type(head) is nn.Linear or isinstance(head, QuantizedLinear)
    ):
        return next_token_loss(model(batch.tokens, *packed), batch.targets)
    hidden, group = model.hidden(batch.tokens, *packed), None
    if isinstance(head, QuantizedLinear):
        weight = head.dequantized(hidden.dtype)
    else:
        weight = model.output.weight
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
    What needs no gradient gets none: under a frozen head (LoRA) that is a third of the products.
    Positions without a target have no logits: of a dialogue, answers alone are learned.

    With a `group` the words are dealt out among its ranks, equally many to each: `weight` is this
    rank's part, and the gradient of `hidden` is the part that these words contribute. Two numbers
    a position go round instead of the logits.

    Can be differentiated once: the backward pass uses up what the forward pass kept.
    Built in notebooks/08_pretraining.ipynb.
    """
    rows = rearrange(hidden, "batch seq dim -> (batch seq) dim")
    wanted = rearrange(targets, "batch seq -> (batch seq)")
    counts = wanted != IGNORE
    if not counts.all():
        rows, wanted = rows[counts], wanted[counts]
    if torch.is_grad_enabled():
        return _FusedLoss.apply(rows, weight, wanted, chunk, group)
    return sum(
        (
            _Chunk(part @ weight.T, target, group).loss
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
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            weight_grad = torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            now = slice(start, start + chunk)
            logits = hidden[now] @ weight.T
            total += _add_gradients(
                _Chunk(logits, targets[now], group),
                hidden[now],
                weight,
                hidden_grad[now],
                weight_grad,
            )
            del logits  # before the next ones are made
        ctx.save_for_backward(hidden_grad, weight_grad)  # type: ignore[arg-type]
        return total

    @staticmethod
    def backward(ctx, grad: Float[Tensor, ""]):  # type: ignore[no-untyped-def]
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place: a second copy of the vocabulary's gradient is what this class is there to avoid.
        if weight_grad is not None:
            weight_grad.mul_(grad)
        return hidden_grad.mul_(grad), weight_grad, None, None, None


def _add_gradients(
    logits: "_Chunk",
    hidden: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "words dim"],
    hidden_grad: Float[Tensor, "rows dim"],
    weight_grad: Float[Tensor, "words dim"] | None,
) -> Float[Tensor, ""]:
    """The loss of a few rows; `hidden_grad` is filled, and to `weight_grad` their part is added.

    The gradient of the logits is softmax - one_hot. There is no pass over all words for the
    division and the one: the exponentials are multiplied as they are, and the few columns that
    this gives are divided. (On a CPU, with 32,000 words, this and the sum in place take 0.52 s for
    2,048 rows, against 0.69 s.)
    """
    exp, own = logits.exp.to(hidden.dtype), logits.own.to(hidden.dtype)
    torch.mul(exp @ weight, logits.scale, out=hidden_grad)
    hidden_grad -= own * weight[logits.target]
    if weight_grad is None:
        return logits.loss
    scaled = hidden * logits.scale.to(hidden.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        weight_grad += exp.T @ scaled  # the product in bfloat16, the sum in float32
    else:
        torch.addmm(weight_grad, exp.T, scaled, out=weight_grad)
    weight_grad.index_add_(0, logits.target, own * hidden, alpha=-1)
    return logits.loss


class _Chunk:
    """A few rows of logits, turned in place into what their loss and its gradient are made of.

    softmax(logits) = exp * scale; both are 0 or less than 1, so nothing overflows.
    """

    def __init__(
        self,
        logits: Float[Tensor, "rows words"],
        targets: Int[Tensor, " rows"],
        group: dist.ProcessGroup | None,
    ) -> None:
        logits = logits.float()
        counts = (targets != IGNORE)[:, None]
        first = group.rank() * logits.shape[1] if group else 0
        target = targets[:, None] - first  # among this process's words, or outside
        self.own = counts & (target >= 0) & (target < logits.shape[1])
        target = target.where(self.own, 0)
        score = logits.gather(1, target).where(self.own, 0.0)
        top = logits.amax(dim=-1, keepdim=True)
        self.exp = logits.sub_(top).exp_()
        log_z = self.exp.sum(dim=-1, keepdim=True).log() + top
        if group is not None:
            dist.all_reduce(score, group=group)
            everywhere = [torch.empty_like(log_z) for _ in range(group.size())]
            dist.all_gather(everywhere, log_z, group=group)
            log_z = torch.cat(everywhere, dim=-1).logsumexp(dim=-1, keepdim=True)
        self.target = target[:, 0]
        self.scale = (top - log_z).exp() * counts
        self.loss = (log_z - score).where(counts, 0.0).sum()
