import json
from pathlib import Path

import pytest
from json_files import CHAT_CONFIG, as_bytes, byte_level_json, fallback_json
from texts import TEXT

from minillama.tokenizer import BPE, JsonTokenizer, SentencePieceTokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tok() -> SentencePieceTokenizer:
    return train_tokenizer(TEXT, 600)


@pytest.fixture(scope="session")
def bpe(tok: SentencePieceTokenizer) -> BPE:
    """The same vocabulary in the other encoder."""
    return BPE.from_proto(tok.to_proto())


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> JsonTokenizer:
    """A byte-level tokenizer.json, and beside it the file that says how texts begin and end."""
    folder = tmp_path_factory.mktemp("byte_level")
    (folder / "tokenizer.json").write_bytes(as_bytes(byte_level_json(TEXT)))
    (folder / "tokenizer_config.json").write_text(json.dumps(CHAT_CONFIG))
    return JsonTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def fallback(tok: SentencePieceTokenizer) -> JsonTokenizer:
    """The vocabulary of ``tok`` as a tokenizer.json with byte fallback."""
    return JsonTokenizer(as_bytes(fallback_json(tok)))


@pytest.fixture(scope="session")
def metaspace(tok: SentencePieceTokenizer) -> JsonTokenizer:
    """The same in the newer form, which spares a text the first space if it starts with one."""
    return JsonTokenizer(as_bytes(fallback_json(tok, metaspace=True)))


@pytest.fixture(scope="session")
def llama2(assets: Path) -> Path:
    return assets / "llama2" / "tokenizer.model"


@pytest.fixture(scope="session")
def stories260k(assets: Path) -> Path:
    return assets / "stories260K" / "tok512.model"
