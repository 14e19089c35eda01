"""A Lorsa as one safetensors file, with its configuration as JSON in the header. Nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from asi_lens.errors import DataError, OptionError
from asi_lens.files import write_whole
from asi_lens.sae.lorsa import Lorsa, LorsaConfig

FORMAT = 1
_HEADER = "asi_lens_lorsa"


def save_lorsa(lorsa: Lorsa, path: Path | str) -> None:
    """Write a Lorsa to `path` (`.safetensors`), whole or not at all; a file that is there is replaced.

    Raises OptionError for another suffix, OSError naming the file if it cannot be written.
    """
    path = _checked(path)
    about = {"format": FORMAT, "config": asdict(lorsa.config), "initialization": lorsa.initialization}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lorsa.state_dict().items()}
    with write_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(about, allow_nan=False)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def load_lorsa(path: Path | str) -> Lorsa:
    """The Lorsa in a file of `save_lorsa`, in the dtype it was saved in, on the CPU.

    Raises FileNotFoundError; OptionError for another suffix; DataError for a file that is damaged, not of a
    Lorsa, or of another format.
    """
    path = _checked(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            if text is None:
                raise DataError(f"{path} is not the file of a Lorsa")
            about = json.loads(text)
            if about.get("format") != FORMAT:
                raise DataError(f"{path} has format {about.get('format')!r}, this version reads {FORMAT}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    dtype = state["W_O"].dtype if "W_O" in state else torch.float32
    lorsa = Lorsa(LorsaConfig.from_dict(about["config"]), dtype=dtype)
    try:
        lorsa.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path} holds other tensors than its configuration asks for: {error}") from error
    lorsa.initialization = about["initialization"]
    return lorsa


def _checked(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OptionError(f"path={str(path)!r} is not allowed; path must be a `.safetensors` file")
    return path
