"""Log of a training run: a CSV file in its folder, and TensorBoard or W&B if asked for."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError, OptionError, require_known
from asi_lens.base.files import write_whole

METRICS_FILE = "metrics.csv"
LOGGERS = ("tensorboard", "wandb")

Metrics = dict[str, float | int | None]
Logger = Callable[[Mapping[str, Any]], None]


class MetricsLog:
    """Rows of metrics in memory and, given a folder, in `metrics.csv`. The file is complete after every row.

    `history` holds the rows so far, including rows before a resumption.
    """

    def __init__(
        self, columns: Sequence[str], folder: Path | None = None, loggers: Iterable[str | Logger] = ()
    ):
        self.columns = tuple(columns)
        self.path = None if folder is None else folder / METRICS_FILE
        self.history: list[Metrics] = []
        found = [_logger(one, folder) if isinstance(one, str) else (one, None) for one in loggers]
        self._loggers = [logger for logger, _ in found]
        self._ends = [end for _, end in found if end is not None]

    def resume(self, step: int) -> None:
        """Read the file's rows up to `step` and drop later rows, which belong to lost work."""
        if self.path is None:
            return
        self.history = [row for row in read_metrics(self.path) if (row.get("step") or 0) <= step]
        with write_whole(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.history)

    def add(self, row: Metrics) -> None:
        """Append one row, whose keys are the columns, and pass it to the loggers."""
        self.history.append(row)
        if self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        for logger in self._loggers:
            logger(row)

    def close(self) -> None:
        """End the runs of the loggers that were given by name."""
        for end in self._ends:
            end()


def read_metrics(path: Path | str) -> list[Metrics]:
    """Return the rows of a `metrics.csv`, without a last row cut off by a kill; empty if there is no file.

    Raises DataError for a file that is not a table of metrics.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, newline, _ = text.rpartition("\n")
    rows: list[Metrics] = []
    for record in csv.DictReader((whole + newline).splitlines()):
        try:
            rows.append({key: _number(value) for key, value in record.items()})
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} is not a table of metrics: {error}") from error
    return rows


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def _logger(name: str, folder: Path | None) -> tuple[Logger, Callable[[], None]]:
    """Return a logger by name with the function that ends its run, which is no other trainer's.

    Its package is imported here, only when the logger is asked for.
    """
    require_known([name], LOGGERS, "logger")
    where = None if folder is None else str(folder)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # Without a folder the default one is named by the second; the comment is then added to it.
            writer = SummaryWriter(where, comment=f"_{secrets.token_hex(4)}")

            def to_tensorboard(row: Mapping[str, Any]) -> None:
                for key, value in row.items():
                    if value is not None and key not in ("step", "tokens"):
                        writer.add_scalar(key, value, row["tokens"])
                writer.flush()

            return to_tensorboard, writer.close
        import wandb

        # By default a second run ends or continues the first one of a process.
        run = wandb.init(project="asi_lens", dir=where, reinit="create_new")
        return lambda row: run.log(dict(row), step=int(row["step"])), run.finish
    except ImportError as error:
        raise OptionError(
            f"loggers={name!r} needs a package that is not installed: pip install 'asi_lens[{name}]'"
        ) from error
