import hashlib
import json
import resource
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceProcessor

from minillama.data import packing
from minillama.data.packing import (
    HEADER_SIZE,
    IGNORE,
    Batch,
    as_batch,
    batches,
    open_rows,
    pack,
    write_tokens,
)
from minillama.tokenizer import BPE, Tokenizer
from tests.small import STORIES, small_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=8)


def seen(rows: np.ndarray, n_batches: int, batch_size: int, seed: int) -> list[int]:
    """The first id of every row that the first batches hold, in order."""
    taken = islice(batches(rows, batch_size, seed), n_batches)
    return [first for batch in taken for first in batch.tokens[:, 0].tolist()]


# --- Rows ----------------------------------------------------------------------------------------


def test_rows_by_hand():
    """Eight ids, rows of 3 + 1: neighbours share an id, and the last one fills no row."""
    rows = pack([[1, 5, 6, 2], [1, 7, 2], [1]], seq_len=3, vocab_size=10)
    assert rows.tolist() == [[1, 5, 6, 2], [2, 1, 7, 2]]


@given(documents=DOCUMENTS, seq_len=st.integers(1, 10))
@settings(deadline=None)
def test_every_id_but_the_first_is_a_target_once(documents, seq_len):
    stream = [token for document in documents for token in document]
    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens"):
            pack(documents, seq_len, 100)
        return
    rows = pack(documents, seq_len, 100)
    batch = as_batch(rows)
    dropped = (len(stream) - 1) % seq_len
    whole = stream[: len(stream) - dropped]
    assert batch.tokens.flatten().tolist() == whole[:-1]
    assert batch.targets.flatten().tolist() == whole[1:]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (32_000, np.uint16)]
)
def test_ids_take_as_few_bytes_as_the_vocabulary_allows(vocab_size, dtype):
    rows = pack([[0, vocab_size - 1]], seq_len=1, vocab_size=vocab_size)
    assert rows.dtype == dtype
    assert rows.tolist() == [[0, vocab_size - 1]]


def test_a_text_of_exactly_one_row_is_enough():
    assert pack([[1, 2, 3]], seq_len=2, vocab_size=4).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("documents", "n"), [([], 0), ([[]], 0), ([[1]], 1), ([[1, 2], [3]], 3)])
def test_a_text_shorter_than_one_row(documents, n):
    message = rf"has {n} tokens, but one row takes 4 .* a seq_len of at most {max(n - 1, 1)}\."
    with pytest.raises(ValueError, match=message):
        pack(documents, seq_len=3, vocab_size=4)


def test_the_way_out_that_the_error_names_works():
    with pytest.raises(ValueError, match="a seq_len of at most 2"):
        pack([[1, 2, 3]], seq_len=3, vocab_size=4)
    assert len(pack([[1, 2, 3]], seq_len=2, vocab_size=4)) == 1


@pytest.mark.parametrize(("document", "span"), [([0, 1, 4], "0 and 4"), ([2, -1, 3], "-1 and 3")])
def test_ids_outside_the_vocabulary(document, span):
    with pytest.raises(ValueError, match=f"between {span}, .* ids 0 to 3.*model's own tokenizer"):
        pack([document], seq_len=1, vocab_size=4)


# --- Rows on the disk ----------------------------------------------------------------------------

VOCAB = small_tokenizer().vocab_size
TEXTS = st.lists(st.text(alphabet="Ada had kites \n\0é日", max_size=80), min_size=1, max_size=6)


def ids_of(path: Path) -> list[int]:
    """The ids in the file, as the library of safetensors reads them."""
    return load_file(path)["ids"].tolist()


def encoded(documents: list[str], tokenizer: Tokenizer) -> list[int]:
    """The stream as it should be: every document encoded as a whole."""
    return [i for text in documents for i in tokenizer.encode(text, bos=True, eos=True)]


@pytest.fixture
def file(tmp_path) -> Path:
    """The tokens of thirty stories."""
    write_tokens(tmp_path / "tokens.safetensors", STORIES, small_tokenizer())
    return tmp_path / "tokens.safetensors"


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "a.safetensors"
    assert write_tokens(path, ["a", "", "\n"], small_tokenizer()) == 9
    space, a = small_tokenizer().encode("\n")[0], small_tokenizer().encode("a")
    ids = np.array([1, *a, 2, 1, 2, 1, space, 13, 2], dtype=np.uint16)
    assert len(a) == 1
    content = path.read_bytes()
    text = json.loads(content[8:512])
    assert text["__metadata__"] == {
        "vocab_size": "300",
        "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    assert text["ids"] == {"dtype": "U16", "shape": [9], "data_offsets": [0, 18]}
    assert content[512:] == ids.tobytes()


def test_rows_on_the_disk_are_those_that_pack_makes(file):
    for seq_len in (1, 7, 64, 500):
        rows = open_rows(file, seq_len, VOCAB)
        ids = small_tokenizer().encode_batch(STORIES, bos=True, eos=True)
        expected = pack(ids, seq_len, VOCAB)
        assert rows.dtype == expected.dtype
        assert np.array_equal(rows, expected)


def test_rows_on_the_disk_are_windows_on_one_file(file):
    rows = open_rows(file, 10, VOCAB)
    assert np.shares_memory(rows[0], rows[1])  # the id that neighbours have in common
    assert rows.strides == (20, 2)
    assert not rows.flags.writeable
    owner = rows
    while not isinstance(owner, np.memmap):
        owner = owner.base
    assert owner.filename == file


@given(documents=TEXTS, part=st.integers(1, 20), block=st.integers(1, 100))
@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("squeeze", [False, True])
def test_parts_and_blocks_change_no_id(tmp_path_factory, squeeze, documents, part, block):
    tokenizer = small_tokenizer()
    if squeeze:  # as the vocabulary of stories260K does
        bpe = BPE.from_proto(tokenizer.to_proto())
        tokenizer = Tokenizer(replace(bpe, squeeze_spaces=True).to_proto())
    path = tmp_path_factory.getbasetemp() / f"{squeeze}.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MIN_PART", part)
        patch.setattr(packing, "BLOCK", block)
        n = write_tokens(path, documents, tokenizer)
    assert ids_of(path) == encoded(documents, tokenizer)
    assert n == len(ids_of(path))


@pytest.mark.parametrize("model", ["llama2/tokenizer.model", "stories260K/tok512.model"])
def test_a_long_document_in_parts_has_the_ids_of_the_whole(assets, model, tmp_path):
    tokenizer = Tokenizer(assets / model)
    text = (assets / "tinyshakespeare.txt").read_text()[:300_000]
    code = "".join(f"def f{i}(x):\n    return   {{x: [{i}]}}  # 日本語\n\n\n" for i in range(2000))
    write_tokens(tmp_path / "ids", [text, code], tokenizer)
    assert ids_of(tmp_path / "ids") == encoded([text, code], tokenizer)


@given(text=st.text(max_size=300), block=st.integers(1, 100))
@settings(deadline=None, max_examples=100)
def test_a_stretch_without_spaces_is_cut_where_it_must_and_loses_nothing(
    tmp_path_factory, text, block
):
    path, tokenizer = tmp_path_factory.getbasetemp() / "stretch.safetensors", small_tokenizer()
    text = text.replace("\u2581", "")  # the one character that no round trip keeps
    found = []
    for size in (block, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "MIN_PART", 5)
            patch.setattr(packing, "MAX_PART", 10)
            patch.setattr(packing, "BLOCK", size)
            write_tokens(path, [text], tokenizer)
        found.append(ids_of(path))
    assert found[0] == found[1]
    assert tokenizer.decode(found[0]) == text


def test_a_million_characters_without_a_space_lose_nothing(tmp_path):
    text = "kites" * 200_000
    write_tokens(tmp_path / "ids", [text], small_tokenizer())
    reader = SentencePieceProcessor(model_proto=small_tokenizer().to_proto())
    assert reader.decode(ids_of(tmp_path / "ids")) == text


def test_documents_are_taken_once_and_one_by_one(tmp_path):
    taken = []
    stream = (taken.append(i) or f"story {i}" for i in range(50))
    write_tokens(tmp_path / "ids", stream, small_tokenizer())
    assert taken == list(range(50))
    assert ids_of(tmp_path / "ids") == encoded([f"story {i}" for i in range(50)], small_tokenizer())


def test_a_large_vocabulary_takes_four_bytes_an_id(tmp_path):
    small = BPE.from_proto(small_tokenizer().to_proto())
    more = tuple(chr(0x20000 + i) for i in range(2**16 + 1 - VOCAB))  # rare kanji, one piece each
    large = replace(
        small,
        pieces=small.pieces + more,
        scores=small.scores + tuple(-1000.0 - i for i in range(len(more))),
        kinds=small.kinds + (small.kinds[-1],) * len(more),
    )
    tokenizer = Tokenizer(large.to_proto())
    write_tokens(tmp_path / "ids", ["a" + more[-1]], tokenizer)
    rows = open_rows(tmp_path / "ids", 3, 2**16 + 1)
    assert rows.dtype == np.uint32
    assert rows.tolist() == [[1, *tokenizer.encode("a"), 2**16, 2]]


# --- Files that are not right --------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(file):
    """In every byte of the header, and in the ids at the start, the end and in between."""
    content = bytearray(file.read_bytes())
    places = [*range(HEADER_SIZE + 10), *range(len(content) - 10, len(content))]
    places += range(HEADER_SIZE, len(content), 97)
    for place in places:
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokens\.safetensors (is|holds|has)"):
            open_rows(file, 10, VOCAB)
        content[place] ^= 1 << place % 8
    file.write_bytes(content)
    open_rows(file, 10, VOCAB)


def test_only_the_ids_are_left_unread_without_verifying(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: the SHA-256 of its ids"):
        open_rows(file, 10, VOCAB)
    open_rows(file, 10, VOCAB, verify=False)
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="no file of token ids"):
        open_rows(file, 10, VOCAB, verify=False)


@pytest.mark.parametrize("change", [-1, -100, 1, 100])
def test_a_file_that_lost_its_end_or_gained_one(file, change):
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = rf"has {len(content) + change:,} bytes, but its .* ids take {len(content):,}: a part"
    with pytest.raises(ValueError, match=message):
        open_rows(file, 10, VOCAB)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 600, b"\xff" * 600, b"12345678[]".ljust(600)]
)
def test_a_file_of_something_else(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no file of token ids, or its first 512 bytes"):
        open_rows(file, 10, VOCAB)


def test_a_safetensors_file_of_something_else(file):
    save_file({"weight": np.zeros((20, 20), np.float32)}, file)
    with pytest.raises(ValueError, match="is no file of token ids"):
        open_rows(file, 10, VOCAB)


def test_no_file_or_a_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no file of token ids .* makes one"):
            open_rows(path, 10, VOCAB)


def test_ids_of_another_vocabulary(file):
    with pytest.raises(ValueError, match=r"vocabulary of 300, but 32000 are asked for"):
        open_rows(file, 10, 32_000)


def test_a_file_shorter_than_one_row(tmp_path):
    write_tokens(tmp_path / "ids", [""], small_tokenizer())
    with pytest.raises(ValueError, match="has 2 tokens, but one row takes 11"):
        open_rows(tmp_path / "ids", 10, VOCAB)


# --- Writing that fails --------------------------------------------------------------------------


def failing():
    yield from STORIES
    raise RuntimeError("the shard is broken")


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "no documents to write to .*tokens.safetensors: give at least one"),
        (failing(), RuntimeError, "the shard is broken"),
        (map(open, ["no such file"]), OSError, r"was not written \(.*no such file.*nothing was"),
        (["fine", "\ud800"], ValueError, "not valid Unicode"),
        (["fine", None], TypeError, "str"),
    ],
)
def test_whatever_goes_wrong_leaves_the_earlier_file(file, documents, error, message):
    before = file.read_bytes()
    with pytest.raises(error, match=message):
        write_tokens(file, documents, small_tokenizer())
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_leaves_the_earlier_file(file):
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(OSError, match=r"tokens\.safetensors was not written \(.*large"):
            write_tokens(file, STORIES * 100, small_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_what_a_killed_process_left_is_in_nobodys_way(file):
    left = file.with_name(f".{file.name}.new")
    left.write_bytes(b"half a file" * 1000)
    write_tokens(file, STORIES[:3], small_tokenizer())
    assert ids_of(file) == encoded(STORIES[:3], small_tokenizer())
    assert list(file.parent.iterdir()) == [file]


def test_a_new_folder_is_made(tmp_path):
    write_tokens(tmp_path / "new" / "folder" / "ids", STORIES, small_tokenizer())
    assert open_rows(tmp_path / "new" / "folder" / "ids", 10, VOCAB).shape[1] == 11


# --- Batches -------------------------------------------------------------------------------------


def test_the_target_is_the_next_token():
    batch = as_batch(np.array([[1, 5, 6, 2], [2, 1, 7, 2]], dtype=np.uint16))
    assert batch.tokens.tolist() == [[1, 5, 6], [2, 1, 7]]
    assert batch.targets.tolist() == [[5, 6, 2], [1, 7, 2]]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_targets_that_are_ignored_do_not_count():
    assert Batch(torch.ones(1, 3).long(), torch.tensor([[IGNORE, 0, IGNORE]])).n_targets == 1


@given(n_rows=st.integers(1, 20), batch_size=st.integers(1, 25), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_each_epoch_shows_every_row_once(n_rows, batch_size, seed):
    rows = np.stack([np.arange(n_rows), np.arange(n_rows)], axis=1).astype(np.uint16)
    epochs = 3
    order = seen(rows, -(-epochs * n_rows // batch_size), batch_size, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    rows = np.stack([np.arange(50), np.arange(50)], axis=1).astype(np.uint16)
    order = seen(rows, 20, batch_size=5, seed=3)
    assert seen(rows, 10, batch_size=10, seed=3) == order  # the same, cut otherwise
    torch.manual_seed(1)
    np.random.default_rng(1)
    assert seen(rows, 20, batch_size=5, seed=3) == order
    assert seen(rows, 20, batch_size=5, seed=4) != order
    assert order[:50] != order[50:]  # the second epoch has an order of its own
    assert order[:50] != list(range(50))


def test_rows_stay_whole():
    rows = np.arange(40, dtype=np.uint16).reshape(8, 5)
    for batch in islice(batches(rows, batch_size=3, seed=0), 10):
        whole = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
        assert all(row in rows.tolist() for row in whole.tolist())


# --- Memory --------------------------------------------------------------------------------------

STREAMS = """
import resource, sys
from itertools import islice
from minillama.data import packing
from minillama.data.mixture import Batches
from minillama.data.packing import open_rows, write_tokens
from tests.small import STORIES, small_tokenizer

limit, n_bytes, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
packing.BLOCK = 2**14
tokenizer = small_tokenizer()

def documents(n_bytes):
    page = " ".join(STORIES)
    for i in range(n_bytes // len(page)):
        yield f"{i} {page}"

def stream(n_bytes):
    n_ids = write_tokens(path, documents(n_bytes), tokenizer)
    rows = open_rows(path, 64, tokenizer.vocab_size)
    batches = Batches({"text": rows}, {"text": 1.0}, 64, seed=0)
    n_seen = sum(batch.tokens.numel() for batch in islice(batches, len(rows) // 64))
    return n_ids, n_seen

for _ in range(3):
    stream(10**6)  # whatever is loaded or set up once
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, resource.RLIM_INFINITY))
print(*stream(n_bytes))
"""


@pytest.mark.slow  # 30 s: a hundred times the limit has to be encoded
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_hundred_times_the_memory_limit_streams_through(tmp_path):
    limit = 15 * 10**5  # bytes, beyond what a text of two thirds of that takes
    command = [sys.executable, "-c", STREAMS, str(limit), str(100 * limit), str(tmp_path / "ids")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_ids, n_seen = map(int, done.stdout.split())
    assert n_ids > 45e6
    assert n_ids - n_seen <= 64 * 64 + 64  # one epoch: all but what fills no row and no batch
