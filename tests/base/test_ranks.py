"""Ranks agree, fail together and name who is lost; killed and hanging ones are in sae/test_main."""

from __future__ import annotations

import json

import pytest
import torch
from small_ranks import Launched

from asi_lens.base.errors import OptionError
from asi_lens.base.ranks import RankError, Ranks, joined


class Two(Ranks):
    """Rank 0 of two, of which the other says `theirs`."""

    size = 2

    def __init__(self, theirs: str):
        self.theirs = theirs

    def exchange(self, what: str, text: str, *, patient: bool = False) -> list[str]:
        return [text, self.theirs]


def test_alone_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.exchange("names", "me") == ["me"]
        assert ranks.together("work", lambda: 7) == 7
        assert torch.equal(ranks.share(torch.ones(2)), torch.ones(2))
        ranks.require_same("versions", {"torch": "2"})
        with pytest.raises(ZeroDivisionError):
            ranks.together("work", lambda: 1 // 0)
    with pytest.raises(OptionError, match="timeout_s=0"), joined(timeout_s=0):
        pytest.fail("joined")


def test_what_differs_is_named() -> None:
    theirs = Two(json.dumps({"torch": "2.0", "numpy": "2"}))
    with pytest.raises(RankError, match=r"different versions: torch is '2.0' on rank 1, '2.13' on rank 0$"):
        theirs.require_same("versions", {"torch": "2.13", "numpy": "2"})
    theirs.require_same("versions", {"torch": "2.0", "numpy": "2"})


def test_work_fails_on_every_rank_if_it_fails_on_any() -> None:
    assert Two("").together("loading", lambda: 7) == 7
    with pytest.raises(RankError, match=r"^loading failed on rank 1: OSError: full$"):
        Two("OSError: full").together("loading", lambda: 7)
    with pytest.raises(RankError, match=r"rank 0: ZeroDivisionError: .*; rank 1: OSError: full$") as caught:
        Two("OSError: full").together("loading", lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


_PROGRAM = """
import torch
from asi_lens.base.ranks import joined
with joined("cpu", 60) as ranks:
    assert ranks.size == 2
    assert ranks.exchange("names", f"rank {ranks.rank}") == ["rank 0", "rank 1"]
    assert ranks.share(torch.full((2,), float(ranks.rank + 1))).tolist() == [1.0, 1.0]
    ranks.together("loading", lambda: [1, 2][ranks.rank + LATER])
"""


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_hear_each_other(fails: bool) -> None:
    program = _PROGRAM.replace("LATER", str(int(fails)))
    codes, said = Launched([["-c", program]] * 2).finish()
    assert codes == ([1, 1] if fails else [0, 0]), said
    assert said.count("RankError: loading failed on rank 1: IndexError") == (2 if fails else 0), said
