import json

import pytest
from json_files import CHAT_CONFIG, as_bytes, byte_level_json
from small import STORIES, small_tokenizer

from minillama.tokenizer import SentencePieceTokenizer, Tokenizer
from minillama.tokenizer.vocabulary import ModelProto


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    """SentencePiece, as the formats of Meta want it."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def chatml_tok(tmp_path_factory) -> Tokenizer:
    """Byte-level, with <|im_start|> and <|im_end|>."""
    folder = tmp_path_factory.mktemp("chatml")
    (folder / "tokenizer.json").write_bytes(as_bytes(byte_level_json("".join(STORIES))))
    (folder / "tokenizer_config.json").write_text(json.dumps(CHAT_CONFIG))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def step_tok(tok: Tokenizer) -> Tokenizer:
    """SentencePiece with the piece <step>, as Code Llama 70B Instruct has it."""
    proto = ModelProto.FromString(tok.to_bytes())
    proto.pieces.add(piece="<step>", score=0.0, type=proto.SentencePiece.CONTROL)
    return SentencePieceTokenizer(proto.SerializeToString())
