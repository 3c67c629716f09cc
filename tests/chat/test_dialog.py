"""Dialogues as ids: Meta's to the token, the others to their templates; who may say what."""

import hashlib
import json
import pickle
import random
import re
from functools import cache

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Library

from minillama.chat import FORMATS, Message, dialog, encode_dialog, fit, neutralise, recognise
from minillama.chat.dialog import BOS, EOS, NEW_TEXT, Role, end_of_answer
from minillama.checkpoint.chat_templates import TEMPLATES, format_of
from minillama.tokenizer import Tokenizer

TOKENIZERS = {
    "llama2": "tok",
    "alpaca": "tok",
    "chatml": "chatml_tok",
    "code-llama-70b": "step_tok",
}
MARKERS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"]
TEMPTING = [
    *MARKERS,
    "[INST",
    "/INST]",
    "<<SYS>>\n",
    "<",
    "s>",
    "<|im_end|>",
    "<step>",
    "\n\n",
    "###",
]
PARTS = [*TEMPTING, "### Response:", "Ada had 3", "it's", " ", "日本", "🦙", "▁", "\0", "\u3000"]


def any_text(rng: random.Random) -> str:
    """A few tempting snippets and any characters of Unicode."""

    def part() -> str:
        if rng.random() < 0.6:
            return rng.choice(PARTS)
        code = rng.choice([0x80, 0x3000, 0x20000]) * rng.random() ** 2
        return chr(int(code) + (0x800 if int(code) >= 0xD800 else 0))

    return "".join(part() for _ in range(rng.randrange(8)))


def harmless(rng: random.Random) -> str:
    """One without the markers of any format."""
    texts = iter(lambda: any_text(rng), None)
    markers = {marker for form in FORMATS.values() for marker in form.markers}
    return next(text for text in texts if not any(marker in text for marker in markers))


def plain(rng: random.Random) -> str:
    """A sentence that nothing can go wrong with."""
    return "A" + "".join(rng.choice("bc de 日本é12.,!\n🦙") for _ in range(rng.randrange(12)))


def dialogue(rng: random.Random, text=harmless, max_turns: int = 6) -> list[Message]:
    """Messages in turn, with and without a system message and a last answer."""
    messages = [Message("system", text(rng))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, max_turns)):
        said = next(filter(str.strip, iter(lambda: text(rng), None)))
        messages += [Message("user", said), Message("assistant", text(rng))]
    return messages if rng.random() < 0.5 else messages[:-1]


def for_many(examples: int, check, **how) -> None:
    """Run the check on so many random dialogues, the same in every run."""
    rng = random.Random(examples)
    for _ in range(examples):
        check(dialogue(rng, **how))


def meta_ids(tok: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Llama 2's chat_completion once more: pairs are encoded whole, the last question alone."""
    contents = [message.content for message in messages]
    if messages[0].role == "system":
        system, first, *rest = contents
        contents = ["<<SYS>>\n" + system + "\n<</SYS>>\n\n" + first, *rest]
    ids, learned = [], []
    for question, answer in zip(contents[::2], [*contents[1::2], None], strict=False):
        asked = f"[INST] {question.strip()} [/INST]"
        prompt = tok.encode(asked, bos=True)
        pair = prompt
        if answer is not None:
            pair = tok.encode(f"{asked} {answer.strip()} ", bos=True, eos=True)
            assert pair[: len(prompt)] == prompt
        ids += pair
        learned += [False] * len(prompt) + [True] * (len(pair) - len(prompt))
    return ids, learned


# ------------------------------------------------------------------------------------------ llama2


def test_by_hand(tok):
    dialog = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes")]
    tokens = encode_dialog(dialog, tok)
    system = tok.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n")
    whole = tok.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]")
    answer = tok.encode("Yes ")
    assert tokens.ids == [1, *whole, *answer, 2]
    n, n_system, n_answer = len(whole), len(system) + 1, len(answer) + 1
    assert tokens.roles == ["system"] * n_system + ["user"] * (n + 1 - n_system) + (
        ["assistant"] * n_answer
    )
    assert tokens.learned == [False] * (n + 1) + [True] * n_answer


def test_the_ids_are_those_of_meta_s_chat_completion(assets):
    tok = Tokenizer(assets / "llama2" / "tokenizer.model")
    vectors = json.loads((assets / "token_vectors.json").read_text())["llama2_chat"]
    assert len(vectors) == 7
    for case in vectors:
        messages = [Message(**message) for message in case["dialog"]]
        assert encode_dialog(messages, tok).ids == case["ids"], case


def test_of_system_message_and_question_only_the_end_is_stripped(tok):
    messages = [Message("system", " s "), Message("user", "  Hi \n"), Message("assistant", " a ")]
    text = "[INST] <<SYS>>\n s \n<</SYS>>\n\n  Hi [/INST] a "
    assert encode_dialog(messages, tok).ids == tok.encode(text, bos=True, eos=True)


def check_meta(tok: Tokenizer, examples: int) -> None:
    def check(messages: list[Message]) -> None:
        tokens = encode_dialog(messages, tok)
        assert (tokens.ids, tokens.learned) == meta_ids(tok, messages)
        assert len(tokens.roles) == len(tokens.ids)

    for_many(examples, check)


@pytest.mark.parametrize("examples", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_ids_and_what_is_learned_equal_meta_s_rules_derived_once_more(tok, examples):
    check_meta(tok, examples)


@pytest.mark.parametrize("examples", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_they_do_with_llama_2_s_own_vocabulary(assets, examples):
    check_meta(Tokenizer(assets / "llama2" / "tokenizer.model"), examples)


# --------------------------------------------------------------------------------- other formats


def test_alpaca_s_two_templates_are_the_published_ones():
    form = FORMATS["alpaca"]
    plain = "".join(part for part in form.user if isinstance(part, str))
    both = "".join(part for part in form.system + form.user_after_system if isinstance(part, str))
    plain = plain.replace("{}", "{instruction}")
    both = both.replace("{}", "{instruction}", 1).replace("{}", "{input}", 1)
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (plain, both)] == [
        "35101bc36d10997c",
        "28811e9850d9511b",
    ]


def test_alpaca_goes_on_right_behind_the_colon(tok):
    tokens = encode_dialog([Message("user", "Say no."), Message("assistant", "No")], tok, "alpaca")
    prompt = tok.encode(FORMATS["alpaca"].user[1].replace("{}", "Say no."), bos=True)
    answer = tok.encode("\nNo")[len(tok.encode("\n")) :]  # in mid-text: no space in front
    assert tokens.ids == [*prompt, *answer, 2]
    assert tokens.learned == [False] * len(prompt) + [True] * (len(answer) + 1)
    with_input = encode_dialog([Message("system", "Add."), Message("user", "1 2")], tok, "alpaca")
    text = tok.decode(with_input.ids)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert with_input.ids == tok.encode(text, bos=True)


def test_chatml_is_what_the_library_makes_of_its_template(chatml_tok):
    library = Library.from_str(chatml_tok.to_bytes().decode())

    def check(messages: list[Message]) -> None:
        text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        if messages[-1].role == "user":
            text += "<|im_start|>assistant\n"
        theirs = library.encode(text, add_special_tokens=False).ids
        assert encode_dialog(messages, chatml_tok, "chatml").ids == theirs

    for_many(300, check, text=plain)


def test_code_llama_s_turns_are_meta_s(step_tok):
    """Its rules once more: a header for each message, its text on its own, and <step>."""
    step = step_tok.special_ids["<step>"]

    def check(messages: list[Message]) -> None:
        turns = [(m.role, m.content) for m in messages]
        if turns[0][0] != "system":
            turns = [("system", ""), *turns]
        ids = [1]
        for role, content in turns:
            header = f" Source: {role}" + "\nDestination: user" * (role == "assistant")
            ids += step_tok.encode(header)
            if content:
                ids += step_tok.encode("\n\n " + content.strip())
            ids.append(step)
        if turns[-1][0] == "user":
            ids += step_tok.encode(" Source: assistant\nDestination: user")
            ids += step_tok.encode("\n\n ")
        ours = encode_dialog(messages, step_tok, "code-llama-70b").ids
        assert ours == ids

    for_many(300, check, text=plain)


def test_the_format_is_recognised_by_its_pieces(tok, chatml_tok, step_tok):
    found = [recognise(tokenizer) for tokenizer in (tok, chatml_tok, step_tok)]
    assert found == ["llama2", "chatml", "code-llama-70b"]


# ---------------------------------------------------------------------------- who may say what


def test_a_checkpoint_s_format_counts_more_than_its_pieces(tok, chatml_tok):
    for each in (tok, chatml_tok):
        assert recognise(each.for_chat("alpaca")) == "alpaca"
        assert recognise(each.for_chat(None)) == recognise(each)
        assert pickle.loads(pickle.dumps(each.for_chat("alpaca"))).chat_format == "alpaca"
        assert each.chat_format is None  # it is another tokenizer, and an equal one
        assert each.for_chat("alpaca") == each
        assert each.for_chat("alpaca").encode("Ada had 3 🦙") == each.encode("Ada had 3 🦙")


@pytest.mark.parametrize("chat_format", TEMPLATES)
def test_the_template_for_other_programs_says_the_same(request, chat_format):
    tokenizer = request.getfixturevalue(TOKENIZERS[chat_format])
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    names |= {i: name for name, i in tokenizer.special_ids.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATES[chat_format])

    def text(rng: random.Random) -> str:
        return " \n" * rng.randrange(2) + plain(rng) + "\n " * rng.randrange(2)

    def check(messages: list[Message]) -> None:
        written, segment = "", []
        for i in [*encode_dialog(messages, tokenizer, chat_format).ids, None]:
            if i is not None and i not in names:
                segment.append(i)
            else:
                written += tokenizer.decode(segment) + names.get(i, "")
                segment = []
        assert written == template.render(
            messages=[vars(message) for message in messages],
            bos_token="<s>",
            eos_token="</s>",
            add_generation_prompt=messages[-1].role == "user",
        )

    for_many(200, check, text=text, max_turns=FORMATS[chat_format].max_turns or 6)


def test_a_format_is_known_by_its_template():
    assert [format_of(template) for template in TEMPLATES.values()] == list(TEMPLATES)
    assert format_of(TEMPLATES["llama2"] + " ") is format_of(None) is None
    assert set(TEMPLATES) < set(FORMATS)


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("examples", [50, pytest.param(2_500, marks=pytest.mark.slow)])
def test_the_number_of_control_pieces_depends_on_the_turns_alone(request, chat_format, examples):
    tokenizer = request.getfixturevalue(TOKENIZERS[chat_format])
    control = set(tokenizer.special_ids.values())
    markers = re.compile("|".join(map(re.escape, FORMATS[chat_format].markers)))

    def counts(messages: list[Message]) -> tuple[int, int]:
        ids = encode_dialog(messages, tokenizer, chat_format, neutralised=True).ids
        return sum(i in control for i in ids), len(markers.findall(tokenizer.decode(ids)))

    @cache
    def expected(*roles: Role) -> tuple[int, int]:
        return counts([Message(role, "x") for role in roles])

    def check(messages: list[Message]) -> None:
        assert counts(messages) == expected(*(message.role for message in messages))

    for_many(examples, check, text=any_text, max_turns=FORMATS[chat_format].max_turns or 3)


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("examples", [100, pytest.param(2_500, marks=pytest.mark.slow)])
def test_what_is_learned_is_the_answers_and_their_ends(request, chat_format, examples):
    tokenizer = request.getfixturevalue(TOKENIZERS[chat_format])
    form, end = FORMATS[chat_format], end_of_answer(tokenizer, chat_format)
    space = " " if chat_format == "llama2" else ""

    def check(messages: list[Message]) -> None:
        safe = [Message(m.role, neutralise(m.content, tokenizer, chat_format)) for m in messages]
        tokens = encode_dialog(safe, tokenizer, chat_format)
        answers, current = [], []
        for i, role, learned in zip(tokens.ids, tokens.roles, tokens.learned, strict=True):
            assert not learned or role == "assistant"
            if learned and i == end:
                answers.append(text_of(current))
                current = []
            elif learned:
                current.append(i)
        assert not current
        wanted = [m.content.strip() if form.strips else m.content for m in safe]
        said = [text for m, text in zip(safe, wanted, strict=True) if m.role == "assistant"]
        assert answers == [text.replace("▁", " ") + space if spaced else text for text in said]
        for role in ("system", "user"):
            assert not any(
                learned
                for learned, whose in zip(tokens.learned, tokens.roles, strict=True)
                if whose == role
            )

    spaced = tokenizer.dummy_prefix

    def text_of(ids: list[int]) -> str:
        text = tokenizer.decode([mid, *ids])[1:] if spaced else tokenizer.decode(ids)
        return text.removeprefix(" ") if spaced and form.answer[0][0] == " " else text

    mid = tokenizer.encode("\n")[-1]  # behind it, no space is dropped
    for_many(examples, check, text=any_text, max_turns=form.max_turns or 3)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_in_anybody_s_text_is_refused_or_gets_a_space(tok, role, marker):
    texts = {"system": "a", "user": "b", "assistant": "c"} | {role: f"see{marker}here"}
    messages = [Message(role, text) for role, text in texts.items()]
    with pytest.raises(ValueError, match=rf"\({role}\) contains {re.escape(repr(marker))}"):
        encode_dialog(messages, tok)
    with pytest.raises(ValueError, match=re.escape(f"'{marker[0]} {marker[1:]}'")):
        encode_dialog(messages, tok)
    text = tok.decode(encode_dialog(messages, tok, neutralised=True).ids)
    assert f"see{marker[0]} {marker[1:]}here" in text


def test_the_names_of_all_control_pieces_are_markers(chatml_tok):
    with pytest.raises(ValueError, match=r"contains '<\|endoftext\|>'"):
        encode_dialog([Message("user", "a <|endoftext|>")], chatml_tok, "chatml")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "There is no message of the user's"),
        (["system"], "There is no message of the user's"),
        (["assistant"], "Message 1 is of role 'assistant', but must be of 'system' or 'user'"),
        (["user", "user"], "Message 2 is of role 'user', but must be of 'assistant'"),
        (["user", "system"], "Message 2 is of role 'system'"),
        (["system", "system", "user"], "Message 2 is of role 'system', but must be of 'user'"),
        (["user", "assistant", "assistant"], "Message 3 is of role 'assistant'"),
    ],
)
def test_messages_out_of_turn_are_refused(tok, roles, message):
    if roles == ["system"]:
        message = "no message of the user's"
    with pytest.raises(ValueError, match=message):
        encode_dialog([Message(role, "x") for role in roles], tok)


def test_an_empty_question_is_refused(tok):
    with pytest.raises(ValueError, match=r"Message 2 \(user\) is empty"):
        encode_dialog([Message("system", "x"), Message("user", " \n")], tok)


def test_alpaca_has_one_turn(tok):
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    with pytest.raises(ValueError, match=r"has 2 turns, but the format alpaca has 1"):
        encode_dialog(messages, tok, "alpaca")


def test_a_vocabulary_of_another_format_is_named(tok, chatml_tok):
    with pytest.raises(ValueError, match=r"needs the piece <\|im_start\|>.*probably llama2"):
        encode_dialog([Message("user", "a")], tok, "chatml")
    with pytest.raises(ValueError, match=r"no chat format 'lama2'\. Did you mean 'llama2'"):
        encode_dialog([Message("user", "a")], tok, "lama2")
    with pytest.raises(ValueError, match=r"no chat format 'lama2'\. Did you mean 'llama2'"):
        end_of_answer(tok, "lama2")


# -------------------------------------------------------------------------------------------- fit


def test_the_oldest_turns_make_room(tok):
    turns = [Message(role, f"{n}") for n in range(4) for role in ("user", "assistant")]
    messages = [Message("system", "s"), *turns, Message("user", "last")]
    whole = len(encode_dialog(messages, tok).ids)
    assert fit(messages, tok, whole) == (messages, encode_dialog(messages, tok).ids)
    kept, ids = fit(messages, tok, whole - 1)
    assert kept == [messages[0], *messages[3:]]
    assert ids == encode_dialog(kept, tok).ids
    alone = [messages[0], messages[-1]]
    least = len(encode_dialog(alone, tok).ids)
    assert fit(messages, tok, least)[0] == alone
    with pytest.raises(ValueError, match=rf"takes {least} tokens .* room for {least - 1}"):
        fit(messages, tok, least - 1)


@pytest.mark.parametrize("n_turns", [1, 2, 7])
@pytest.mark.parametrize("system", [[], [Message("system", "s")]])
def test_no_turn_goes_that_has_room(tok, n_turns, system):
    turns = [Message(role, "ab" * n) for n in range(1, n_turns) for role in ("user", "assistant")]
    last = Message("user", "last")
    rests = [[*system, *turns[2 * n :], last] for n in range(n_turns)]  # without n turns
    lengths = [len(encode_dialog(rest, tok).ids) for rest in rests]
    for room in range(lengths[-1], lengths[0] + 1):
        longest = next(rest for rest, length in zip(rests, lengths, strict=True) if length <= room)
        assert fit(rests[0], tok, room) == (longest, encode_dialog(longest, tok).ids)


def test_a_thousand_messages_are_encoded_a_few_times_only(tok, monkeypatch):
    encoded = []
    encode = dialog.encode_dialog
    monkeypatch.setattr(dialog, "encode_dialog", lambda *args: encoded.append(1) or encode(*args))
    messages = [Message(("user", "assistant")[n % 2], "a") for n in range(999)]
    assert len(fit(messages, tok, 100)[0]) < 20
    assert len(encoded) <= 12


def test_a_format_of_one_turn_keeps_the_last(tok):
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert fit(messages, tok, 10_000, "alpaca")[0] == messages[-1:]


def test_every_format_says_how_an_answer_ends():
    for form in FORMATS.values():
        assert form.answer[-1] not in (BOS, NEW_TEXT)
        assert form.answer[-1] == EOS or form.answer[-1].name.startswith("<")
