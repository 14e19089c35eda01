"""The models and texts that notebooks ask for, found by running their cells without computing anything.

Everything that a cell imports is a stand-in, but for the calls that load models and texts, which are noted. A
stand-in takes any call, index and operation, and is an empty sequence. So loops over parameters run, and
loops over results do not: a notebook that chose its text by a result would have to be run.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from asi_lens.base.errors import AsiLensError, DataError
from asi_lens.results.parameters_cell import notebook_path

# What notebooks use of a `Page` besides the calls that load; a test holds the lists against `Page`.
PAGE_LOADS = ("load_model", "load_tokens", "load_inputs", "harvest", "small_tokenizer")
PAGE_LOADS_NOTHING = (
    *("budget", "done", "figure", "judge", "paired", "rows", "setting", "table", "train", "train_config"),
    *("folder", "notebook", "parameters", "profile", "seeds"),
)


@dataclass(frozen=True)
class AskedText:
    """A call of `load_tokens`."""

    source: str
    """Name of the corpus, as `load_tokens` takes it."""
    model: str
    """Model that the tokens are for; the empty string for a tokenizer of the text's own."""
    n_tokens: int
    context: int
    offset: int = 0
    vocab: int | None = None
    """Size of the text's own tokenizer (`inputs.small_tokenizer`)."""
    trained_on: str = ""
    """Text that this tokenizer was trained on."""
    media: tuple[tuple[str, str], ...] = ()
    """Pairs (kind, data) that are taken in place of the text if the model reads that kind."""


@dataclass
class Asked:
    """Models and texts, each once, in the order in which they are asked for."""

    models: list[str] = field(default_factory=list)
    texts: list[AskedText] = field(default_factory=list)

    def add_model(self, name: str) -> None:
        """Note a model."""
        if name not in self.models:
            self.models.append(name)

    def add_text(self, text: AskedText) -> None:
        """Note a text."""
        if text not in self.texts:
            self.texts.append(text)


def asked_by(notebooks: Mapping[str, Mapping[str, Any]]) -> Asked:
    """Return what notebooks ask for; `notebooks` holds their parameters by name.

    Raises DataError, naming notebook and cell, where it cannot be found out.
    """
    import nbformat

    asked = Asked()
    for name, parameters in notebooks.items():
        cells = nbformat.read(notebook_path(name), as_version=4).cells
        names: dict[str, Any] = {
            **parameters,
            "__builtins__": {**vars(builtins), "__import__": partial(_imported, asked)},
        }
        names["__spread__"] = _spread
        names["display"] = lambda *shown: None  # IPython's
        for number, cell in enumerate(cells):
            if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
                continue
            try:
                tree = ast.fix_missing_locations(_Unpacking().visit(ast.parse(cell.source)))
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(tree, f"{name}, cell {number}", "exec"), names)
            except Exception as error:
                if isinstance(error, AsiLensError) and not isinstance(error, DataError):
                    raise
                raise DataError(
                    f"cannot find out what {name} asks for: cell {number}: {type(error).__name__}: {error}"
                ) from error
    return asked


class Blank(str):
    """Stands for a result: any use of it gives a Blank. It is an empty sequence and an empty string.

    `known`: what is known of the result before the notebook runs.
    """

    def __new__(cls, known: Any = None) -> Any:
        blank = str.__new__(cls)
        object.__setattr__(blank, "__known__", known)
        return blank

    def _same(self, *_: Any, **__: Any) -> Any:
        return Blank()

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name.startswith("__") else Blank()

    def __setattr__(self, *_: Any) -> None:
        return None

    def __setitem__(self, *_: Any) -> None:
        return None

    def __bool__(self) -> bool:
        return True

    def __format__(self, _: str) -> str:
        return ""

    def __hash__(self) -> int:
        return id(self)

    def __exit__(self, *_: Any) -> None:
        return None

    __call__ = __getitem__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _same
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _same
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __neg__ = __invert__ = __abs__ = __round__ = __enter__ = _same


class _Text(Blank):
    """Stands for tokens of a known number of rows."""

    def __len__(self) -> int:
        return int(self.__known__)

    def __getitem__(self, part: Any) -> Any:
        return _Text(len(range(len(self))[part])) if isinstance(part, slice) else Blank()


class _Model(Blank):
    """Stands for a model of known name."""


class _Tokenizer(Blank):
    """Stands for a tokenizer that is trained on a text; known are its fields of `AskedText`."""


def _imported(asked: Asked, name: str, *_: Any) -> Any:
    """`__import__` of a cell: asi_lens's loading functions are noted, everything else is blank."""
    return _Package(asked) if name.split(".")[0] == "asi_lens" else Blank()


class _Package:
    """Stand-in for `asi_lens`."""

    def __init__(self, asked: Asked):
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return Blank()

    def Page(self, notebook: str, namespace: Mapping[str, Any]) -> _Page:  # noqa: N802
        """Stand-in for `asi_lens.Page`."""
        return _Page(self._asked, namespace)

    def load_model(self, model: Any, **_: Any) -> Any:
        """Stand-in for `asi_lens.load_model`."""
        self._asked.add_model(_known("model", model, str))
        return _Model(model)

    def load_tokens(
        self,
        source: Any,
        model: Any,
        n_tokens: Any,
        *,
        context: Any = 256,
        offset: Any = 0,
        media: Any = (),
        **more: Any,
    ) -> Any:
        """Stand-in for `asi_lens.load_tokens`."""
        if more:
            raise DataError(f"load_tokens with {', '.join(more)} is not bundled")
        rows = _known("n_tokens", n_tokens, int) // _known("context", context, int)
        own: dict[str, Any] = model.__known__ if type(model) is _Tokenizer else {}
        text = AskedText(
            _known("corpus", source, str),
            "" if own else _known("model", model, _Model).__known__,
            n_tokens,
            context,
            _known("offset", offset, int),
            media=media,
            **own,
        )
        self._asked.add_text(text)
        return _Text(rows)

    def harvest_split(
        self,
        model: Any,
        corpus: Any,
        *_: Any,
        n_tokens: Any,
        n_tokens_held_out: Any,
        context: Any = 256,
        **__: Any,
    ) -> Any:
        """Stand-in for `asi_lens.harvest_split`."""
        train = self.load_tokens(corpus, model, n_tokens, context=context)
        self.load_tokens(corpus, model, n_tokens_held_out, context=context, offset=len(train))
        return Blank()


class _Page:
    """Stand-in for `Page`: its loading methods call the package's with the same parameters."""

    def __init__(self, asked: Asked, parameters: Mapping[str, Any]):
        self._package, self._parameters = _Package(asked), parameters

    def __getattr__(self, name: str) -> Any:
        if name in PAGE_LOADS_NOTHING:
            return Blank()
        raise DataError(f"page.{name} is not known here; it may load something")

    def __getitem__(self, name: str) -> Any:
        return self._parameters[name]

    def load_model(self, name: str | None = None, part: str | None = None) -> Any:
        return self._package.load_model(self["model"] if name is None else name)

    def small_tokenizer(self, vocab: Any) -> Any:
        return _Tokenizer({"vocab": _known("vocab", vocab, int), "trained_on": self["main_corpus"]})

    def load_tokens(
        self, model: Any, n_tokens: Any, corpus: Any = None, *, after: Any = None, what: str = ""
    ) -> Any:
        source = self["main_corpus"] if corpus is None else corpus
        offset = 0 if after is None else len(after)
        return self._package.load_tokens(source, model, n_tokens, context=self["context"], offset=offset)

    def load_inputs(self, model: Any, n_rows: Any, *, after: Any = None, what: str = "") -> Any:
        media = tuple((kind, _known(kind, self[kind], str)) for kind in ("pictures", "speech", "sequences"))
        offset = 0 if after is None else len(after)
        options = {"context": self["context"], "offset": offset}
        return self._package.load_tokens(self["main_corpus"], model, n_rows, **options, media=media)

    def harvest(self, model: Any, wheres: Any) -> Any:
        sizes = {name: self[name] for name in ("n_tokens", "n_tokens_held_out", "context")}
        return self._package.harvest_split(model, self["main_corpus"], wheres, **sizes)


def _known(key: str, value: Any, kind: type) -> Any:
    """Return the value. Raises DataError for one that depends on a result."""
    if type(value) is not kind:
        raise DataError(f"{key} is {type(value).__name__} here, not known before the notebook runs")
    return value


class _Unpacking(ast.NodeTransformer):
    """Let `a, b = result` work for a result that is blank."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        (target, *_) = node.targets
        if isinstance(target, ast.Tuple):
            count = ast.Constant(len(target.elts))
            node.value = ast.Call(ast.Name("__spread__", ast.Load()), [node.value, count], [])
        return node


def _spread(value: Iterable[Any], count: int) -> Iterable[Any]:
    return [Blank() for _ in range(count)] if isinstance(value, Blank) else value
