"""A model is verified when it is first used: on a few random tokens, in its own dtype.

- The plain twin with fused attention against transformers' step-by-step attention: logits, last residual.
- The bridge's own computation against the plain twin (when a hook that only the bridge has is first used).
  After half precision, whose rounding hides errors of some per cent, both are compared in float32 as well.
- resid_pre + attn_out + mlp_out = resid_post at every layer, with the norms and multipliers that the
  architecture has: a site is the hook whose value is really added to the stream.
- z W_O (+ b_O) = attention's output at every layer.
- Whether later tokens change earlier outputs.

A check that does not hold makes the sites concerned unavailable, with an error that states the difference.
The outcome is cached under the model's fingerprint and the source of this room: a later version checks anew.
The bridge's own computation is compared in every process, since the fingerprint is of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import UnsupportedModelError
from asi_lens.base.files import source_digest
from asi_lens.inputs import agreement, identities, structure, twin
from asi_lens.inputs.agreement import has_head, record, relative_error
from asi_lens.inputs.fingerprint import cached_number, model_fingerprint, number_key
from asi_lens.inputs.float32 import fits_float32
from asi_lens.inputs.identities import Check, Found
from asi_lens.inputs.passes import run
from asi_lens.inputs.plain import PlainModel

_SEQUENCES, _POSITIONS = 2, 12


@dataclass(repr=False)
class Verification(Found):
    """The outcome of a model's checks. `str` is a table; `records` are its rows."""

    causal: bool = False
    """Later tokens do not change earlier outputs."""
    failure: str = ""
    """Why no number of the model can be trusted; empty if it can."""

    @property
    def holds(self) -> bool:
        """Whether every check holds and no site is refused."""
        return not self.failure and not self.refused and all(check.holds for check in self.checks)

    def records(self) -> list[dict[str, object]]:
        """Return one row per check: check, layer (None for the whole model), error, allowed, holds."""
        return [
            {
                "check": check.what,
                "layer": check.layer,
                "error": check.error,
                "allowed": check.allowed,
                "holds": check.holds,
            }
            for check in self.checks
        ]

    def __str__(self) -> str:
        lines = [f"{self.model}, {str(self.dtype).removeprefix('torch.')}, causal: {self.causal}"]
        if self.failure:
            lines.append(f"not usable: {self.failure}")
        for what in dict.fromkeys(check.what for check in self.checks):
            same = [check for check in self.checks if check.what == what]
            worst = max(same, key=lambda check: check.error / check.allowed)
            layer = "" if worst.layer is None else f" (layer {worst.layer})"
            verdict = "holds" if worst.holds else "DOES NOT HOLD"
            lines.append(
                f"{what}: {worst.error:.1e}{layer}, rounding explains {worst.allowed:.1e}: {verdict}"
            )
        for site in dict.fromkeys(site for site, _ in [*self.sites, *self.refused]):
            hooks = {
                hook.replace(f"blocks.{at}.", "") for (one, at), hook in self.sites.items() if one == site
            }
            lines += [f"{site}: {', '.join(sorted(hooks))}"] * bool(hooks)
            reasons: dict[str, list[int]] = {}
            for (one, at), reason in self.refused.items():
                if one == site:
                    reasons.setdefault(reason, []).append(at)
            lines += [f"{site}: not at layers {at}: {reason}" for reason, at in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


@dataclass
class _Known:
    state: structure.State
    found: Verification
    own: str | None = None
    """Error of the bridge's own computation; empty if it holds, None if it was not compared yet."""


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


@checked
def verify(model: nn.Module) -> Verification:
    """Return the table of a model's checks, those of the bridge's own computation included.

    The model runs a few times on 24 tokens, for every structure of the model: adding a hook, editing a weight
    in place and loading the same model again change nothing in it or begin anew. A model of half precision
    takes three times the memory of its weights meanwhile, if there is as much (see `in_float32`). Raises
    UnsupportedModelError for a model without layers.
    """
    found = verification(model)
    own_error(model)
    return found


def verification(model: nn.Module, both: twin.Runners | None = None) -> Verification:
    """Return the checks of a model, without those of the bridge's own computation unless it has no twin.

    `both`: the model's runners as they are now, for a caller that has them.
    """
    return _known(model, both).found


def require_own(model: nn.Module, both: twin.Runners | None = None) -> None:
    """Raise UnsupportedModelError unless the bridge's own computation equals the plain model's."""
    error = own_error(model, both)
    if error:
        raise UnsupportedModelError(error)


def own_error(model: nn.Module, both: twin.Runners | None = None) -> str:
    """Compare the bridge's own computation with the plain twin's; return the error's text, or ""."""
    known = _known(model, both)
    if known.own is None:
        known.own = _compare_own(model, known.found)
    return known.own


def _known(model: nn.Module, both: twin.Runners | None = None) -> _Known:
    both = both or twin.runners(model)
    known = _KNOWN.get(model)
    if known is None or known.state is not both.state:
        # A caller may be in inference mode, whose tensors do not count their changes (`_record_all`).
        with structure.without_added_hooks(model), torch.inference_mode(False):
            known = _KNOWN[model] = _Known(both.state, _cached(model, both))
    return known


def _cached(model: nn.Module, both: twin.Runners) -> Verification:
    """Return `_verified`, from the cache if the same model was verified before on this kind of device."""
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"device": weight.device.type, "float32": fits_float32(model)}
    # Checks that an older version made say nothing of this one.
    key = number_key(model_fingerprint(model), dtype, source=_source(), **options)
    places = (both.plain or both.own).places

    def compute() -> dict[str, Any]:
        found = asdict(_verified(model, both))
        found["dtype"] = dtype
        for name in ("sites", "refused", "writes"):
            found[name] = list(found[name].items())
        return {**found, "changing": [name for name, place in places.items() if place.changes]}

    try:
        known = cached_number("verifications", key, compute)
    except OSError:  # a cache that cannot be written: the same outcome, a second later
        known = compute()
    for name in known.pop("changing"):
        places[name] = places[name]._replace(changes=True)
    for name in ("sites", "refused"):
        known[name] = {(site, layer): text for (site, layer), text in known[name]}
    checks = [Check(**check) for check in known.pop("checks")]
    return Verification(**{**known, "checks": checks, "dtype": weight.dtype, "writes": dict(known["writes"])})


@cache
def _source() -> str:
    """Return the digest of all code that reads models and checks them."""
    return source_digest(__package__)


def _verified(model: Any, both: twin.Runners) -> Verification:
    runner = both.plain or both.own
    dtype = next(model.parameters()).dtype
    found = Verification(twin.architecture(model), dtype)
    layers = range(len(runner.blocks))
    if both.plain is None and twin.kind_of(model) == "bridge" and not _without_a_twin_on_purpose(both):
        found.failure = f"it cannot be compared with the plain Hugging Face model: {both.why_not}"
    given = sample_inputs(model)
    try:
        values = _record_all(model, runner, given)
        last, _ = record(model, runner, _other_last(given, model), {"last": _last(runner)})
    except (MemoryError, torch.OutOfMemoryError):
        raise  # what else is on the device now says nothing of the model, and would be kept in the cache
    except Exception as error:  # whatever an architecture raises where it is not one of such inputs
        takes = model.takes if isinstance(model, PlainModel) else "token ids"
        found.failure = f"it does not run on {takes} ({_first_line(error)})"
    if found.failure:
        found.refused = {(site, layer): found.failure for site in identities.SITES for layer in layers}
        return found
    final = values[f"{layers[-1]}.post"]
    # Rows are computed alike in both passes: a causal model gives the same numbers but for rounding.
    change = relative_error(last["last"][:, :-1], final[:, :-1], dtype)
    found.causal = change <= 8 * torch.finfo(dtype).eps
    for layer in layers:
        identities.check_layer(model, runner, layer, values, found)
    _compare_attention(model, runner, found, given)
    return found


def _last(runner: twin.Runner) -> twin.Place:
    return twin.Place(runner.blocks[-1], "out")


def _first_line(error: Exception) -> str:
    """Return an error's class and the beginning of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _without_a_twin_on_purpose(both: twin.Runners) -> bool:
    return "processed" in both.why_not or "several devices" in both.why_not


def _compare_attention(model: nn.Module, runner: twin.Runner, found: Verification, given: twin.Given) -> None:
    eager = twin.eager_runner(model)
    if eager is None:
        return
    checks = agreement.compared(model, runner, eager, given, lambda one: {"last residual": _last(one)})
    for check in (replace(one, what=f"{one.what}, fused attention = step by step") for one in checks):
        found.checks.append(check)
        if not check.holds and not found.failure:
            found.failure = f"{check.text}: transformers' two ways to compute attention differ"
    if found.failure:
        places = [*found.sites, *found.refused]
        found.refused = dict.fromkeys(places, found.failure)
        found.sites.clear()


def _compare_own(model: nn.Module, found: Verification) -> str:
    both = twin.runners(model)
    if both.plain is None or found.failure:
        return found.failure
    ids = sample_ids(model)
    names = [name for name in found.sites.values() if name in both.own.places]
    with structure.without_added_hooks(model):
        try:
            checks = agreement.compared(
                model, both.own, both.plain, ids, lambda one: {name: one.places[name] for name in names}
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the bridge's code for an architecture, on a model that it does not fit
            return _own_message(found, f"it fails ({_first_line(error)})")
    worst = max(checks, key=lambda check: (not check.holds, check.error / check.allowed))
    found.checks.append(replace(worst, what="the bridge's own computation = the plain model"))
    return "" if worst.holds else _own_message(found, f"{worst.what} differs by {worst.error:.1%}")


def _own_message(found: Verification, why: str) -> str:
    return (
        f"hooks that only TransformerLens computes, and hooks or modules that you added, need its own "
        f"computation of {found.model}, which is not that of the Hugging Face model: {why}. Sites "
        "and hooks at the inputs and outputs of Hugging Face modules are computed by the model itself"
    )


def sample_ids(model: Any) -> Tensor:
    """Return a few random token ids [2 12] on the model's device, the same at every call."""
    cfg = model.cfg
    positions = min(_POSITIONS, int(cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(cfg.d_vocab), (_SEQUENCES, positions), generator=generator)
    return ids.to(next(model.parameters()).device)


def sample_inputs(model: Any) -> twin.Given:
    """Return a few random inputs of a model's kind: token ids, pictures or speech."""
    return model.sample() if isinstance(model, PlainModel) else sample_ids(model)


def _other_last(given: Any, model: Any) -> twin.Given:
    if isinstance(model, PlainModel):
        return model.sample(other_last=True)
    other: Tensor = given.clone()
    other[:, -1] = (other[:, -1] + 1) % int(model.cfg.d_vocab)
    return other


def _record_all(model: nn.Module, runner: twin.Runner, given: twin.Given) -> dict[str, Tensor]:
    """Return the values at `identities.wanted`, and mark places whose tensors change after their hooks."""
    wanted = identities.wanted(runner)
    kept: dict[str, tuple[Tensor, int, Tensor | None]] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        copies = name in wanted
        return lambda x: kept.__setitem__(name, (x, x._version, x.clone() if copies else None))

    places = {**runner.places, **wanted}
    watched = twin.Runner(runner.blocks, places, runner.root)
    with torch.no_grad():  # tensors of inference mode do not count their changes
        hooks = {name: keep(name) for name in places}
        run(model, watched, given, hooks, logits=has_head(model, runner), reach_all=False)
    for name, (x, version, _) in kept.items():
        if x._version != version and name in runner.places:
            runner.places[name] = runner.places[name]._replace(changes=True)
    return {name: copy for name, (_, _, copy) in kept.items() if copy is not None}
