"""Which tokens are learned, how dialogues share rows, and `SftRun`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from small import STORIES, small_config, small_llama, small_tokenizer
from torch.testing import assert_close

from minillama.chat.dialog import DialogTokens, Message
from minillama.chat.sft import (
    GattRun,
    LoRASftRun,
    SftRun,
    as_batch,
    batches,
    pack,
    tokenise,
    toy_dialogues,
)
from minillama.checkpoint import load, load_tokenizer, save
from minillama.cli import main, sft_defaults
from minillama.config import SFT_EPOCHS, SFT_PRESETS, LoRAConfig, RunConfig, TrainingConfig
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training import make_optimizer, train, train_step
from minillama.training.lora_run import LoRARun
from minillama.training.loss import batch_loss
from minillama.training.run import PretrainingRun

SEQ_LEN = 128


def said(*turns: str, system: str = "") -> list[Message]:
    """A dialogue in which user and assistant say these things in turns."""
    roles = ("user", "assistant")
    messages = [Message(roles[place % 2], text) for place, text in enumerate(turns)]
    return [Message("system", system)] * bool(system) + messages


DIALOGUES = [
    said("Who took it?", "Ada took it.", "And then?", "Home."),
    said("What had Ben?", "A kite.", system="Be brief."),
    *(said(f"Tell {n}", STORIES[n]) for n in range(3)),
    said("One.", "Two.", "Three.", "Four.", "Five.", "Six."),
]


def learned_parts(example: DialogTokens) -> list[list[int]]:
    """The runs of ids that are learned."""
    runs, before = [], False
    for id, learned in zip(example.ids, example.learned, strict=True):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(id)
        before = learned
    return runs


# --- What is learned ------------------------------------------------------------------------------


def test_a_batch_has_as_targets_the_answers_and_their_ends_and_nothing_else(tok):
    """Each token of an answer, and EOS, is learned; no token of users or system ever is."""
    (example,) = tokenise([DIALOGUES[1]], tok)
    batch = as_batch(pack([example], SEQ_LEN))
    ids, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    answer = tok.encode("A kite.")
    end = ids.index(tok.eos_id)
    start = end - len(answer) - 1  # Meta puts a space behind the answer
    assert ids[start : end - 1] == answer
    expected = [IGNORE] * SEQ_LEN
    expected[start - 1 : end] = ids[start : end + 1]
    assert targets == expected
    assert tok.decode(ids[:start]).endswith("[/INST]")


@settings(max_examples=50, deadline=None)
@given(
    turns=st.lists(
        st.tuples(*[st.text("abc é\n7", min_size=1, max_size=9).filter(str.strip)] * 2),
        min_size=1,
        max_size=4,
    ),
    system=st.text("abc", max_size=5),
)
def test_what_is_learned_decodes_to_the_answers_turn_by_turn(turns, system):
    tok = small_tokenizer()
    dialogue = said(*(text for turn in turns for text in turn), system=system)
    (example,) = tokenise([dialogue], tok)
    row = pack([example], 512)[0]
    predicted = row[1][row[1] != IGNORE].tolist()
    ends = [place for place, id in enumerate(predicted) if id == tok.eos_id]
    assert len(ends) == len(turns)
    starts = [0, *(end + 1 for end in ends[:-1])]
    answers = [tok.decode(predicted[a:b]).strip() for a, b in zip(starts, ends, strict=True)]
    assert answers == [answer.strip() for _, answer in turns]


def test_alpacas_template_is_read_and_its_answer_is_learned(tok):
    dialogue = [Message("system", "Name it."), Message("user", "A boat"), Message("assistant", "B")]
    (example,) = tokenise([dialogue], tok, "alpaca")
    assert learned_parts(example) == [[*tok.encode("\0B")[len(tok.encode("\0")) :], tok.eos_id]]


def test_chatml_learns_the_piece_that_ends_an_answer_and_not_what_is_behind_it(chatml_tok):
    (example,) = tokenise([said("Hi", "Ada", "And", "Ben")], chatml_tok, "chatml")
    end = chatml_tok.special_ids["<|im_end|>"]
    expected = [[*chatml_tok.encode(name), end] for name in ("Ada", "Ben")]
    assert learned_parts(example) == expected


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (said("Hi"), "Dialogue 2: The dialogue does not end with an answer"),
        ([], "Dialogue 2: The dialogue does not end with an answer"),
        (said("Hi", " "), r"Dialogue 2: Message 2 \(assistant\) is empty"),
        (said(" ", "Hi"), r"Dialogue 2: Message 1 \(user\) is empty"),
        (said("Hi", "[INST]"), r"Dialogue 2: Message 2 \(assistant\) contains '\[INST\]'"),
        (said("Hi", "Ho")[::-1], "Dialogue 2: The dialogue does not end with"),
        (said("Hi", "Ho")[1:], "Dialogue 2: Message 1 is of role 'assistant'"),
    ],
    ids=["no answer", "nothing", "empty", "no question", "marker", "backwards", "out of turn"],
)
def test_a_dialogue_that_teaches_nothing_is_named(tok, dialogue, message):
    with pytest.raises(ValueError, match=message):
        tokenise([DIALOGUES[0], dialogue], tok)
    with pytest.raises(ValueError, match=message.replace("Dialogue 2", "a.jsonl, line 7")):
        tokenise({"a.jsonl, line 7": dialogue}, tok)


def test_all_dialogues_that_teach_nothing_are_named_at_once(tok):
    with pytest.raises(ValueError, match="2 dialogues cannot be used") as found:
        tokenise([said("Hi"), DIALOGUES[0], said("Hi", "[INST]")], tok)
    lines = str(found.value).splitlines()
    assert lines[1].startswith("Dialogue 1: The dialogue does not end with")
    assert lines[2].startswith("Dialogue 3: Message 2 (assistant) contains '[INST]'")


def test_a_format_that_cannot_be_is_no_mistake_of_a_dialogues(tok):
    with pytest.raises(ValueError, match=r"^The chat format chatml needs the piece <\|im_start\|>"):
        tokenise(DIALOGUES, tok, "chatml")
    with pytest.raises(ValueError, match=r"^There is no chat format 'lama2'"):
        tokenise(DIALOGUES, tok, "lama2")


def test_a_long_dialogue_is_cut_behind_an_answer_or_left_out_and_named(tok):
    dialogues = [DIALOGUES[0], said("Tell me.", "".join(STORIES[:3])), DIALOGUES[5]]
    sizes = [len(example.ids) for example in tokenise(dialogues, tok)]
    limit = sizes[2] - 1  # the last dialogue loses its last turn
    assert sizes[0] <= limit < sizes[1]
    with pytest.warns(UserWarning, match="longer than seq_len") as seen:
        examples = tokenise(dialogues, tok, seq_len=limit)
    assert (
        f"Of 3 dialogues, 2 are longer than seq_len ({limit} tokens): 1 are cut behind the last "
        f"answer that fits (Dialogue 3), and 1 are left out, for not even the first one fits "
        f"(Dialogue 2). Raise seq_len"
    ) in str(seen[0].message)
    assert examples == tokenise([DIALOGUES[0], DIALOGUES[5][:4]], tok)


def test_a_system_message_stays_with_its_first_turn(tok):
    dialogue = said("One.", "Two.", "Three.", "Four.", system="Be brief.")
    (whole,) = tokenise([dialogue], tok)
    with pytest.warns(UserWarning, match="1 are cut"):
        (cut,) = tokenise([dialogue], tok, seq_len=len(whole.ids) - 1)
    assert cut.ids == whole.ids[: len(cut.ids)]
    with pytest.warns(UserWarning, match=r"1 are left out, for not even the first one fits"):
        assert tokenise([dialogue], tok, seq_len=len(cut.ids) - 1) == []


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    seq_len=st.integers(8, 150),
    system=st.sampled_from(["", "Be brief."]),
    chat_format=st.sampled_from(["llama2", "chatml", "code-llama-70b", "alpaca"]),
)
def test_a_cut_dialogue_is_the_one_without_its_last_turns(
    tok, chatml_tok, step_tok, words, seq_len, system, chat_format
):
    """Against the definition: leave out turn after turn, encode it anew, until it fits."""
    tokenizer = {"chatml": chatml_tok, "code-llama-70b": step_tok}.get(chat_format, tok)
    turns = words[:1] if chat_format == "alpaca" else words
    dialogue = said(*("Ada had 3 " * n for turn in turns for n in turn), system=system)
    kept = list(dialogue)
    whole = [expected] = tokenise([kept], tokenizer, chat_format)
    while len(expected.ids) > seq_len and len(kept) > 3:
        del kept[-2:]
        (expected,) = tokenise([kept], tokenizer, chat_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tokenise([dialogue], tokenizer, chat_format, seq_len)
    assert found == [expected] * (len(expected.ids) <= seq_len)
    assert whole[0].ids[: len(expected.ids)] == expected.ids


def test_a_long_dialogue_is_encoded_once(tok, monkeypatch):
    texts, encode = [], type(tok).encode
    monkeypatch.setattr(
        type(tok), "encode", lambda self, text: texts.append(text) or encode(self, text)
    )
    with pytest.warns(UserWarning, match="1 are cut"):
        tokenise([said(*["Ada had a kite."] * 200)], tok, seq_len=100)
    assert len(texts) < 1000


# --- Rows -----------------------------------------------------------------------------------------


def example_of(size: int, first: int = 1) -> DialogTokens:
    ids = list(range(first, first + size))
    return DialogTokens(ids, ["assistant"] * size, [True] * size)


def test_a_row_by_hand():
    (row,) = pack(
        [example_of(2, 10), DialogTokens([5, 6, 7], ["user"] * 3, [False, False, True])], 7
    )
    assert row.tolist() == [
        [5, 6, 7, 10, 11, 0, 0],
        [IGNORE, 7, IGNORE, 11, IGNORE, IGNORE, IGNORE],
        [0, 1, 2, 0, 1, 2, 3],
    ]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(2, 20), min_size=1, max_size=40))
def test_every_example_is_in_one_row_whole(sizes):
    examples = [example_of(size, 100 * n) for n, size in enumerate(sizes, 1)]
    rows = pack(examples, 20)
    fills = sorted((tokens != 0).sum() for tokens in rows[:, 0])
    assert sum(fills[:2]) > 20 or len(rows) == 1  # no two rows would fit into one
    found = []
    for tokens, targets, positions in rows.tolist():
        starts = [i for i, position in enumerate(positions) if position == 0] + [20]
        for start, end in pairwise(starts):
            ids = [id for id in tokens[start:end] if id]
            found.append(ids)
            assert targets[start : start + len(ids) - 1] == ids[1:]
            assert set(targets[start + len(ids) - 1 : end]) <= {IGNORE}
    assert sorted(found) == sorted(example.ids for example in examples)


def test_an_example_that_teaches_nothing_is_left_out_loudly():
    mute = DialogTokens([1, 2], ["user"] * 2, [False] * 2)
    first = DialogTokens([1, 2], ["assistant"] * 2, [True, False])  # nothing leads to the first id
    with pytest.warns(UserWarning, match="Of 3 examples, 2 have nothing that is learned"):
        rows = pack([mute, example_of(3), first], 8)
    assert (rows[:, 0] != 0).sum() == 3
    with (
        pytest.warns(UserWarning, match="Of 1 examples, 1 have"),
        pytest.raises(ValueError, match="no example to learn from"),
    ):
        pack([mute], 8)


def test_no_example_is_longer_than_a_row():
    with pytest.raises(ValueError, match=r"An example has 9 tokens, but a row 8 \(seq_len\)"):
        pack([example_of(9)], 8)


# --- Packed training is training on one dialogue after the other ----------------------------------


def gradients(model: Llama, total: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    total.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def alone(example: DialogTokens) -> Batch:
    """A dialogue in a row of its own, with the positions of any text."""
    ids, learned = torch.tensor([example.ids]), torch.tensor([example.learned])
    return Batch(ids[:, :-1], torch.where(learned, ids, IGNORE)[:, 1:])


def test_loss_and_gradients_of_packed_rows_equal_those_of_the_dialogues_one_by_one(tok):
    examples = tokenise(DIALOGUES, tok)
    rows = pack(examples, 256)
    assert len(rows) < len(examples)
    model = Llama(small_config(max_seq_len=256), torch.Generator().manual_seed(0), 0.1).double()
    packed = batch_loss(model, as_batch(rows))
    single = sum(batch_loss(model, alone(example)) for example in examples)
    assert_close(packed, single, rtol=1e-6, atol=0)
    for one, other in zip(gradients(model, packed), gradients(model, single), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_step_in_single_precision_moves_the_weights_equally(tok):
    examples = tokenise(DIALOGUES, tok)
    moved = []
    for micro_batches in ([as_batch(pack(examples, 256))], [alone(e) for e in examples]):
        model = Llama(small_config(max_seq_len=256), torch.Generator().manual_seed(0), 0.1)
        stats = train_step(model, micro_batches, torch.optim.SGD(model.parameters(), 0.1), 1.0)
        moved.append((stats.loss, [p.detach() for p in model.parameters()]))
    assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-6)


def test_with_attention_across_they_differ(tok):
    rows = pack(tokenise(DIALOGUES, tok), 256)
    model = small_llama(max_seq_len=256)
    across = as_batch(rows, across=True)
    assert across.positions is None
    assert abs(batch_loss(model, across) - batch_loss(model, as_batch(rows))) > 0.1


def test_batches_show_every_row_once_in_an_epoch(tok):
    rows = pack([example_of(8, n) for n in range(1, 9)], 8)
    source = batches(rows, 2, seed=0)
    first = torch.cat([next(source).tokens[:, 0] for _ in range(4)])
    assert sorted(first.tolist()) == list(range(1, 9))
    assert next(source).positions is not None
    assert next(batches(rows, 2, seed=0, across=True)).positions is None


def test_a_step_without_targets_is_left_out_loudly(tok):
    model = Llama(small_config(max_seq_len=SEQ_LEN), torch.Generator().manual_seed(0))
    batch = as_batch(pack(tokenise(DIALOGUES[:1], tok), SEQ_LEN))
    empty = replace(batch, targets=torch.full_like(batch.targets, IGNORE))
    config = TrainingConfig(steps=3, batch_size=1, warmup_steps=0)
    steps = train(model, make_optimizer(model, config), [batch, empty, batch], config)
    assert next(steps).step == 1
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(UserWarning, match=r"Step 2 has no target.* The step is left out"):
        stats = next(steps)
    assert stats.step == 3
    assert not torch.equal(before[0], model.tok_embeddings.weight)


# --- A run ----------------------------------------------------------------------------------------

TRAINING = TrainingConfig(
    steps=6, batch_size=2, seq_len=SEQ_LEN, learning_rate=1e-2, warmup_steps=1
)
PAIRS = [said(f"Which {n}?", story) for n, story in enumerate(STORIES)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save(folder, Llama(small_config(), torch.Generator().manual_seed(0), 0.1), small_tokenizer())
    return folder


def new_run(folder: Path, base: Path, config: TrainingConfig = TRAINING, **changes) -> SftRun:
    tok = small_tokenizer()
    arguments = {"saving": RunConfig(save_every=2, eval_every=3)} | changes
    examples, held_out = tokenise(PAIRS[3:], tok), tokenise(PAIRS[:3], tok)
    return SftRun(folder, examples, held_out, tok, base, config, **arguments)


def bytes_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base) -> SftRun:
    run = new_run(tmp_path_factory.mktemp("run") / "new", base)
    for _ in run:
        pass
    return run


LONGEST = max(len(example.ids) for example in tokenise(PAIRS[3:], small_tokenizer()))


def test_it_learns_and_leaves_a_checkpoint_with_the_longer_context(finished, base):
    assert small_config().max_seq_len < LONGEST < SEQ_LEN
    losses = [line["loss"] for line in finished.log() if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {"checkpoint", "config.toml", "log.jsonl", "loss.png", "states", "tokens"}
    model, tokenizer = load(finished.folder / "checkpoint")
    assert model.config == small_config(max_seq_len=LONGEST)
    assert tokenizer.pieces == small_tokenizer().pieces
    tokens = torch.arange(LONGEST)[None]
    assert torch.equal(model(tokens), finished.model(tokens))


def test_the_context_is_that_which_was_learned(tmp_path, base):
    """Positions begin anew in each example, so a long row gives no sense to its own."""
    short = [said("Who?", "Ada."), said("What?", "A kite.")] * 9
    examples = tokenise(short, small_tokenizer())
    config = replace(TRAINING, steps=1, warmup_steps=0)
    contexts = {}
    for across in (False, True):
        run = SftRun(
            tmp_path / str(across),
            examples,
            examples,
            small_tokenizer(),
            base,
            config,
            None,
            across,
        )
        assert run.n_tokens > 0
        for _ in run:
            pass
        assert run.evaluate().loss > 0  # on rows that are longer than the context
        contexts[across] = load(run.folder / "checkpoint")[0].config.max_seq_len
        assert run.context == contexts[across]
    assert contexts == {False: small_config().max_seq_len, True: SEQ_LEN}


COMPILED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from test_sft import TRAINING, new_run
torch._dynamo.config.error_on_recompile = True
for stats in new_run(Path(sys.argv[1]), sys.argv[2], replace(TRAINING, compile=True)):
    print(stats.loss)
"""


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_from_rows_of_any_documents(finished, base, tmp_path):
    # In a process of its own: the compiler cannot see through the checks of shapes in this one.
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "chat"), str(tests.parent)])
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "run"), str(base)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    losses = [float(line) for line in done.stdout.splitlines()]
    assert losses == pytest.approx([line["loss"] for line in finished.log() if "loss" in line])


def test_the_base_is_what_training_starts_from_and_stays_as_it_was(tmp_path, base):
    before = bytes_of(base)
    short = tokenise([said("Who?", "Ada."), said("What?", "A kite.")], small_tokenizer())
    config = replace(TRAINING, seq_len=60, steps=2)
    run = SftRun(tmp_path / "run", short, short, small_tokenizer(), base, config)
    model, _ = load(base)
    assert run.model.config == model.config  # rows that fit need no longer context
    tokens = torch.arange(50)[None]
    assert torch.equal(run.model(tokens), model(tokens))
    for _ in run:
        pass
    assert not torch.equal(run.model(tokens), model(tokens))
    assert bytes_of(base) == before


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path, base, finished, stop):
    cut = iter(new_run(tmp_path / "cut", base))
    for _ in range(stop):
        next(cut)
    del cut
    run = SftRun.resume(tmp_path / "cut")
    assert run.step == stop // 2 * 2
    for _ in run:
        pass
    assert bytes_of(tmp_path / "cut") == bytes_of(finished.folder)


def test_what_is_measured_is_what_the_assistant_says(finished):
    tok = small_tokenizer()
    held_out = tokenise(PAIRS[:3], tok)
    sizes = json.loads((finished.folder / "tokens" / "sizes.json").read_text())
    assert sizes["held_out"]["tokens"] == sum(sum(example.learned) for example in held_out)
    texts = sum(len(PAIRS[n][1].content.strip().encode()) for n in range(3))
    assert texts <= sizes["held_out"]["bytes"] <= texts + 6  # with Meta's spaces around answers
    losses = [batch_loss(finished.model, alone(example)).item() for example in held_out]
    mean = sum(losses) / sizes["held_out"]["tokens"]
    assert finished.evaluate().loss == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(2.0, 2, 27), (0.5, 4, 4)])
def test_epochs_are_counted_in_rows(tmp_path, base, epochs, batch_size, steps):
    config = replace(TRAINING, batch_size=batch_size, warmup_steps=0)
    run = new_run(tmp_path / "run", base, config, epochs=epochs)
    assert len(pack(tokenise(PAIRS[3:], run.tokenizer), SEQ_LEN)) == 27
    assert run.config.steps == steps
    with pytest.raises(ValueError, match=r"epochs is 0\.0, but must be above 0"):
        new_run(tmp_path / "other", base, config, epochs=0.0)


def test_attention_across_is_a_part_of_the_run(tmp_path, base):
    run = new_run(tmp_path / "run", base, across=True)
    assert next(run.batches).positions is None
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["packing"] == {
        "across": True,
        "epochs": 0.0,
        "context": SEQ_LEN,
        "chat_format": "",  # nobody said
    }
    resumed = SftRun.resume(tmp_path / "run")
    assert next(resumed.batches).positions is None


def test_a_state_holds_all_weights(finished):
    state = load_file(finished.folder / "states" / "000000006" / "state.safetensors")
    assert {name for name in state if not name.startswith("optimizer.")} == {
        name for name, _ in finished.model.named_parameters()
    }


def test_damaged_rows_are_noticed(tmp_path, base):
    run = new_run(tmp_path / "run", base)
    path = run.folder / "tokens" / "examples.safetensors"
    raw = bytearray(path.read_bytes())
    for place in (len(raw) - 5, 3, len(raw) // 2):
        raw[place] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"examples\.safetensors is damaged: its rows are not"):
            SftRun.resume(tmp_path / "run")
        raw[place] ^= 1
    path.write_bytes(raw)
    SftRun.resume(tmp_path / "run")


def test_another_kind_of_run_is_not_resumed_as_fine_tuning(tmp_path, base):
    PretrainingRun(
        tmp_path / "run",
        STORIES[3:],
        STORIES[:3],
        small_tokenizer(),
        small_config(),
        replace(TRAINING, seq_len=16),
    )
    with pytest.raises(ValueError, match=r"holds a run of `minillama pretrain`.*pretrain --resume"):
        SftRun.resume(tmp_path / "run")


def test_another_model_in_the_place_of_the_base_is_noticed(tmp_path):
    save(tmp_path / "base", small_llama(), small_tokenizer())
    new_run(tmp_path / "run", tmp_path / "base")
    for other in (small_llama(n_layers=3), small_llama(seed=1)):
        save(tmp_path / "base", other, small_tokenizer())
        with pytest.raises(ValueError, match="holds another model than when this run was started"):
            SftRun.resume(tmp_path / "run")


def test_weights_in_few_bits_are_not_fine_tuned(tmp_path, base):
    model, tokenizer = load(base, quantize="int8")
    save(tmp_path / "int8", model, tokenizer)
    with pytest.raises(ValueError, match=r"holds weights in int8, and .*minillama lora"):
        new_run(tmp_path / "run", tmp_path / "int8")
    assert not (tmp_path / "run").exists()


# --- The command ----------------------------------------------------------------------------------

FLAGS = ["--epochs", "1", "--batch-size", "2", "--accumulation", "1", "--seq-len", str(SEQ_LEN)]
FLAGS += ["--learning-rate", "1e-2", "--device", "cpu"]


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": [asdict(message) for message in dialogue]} for dialogue in PAIRS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft(base: Path, data: Path | str, out: Path, *more: str) -> None:
    main(["sft", str(base), "--data", str(data), "--out", str(out), *FLAGS, *more])


def test_the_command_leaves_a_model_to_chat_with(tmp_path, base, chats, capsys, monkeypatch):
    out = tmp_path / "run"
    sft(base, chats, out)
    shown = capsys.readouterr().out
    assert "27 dialogues in the format llama2: " in shown
    assert "3 more are held out." in shown
    assert f"The context grows from 64 to {LONGEST} tokens: the longest dialogue has" in shown
    assert f"{out} holds checkpoint/, loss.png" in shown
    assert shown.endswith(f"Try it: minillama chat {out / 'checkpoint'}\n")
    settings = tomllib.loads((out / "config.toml").read_text())
    data = {"files": [str(chats)], "chat_format": "llama2", "neutralise": False, "tokenizer": ""}
    assert settings["data"] == data
    assert settings["training"]["steps"] == 14  # 27 rows, 2 a step

    lines = iter(["Which 1?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    main(["chat", str(out / "checkpoint"), "--device", "cpu", "--max-new-tokens", "5"])
    assert f"a context of {LONGEST} tokens, chat format llama2" in capsys.readouterr().out


def test_the_command_resumes_with_or_without_the_same_flags(tmp_path, base, chats, capsys):
    out = tmp_path / "run"
    sft(base, chats, out, "--save-every", "5")
    whole = bytes_of(out / "checkpoint")
    for state in ("000000010", "000000014"):
        assert (out / "states" / state).exists()
    shutil.rmtree(out / "states" / "000000014")
    main(["sft", "--resume", "--out", str(out), "--device", "cpu"])
    assert "10 of them were taken before" in capsys.readouterr().out
    assert bytes_of(out / "checkpoint") == whole
    sft(base, chats, out, "--resume")
    assert bytes_of(out / "checkpoint") == whole
    with pytest.raises(SystemExit):
        main(["sft", "--resume", "--out", str(out), "--device", "cpu", "--learning-rate", "3e-2"])
    assert "learning_rate was 0.01 when the run in" in capsys.readouterr().err


@pytest.mark.parametrize("length", [("--steps", "14"), ("--epochs", "1")])
def test_the_line_that_started_a_run_resumes_it(tmp_path, base, chats, length):
    line = ["sft", str(base), "--data", str(chats), "--out", str(tmp_path / "run"), "--resume"]
    for _ in range(2):
        main(
            [
                *line,
                *FLAGS[: FLAGS.index("--epochs")],
                *FLAGS[FLAGS.index("--epochs") + 2 :],
                *length,
            ]
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--across",), "across was False when"),
        (("--data", "other.jsonl"), "files was ["),
        (("--epochs", "20"), "epochs was 1.0 when"),
        (("--tokenizer", "nowhere"), "tokenizer was '' when"),
        (("--chat-format", "alpaca"), "chat_format was 'llama2' when"),
        (("--neutralise",), "neutralise was False when"),
    ],
)
def test_a_resumed_run_keeps_what_it_was_started_with(
    tmp_path, base, chats, capsys, flags, message
):
    sft(base, chats, tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["sft", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu", *flags])
    assert message in capsys.readouterr().err


def test_a_run_made_in_python_is_resumed_too(tmp_path, base, capsys):
    new_run(tmp_path / "run", base)
    main(["sft", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "No state was saved yet: the run starts at step 1." in shown
    assert shown.endswith("/checkpoint\n")


def test_a_run_is_resumed_by_the_command_that_started_it(tmp_path, base, capsys):
    tok = small_tokenizer()
    texts, rows = (STORIES[3:], STORIES[:3], tok), (tokenise(PAIRS, tok), tokenise(PAIRS, tok), tok)
    short, adapter = replace(TRAINING, seq_len=16), LoRAConfig()
    long = replace(TRAINING, seq_len=64)
    few = tuple(tokenise([said("Who?", "Ada.")], tok) for _ in range(2))
    PretrainingRun(tmp_path / "pretrain", *texts, small_config(), short)
    LoRARun(tmp_path / "lora", *texts, base, adapter, short)
    LoRASftRun(tmp_path / "chat-lora", *few, tok, base, adapter, long)
    SftRun(tmp_path / "sft", *rows, base, TRAINING)
    GattRun(tmp_path / "gatt", *rows, base, TRAINING)
    for run in ("pretrain", "lora", "chat-lora", "sft", "gatt"):
        right = run.removeprefix("chat-")
        for command in {"pretrain", "lora", "sft", "gatt"} - {right}:
            with pytest.raises(SystemExit) as end:
                main([command, "--resume", "--out", str(tmp_path / run), "--device", "cpu"])
            assert end.value.code == 2
            error = capsys.readouterr().err
            assert error.endswith(f": minillama {right} --resume --out {tmp_path / run}\n")
    with pytest.raises(ValueError, match="holds a run of `minillama lora --data`"):
        LoRARun.resume(tmp_path / "chat-lora")


def test_an_earlier_config_that_names_no_kind_is_told_by_its_tables(tmp_path, base):
    run = new_run(tmp_path / "run", base)
    path = run.folder / "config.toml"
    path.write_text(path.read_text().replace('kind = "sft"', ""))
    assert SftRun.resume(run.folder).step == 0
    with pytest.raises(
        ValueError, match=r"has no table \[adapter\]: this is no run of `minillama l"
    ):
        LoRARun.resume(run.folder)


def test_the_checkpoint_says_in_which_format_it_was_spoken_to(tmp_path, base, chats, capsys):
    more = ("--chat-format", "alpaca", "--seq-len", "250")
    sft(base, chats, tmp_path / "run", *more)
    assert "in the format alpaca" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoint"
    assert load(checkpoint)[1].chat_format == "alpaca"
    before = bytes_of(checkpoint)
    shutil.rmtree(checkpoint)  # a resumed run knows it, too
    sft(base, chats, tmp_path / "run", *more, "--resume")
    assert bytes_of(checkpoint) == before


def test_markers_in_dialogues_are_refused_or_spaced(tmp_path, base, chats, capsys):
    lines = chats.read_text().splitlines()
    for place, marker in ((4, "[INST]"), (8, "</s>"), (8, "<s>")):
        lines[place] = lines[place].replace("Which", f"{marker} Which")
    chats.write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        sft(base, chats, tmp_path / "run")
    shown = capsys.readouterr().err
    assert "2 dialogues cannot be used:\n" in shown
    assert f"\n{chats}, line 5: Message 1 (user) contains '[INST]'" in shown
    assert f"\n{chats}, line 9: Message 1 (user) contains" in shown
    assert "minillama sft --neutralise" in shown
    assert not (tmp_path / "run").exists()

    sft(base, chats, tmp_path / "run", "--neutralise")
    shown = capsys.readouterr().out
    assert "2 of 60 messages contained markers of the format llama2: a space was put" in shown
    with safe_open(tmp_path / "run" / "tokens" / "examples.safetensors", "np") as file:
        texts = [small_tokenizer().decode(row[0].tolist()) for row in file.get_tensor("rows")]
    assert sum("[ INST] Which 4?" in text for text in texts) == 1
    assert sum("< /s> < s> Which 8?" in text for text in texts) == 1
    with pytest.raises(SystemExit):
        sft(base, chats, tmp_path / "other")
    main(["sft", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"])


def test_steps_take_the_place_of_epochs(tmp_path, base, chats):
    flags = ["--steps", "3", "--batch-size", "1", "--accumulation", "2", "--device", "cpu"]
    more = ["--data", str(chats), "--out", str(tmp_path / "run"), "--seq-len", str(SEQ_LEN)]
    main(["sft", str(base), *flags, *more])
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    expected = {"steps": 3, "learning_rate": 2e-5, "weight_decay": 0.1, "warmup_steps": 0}
    assert expected.items() <= settings["training"].items()


def test_the_papers_settings_are_the_preset():
    paper = SFT_PRESETS["llama2"]
    assert (paper.learning_rate, paper.weight_decay, paper.seq_len) == (2e-5, 0.1, 4096)
    assert (paper.batch_size * paper.accumulation, paper.warmup_steps, SFT_EPOCHS) == (64, 0, 2)
    for flags, preset in (
        (["base", "--data", "chat.jsonl"], paper),
        (["base", "--data", "toy"], SFT_PRESETS["toy"]),
        (["--data", "toy", "--preset", "llama2"], paper),
    ):
        assert asdict(sft_defaults(flags).training) == asdict(preset)


def test_the_help_says_that_epochs_give_the_steps(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--steps INT" in text
    assert "(default: as many as --epochs take)" in text
    assert "2200" not in text


def test_few_dialogues_are_told_flags_with_which_they_are_learned(tmp_path, base, chats, capsys):
    flags = ["--batch-size", "1", "--accumulation", "64", "--seq-len", "128", "--device", "cpu"]
    line = ["sft", str(base), "--data", str(chats)]
    main([*line, "--out", str(tmp_path / "run"), *flags])
    (told,) = re.findall(r"many small steps: (.*)\n", capsys.readouterr().out)
    main([*line, "--out", str(tmp_path / "small"), *told.split(), "--epochs", "1"])
    assert "many small steps" not in capsys.readouterr().out
    training = tomllib.loads((tmp_path / "small" / "config.toml").read_text())["training"]
    assert training["learning_rate"] == pytest.approx(2e-5 * (7e9 / 28_960) ** 0.5, rel=0.1)


def test_the_toy_worlds_dialogues_fit_the_rows_of_the_toys_preset():
    tok = load_tokenizer(Path("data/toy/checkpoint/tokenizer.model"))
    for split in ("train", "valid"):
        dialogues = toy_dialogues(split)
        assert len(tokenise(dialogues, tok, seq_len=SFT_PRESETS["toy"].seq_len)) == len(dialogues)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the model, and the dialogues it is to learn from: minillama sft MODEL --data"),
        (["BASE"], "Name the model, and the dialogues"),
        (["nowhere", "--data", "CHATS"], "There is no nowhere"),
        (["BASE", "--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["BASE", "--data", "BAD", *FLAGS], "bad.jsonl, line 2: it is no JSON"),
        (["BASE", "--data", "ONE", *FLAGS], "There are 1 dialogues, but at least 2 are needed"),
        (["BASE", "--data", "CHATS", "--preset", "toi"], "no preset of fine-tuning 'toi'"),
        (["BASE", "--data", "CHATS", *FLAGS, "--steps", "3"], "Both --steps and --epochs say"),
        (["BASE", "--data", "CHATS", "--chat-format", "lama2"], "no chat format 'lama2'"),
        (
            ["BASE", "--data", "CHATS", "--chat-format", "chatml"],
            "minillama: The chat format chatml needs the piece",
        ),
    ],
)
def test_a_mistake_is_one_text_and_leaves_nothing(
    tmp_path, base, chats, capsys, arguments, message
):
    line = chats.read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(line)
    (tmp_path / "bad.jsonl").write_text(f"{line}\n{{")
    names = {name.upper(): str(tmp_path / f"{name}.jsonl") for name in ("chats", "one", "bad")}
    names["BASE"], out = str(base), tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["sft", *(names.get(a, a) for a in arguments), "--out", str(out), "--device", "cpu"])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_model_that_is_there_is_not_overwritten(tmp_path, base, chats, capsys):
    sft(base, chats, tmp_path / "run")
    with pytest.raises(SystemExit):
        sft(base, chats, tmp_path / "run")
    assert "exists and is not overwritten" in capsys.readouterr().err
