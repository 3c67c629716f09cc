"""LoRA: a frozen model, and beside its large matrices products of two small ones that are trained.

An `Adapter` is what is trained, without the model. `attach` puts it into a model, `detach` takes it
out, `merge` adds it to the weights; `Adapters` holds several, of which each row of a batch chooses
one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from minillama.adapt.quantize import QuantizedLinear
from minillama.config import ADAPTABLE, LlamaConfig, LoRAConfig, known_name
from minillama.model import Llama
from minillama.plan import linear_shapes

# --- One adapter ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """A change of a matrix: b @ a, times the `scale` of the adapter that it belongs to."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]


@dataclass(frozen=True)
class Adapter:
    """What training changes, apart from the model: a `LowRank` for each layer, by its name.

    Names are those of the model's modules, such as "layers.0.attention.wq"; A and B are in float32.
    """

    config: LoRAConfig
    layers: Mapping[str, LowRank]


def target_shapes(config: LlamaConfig, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear layers that `targets` name, in all blocks, by their names.

    Raises ValueError for a name that no linear layer has.
    """
    of_block = linear_shapes(config)
    shapes = {}
    for index in range(config.n_layers):
        for name in targets:
            if known_name("linear layer", name, ADAPTABLE) in of_block:
                part = "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward"
                shapes[f"layers.{index}.{part}.{name}"] = of_block[name]
    if "output" in targets:
        shapes["output"] = (config.vocab_size, config.dim)
    return shapes


def new_adapter(
    config: LlamaConfig, lora: LoRAConfig, generator: torch.Generator | None = None
) -> Adapter:
    """An adapter to train for a model of `config`: A is random, B is 0, so it changes nothing yet.

    Were both 0, neither would have a gradient: that of B is made of A x, that of A of B. Numbers of
    variance 1 / d_in keep A x as large as x.
    Source: Hu et al. 2021, sec. 4.1 (arXiv:2106.09685). Built in notebooks/18_lora.ipynb.
    """
    return Adapter(
        lora,
        {
            name: LowRank(
                torch.randn(lora.rank, d_in, generator=generator) / d_in**0.5,
                torch.zeros(d_out, lora.rank),
            )
            for name, (d_out, d_in) in target_shapes(config, lora.targets).items()
        },
    )


class LoRALinear(nn.Module):
    """base(x) + scale * B A x, in the place of a linear layer; only A and B are trained.

    What fine-tuning changes about a matrix is of low rank, nearly: a product of (d_out, rank) and
    (rank, d_in) can hold it, and is a small part of d_out * d_in. The base is not looked into, so
    it may be quantised (QLoRA), and needs no gradient, no moments, and no copy for each task.

    Dropout is on where gradients are computed; after `model.eval()`, not even there.
    Source: Hu et al. 2021, sec. 4.1 (arXiv:2106.09685); Dettmers et al. 2023, sec. 3
    (arXiv:2305.14314). Built in notebooks/18_lora.ipynb.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig, low: LowRank) -> None:
        super().__init__()
        self.base: Any = base
        self.config, device = config, _device(base)
        self.a = nn.Parameter(low.a.to(device, torch.float32, copy=True))
        self.b = nn.Parameter(low.b.to(device, torch.float32, copy=True))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        training = self.training and torch.is_grad_enabled()
        low = linear(dropout(x, self.config.dropout, training), self.a.to(x.dtype))
        # The scale is applied where a token has `rank` numbers, not where it has d_out.
        return self.base(x) + linear(self.config.scale * low, self.b.to(low.dtype))

    @torch.no_grad()
    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """W + scale * B A, added up in float32."""
        plain = isinstance(self.base, nn.Linear)
        weight = self.base.weight.float() if plain else self.base.dequantized()
        return (weight + self.config.scale * self.b @ self.a).to(dtype)


def attach(model: Llama, adapter: Adapter) -> None:
    """Put an adapter beside the layers that it was made for, and freeze all else, in place.

    The model trains a copy; `adapter_of` and `detach` give it back. Optimisers made by
    `make_optimizer` afterwards hold the adapter alone.
    Raises ValueError if the model has one already, or if this one is for another model.
    """
    _check(model, adapter)
    model.requires_grad_(False)
    for name, low in adapter.layers.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), adapter.config, low))  # type: ignore[arg-type]


def adapter_of(model: Llama) -> Adapter:
    """A copy of the adapter that the model has, on the CPU. Raises ValueError if it has none."""
    layers = dict(_adapted(model))
    if not layers:
        raise ValueError("The model has no adapter. Put one into it with `attach`.")
    config = next(iter(layers.values())).config
    return Adapter(config, {name: _copy(layer) for name, layer in layers.items()})


def detach(model: Llama) -> Adapter:
    """Take the adapter out: the model is as before `attach`, in place, to the last bit."""
    adapter = adapter_of(model)
    for name, layer in list(_adapted(model)):
        model.set_submodule(name, layer.base)
    return adapter


def merge(model: Llama) -> dict[str, LoRALinear]:
    """Make the adapter a part of the weights, in place: a plain Llama again, as fast as one.

    Gives back the layers that were replaced. `unmerge` takes them, and the model has its adapter
    beside the very weights that it had: not W + D - D, which is not W in floating point. Whoever
    does not need them lets go of them, and the memory of the old matrices is free; to merge a
    checkpoint that hardly fits, see `minillama.checkpoint.peft.merged`.

    A quantised layer becomes a plain one in the embeddings' dtype; a tied head, one of its own.
    """
    replaced = dict(_adapted(model))
    for name, layer in replaced.items():
        plain = isinstance(layer.base, nn.Linear)
        like = layer.base.weight if plain else model.tok_embeddings.weight
        with torch.device("meta"):
            merged = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False)
        merged.weight = nn.Parameter(layer.matrix(like.dtype), requires_grad=False)
        model.set_submodule(name, merged)
    if "output" in replaced:
        model.config = replace(model.config, tie_embeddings=False)
    return replaced


def unmerge(model: Llama, replaced: Mapping[str, LoRALinear]) -> None:
    """Undo `merge`, of which `replaced` came back, in place and to the last bit."""
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    if "output" in replaced:
        head = replaced["output"].base
        tied = isinstance(head, nn.Linear) and head.weight is model.tok_embeddings.weight
        model.config = replace(model.config, tie_embeddings=tied)


# --- Several adapters ----------------------------------------------------------------------------


class Adapters:
    """Several adapters beside one model: each row of a batch goes through the one it chooses.

    `choose` is called before a forward pass. What a row gives is what it gives alone. Ranks and
    targets may differ; for the products all are filled up with zeros to the largest rank. They take
    no gradient: train them one by one (`attach`).

    Raises ValueError if the model has adapters already, or if one is for another model.
    Source: Chen et al. 2023, sec. 4 (arXiv:2310.18547). Built in notebooks/18_lora.ipynb.
    """

    def __init__(self, model: Llama, adapters: Mapping[str, Adapter]) -> None:
        self.names = list(adapters)
        self.chosen: Int[Tensor, " batch"] | None = None  # 0 is no adapter, 1 the first, ...
        for adapter in adapters.values():
            _check(model, adapter)
        self._device, dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        model.requires_grad_(False)
        for name in dict.fromkeys(name for each in adapters.values() for name in each.layers):
            base = model.get_submodule(name)
            a, b = (part.to(self._device, dtype) for part in _stacked([*adapters.values()], name))
            model.set_submodule(name, _RowsLoRALinear(base, a, b, self))

    def choose(self, names: Sequence[str | None]) -> None:
        """Row i of the batches from now on goes through the adapter names[i]; None is none.

        Raises ValueError for an unknown name.
        """
        if set(names) <= {None}:
            self.chosen = None  # any number of rows, at no cost
            return
        numbers = [
            0 if name is None else 1 + self.names.index(known_name("adapter", name, self.names))
            for name in names
        ]
        chosen = torch.tensor(numbers, device=self._device)
        if self.chosen is not None and len(self.chosen) == len(chosen):
            self.chosen.copy_(chosen)  # in place: a captured graph of a GPU reads it there
        else:
            self.chosen = chosen


class _RowsLoRALinear(nn.Module):
    """A linear layer beside which each row has its own A and B."""

    a: Float[Tensor, "adapters rank d_in"]
    b: Float[Tensor, "adapters d_out rank"]

    def __init__(
        self,
        base: nn.Module,
        a: Float[Tensor, "adapters rank d_in"],
        b: Float[Tensor, "adapters d_out rank"],
        adapters: Adapters,
    ) -> None:
        super().__init__()
        self.base, self.adapters = base, adapters
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Float[Tensor, "batch *seq d_in"]) -> Float[Tensor, "batch *seq d_out"]:
        chosen = self.adapters.chosen
        if chosen is None:
            return self.base(x)
        if len(chosen) != len(x):
            raise ValueError(
                f"The batch has {len(x)} rows, but adapters were chosen for {len(chosen)}: call "
                f"`choose` with one name, or None, for each row."
            )
        low = einsum(x, self.a[chosen], "batch ... d_in, batch rank d_in -> batch ... rank")
        change = einsum(low, self.b[chosen], "batch ... rank, batch d_out rank -> batch ... d_out")
        return self.base(x) + change


def _stacked(
    adapters: Sequence[Adapter], name: str
) -> tuple[Float[Tensor, "adapters rank d_in"], Float[Tensor, "adapters d_out rank"]]:
    """The matrices of one layer from all adapters, behind zeros for none; the scale is in B."""
    found = [adapter.layers.get(name) for adapter in adapters]
    rank = max(len(low.a) for low in found if low)
    first = next(low for low in found if low)
    a = torch.zeros(1 + len(adapters), rank, first.a.shape[1])
    b = torch.zeros(1 + len(adapters), len(first.b), rank)
    for number, (adapter, low) in enumerate(zip(adapters, found, strict=True), 1):
        if low:
            a[number, : len(low.a)] = low.a
            b[number, :, : len(low.a)] = adapter.config.scale * low.b
    return a, b


def _adapted(model: Llama) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _copy(layer: LoRALinear) -> LowRank:
    return LowRank(*(part.detach().to("cpu", copy=True) for part in (layer.a, layer.b)))


def _check(model: Llama, adapter: Adapter) -> None:
    """Raises ValueError unless the adapter fits, layer by layer, into a model without any."""
    if any(isinstance(module, LoRALinear | _RowsLoRALinear) for module in model.modules()):
        raise ValueError(
            "The model has an adapter already: `detach` it or `merge` it first. Several at a time "
            "are `Adapters(model, {name: adapter, ...})`."
        )
    shapes = target_shapes(model.config, adapter.config.targets)
    for name, low in adapter.layers.items():
        found = (len(low.b), low.a.shape[1])
        if found != shapes.get(name):
            raise ValueError(
                f"The adapter changes {name} by a matrix of {found}, but the model has "
                f"{shapes.get(name, 'no such layer')} there: it was made for another model."
            )


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device
