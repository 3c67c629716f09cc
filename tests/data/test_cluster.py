"""Folders in, folders out: the same bytes, into however many shards and by however many workers."""

import json
import sys
from pathlib import Path

import pytest

from minillama.cli import main
from minillama.data.cluster import FolderCuration, curate_folder, fit_criteria, raw_sources
from minillama.data.curation import Criteria, Report, curate, toy_criteria
from minillama.data.documents import SOURCES, Document, read_jsonl, write_jsonl
from minillama.data.raw_web import raw

QUICK = ("c4", "github", "wikipedia", "books")  # sources that need no criteria and little time
WRITTEN = ["README.md", "report.json", "waterfall.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The raw web, but for the two sources that take long."""
    path = tmp_path_factory.mktemp("raw")
    for source in QUICK:
        write_jsonl(path / f"{source}.jsonl", raw(source))
    return path


@pytest.fixture(scope="module")
def curated(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    curate_folder(folder, out, Criteria(bad_words=("blasted", "dratted")))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- One worker ----------------------------------------------------------------------------------


def test_the_folder_holds_what_the_recipe_leaves_and_the_report(folder, curated):
    names = sorted(path.name for path in curated.iterdir())
    assert names == sorted([*(f"{source}.jsonl" for source in QUICK), *WRITTEN])
    criteria = Criteria(bad_words=("blasted", "dratted"))
    report = Report()
    for source in ("c4", "github", "wikipedia", "books"):
        documents = list(read_jsonl(folder / f"{source}.jsonl"))
        expected = list(curate(source, documents, criteria, report))
        assert list(read_jsonl(curated / f"{source}.jsonl")) == expected
    assert json.loads((curated / "report.json").read_text()) == report.to_dict()
    card = (curated / "README.md").read_text()
    assert all(f"| {row.source} | {row.rule} |" in card for row in report.rows)
    assert (curated / "waterfall.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_but_the_new_folder_is_left(curated):
    assert list(curated.parent.iterdir()) == [curated]


# --- Many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [2, 5])
def test_any_number_of_shards_in_any_order_gives_the_same_bytes(
    folder, curated, tmp_path, n_shards
):
    criteria = Criteria(bad_words=("blasted", "dratted"))
    job = FolderCuration(folder, tmp_path / "out", criteria, n_shards)
    ranks = range(len(job.tasks))
    for rank in reversed(ranks):
        job.remember(rank=rank)
    for rank in reversed(ranks):
        job.clean(rank=rank)
    job.join()
    assert files(job.out) == files(curated)


def test_books_are_one_shard_and_the_others_many(folder, tmp_path):
    job = FolderCuration(folder, tmp_path / "out", Criteria(), 5)
    numbers = {source: [n for s, n, _ in job.tasks if s == source] for source in QUICK}
    assert numbers == {source: [0] if source == "books" else list(range(5)) for source in QUICK}


def test_lines_of_a_crawl_are_known_across_shards(tmp_path):
    """One line in all shards: only the first document of all keeps it."""
    criteria = toy_criteria()
    tales = [d.text for d in raw("commoncrawl") if d.meta["planted"] == "good"][:12]
    lines = ["Ben had a good friend, and his friend was Max.", "Mia was far from home."]
    pages = [Document(f"{lines[i % 2]}\n{tale}") for i, tale in enumerate(tales)]
    write_jsonl(tmp_path / "raw" / "commoncrawl.jsonl", pages)
    job = FolderCuration(tmp_path / "raw", tmp_path / "out", criteria, 7)
    for step in (job.remember, job.clean):
        for rank in range(len(job.tasks)):
            step(rank=rank)
    job.join()
    out = [document.text for document in read_jsonl(tmp_path / "out" / "commoncrawl.jsonl")]
    assert out == [pages[0].text, pages[1].text, *tales[2:]]


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one(tmp_path):
    """In processes of their own, on the whole raw web."""
    pytest.importorskip("datatrove", reason="the extra `cluster` is not installed")
    criteria = toy_criteria()
    one, two = (curate_folder(None, tmp_path / f"by-{n}", criteria, workers=n) for n in (1, 2))
    assert one == two
    assert files(tmp_path / "by-1") == files(tmp_path / "by-2")
    assert files(tmp_path / "by-1" / "raw") == files(tmp_path / "by-2" / "raw")
    assert one.sources == list(SOURCES)


@pytest.mark.slow
def test_an_error_in_a_worker_comes_back_and_nothing_is_left(folder, tmp_path):
    pytest.importorskip("datatrove", reason="the extra `cluster` is not installed")
    (tmp_path / "raw").mkdir()
    lines = (folder / "c4.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "raw" / "c4.jsonl").write_bytes(b"".join([*lines, b'{"text": "\xe9"}\n']))
    with pytest.raises(ValueError, match=rf"c4\.jsonl, line {len(lines) + 1}: it is not UTF-8"):
        curate_folder(tmp_path / "raw", tmp_path / "out", Criteria(), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# --- Criteria ------------------------------------------------------------------------------------


def test_criteria_are_learned_from_the_folder(tmp_path):
    write_jsonl(tmp_path / "commoncrawl.jsonl", [Document(f"Buy it now {i}!") for i in range(30)])
    threads = [Document("Why?", meta={"site": f"s{i % 40}"}) for i in range(100)]
    write_jsonl(tmp_path / "stackexchange.jsonl", threads)
    criteria = fit_criteria(tmp_path, ["Ada lived by the river."] * 20, ["darn"], "en")
    assert criteria.references.keep("buy it") is None
    assert criteria.references.keep("Ada lived here")
    assert criteria.quality.bucket("Ada lived by the river.") != "tail"
    assert criteria.sites == tuple(sorted(f"s{i}" for i in range(20))) + tuple(
        sorted(f"s{i}" for i in range(20, 40))[:8]
    )
    assert list(criteria.bad_words) == ["darn"]


def test_a_crawl_without_reference(tmp_path):
    write_jsonl(tmp_path / "commoncrawl.jsonl", [Document("Buy!")])
    with pytest.raises(ValueError, match=r"holds a crawl .* --reference, one text a line"):
        fit_criteria(tmp_path, [])


def test_without_a_crawl_no_reference_is_needed(folder):
    assert fit_criteria(folder, []).quality is None


# --- Bad input -----------------------------------------------------------------------------------


def test_a_folder_without_a_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no raw text.*commoncrawl\.jsonl, c4\.json"):
        raw_sources(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no raw text"):
        raw_sources(tmp_path / "nowhere")


def test_a_file_of_which_no_recipe_is(tmp_path):
    write_jsonl(tmp_path / "c4.jsonl", [Document("Ada.")])
    write_jsonl(tmp_path / "usenet.jsonl", [Document("Ada.")])
    with pytest.raises(ValueError, match=r"usenet\.jsonl: there is no recipe .* Rename it"):
        raw_sources(tmp_path)


def test_an_empty_source_is_found_before_any_work(tmp_path):
    write_jsonl(tmp_path / "raw" / "books.jsonl", [])
    with pytest.raises(ValueError, match=r"books\.jsonl holds no document"):
        curate_folder(tmp_path / "raw", tmp_path / "out", Criteria())
    assert not (tmp_path / "out").exists()


def test_mixed_encodings_leave_nothing_behind(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "c4.jsonl").write_bytes(b'{"text": "Ada."}\n{"text": "B\xe9."}\n')
    with pytest.raises(ValueError, match=r"c4\.jsonl, line 2: it is not UTF-8 text"):
        curate_folder(tmp_path / "raw", tmp_path / "out", Criteria())
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_what_stands_there_is_not_overwritten(folder, tmp_path):
    with pytest.raises(FileExistsError, match="is not overwritten"):
        curate_folder(folder, tmp_path, Criteria())


@pytest.mark.parametrize("workers", [0, -1])
def test_somebody_must_work(folder, tmp_path, workers):
    with pytest.raises(ValueError, match="at least one has to work"):
        curate_folder(folder, tmp_path / "out", Criteria(), workers)
    with pytest.raises(ValueError, match="must be at least 1"):
        FolderCuration(folder, tmp_path / "out", Criteria(), workers)


def test_several_workers_without_datatrove(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(ValueError, match=r"pip install 'minillama\[cluster\]', or leave --workers"):
        curate_folder(folder, tmp_path / "out", Criteria(), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_did_not_finish(folder, tmp_path):
    job = FolderCuration(folder, tmp_path / "out", Criteria(), 2)
    with pytest.raises(FileNotFoundError, match=r"c4-00000\.jsonl"):
        job.join()
    assert not job.out.exists()


# --- The command ---------------------------------------------------------------------------------


def test_the_command_curates_a_folder(folder, curated, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("Blasted\ndratted\n")
    out = tmp_path / "out"
    main(["curate", str(folder), "--out", str(out), "--bad-words", str(tmp_path / "bad.txt")])
    shown = capsys.readouterr().out
    assert "over 90% the same" in shown
    assert f"{out} holds a .jsonl file for each source" in shown
    assert files(out) == files(curated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no raw text"),
        (["RAW", "--workers", "0"], "at least one has to work"),
        (["RAW", "--language", "english"], "The language 'english'"),
        (["RAW", "--reference", "nowhere.txt"], "There is no text file nowhere.txt"),
        (["RAW", "--out", "RAW"], "is not overwritten"),
    ],
)
def test_what_the_command_cannot_do(folder, tmp_path, capsys, arguments, message):
    arguments = [str(folder) if argument == "RAW" else argument for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["curate", *arguments, *out])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("minillama: ")
    assert message in error
    assert len(error.splitlines()) == 1
