"""Adapters: what they compute, what they train, and that they leave no trace."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_llama, small_tokenizer
from torch import nn
from torch.testing import assert_close

from minillama.adapt.lora import (
    Adapter,
    Adapters,
    LoRALinear,
    LowRank,
    adapter_of,
    attach,
    detach,
    merge,
    new_adapter,
    target_shapes,
    unmerge,
)
from minillama.adapt.quantize import quantize
from minillama.config import ADAPTABLE, LoRAConfig, TrainingConfig
from minillama.data.packing import Batch
from minillama.generation import Engine, Request
from minillama.generation.decoder import Decoder
from minillama.model import Llama
from minillama.plan import LINEARS, TrainingPlan, lora_parameters
from minillama.training import make_optimizer, train_step
from minillama.training.checkpointing import checkpoint_activations
from minillama.training.loss import batch_loss

TOKENS = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(1))
ALL = LoRAConfig(rank=3, alpha=6, targets=ADAPTABLE)


def trained(config=None, lora: LoRAConfig = ALL, seed: int = 0) -> Adapter:
    """An adapter as training leaves it: B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(config or small_config(), lora, generator)
    for low in adapter.layers.values():
        low.b.normal_(0, 0.1, generator=generator)
    return adapter


def adapted(lora: LoRAConfig = ALL, **changes) -> Llama:
    model = small_llama(**changes)
    attach(model, trained(model.config, lora))
    return model


def bits(model: Llama) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: Llama, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


# --- What an adapter computes --------------------------------------------------------------------


def test_by_hand():  # W = I; B A = [[2, 0], [0, 0]], times alpha / rank = 3
    base = nn.Linear(2, 2, bias=False)
    base.weight.data.copy_(torch.eye(2))
    low = LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))
    layer = LoRALinear(base, LoRAConfig(rank=1, alpha=3), low)
    assert_close(layer(torch.tensor([[1.0, 1.0], [0.0, 5.0]])), torch.tensor([[7.0, 1.0], [0, 5]]))
    assert_close(layer.matrix(torch.float32), torch.tensor([[7.0, 0.0], [0.0, 1.0]]))


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert LoRAConfig(rank=16, alpha=8).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8, rank_stabilized=True).scale == 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_adapter_changes_no_bit(tied):
    model = small_llama(tie_embeddings=tied)
    before = model(TOKENS)
    attach(model, new_adapter(model.config, replace(ALL, dropout=0.5)))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("name", ADAPTABLE)
def test_every_linear_layer_can_have_one_and_it_acts(name):
    model = small_llama()
    before = model(TOKENS)
    attach(model, trained(model.config, replace(ALL, targets=(name,))))
    found = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {name}
    assert (model(TOKENS) - before).abs().max() > 0.01


def test_a_of_unit_size_keeps_x_as_large_as_it_is():
    wide = small_config(dim=512, n_heads=4, n_kv_heads=4)
    adapter = new_adapter(wide, LoRAConfig(rank=64), torch.Generator().manual_seed(0))
    x = torch.randn(100, 512, generator=torch.Generator().manual_seed(1))
    low = x @ adapter.layers["layers.0.attention.wq"].a.T
    assert 0.95 < low.std() < 1.05


def test_the_same_generator_gives_the_same_adapter():
    one, other = (
        new_adapter(small_config(), ALL, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(one.layers[name].a, other.layers[name].a) for name in one.layers)


# --- What is trained -----------------------------------------------------------------------------


def test_gradients_equal_those_of_the_dense_sum():
    model, batch = adapted(), Batch(TOKENS[:, :-1], TOKENS[:, 1:])
    batch_loss(model, batch).backward()

    dense, leaves = small_llama(), {}
    adapter = adapter_of(model)
    for name, low in adapter.layers.items():
        a, b = leaves[name] = (low.a.requires_grad_(), low.b.requires_grad_())
        linear = dense.get_submodule(name)
        weight = linear.weight.detach() + 2.0 * b @ a  # 6 / 3
        del linear.weight
        linear.weight = weight
    batch_loss(dense, batch).backward()
    for name, pair in leaves.items():
        layer = model.get_submodule(name)
        for found, expected in zip((layer.a, layer.b), pair, strict=True):
            assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_only_the_adapter_is_trained_and_the_optimizer_holds_nothing_else():
    model = adapted()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{layer}.{part}" for layer in adapter_of(model).layers for part in "ab"}
    before = bits(model)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    stats = train_step(model, [Batch(TOKENS[:, :-1], TOKENS[:, 1:])], optimizer, 1.0)
    assert stats.grad_norm > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in names), name


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointing_gives_the_same_gradients_with_dropout_too(kind):
    gradients = []
    for checkpointing in ("none", kind):
        model = adapted(replace(ALL, dropout=0.4))
        checkpoint_activations(model, checkpointing)
        torch.manual_seed(5)
        batch_loss(model, Batch(TOKENS, TOKENS)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_dropout_is_on_in_training_and_nowhere_else():
    model = adapted(replace(ALL, dropout=0.5))
    plain = adapted()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_dropout_keeps_the_mean():
    base = nn.Linear(4, 4, bias=False)
    low = LowRank(torch.eye(4), torch.eye(4))
    layer = LoRALinear(base, LoRAConfig(rank=4, alpha=4, dropout=0.25), low)
    torch.manual_seed(0)
    change = layer(torch.ones(20_000, 4)) - base(torch.ones(20_000, 4))
    assert_close(change.mean(0), torch.ones(4), rtol=0, atol=0.02)
    assert {round(value, 3) for value in change.flatten().tolist()} == {0, round(4 / 3, 3)}


# --- In and out ----------------------------------------------------------------------------------


def test_detach_leaves_no_trace_and_gives_back_what_was_attached():
    model = small_llama()
    before, adapter = bits(model), trained()
    attach(model, adapter)
    with torch.no_grad():
        logits = model(TOKENS)
    back = detach(model)
    assert_same_bits(model, before)
    for name, low in adapter.layers.items():
        assert torch.equal(back.layers[name].a, low.a)
        assert torch.equal(back.layers[name].b, low.b)
    attach(model, back)
    assert torch.equal(model(TOKENS), logits)


def test_training_changes_neither_what_was_attached_nor_what_was_taken():
    model, adapter = small_llama(), trained()
    attach(model, adapter)
    taken = adapter_of(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    for kept, zero in ((adapter, False), (taken, False), (adapter_of(model), True)):
        for low in kept.layers.values():
            assert (low.a.abs().sum() == 0) == zero
            assert (low.b.abs().sum() == 0) == zero


@pytest.mark.parametrize("tied", [True, False])
def test_merged_says_the_same_and_unmerge_gives_back_the_very_bits(tied):
    model = adapted(tie_embeddings=tied)
    before, logits = bits(model), model(TOKENS)
    replaced = merge(model)
    assert type(model.output) is nn.Linear
    assert model.state_dict().keys() == small_llama(tie_embeddings=tied).state_dict().keys()
    assert not model.config.tie_embeddings
    assert_close(model(TOKENS), logits, rtol=0, atol=1e-5)
    unmerge(model, replaced)
    assert model.config.tie_embeddings == tied
    assert (model.output.base.weight is model.tok_embeddings.weight) == tied
    assert_same_bits(model, before)
    assert torch.equal(model(TOKENS), logits)


def test_adding_and_subtracting_would_not_give_them_back():
    """Why `merge` puts the old layers aside."""
    weight = small_llama().layers[0].attention.wq.weight
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(weight + change - change, weight)


def test_a_tied_head_without_an_adapter_stays_tied_when_merged():
    model = adapted(replace(ALL, targets=("wq",)), tie_embeddings=True)
    merge(model)
    assert model.config.tie_embeddings
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_keep_their_dtype_and_the_adapter_stays_float32(dtype):
    model = small_llama().to(dtype)
    attach(model, trained())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    hidden = model.hidden(TOKENS)
    assert hidden.dtype == dtype
    batch_loss(model, Batch(TOKENS, TOKENS)).backward()
    layer = model.layers[0].attention.wq
    assert layer.a.grad.dtype == torch.float32
    exact = layer.base.weight.float() + 2.0 * layer.b @ layer.a
    merge(model)
    merged = model.layers[0].attention.wq.weight
    assert merged.dtype == dtype
    assert torch.equal(merged, exact.to(dtype))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: attach(m, trained()), "has an adapter already: `detach` it or `merge` it"),
        (lambda m: Adapters(m, {"x": trained()}), "has an adapter already"),
        (lambda m: (detach(m), adapter_of(m)), "has no adapter. Put one into it with `attach`"),
        (lambda m: (detach(m), detach(m)), "has no adapter"),
        (
            lambda m: (detach(m), attach(m, trained(small_config(dim=48)))),
            r"changes layers\.0\.attention\.wq by a matrix of \(48, 48\), but the model has "
            r"\(32, 32\) there: it was made for another model",
        ),
        (
            lambda m: (detach(m), attach(m, trained(small_config(n_layers=3)))),
            r"changes layers\.2\..*no such layer there",
        ),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(adapted())


def test_an_adapter_that_is_refused_changes_nothing():
    model = small_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="another model"):
        attach(model, trained(small_config(n_layers=3)))
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0, but must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0, but must be above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
        ({"targets": ()}, "must name at least one linear layer"),
        ({"targets": ("wq", "wq")}, "each once"),
        ({"targets": ("q_proj",)}, "There is no linear layer 'q_proj'.*Known are: wq, wk"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**changes)


# --- Quantised weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_an_adapter_learns_beside_quantised_weights(kind):
    model = quantize(small_llama(dim=64, hidden_dim=128), kind)
    attach(model, new_adapter(model.config, replace(ALL, rank=4), torch.Generator().manual_seed(0)))
    before = bits(model)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
    losses = [train_step(model, [batch], optimizer, 1.0).loss for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    for name, tensor in model.state_dict().items():
        learned = name.rpartition(".")[2] in ("a", "b")
        assert torch.equal(tensor, before[name]) == (not learned), name


def test_gradients_through_nf4_equal_those_through_the_matrix_it_stands_for():
    gradients = []
    for dequantised in (False, True):
        model = quantize(small_llama(dim=64, hidden_dim=128), "nf4")
        if dequantised:
            for name, module in list(model.named_modules()):
                if hasattr(module, "dequantized"):
                    plain = nn.Linear(module.in_features, module.out_features, bias=False)
                    plain.weight.data.copy_(module.dequantized())
                    model.set_submodule(name, plain)
        attach(model, trained(model.config))
        batch_loss(model, Batch(TOKENS, TOKENS)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_merged_quantised_weights_are_plain_ones():
    model = quantize(small_llama(dim=64, hidden_dim=128, tie_embeddings=True), "nf4")
    attach(model, trained(model.config))
    many = TOKENS.repeat(9, 1)  # so many rows that they are dequantised, not read by a kernel
    with torch.no_grad():
        logits = model(many)
        merge(model)
        assert_close(model(many), logits, rtol=0, atol=1e-4)
    assert model.state_dict().keys() == small_llama().state_dict().keys()


# --- Several at a time ---------------------------------------------------------------------------

KINDS = {
    "queries": LoRAConfig(rank=2, targets=("wq", "wv")),
    "everything": LoRAConfig(rank=5, alpha=5, targets=ADAPTABLE),
    "head": LoRAConfig(rank=1, alpha=2, rank_stabilized=True, targets=("output", "w2")),
}


def three() -> dict[str, Adapter]:
    return {name: trained(lora=lora, seed=seed) for seed, (name, lora) in enumerate(KINDS.items())}


@given(st.lists(st.sampled_from([None, *KINDS]), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_each_row_gives_what_its_adapter_gives_alone(names):
    tokens = torch.randint(300, (len(names), 7), generator=torch.Generator().manual_seed(2))
    model = small_llama()
    adapters = Adapters(model, three())
    adapters.choose(names)
    together = model(tokens)
    for name, row, logits in zip(names, tokens, together, strict=True):
        alone = small_llama()
        if name:
            attach(alone, three()[name])
        with torch.no_grad():
            assert_close(logits[None], alone(row[None]), rtol=1e-5, atol=1e-5)


def test_rows_without_an_adapter_are_the_base_to_the_bit():
    model, base = small_llama(), small_llama()(TOKENS)
    adapters = Adapters(model, three())
    assert torch.equal(model(TOKENS), base)  # none was chosen yet
    adapters.choose([None, "queries", None])
    assert torch.equal(model(TOKENS)[::2], base[::2])
    adapters.choose([None])
    assert torch.equal(model(TOKENS), base)  # any number of rows


def test_rows_are_decoded_with_their_adapters_from_a_cache():
    names, prompts = ["everything", None, "queries"], [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    model = small_llama()
    adapters = Adapters(model, three())
    with torch.inference_mode():
        decoder = Decoder(model, rows=3, max_len=16)
        adapters.choose(names)
        logits = decoder.prefill(0, prompts)
        rows = [list(prompt) for prompt in prompts]
        for _ in range(5):
            new = logits.argmax(-1).tolist()
            for row, token in zip(rows, new, strict=True):
                row.append(token)
            logits = decoder.step(new)
    for name, row, prompt in zip(names, rows, prompts, strict=True):
        alone, ids = small_llama(), list(prompt)
        if name:
            attach(alone, three()[name])
        with torch.no_grad():
            while len(ids) < len(row):
                ids.append(int(alone(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == row, name


def test_a_new_choice_of_equally_many_rows_is_written_in_place():
    adapters = Adapters(small_llama(), three())
    adapters.choose(["head", None])
    chosen = adapters.chosen
    adapters.choose(["queries", "queries"])
    assert adapters.chosen is chosen
    assert chosen.tolist() == [1, 1]


def test_a_wrong_choice_says_what_is_right():
    model = small_llama()
    adapters = Adapters(model, three())
    with pytest.raises(ValueError, match=r"no adapter 'querys'. Did you mean 'queries'\?"):
        adapters.choose(["querys"])
    adapters.choose(["head"])
    with pytest.raises(ValueError, match="batch has 3 rows, but adapters were chosen for 1: call"):
        model(TOKENS)


def test_adapters_of_another_model_are_refused_before_anything_changes():
    model = small_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="another model"):
        Adapters(model, {"good": trained(), "bad": trained(small_config(hidden_dim=96))})
    assert_same_bits(model, before)


# --- What the plan says --------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("wq", "wv"), LINEARS])
@pytest.mark.parametrize("rank", [1, 8])
def test_there_are_as_many_numbers_as_the_plan_says(rank, targets):
    model = adapted(LoRAConfig(rank=rank, targets=targets))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == lora_parameters(model.config, rank, targets)
    shapes = target_shapes(model.config, targets)
    assert numbers == rank * sum(map(sum, shapes.values()))


def test_weights_gradients_and_moments_are_those_of_the_plan():
    lora, batch = LoRAConfig(rank=4), Batch(TOKENS, TOKENS)
    model = adapted(lora)
    training = TrainingConfig(batch_size=3, seq_len=9, precision="float32")
    plan = TrainingPlan(config=model.config, training=training, device="cpu", lora=4)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    batch_loss(model, batch).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert plan.gradients == sum(gradient.nbytes for gradient in gradients)
    optimizer = make_optimizer(model, training)
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert plan.optimizer_state == sum(moment.nbytes for moment in moments)


def test_an_engine_gives_each_request_its_adapter():
    """Rows are read together, decoded together, move when others end, and wait for a place."""
    names = ["everything", None, "queries", "head", "queries", None]
    requests = [
        Request(list(range(5, 8 + place)), 4 + 2 * place, adapter=name, end_ids=())
        for place, name in enumerate(names)
    ]
    model = small_llama()
    engine = Engine(model, small_tokenizer(), rows=3, adapters=Adapters(model, three()))
    tickets = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    found = [ticket.token_ids for ticket in tickets]
    for name, request, ids in zip(names, requests, found, strict=True):
        alone = small_llama()
        if name:
            attach(alone, three()[name])
        single = Engine(alone, small_tokenizer(), rows=1)
        ticket = single.submit(replace(request, adapter=None))
        while single.busy:
            single.step()
        assert ids == ticket.token_ids
    assert found[2][:4] != found[5][:4]  # adapters matter


def test_a_row_remembers_what_an_adapter_read_for_that_adapter_alone(monkeypatch):
    monkeypatch.setattr("minillama.generation.engine.WORTH_KEEPING", 1)
    model, prompt = small_llama(), [5, 6, 7, 8, 9]
    adapters = Adapters(model, three())
    engine = Engine(model, small_tokenizer(), rows=3, adapters=adapters, keep=True)
    n_kept = []
    for name in ("head", None, "queries", None, "head", "queries"):
        single = Engine(model, small_tokenizer(), rows=1, adapters=adapters)
        both = []
        for each in (engine, single):
            both.append(each.submit(Request(prompt, 3, adapter=name)))
            while each.busy:
                each.step()
        assert both[0].token_ids == both[1].token_ids
        n_kept.append(both[0].n_kept)
    assert n_kept == [0, 0, 0, 4, 4, 4]


def test_an_engine_refuses_adapters_it_does_not_have():
    model = small_llama()
    with pytest.raises(ValueError, match=r"no adapter 'head'.*Known are: none"):
        Engine(model, small_tokenizer()).submit(Request("x", adapter="head"))
    with pytest.raises(ValueError, match="differ from row to row"):
        Engine(model, small_tokenizer(), compile=True, adapters=Adapters(model, three()))
