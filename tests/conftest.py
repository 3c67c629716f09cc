"""What holds in every test run.

The shapes that minillama's signatures state are checked. Torch has one thread. And a run is the
same every time: each test begins at torch's seed 0 and Hypothesis draws the same examples, so that
a failure is the change's doing, not luck's. Others: `pytest tests --hypothesis-profile search`.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# is_pep484_tower: an int is a float, as everywhere in Python.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook("minillama", _CHECKER)
# Small matrices gain nothing from a second thread, and on a busy machine lose a lot.
torch.set_num_threads(1)

# A deadline would fail on a busy machine, whatever the code does.
settings.register_profile("search", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")
torch.manual_seed(0)  # for what modules draw when they are imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real files (Llama 2's tokenizer, stories260K), where there is one."""
    folder = os.environ.get("MINILLAMA_TEST_ASSETS")
    if not folder:
        pytest.skip("needs real files: set MINILLAMA_TEST_ASSETS to the folder that holds them")
    return Path(folder).resolve()
