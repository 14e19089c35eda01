"""Folders of dictionaries: ours, which SAELens 6 and sparsify can read too, and theirs.

    cfg.json                   the keys of both libraries; each ignores the other's
    sae_weights.safetensors    for SAELens: W_enc [d_in d_sae], b_enc, W_dec [d_sae d_in], b_dec
    sae.safetensors            for sparsify: encoder.weight [d_sae d_in], encoder.bias, W_dec, b_dec
    asi_lens.json              our configuration, and a checksum of every other file
    asi_lens.safetensors       tensors that differ in bits from sae_weights: biases before folding,
                               input_mean, input_scale

Both libraries compute acts = TopK(ReLU((x - b_dec) W_enc + b_enc)), reconstruction = acts W_dec + b_dec on
raw activations x: the input's centering and scaling are folded in (`SparseAutoencoder.folded`). A folder of
ours is read back as the same dictionary, bit by bit. Nothing is unpickled.

sparsify supports TopK only, so folders of other kinds hold no file for sparsify. Transcoders do not subtract
b_dec from their input. Transcoders with TopK are written for sparsify (if both sides have the same width),
with ReLU, JumpReLU or BatchTopK for SAELens, and others for this package only. Transcoders of other libraries
are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from asi_lens.base.errors import DataError, OptionError, require_known
from asi_lens.base.files import sha256_of, write_whole_folder
from asi_lens.base.safetensors_io import pieces, read_tensors, write_tensors
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.finite import require_weights
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.transcoder import Transcoder

FORMAT = 1
CONFIG, SAELENS, SPARSIFY = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
OURS, OUR_WEIGHTS = "asi_lens.json", "asi_lens.safetensors"
SAELENS_VERSION = "6.54.12"
"""Version of SAELens whose format is written; every SAELens 6 reads it."""

# Keys of `SAEConfig.metadata`: our name -> SAELens' name.
_RENAMED = {"model": "model_name", "context": "context_size", "bos": "prepend_bos", "corpus": "dataset_path"}
# SAELens' architectures -> our kinds.
_ARCHITECTURES = {kind.saelens: name for name, kind in KINDS.items() if kind.saelens and kind.saelens_reads}
_SAELENS_KEYS = {
    *("architecture", "d_in", "d_sae", "k", "dtype", "device", "metadata"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
}
# Keys of SAELens' training configurations (its checkpoints); they do not change a dictionary's outputs.
_TRAINING_KEYS = {
    *("decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations", "l1_coefficient", "lp_norm"),
    *("l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "jumprelu_init_threshold", "target_l0"),
    *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input"),
    "pre_act_loss_coefficient",
}
_SPARSIFY_KEYS = {
    *("d_in", "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk"),
    *("skip_connection", "transcode"),
}


def save_folder(sae: SparseAutoencoder, folder: Path | str) -> None:
    """Write a dictionary completely or not at all, replacing a dictionary that is in the folder already.

    Raises OptionError for a folder that holds other files, for thresholds below zero, and for weights of half
    precision or of other sizes than the configuration says; OSError for a full disk and similar failures.
    """
    require_weights(sae)
    folder = Path(folder)
    if folder.exists():
        _require_replaceable(folder)
    config, kind = sae.config, sae.activation
    state = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    folded = {name: tensor.float() for name, tensor in sae.folded().items()}
    folded = kind.to_saelens(folded, folder)
    names = kind.saelens_names
    # Tensors of the activation function are in `folded` without their prefix.
    theirs_of = {here.removeprefix("activation."): there for there, here in names.items()}
    folded = {theirs_of.get(name, name): tensor for name, tensor in folded.items()}
    stored = {names.get(name, name): tensor for name, tensor in folded.items()}
    own = {name: tensor for name, tensor in state.items() if not _same_bits(tensor, stored.get(name))}
    norms = torch.linalg.vector_norm(folded["W_dec"], dim=1)
    with write_whole_folder(folder) as temporary:
        write_tensors(temporary / SAELENS, folded)
        if kind.sparsify and sae.d_out == sae.d_in:  # the only case that sparsify supports
            theirs = {"encoder.weight": folded["W_enc"].T, "encoder.bias": folded["b_enc"]}
            write_tensors(
                temporary / SPARSIFY, {**theirs, "W_dec": folded["W_dec"], "b_dec": folded["b_dec"]}
            )
        write_tensors(temporary / OUR_WEIGHTS, own)
        shared = _shared_config(sae, bool(((norms - 1).abs() < 1e-3).all()))
        if shared is not None:
            _write_json(temporary / CONFIG, shared)
        ours = {
            "format": FORMAT,
            "config": asdict(config),
            "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
            "initialization": sae.initialization,
            "in_sae_weights": sorted(set(state) - set(own)),
            "sha256": {path.name: sha256_of(path) for path in sorted(temporary.iterdir())},
        }
        _write_json(temporary / OURS, ours)


def load_folder(folder: Path | str) -> SparseAutoencoder:
    """Read a dictionary from a folder of ours, of SAELens 6 (TopK, JumpReLU, standard, gated) or of sparsify.

    A folder with files of both SAELens and sparsify is read as SAELens'. SAELens stores BatchTopK as
    JumpReLU. SAELens' options of the encoder (b_dec not subtracted, scores times decoder norms) are folded
    into the weights.

    Raises FileNotFoundError for a folder without a dictionary, OptionError for an unsupported architecture or
    option, UnknownNameError for an unknown configuration key, DataError for files that are damaged, edited,
    or do not belong together.
    """
    load = {"asi_lens": _load_ours, "SAELens": _load_saelens, "sparsify": _load_sparsify}
    return load[library_of(Path(folder))](Path(folder))


def library_of(folder: Path) -> Literal["asi_lens", "SAELens", "sparsify"]:
    """Return whose format `load_folder` reads. Raises FileNotFoundError for a folder without a dictionary."""
    if (folder / OURS).is_file():
        return "asi_lens"
    if (folder / CONFIG).is_file():
        if (folder / SAELENS).is_file():
            return "SAELens"
        if (folder / SPARSIFY).is_file():
            return "sparsify"
    raise FileNotFoundError(
        f"{folder} is not the folder of a dictionary: it needs {OURS}, or {CONFIG} with {SAELENS} (SAELens) "
        f"or {SPARSIFY} (sparsify)"
    )


def _shared_config(sae: SparseAutoencoder, unit_norm: bool) -> dict[str, Any] | None:
    """Return `cfg.json`, the keys of SAELens and of sparsify; None if neither supports the dictionary."""
    config, kind, transcodes = sae.config, sae.activation, sae.is_transcoder
    for_sparsify = kind.sparsify and sae.d_out == sae.d_in
    architecture = kind.saelens_transcoder if transcodes else kind.saelens
    if architecture is None and not for_sparsify:
        return None
    metadata = {_RENAMED.get(key, key): value for key, value in config.metadata.items()}
    hook = str(metadata.get("hook_name", ""))
    shared: dict[str, Any] = {
        "architecture": architecture or config.activation,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        # SAELens receives the heads' outputs as [n_heads d_head]; here they are one row.
        "reshape_activations": "hook_z" if hook.endswith("_z") else "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
    }
    if transcodes:
        shared["d_out"] = config.d_out
    if not for_sparsify:
        return shared
    sparsify = {
        "activation": "topk",
        "num_latents": config.d_sae,
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": unit_norm,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcodes,
    }
    return {**shared, "k": config.k, "rescale_acts_by_decoder_norm": False, **sparsify}


def _load_ours(folder: Path) -> SparseAutoencoder:
    path = folder / OURS
    ours = _read_json(path)
    if ours.get("format") != FORMAT:
        raise DataError(f"{path} has format {ours.get('format')!r}, but this version reads {FORMAT}")
    keys = {"format", "config", "dtype", "initialization", "in_sae_weights", "sha256"}
    if set(ours) != keys or ours["dtype"] not in ("float32", "float64"):
        wrong = ", ".join(sorted(set(ours) ^ keys)) or f"dtype={ours['dtype']!r}"
        raise DataError(f"{path} was not written by this version: unexpected or missing {wrong}")
    for name, expected in ours["sha256"].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing")
        if sha256_of(folder / name) != expected:
            raise DataError(
                f"{folder / name} was changed since the folder was written; to read what another library "
                f"wrote there, delete {OURS} and {OUR_WEIGHTS}"
            )
    config = SAEConfig.from_dict(ours["config"])
    family = SparseAutoencoder if config.d_out is None else Transcoder
    sae = family(config, draw=False, dtype=getattr(torch, ours["dtype"]))
    tensors = read_tensors(folder / OUR_WEIGHTS, DataError)[0]
    names = sae.activation.saelens_names
    shared = {names.get(name, name): t for name, t in read_tensors(folder / SAELENS, DataError)[0].items()}
    tensors |= {name: shared[name] for name in ours["in_sae_weights"]}
    if set(tensors) != set(sae.state_dict()):
        raise DataError(
            f"{folder} holds the weights {', '.join(sorted(tensors))}, but its configuration needs "
            f"{', '.join(sorted(sae.state_dict()))}"
        )
    sae.initialization = ours["initialization"]
    return _filled(sae, tensors, folder)


def _load_saelens(folder: Path) -> SparseAutoencoder:
    values = _read_json(folder / CONFIG)
    metadata = values.get("metadata")
    if not isinstance(metadata, dict) or not _is_version_6(metadata.get("sae_lens_version")):
        raise OptionError(
            f"{folder} was not written by SAELens 6 (metadata.sae_lens_version); load it there and save it "
            "again"
        )
    architecture = str(values.get("architecture"))
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise OptionError(f"architecture={architecture!r} in {folder} is not supported; supported: {known}")
    activation = _ARCHITECTURES[architecture]
    kind = KINDS[activation]
    require_known(values, _SAELENS_KEYS | _TRAINING_KEYS | _SPARSIFY_KEYS, "SAELens configuration key")
    # Another normalization of activations would depend on the input.
    _require_supported(values, "normalize_activations", ("none",), folder)
    _require_supported(values, "reshape_activations", ("none", "hook_z"), folder)
    _require_supported(values, "finetuning_scaling_factor", (False, None), folder)
    d_in, d_sae = _size(values, "d_in", folder), _size(values, "d_sae", folder)
    # 100 is SAELens' default. In kinds other than TopK every feature may fire.
    k = values.get("k", 100) if kind.picks_k else d_sae
    renamed = {there: here for here, there in _RENAMED.items()}
    about = {str(renamed.get(key, key)): value for key, value in metadata.items()}
    config = SAEConfig(d_in=d_in, d_sae=d_sae, k=k, activation=activation, metadata=about)
    names = kind.saelens_names
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys([*names] if "b_enc" in names.values() else ["b_enc", *names], (d_sae,))
    tensors = read_tensors(folder / SAELENS, DataError)[0]
    _require_shapes(tensors, shapes, folder / SAELENS)
    if values.get("rescale_acts_by_decoder_norm", False):
        if "b_enc" not in tensors:
            raise OptionError(
                f"rescale_acts_by_decoder_norm=True in {folder} is not supported for {architecture!r}"
            )
        norms = tensors["W_dec"].double().norm(dim=1)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    shift = None
    if not values.get("apply_b_dec_to_input", True):
        shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    state = kind.from_saelens({names.get(name, name): tensor for name, tensor in tensors.items()}, shift)
    return _filled(SparseAutoencoder(config, draw=False), state, folder)


def _load_sparsify(folder: Path) -> SparseAutoencoder:
    values = _read_json(folder / CONFIG)
    require_known(values, _SPARSIFY_KEYS, "sparsify configuration key")
    for key, only in {"activation": "topk", "skip_connection": False, "transcode": False}.items():
        _require_supported(values, key, (only,), folder)
    d_in = _size(values, "d_in", folder)
    # sparsify's own defaults
    d_sae = values.get("num_latents") or d_in * values.get("expansion_factor", 32)
    config = SAEConfig(d_in=d_in, d_sae=d_sae, k=values.get("k", 32), metadata={"hf_hook_name": folder.name})
    tensors = read_tensors(folder / SPARSIFY, DataError)[0]
    encoder = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    _require_shapes(tensors, {**encoder, "W_dec": (d_sae, d_in), "b_dec": (d_in,)}, folder / SPARSIFY)
    tensors["W_enc"] = tensors.pop("encoder.weight").T
    tensors["b_enc"] = tensors.pop("encoder.bias")
    return _filled(SparseAutoencoder(config, draw=False), tensors, folder)


@torch.no_grad()
def _filled(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], folder: Path) -> SparseAutoencoder:
    """Copy tensors into the dictionary, whose tensors keep their layout and dtype. Returns the dictionary."""
    for name, into in sae.state_dict().items():
        if name not in tensors:
            continue  # input_mean and input_scale exist only in our format; they stay 0 and 1
        _require_shapes({name: tensors[name]}, {name: tuple(into.shape)}, folder)
        into.copy_(tensors[name])
        may_be_infinite = name.removeprefix("activation.") in sae.activation.may_be_infinite
        if not may_be_infinite and not torch.isfinite(into.sum()):
            raise DataError(f"{name} in {folder} holds NaN or infinity")
    return sae


def _same_bits(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or other.dtype != tensor.dtype or other.shape != tensor.shape:
        return False
    # Equal numbers differ in bits only for zeros of different sign. Pieces bound the memory for the signs.
    return all(
        torch.equal(one, two) and torch.equal(one.signbit(), two.signbit())
        for one, two in zip(pieces(tensor), pieces(other), strict=True)
    )


def _require_replaceable(folder: Path) -> None:
    ours = {CONFIG, SAELENS, SPARSIFY, OURS, OUR_WEIGHTS}
    others = [p.name for p in folder.iterdir() if p.name not in ours] if folder.is_dir() else [folder.name]
    if others:
        raise OptionError(
            f"{folder} holds other files, which replacing it would delete ({', '.join(sorted(others)[:5])}); "
            "save the dictionary in a folder of its own"
        )


def _require_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise DataError(f"{path} holds {found}, but its configuration needs {dict(shapes)}")


def _require_supported(values: Mapping[str, Any], key: str, allowed: Sequence[Any], folder: Path) -> None:
    value = values.get(key, allowed[0])
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise OptionError(f"{key}={value!r} in {folder} is not supported; supported: {known}")


def _size(values: Mapping[str, Any], key: str, folder: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{folder / CONFIG} has {key}={value!r}; it must be a whole number of at least 1")
    return value


def _is_version_6(version: object) -> bool:
    try:
        return Version(str(version)) >= Version("6.0.0rc0")
    except InvalidVersion:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(values, indent=1)
    except TypeError as error:
        raise OptionError(f"metadata and initialization must be JSON values: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")
