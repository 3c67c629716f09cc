from pathlib import Path

import pytest
from texts import TEXT

from minillama.tokenizer import BPE, Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return train_tokenizer(TEXT, 600)


@pytest.fixture(scope="session")
def bpe(tok: Tokenizer) -> BPE:
    """The same vocabulary in the other encoder."""
    return BPE.from_proto(tok.to_proto())


@pytest.fixture(scope="session")
def llama2(assets: Path) -> Path:
    return assets / "llama2" / "tokenizer.model"


@pytest.fixture(scope="session")
def stories260k(assets: Path) -> Path:
    return assets / "stories260K" / "tok512.model"
