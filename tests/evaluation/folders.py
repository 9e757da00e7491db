"""Tiny data folders in the published form of every benchmark, with every field that is published, and a scripted
model."""

from __future__ import annotations

import base64
import csv
import io
import json
from functools import partial
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
    """Upright, wide and square ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        drawn = picture(number, [(24, 16), (16, 24), (20, 20)][number % 3])
        drawn.save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))


def write_json(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def write_json_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def captions_of(number: int) -> list[str]:
    return [f"a dog number {number} on grass", f"The brown dog runs {number} times.", "A dog, in a park!"]


COCO_INFO = {"info": {"description": "This is a miniature.", "year": 2014}, "licenses": [{"url": "", "id": 1}]}


def coco(folder: Path) -> None:
    """Karpathy's file has all splits in one list; what is held out is `val` and `test`, of val2014."""
    names = [f"COCO_val2014_{391895 + i:012d}.jpg" for i in range(COUNT)]
    write_pictures(folder / "val2014", names)
    images = [
        {
            "filepath": "val2014",
            "sentids": [3 * i, 3 * i + 1, 3 * i + 2],
            "filename": name,
            "imgid": i,
            "split": "test",
            "sentences": [
                {"tokens": caption.split(), "raw": caption, "imgid": i, "sentid": 3 * i + k}
                for k, caption in enumerate(captions_of(i))
            ],
            "cocoid": 391895 + i,
        }
        for i, name in enumerate(names)
    ]
    others = [{**images[0], "split": split} for split in ("val", "restval", "train")]
    write_json(folder / "dataset_coco.json", {"images": [others[0], *images, *others[1:]], "dataset": "coco"})


def nocaps(folder: Path) -> None:
    names = [f"{i:x}013ea2087020901.jpg" for i in range(COUNT)]
    write_pictures(folder / "images", names)
    domains = ["in-domain", "near-domain", "out-domain", "in-domain", "in-domain"]
    images = [
        {
            "coco_url": f"https://images/{name}",
            "date_captured": "2018-11-06 11:04:33",
            "domain": domain,
            "file_name": name,
            "height": 16,
            "id": i,
            "license": 0,
            "open_images_id": name[:-4],
            "width": 24,
        }
        for i, (name, domain) in enumerate(zip(names, domains, strict=True))
    ]
    pairs = [(i, caption) for i in range(COUNT) for caption in captions_of(i)]
    annotations = [{"id": k, "image_id": i, "caption": caption} for k, (i, caption) in enumerate(pairs)]
    write_json(folder / "nocaps_val_4500_captions.json", COCO_INFO | {"images": images, "annotations": annotations})


def paragraphs(folder: Path) -> None:
    """Pictures in Visual Genome's two folders, told apart by their addresses; one has two paragraphs."""
    rows = []
    for i in range(COUNT + 2):
        part = "VG_100K_2" if i % 2 else "VG_100K"
        text = f"A dog is here.  It is number {i}. "
        rows.append(
            {"url": f"https://host/rak248/{part}/{2356347 + i}.jpg", "image_id": 2356347 + i, "paragraph": text}
        )
    for number in range(COUNT):
        place = folder / ("VG_100K_2" if number % 2 else "VG_100K")
        place.mkdir(exist_ok=True)
        picture(number).save(place / f"{2356347 + number}.jpg")
    write_json(folder / "paragraphs_v1.json", [*rows, {**rows[0], "paragraph": "A dog. Nothing else."}])
    write_json(folder / "test_split.json", [2356347 + i for i in range(COUNT)])
    write_json(folder / "train_split.json", [2356347 + COUNT])


def answers_of(number: int) -> list[str]:
    return [f"dog {number}"] * 4 + ["cat"] * 6


def people(number: int) -> list[dict]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
        for k, answer in enumerate(answers_of(number))
    ]


def questions(folder: Path, questions_file: str, annotations_file: str, pictures: str, **header) -> None:
    """The form of the VQA releases. The numbers of questions are those of pictures times 1000, plus their place."""
    write_pictures(folder / pictures, [f"COCO_{pictures}_{262148 + i:012d}.jpg" for i in range(COUNT)])
    rows = [
        {"image_id": 262148 + i, "question": f"What is {i}?", "question_id": 1000 * (262148 + i)} for i in range(COUNT)
    ]
    header = COCO_INFO | {"data_type": "mscoco", "data_subtype": pictures, "license": {"name": ""}} | header
    write_json(folder / questions_file, header | {"task_type": "Open-Ended", "questions": rows})
    if annotations_file:
        known = [
            {
                "question_type": "what is",
                "multiple_choice_answer": "cat",
                "answers": people(i),
                "image_id": 262148 + i,
                "answer_type": "other",
                "question_id": 1000 * (262148 + i),
            }
            for i in range(COUNT)
        ]
        write_json(folder / annotations_file, header | {"annotations": known})


def vqav2(folder: Path) -> None:
    questions(folder, "v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015", data_subtype="test-dev2015")


def vqav2_val(folder: Path) -> None:
    questions(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014")


def okvqa(folder: Path) -> None:
    questions(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")


def vizwiz(folder: Path, split: str = "test") -> None:
    """The annotations come as a zip of a folder; only the test split's have no answers."""
    names = [f"VizWiz_{split}_{i:08d}.jpg" for i in range(COUNT)]
    write_pictures(folder / split, names)
    rows = [{"image": name, "question": f"What is {i}?"} for i, name in enumerate(names)]
    if split != "test":
        known = [{"answer_confidence": "maybe", "answer": "cat"}] * 6
        for i, row in enumerate(rows):
            row["answers"] = [{"answer_confidence": "yes", "answer": f"dog {i}"}] * 4 + known
            row |= {"answer_type": "other", "answerable": 1}
    write_json(folder / "Annotations" / f"{split}.json", rows)


def vizwiz_val(folder: Path) -> None:
    vizwiz(folder, "val")


def textvqa(folder: Path) -> None:
    names = [f"{i:x}03f89b4f05e5ab1" for i in range(COUNT)]
    write_pictures(folder / "train_images", [f"{name}.jpg" for name in names])
    rows = [
        {
            "question": f"What is {i}?",
            "image_id": name,
            "image_classes": ["Dog"],
            "flickr_original_url": "https://host/a.jpg",
            "flickr_300k_url": "https://host/b.jpg",
            "image_width": 24,
            "image_height": 16,
            "answers": answers_of(i),
            "question_tokens": ["what", "is", str(i)],
            "question_id": 34602 + i,
            "set_name": "val",
        }
        for i, name in enumerate(names)
    ]
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", header | {"data": rows})


def docvqa(folder: Path) -> None:
    write_pictures(folder / "documents", [f"xnbl{i:04d}_1.png" for i in range(COUNT)])
    rows = [
        {
            "questionId": 49153 + i,
            "question": f"What is {i}?",
            "question_types": ["handwritten"],
            "image": f"documents/xnbl{i:04d}_1.png",
            "docId": 14465 + i,
            "ucsf_document_id": f"xnbl{i:04d}",
            "ucsf_document_page_no": "1",
            "answers": [f"dog {i}", f"Dog {i}."],
            "data_split": "val",
        }
        for i in range(COUNT)
    ]
    header = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "dataset_version": "1.0"}
    write_json(folder / "val_v1.0_withQT.json", header | {"data": rows})


def infographicvqa(folder: Path) -> None:
    write_pictures(folder / "infographicsvqa_images", [f"3{i}471.jpeg" for i in range(COUNT)])
    rows = [
        {
            "questionId": 98313 + i,
            "question": f"What is {i}?",
            "image_local_name": f"3{i}471.jpeg",
            "image_url": "https://host/c.jpg",
            "ocr_output_file": f"3{i}471.json",
            "answers": [f"dog {i}"],
            "data_split": "val",
        }
        for i in range(COUNT)
    ]
    header = {"dataset_name": "infographicVQA", "dataset_split": "val", "dataset_version": "1.0"}
    write_json(folder / "infographicsVQA_val_v1.0_withQT.json", header | {"data": rows})


def pope(folder: Path, kind: str = "random") -> None:
    names = [f"COCO_val2014_{310196 + i:012d}.jpg" for i in range(COUNT)]
    write_pictures(folder / "val2014", names)
    labels = ["yes", "no", "yes", "no", "yes"]
    rows = [
        {"question_id": i + 1, "image": name, "text": f"Is there a {i} in the image?", "label": label}
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    write_json_lines(folder / f"coco_pope_{kind}.json", rows)


def mmbench(folder: Path) -> None:
    """Three questions; the first in two rotations, the second time with the picture's index instead of the picture."""

    def encoded(number):
        buffer = io.BytesIO()
        picture(number).save(buffer, "JPEG", quality=95)
        return base64.b64encode(buffer.getvalue()).decode()

    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    columns += ["source", "l2-category", "comment", "split"]
    more = ["a source", "a group", "", "dev"]
    rows = [
        [1, "Which?", "Look closely", "cat", "dog", "bird", "", "B", "nature", encoded(1), *more],
        [1_000_001, "Which?", "Look closely", "dog", "bird", "cat", "", "A", "nature", "1", *more],
        [2, "How many?", "nan", "one", "two", "", "", "A", "count", encoded(2), *more],
        [3, 'Says "hi",\nor not?', "", "yes", "no", "", "", "A", "text", encoded(3), *more],
    ]
    with open(folder / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])


def mmvet(folder: Path) -> None:
    write_pictures(folder / "images", [f"v1_{i}.png" for i in range(COUNT)])
    rows = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.png",
            "question": f"What is {i}?",
            "answer": f"dog<AND>{i}",
            "imagesource": "https://host/d.jpg",
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
    **{f"pope-{kind}": partial(pope, kind=kind) for kind in ("random", "popular", "adversarial")},
    "mmbench": mmbench,
    "mm-vet": mmvet,
}


def coco_creation(folder: Path) -> None:
    """COCO's annotations come as a zip of a folder."""
    pairs = [(203564 + i, caption) for i in range(COUNT) for caption in captions_of(i)]
    images = [
        {"license": 1, "file_name": f"COCO_val2014_{203564 + i:012d}.jpg", "id": 203564 + i} for i in range(COUNT)
    ]
    annotations = [{"image_id": i, "id": 37 + k, "caption": f"{caption}\n"} for k, (i, caption) in enumerate(pairs)]
    values = COCO_INFO | {"images": images, "annotations": annotations}
    write_json(folder / "annotations" / "captions_val2014.json", values)


def ln_coco_creation(folder: Path) -> None:
    rows = [
        {
            "dataset_id": "mscoco_val2017",
            "image_id": str(137576 + i),
            "annotator_id": 93,
            "caption": f"In this image we can see {i} dogs.",
            "timed_caption": [{"caption": "In", "start_time": 0.0, "end_time": 0.4}],
            "traces": [[{"x": 0.2, "y": 0.4, "t": 0.022}]],
            "voice_recording": f"coco_val/coco_val_{i}.ogg",
        }
        for i in range(COUNT)
    ]
    write_json_lines(folder / "coco_val_localized_narratives.jsonl", rows)


def documents(folder: Path) -> None:
    """Documents of MMC4, whose pictures lie beside them."""
    write_pictures(folder / "images", [f"{i}a.jpg" for i in range(COUNT)])
    rows = [
        {
            "text_list": ["A title.", f"A text about {i}.", "The end."],
            "url": f"https://host/{i}",
            "image_info": [{"image_name": f"{i}a.jpg", "raw_url": "", "matched_text_index": 1, "matched_sim": 0.3}],
            "similarity_matrix": [[0.1, 0.3, 0.2]],
            "could_have_url_duplicate": 0,
        }
        for i in range(COUNT)
    ]
    write_json_lines(folder / "documents.jsonl", rows)


CREATION_WRITERS = {"coco-fid": coco_creation, "ln-coco-fid": ln_coco_creation, "interleaved-fid": documents}


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
