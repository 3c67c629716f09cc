"""Models of the Hugging Face hub by name: `load("org/name")`.

The downloading is huggingface_hub's (`pip install 'minillama[hub]'`): it tries again where it was
cut off, and keeps the files that came whole in its own cache, which transformers and others share.
This file says which files are needed, and what an answer of the hub means for the user.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from minillama.checkpoint.fetch import CATALOGUE, fetched

TIMEOUT = 10.0  # seconds for the hub's first answer

# The formats of weights, best first: safetensors cannot execute anything, and pickles
# (Hugging Face's old ones, Meta's) are read as numbers alone.
_WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
    r"consolidated\.\d+\.pth",
)
_BESIDE = {
    "chat_template.jinja",
    "checklist.chk",
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
_INDEX = ".index.json"  # which shard holds which tensor
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on the disk, for the user, in one file


def local_path(model: str | os.PathLike[str]) -> Path:
    """Where a model lies on this disk, be it given by a path or by a name.

    What exists is a path. A name of `minillama fetch` is what was fetched. "org/name" is a model of
    the hub: it is downloaded, once; unless there is a folder `org` here, which makes it a path that
    was mistyped. Anything else is returned as it is.

    Raises FileNotFoundError for a model that was not fetched yet, and what `download` raises.
    """
    path = Path(model)
    name = path.as_posix()
    if path.exists():
        return path
    if name in CATALOGUE:
        if (found := fetched(name)) is None:
            raise FileNotFoundError(f"{name} was not fetched yet: minillama fetch {name}")
        return found
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists():
        return download(name)
    return path


def transformers_name(model: str) -> str:
    """What transformers opens a model by, given as for `local_path`; "" where it cannot.

    A folder of Hugging Face's is its path; a model of the hub, its name there.
    """
    if Path(model).exists():
        return model if (Path(model) / "config.json").is_file() else ""
    return CATALOGUE[model].hub if model in CATALOGUE else model


def files_needed(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that `load` reads: config, tokenizer, weights in one format.

    Weights are safetensors where there are any; pickles only where there is nothing else; code
    never. Raises ValueError if there are no weights that it reads.
    """
    names = list(names)
    for pattern in _WEIGHTS:
        if weights := [name for name in names if re.fullmatch(pattern, name)]:
            indices = {re.sub(r"-\d+-of-\d+", "", name) + _INDEX for name in weights}
            return weights + [name for name in names if name in _BESIDE | indices]
    raise ValueError(
        f"there are no weights that minillama reads: no model.safetensors, pytorch_model.bin or "
        f"consolidated.00.pth, but {', '.join(sorted(names)[:8]) or 'nothing'}. Of a GGUF file, "
        f"name the file: download it, and load it by its path"
    )


def download(name: str) -> Path:
    """The folder of the hub's model `name` on this disk, downloaded as far as it is not there yet.

    A token is taken from HF_TOKEN or from `hf auth login`. Without a way to the hub, what was
    downloaded before is used.

    Raises ValueError where the library is not installed, and for a model without weights that
    minillama reads; OSError, saying what to do, where the hub refuses or
    cannot be reached, the download is cut off or the disk is full; ValueError if the model holds
    no weights that minillama reads.
    Source: huggingface.co/docs/hub, "Download files" and "Gated models". Shown in
    notebooks/16_real_weights.ipynb.
    """
    hub = _huggingface_hub(name)
    refused = (OSError, hub.errors.HTTPError)
    try:
        files = hub.HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT).siblings or ()
    except refused as error:
        if found := _downloaded_before(hub, name):
            return found
        raise OSError(_why_not(hub, name, error)) from None
    sizes = {file.rfilename: file.size or 0 for file in files}
    try:
        needed = files_needed(sizes)
    except ValueError as error:
        raise ValueError(f"{_page(hub, name)}: {error}.") from None
    _check_disk(hub, name, {file: sizes[file] for file in needed})
    try:
        return Path(hub.snapshot_download(name, allow_patterns=needed))
    except refused as error:
        raise OSError(_why_not(hub, name, error, begun=True)) from None


def _huggingface_hub(name: str) -> ModuleType:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise ValueError(
            f"There is no {name} here. If it is a model of the Hugging Face hub: "
            f"pip install 'minillama[hub]'"
        ) from None
    return huggingface_hub


def _page(hub: ModuleType, name: str) -> str:
    return f"{hub.constants.ENDPOINT}/{name}"


def _downloaded_before(hub: ModuleType, name: str) -> Path | None:
    """The folder with the files that an earlier download left, if there are weights among them."""
    for config in ("config.json", "params.json"):
        if isinstance(file := hub.try_to_load_from_cache(name, config), str):
            folder = Path(file).parent
            with suppress(ValueError):
                files_needed(path.name for path in folder.iterdir())
                return folder
    return None


def _check_disk(hub: ModuleType, name: str, sizes: dict[str, int]) -> None:
    """Raises OSError, with the numbers, if what is not there yet of these files does not fit."""
    folder = Path(hub.constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    missing = (
        size
        for file, size in sizes.items()
        if not isinstance(hub.try_to_load_from_cache(name, file), str)
    )
    needed, free = sum(missing), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{name}: {needed:,} bytes are to come into {folder}, and {free:,} are free. Make "
            f"room, or say where there is some: HF_HOME=FOLDER."
        )


def _why_not(hub: ModuleType, name: str, error: BaseException, begun: bool = False) -> str:
    """What stands between the user and the model `name`, and what to do about it."""
    page = _page(hub, name)
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status == 401 and hub.get_token():
        return (
            f"{page}: the hub does not accept your token (401). It has expired, or was not copied "
            f"whole: make a new one at {hub.constants.ENDPOINT}/settings/tokens, and put it into "
            f"HF_TOKEN or give it to: hf auth login"
        )
    if status in (401, 404):
        return (
            f"There is no folder {name} here, and {page} is not open to everyone ({status}). Is "
            f"the name right? If Meta or another owner asks for a licence to be accepted: accept "
            f"it on that page, make a token at {hub.constants.ENDPOINT}/settings/tokens, and put "
            f"it into HF_TOKEN or give it to: hf auth login"
        )
    if status == 403:
        return (
            f"{page}: your account may not have it (403). Accept the licence on that page; Meta "
            f"answers within hours, and until then it stays closed. A token of fine grain also "
            f"needs the right to read gated repositories."
        )
    if status is not None:
        return (
            f"{page}: the hub answers {status}. It has trouble of its own, or too many ask at "
            f"once: wait a while, then try again."
        )
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return (
                f"{page} could not be written to {hub.constants.HF_HUB_CACHE} ({cause.strerror}). "
                f"Make room, or say where there is some: HF_HOME=FOLDER."
            )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if begun:
        return (
            f"{page}: the download was cut off ({reason}). The files that came whole are kept: "
            f"try again, and the others follow."
        )
    return (
        f"There is no folder {name} here, and {hub.constants.ENDPOINT} cannot be reached "
        f"({reason}), nor was the model downloaded before. With a way to the net it is downloaded "
        f"once; without one, copy its folder here from another machine."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, what that came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
