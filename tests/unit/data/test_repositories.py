"""What the names of files say; the rest of repositories.py is tested with a hub, in test_hub.py."""

import pytest

from flatgpt.data import hub


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("validation-00000-of-00001.parquet", "val"),
        ("valid.jsonl", "val"),
        ("wiki.val.jsonl.gz", "val"),
        ("dev-v1.1.jsonl", "val"),
        ("data/TEST.parquet", "test"),
        ("my_testing_2.parquet", "test"),
        ("test2.parquet", "test"),
        ("test/0000.parquet", "test"),
        ("default/partial-validation/0000.parquet", "val"),
        ("test/training.parquet", "train"),
        ("dev/en/test/0.parquet", "test"),
        ("000_00000.parquet", "train"),
        ("contest.parquet", "train"),
        ("latest/x.parquet", "train"),
        ("devices/invalid/testimony.jsonl", "train"),
    ],
)
def test_split_that_a_name_speaks_of(name, split):
    """In the file's name, else in the folders', the innermost first; words inside other words are none."""
    assert hub.group_by_split([name]) == {split: [name]}


def test_splits_come_in_our_order_and_files_in_theirs():
    found = hub.group_by_split(["b/test.parquet", "train-1", "dev-2", "train-0", "validation-1"])
    assert list(found.items()) == [
        ("train", ["train-1", "train-0"]),
        ("val", ["dev-2", "validation-1"]),
        ("test", ["b/test.parquet"]),
    ]


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        ([], True),
        (["a.parquet", "000_00000.parquet"], True),
        (["train-00000-of-00001.parquet"], True),
        (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "x.parquet"], True),
        (["train-00000-of-00002.parquet"], False),
        (["train-00001-of-00002.parquet", "x.parquet"], False),
        (["a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"], False),
        (["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"], True),
        (["dev-00000-of-00002.parquet", "test-00001-of-00002.parquet"], False),
        (["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"], False),
    ],
)
def test_numbered_files_are_all_there_or_not(names, whole):
    assert hub.is_complete(names) is whole
