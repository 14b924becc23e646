"""Rows as they are, from files and from the hub, with their numbers; and sources that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.data.rows import RowProblem, listing, read_rows
from rlhf_trainer.errors import UsageError

ROWS = [{"prompt": "a", "extra": 1}, {"prompt": "b", "extra": None}]


def read(source, **options):
    return list(read_rows(str(source), "train", **options))


def load(source, tokenizer):
    return load_groups(source, tokenizer, split="train", max_prompt_length=20, max_length=40)


@pytest.fixture
def hub(monkeypatch):
    """Puts a function in the place of datasets.load_dataset."""
    import datasets

    return lambda function: monkeypatch.setattr(datasets, "load_dataset", function)


def test_lines_count_even_where_they_are_blank(write_jsonl):
    lines = [json.dumps(ROWS[0]), "", "  ", json.dumps(ROWS[1])]
    assert read(write_jsonl(lines)) == [(1, ROWS[0]), (4, ROWS[1])]


def test_what_is_not_json_takes_the_place_of_its_row(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n{"prompt"\n{"prompt": "\xc3\xa9"}\n')
    (_, first), (_, second), third = read(tmp_path / "b.jsonl")
    assert isinstance(first, RowProblem) and first.startswith("not JSON: ") and "utf-8" in first
    assert isinstance(second, RowProblem) and second.startswith("not JSON: ")
    assert third == (3, {"prompt": "é"})


def test_parquet_with_all_its_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=1)
    assert read(tmp_path / "d.parquet") == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_goes_through_datasets(streaming, hub):
    import datasets

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if streaming else data

    hub(load_dataset)
    found = list(read_rows("someone/preferences", "train_prefs", dataset_streaming=streaming))
    assert asked == [("someone/preferences", "train_prefs", streaming)]
    assert found == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_stream_is_read_no_further_than_needed(hub):
    given = []

    def load_dataset(name, split, streaming):
        for row in ROWS * 100:
            given.append(row)
            yield row

    hub(load_dataset)
    rows = read_rows("a/b", "train", dataset_streaming=True)
    assert given == []
    assert next(rows) == (1, ROWS[0]) and len(given) == 1


def test_a_stream_that_breaks_off_says_where(hub):
    def load_dataset(name, split, streaming):
        yield from ROWS
        raise ConnectionError("gone")

    hub(load_dataset)
    with pytest.raises(UsageError, match=r"a/b: .* \(split 'train'\), after row 2: gone"):
        read("a/b", dataset_streaming=True)


def test_a_hub_set_that_cannot_be_read(hub, tokenizer):
    def fails(name, split, streaming):
        raise ConnectionError("offline")

    hub(fails)
    with pytest.raises(UsageError, match=r"a/b: neither a file here nor a readable hub data set .*: offline"):
        load("a/b", tokenizer)


def test_the_columns_there_are_are_told(hub, tokenizer, tmp_path):
    import datasets

    hub(lambda *_, **__: datasets.Dataset.from_list([{"question": "x", "answer": "y"}]))
    with pytest.raises(
        UsageError, match=r"a/b: 1 of 1 .*\n  row 1, field 'prompt': missing; the row has: question, ans"
    ):
        load("a/b", tokenizer)
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "chosen": "b"}]), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=r"row 1, field 'rejected': missing; the row has: prompt, chosen\n"):
        load(str(tmp_path / "c.parquet"), tokenizer)


def test_files_that_are_not_what_they_should_be(tokenizer, tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UsageError, match=r"none.parquet is empty"):
        load(str(tmp_path / "none.parquet"), tokenizer)
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(UsageError, match=r"x.parquet: not a readable Parquet file"):
        read(tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"missing.jsonl: no such file"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"pairs.csv: expected a .jsonl or .parquet file"):
        read(tmp_path / "pairs.csv")


def test_the_first_problems_are_listed():
    assert listing(["a", "b"]) == "  a\n  b"
    assert listing([*"abcdefg"]) == "  a\n  b\n  c\n  d\n  e\n  ... and 2 more"
