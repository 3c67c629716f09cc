"""Build notebooks/NN_name.ipynb, with outputs, from notebooks/src/NN_name.py.

    python notebooks/build.py [NN_name ...]        no name: all of them

The script is what is edited and reviewed; the notebook is its product, committed so that readers
see the figures. A second build gives the same bytes: one thread, no timestamps, ids that follow
from the cells, and of an error its last line only. A cell that raises stops the build, unless it
carries the tag raises-exception.
"""

import hashlib
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(source: Path) -> nbformat.NotebookNode:
    """Run the cells of a percent script from top to bottom, in the notebooks' folder."""
    notebook = jupytext.read(source, fmt="py:percent")
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,  # seconds a cell
        record_timing=False,
        coalesce_streams=True,  # one text however the messages were cut
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()

    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        digest = hashlib.sha256(cell.source.encode()).hexdigest()
        cell.id = f"{index:02d}-{digest[:8]}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                # The frames hold colours and paths of the machine that built it.
                output.traceback = [f"{output.ename}: {output.evalue}"]
    nbformat.validate(notebook)
    return notebook


def main(names: list[str]) -> None:
    known = sorted(path.stem for path in (FOLDER / "src").glob("*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"There is no notebooks/src/{unknown[0]}.py. Known are: {', '.join(known)}.")
    # The kernel inherits these. With the first it treats output as it does under nbval.
    os.environ.update(PYTEST_CURRENT_TEST="build", OMP_NUM_THREADS="1")
    for name in names or known:
        notebook = build(FOLDER / "src" / f"{name}.py")
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"built notebooks/{name}.ipynb ({len(notebook.cells)} cells)")


if __name__ == "__main__":
    main(sys.argv[1:])
