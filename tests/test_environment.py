"""What a clone needs is written down once, exactly, and holds on any machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def direct_dependencies() -> list[Requirement]:
    """Of the package and of all its extras, without the package itself."""
    extras = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    found = [Requirement(text) for text in PROJECT["dependencies"] + extras]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("no Git repository: the files come from an archive")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# --- Pins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", direct_dependencies(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    name = canonicalize_name(requirement.name)
    found = [pin for pin in pins() if canonicalize_name(pin.name) == name]
    assert found, f"{name} is missing in constraints.txt: make lock"
    for pin in found:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version), f"{pin} is not {requirement}"


def test_constraints_are_exact_pins_and_nothing_else():
    for pin in pins():
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert not pin.url, pin


def test_ranges_stand_in_pyproject_and_versions_in_constraints_only():
    for requirement in direct_dependencies():
        assert {s.operator for s in requirement.specifier} == {">="}, requirement


def test_this_python_is_one_that_the_project_supports():
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert supported.contains(".".join(map(str, sys.version_info[:3])))


# --- Conda ---------------------------------------------------------------------------------------


def test_conda_gets_the_same_from_the_same_files():
    """Python and pip from conda-forge; the rest is pyproject.toml and constraints.txt."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    *from_conda, by_pip = environment["dependencies"]
    assert [text.split("=")[0] for text in from_conda] == ["python", "pip"]
    assert by_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    assert "dev" in PROJECT["optional-dependencies"]
    python = from_conda[0].split("=")[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{python}.0")


# --- Nothing of the machine it was written on ----------------------------------------------------

# Where PyTorch publishes the builds for other versions of CUDA; make's TORCH_INDEX may name it.
PYTORCH = "download.pytorch.org"
SET_UP = ["constraints.txt", "environment.yml", "pins.in", "pyproject.toml", "Makefile", ".ci/run"]
HOME = re.compile(r"(?<![\w.])/(home|Users|root|tmp|private/var|mnt|opt)/[\w.-]+")


@pytest.mark.parametrize("name", SET_UP)
def test_no_registry_is_named(name):
    text = (ROOT / name).read_text()
    assert set(re.findall(r"https?://([\w.:-]+)", text)) <= {PYTORCH}
    assert not re.search(r"(?m)^\s*(-i|--index-url|--find-links|--trusted-host)\b", text)


def test_no_tracked_file_names_a_place_on_a_machine():
    places = [ROOT.parent.as_posix() + "/", Path.home().as_posix() + "/", sys.prefix]
    wrong = []
    for path in tracked_files():
        if path == Path(__file__):
            continue
        text = path.read_text(errors="replace")
        found = [place for place in places if len(place) > 2 and place in text]
        found += [match[0] for match in HOME.finditer(text)]
        wrong += [f"{path.relative_to(ROOT)}: {place}" for place in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["/home/ada/x", "see /tmp/ipykernel_12/3.py", '"/Users/ada"'])
def test_such_a_place_would_be_found(text):
    assert HOME.search(text)


@pytest.mark.parametrize("text", ["a/home/b", "https://x.org/tmp/y", "tests/tmp/x", "/root"])
def test_what_is_no_place_is_not(text):
    assert not HOME.search(text)
