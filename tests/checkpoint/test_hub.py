import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_llama, small_tokenizer
from torch.testing import assert_close
from web import Page, Site, serve

from minillama.checkpoint import fetch, load, save
from minillama.checkpoint.hub import download, files_needed, local_path, transformers_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 40
FILES = {
    ".gitattributes": b"*",
    "README.md": b"# A model",
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "modeling_llama.py": b"open('was_run', 'w')",
    "onnx/model.onnx": b"onnx",
    "pytorch_model.bin": b"pickle",
    "tokenizer.model": b"pieces",
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = {"config.json", "model.safetensors", "tokenizer.model"}


def test_a_base_is_named_as_transformers_opens_it(tmp_path):
    for name in ("native", "huggingface"):
        save(tmp_path / name, small_llama(), small_tokenizer(), format=name)
    save(tmp_path / "a.gguf", small_llama(), small_tokenizer(), format="gguf")
    names = {
        str(tmp_path / "native"): "",
        str(tmp_path / "huggingface"): str(tmp_path / "huggingface"),
        str(tmp_path / "a.gguf"): "",
        "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "stories15m": "",
        "meta-llama/Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    }
    assert {name: transformers_name(name) for name in names} == names


def add_model(site: Site, name: str, files: dict[str, bytes]) -> None:
    """Let the site answer as the hub does for a model."""
    siblings = [{"rfilename": file, "size": len(body)} for file, body in files.items()]
    about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
    tree = [
        {"type": "file", "path": file, "size": len(body), "oid": etag(body)}
        for file, body in files.items()
    ]
    site.add_json(f"/api/models/{name}", about)
    site.add_json(f"/api/models/{name}/revision/main", about)
    site.add_json(f"/api/models/{name}/tree/{COMMIT}", tree)
    for file, body in files.items():
        headers = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        site.pages[f"/{name}/resolve/{COMMIT}/{file}"] = Page(body, headers=headers)


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def refuse(site: Site, status: int, code: str = "", only: str = "") -> None:
    """Let the site answer with an error, on all paths that hold `only`."""
    for path in site.pages:
        if only in path:
            site.pages[path] = Page(b"{}", status, {"X-Error-Code": code} if code else {})


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    with serve() as site:
        yield site


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(server, cache, tmp_path, monkeypatch) -> Site:
    """A stand-in for the hub that has one model, ada/small; and an empty cache, and no token."""
    server.pages.clear()
    server.asked.clear()
    add_model(server, "ada/small", FILES)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its tries
    monkeypatch.chdir(tmp_path)
    return server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Which files ---------------------------------------------------------------------------------


def test_of_all_files_only_the_needed_ones_come(hub):
    assert contents(download("ada/small")) == {name: FILES[name] for name in NEEDED}
    assert not any("modeling" in path or "pytorch" in path for _, path, _, _ in hub.asked)


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (
            ["config.json", *SHARDS, "model.safetensors.index.json", "pytorch_model.bin", "x.py"],
            ["config.json", *SHARDS, "model.safetensors.index.json"],
        ),
        (
            ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
            ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        (
            ["params.json", "checklist.chk", "consolidated.00.pth", "tokenizer.model", "LICENSE"],
            ["params.json", "checklist.chk", "consolidated.00.pth", "tokenizer.model"],
        ),
        (
            [
                "model.safetensors",
                "original/consolidated.00.pth",
                "config.json",
                "training_args.bin",
            ],
            ["model.safetensors", "config.json"],
        ),
    ],
)
def test_weights_come_in_the_best_format_there_is(names, needed):
    assert sorted(files_needed(names)) == sorted(needed)


@given(st.lists(st.sampled_from([*FILES, "../config.json", "a/model.safetensors", "params.json"])))
def test_code_is_never_needed_and_pickles_only_alone(names):
    try:
        needed = files_needed(names)
    except ValueError:
        assert not {"model.safetensors", "pytorch_model.bin"} & {*names}
        return
    assert {*needed} <= {*names}
    assert not [name for name in needed if name.endswith(".py") or "/" in name]
    assert not {"model.safetensors", "pytorch_model.bin"} <= {*needed}


def test_a_model_without_weights_that_can_be_read_is_refused(hub):
    add_model(hub, "ada/gguf", {"README.md": b"", "small.Q4_0.gguf": b"GGUF"})
    with pytest.raises(ValueError, match=r"ada/gguf: there are no weights .*small\.Q4_0\.gguf"):
        download("ada/gguf")


# --- Once ----------------------------------------------------------------------------------------


def test_what_is_there_is_not_loaded_again(hub):
    first = download("ada/small")
    hub.asked.clear()
    assert download("ada/small") == first
    assert not [path for method, path, _, _ in hub.asked if method == "GET" and "resolve" in path]


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_what_was_downloaded_is_used_whatever_the_hub_says_later(hub, status):
    first = download("ada/small")
    refuse(hub, status)
    assert download("ada/small") == first


def test_what_was_downloaded_is_used_without_a_net(hub, monkeypatch):
    first = download("ada/small")
    with serve() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    assert download("ada/small") == first


def test_the_variable_that_forbids_the_net_is_heeded(hub, monkeypatch):
    first = download("ada/small")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download("ada/small") == first
    with pytest.raises(OSError, match=r"other.*cannot be reached \(.*offline"):
        download("ada/other")
    assert hub.asked == []


def test_a_half_that_was_downloaded_is_no_model(hub, monkeypatch):
    refuse(hub, 500, only=f"{COMMIT}/model.safetensors")
    with pytest.raises(OSError, match="the hub answers 500"):
        download("ada/small")
    with serve() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(OSError, match="cannot be reached"):
        download("ada/small")


# --- What goes wrong -----------------------------------------------------------------------------


def test_a_stranger_is_told_how_to_ask(hub):
    refuse(hub, 401, "GatedRepo", only="resolve")
    with pytest.raises(OSError, match=r"ada/small is not open to everyone \(401\)") as error:
        download("ada/small")
    for way_out in ("licence", "/settings/tokens", "HF_TOKEN", "hf auth login"):
        assert way_out in str(error.value)


def test_a_wrong_token_is_told_apart(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    refuse(hub, 401)
    with pytest.raises(OSError, match=r"does not accept your token \(401\).*make a new one"):
        download("ada/small")


def test_the_token_goes_to_the_hub_and_into_no_message(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    add_model(hub, "ada/refused", FILES)
    download("ada/small")
    assert {sent for _, _, _, sent in hub.asked} == {"Bearer hf_secret"}
    for status in (401, 403, 404, 500):
        refuse(hub, status)
        with pytest.raises(OSError, match=str(status)) as error:
            download("ada/other" if status == 404 else "ada/refused")
        assert "secret" not in str(error.value)


def test_an_account_without_the_licence_is_told_where_it_is(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    refuse(hub, 403, "GatedRepo", only="resolve")
    with pytest.raises(
        OSError, match=r"your account may not have it \(403\).*licence on that page"
    ):
        download("ada/small")


def test_a_name_that_does_not_exist(hub):
    with pytest.raises(OSError, match=r"no folder ada/smal here.*\(404\).*Is the name right"):
        download("ada/smal")


@pytest.mark.parametrize("only", ["api", "resolve"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_told_apart(hub, status, only):
    refuse(hub, status, only=only)
    with pytest.raises(OSError, match=f"the hub answers {status}.*try again"):
        download("ada/small")


def test_a_download_that_stops_goes_on_from_there(hub):
    page = hub.pages[f"/ada/small/resolve/{COMMIT}/model.safetensors"]
    page.cuts = [5000, 0, 2000]
    assert contents(download("ada/small"))["model.safetensors"] == WEIGHTS
    asked = [asked for _, path, asked, _ in hub.asked if "safetensors" in path]
    assert [start for start in asked if start] == ["bytes=5000-", "bytes=5000-", "bytes=7000-"]


def test_after_a_download_that_ends_half_way_the_whole_files_are_kept(hub):
    page = hub.pages[f"/ada/small/resolve/{COMMIT}/model.safetensors"]
    page.cuts = [5000, *[0] * 20]
    with pytest.raises(OSError, match=r"cut off .*try again, and the others follow"):
        download("ada/small")
    page.cuts.clear()
    hub.asked.clear()
    assert contents(download("ada/small"))["model.safetensors"] == WEIGHTS
    came = {path.rpartition("/")[2] for method, path, _, _ in hub.asked if method == "GET"}
    assert came & {*FILES} == {"model.safetensors"}


def test_without_a_net(hub, monkeypatch):
    with serve() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(OSError, match=r"no folder ada/small here.*cannot be reached") as error:
        download("ada/small")
    assert "\n" not in str(error.value)


def test_a_hub_that_falls_silent_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr("minillama.checkpoint.hub.TIMEOUT", 0.2)
    hub.pages["/api/models/ada/small"] = Page(b"{}", cuts=[0], silent=30)
    with pytest.raises(OSError, match=r"cannot be reached \(.*timed out"):
        download("ada/small")


def test_a_disk_without_room_is_told_before_a_byte_comes(hub, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"10,248 bytes are to come .* 5,000 are free.*HF_HOME"):
        download("ada/small")
    assert not any("resolve" in path for _, path, _, _ in hub.asked)


def test_a_full_disk_does_not_matter_for_what_is_there(hub, monkeypatch):
    first = download("ada/small")
    usage = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert download("ada/small") == first


def test_a_disk_that_fills_up_is_told_apart(hub):
    resource = pytest.importorskip("resource", reason="needs a limit to the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written to .*too large.*HF_HOME"):
            download("ada/small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"no ada/small here.*pip install 'minillama\[hub\]'"):
        download("ada/small")


# --- A path or a name ----------------------------------------------------------------------------


def test_what_exists_is_a_path(hub, tmp_path):
    (tmp_path / "ada" / "small").mkdir(parents=True)
    assert local_path("ada/small") == Path("ada/small")
    assert local_path(tmp_path / "ada") == tmp_path / "ada"
    assert hub.asked == []


@pytest.mark.parametrize("path", ["small", "runs/smal", "/ada/small", "../ada", "a/b/c", "a b/c"])
def test_a_mistyped_path_is_not_asked_for(hub, tmp_path, path):
    (tmp_path / "runs").mkdir()
    assert local_path(path) == Path(path)
    assert hub.asked == []


def test_a_name_of_the_hub_is_downloaded(hub):
    assert local_path("ada/small") == download("ada/small")
    assert local_path(Path("ada/small")) == download("ada/small")


def test_a_name_of_the_catalogue_is_what_was_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLAMA_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not fetched yet: minillama fetch stories260k"):
        local_path("stories260k")
    for file in fetch.CATALOGUE["stories260k"].files:
        (tmp_path / "stories260k").mkdir(exist_ok=True)
        (tmp_path / "stories260k" / file.name).write_bytes(bytes(file.size))
    assert local_path("stories260k") == tmp_path / "stories260k" / "stories260K.bin"


# --- From the name to the text -------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_a_model_is_loaded_by_its_name(hub, tmp_path, shard_bytes):
    model, tokenizer = small_llama(), small_tokenizer()
    save(tmp_path / "saved", model, tokenizer, format="huggingface", shard_bytes=shard_bytes)
    add_model(hub, "ada/real", contents(tmp_path / "saved"))
    loaded, loaded_tokenizer = load("ada/real")
    assert loaded.config == model.config
    assert_close(
        loaded(torch.tensor([[1, 5, 9]])), model(torch.tensor([[1, 5, 9]])), rtol=0, atol=0
    )
    assert loaded_tokenizer.encode("Ada had a boat") == tokenizer.encode("Ada had a boat")


@pytest.mark.slow
def test_the_command_takes_a_name_and_the_hubs_own_variables(server, tmp_path):
    server.pages.clear()
    save(tmp_path / "saved", small_llama(), small_tokenizer(), format="huggingface")
    add_model(server, "ada/real", contents(tmp_path / "saved"))
    command = [sys.executable, "-m", "minillama", "generate", "Ada", "--model"]
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    for name, status, text in (("ada/real", 0, "Ada"), ("ada/none", 2, "Is the name right?")):
        done = subprocess.run(
            [*command, name, "--max-new-tokens", "3", "--temperature", "0", "--device", "cpu"],
            capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert text in (done.stdout if status == 0 else done.stderr)
        assert "Traceback" not in done.stderr
