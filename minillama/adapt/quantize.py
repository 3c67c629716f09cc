"""Low precision: weights in 8 or 4 bits, and linear layers that multiply by them as they are.

Writing one token reads every weight once, so a model that takes a quarter of the bytes fits where
it did not, and where memory is what limits the speed, writes up to four times as fast.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import NormalDist
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from minillama.config import known_name
from minillama.model import Llama

KINDS = ("int8", "int4", "nf4")
GROUP = 32  # neighbouring weights of a row that share a scale in int4
NF4_BLOCK = 64  # neighbouring weights that share one in NF4
CONSTANTS = 256  # NF4's scales that share a scale of their own
_ROWS_AT_ONCE = 64  # a multiple of this many rows of a matrix is dequantised at a time,
_NUMBERS_AT_ONCE = 2**19  # and about as many numbers: they stay in the cache
_TINY = torch.finfo(torch.float32).tiny
_BITSANDBYTES = find_spec("bitsandbytes") is not None


# --- Numbers and their codes ---------------------------------------------------------------------


def absmax_int8(
    x: Float[Tensor, "*rows n"], scale_dtype: torch.dtype = torch.float32
) -> tuple[Int8[Tensor, "*rows n"], Float[Tensor, "*rows"]]:
    """Codes from -127 to 127 and a scale for each row, so that x is about codes * scale.

    scale = max |x| / 127: the largest number of a row has the code 127 or -127, and no number is
    off by more than half a scale. So one outlier makes all others of its row coarser. The scale is
    rounded to `scale_dtype` first, and the codes belong to the rounded one. Zeros come back as
    they are. Source: Dettmers et al. 2022, sec. 2 (arXiv:2208.07339). Built in
    notebooks/17_quantization.ipynb.
    """
    x = x.float()
    # Not below the least normal number: a row of zeros divides by it, too.
    scale = (x.abs().amax(-1) / 127).clamp_min(_TINY).to(scale_dtype)
    codes = x / scale.float()[..., None]
    return codes.round().to(torch.int8), scale


def group_int4(
    weight: Float[Tensor, "d_out d_in"], group_size: int = GROUP
) -> tuple[UInt8[Tensor, "d_out padded"], Float[Tensor, "groups d_out 2"]]:
    """Codes from 0 to 15; weight is about (codes - 8) * scale + zero, which each group has.

    A group is `group_size` neighbours of a row. Its codes reach from its least to its largest
    number: 15 steps, wherever they lie. `zero` is the number with the code 8. Scale and zero are
    bfloat16, side by side, as the kernels read them; the codes belong to the rounded ones. A row
    that groups do not divide is filled up with its last number, which no group's span depends on.
    Built in notebooks/17_quantization.ipynb.
    """
    filler = -weight.shape[1] % group_size
    padded = torch.cat((weight, weight[:, -1:].expand(-1, filler)), dim=1).float()
    grouped = rearrange(padded, "d_out (groups size) -> d_out groups size", size=group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high / 15 - low / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    steps = (grouped - zero.float()[..., None]) / scale.float().clamp_min(_TINY)[..., None]
    codes = (steps.round() + 8).clamp(0, 15).to(torch.uint8)
    return (
        rearrange(codes, "d_out groups size -> d_out (groups size)"),
        rearrange([scale, zero], "two d_out groups -> groups d_out two"),
    )


def nf4_levels() -> Float[Tensor, " levels"]:
    """The 16 numbers of NF4, "4-bit NormalFloat", from -1 to 1.

    Weights are about normally distributed, so levels are dense where they are: quantiles of the
    normal distribution, 8 evenly spaced probabilities above the middle and 7 below it, divided by
    the largest; and 0, which must be exact. The outermost probability lies halfway between
    1 - 1/32 and 1 - 1/30, as that of 1 would be infinite.
    Source: Dettmers et al. 2023, sec. 3 and appendix E (arXiv:2305.14314). Built in
    notebooks/17_quantization.ipynb.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([*below, 0.0, *above]) / above[-1]


def block_nf4(
    x: Float[Tensor, " n"],
) -> tuple[UInt8[Tensor, " padded"], Float[Tensor, " blocks"]]:
    """Codes from 0 to 15, the nearest levels; x is about nf4_levels()[codes] * absmax.

    Each block of `NF4_BLOCK` neighbours has its absmax, the largest absolute number; the last block
    is filled up with zeros. Zeros come back as they are.
    Source: Dettmers et al. 2023, sec. 3 (arXiv:2305.14314). Built in
    notebooks/17_quantization.ipynb.
    """
    blocks = pad(x.float(), (0, -len(x) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(-1)
    levels = nf4_levels().to(x.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / absmax.clamp_min(_TINY)[:, None], between, out_int32=True)
    return codes.to(torch.uint8).flatten(), absmax


def two_in_a_byte(codes: UInt8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Codes below 16, in half as many bytes; the first of a pair is the upper half of its byte."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def two_from_a_byte(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows n"]:
    """The inverse of `two_in_a_byte`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


# --- Linear layers -------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """x W^T with a W of few bits, in the place of an nn.Linear without bias.

    A few rows of x go through a kernel that reads the codes as they are (`_product`), where the
    device has one for this shape; on a CPU it works in bfloat16. Many rows go through
    `dequantized_product`, which is also what the kernels are compared with.

    W is no parameter: a gradient's step is smaller than the distance of two of its values. But the
    gradient flows through to x, and W is dequantised for it again, so adapters before and after
    this layer can be trained (QLoRA). Built in notebooks/17_quantization.ipynb.
    """

    kind: str
    # Up to so many rows of x the kernel is faster. Measured with benchmarks/quantization.py: both
    # take equally long at 30 to 60 rows with AVX2, and at 50 to 130 with AVX-512.
    kernel_rows = 64

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def quantize_(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Take the nearest values to those of a matrix."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if x.requires_grad and torch.is_grad_enabled():
            return _ProductWithGradient.apply(x, self)
        if x.numel() <= self.kernel_rows * self.in_features and self._has_kernel():
            product = self._product(x.reshape(-1, self.in_features))
            return product.view(*x.shape[:-1], self.out_features)
        return dequantized_product(x, self)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "d_out d_in"]:
        """The whole matrix that the codes stand for."""
        return torch.cat([rows for _, rows in self.row_blocks(dtype)])

    def row_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "rows d_in"]]]:
        """That matrix, some rows at a time, and which."""
        for rows in self._row_slices():
            yield rows, self._rows(rows).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _row_slices(self) -> Iterator[slice]:
        step = _ROWS_AT_ONCE * max(1, _NUMBERS_AT_ONCE // (_ROWS_AT_ONCE * self.in_features))
        for first in range(0, self.out_features, step):
            yield slice(first, min(first + step, self.out_features))

    def _rows(self, rows: slice) -> Float[Tensor, "rows d_in"]:
        raise NotImplementedError

    def _has_kernel(self) -> bool:
        raise NotImplementedError

    def _product(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves go through, conversions do not: rounding the scales would change the weights."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Int8Linear(QuantizedLinear):
    """W = codes * scale, with a scale for each row: 8 + 16 / d_in bits a weight. See `absmax_int8`.

    The scale is the same for all inputs, so it is applied to the product.
    """

    kind = "int8"
    codes: Int8[Tensor, "d_out d_in"]
    scale: Float[Tensor, " d_out"]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        codes = torch.empty(out_features, in_features, dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.bfloat16))

    def quantize_(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        for rows in self._row_slices():
            self.codes[rows], self.scale[rows] = absmax_int8(weight[rows], torch.bfloat16)

    def _rows(self, rows: slice) -> Float[Tensor, "rows d_in"]:
        return self.codes[rows] * self.scale[rows, None].float()

    def _has_kernel(self) -> bool:
        # The CPU's kernel reads 32 numbers at a time, also behind the end of a row.
        return self.codes.device.type != "cpu" or self.in_features % 32 == 0

    def _product(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        if x.device.type != "cpu":
            return linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)  # fused, if compiled
        # A copy in any case: it lies at a multiple of 64 bytes, as the kernel needs it.
        x16 = x.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        return torch._weight_int8pack_mm(x16, self.codes, self.scale).to(x.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.codes.data_ptr() % 16:  # mapped from a file, and the kernel would crash
            self.codes = self.codes.clone()


class Int4Linear(QuantizedLinear):
    """W = (codes - 8) * scale + zero, which each group has: 4 + 32 / group_size bits a weight.

    See `group_int4`. Every kernel wants the codes in an order of its own, which depends on the
    processor. They are put into it when the first product needs them, and back when they are moved
    or saved: `state_dict` is the same everywhere.
    """

    kind = "int4"
    kernel_rows = 96  # 75 with AVX2, 200 with AVX-512
    codes: UInt8[Tensor, "d_out half"]
    scale_and_zero: Float[Tensor, "groups d_out 2"]

    def __init__(self, in_features: int, out_features: int, group_size: int = GROUP) -> None:
        super().__init__(in_features, out_features)
        if group_size not in (32, 64, 128, 256):
            raise ValueError(
                f"group_size is {group_size}, but must be 32, 64, 128 or 256: the kernels have "
                f"these. Smaller groups are more exact, larger ones take fewer bytes."
            )
        self.group_size = group_size
        n_groups = -(-in_features // group_size)
        codes = torch.empty(out_features, n_groups * group_size // 2, dtype=torch.uint8)
        self.register_buffer("codes", codes)
        scales = torch.empty(n_groups, out_features, 2, dtype=torch.bfloat16)
        self.register_buffer("scale_and_zero", scales)
        self._in_kernel_order = False

    def quantize_(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        for rows in self._row_slices():
            codes, self.scale_and_zero[:, rows] = group_int4(weight[rows], self.group_size)
            self.codes[rows] = two_in_a_byte(codes)
        self._in_kernel_order = False

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"

    def _rows(self, rows: slice) -> Float[Tensor, "rows d_in"]:
        unpack = _codes_from_kernel_order if self._in_kernel_order else two_from_a_byte
        codes = unpack(self.codes[rows])
        scale, zero = self.scale_and_zero[:, rows].float().unbind(-1)  # (groups, rows)
        grouped = codes.view(len(codes), -1, self.group_size).float().sub_(8)
        grouped.mul_(scale.T[..., None]).add_(zero.T[..., None])
        return grouped.flatten(1)[:, : self.in_features]

    def _has_kernel(self) -> bool:
        return self.out_features % (16 if self.codes.device.type == "cpu" else 8) == 0

    def _product(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        if not self._in_kernel_order:
            self._reorder(_to_kernel_order)
        x16 = pad(x.bfloat16(), (0, 2 * self.codes.shape[1] - self.in_features))
        if x.device.type == "cpu":
            product = torch._weight_int4pack_mm_for_cpu
            codes = self.codes
        else:
            product = torch._weight_int4pack_mm
            codes = _as_tiles(self.codes)
        return product(x16, codes, self.group_size, self.scale_and_zero).to(x.dtype)

    def _reorder(self, function: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):  # or the codes could not be used in training any more
            self.codes = torch.cat([function(self.codes[rows]) for rows in self._row_slices()])
        self._in_kernel_order = not self._in_kernel_order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self._in_kernel_order:
            self._reorder(_from_kernel_order)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        if self._in_kernel_order:
            self._reorder(_from_kernel_order)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._in_kernel_order = False


class NF4Linear(QuantizedLinear):
    """W = nf4_levels()[codes] * absmax, which each block of 64 has: 4.127 bits a weight.

    The blocks follow each other through the rows. *Double quantisation*: their absmax, less its
    mean over the matrix, is itself in 8 bits, 256 with a scale. See `block_nf4`.

    No kernel of PyTorch's reads it, so that it saves memory rather than time; on GPUs, bitsandbytes
    is used where it is installed.
    Source: Dettmers et al. 2023, sec. 3 (arXiv:2305.14314).
    """

    kind = "nf4"
    codes: UInt8[Tensor, " half"]
    absmax: Int8[Tensor, " blocks"]
    absmax_scale: Float[Tensor, " constants"]
    absmax_mean: Float[Tensor, ""]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        n_blocks = -(-in_features * out_features // NF4_BLOCK)
        codes = torch.empty(n_blocks * NF4_BLOCK // 2, dtype=torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", torch.empty(n_blocks, dtype=torch.int8))
        self.register_buffer("absmax_scale", torch.empty(-(-n_blocks // CONSTANTS)))
        self.register_buffer("absmax_mean", torch.empty(()))

    def quantize_(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        absmax = torch.empty(self.absmax.shape, device=weight.device)
        for rows in self._row_slices():
            blocks, codes = self._blocks(rows)
            both, absmax[blocks] = block_nf4(weight[rows].flatten())
            self.codes[codes] = two_in_a_byte(both)
        self.absmax_mean.copy_(absmax.mean())
        differences = pad(absmax - self.absmax_mean, (0, -len(absmax) % CONSTANTS))
        constants, scales = absmax_int8(differences.view(-1, CONSTANTS))
        self.absmax.copy_(constants.flatten()[: len(absmax)])
        self.absmax_scale.copy_(scales)

    def _rows(self, rows: slice) -> Float[Tensor, "rows d_in"]:
        blocks, codes = self._blocks(rows)
        # Both numbers of a byte in one look-up: three times as fast as one by one.
        pairs = torch.index_select(_nf4_pairs(self.codes.device), 0, self.codes[codes].int())
        values = pairs.view(torch.float32).view(-1, NF4_BLOCK) * self._absmax(blocks)[:, None]
        n_rows = rows.stop - rows.start
        return values.flatten()[: n_rows * self.in_features].view(n_rows, self.in_features)

    def _blocks(self, rows: slice) -> tuple[slice, slice]:
        """The blocks that hold these rows, and the bytes of their codes."""
        first = rows.start * self.in_features // NF4_BLOCK
        last = -(-rows.stop * self.in_features // NF4_BLOCK)
        return slice(first, last), slice(first * NF4_BLOCK // 2, last * NF4_BLOCK // 2)

    def _absmax(self, blocks: slice) -> Float[Tensor, " n"]:
        constants = torch.arange(blocks.start, blocks.stop, device=self.absmax.device) // CONSTANTS
        return self.absmax[blocks] * self.absmax_scale[constants] + self.absmax_mean

    def _has_kernel(self) -> bool:
        return self.codes.device.type == "cuda" and _BITSANDBYTES

    def _product(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        import bitsandbytes  # type: ignore[import-not-found]

        state = bitsandbytes.functional.QuantState(
            absmax=self._absmax(slice(0, len(self.absmax))),
            shape=torch.Size((self.out_features, self.in_features)),
            code=nf4_levels().to(x.device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        return bitsandbytes.matmul_4bit(x, self.codes[None], quant_state=state)


_LINEARS = {layer.kind: layer for layer in (Int8Linear, Int4Linear, NF4Linear)}


# --- Models --------------------------------------------------------------------------------------


def quantize(model: Llama, kind: str, group_size: int = GROUP) -> Llama:
    """Replace every nn.Linear of the blocks and the head by a quantised one, in place.

    One at a time, so that no more than one matrix is there twice. Norms and embeddings stay as they
    are; a tied head is quantised, and the embeddings keep their numbers. `kind` is one of `KINDS`.
    Raises ValueError as `quantize_linear` does, naming the layer.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            try:
                quantized = quantize_linear(module.weight, kind, group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            setattr(model.get_submodule(parent), child, quantized)
    return model


@torch.no_grad()
def quantize_linear(
    weight: Float[Tensor, "d_out d_in"], kind: str, group_size: int = GROUP
) -> QuantizedLinear:
    """A layer that multiplies by the nearest matrix to `weight` of this kind, on its device.

    `group_size` is int4's. Raises ValueError for another kind or group size, and for a weight with
    numbers that are not finite: they would make their whole row, or group, useless.
    """
    layer = empty_linear(kind, weight.shape[1], weight.shape[0], group_size)
    layer.to_empty(device=weight.device).quantize_(weight)
    scales = (buffer for buffer in layer.buffers() if buffer.is_floating_point())
    if not all(scale.isfinite().all() for scale in scales):
        n_bad = weight.numel() - int(weight.isfinite().sum())
        raise ValueError(
            f"{n_bad} of the weight's {weight.numel()} numbers are inf or NaN, and nothing lies "
            f"near those. The checkpoint is damaged, or its numbers left the range of their dtype: "
            f"`minillama verify` names the tensors; load it in another dtype."
        )
    return layer


def empty_linear(
    kind: str, in_features: int, out_features: int, group_size: int = GROUP
) -> QuantizedLinear:
    """A layer whose codes and scales are to be loaded, without memory (on the device "meta").

    Raises ValueError for another kind, and for group sizes that the kind does not have.
    """
    settings = {} if group_size == GROUP else {"group_size": group_size}
    known_name("quantisation", kind, KINDS)
    if settings and kind != "int4":
        raise ValueError(f"group_size is {group_size}, but {kind} has no groups: int4 does.")
    with torch.device("meta"):
        return _LINEARS[kind](in_features, out_features, **settings)


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """`kind` and `group_size` of a model that `quantize` changed, for `empty_linear`; or None."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            return {"kind": layer.kind, "group_size": getattr(layer, "group_size", GROUP)}
    return None


# --- Products ------------------------------------------------------------------------------------


def dequantized_product(
    x: Float[Tensor, "*batch d_in"], layer: QuantizedLinear
) -> Float[Tensor, "*batch d_out"]:
    """x times the matrix that the codes stand for: a few of its rows are made at a time.

    In the dtype of x; but a CPU that has no products in 16 bits computes in float32.
    """
    dtype = _product_dtype(x)
    parts = [linear(x.to(dtype), rows) for _, rows in layer.row_blocks(dtype)]
    return torch.cat(parts, dim=-1).to(x.dtype)


class _ProductWithGradient(torch.autograd.Function):
    """`dequantized_product`, and its gradient: autograd would keep every dequantised matrix."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Float[Tensor, "*batch d_in"],
        layer: QuantizedLinear,
    ) -> Float[Tensor, "*batch d_out"]:
        ctx.layer = layer  # type: ignore[attr-defined]
        return dequantized_product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "*batch d_out"]):  # type: ignore[no-untyped-def]
        dtype = _product_dtype(grad)
        blocks = ctx.layer.row_blocks(dtype)
        return sum(grad[..., rows].to(dtype) @ weight for rows, weight in blocks).to(
            grad.dtype
        ), None


def _product_dtype(x: Tensor) -> torch.dtype:
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if x.device.type == "cpu" and x.dtype in supported and not supported[x.dtype]():
        return torch.float32  # six times as fast, on AVX2
    return x.dtype


# Made once. (Plain dictionaries: torch.compile does not look into the caches of functools.)
_PAIRS = {
    torch.device("cpu"): torch.cartesian_prod(nf4_levels(), nf4_levels())
    .view(torch.int64)
    .flatten()
}
_PLACES: dict[tuple[int, int, torch.device], Tensor] = {}


def _nf4_pairs(device: torch.device) -> Int[Tensor, " n"]:
    """For every byte the two levels that it stands for, as one number of 64 bits."""
    if device not in _PAIRS:
        _PAIRS[device] = _PAIRS[torch.device("cpu")].to(device)
    return _PAIRS[device]


# --- The order of int4's kernels -----------------------------------------------------------------


def _to_kernel_order(packed: UInt8[Tensor, "rows half"]) -> UInt8[Tensor, "rows half"]:
    """The codes of some rows, a multiple of 64 or the last ones, as this processor's kernel wants.

    The CPU's kernel has them in blocks of 64 rows, or of 32; the GPU's in blocks of 8. So whatever
    the block, 64 rows keep to themselves.
    """
    if packed.device.type == "cpu":
        codes = two_from_a_byte(packed).int()
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1).view(packed.shape)
    tiles = torch._convert_weight_to_int4pack(packed, _inner_tiles(packed.shape[1]))
    return tiles.view(torch.uint8).view(packed.shape)


def _from_kernel_order(packed: UInt8[Tensor, "rows half"]) -> UInt8[Tensor, "rows half"]:
    """The inverse of `_to_kernel_order`."""
    return two_in_a_byte(_codes_from_kernel_order(packed))


def _codes_from_kernel_order(packed: UInt8[Tensor, "rows half"]) -> UInt8[Tensor, "rows d_in"]:
    """The codes of some rows as they were, one in each byte."""
    parts = []
    for block in packed.split(_ROWS_AT_ONCE):
        codes = two_from_a_byte(block)
        places = _places(len(codes), codes.shape[1], packed.device)
        parts.append(codes.flatten().index_select(0, places).view(codes.shape))
    return torch.cat(parts)


def _places(rows: int, d_in: int, device: torch.device) -> Int[Tensor, " n"]:
    """Where the codes of so many rows lie in the kernel's order, one after the other.

    No kernel tells. So the codes' own numbers are put into that order, four bits at a time.
    """
    key = (rows, d_in, device)
    if key not in _PLACES:
        number = torch.arange(rows * d_in, dtype=torch.int32, device=device).view(rows, d_in)
        found = torch.zeros_like(number).flatten()
        for shift in range(0, (rows * d_in - 1).bit_length(), 4):
            digits = two_in_a_byte((number >> shift & 15).to(torch.uint8))
            found += two_from_a_byte(_to_kernel_order(digits)).flatten().int() << shift
        _PLACES[key] = found.argsort().int()
    return _PLACES[key]


def _inner_tiles(half: int) -> int:
    """How many tiles of 16 numbers the GPU's kernel reads in one go, at most 8."""
    return next(n for n in (8, 4, 2) if 2 * half % (16 * n) == 0)


def _as_tiles(codes: UInt8[Tensor, "d_out half"]) -> Int[Tensor, "..."]:
    """The GPU's codes in the shape in which its kernel takes them."""
    n = _inner_tiles(codes.shape[1])
    return codes.view(torch.int32).view(len(codes) // 8, -1, 32, n // 2)
