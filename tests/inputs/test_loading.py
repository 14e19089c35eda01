"""A folder that lacks weights, or that a library cannot read, is an error that names the reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from asi_lens.base.errors import AsiLensError, DataError, UnsupportedModelError
from asi_lens.inputs import models
from asi_lens.inputs.loading import require_whole
from asi_lens.inputs.sequences import tokenizer_of
from asi_lens.inputs.tokenizing import fingerprint

pytestmark = pytest.mark.model_facing


def load(folder: Path) -> Any:
    return models.load_model(folder, dtype="float32", device="cpu")


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.build("llama", tmp_path / "model")


# ---------------------------------------------------------------------------- weights that are not there


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "transformer."])
def test_weights_under_other_names_are_not_left_random(folder: Path, prefix: str) -> None:
    edit_weights(folder, lambda old: {prefix + name: value for name, value in old.items()})
    with pytest.raises(DataError, match=rf"lacks \d+ weights of LlamaForCausalLM.*it has {prefix}model"):
        load(folder)


@pytest.mark.parametrize(
    "lost",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"],
)
def test_a_single_missing_weight_is_named(folder: Path, lost: str) -> None:
    edit_weights(folder, lambda old: {name: value for name, value in old.items() if name != lost})
    with pytest.raises(DataError, match=f"lacks 1 weights .*random: {lost}"):
        load(folder)


def test_a_head_that_should_have_weights_of_its_own(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"random: lm_head\.weight"):
        load(folder)


def test_more_layers_than_there_are_weights(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(DataError, match=r"model\.layers\.3\."):
        load(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "neox", "gemma3", "qwen3"])
def test_what_is_rightly_absent_is_no_error(tmp_path: Path, architecture: str) -> None:
    folder = tiny_models.build(architecture, tmp_path / "tied", tie_word_embeddings=True)
    heads = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
    edit_weights(folder, lambda old: {name: value for name, value in old.items() if name not in heads})
    logits = models.forward(load(folder), torch.tensor([[5, 6, 7]]), {}, logits=True)
    again = models.forward(load(folder), torch.tensor([[5, 6, 7]]), {}, logits=True)
    assert torch.equal(logits, again)


def test_pytorch_files_without_anything_but_tensors_are_read(folder: Path) -> None:
    before = models.model_info(load(folder)).fingerprint
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert models.model_info(load(folder)).fingerprint == before


# ---------------------------------------------------------------------------- config.json and weights differ


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            r"model\.embed_tokens\.weight is \(100, 24\), config.json asks for \(100, 32\)",
        ),
        ({"intermediate_size": 48}, r"mlp\.down_proj\.weight is \(24, 40\), config.json asks for \(24, 48\)"),
        ({"vocab_size": 120}, r"embed_tokens\.weight is \(100, 24\), config.json asks for \(120, 24\)"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight is \(12, 24\), config.json asks for \(24, 24\)"),
    ],
)
def test_another_shape_is_named_with_both_shapes(folder: Path, changes: Any, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(DataError, match=message):
        load(folder)


# ---------------------------------------------------------------------------- a revision of the hub


def test_a_revision_is_its_weights_and_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v2")):
        (repo / "refs" / name).write_text(f"{seed}" * 40)
        tiny_models.build("llama", repo / "snapshots" / (f"{seed}" * 40), seed=seed)
    second = repo / "snapshots" / ("1" * 40)
    tokenizer = json.loads((second / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (second / "tokenizer.json").write_text(json.dumps(tokenizer))

    model = models.load_model("owner/tiny", revision="v2", dtype="float32", device="cpu")
    same, main = load(second), models.load_model("owner/tiny", dtype="float32", device="cpu")
    assert models.model_info(model).fingerprint == models.model_info(same).fingerprint
    encoded = [one.tokenizer("abb").input_ids for one in (model, same, main)]
    assert encoded[0] == encoded[1] != encoded[2]
    assert fingerprint(model.tokenizer) == fingerprint(same.tokenizer) != fingerprint(main.tokenizer)
    with_special = [tokenizer_of(one)("abb").input_ids for one in (model, same, main)]
    assert with_special[0] == with_special[1] != with_special[2]


# ---------------------------------------------------------------------------- weights of 8 bits


def in_fp8(folder: Path) -> Path:
    """Write a folder's projections as FP8 with a scale each, as released checkpoints have them."""

    def pack(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new = {}
        for name, value in old.items():
            new[name] = value
            if "proj" in name:
                scale = value.abs().max() / 448
                new[name] = (value / scale).to(torch.float8_e4m3fn)
                new[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
        return new

    edit_weights(folder, pack)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit_config(folder, quantization_config=fp8)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_keep_their_scales_on_a_gpu(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    # as on a GPU of compute capability 8.9, which takes such weights as they are
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    whole = models.forward(load(folder), ids, {}, logits=True)
    model = models.load_model(in_fp8(folder), dtype=dtype, device="cpu")
    assert models.model_info(model).weights == "8-bit weights, dequantised"
    found = models.forward(model, ids, {}, logits=True).float()
    assert float((found - whole).norm() / whole.norm()) < 0.1  # 3 bits of mantissa; without scales 0.9


def test_weights_whose_scales_would_be_lost_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(torch.float8_e4m3fn))
    report: dict[str, Any] = {"mismatched_keys": set(), "missing_keys": set(), "unexpected_keys": set()}
    with pytest.raises(
        UnsupportedModelError, match=r"of own .*\(1\.weight is torch\.float8_e4m3fn\).*bfloat16"
    ):
        require_whole("own", model, report)
    require_whole("own", model.float(), report)


# ---------------------------------------------------------------------------- whatever a library raises


def _pickled(folder: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "harm",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Harmful()}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a width that is text": lambda folder: edit_config(folder, hidden_size="24"),
    "heads that do not divide the width": lambda folder: edit_config(folder, num_attention_heads=5),
    "no heads": lambda folder: edit_config(folder, num_attention_heads=0),
    "an unknown rotation": lambda folder: edit_config(folder, rope_scaling={"rope_type": "no", "factor": 2}),
    "an unknown activation": lambda folder: edit_config(folder, hidden_act="no"),
    "config.json is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config.json is cut off": lambda folder: (folder / "config.json").write_text("{"),
    "config.json is not UTF-8": lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xff"}'),
    "a tokenizer that is cut off": lambda folder: (folder / "tokenizer.json").write_text('{"version": 1'),
    "a tokenizer of an unknown kind": lambda folder: (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "No"}}'
    ),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a package that is missing": lambda folder: edit_config(
        folder, quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "code of its own": lambda folder: edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}
    ),
    "pickled code": _pickled,
    "weights that are no pickle": lambda folder: (
        (folder / "model.safetensors").rename(folder / "other"),
        (folder / "pytorch_model.bin").write_bytes(b"garbage"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_our_error_and_names_the_folder(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(AsiLensError) as raised:
        load(folder)
    assert isinstance(raised.value, DataError | UnsupportedModelError)
    assert folder.name in str(raised.value)
    assert not (folder / "harm").exists()


def test_the_tokenizer_is_blamed_for_what_is_its_own(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot load the tokenizer in .*JSONDecodeError"):
        load(folder)


def test_memory_that_runs_out_is_not_the_folders_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MemoryError):
        load(folder)
