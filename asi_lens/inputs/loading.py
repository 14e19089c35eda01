"""A TransformerBridge from a Hugging Face folder or a hub name, with every weight that the model needs.

Whatever a library raises while a folder is opened becomes an error that names the folder and the reason.
"""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from asi_lens.base.errors import (
    AsiLensError,
    CacheError,
    DataError,
    FetchError,
    UnknownNameError,
    UnsupportedModelError,
    require,
)
from asi_lens.base.offline import no_hub, refused
from asi_lens.base.paths import is_cached
from asi_lens.inputs.sources import SOURCES

ORIGINS: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
"""Name, and origin of the weights' precision, of every model that was loaded here."""
REVISIONS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The hub's revision of a TransformerBridge that was loaded from one that was named."""

# Not the folder's fault: raised again as they are.
_PASS = (AsiLensError, MemoryError, torch.OutOfMemoryError)
# A library does not know the model, as opposed to a folder with something broken in it.
_UNKNOWN = (ValueError, KeyError, AttributeError, NotImplementedError, ImportError)
_BROKEN = (JSONDecodeError, UnicodeError)


def boot_bridge(
    source: str | Path,
    name: str,
    weights: str | None = None,
    *,
    dtype: torch.dtype,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
) -> nn.Module:
    """Return the model in a folder (a Path) or on the hub (a string). Raises as `models.load_model` does."""
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(source, Path):
        require(revision is None, "revision", revision, "left out for a model that is not on the hub")
    no_hub()
    _mend_neox()
    loader = _Loader(str(source))
    with named_errors(source, name, loader), warnings.catch_warnings():
        # hook aliases of parts that an architecture lacks: asking for such a site raises later
        warnings.filterwarnings("ignore", message="Hook alias .* did not resolve")
        bridge = TransformerBridge.boot_transformers(
            str(source),
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_class=loader,
            tokenizer=None if revision is None else _tokenizer(str(source), revision, trust_remote_code),
        )
    if revision is not None:
        REVISIONS[bridge] = revision
    weights = weights or loader.weights
    quantization = getattr(bridge.original_model.config, "quantization_config", None)
    if weights is None and quantization:
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method", "")
        weights = f"quantised ({getattr(method, 'value', method)})"
    ORIGINS[bridge] = (name, weights or "as released")
    return bridge


def _tokenizer(source: str, revision: str, trust_remote_code: bool) -> Any:
    """Return a revision's tokenizer as TransformerLens loads one, which takes that of `main` alone."""
    from transformers import AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(source, add_bos_token=True, **options)
    except ValueError:  # it has no token to begin with
        return AutoTokenizer.from_pretrained(source, **options)


@contextmanager
def named_errors(source: str | Path, name: str, loader: Loading) -> Iterator[None]:
    """Turn what a library raises inside the context into an error that names the folder and the reason."""
    from safetensors import SafetensorError

    try:
        yield
    except _PASS:
        raise
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        kind = CacheError if is_cached(Path(source)) else DataError
        reason = "nothing but tensors is unpickled" if isinstance(error, pickle.UnpicklingError) else error
        raise kind(f"the weights of {source} are damaged or cut off: {reason}") from error
    except OSError as error:
        raise _load_error(source, name, error) from error
    except Exception as error:  # tokenizers and PyTorch raise Exception and RuntimeError themselves
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        tokenizer = any("tokeniz" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(source, Path) and tokenizer:
            raise DataError(f"cannot load the tokenizer in {source}: {reason}") from error
        broken = isinstance(error, _BROKEN) or not isinstance(error, _UNKNOWN)
        if isinstance(source, Path) and broken and not loader.done:
            raise DataError(f"cannot load the model in {source}: {reason}") from error
        raise UnsupportedModelError(f"cannot load {name!r} as a {loader.kind}: {reason}") from error


class Loading(Protocol):
    """A model that is being loaded: what it becomes, and whether its weights are there."""

    kind: str
    done: bool


class _Loader:
    """Stands for a class of transformers: loads a model as it does, and refuses one that lacks weights.

    transformers leaves a weight that a folder lacks at random values, and says so in its log only.
    """

    kind = "TransformerBridge"

    def __init__(self, source: str):
        self.source = source
        self.done = False
        self.weights: str | None = None
        """What was done to the weights, if anything was."""

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """Return transformers' model; weights of 8 bits with scales (FP8) are dequantised.

        Raises as `require_whole` does.
        """
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
            get_hf_model_class_for_architecture,
        )
        from transformers import AutoModelForCausalLM

        try:
            auto = get_hf_model_class_for_architecture(
                determine_architecture_from_hf_config(options["config"])
            )
        except ValueError:  # TransformerLens took the text model's configuration out of a larger one
            auto = AutoModelForCausalLM
        quantization = getattr(options["config"], "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
            quantization["dequantize"] = True  # by itself transformers does so only where no GPU takes FP8
            self.weights = "8-bit weights, dequantised"
        model, report = auto.from_pretrained(
            name, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
        require_whole(self.source, model, report)
        self.done = True
        return model


def require_whole(source: str, model: Any, report: dict[str, Any]) -> None:
    """Raise DataError unless transformers' loading report says that every weight was in the files.

    Raises UnsupportedModelError for floating weights of 8 bits, whose scales stand beside them:
    TransformerLens casts them to another dtype, after which transformers leaves the scales out.
    """
    if report["mismatched_keys"]:
        key, there, wanted = sorted(report["mismatched_keys"])[0]
        others = len(report["mismatched_keys"]) - 1
        raise DataError(
            f"the weights of {source} do not fit its config.json: {key} is {tuple(there)}, config.json asks "
            f"for {tuple(wanted)}{f' (and {others} more)' * (others > 0)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        unexpected = sorted(report["unexpected_keys"])
        there = f"; it has {_some(unexpected)}, which the model does not know" if unexpected else ""
        raise DataError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, which would stay random: "
            f"{_some(missing)}{there}"
        )
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.itemsize == 1:
            raise UnsupportedModelError(
                f"the weights of {source} are quantised with scales beside them ({name} is {weight.dtype}), "
                "and a cast would lose the scales; allowed are a copy in bfloat16 and a dequantised load"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)} in all)" if len(names) > 3 else "")


def _mend_neox() -> None:
    """Let TransformerLens 3.5 find GPT-NeoX's head, which transformers 5.14 renamed."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.supported_architectures import NeoxArchitectureAdapter

    class Mended(NeoxArchitectureAdapter):
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            head = self.component_mapping["unembed"]
            if head.name == "embed_out" and hasattr(hf_model, "lm_head"):
                head.name = "lm_head"

    registered = ArchitectureAdapterFactory._adapters.get("GPTNeoXForCausalLM")
    if registered is NeoxArchitectureAdapter:
        ArchitectureAdapterFactory.register_adapter("GPTNeoXForCausalLM", Mended)


def _load_error(source: str | Path, name: str, error: OSError) -> Exception:
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(source, Path):
        return DataError(f"cannot load the model in {source}: {message}")
    if "not a valid model identifier" in str(error):
        return UnknownNameError(f"the model hub has no model {name!r} that you may see: {message}")
    packaged = ", ".join(key for key, entry in SOURCES.items() if entry.kind == "model")
    if no_hub():
        return refused(f"the model {name!r}", "Give its Hugging Face folder or a `.gguf` file by its path")
    return FetchError(
        f"cannot fetch {name!r} from the model hub: {message} Without the hub, use a packaged model "
        f"({packaged}), a local folder or a `.gguf` file"
    )
