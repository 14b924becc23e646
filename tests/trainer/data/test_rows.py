"""Rows as they are, from files and from the hub, with their numbers; and sources that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_trainer.config.base import DataConfig
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups, reading_of
from rlhf_trainer.data.rows import RowProblem, listing, read_rows
from rlhf_trainer.errors import UsageError

ROWS = [{"prompt": "a", "extra": 1}, {"prompt": "b", "extra": None}]
LENGTHS = {"max_prompt_length": 20, "max_length": 40}


def read(source, **options):
    return list(read_rows(str(source), "train", **options))


def load(source, tokenizer):
    return load_groups(source, Codec(tokenizer), split="train", **LENGTHS)


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


def test_a_parquet_file_is_read_few_rows_at_a_time(tmp_path, monkeypatch):
    """Arrow refuses nested columns of over 2 GB a batch, which 65,536 conversations easily have."""
    sizes, original = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda file, size=65536, **more: sizes.append(size) or original(file, size)
    )
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [row for _, row in read(tmp_path / "d.parquet")] == rows
    assert sizes == [256]


def test_a_mark_of_byte_order_and_line_ends_of_windows(tmp_path):
    lines = b"".join(json.dumps(row).encode() + b"\r\n" for row in ROWS)
    for name in ("d.jsonl", "d.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines)
        assert read(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])]
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfprompt,extra\r\na,1\r\n"b, c",\r\n')
    assert read(tmp_path / "d.csv") == [(1, {"prompt": "a", "extra": "1"}), (2, {"prompt": "b, c", "extra": None})]


def test_numbers_that_json_has_not(write_jsonl, tokenizer):
    """They are named with their field where they matter, and let through where they do not."""
    row = '{"prompt": "a", "chosen": "b", "rejected": "c", "note": NaN, "margin": %s}'
    assert len(load(write_jsonl([row % "1"]), tokenizer).examples) == 1
    for value in ("NaN", "-Infinity"):
        with pytest.raises(UsageError, match=r"row 1, field 'margin': expected a finite number, got float -?(nan|inf)"):
            load(write_jsonl([row % value]), tokenizer)


def test_deep_nesting_is_that_rows_problem(tmp_path, write_jsonl):
    deep = "[" * 100_000 + "]" * 100_000
    (_, problem), row = read(write_jsonl([f'{{"prompt": {deep}}}', json.dumps(ROWS[0])]))
    assert isinstance(problem, RowProblem) and "recursion" in problem
    assert row == (2, ROWS[0])
    (tmp_path / "deep.json").write_text(deep)
    with pytest.raises(UsageError, match=r"deep.json: .*recursion"):
        read(tmp_path / "deep.json")


def test_a_list_of_rows_and_a_row_a_line(tmp_path):
    (tmp_path / "list.json").write_text("\n" + json.dumps(ROWS, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)) + "\n{")
    assert read(tmp_path / "list.json") == [(1, ROWS[0]), (2, ROWS[1])]
    *rows, (number, problem) = read(tmp_path / "lines.json")
    assert rows == [(1, ROWS[0]), (2, ROWS[1])] and number == 3 and isinstance(problem, RowProblem)


def test_cells_that_do_not_fit_the_header(tmp_path):
    (tmp_path / "d.csv").write_text(f"prompt,completion\na,b,c\nd\n{'x' * 200_000},y\n")
    (_, problem), *rows = read(tmp_path / "d.csv")
    assert isinstance(problem, RowProblem) and problem.startswith("1 more cells than the header has names")
    assert rows == [(2, {"prompt": "d", "completion": None}), (3, {"prompt": "x" * 200_000, "completion": "y"})]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_goes_through_datasets(streaming, hub):
    import datasets

    requests = []

    def load_dataset(name, config, split, streaming):
        requests.append((name, config, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if streaming else data

    hub(load_dataset)
    rows = list(read_rows("someone/preferences", "train_prefs", streaming=streaming))
    assert requests == [("someone/preferences", None, "train_prefs", streaming)]
    assert rows == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_configuration_of_a_hub_data_set(hub, tokenizer):
    """dataset_config reaches datasets, from every command's options."""
    import datasets

    requests = []

    def load_dataset(name, config, split, streaming):
        requests.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])

    hub(load_dataset)
    config = DataConfig(dataset_name="someone/preferences", dataset_config="en", dataset_streaming=True)
    load_groups(config.dataset_name, Codec(tokenizer), **LENGTHS, **reading_of(config, "test_prefs"))
    assert requests == [("someone/preferences", "en", "test_prefs", True)]


def test_a_stream_is_read_no_further_than_needed(hub):
    sent = []

    def load_dataset(name, config, split, streaming):
        for row in ROWS * 100:
            sent.append(row)
            yield row

    hub(load_dataset)
    rows = read_rows("a/b", "train", streaming=True)
    assert sent == []
    assert next(rows) == (1, ROWS[0]) and len(sent) == 1


def test_a_stream_that_breaks_off_says_where(hub):
    def load_dataset(name, config, split, streaming):
        yield from ROWS
        raise ConnectionError("gone")

    hub(load_dataset)
    with pytest.raises(UsageError, match=r"a/b: .* \(split 'train'\), after row 2: gone"):
        read("a/b", streaming=True)


def test_a_hub_set_that_cannot_be_read(hub, tokenizer):
    def fails(name, config, split, streaming):
        raise ConnectionError("offline")

    hub(fails)
    with pytest.raises(UsageError, match=r"a/b: neither a file here nor a readable hub data set .*: offline"):
        load("a/b", tokenizer)


def test_a_missing_column_is_reported_with_those_there_are(hub, tokenizer, tmp_path):
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
    for name in ("missing", "x" * 300, "a\0b"):
        with pytest.raises(UsageError, match=rf"{name}.jsonl: no such file"):
            read(tmp_path / f"{name}.jsonl")
    (tmp_path / "pairs.txt").write_text("a,b")
    with pytest.raises(UsageError, match=r"pairs.txt: expected a file that ends in .jsonl, .json, .csv, .parquet"):
        read(tmp_path / "pairs.txt")
    (tmp_path / "cut.json").write_text('[{"prompt": "a"},')
    with pytest.raises(UsageError, match=r"cut.json: expected a list of rows, or a row a line; not JSON"):
        read(tmp_path / "cut.json")
    (tmp_path / "latin.csv").write_bytes(b"prompt\n\xe9\n")
    with pytest.raises(UsageError, match=r"latin.csv: not a readable CSV file \(UTF-8, "):
        read(tmp_path / "latin.csv")


def test_the_first_problems_are_listed():
    assert listing(["a", "b"]) == "  a\n  b"
    assert listing([*"abcdefg"]) == "  a\n  b\n  c\n  d\n  e\n  ... and 2 more"
