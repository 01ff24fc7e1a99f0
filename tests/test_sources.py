"""Files as people bring them: read right, or refused with the file, the place and the fix."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from orchestrator.data import prepare as preparing
from orchestrator.data.label_scan import names_of_classes
from orchestrator.data.prepare import Prepared, prepare, shared_rows
from orchestrator.data.readers import Notes, read_piece
from orchestrator.data.shards import open_shards
from orchestrator.data.sources import find_files, grouped, split_into_pieces
from orchestrator.errors import DataError
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow

ROWS = [{"text": f"great film {i}", "label": ("bad", "good")[i % 2]} for i in range(6)]
COLUMNS = ("text", "label")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the work of Ray Data's tasks here."""

    def run_all(work: Sequence[Any], function: Any, **how: Any) -> list[dict[str, Any]]:
        here = os.getcwd()
        return [json.loads(function({"work": w, "here": here})["out"]) for w in work]

    monkeypatch.setattr(preparing, "run_all", run_all)


def read(
    path: Path | str, columns: Sequence[str] = COLUMNS, notes: Notes | None = None, **how: Any
) -> list[Any]:
    """All rows of a file, bad ones as BadRow."""
    pieces = split_into_pieces(find_files(str(path), "auto", **how))
    return [item.row for piece in pieces for item in read_piece(piece, columns, (), notes)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path | str, columns: Sequence[str] = COLUMNS, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, columns, **how)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- JSON


ARRAYS = {
    "indented": json.dumps(ROWS, indent=2),
    "one line": json.dumps(ROWS),
    "one line and its end": json.dumps(ROWS) + "\n",
    "BOM": "\ufeff" + json.dumps(ROWS),
    "leading blank lines": "\n\n" + json.dumps(ROWS),
    "data": json.dumps({"data": ROWS}),
    "data and more": json.dumps({"version": "1.0", "data": ROWS}, indent=1),
    "any single key": json.dumps({"reviews": ROWS}, indent=2),
    "split": json.dumps({"columns": ["text", "label"], "data": [list(r.values()) for r in ROWS]}),
    "lines": "".join(json.dumps(r) + "\n" for r in ROWS),
    "lines with a BOM": "\ufeff" + "".join(json.dumps(r) + "\n" for r in ROWS),
    "lines with carriage returns": "".join(json.dumps(r) + "\r\n" for r in ROWS),
    "indented objects": "\n".join(json.dumps(r, indent=2) for r in ROWS),
    "a row in each line of an array": "[\n" + ",\n".join(json.dumps(r) for r in ROWS) + "\n]",
}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("text", ARRAYS.values(), ids=ARRAYS)
def test_json_is_read_as_it_comes(tmp_path: Path, text: str, ending: str) -> None:
    content = text.encode()
    path = write(tmp_path / f"rows{ending}", gzip.compress(content) if "gz" in ending else content)
    assert read(path) == ROWS


def test_one_object_is_one_row(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]
    assert read(write(tmp_path / "b.json", json.dumps(ROWS[0]))) == ROWS[:1]


def test_a_long_first_line_is_still_a_row_of_its_kind(tmp_path: Path) -> None:
    rows = [{"text": "a" * 2**21, "label": "x"}] * 2
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert read(write(tmp_path / "a.json", lines)) == rows
    assert read(write(tmp_path / "b.json", json.dumps(rows))) == rows
    assert read(write(tmp_path / "c.json", json.dumps({"data": rows}))) == rows


def test_a_broken_first_line_is_one_bad_row(tmp_path: Path) -> None:
    first, *others = read(write(tmp_path / "a.jsonl", '{"text": "a", \n{"text": "b"}\n'))
    assert isinstance(first, BadRow)
    assert others == [{"text": "b"}]


def test_items_of_an_array_that_are_no_objects_are_bad_rows(tmp_path: Path) -> None:
    first, second = read(write(tmp_path / "a.json", json.dumps([ROWS[0], "text"])))
    assert first == ROWS[0]
    assert isinstance(second, BadRow)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"},\n{"text": }]', "line 2"),
        ('[{"text": "a"},\n', "not closed"),
        (json.dumps({c: {"0": "a", "1": "b"} for c in COLUMNS}), "orient"),
    ],
)
def test_a_document_that_cannot_be_read_says_where_or_how(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "a.json"
    content = text if "orient" not in words else json.dumps(json.loads(text), indent=1)
    assert words in refused(write(path, content))


def test_squad_files_are_flattened(tmp_path: Path) -> None:
    asked = {"id": "1", "question": "who", "answers": [{"text": "he", "answer_start": 3}]}
    none = {"id": "2", "question": "why", "answers": [], "is_impossible": True}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "so he", "qas": [asked, none]}]}]}
    rows = read(write(tmp_path / "a.json", json.dumps(squad)), ("question", "context", "answers"))
    assert [r["answers"] for r in rows] == [
        {"text": ["he"], "answer_start": [3]},
        {"text": [], "answer_start": []},
    ]
    assert {r["context"] for r in rows} == {"so he"}


def test_a_key_that_stands_twice_is_noted(tmp_path: Path) -> None:
    notes = Notes()
    path = write(tmp_path / "a.jsonl", '{"text": "a", "text": "b", "label": "x"}\n')
    assert read(path, notes=notes) == [{"text": "b", "label": "x"}]
    (line,) = notes.lines()
    assert "row 1" in line
    assert "'text'" in line


# --- CSV


def test_quotes_in_tsv_are_text_unless_they_enclose_fields(tmp_path: Path) -> None:
    plain = 'text\tlabel\n"Good film, they said\tgood\n"Bad film, they said\tbad\nfine\tgood\n'
    assert [r["text"] for r in read(write(tmp_path / "a.tsv", plain))] == [
        '"Good film, they said', '"Bad film, they said', "fine",
    ]  # fmt: skip
    rows = [{"text": 'a "b"\tc', "label": "x"}, {"text": "two\nlines", "label": "y"}]
    assert read(tiny.write_csv(tmp_path / "b.tsv", rows)) == rows
    inner = 'text\tlabel\na 5" pipe\tx\n'
    assert read(write(tmp_path / "c.tsv", inner)) == [{"text": 'a 5" pipe', "label": "x"}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('label,text\ngood,great\ngood,"never closed\n' + "bad,awful\n" * 20, 3),
        ('label,text\ngood,"fine\nstill"\ngood,"open', 4),
        ('label,text\ngood,"a\nb","open\nbad,x\n', 3),
        ('label,text\ngood,"open\nbad,x\ngood,"again\n', 2),
        ('label,text\n\n\ngood,"open\n', 4),
    ],
)
def test_a_quote_that_never_closes_is_an_error_with_its_line(
    tmp_path: Path, text: str, line: int
) -> None:
    assert f"line {line}" in refused(write(tmp_path / "a.csv", text))


def test_wrong_quotes_inside_one_line_cost_one_row(tmp_path: Path) -> None:
    text = 'label,text\ngood,"he said "no" twice"\ngood,fine\ngood,5" pipe\n'
    bad, *others = read(write(tmp_path / "a.csv", text))
    assert isinstance(bad, BadRow)
    assert [r["text"] for r in others] == ["fine", '5" pipe']


def test_rows_that_a_quoted_field_swallows_are_noted(tmp_path: Path) -> None:
    notes = Notes()
    text = 'label,text\ngood,"great\nbad,dull\ngood,fine"\nbad,awful\n'
    assert len(read(write(tmp_path / "a.csv", text), notes=notes)) == 2
    assert "lines 2 to 4" in notes.lines()[0]
    fine = Notes()
    read(write(tmp_path / "b.csv", 'label,text\ngood,"two\nlines"\n'), notes=fine)
    assert fine.lines() == []


def test_columns_that_stand_twice_are_refused_or_noted(tmp_path: Path) -> None:
    assert "2 times" in refused(write(tmp_path / "a.csv", "text,label,text\na,x,b\n"))
    notes = Notes()
    rows = read(write(tmp_path / "b.csv", "text,label,id,id\na,x,1,2\n"), notes=notes)
    assert rows[0]["text"] == "a"
    assert "id" in notes.lines()[0]


def test_other_delimiters_are_suggested_and_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;label\na, b;x\n")
    assert 'data.delimiter=";"' in refused(path)
    assert read(path, delimiter=";") == [{"text": "a, b", "label": "x"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\r\r\n"])
def test_line_ends_of_any_kind_end_lines(tmp_path: Path, ending: str) -> None:
    text = ending.join(["text,label", "a,x", '"b, c",y', ""])
    rows = [{"text": "a", "label": "x"}, {"text": "b, c", "label": "y"}]
    assert read(write(tmp_path / "a.csv", "\ufeff" + text)) == rows


def test_a_stray_carriage_return_is_one_bad_row(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.csv", "text,label\na\rb,x\nc,y\n"))
    assert isinstance(found[0], BadRow)
    assert found[1:] == [{"text": "c", "label": "y"}]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_utf16_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "text,label\na,b\n".encode("utf-16"))
    assert "UTF-16" in refused(path)


def test_a_misspelled_column_is_told_with_the_nearest(tmp_path: Path) -> None:
    assert "'labels'" in refused(write(tmp_path / "a.csv", "text,labels\na,x\n"))
    assert "empty" in refused(write(tmp_path / "b.csv", ""))


def test_a_bom_is_no_part_of_a_text(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.txt", "\ufefffirst\nsecond\n"), ("text",))
    assert [r["text"] for r in rows] == ["first", "second"]


# --- compression


def compressed(codec: str, content: bytes) -> bytes:
    match codec:
        case "gz":
            return gzip.compress(content)
        case "bz2":
            return bz2.compress(content)
        case "xz":
            return lzma.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(
        sink, {"zst": "zstd", "lz4": "lz4", "br": "brotli"}[codec]
    ) as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


CONTENT = {
    "jsonl": "".join(json.dumps(r) + "\n" for r in ROWS).encode(),
    "json": json.dumps(ROWS).encode(),
    "csv": b"text,label\n" + b"".join(f"{r['text']},{r['label']}\n".encode() for r in ROWS),
}


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz", "zst", "lz4", "br"])
@pytest.mark.parametrize("kind", CONTENT)
def test_compressed_files_are_read(tmp_path: Path, codec: str, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}.{codec}", compressed(codec, CONTENT[kind]))
    assert read(path) == ROWS


def test_endings_in_upper_case_are_the_same(tmp_path: Path) -> None:
    for kind, codec in (("csv", "gz"), ("jsonl", "bz2")):
        packed = compressed(codec, CONTENT[kind])
        assert read(write(tmp_path / f"ROWS.{kind}.{codec}".upper(), packed)) == ROWS
    assert "unzip" in refused(write(tmp_path / "C.CSV.ZIP", b"PK\x03\x04"))


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz", "zst", "lz4"])
def test_a_compressed_file_that_is_cut_off_or_none_is_named(tmp_path: Path, codec: str) -> None:
    noise = np.random.default_rng(0).integers(97, 122, 50_000, dtype=np.uint8).tobytes()
    whole = compressed(codec, noise)
    refused(write(tmp_path / f"cut.txt.{codec}", whole[: len(whole) // 2]), ("text",))
    assert "uncompressed" in refused(write(tmp_path / f"plain.txt.{codec}", b"no such thing\n"))
    other = gzip.compress(b"a") if codec != "gz" else bz2.compress(b"a")
    refused(write(tmp_path / f"other.txt.{codec}", other))


def test_zstandard_that_is_none_names_the_compression(tmp_path: Path) -> None:
    damaged = bytes.fromhex("28b52ffd") + b"\x04\x58\xc9\x00\x00not really zstd\n"
    assert "zstd" in refused(write(tmp_path / "rows.jsonl.zst", damaged))


@pytest.mark.parametrize("name", ["a.zip", "a.csv.zip", "a.tar", "a.tar.gz", "a.tgz", "a.jsonl.7z"])
def test_archives_are_refused_by_name(tmp_path: Path, name: str) -> None:
    assert "Unpack" in refused(write(tmp_path / name, b"PK\x03\x04"))


def test_content_behind_the_wrong_name_is_named(tmp_path: Path) -> None:
    assert "gzip" in refused(write(tmp_path / "a.jsonl", gzip.compress(CONTENT["jsonl"])))
    parquet = tiny.write_parquet(tmp_path / "a.parquet", ROWS).read_bytes()
    assert "Parquet" in refused(write(tmp_path / "a.csv", parquet))


# --- what is found


def test_globs_folders_and_literal_names(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", ".c.csv", "x[1].csv", "größe #1%.csv"):
        tiny.write_csv(tmp_path / name, ROWS)
    found = [Path(f.url).name for f in find_files(str(tmp_path / "*.csv"), "auto")]
    assert found == ["a.csv", "b.csv", "größe #1%.csv", "x[1].csv"]
    assert read(tmp_path / "x[1].csv") == ROWS
    assert read(f"file://{tmp_path}/a.csv") == ROWS
    with pytest.raises(DataError, match=r"\*\.csv"):
        find_files(str(tmp_path), "auto")


def test_small_files_are_read_by_few_tasks(tmp_path: Path) -> None:
    for i in range(200):
        tiny.write_jsonl(tmp_path / f"{i:03d}.jsonl", ROWS)
    pieces = split_into_pieces(find_files(str(tmp_path / "*.jsonl"), "auto"))
    groups = grouped(pieces)
    assert len(groups) == 1
    assert [p.index for group in groups for p in group] == list(range(200))


# --- through `prepare`


def labels_of(prepared: Prepared) -> list[int]:
    return open_shards(prepared.folder, prepared.manifest).column("label").tolist()


def failure(spec: JobSpec) -> str:
    with pytest.raises(DataError) as caught:
        prepare(spec)
    return str(caught.value)


def with_names(path: Path, feature: Any, values: Sequence[Any], column: str = "label") -> Path:
    """A Parquet file with the metadata that `datasets` writes."""
    table = pa.table({"text": ["the film"] * len(values), column: pa.array(values)})
    info = {"info": {"features": {"text": {"_type": "Value"}, column: feature}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return path


CLASSES = {"names": ["neg", "pos", "mixed"], "_type": "ClassLabel"}


def test_label_names_come_from_parquet_metadata(models: tiny.Tiny, tmp_path: Path) -> None:
    path = with_names(tmp_path / "a.parquet", CLASSES, [1, 0, 1])
    done = prepare(tiny.job(models.bert, path, tmp_path))["train"]
    assert done.manifest.labels == ("neg", "pos", "mixed")
    assert labels_of(done) == [1, 0, 1]
    task = {"type": "text_classification", "labels": ["bad", "good", "other"]}
    renamed = prepare(tiny.job(models.bert, path, tmp_path, task=task))["train"]
    assert labels_of(renamed) == [1, 0, 1]
    missing = with_names(tmp_path / "b.parquet", CLASSES, [1, 0, -1])
    assert "row 3" in failure(tiny.job(models.bert, missing, tmp_path))


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": CLASSES, "_type": "Sequence"},
        {"feature": CLASSES, "_type": "List"},
        [CLASSES],
    ],
)
def test_names_inside_a_sequence_are_found(models: tiny.Tiny, tmp_path: Path, feature: Any) -> None:
    path = with_names(tmp_path / "a.parquet", feature, [[0, 2], [1]], "labels")
    task = {"type": "multi_label_classification"}
    spec = tiny.job(models.bert, path, tmp_path, task=task)
    assert names_of_classes(spec, find_files(str(path), "auto")) == {
        "labels": ("neg", "pos", "mixed")
    }
    table = open_shards(*_folder(prepare(spec)["train"])).take(np.arange(2))
    assert table["label"].to_pylist() == [[1, 0, 1], [0, 1, 0]]


def _folder(prepared: Prepared) -> tuple[Path, Any]:
    return prepared.folder, prepared.manifest


def test_integer_labels_are_sorted_as_numbers(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [{"text": "the film", "label": i} for i in (10, 9, 2)]
    done = prepare(tiny.job(models.bert, tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path))
    assert done["train"].manifest.labels == ("2", "9", "10")
    assert labels_of(done["train"]) == [2, 1, 0]


def test_floats_with_gaps_are_integers_and_the_gaps_bad_rows(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    labels = [1.0, 0.0, float("nan")]
    pq.write_table(pa.table({"text": ["the film"] * 3, "label": labels}), path)
    spec = tiny.job(models.bert, path, tmp_path, data={"on_bad_row": "skip"})
    done = prepare(spec)["train"]
    assert done.manifest.labels == ("0", "1")
    assert [r.row for r in done.manifest.bad_row_examples] == [3]


def test_when_every_row_is_bad_the_rows_reasons_are_told(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": ["a"]}] * 3)
    message = failure(tiny.job(models.bert, path, tmp_path))
    assert "3 rows" in message
    assert f"{path}, row 1" in message
    assert "a list" in message
    broken = write(tmp_path / "b.jsonl", "{\n{\n")
    assert "not valid JSON" in failure(tiny.job(models.bert, broken, tmp_path))


def test_too_many_labels_are_counted_truly(models: tiny.Tiny, tmp_path: Path) -> None:
    for count, words in ((1500, "1,500"), (2500, "more than 2,000")):
        rows = [{"text": "x", "label": f"label {i}"} for i in range(count)]
        path = tiny.write_jsonl(tmp_path / f"{count}.jsonl", rows)
        assert words in failure(tiny.job(models.bert, path, tmp_path))
    rows = [{"text": "x", "label": i / 7} for i in range(50)]
    path = tiny.write_jsonl(tmp_path / "numbers.jsonl", rows)
    assert "text_regression" in failure(tiny.job(models.bert, path, tmp_path))


def test_labels_that_look_alike_and_repeated_files_are_warned_of(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = [{"text": "the film", "label": label} for label in ("good", "Good", "bad")]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    done = prepare(tiny.job(models.bert, [path, path], tmp_path))["train"]
    assert done.manifest.rows == 6
    assert len(done.manifest.warnings) == 2


def test_evaluation_rows_that_are_training_rows_are_counted(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    train = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    held = tiny.write_csv(tmp_path / "b.csv", [*ROWS[:2], {"text": "other", "label": "good"}])
    done = prepare(tiny.job(models.bert, train, tmp_path, data={"eval": str(held)}))
    assert shared_rows(done["train"], done["eval"]) == 2


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_a_fraction_that_leaves_a_side_empty_names_one_that_does_not(
    models: tiny.Tiny, tmp_path: Path, count: int, fraction: float
) -> None:
    path = tiny.write_csv(tmp_path / "a.csv", tiny.labeled(count) + ROWS[:2])
    spec = tiny.job(models.bert, path, tmp_path, data={"eval_fraction": fraction})
    message = failure(spec)
    assert f"{count + 2} rows" in message
    works = float(message.split("data.eval_fraction=")[1].split(",")[0])
    done = prepare(tiny.job(models.bert, path, tmp_path, data={"eval_fraction": works}))
    assert done["train"].manifest.rows + done["eval"].manifest.rows == count + 2
