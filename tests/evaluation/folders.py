"""Tiny data folders in the published form of every benchmark, and a scripted model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from dreamllm.documents import PLAIN, Text, load_picture

COUNT = 5


def picture(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture whose red channel says its number, a small one, even as JPEG."""
    return shade(20 * number, size)


def shade(red: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, (red, 90, 160))


def number_of(source) -> int:
    image = load_picture(source)
    return round(image.getpixel((image.width // 2, image.height // 2))[0] / 20)


def write_pictures(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(number).save(folder / name)


def write_json(path: Path, values) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def captions_of(number: int) -> list[str]:
    return [f"a dog number {number} on grass", f"the brown dog runs {number} times", "a dog in a park"]


def coco(folder: Path) -> None:
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(COUNT)]
    write_pictures(folder / "val2014", [name.replace("jpg", "png") for name in names])
    images = [
        {
            "filepath": "val2014",
            "filename": name.replace("jpg", "png"),
            "cocoid": 100 + i,
            "split": "test",
            "sentences": [{"raw": caption} for caption in captions_of(i)],
        }
        for i, name in enumerate(names)
    ]
    write_json(folder / "dataset_coco.json", {"images": [*images, {**images[0], "split": "train"}]})


def nocaps(folder: Path) -> None:
    write_pictures(folder / "images", [f"{i}.png" for i in range(COUNT)])
    domains = ["in-domain", "near-domain", "out-domain", "in-domain", "in-domain"]
    images = [{"id": i, "file_name": f"{i}.png", "domain": domains[i]} for i in range(COUNT)]
    annotations = [{"image_id": i, "caption": c} for i in range(COUNT) for c in captions_of(i)]
    write_json(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})


def paragraphs(folder: Path) -> None:
    write_pictures(folder / "images", [f"{i}.jpg" for i in range(COUNT)])
    rows = [{"image_id": i, "paragraph": f"A dog is here.  It is number {i}. "} for i in range(COUNT + 2)]
    write_json(folder / "paragraphs_v1.json", rows)
    write_json(folder / "test_split.json", list(range(COUNT)))


def answers_of(number: int) -> list[str]:
    return [f"dog {number}"] * 4 + ["cat"] * 6


def questions(folder: Path, prefix: str, questions_file: str, annotations_file: str, pictures: str) -> None:
    write_pictures(folder / pictures, [f"COCO_{pictures}_{i:012d}.jpg" for i in range(COUNT)])
    rows = [{"question_id": 1000 + i, "image_id": i, "question": f"What is {i}?"} for i in range(COUNT)]
    write_json(folder / questions_file, {"questions": rows})
    if annotations_file:
        known = [{"question_id": 1000 + i, "answers": [{"answer": a} for a in answers_of(i)]} for i in range(COUNT)]
        write_json(folder / annotations_file, {"annotations": known})


def vqav2(folder: Path) -> None:
    questions(folder, "v2_", "v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015")


def vqav2_val(folder: Path) -> None:
    names = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    questions(folder, "v2_", *names, "val2014")


def okvqa(folder: Path) -> None:
    questions(folder, "", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")


def vizwiz(folder: Path, split: str = "test", answers: bool = False) -> None:
    write_pictures(folder / split, [f"VizWiz_{split}_{i:08d}.jpg" for i in range(COUNT)])
    rows = [{"image": f"VizWiz_{split}_{i:08d}.jpg", "question": f"What is {i}?"} for i in range(COUNT)]
    if answers:
        rows = [{**row, "answers": [{"answer": a} for a in answers_of(i)]} for i, row in enumerate(rows)]
    write_json(folder / f"{split}.json", rows)


def vizwiz_val(folder: Path) -> None:
    vizwiz(folder, "val", answers=True)


def textvqa(folder: Path) -> None:
    write_pictures(folder / "train_images", [f"{i:x}a.jpg" for i in range(COUNT)])
    rows = [
        {"question_id": 7 + i, "image_id": f"{i:x}a", "question": f"What is {i}?", "answers": answers_of(i)}
        for i in range(COUNT)
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": rows})


def docvqa(folder: Path) -> None:
    write_pictures(folder / "documents", [f"p{i}.png" for i in range(COUNT)])
    rows = [
        {"questionId": i, "image": f"documents/p{i}.png", "question": f"What is {i}?", "answers": [f"dog {i}"]}
        for i in range(COUNT)
    ]
    write_json(folder / "val_v1.0.json", {"data": rows})


def infographicvqa(folder: Path) -> None:
    write_pictures(folder / "images", [f"p{i}.png" for i in range(COUNT)])
    rows = [
        {"questionId": i, "image_local_name": f"p{i}.png", "question": f"What is {i}?", "answers": [f"dog {i}"]}
        for i in range(COUNT)
    ]
    write_json(folder / "infographicsVQA_val_v1.0.json", {"data": rows})


def pope(folder: Path, kind: str = "random") -> None:
    write_pictures(folder / "val2014", [f"{i}.png" for i in range(COUNT)])
    rows = [
        {"question_id": i + 1, "image": f"{i}.png", "text": f"Is there a {i} in the image?", "label": label}
        for i, label in enumerate(["yes", "no", "yes", "no", "yes"])
    ]
    (folder / f"coco_pope_{kind}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


def mmbench(folder: Path) -> None:
    """Three questions; the first in two rotations, the second time with the picture's index instead of the picture."""

    def encoded(number):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        [1, "Which?", "Look closely", "cat", "dog", "bird", "", "B", "nature", encoded(1)],
        [1_000_001, "Which?", "Look closely", "dog", "bird", "cat", "", "A", "nature", "1"],
        [2, "How many?", "nan", "one", "two", "", "", "A", "count", encoded(2)],
        [3, 'Says "hi"?', "", "yes", "no", "", "", "A", "text", encoded(3)],
    ]
    lines = ["\t".join(map(str, row)).replace('"hi"', "'hi'") for row in [columns, *rows]]
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n")


def mmvet(folder: Path) -> None:
    write_pictures(folder / "images", [f"v1_{i}.png" for i in range(COUNT)])
    rows = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.png",
            "question": f"What is {i}?",
            "answer": f"dog<AND>{i}",
            "capability": ["rec", "ocr"][: 1 + i % 2],
        }
        for i in range(COUNT)
    }
    write_json(folder / "mm-vet.json", rows)


WRITERS = {
    "coco-caption": coco,
    "nocaps": nocaps,
    "image2paragraph": paragraphs,
    "vqav2": vqav2,
    "vqav2-val": vqav2_val,
    "okvqa": okvqa,
    "vizwiz": vizwiz,
    "vizwiz-val": vizwiz_val,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "infographicvqa": infographicvqa,
    "pope-random": pope,
    "mmbench": mmbench,
    "mm-vet": mmvet,
}


class ScriptedAnswerer:
    """Answers `answer(number on the picture, prompt text)`, and remembers the prompts."""

    template = PLAIN

    def __init__(self, answer=lambda number, text: f"dog {number}") -> None:
        self.answer = answer
        self.asked = []

    def answers(self, prompts, decoding, seeds):
        self.asked += [(prompt, decoding, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [self.answer(number_of(p.pictures()[0].source), text_of(p)) for p in prompts]

    def pictures(self, prompts, drawing, seeds):
        return [[shade((7 * seed + c) % 256) for c in range(drawing.candidates)] for seed in seeds]


def text_of(prompt) -> str:
    """The prompt with <image> where the picture stands."""
    return "".join(part.text if isinstance(part, Text) else "<image>" for part in prompt.parts)
