"""conversions.py: names of small made-up files; the packaged models against ONNX Runtime and CTranslate2.

The comparisons need packages of requirements-peers.txt (`make test-peers`) and are skipped without them.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asi_lens.base.errors import DataError
from asi_lens.inputs import conversions
from asi_lens.inputs.conversions import dinov2_matrices, packaged_weights, residue_tokenizer, whisper_state
from asi_lens.inputs.media import items_of
from asi_lens.inputs.onnx_file import Node, OnnxFile, read_onnx
from asi_lens.inputs.sources import SOURCES, fetch

SIX = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "retina.jpg", "rocket.jpg")


def test_a_matrix_belongs_to_the_bias_that_is_added_to_its_product() -> None:
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    nodes = (
        Node("MatMul", ("x", "onnx::MatMul_1"), ("a",)),
        Node("Add", ("backbone.layer.0.fc.bias", "a"), ("b",)),
        Node("MatMul", ("q", "k"), ("scores",)),  # not a weight
        Node("Add", ("scores", "backbone.layer.0.other.bias"), ("c",)),
    )
    found = dinov2_matrices(OnnxFile({"onnx::MatMul_1": w}, nodes))
    assert list(found) == ["layer.0.fc.weight"]
    np.testing.assert_array_equal(found["layer.0.fc.weight"], w.T)


def test_fused_projections_are_taken_apart() -> None:
    qkv, kv = np.arange(12, dtype=np.float16).reshape(6, 2), np.arange(8, dtype=np.float16).reshape(4, 2)
    bias = np.array([1, 2, 0, 0, 3, 4], np.float16)
    variables = {
        "decoder/layer_1/self_attention/linear_0/weight": qkv,
        "decoder/layer_1/self_attention/linear_0/bias": bias,
        "decoder/layer_1/attention/linear_1/weight": kv,
        "decoder/layer_1/attention/layer_norm/gamma": kv[0],
        "decoder/num_heads": np.array(8, np.int16),
        "decoder/projection/weight": kv,
    }
    state = whisper_state(variables)
    start = "model.decoder.layers.1."
    expected = {
        "self_attn.q_proj.weight": qkv[:2],
        "self_attn.k_proj.weight": qkv[2:4],
        "self_attn.v_proj.weight": qkv[4:],
        "self_attn.q_proj.bias": bias[:2],
        "self_attn.v_proj.bias": bias[4:],
        "encoder_attn.k_proj.weight": kv[:2],
        "encoder_attn.v_proj.weight": kv[2:],
        "encoder_attn_layer_norm.weight": kv[0],
    }
    assert state.keys() == {start + name for name in expected}
    for name, values in expected.items():
        np.testing.assert_array_equal(state[start + name], values.astype(np.float32), strict=True)
    variables["decoder/layer_1/self_attention/linear_0/bias"] = bias + 1
    with pytest.raises(DataError, match="bias of keys"):
        whisper_state(variables)


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "run": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="more than tensors"):
        conversions._antiberty(tmp_path, tmp_path)


def test_missing_left_over_and_untied_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    whole = {name: values.numpy() for name, values in BertForMaskedLM(config).state_dict().items()}
    conversions._save(BertForMaskedLM, config, whole, tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(DataError, match="lacks 1 weights"):
        conversions._save(BertForMaskedLM, config, {k: v for k, v in whole.items() if k != name}, tmp_path)
    with pytest.raises(DataError, match="do not fit"):
        conversions._save(BertForMaskedLM, config, {**whole, name: np.ones((3, 3), np.float32)}, tmp_path)
    with pytest.raises(DataError, match=r"does not know.*more"):
        conversions._save(BertForMaskedLM, config, {**whole, "more": np.ones(3, np.float32)}, tmp_path)
    tied = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    other = {**whole, next(iter(tied)): np.zeros((9, 8), np.float32)}
    with pytest.raises(DataError, match="differs from"):
        conversions._save(BertForMaskedLM, config, other, tmp_path, tied)


def test_residues_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\nC\nD\n")
    tokenizer = residue_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer("ACD").input_ids == tokenizer("A C D").input_ids == [2, 5, 6, 7, 3]
    assert tokenizer("A[MASK]CZ").input_ids == [2, 5, 4, 6, 1, 3]
    assert tokenizer(["A", "ACD"], padding=True).input_ids == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]


# --- the packaged models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {name: packaged_weights(SOURCES[name])[0] for name in conversions.CONVERSIONS}


def six_pictures() -> Iterator[np.ndarray]:
    from PIL import Image

    for name in SIX:
        with Image.open(fetch("pictures-skimage") / name) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((224, 224)))
        scaled = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        yield scaled.transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.packaged
@torch.no_grad()
def test_dinov2_computes_what_onnx_runtime_does(folders: dict[str, Path]) -> None:
    """Last hidden states of six pictures: values up to 11 differ by 4.5e-5 at most; bound 1e-4 as asked."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from transformers import AutoModel

    path = fetch("dinov2-small") / "vit_s_focus.onnx"
    graph = onnx.load(path)
    own = read_onnx(path)
    assert own.tensors.keys() == {stored.name for stored in graph.graph.initializer}
    for stored in graph.graph.initializer:
        np.testing.assert_array_equal(
            own.tensors[stored.name], onnx.numpy_helper.to_array(stored), strict=True
        )
    assert [node.op for node in own.nodes] == [node.op_type for node in graph.graph.node]
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=last))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    model = AutoModel.from_pretrained(folders["dinov2-small"])
    for pixels in six_pictures():
        (expected,) = session.run([last], {"input_image": pixels})
        found = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
        assert found.shape == (1, 257, 384)
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(expected).max() > 5


def log_mel(folder: Path, name: str) -> torch.Tensor:
    """Return a packaged clip's log-mel frames; 8 kHz becomes 16 kHz by zeros in the spectrum's upper half."""
    from transformers import AutoFeatureExtractor

    (path,) = (path for path in items_of("speech-prompts") if path.stem == name)
    with wave.open(str(path)) as clip:
        samples = np.frombuffer(clip.readframes(clip.getnframes()), "<i2") / 32768
        assert clip.getframerate() == 8000
    doubled = 2 * np.fft.irfft(np.fft.rfft(samples), 2 * len(samples))
    return AutoFeatureExtractor.from_pretrained(folder)(
        doubled, sampling_rate=16_000, return_tensors="pt"
    ).input_features


@pytest.fixture(scope="module")
def whisper(folders: dict[str, Path]) -> Any:
    from transformers import AutoModelForSpeechSeq2Seq

    return AutoModelForSpeechSeq2Seq.from_pretrained(folders["whisper-base"])


@pytest.mark.packaged
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own settings
def test_whisper_writes_what_is_said(folders: dict[str, Path], whisper: Any) -> None:
    from transformers import AutoTokenizer

    frames = log_mel(folders["whisper-base"], "all-circuits-busy-now")
    ids = whisper.generate(frames, language="en", task="transcribe")
    tokenizer = AutoTokenizer.from_pretrained(folders["whisper-base"])
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "All circuits are busy now."


@pytest.mark.packaged
@torch.no_grad()
def test_whispers_encoder_computes_what_ctranslate2_does(folders: dict[str, Path], whisper: Any) -> None:
    """Values up to 24 differ by 9e-4 at most on three clips."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    peer = ctranslate2.models.Whisper(str(fetch("whisper-base")), device="cpu", compute_type="float32")
    for name in ("all-circuits-busy-now", "agent-alreadyon", "auth-incorrect"):
        frames = log_mel(folders["whisper-base"], name)
        expected = np.array(peer.encode(ctranslate2.StorageView.from_array(frames.numpy())))
        found = whisper.model.encoder(frames).last_hidden_state.numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.packaged
@torch.no_grad()
def test_antiberty_fills_masked_residues(folders: dict[str, Path]) -> None:
    """144 of 158 residues (91 %) of 8 sequences that it may not have seen; chance is 5 %."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(folders["antiberty"])
    tokenizer = AutoTokenizer.from_pretrained(folders["antiberty"])
    right = []
    for sequence in islice(items_of("antibodies"), 8):
        ids = torch.tensor(tokenizer(sequence).input_ids)
        places = torch.arange(1, len(sequence) + 1, 6)
        rows = torch.arange(len(places))
        masked = ids.repeat(len(places), 1)
        masked[rows, places] = tokenizer.mask_token_id
        with torch.inference_mode():
            logits = model(masked).logits
        right += (logits[rows, places].argmax(-1) == ids[places]).tolist()
    assert len(right) == 158
    assert sum(right) / len(right) > 0.9
