"""Curating a folder of raw text: in one process, in several, or on many machines.

Most rules look at one document at a time, so each file is cut into shards, and any process can take
any shard. What is left are the rules with a memory, for which "before" must mean the same whoever
asks. They take two rounds:

    remember    each shard writes down the hashes of its own lines (spans, files)
    clean       each shard runs all rules; from the start it knows those of its hashes that an
                earlier shard has written down, and therefore decides as if it had read that shard
    join        the shards' parts, in order, become one file per source; the report adds up

So the output is the same, byte for byte, into however many shards the files are cut and whoever
works on them. Near-duplicates among books are not sought so: books are few, and stay one shard.

The engine is datatrove, the field's own. On one machine `curate_folder(..., workers=8)` is enough.
On a Slurm cluster with a common folder:

    job = FolderCuration(raw, out, criteria, n_shards=1000)
    options = {"tasks": len(job.tasks), "time": "1:00:00", "partition": "cpu"}
    first = SlurmPipelineExecutor([job.remember], **options)
    SlurmPipelineExecutor([job.clean], depends=first, **options).run()
    job.join()  # when both are done
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minillama.data import raw_web
from minillama.data.curation import RECIPES, Criteria, Report, card, curate, recipe
from minillama.data.documents import (
    SOURCES,
    Shard,
    read_jsonl,
    read_shard,
    replacing,
    shards,
    write_jsonl,
)
from minillama.data.stackexchange import largest_sites

N_RANDOM_PAGES = 1000  # that the classifier learns from


@dataclass(frozen=True)
class FolderCuration:
    """The work that curating a folder takes, cut into ``tasks``; see the module's text.

    Everything is written beside ``out`` first, which appears when `join` is through.
    """

    raw: Path  # holds SOURCE.jsonl files
    out: Path  # a new folder
    criteria: Criteria
    n_shards: int = 1
    tasks: tuple[tuple[str, int, Shard], ...] = field(init=False)  # (source, number, what to read)

    def __post_init__(self) -> None:
        if self.n_shards < 1:
            raise ValueError(f"n_shards is {self.n_shards}, but must be at least 1.")
        tasks = []
        for source in raw_sources(self.raw):
            whole = any(rule.whole for rule in recipe(source, self.criteria))
            cut = shards(self.raw / f"{source}.jsonl", 1 if whole else self.n_shards)
            tasks += [(source, number, shard) for number, shard in enumerate(cut)]
        object.__setattr__(self, "tasks", tuple(tasks))

    @property
    def work(self) -> Path:
        """Where the parts and, in the end, the whole are written."""
        return self.out.with_name(f".{self.out.name}.new")

    def remember(self, _: object = None, rank: int = 0, n_ranks: int = 1) -> None:
        """Write down the hashes of shard number ``rank``, as far as its source has such a rule."""
        source, number, shard = self.tasks[rank]
        rules = recipe(source, self.criteria)
        for place, rule in enumerate(rules):
            if rule.seen is not None:
                for _ in curate(source, read_shard(shard), rules=rules[: place + 1]):
                    pass
                with replacing(self._memory(source, number)) as file:
                    np.save(file, np.array(sorted(rule.seen), dtype=np.uint64))

    def clean(self, _: object = None, rank: int = 0, n_ranks: int = 1) -> None:
        """Run the recipe over shard number ``rank``, and write what is left and the report."""
        source, number, shard = self.tasks[rank]
        rules, report = recipe(source, self.criteria), Report()
        for rule in rules:
            if rule.seen is not None and number > 0:
                own = np.load(self._memory(source, number))
                for earlier in range(number):
                    known = np.intersect1d(own, np.load(self._memory(source, earlier)), True)
                    rule.seen.update(known.tolist())
        documents = curate(source, read_shard(shard), report=report, rules=rules)
        write_jsonl(self._part(source, number), documents)
        with replacing(self._part(source, number).with_suffix(".json")) as file:
            file.write(json.dumps(report.to_dict()).encode())

    def join(self) -> Report:
        """Put the parts together, write report.json, waterfall.png and README.md, and show it all.

        Raises FileNotFoundError if a part is missing: then a task did not finish.
        """
        for source in dict.fromkeys(source for source, *_ in self.tasks):
            with replacing(self.work / f"{source}.jsonl") as whole:
                for name, number, _ in self.tasks:
                    if name == source:
                        with self._part(source, number).open("rb") as part:
                            shutil.copyfileobj(part, whole)
        reports = [self._part(name, number).with_suffix(".json") for name, number, _ in self.tasks]
        report = Report.merged(json.loads(path.read_text()) for path in reports)
        (self.work / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        (self.work / "README.md").write_text(card(report))
        report.waterfall().savefig(self.work / "waterfall.png", dpi=100)
        shutil.rmtree(self.work / "parts")
        self.work.rename(self.out)
        return report

    def _part(self, source: str, number: int) -> Path:
        return self.work / "parts" / f"{source}-{number:05}.jsonl"

    def _memory(self, source: str, number: int) -> Path:
        return self.work / "parts" / f"{source}-{number:05}.npy"


def curate_folder(raw: Path | None, out: Path, criteria: Criteria, workers: int = 1) -> Report:
    """Curate a folder of SOURCE.jsonl files into a new one; without ``raw``, the toy raw web.

    More than one worker needs datatrove (the extra `cluster`). Raises ValueError or OSError; then
    nothing is left behind.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, but at least one has to work.")
    if out.exists():
        raise FileExistsError(f"{out} exists and is not overwritten. Name another folder.")
    work = out.with_name(f".{out.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    try:
        if raw is None:
            raw = work / "raw"
            for source in raw_web.PLANTERS:
                write_jsonl(raw / f"{source}.jsonl", raw_web.raw(source))
        job = FolderCuration(raw, out, criteria, n_shards=workers)
        if workers == 1:
            for rank in range(len(job.tasks)):
                job.clean(rank=rank)
        else:
            _in_processes(job, workers)
        return job.join()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fit_criteria(
    raw: Path, reference: Sequence[str], bad_words: Sequence[str] = (), language: str = "en"
) -> Criteria:
    """Criteria for a folder of raw text, given good texts to compare its pages with.

    The pages as they come are a thousand of commoncrawl, from all over the file; the sites, those
    of Stack Exchange with the most threads. Raises ValueError if there is a crawl but no reference.
    """
    criteria = Criteria(bad_words=bad_words, language=language)
    sources = raw_sources(raw)
    if "commoncrawl" in sources:
        if not reference:
            raise ValueError(
                f"{raw} holds a crawl (commoncrawl.jsonl), whose pages are kept if they read like "
                f"good text; but there is none to compare them with. Name files of good text with "
                f"--reference, one text a line."
            )
        spread = shards(raw / "commoncrawl.jsonl", N_RANDOM_PAGES)
        pages = [page.text for shard in spread for page in [next(read_shard(shard), None)] if page]
        criteria = Criteria.fit(reference, pages, bad_words=bad_words, language=language)
    if "stackexchange" in sources:
        threads = read_jsonl(raw / "stackexchange.jsonl")
        n_threads = Counter(str(thread.meta.get("site", "")) for thread in threads)
        criteria = replace(criteria, sites=largest_sites(n_threads))
    return criteria


def raw_sources(raw: Path) -> list[str]:
    """The sources of which a folder holds a file, in the order of LLaMA's table.

    Raises OSError or ValueError if there is none, or a file that no recipe is for, or an empty one.
    """
    names = {path.stem for path in raw.glob("*.jsonl")}
    if not names:
        raise FileNotFoundError(
            f"{raw} holds no raw text. Put a JSON-lines file into it for each source that you "
            f"have: {', '.join(f'{source}.jsonl' for source in SOURCES)}."
        )
    if unknown := sorted(names - set(RECIPES)):
        raise ValueError(
            f"{raw / unknown[0]}.jsonl: there is no recipe for {unknown[0]!r}, only for "
            f"{', '.join(RECIPES)}. Rename it to the source that it is most like."
        )
    for name in sorted(names):
        next(read_jsonl(raw / f"{name}.jsonl"))
    return [source for source in SOURCES if source in names]


def _in_processes(job: FolderCuration, workers: int) -> None:
    """Both rounds, on this machine."""
    # datatrove reports every task, at length; loguru's own variable lets only our words through.
    os.environ.setdefault("LOGURU_FILTER", "minillama")
    try:
        from datatrove.executor import LocalPipelineExecutor
    except ImportError:
        raise ValueError(
            "Several workers are run by datatrove, which is not installed: "
            "pip install 'minillama[cluster]', or leave --workers out."
        ) from None
    for number, step in enumerate((job.remember, job.clean)):
        LocalPipelineExecutor(
            [step],
            tasks=len(job.tasks),
            workers=workers,
            logging_dir=str(job.work / "parts" / f"log-{number}"),
        ).run()
