"""The first notebook in JupyterLab, in a browser: it runs, and its controls move the figure."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import browser
import nbformat
import pytest
import tiny_models

import asi_lens as al
from asi_lens.base.paths import notebooks_dir
from asi_lens.results.chrome import chrome_or_reason

TOKEN = "asi-lens-tests"
PARAMETERS: dict[str, Any] = {"context": 16, "n_tokens": 1_024, "dtype": "float32", "layer_fractions": [0.1]}
KERNEL = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel?.id"
# Of the figure below the controls: its place, the line at d_init, each site's curve; null before it is drawn.
SHOWN = """(() => {
  const drawn = [...document.querySelectorAll(".jupyter-widgets .js-plotly-plot")];
  if (drawn.length !== 1 || !drawn[0]._fullLayout?.shapes.length) return null;
  return {
    place: document.querySelector(".widget-html-content strong").textContent,
    cut: drawn[0]._fullLayout.shapes[0].x0,
    curves: Object.fromEntries(drawn[0]._fullData.map((line) => [line.name, [...line.y]])),
  };
})()"""
# The middle of a slider's handle, and the right end of its bar.
HANDLE = """((name) => {
  const slider = [...document.querySelectorAll(".widget-slider")].find(
    (one) => one.querySelector(".widget-label")?.textContent === name);
  slider.scrollIntoView({block: "center"});
  const [handle, bar] = [".noUi-handle", ".noUi-base"].map(
    (part) => slider.querySelector(part).getBoundingClientRect());
  return {x: handle.x + handle.width / 2, y: handle.y + handle.height / 2, right: bar.right};
})"""


@pytest.fixture(scope="module")
def chrome() -> str:
    path, reason = chrome_or_reason()
    if path is None:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return path


pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: Any) -> Iterator[str]:
    """The address of the notebook, with a tiny model and text, in a JupyterLab that runs."""
    characters = tiny_models.CHARACTERS
    text = tmp_path / "plain.txt"
    text.write_text("".join(characters[(i * i * 7 + i) % len(characters)] for i in range(3_000)), "utf-8")
    notebook = nbformat.read(notebooks_dir() / "00_explore.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    own = {**PARAMETERS, "model": str(tiny_folder("llama")), "main_corpus": str(text)}
    own["output_folder"] = str(tmp_path / "figures")
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in own.items())
    (tmp_path / "lab").mkdir()
    nbformat.write(notebook, tmp_path / "lab" / "00_explore.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(tmp_path / "jupyter" / name) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    environment = os.environ | {f"JUPYTER_{name}": folder for name, folder in folders.items()}
    options = [f"--port={port}", "--no-browser", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    options += [f"--ServerApp.root_dir={tmp_path / 'lab'}", "--expose-app-in-browser", "--ip=127.0.0.1"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            stdout=log,
            stderr=log,
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/00_explore.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        server.wait(20)


def test_sliders_move_the_figure(lab: str, chrome: str, tmp_path: Path, tiny_llama: Any) -> None:
    async def move() -> list[dict[str, Any]]:
        async with browser.opened(chrome, lab, height=1600) as tab:
            await tab.until(KERNEL, "a kernel", 120)
            await tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            states = [await tab.until(SHOWN, "the controls", 120)]
            for name, moved in (("layer", "place"), ("d_init", "cut")):
                at = await tab.evaluate(f"{HANDLE}({name!r})")
                await tab.drag(at["x"], at["y"], at["right"])
                was = json.dumps(states[-1][moved])
                changed = f"((now) => now && now.{moved} !== {was} && now)({SHOWN})"
                states.append(await tab.until(changed, f"a move of {name}"))
            written = "jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle'"
            await tab.until(written, "the end of the notebook", 120)
        return states

    before, deeper, wider = asyncio.run(move())
    tokens = al.load_tokens(str(tmp_path / "plain.txt"), tiny_llama, 1_024, context=16)
    spectra = al.collect_spectra(tiny_llama, tokens, progress=False)
    for state, layer, cut in ((before, 1, 0.5), (deeper, 2, 0.5), (wider, 2, 1)):
        assert f"attention output, layer {layer} of tiny-llama" in state["place"]
        assert state["cut"] == cut
        for site, name in (("attn_out", "attention output"), ("resid_post", "residual stream")):
            values = spectra[site, layer].relative_singular_values.tolist()
            assert state["curves"][name] == pytest.approx(values, rel=1e-6)
    assert before["curves"] != deeper["curves"]
    assert (tmp_path / "figures" / "00_explore.json").is_file(), "the whole notebook ran"
