"""A project of tiny notebooks, for the tests of the runner and the gallery."""

from __future__ import annotations

from pathlib import Path

import nbformat
import yaml

PARAMETERS = 'model = "tiny"\nprofile = "quick"\noutput_folder = ""\nseed = 0\n'
# Writes its table; a page of its own kind stands for a figure. Cells after it may add to what is recorded.
WRITE = (
    "from pathlib import Path\n"
    "folder = Path(output_folder)\n"
    "(folder / '{stem}.csv').write_text(f'x\\n{{x}}\\n')\n"
    "(folder / '{stem}.html').write_text('page')\n"
    "tables, verdicts = ['{stem}'], []\n"
    "figures = {{'{stem}': dict(title='t', subtitle='s', caption='c', png=True, reason='')}}\n"
)
DONE = (
    "from asi_lens.results.sidecar import write_sidecar\n"
    "write_sidecar(folder, dict(notebook='{stem}', parameters=dict(seed=seed, x=x), seeds=[seed],\n"
    "    sources={{}}, tables=tables, figures=figures, verdicts=verdicts))\n"
)
CLAIM = (
    "verdicts.append(dict(claim='{claim}', statement='s', paper_value='p', over='seeds', budget='b',\n"
    "    verdict='supported', numbers=[dict(name='n', value=float(x))]))\n"
)
FIGURE = "figures['{stem}'] = dict(title='t', subtitle='s', caption='c', png=False, reason='no Chrome')\n"


def notebook(path: Path, *cells: str, tag: bool = True, parameters: str = PARAMETERS) -> Path:
    """Write a notebook: its parameters, then code cells."""
    first = nbformat.v4.new_code_cell(parameters)
    if tag:
        first.metadata["tags"] = ["parameters"]
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {path.stem}"), first, *code])
    node.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "x", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(node, path)
    return path


def project(root: Path) -> Path:
    """Two notebooks, a model and two profiles below `root`."""
    notebook(
        root / "notebooks" / "01_alpha.ipynb",
        WRITE.format(stem="01_alpha"),
        DONE.format(stem="01_alpha"),
        parameters=PARAMETERS + "x = 1\n",
    )
    notebook(
        root / "notebooks" / "02_beta.ipynb",
        WRITE.format(stem="02_beta"),
        DONE.format(stem="02_beta"),
        parameters=PARAMETERS + "x = 2\nranks = [1, 2]\n",
    )
    profiles = {"quick": {"common": {"seed": 1}, "02_beta": {"ranks": [3]}}, "smoke": {"common": None}}
    (root / "parameters").mkdir()
    for name, content in {**profiles, "tiny": {"model": "tiny"}}.items():
        (root / "parameters" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return root
