"""Dictionaries that others have trained, opened and looked at: dead features against the rank of the site.

A folder says in its configuration what its dictionary reads: model, hook (site, layer), width, context, BOS.
What does not fit the model at hand is refused by name. Nothing is trained here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import AsiLensError, DataError, FetchError, OptionError, require
from asi_lens.base.files import existing, plain_name
from asi_lens.base.offline import no_hub, refused
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.results.beyond_rows import Library, ReleasedRow
from asi_lens.results.dictionary_verdicts import RANKS
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate
from asi_lens.sae.formats import CONFIG, OURS, library_of, load_folder
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.read_site import site_read

SAVE = "from sae_lens import SAE; SAE.from_pretrained('{}', '{}').save_model('{}')"
"""Program that fetches a released dictionary with SAELens and writes it as a folder."""
EXAMPLES = {
    "gemma-3-270m": ("gemma-scope-2-270m-pt-att-all", "layer_5_width_16k_l0_small"),
    "Llama-3.1-8B": ("llama_scope_lxa_8x", "l5a_8x"),
}
"""A release of SAELens with attention dictionaries of every layer and one of its ids, by model."""
NEEDED = (
    "No dictionary is named, so nothing is tested here. Name folders of SAELens, sparsify or asi_lens, or of "
    "a hub repository (owner/repository/folder): make figures MODEL=... NOTEBOOKS=22 "
    "ARGS=\"-p 'dictionaries=[/path/of/folder]'\". Where SAELens and a hub are, this writes such a folder: "
    f'python -c "{SAVE.format(*EXAMPLES["gemma-3-270m"], "folder")}". Releases with every layer: '
    + ", ".join(f"{release} (of {model})" for model, (release, _) in EXAMPLES.items())
)
"""What an empty list of dictionaries means, and what to do about it."""

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+/[\w./-]+")


@dataclass(frozen=True)
class Released:
    """A dictionary in a folder that fits the model.

    Attributes:
        name: the given folder's own name and the path below it, or the hub name.
        library: whose format it has.
        where: (site, layer) that it reads. start: its start, if the folder says so.
    """

    name: str
    folder: Path
    library: Library
    where: SiteLayer
    config: SAEConfig
    start: str | None

    @property
    def text(self) -> str:
        """The dictionary in words."""
        site, layer = self.where
        about = self.config.metadata
        trained = f"context {about.get('context', 'not said')}, BOS {about.get('bos', 'not said')}"
        size = f"{self.config.d_sae:,} features ({self.config.activation})"
        return f"{self.name} ({self.library}): {site} {layer}, {size}, {trained}"


def open_dictionaries(
    model: nn.Module, names: Sequence[str], model_names: Sequence[str] = ()
) -> list[Released]:
    """Return the dictionaries in folders, each checked against the model, in the order of their names.

    Args:
        names: folders (all dictionaries below one are taken), or `owner/repository/folder` of the hub.
        model_names: names under which dictionaries know the model, besides its own.

    Raises OptionError, naming the dictionary, for another model, an unknown or missing hook, another width,
    or a transcoder; FetchError for a name that is no folder here and cannot be fetched; the errors of
    `load_folder`.
    """
    found = {folder: name for given in names for name, folder in _folders(given)}
    return [_opened(model, name, folder, model_names) for folder, name in found.items()]


def told(opened: Sequence[Released]) -> str:
    """Return the opened dictionaries in words, a line each; `NEEDED` without any."""
    return "\n".join(one.text for one in opened) or NEEDED


def released_rows(
    opened: Sequence[Released],
    model: nn.Module,
    tokens: Tokens,
    held_out: Tokens,
    *,
    budget_gb: int | float = 20,
    progress: bool = True,
) -> list[ReleasedRow]:
    """Return a row per dictionary; [] without any. Each is read when its turn comes, so one is in memory.

    Args:
        tokens: text for the ranks, and for the features that never fire.
        held_out: text for silent features, FVU and l0.
        budget_gb: as in `harvest_stores`.

    Raises DataError, naming the dictionary, for an FVU of one or more: it was made for other activations.
    """
    if not opened:
        return []
    wheres = list(dict.fromkeys(one.where for one in opened))
    stores = harvest_stores(model, tokens, wheres, budget_gb=budget_gb, progress=progress)
    held = harvest_stores(model, held_out, wheres, budget_gb=budget_gb, progress=progress)
    name = models.model_info(model, fingerprint=False).name
    return [_row(one, name, stores[one.where], held[one.where], progress) for one in opened]


def _folders(name: str) -> list[tuple[str, Path]]:
    """Return (name, folder) of every dictionary at or below a folder or hub name.

    Names of folders here begin at the given folder's own name, as tables are published.
    """
    folder = existing(name)
    if folder is None or not folder.is_dir():
        folder, told = _fetched(name), name.rstrip("/")
    else:
        told = plain_name(folder)
    files = [path for file in (CONFIG, OURS) for path in folder.rglob(file)]
    found = sorted({path.parent for path in files})
    if not found:
        raise OptionError(f"{name} holds no dictionary: there is no {CONFIG} or {OURS} at or below it")
    return [("/".join((told, *path.relative_to(folder).parts)), path.resolve()) for path in found]


def _fetched(name: str) -> Path:
    """Return the local copy of `owner/repository/folder` of the hub. Raises FetchError."""
    from huggingface_hub import snapshot_download

    if not _ON_HUB.fullmatch(name):
        release, _, sae_id = name.partition("/")
        wanted = SAVE.format(release, sae_id or "ID", "folder")
        raise FetchError(
            f"{name!r} is neither a folder here nor owner/repository/folder of the hub. If it is a release "
            f'and an id of SAELens, write the folder with: python -c "{wanted}"'
        )
    owner, repository, inside = name.rstrip("/").split("/", 2)
    offline = no_hub()
    try:
        local = snapshot_download(
            f"{owner}/{repository}",
            # The hub's * stands for folders, too.
            allow_patterns=[f"{inside}/*.json", f"{inside}/*.safetensors"],
        )
    except Exception as error:  # httpx, OS and hub errors, which have no common base
        if offline:
            raise refused(f"the dictionary {name!r}", "Bring its folder, and name that") from error
        raise FetchError(
            f"could not read {name!r} from the Hugging Face hub ({type(error).__name__}: {error}), and there "
            "is no folder of that name here"
        ) from error
    folder = Path(local, inside)
    if not folder.is_dir():
        raise FetchError(f"{owner}/{repository} has no folder {inside!r} of JSON and safetensors files")
    return folder


def _opened(model: nn.Module, name: str, folder: Path, model_names: Sequence[str]) -> Released:
    try:
        sae = load_folder(folder)
    except AsiLensError as error:
        raise type(error)(f"{folder}: {error}") from error
    about = sae.config.metadata
    require(not sae.is_transcoder, "dictionaries", str(folder), "autoencoders; this is a transcoder")
    own = models.model_info(model, fingerprint=False).name
    made_for = about.get("model")
    if made_for is not None and _plain(made_for) not in map(_plain, (own, *model_names)):
        raise OptionError(
            f"{folder} was made for the model {made_for!r}, this is {own!r}. If the weights are the same, "
            f"add {made_for!r} to model_names"
        )
    try:
        where = site_read(model, about)
        if where is None:
            raise OptionError("it does not say which hook it reads")
        width = models.site_width(model, *where)
    except AsiLensError as error:
        raise OptionError(f"{folder}: {error}") from error
    if width != sae.d_in:
        site, layer = where
        raise OptionError(f"{folder} is {sae.d_in} wide, but {site} {layer} of {own} is {width} wide")
    library = library_of(folder)
    start = sae.initialization.get("method") if library == "asi_lens" else None
    return Released(name, folder, library, where, sae.config, start)


def _plain(name: object) -> str:
    """Return the letters and digits of a model's name without its owner: `gemma3270m`."""
    return re.sub(r"[^a-z0-9]", "", str(name).rpartition("/")[2].lower())


def _row(
    one: Released, model: str, store: ActivationStore, held: ActivationStore, progress: bool
) -> ReleasedRow:
    sae: SparseAutoencoder = load_folder(one.folder).to(models.resolve_device("auto"))
    whole, silent = (evaluate(sae, rows, progress=progress) for rows in (store, held))
    if silent.fvu >= 1:
        raise DataError(
            f"{one.folder} has an FVU of {silent.fvu:.3g} at {one.where[0]} {one.where[1]}, worse than the "
            "mean alone: it was made for other activations (another hook, scale or model)"
        )
    summary, about = store.spectrum.summary(), one.config.metadata
    ranks: dict[str, Any] = {name: summary[name] for name in RANKS}
    return ReleasedRow(
        dictionary=one.name,
        library=one.library,
        model=model,
        corpus=str(store.metadata["corpus"]),
        site=one.where[0],
        layer=one.where[1],
        width=store.d,
        d_sae=one.config.d_sae,
        activation=one.config.activation,
        k=one.config.k if KINDS[one.config.activation].picks_k else None,
        start=one.start,
        trained_on=None if about.get("corpus") is None else str(about["corpus"]),
        trained_context=about.get("context"),
        trained_bos=about.get("bos"),
        n_tokens=whole.n_tokens,
        dead_fraction=whole.dead_fraction,
        n_tokens_held_out=silent.n_tokens,
        silent_fraction=silent.dead_fraction,
        fvu=silent.fvu,
        l0=silent.l0,
        **ranks,
    )
