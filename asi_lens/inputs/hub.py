"""The Hugging Face hub: texts streamed at one commit, by which cached tokens are named; local snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from asi_lens.base.errors import AsiLensError, FetchError, OptionError, require_known
from asi_lens.base.offline import no_hub, refused
from asi_lens.inputs.sources import corpus_names

SHUFFLE_BUFFER = 10_000


def column_of(rows: Iterable[dict[str, Any]], column: str) -> Iterator[Any]:
    """Yield one column's value of each row. Raises UnknownNameError for a row without the column."""
    for row in rows:
        require_known([column], row, "column")
        yield row[column]


def hub_rows(
    repo: str, pinned: str, column: str, split: str, name: str | None, seed: int | None = None
) -> Iterator[Any]:
    """Yield the values of a column of the data set at the commit `pinned`, shuffled if `seed` is given.

    Raises UnknownNameError for a split or column, OptionError for a configuration that does not exist, and
    FetchError if the hub cannot be read or is refused (`base.offline`).
    """
    import datasets

    if no_hub():
        raise _absent(repo)
    try:
        known = datasets.get_dataset_split_names(repo, name, revision=pinned)
        require_known([split], known, "split")
        stream = datasets.load_dataset(repo, name, split=split, streaming=True, revision=pinned)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from column_of(stream, column)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise _not_reached(repo, error) from error
    except ValueError as error:
        if isinstance(error, AsiLensError):
            raise
        # datasets raises ValueError for a missing or unknown configuration.
        raise OptionError(f"name={name!r} is not allowed for {repo!r}: {error}") from error


def hub_commit(repo: str, revision: str | None) -> str:
    """Return the current commit of the hub name, so that cached tokens belong to one content."""
    from huggingface_hub import HfApi

    if no_hub():
        raise _absent(repo)
    try:
        return str(HfApi().dataset_info(repo, revision=revision, timeout=30).sha)
    except Exception as error:  # httpx, OS and hub errors, which have no common base
        raise _not_reached(repo, error) from error


def local_snapshot(repo: str) -> Path:
    """Return the folder `<repository>/snapshots/<commit>` of a model in the hub's own cache.

    It is the snapshot that the name alone stands for: that of `refs/main`. Raises FetchError without one.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json")
    if not isinstance(found, str):
        raise FetchError(f"the hub's cache has no snapshot of the model {repo!r}; run `hf download {repo}`")
    return Path(found).parent


def _absent(repo: str) -> FetchError:
    bring = f"Name the commit, '{repo}@<40 hex digits>', to use tokens that were cached before"
    return refused(f"the dataset {repo!r}", bring)


def _not_reached(repo: str, error: Exception) -> FetchError:
    return FetchError(
        f"could not read the dataset {repo!r} from the Hugging Face hub ({type(error).__name__}: {error}). "
        f"There is no local path of that name either. Check the name and, for gated data, the login; without "
        f"a network use a packaged corpus ({', '.join(corpus_names())}) or a local file, or name the commit, "
        f"'{repo}@<40 hex digits>', to use tokens that were cached before."
    )
