"""Arrow folders as save_to_disk leaves them: every layout of the picture column, and folders that are not whole."""

from __future__ import annotations

import json
import multiprocessing
import pickle

import pytest

pyarrow = pytest.importorskip("pyarrow")

from dreamllm.data import ArrowPairs, BadSampleError, make_reader, open_pairs  # noqa: E402
from dreamllm.data import arrow as module  # noqa: E402
from tests.data.arrow_folders import write_arrow, write_splits  # noqa: E402
from tests.data.pictures import png  # noqa: E402


def table(count: int = 5, **columns) -> pyarrow.Table:
    pictures = [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]
    return pyarrow.table({"image": pictures, "text": [f"caption {i}" for i in range(count)], **columns})


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSampleError) as error:
        source.pair(index)
    return error.value.reason


@pytest.mark.parametrize(("files", "rows_per_batch"), [(1, 1000), (1, 2), (3, 1), (2, 1000)])
def test_rows_are_found_whatever_the_batches(tmp_path, files, rows_per_batch):
    source = ArrowPairs(write_arrow(tmp_path / "set", table(), files, rows_per_batch))
    assert len(source) == 5
    for i in (4, 0, 2, 1, 3):
        pair = source.pair(i)
        assert (pair.caption, pair.image, pair.name) == (f"caption {i}", png(i), f"set row {i}")
    for i in (5, -1):
        with pytest.raises(IndexError):
            source.pair(i)


def test_arrow_file_format_is_read_too(tmp_path):
    folder = write_arrow(tmp_path, table())
    path = folder / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table().schema) as file:
        file.write_table(table())
    assert ArrowPairs(folder).pair(3).caption == "caption 3"


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_pictures_may_be_plain_bytes_or_paths(tmp_path, kind):
    pictures = pyarrow.array([png(i) for i in range(5)], kind)
    source = ArrowPairs(write_arrow(tmp_path / "a", table().set_column(0, "image", pictures)))
    assert source.pair(2).image == png(2)
    folder = write_arrow(tmp_path / "b", table(2).set_column(0, "image", [["0.png", "gone.png"]]))
    (folder / "0.png").write_bytes(png(0))
    assert ArrowPairs(folder).pair(0).image == folder / "0.png"
    assert reason_of(ArrowPairs(folder), 1) == "missing_image"


def test_a_struct_without_bytes_names_a_file(tmp_path):
    folder = write_arrow(tmp_path, pyarrow.table({"image": [{"bytes": None, "path": "0.png"}], "text": ["x"]}))
    (folder / "0.png").write_bytes(png(0))
    assert ArrowPairs(folder).pair(0).image == folder / "0.png"


def test_rows_that_lack_something_are_named_with_the_reason(tmp_path):
    pictures = [{"bytes": data, "path": None} for data in (b"", None, png(0), png(0))]
    rows = {
        "image": [pictures[0], None, *pictures[1:]],
        "text": ["x", "x", "x", None, "  "],
    }  # fmt: skip
    source = ArrowPairs(write_arrow(tmp_path, pyarrow.table(rows)))
    assert [reason_of(source, i) for i in range(5)] == [
        "corrupt_image", "missing_image", "missing_image", "missing_caption", "empty_caption",
    ]  # fmt: skip


def test_columns_can_be_named(tmp_path):
    folder = write_arrow(tmp_path, table(prompt=["a", "b", "c", "d", "e"], number=list(range(5))))
    reader = make_reader("arrow", folder, mode="creation", caption_column="prompt")
    assert reader.document(1).text() == "b"
    with pytest.raises(ValueError, match=r"no caption column 'titel'; it has image \(struct.*caption_column"):
        ArrowPairs(folder, caption_column="titel")
    with pytest.raises(ValueError, match="column 'number' is no caption column"):
        ArrowPairs(folder, caption_column="number")
    with pytest.raises(ValueError, match="column 'number' is no image column"):
        ArrowPairs(folder, image_column="number")
    with pytest.raises(ValueError, match="no image column image or jpg or png"):
        ArrowPairs(write_arrow(tmp_path / "b", pyarrow.table({"text": ["a"]})))


def test_other_columns_are_metadata_for_filters(tmp_path):
    folder = write_arrow(tmp_path, table(LANGUAGE=["en", "de", "en", "de", None]))
    reader = make_reader("arrow", folder, filters={"languages": ["en"]})
    kept = [reader.source.usable_pair(i) is not None for i in range(5)]
    assert kept == [True, False, True, False, True]
    assert ArrowPairs(folder).pair(0).metadata == {}


def test_splits(tmp_path):
    folder = write_splits(tmp_path / "d", {"train": table(3), "test": table(2)})
    assert [len(ArrowPairs(folder, split=split)) for split in (None, "train", "test")] == [3, 3, 2]
    assert len(open_pairs(folder)) == 3
    with pytest.raises(ValueError, match="has the splits train, test, not 'validation'; choose one with split"):
        ArrowPairs(folder, split="validation")
    only = write_splits(tmp_path / "e", {"validation": table(4)})
    assert len(ArrowPairs(only)) == 4
    with pytest.raises(ValueError, match="has no splits"):
        ArrowPairs(only / "validation", split="train")


def test_a_reader_travels_to_other_processes(tmp_path):
    source = ArrowPairs(write_arrow(tmp_path, table()))
    assert source.pair(1) == pickle.loads(pickle.dumps(source)).pair(1)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.pair, range(5)) == [source.pair(i) for i in range(5)]


def test_folders_that_are_not_whole_are_told_exactly(tmp_path):
    folder = write_arrow(tmp_path / "a", table(), files=2)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"names data-00001-of-00002\.arrow, which does not exist"):
        ArrowPairs(folder)
    folder = write_arrow(tmp_path / "b", table())
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="is not a whole Arrow file"):
        ArrowPairs(folder)
    folder = write_arrow(tmp_path / "c", table())
    (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"not written by save_to_disk: it has no dataset_info\.json"):
        ArrowPairs(folder)
    for state, message in [
        ("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "does not list _data_files"),
        ('{"_data_files": [], "_indices_data_files": [{}]}', "flatten_indices"), ('{"_data_files": []}', "has no rows"),
    ]:  # fmt: skip
        (write_arrow(tmp_path / "d", table()) / "state.json").write_text(state)
        with pytest.raises(ValueError, match=message):
            ArrowPairs(tmp_path / "d")


def test_files_with_different_columns_are_refused(tmp_path):
    folder = write_arrow(tmp_path, table(), files=2)
    other = write_arrow(tmp_path / "other", table(number=list(range(5))), files=2)
    (other / "data-00001-of-00002.arrow").rename(folder / "data-00001-of-00002.arrow")
    with pytest.raises(ValueError, match="different columns"):
        ArrowPairs(folder)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = write_arrow(tmp_path, table())
    monkeypatch.setattr(module, "pyarrow", None)
    with pytest.raises(ImportError, match=r"need pyarrow: pip install 'dreamkernels\[arrow\]'"):
        make_reader("auto", folder)


def test_the_state_names_the_order_of_the_files(tmp_path):
    folder = write_arrow(tmp_path, table(4), files=2)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert [ArrowPairs(folder).pair(i).caption for i in range(4)] == [f"caption {i}" for i in (2, 3, 0, 1)]
