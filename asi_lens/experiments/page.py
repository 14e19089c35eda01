"""One run of a notebook: its parameters, its output folder, and the files it writes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from torch import nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.split import Split, harvest_split
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require, require_whole
from asi_lens.base.files import existing
from asi_lens.base.paths import figures_dir
from asi_lens.experiments import rows as run_rows
from asi_lens.experiments.paired import paired_rows
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.runs import TrainedRun, train_recipes
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.media_inputs import Inputs, data_kind, load_inputs
from asi_lens.inputs.models import load_model, model_info
from asi_lens.inputs.small_tokenizer import small_tokenizer
from asi_lens.results import provenance
from asi_lens.results.figure_files import save, titles
from asi_lens.results.parameters_cell import checked_parameters, notebook_defaults
from asi_lens.results.rows import DeadFeatureRow, PairedLossRow
from asi_lens.results.sidecar import write_sidecar
from asi_lens.results.tables import Row, frame, write_rows
from asi_lens.results.verdicts import Verdict
from asi_lens.training.config import TrainConfig


@checked
class Page:
    """A run of a notebook: parameters, loaded sources, written files.

    `Page("04_dead_feature_curves", globals())` reads the names of the parameters from the notebook's cell of
    parameters and their values from the namespace, so the record holds the values that ran. The page records
    the fingerprint of everything loaded through it. Tables and figures are written at once; `done` writes
    the sidecar.

    Attributes:
        notebook: name of the notebook. parameters: values by name. profile: value of the `profile` parameter.
        folder: folder of the files that the run writes.
        seeds: `n_seeds` consecutive seeds from `seed` on; `seed` alone without `n_seeds`.
    """

    def __init__(self, notebook: str, namespace: Mapping[str, Any]):
        """Raises UnknownNameError for a notebook that does not exist, OptionError for a parameter that is
        missing in the namespace or not of the kind of its default, or a number of seeds below one."""
        names = notebook_defaults(notebook)
        missing = [name for name in names if name not in namespace]
        if missing:
            raise OptionError(
                f"{notebook}: {', '.join(missing)} is not set; run the cell of parameters first"
            )
        self.notebook = notebook
        self.parameters = checked_parameters(notebook, {name: namespace[name] for name in names})
        self.profile = str(self["profile"])
        folder = self.parameters.get("output_folder")
        self.folder = Path(folder).expanduser() if folder else figures_dir(self["model"], self.profile)
        count = self.parameters.get("n_seeds", 1)
        require_whole("n_seeds", count, 1)
        self.seeds = list(range(self["seed"], self["seed"] + count))
        self._model: nn.Module | None = None
        self._data: Split | None = None
        self._budget = ""
        self._sources: dict[str, str] = {}
        self._named: dict[str, str] = {}
        self._tables: list[str] = []
        self._figures: dict[str, dict[str, Any]] = {}
        self._verdicts: list[dict[str, Any]] = []

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter. Raises OptionError for a name that is not a parameter."""
        if name not in self.parameters:
            raise OptionError(f"{self.notebook} has no parameter {name!r} in its cell of parameters")
        return self.parameters[name]

    def load_model(self, name: str | None = None, part: str | None = None) -> nn.Module:
        """Return the parameters' model, or the model called `name`, in the `dtype` of the parameters.

        `part` is "decoder" for the text decoder of a model of speech.
        """
        self._model = load_model(self["model"] if name is None else name, dtype=self["dtype"], part=part)
        info = model_info(self._model)
        self._only(info.label, f"a model with fingerprint {info.fingerprint}")
        self._sources[info.label] = info.fingerprint
        return self._model

    def small_tokenizer(self, vocab: int) -> Any:
        """Return a tokenizer of `vocab` tokens trained on the main text: see `inputs.small_tokenizer`."""
        return small_tokenizer(self["main_corpus"], vocab)

    def load_tokens(
        self,
        model: Any,
        n_tokens: int,
        corpus: Any = None,
        *,
        after: Tokens | None = None,
        what: str = "",
    ) -> Tokens:
        """Return `n_tokens` tokens of a corpus (`main_corpus` by default) in sequences of `context`.

        `model` may be a tokenizer. The tokens follow those of `after`. `what` states their purpose in the
        record.
        """
        source = self["main_corpus"] if corpus is None else corpus
        tokens = load_tokens(
            source,
            model,
            n_tokens=n_tokens,
            context=self["context"],
            offset=0 if after is None else len(after),
        )
        if isinstance(source, str | Path):
            self._only(tokens.corpus, f"the text {existing(source) or source}")
        self._note(f"{tokens.corpus} {what}".strip(), tokens, model)
        return tokens

    def _note(self, name: str, data: Tokens | Inputs, model: Any) -> None:
        if self._sources.setdefault(name, data.fingerprint) != data.fingerprint:
            # Several models read one text, each as rows of its own.
            whole = isinstance(model, nn.Module)
            reader = model_info(model, fingerprint=False).label if whole else "another tokenizer"
            self._sources[f"{name} for {reader}"] = data.fingerprint

    def _only(self, name: str, what: str) -> None:
        """Raise OptionError if something else is called `name`: tables and captions tell them apart by it."""
        known = self._named.setdefault(name, what)
        if known != what:
            raise OptionError(
                f"{known} and {what} are both called {name!r}, by which tables tell them apart; rename one"
            )

    def load_inputs(
        self, model: nn.Module, n_rows: int, *, after: Tokens | Inputs | None = None, what: str = ""
    ) -> Tokens | Inputs:
        """Return `n_rows` rows of data for whatever a model takes, by the parameters' names of data.

        Models that read text get tokens of `main_corpus`, others rows of `pictures`, `speech` (clips laid end
        to end) or `sequences`. The data follow those of `after`. `what` states their purpose in the record.
        """
        kind = data_kind(model)
        if kind == "text":
            tokens = after if isinstance(after, Tokens) else None
            return self.load_tokens(model, n_rows, after=tokens, what=what)
        skipped = 0 if after is None else len(after)
        inputs = load_inputs(self[kind], model, n_rows, offset=skipped, join=kind == "speech")
        self._note(f"{inputs.corpus} {what}".strip(), inputs, model)
        return inputs

    def harvest(self, model: nn.Module, wheres: Sequence[SiteLayer]) -> Split:
        """Return training and held-out stores of every (site, layer), in the sizes of the parameters."""
        self._data = data = harvest_split(
            model,
            self["main_corpus"],
            list(dict.fromkeys(wheres)),
            n_tokens=self["n_tokens"],
            n_tokens_held_out=self["n_tokens_held_out"],
            n_tokens_loss=self.parameters.get("n_tokens_loss", self["context"]),
            context=self["context"],
            budget_gb=self["store_budget_gb"],
        )
        self._note(f"{data.train_tokens.corpus}, training", data.train_tokens, model)
        self._note(f"{data.held_out_tokens.corpus}, held out", data.held_out_tokens, model)
        return data

    def train_config(self, **changes: Any) -> TrainConfig:
        """Return options of training from `lr`, `batch_size`, `n_tokens_train` and `dead_window`."""
        options = {name: self[name] for name in ("batch_size", "dead_window")}
        options["n_tokens"] = self["n_tokens_train"]
        if "lr" not in changes:
            options["lr"] = self["lr"]
        return TrainConfig(**{**options, **changes})

    def train(
        self,
        store: ActivationStore | PairedStores,
        methods: Sequence[Recipe | str],
        *,
        d_sae: int | None = None,
        lr: float | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[TrainedRun]:
        """Train each method with each of `seeds` (see `train_recipes`); read finished runs from the cache."""
        changes = {} if lr is None else {"lr": lr}
        return train_recipes(
            store,
            methods,
            d_sae=self["d_sae"] if d_sae is None else d_sae,
            k=self["k"],
            seeds=self.seeds if seeds is None else seeds,
            train=self.train_config(**changes),
            log_every=self["log_every"],
            **options,
        )

    def rows(
        self,
        runs: Sequence[TrainedRun],
        held_out: ActivationStore | PairedStores,
        *,
        losses: bool = True,
        curves: bool = True,
        drift: bool = False,
    ) -> list[DeadFeatureRow]:
        """Return rows of trained dictionaries: see `dead_feature_rows`, or `drift_rows` if `drift` is True.

        Rows include the language-model losses unless `losses` is False. Raises OptionError if `load_model`
        or `harvest` was not called before.
        """
        model, data = self._loaded()
        judged: dict[str, Any] = {"model": model, "tokens": data.loss_tokens} if losses else {}
        if drift:
            return list(run_rows.drift_rows(runs, held_out, **judged))
        return run_rows.dead_feature_rows(runs, held_out, curves=curves, **judged)

    def paired(self, runs: Sequence[TrainedRun], reference: str = "random") -> list[PairedLossRow]:
        """Return paired differences of the methods' losses on the held-out text (see `paired_rows`)."""
        model, data = self._loaded()
        return paired_rows(runs, model, data.loss_tokens, reference=reference)

    def setting(self, model: nn.Module, tokens: Tokens, *more: str) -> str:
        """Return model, text, number of tokens (or the words in `more`) and context in words: the budget of a
        notebook that trains nothing."""
        info = model_info(model, fingerprint=False)
        parts = [info.label, tokens.corpus]
        parts += [*(more or [f"{tokens.n_tokens:,} tokens"]), f"context {self['context']}"]
        self._budget = ", ".join(parts)
        return self._budget

    def budget(
        self, runs: Sequence[TrainedRun], *, losses: bool = True, before: str = "", after: str = ""
    ) -> str:
        """Return the setting of runs in words; `judge` records it with the verdicts."""
        model, data = self._loaded()
        self._budget = f"{before}{run_rows.budget(model, runs, data, losses=losses)}{after}"
        return self._budget

    def table(
        self, rows: Sequence[Row] | Sequence[Mapping[str, Any]], row: type[Row] | None = None, stem: str = ""
    ) -> pd.DataFrame:
        """Write `<stem>.csv` (the notebook's name by default) and return it as a frame.

        `row`: class of the rows, for rows given as mappings.
        """
        checked = [one if isinstance(one, Row) else _row(row, one) for one in rows]
        stem = self._stem(stem)
        write_rows(self.folder / f"{stem}.csv", checked)
        self._tables = sorted({*self._tables, stem})
        return frame(checked)

    def figure(self, figure: go.Figure, caption: str, stem: str = "") -> go.Figure:
        """Write the figure's page and image under `<stem>` (the notebook's name by default).

        Returns the figure.
        """
        stem = self._stem(stem)
        saved = save(figure, self.folder / stem, caption=caption)
        title, subtitle = titles(figure)
        self._figures[stem] = {
            "title": title,
            "subtitle": subtitle,
            "caption": caption,
            "png": saved.png is not None,
            "reason": saved.reason,
        }
        return figure

    def judge(self, *verdicts: Verdict | None, budget: str | None = None) -> pd.DataFrame:
        """Record verdicts (None: a claim that was not tested). Returns a frame with a row for each number."""
        shown = []
        for one in verdicts:
            if one is None:
                continue
            told = one.verdict(self.profile)
            entry = {**asdict(one), "verdict": told, "budget": self._budget if budget is None else budget}
            del entry["holds"]
            self._verdicts = [old for old in self._verdicts if old["claim"] != one.claim] + [entry]
            shown += [(one.claim, told, number.name, number.text, one.over) for number in one.numbers]
        columns = ["claim", "verdict", "number", "value", "spread over"]
        return pd.DataFrame(shown, columns=columns).set_index(["claim", "verdict", "number"])

    def done(self) -> None:
        """Write the sidecar: parameters, sources, machine, and the files that the run wrote."""
        write_sidecar(
            self.folder,
            {
                "notebook": self.notebook,
                "parameters": provenance.told_parameters(self.parameters),
                "seeds": self.seeds,
                "sources": self._sources,
                "tables": self._tables,
                "figures": self._figures,
                "verdicts": self._verdicts,
                "versions": provenance.versions(),
                "git": provenance.git_state(),
                "machine": provenance.machine(),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def _stem(self, stem: str) -> str:
        number, stem = self.notebook.split("_")[0], stem or self.notebook
        require(stem.startswith(f"{number}_"), "stem", stem, f"a name that begins with {number}_")
        return stem

    def _loaded(self) -> tuple[nn.Module, Split]:
        if self._model is None or self._data is None:
            raise OptionError(f"{self.notebook}: load_model and harvest come before what is made of runs")
        return self._model, self._data


def _row(row: type[Row] | None, values: Mapping[str, Any]) -> Row:
    if row is None:
        raise OptionError("rows that are mappings need `row`, the class that they are of")
    return row(**values)
