"""Every test run checks the shapes that minillama's signatures state, and runs on one thread."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# is_pep484_tower: an int is a float, as everywhere in Python.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook("minillama", _CHECKER)
# Small matrices gain nothing from a second thread, and on a busy machine lose a lot.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real files (Llama 2's tokenizer, stories260K), where there is one."""
    folder = os.environ.get("MINILLAMA_TEST_ASSETS")
    if not folder:
        pytest.skip("needs real files: set MINILLAMA_TEST_ASSETS to the folder that holds them")
    return Path(folder).resolve()
