"""Benchmarks: prompts as the spec has them, data in their published form, errors that say what is missing."""

import json

import pytest

from dreamllm.documents import PLAIN, VICUNA_V1_1
from dreamllm.evaluation.benchmarks import BENCHMARKS, AnswerBenchmark, PictureBenchmark, find_benchmark
from dreamllm.evaluation.benchmarks.base import EVALUATION_TEMPLATE, Decoding
from dreamllm.evaluation.benchmarks.mmvet import load_judge, score_with
from dreamllm.evaluation.files import DataFolderError, check_pictures
from dreamllm.evaluation.metrics import vqa_accuracy
from tests.evaluation.folders import COUNT, WRITERS, number_of, picture, text_of

OPENING = f" {VICUNA_V1_1.system} USER: "
PICTURE = picture(3)

# The whole prompt of the original protocol around the question "Q?".
ORIGINAL = {
    "coco-caption": "Based on the image, give the image caption briefly.<image>Q?"
    "Please summarize object in one sentence within 10 words. ASSISTANT: The image depicts",
    "nocaps": "<image>Q?Please summarize object briefly in one sentence within 5 words. ASSISTANT:",
    "image2paragraph": "Based on the image, please describe the image in detail.<image>Q?"
    "Please describe the image in detail. ASSISTANT: The image depicts",
    "vqav2": "Based on the image, please answer the question.<image>Q?"
    "Please provide an accurate answer within one word. ASSISTANT: The short answer (one word) is:",
    "okvqa": "<image>Q?Please provide an accurate and brief answer within one word. "
    "ASSISTANT: The short answer (one word) is:",
    "vizwiz": "Based on the image, please answer the question.<image>Q?"
    "Please provide an accurate answer within one word. ASSISTANT: The answer is:",
    "textvqa": "Based on the image, please answer the question.<image>Q?"
    "Please provide an accurate answer within one word. ASSISTANT: The answer is:",
    "docvqa": "<image>Q? ASSISTANT:",
    "infographicvqa": "<image>Q? ASSISTANT:",
    "pope-random": "Based on the image, please objectively and accurately indicate whether the object exists."
    "<image>Q? ASSISTANT: The answer is:",
    "mmbench": "This is an exam, please answer according to the image, hint and question.<image>Q?"
    "Please provide an accurate and detailed answer. ASSISTANT:",
    "mm-vet": "This is an exam, please answer according to the image and question.<image>Q?"
    "Please provide an accurate, detailed and comprehensive answer. ASSISTANT:",
}


def prompting(name, protocol="original"):
    return find_benchmark(name).prompting[protocol]


@pytest.mark.parametrize("name", ORIGINAL)
def test_prompts_of_the_original_protocol(name):
    document = prompting(name).document(PICTURE, "Q?", PLAIN, "", {})
    assert text_of(document) == OPENING + ORIGINAL[name]


def test_same_prompts_on_other_splits():
    for one, other in [("vqav2", "vqav2-val"), ("vizwiz", "vizwiz-val"), ("pope-random", "pope-popular")]:
        assert prompting(one) == prompting(other)


def test_decoding_of_the_original_protocol():
    """Five beams and 1024 tokens, but POPE: sampled at temperature 0.2."""
    for benchmark in BENCHMARKS.values():
        if isinstance(benchmark, AnswerBenchmark):
            decoding = benchmark.prompting["original"].decoding
            if benchmark.name.startswith("pope"):
                assert decoding == Decoding(1, 1024, 0.2, top_k=50)
            else:
                assert decoding == Decoding(5, 1024, 0.0, 1.0)


def test_drawing_of_the_original_protocol():
    candidates = {"coco-fid": 8, "ln-coco-fid": 1, "interleaved-fid": 1}
    for name, count in candidates.items():
        drawing = find_benchmark(name).drawing["original"]
        assert (drawing.steps, drawing.guidance_scale, drawing.scheduler, drawing.candidates) == (
            150,
            2.0,
            "ddpm",
            count,
        )


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if isinstance(b, AnswerBenchmark)])
def test_the_plain_protocol_takes_the_models_template_and_no_beams(name):
    plain = prompting(name, "plain")
    assert plain.template is None
    assert (plain.decoding.beams, plain.decoding.temperature) == (1, 0.0)
    text = text_of(plain.document(PICTURE, "Q?", PLAIN, "", {"A": "cat", "B": "dog"}))
    assert text.startswith("<image>" if plain.form == "pair" else "USER: <image>")
    assert ("\nA. cat\nB. dog\n" in text) == (name == "mmbench")


def test_the_evaluation_template_begins_with_a_space():
    assert EVALUATION_TEMPLATE.system == f" {VICUNA_V1_1.system}"


@pytest.mark.parametrize(
    ("name", "answer", "prediction"),
    [
        ("vqav2", ' "Red." , or blue', "red"),
        ("coco-caption", "a dog, and a cat.", "A dog, and a cat."),
        ("coco-caption", "", ""),
        ("mm-vet", " As is. ", "As is."),
    ],
)
def test_answers_are_cleaned_as_the_original_does(name, answer, prediction):
    assert prompting(name).cleaned(answer) == prediction


def test_documents_are_padded_to_squares():
    shown = prompting("docvqa").document(PICTURE, "Q?", PLAIN, "", {}).pictures()[0].source
    assert shown.size == (24, 24)
    assert shown.getpixel((0, 0)) == (122, 116, 104)
    assert shown.getpixel((12, 12)) == PICTURE.getpixel((0, 0))


@pytest.mark.parametrize("name", WRITERS)
def test_data_are_read_in_their_published_form(name, tmp_path):
    WRITERS[name](tmp_path)
    samples = find_benchmark(name).load(tmp_path)
    assert len(samples) == (4 if name == "mmbench" else COUNT)
    assert len({sample.id for sample in samples}) == len(samples)
    if name != "mmbench":
        check_pictures([sample.picture for sample in samples], tmp_path)
        assert [number_of(sample.picture) for sample in samples] == list(range(COUNT))


@pytest.mark.parametrize(
    "name", [n for n, b in BENCHMARKS.items() if isinstance(b, AnswerBenchmark | PictureBenchmark)]
)
def test_an_empty_folder_is_described(name, tmp_path):
    (tmp_path / "something.txt").write_text("")
    with pytest.raises(DataFolderError) as caught:
        find_benchmark(name).load(tmp_path)
    first = find_benchmark(name).files[0].split(" or ")[0].rstrip("/")
    assert first in str(caught.value)
    assert "it holds something.txt" in str(caught.value)
    with pytest.raises(DataFolderError, match="none does not exist"):
        find_benchmark(name).load(tmp_path / "none")


def test_partial_data_are_described(tmp_path):
    WRITERS["vqav2-val"](tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    values = json.loads(annotations.read_text())
    values["annotations"].pop()
    annotations.write_text(json.dumps(values))
    load = find_benchmark("vqav2-val").load
    with pytest.raises(DataFolderError, match="has no answers to question 262152000"):
        load(tmp_path)
    del values["annotations"][0]["answers"]
    annotations.write_text(json.dumps(values))
    with pytest.raises(
        DataFolderError, match="entry 0 has no 'answers'; it has question_type, multiple_choice_answer, image_id"
    ):
        load(tmp_path)
    annotations.write_text('{"questions": []}')
    with pytest.raises(DataFolderError, match="has no entry 'annotations'; it has questions"):
        load(tmp_path)
    annotations.write_text("{")
    with pytest.raises(DataFolderError, match=r"annotations\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "val2014").rename(tmp_path / "val")
    with pytest.raises(DataFolderError, match="has no folder val2014; it holds v2_OpenEnded"):
        load(tmp_path)


def test_missing_pictures_are_counted(tmp_path):
    WRITERS["coco-caption"](tmp_path)
    samples = find_benchmark("coco-caption").load(tmp_path)
    samples[1].picture.unlink()
    with pytest.raises(
        DataFolderError, match=r"1 of 5 pictures are missing from .*val2014/COCO_val2014_000000391896.jpg"
    ):
        check_pictures([sample.picture for sample in samples], tmp_path)


def test_coco_captions_in_the_other_form(tmp_path):
    rows = [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a", "b"]}]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(rows))
    (sample,) = find_benchmark("coco-caption").load(tmp_path)
    assert (sample.id, sample.references) == ("000000391895", ("a", "b"))
    assert sample.picture == tmp_path / "val2014" / "COCO_val2014_000000391895.jpg"


def test_mmbench_reads_hints_options_and_shared_pictures(tmp_path):
    WRITERS["mmbench"](tmp_path)
    first, rotated, second, third = find_benchmark("mmbench").load(tmp_path)
    assert first.question == "Hint:Look closelyQuestion:Which?"
    assert second.question == "Question:How many?"
    assert first.details["options"] == {"A": "cat", "B": "dog", "C": "bird"}
    assert number_of(rotated.picture) == number_of(first.picture) == 1
    assert third.references == ("A",)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\t1\ta source", "\t99\ta source"))
    with pytest.raises(DataFolderError, match="the picture of row 1000001 is neither base64 nor the index"):
        find_benchmark("mmbench").load(tmp_path)
    path.write_text("index\tquestion\n")
    with pytest.raises(DataFolderError, match="lacks the columns A, B, image; it has index, question"):
        find_benchmark("mmbench").load(tmp_path)


def records(name, tmp_path, predictions):
    WRITERS[name](tmp_path)
    return [
        {"id": s.id, "question": s.question, "prediction": p, "references": list(s.references), "details": s.details}
        for s, p in zip(find_benchmark(name).load(tmp_path), predictions, strict=True)
    ]


def test_vqa_scores_are_means(tmp_path):
    rows = records("textvqa", tmp_path, ["dog 0", "cat", "horse", "dog 3", "The cat."])
    scores = find_benchmark("textvqa").score(rows)
    expected = [vqa_accuracy(row["prediction"], row["references"]) for row in rows]
    assert list(scores.each) == expected == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert scores.figures[0].value == pytest.approx(0.8)


def test_pope_scores(tmp_path):
    rows = records("pope-random", tmp_path, ["Yes.", "Yes.", "no", "No", "yes"])
    scores = find_benchmark("pope-random").score(rows)
    assert {f.name: f.value for f in scores.figures} == pytest.approx(
        {"accuracy": 0.6, "F1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "share of yes": 0.6}
    )
    assert scores.each == (1, 0, 0, 1, 1)


def test_mmbench_scores_circularly(tmp_path):
    rows = records("mmbench", tmp_path, ["B", "(1)", "one", "perhaps"])
    scores = {f.name: f.value for f in find_benchmark("mmbench").score(rows).figures}
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["accuracy of single rotations"] == 0.5
    assert scores["answers that name no option"] == 0.25
    assert (scores["nature"], scores["count"], scores["text"]) == (0, 1, 0)


def test_nocaps_tells_domains_apart(tmp_path):
    rows = records("nocaps", tmp_path, [f"a dog number {i} on grass" for i in range(5)])
    names = [f.name for f in find_benchmark("nocaps").score(rows).figures]
    assert names[:4] == ["CIDEr", "CIDEr, in-domain", "CIDEr, near-domain", "CIDEr, out-domain"]


def test_what_only_a_server_knows_is_not_run(tmp_path):
    for name in ("vqav2", "vizwiz"):
        (tmp_path / name).mkdir()
        scores = find_benchmark(name).score(records(name, tmp_path / name, ["dog"] * 5))
        assert scores.figures[0].value is None
        assert "not run: the answers are on the server" in str(scores.figures[0])
    (tmp_path / "v").mkdir()
    assert find_benchmark("mm-vet").score(records("mm-vet", tmp_path / "v", ["dog"] * 5)).figures[0].value is None


def half(question, answers, prediction):
    return 0.5 if prediction in answers else 0.0


def test_a_judge_grades_mm_vet(tmp_path):
    rows = records("mm-vet", tmp_path, ["dog", "dog", "cat", "dog", "3"])
    scores = score_with(half, rows)
    assert scores.figures[0].value == pytest.approx(0.3)
    assert {f.name: f.value for f in scores.figures[1:]} == pytest.approx({"ocr": 0.5, "rec": 0.3})
    with pytest.raises(ValueError, match=r"graded 2.0; a grade lies in \[0, 1\]"):
        score_with(lambda *_: 2, rows)


def test_judges_are_named(monkeypatch):
    assert load_judge("math:hypot") is not None
    with pytest.raises(ValueError, match="cannot be had"):
        load_judge("nowhere:judge")
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        load_judge("math")


def test_captions_of_creation_are_fixed_once(tmp_path):
    rows = [{"image_id": i, "caption": f" caption {i} {k} "} for i in range(20) for k in range(5)]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    benchmark = find_benchmark("coco-fid")
    samples = benchmark.load(tmp_path)
    assert samples == benchmark.load(tmp_path)
    assert len({sample.id for sample in samples}) == 20
    assert all(sample.prompt.text() in sample.captions and len(sample.captions) == 5 for sample in samples)
    assert len({sample.prompt.text().split()[-1] for sample in samples}) > 1


def test_documents_give_the_text_before_their_first_picture(tmp_path):
    lines = [
        {"text_list": ["One.", "Two.", "Three."], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
        {"text_list": ["", "B"], "image_info": [
            {"image_name": "c.png", "matched_text_index": 1}, {"image_name": "b.png", "matched_text_index": 0}]},
        {"text_list": ["x"], "image_info": []},
    ]  # fmt: skip
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "images").mkdir()
    benchmark = find_benchmark("interleaved-fid")
    assert isinstance(benchmark, PictureBenchmark)
    assert [sample.prompt.text() for sample in benchmark.load(tmp_path)] == ["One. Two.", "B"]
    assert [path.name for path in benchmark.real(tmp_path)] == ["a.png", "c.png"]
    (tmp_path / "documents.jsonl").write_text(json.dumps(lines[2]))
    with pytest.raises(DataFolderError, match="no document has a picture with text before it"):
        benchmark.load(tmp_path)


def test_unknown_benchmarks_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown benchmark .vqa2.\. Did you mean .vqav2."):
        find_benchmark("vqa2")
