"""The paper's tables, to stand beside our figures (spec section G.4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """`columns`: benchmark names and titles; `rows`: a model and its figures, "" where none is known."""

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str


TABLE_1 = Table(
    "Comprehension, zero-shot (the paper's Table 1)",
    (
        ("coco-caption", "COCO CIDEr"),
        ("image2paragraph", "I2P CIDEr"),
        ("vqav2", "VQAv2"),
        ("okvqa", "OKVQA"),
        ("vizwiz", "VizWiz"),
        ("textvqa", "TextVQA"),
        ("mmbench", "MMBench"),
        ("mm-vet", "MM-Vet"),
    ),
    (
        ("MetaLM", ("82.2", "", "41.1", "11.4", "", "", "", "")),
        ("Kosmos-1", ("84.7", "", "51.0", "", "29.2", "", "", "")),
        ("Flamingo-9B", ("79.4", "", "51.8", "44.7", "28.8", "", "", "")),
        ("CM3Leon-7B", ("61.6", "", "47.6", "23.8", "37.6", "", "", "")),
        ("Emu-13B", ("112.4", "", "40.0", "38.2", "34.2", "", "", "")),
        ("DreamLLM-7B", ("115.4", "17.4", "56.6", "44.3", "45.8", "34.9", "49.9", "35.9")),
        ("DreamLLM-7B*", ("103.7", "8.4", "72.9", "52.2", "49.3", "41.8", "58.2", "36.6")),
    ),
    "* fine-tuned on the data of LLaVA-1.5. Rows of other models are taken from later papers that compare them.",
)
TABLE_2 = Table(
    "Creation, zero-shot FID, lower is better (the paper's Table 2)",
    (("coco-fid", "MS-COCO"), ("ln-coco-fid", "LN-COCO")),
    (
        ("GILL-8B", ("12.20", "")),
        ("Emu-13B", ("11.66", "")),
        ("CM3Leon-7B", ("10.82", "")),
        ("Stable Diffusion 2.1", ("12.43", "34.26")),
        ("DreamLLM-7B, stage I", ("8.76", "22.42")),
        ("DreamLLM-7B", ("8.46", "20.53")),
    ),
    "",
)
TABLES = (TABLE_1, TABLE_2)
