"""GGUF files become Hugging Face folders once: right weights and tokenizer, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asi_lens.base.cache import MANIFEST
from asi_lens.base.errors import CacheError, DataError, UnsupportedModelError
from asi_lens.inputs import gguf, models, twin
from asi_lens.inputs.gguf_rules import carry_over

pytestmark = pytest.mark.model_facing

D_MODEL, D_MLP, N_HEADS, N_KV_HEADS, D_HEAD = 64, 96, 4, 2, 16
MLP = "llama.feed_forward_length"
TOKENS = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ĠĠ"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps Q and K: each head's two rotary halves interleaved."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    architecture: str = "llama",
    without: str = "",
    theta: float = 10_000.0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    pre: str = "smollm",
) -> dict[str, np.ndarray]:
    """A llama-like model of two layers in Q4_1, as llama.cpp writes it; returns the float weights.

    `metadata`: further keys of the architecture. `tensors`: further tensors, in float32.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    writer.add_context_length(128)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(2)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(TOKENS), D_MODEL), "output_norm": (D_MODEL,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm": (D_MODEL,),
            f"blk.{layer}.attn_q": (N_HEADS * D_HEAD, D_MODEL),
            f"blk.{layer}.attn_k": (N_KV_HEADS * D_HEAD, D_MODEL),
            f"blk.{layer}.attn_v": (N_KV_HEADS * D_HEAD, D_MODEL),
            f"blk.{layer}.attn_output": (D_MODEL, N_HEADS * D_HEAD),
            f"blk.{layer}.ffn_norm": (D_MODEL,),
            f"blk.{layer}.ffn_gate": (D_MLP, D_MODEL),
            f"blk.{layer}.ffn_up": (D_MLP, D_MODEL),
            f"blk.{layer}.ffn_down": (D_MODEL, D_MLP),
        }
    shapes.pop(without, None)
    weights = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
            weights[name] = value
            continue
        n_heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(name.split(".")[-1])
        stored = interleaved(value, n_heads) if n_heads else value
        kind = GGMLQuantizationType.Q4_1
        packed = quants.quantize(stored, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        # Quantization is by blocks of a row, so it does not care about the order of rows.
        weights[name] = quants.dequantize(quants.quantize(value, kind), kind)
    for key, value in (metadata or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds.get(type(value), writer.add_string)(f"{architecture}.{key}", value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_weights_and_tokenizer_come_through(tmp_path: Path) -> None:
    expected = write(tmp_path / "tiny.gguf")
    model = models.load_model(tmp_path / "tiny.gguf", dtype="float32", device="cpu")
    info = models.model_info(model)
    assert (info.name, info.weights) == ("tiny", "4-bit weights, dequantised")
    assert (info.architecture, info.n_kv_heads, info.d_head) == ("LlamaForCausalLM", N_KV_HEADS, D_HEAD)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    weights = dict(twin.runners(model).plain.root.named_parameters())
    for ours, theirs in names.items():
        found = weights[f"model.layers.1.{theirs}.weight"].detach().numpy()
        np.testing.assert_array_equal(found, expected[f"blk.1.{ours}"])
    W_O = models.output_projection(model, 0)
    np.testing.assert_array_equal(W_O.flatten(0, 1).T.numpy(), expected["blk.0.attn_output"])
    tokenizer = models.tokenizer_of(model)
    # digits stand alone, so the two spaces before one are a pair: llama.cpp's rule for this family
    text = tokenizer.convert_ids_to_tokens(tokenizer("a  12", add_special_tokens=False).input_ids)
    assert text == ["a", "ĠĠ", "1", "2"]
    logits = models.forward(model, torch.tensor([[1, 5, 9]]), {}, logits=True)
    assert logits.shape == (1, 3, len(TOKENS))
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("minerva-7b", ["a", "ĠĠ", "1", "2"]),  # digits by themselves
        ("olmo", ["a", "Ġ", "Ġ", "1", "2"]),  # GPT-2's rule: one space goes with the number
        ("llama-bpe", ["a", "Ġ", "Ġ", "1", "2"]),  # known to transformers
    ],
)
def test_text_is_split_by_the_files_rule(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    write(tmp_path / "rule.gguf", pre=pre)
    tokenizer = models.tokenizer_of(models.load_model(tmp_path / "rule.gguf", dtype="float32"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12", add_special_tokens=False).input_ids) == pieces


@pytest.mark.parametrize("pre", ["deepseek-coder", "stablelm2", "default", "", "new-rule"])
def test_an_unknown_rule_to_split_text_is_refused(tmp_path: Path, pre: str) -> None:
    write(tmp_path / "odd.gguf", pre=pre)
    with pytest.raises(
        UnsupportedModelError, match=rf"odd\.gguf has the tokenizer\.ggml\.pre '{pre}', a rule"
    ):
        models.load_model(tmp_path / "odd.gguf")


def test_the_second_time_nothing_is_converted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = gguf.dequantized(file)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    assert gguf.dequantized(file)[0] == folder
    moved = file.rename(file.with_name("moved.gguf"))
    assert gguf.read_header(moved) == gguf.Header("llama", 4, "smollm")


def test_a_bundle_has_the_weights(
    file: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_writes: Any
) -> None:
    folder = gguf.dequantized(file)
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(own_cache))
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "empty"))
    refuse_writes()
    assert gguf.dequantized(file) == folder


def test_a_file_is_parsed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as library

    parsed: list[str] = []

    class Counting(library.GGUFReader):
        def __init__(self, path: str):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(library, "GGUFReader", Counting)
    monkeypatch.chdir(file.parent.parent)
    gguf.dequantized(Path(file.parent.name, file.name))
    assert parsed == [str(file)]
    assert library.GGUFReader is Counting


def test_a_failed_conversion_leaves_nothing(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, header: gguf.Header, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        gguf.dequantized(file)
    assert [entry.name for entry in (own_cache / "models").iterdir() if entry.is_dir()] == []


def test_a_full_disk_leaves_nothing(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot write .*models: .*No space left"):
        gguf.dequantized(file)
    assert [entry.name for entry in (own_cache / "models").iterdir() if entry.is_dir()] == []


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    write(tmp_path / "odd.gguf", architecture="rwkv7")
    with pytest.raises(UnsupportedModelError, match=r"odd\.gguf.*'rwkv7'"):
        models.load_model(tmp_path / "odd.gguf")


def test_missing_weights_are_not_made_up(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "part.gguf", without="blk.1.ffn_down")
    with pytest.raises(DataError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.down_proj\.weight"):
        models.load_model(tmp_path / "part.gguf")
    assert not list((own_cache / "models").glob("part-*/"))


def test_a_tensor_of_another_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gguf.GGUFWriter.add_feed_forward_length", lambda self, n: self.add_uint32(MLP, n + 32)
    )
    write(tmp_path / "odd.gguf")
    with pytest.raises(
        DataError, match=r"odd\.gguf do not fit .*mlp\.\w+_proj\.weight is \(.*96.* for \(.*128"
    ):
        models.load_model(tmp_path / "odd.gguf")


@pytest.mark.parametrize("kept", [0, 3, 200, 2_000, 20_000, -1])
def test_a_file_that_is_cut_off(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    size = file.stat().st_size
    with pytest.raises(DataError, match=rf"not a whole GGUF file \({size:,} bytes; "):
        models.load_model(file)


def test_a_changed_cache_is_refused(file: Path) -> None:
    folder, _ = gguf.dequantized(file)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"model\.safetensors: .* bytes(.|\n)*Delete the folder"):
        gguf.dequantized(file)
    weights.write_bytes(whole)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CacheError, match="another version"):
        gguf.dequantized(file)
    (folder / MANIFEST).unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        gguf.dequantized(file)


def test_another_transformers_writes_its_own_tokenizer(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = gguf.dequantized(file)
    monkeypatch.setattr(gguf, "versions", lambda: {"transformers": "5.4.0"})
    assert gguf.dequantized(file)[0] != folder


def _load(file: str, results: Any) -> None:
    results.put(str(gguf.dequantized(Path(file))[0]))


def test_two_processes_at_once(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_load, args=(str(file), results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=100) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert (Path(folders.pop()) / MANIFEST).is_file()


# ---------------------------------------------------------------------------- what changes the computation


def frequencies(model: Any) -> tuple[np.ndarray, float]:
    """Rotary frequencies of the loaded model, and the factor of cosines and sines."""
    rotary = twin.runners(model).plain.root.model.rotary_emb
    return rotary.inv_freq.double().numpy(), float(rotary.attention_scaling)


PLAIN = 10_000.0 ** -(np.arange(0, D_HEAD, 2) / D_HEAD)


def test_linear_scaling_is_carried_over(tmp_path: Path) -> None:
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write(tmp_path / "linear.gguf", metadata=scaling)
    write(tmp_path / "plain.gguf")
    model, plain = (models.load_model(tmp_path / f"{n}.gguf", dtype="float32") for n in ("linear", "plain"))
    np.testing.assert_allclose(frequencies(model)[0], PLAIN / 4, rtol=1e-6)
    np.testing.assert_allclose(frequencies(plain)[0], PLAIN, rtol=1e-6)
    ids = torch.arange(3, 40)[None]
    ours, theirs = (models.forward(one, ids, {}, logits=True) for one in (model, plain))
    assert float((ours - theirs).norm() / theirs.norm()) > 0.1


def test_the_older_name_of_linear_scaling(tmp_path: Path) -> None:
    write(tmp_path / "old.gguf", metadata={"rope.scale_linear": 2.0})
    model = models.load_model(tmp_path / "old.gguf", dtype="float32")
    np.testing.assert_allclose(frequencies(model)[0], PLAIN / 2, rtol=1e-6)


def test_yarn_is_carried_over(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 8.0, "original_context_length": 16, "finetuned": True}
    write(tmp_path / "yarn.gguf", metadata={f"rope.scaling.{key}": value for key, value in yarn.items()})
    found, attention = frequencies(models.load_model(tmp_path / "yarn.gguf", dtype="float32"))
    assert attention == pytest.approx(0.1 * np.log(8) + 1)
    # turns of 16 positions below 1 are divided by the factor, above 32 not at all
    assert np.all(found <= PLAIN * 1.000001)
    np.testing.assert_allclose(found[-1], PLAIN[-1] / 8, rtol=1e-5)


def test_factors_of_llama_3_1(tmp_path: Path) -> None:
    """The tensor `rope_freqs.weight`, by the formula of Llama 3.1's own code."""
    theta, factor, low, high, original = 500_000.0, 8.0, 1.0, 4.0, 8192
    base = theta ** -(np.arange(0, D_HEAD, 2) / D_HEAD)
    expected = []
    for frequency in base:
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    factors = (base / np.array(expected)).astype(np.float32)
    assert factors.max() == 8.0
    write(tmp_path / "llama31.gguf", theta=theta, tensors={"rope_freqs.weight": factors})
    model = models.load_model(tmp_path / "llama31.gguf", dtype="float32")
    np.testing.assert_allclose(frequencies(model)[0], expected, rtol=1e-5)
    assert model.original_model.config.rope_parameters["rope_type"] == "llama3"


def test_any_other_factors_of_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, D_HEAD // 2).astype(np.float32)
    write(tmp_path / "own.gguf", tensors={"rope_freqs.weight": factors})
    model = models.load_model(tmp_path / "own.gguf", dtype="float32")
    models.forward(model, torch.arange(3, 40)[None], {}, logits=True)
    found, attention = frequencies(model)
    np.testing.assert_allclose(found, PLAIN / factors, rtol=1e-5)
    assert attention == 1.0


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, r"rope\.scaling\.type = longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 0.7}, r".*attn_factor = 0\.7"),
        ({"rope.scaling.factor": 4.0}, r"rope\.scaling\.factor = 4 without"),
        ({"attention.sliding_window": 16}, r"attention\.sliding_window = 16"),
        ({"expert_count": 8, "expert_used_count": 2}, "expert_count = 8"),
        ({"attention.key_length": 32}, r"attention\.key_length = 32.*read as 16"),
        ({"logit_scale": 0.5}, r"logit_scale = 0\.5"),
        ({"attention.clamp_kqv": 8.0}, r"attention\.clamp_kqv = 8"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
    ],
)
def test_what_is_not_carried_over_is_named(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    write(tmp_path / "odd.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=rf"odd\.gguf has {named}"):
        models.load_model(tmp_path / "odd.gguf")


@pytest.mark.parametrize(("kind", "heads", "width"), [("Gemma2", 32, 4608), ("Gemma3Text", 32, 5376)])
def test_a_scale_of_attention_that_no_file_states(kind: str, heads: int, width: int) -> None:
    """Gemma of 27B divides its scores by sqrt(width / heads), Gemma of other sizes by sqrt(head_dim)."""
    import transformers

    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2}
    stated = {"embedding_length": width, "attention.head_count": heads, "attention.key_length": 128}
    config = getattr(transformers, f"{kind}Config")(**sizes, head_dim=128)
    with pytest.raises(UnsupportedModelError, match=r"27b has no attention\.scale.*256\^-0\.5.*128 wide"):
        carry_over("27b", stated, {}, config)
    config.query_pre_attn_scalar = width // heads  # as it would be read from a file that states it
    carry_over("27b", {**stated, "attention.scale": (width // heads) ** -0.5}, {}, config)
    small = getattr(transformers, f"{kind}Config")(**sizes, head_dim=256)
    carry_over("small", {**stated, "attention.key_length": 256}, {}, small)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "blk.7.attn_norm.weight"])
def test_a_tensor_that_the_model_lacks_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "odd.gguf", tensors={name: np.ones(D_MODEL, dtype=np.float32)})
    with pytest.raises(UnsupportedModelError, match=f"the tensor {name}"):
        models.load_model(tmp_path / "odd.gguf")


def test_keys_without_effect_are_no_error(tmp_path: Path) -> None:
    write(tmp_path / "more.gguf", metadata={"rope.scaling.type": "none", "expert_count": 0})
    models.load_model(tmp_path / "more.gguf", dtype="float32")
