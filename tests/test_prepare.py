"""Raw rows become prepared shards once, completely, or not at all."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from orchestrator.data import readers, sources
from orchestrator.data.commit import STALE_S, make_folder
from orchestrator.data.manifest import Manifest, read_manifest, verify_shards
from orchestrator.data.prepare import Prepared, find_prepared, prepare
from orchestrator.data.shards import open_shards
from orchestrator.data.write import BAD_ROWS, EXAMPLES
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.spec import JobSpec

pytestmark = pytest.mark.usefixtures("ray")
LABELS = ("bad", "good")


def texts(prepared: Prepared, tokenizer: Any) -> list[str]:
    """The decoded rows, in order."""
    reader = open_shards(prepared.folder, prepared.manifest)
    table = reader.take(np.arange(prepared.manifest.rows))
    return [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in table["input_ids"].to_pylist()
    ]


def numbered(n: int) -> list[tiny.Row]:
    """Rows that can be told apart: `great dull great …`, the row's number in binary."""
    words = ("dull", "great")
    return [
        {"text": " ".join(words[int(bit)] for bit in f"{i:012b}"), "label": LABELS[i % 2]}
        for i in range(n)
    ]


def failure(spec: JobSpec) -> str:
    """The message of the DataError that preparing `spec` ends with; nothing may be left behind."""
    with pytest.raises(DataError) as caught:
        prepare(spec)
    assert "DataContext" not in str(caught.value), "Ray's advice is not for users"
    folder = Path(spec.data.prepared_dir)
    assert not folder.exists() or not list(folder.iterdir())
    return str(caught.value)


@pytest.fixture
def words() -> Any:
    return tiny.word_tokenizer()


ROWS = numbered(40)


def write_mixed(folder: Path) -> list[Path]:
    """One file of each kind, 8 rows each."""
    folder.mkdir()
    parts = [ROWS[i : i + 8] for i in range(0, 40, 8)]
    return [
        tiny.write_jsonl(folder / "a.jsonl", parts[0]),
        tiny.write_jsonl(folder / "b.jsonl.gz", parts[1]),
        tiny.write_csv(folder / "c.csv", parts[2]),
        tiny.write_csv(folder / "d.tsv", parts[3]),
        tiny.write_parquet(folder / "e.parquet", parts[4], group_rows=3),
    ]


def test_every_format_gives_the_same_rows_in_the_order_of_the_files(
    models: tiny.Tiny, words: Any, tmp_path: Path
) -> None:
    files = write_mixed(tmp_path / "in")
    train = prepare(tiny.job(models.bert, files, tmp_path))["train"]
    wanted = [row["text"] for row in ROWS]
    assert texts(train, words) == wanted
    labels = open_shards(train.folder, train.manifest).column("label")
    assert labels.tolist() == [i % 2 for i in range(40)]
    m = train.manifest
    assert (m.rows, m.input_rows, m.bad_rows, m.truncated_rows) == (40, 40, 0, 0)
    assert m.labels == LABELS
    assert m.tokens == 40 * 14
    assert m.longest_tokens == 14
    assert len(m.inputs) == 5

    globbed = tiny.job(models.bert, str(tmp_path / "in" / "*"), tmp_path / "other")
    assert texts(prepare(globbed)["train"], words) == wanted


def test_relative_paths_are_relative_to_the_driver_wherever_its_nodes_were_started(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "model").symlink_to(models.bert)
    monkeypatch.chdir(tmp_path)  # Ray has been running elsewhere
    done = prepare(tiny.job(Path("model"), "rows.jsonl", Path(".")))["train"]
    assert done.manifest.rows == len(ROWS)
    assert done.folder.is_absolute()


def test_text_files_hold_one_document_per_line_and_are_packed(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = tiny.documents(30)
    files = [
        tiny.write_text(tmp_path / "a.txt", rows[:10]),
        tiny.write_text(tmp_path / "b.txt.gz", rows[10:]),
    ]
    spec = tiny.job(
        models.llama, files, tmp_path, task={"type": "causal_lm"}, data={"max_length_tokens": 32}
    )
    train = prepare(spec)["train"]
    tokenizer = tiny.bpe_tokenizer()
    wanted = [i for r in rows for i in [*tokenizer(r["text"])["input_ids"], tokenizer.eos_token_id]]
    reader = open_shards(train.folder, train.manifest)
    table = reader.take(np.arange(train.manifest.rows))
    assert [i for ids in table["input_ids"].to_pylist() for i in ids] == wanted
    assert train.manifest.tokens == len(wanted)
    assert train.manifest.target_tokens == sum(table["n_targets"].to_pylist())
    assert train.manifest.target_tokens == sum(sum(t) for t in table["is_target"].to_pylist())
    assert sum(length < 32 for length in table["length"].to_pylist()) <= 2, "one rest per file"


def test_chats_and_instructions_are_prepared(models: tiny.Tiny, tmp_path: Path) -> None:
    for kind, rows in (("chat", tiny.chats(12)), ("instruction", tiny.instructions(12))):
        path = tiny.write_parquet(tmp_path / f"{kind}.parquet", rows)
        task = {"type": "causal_lm", "rows": {"type": kind}}
        train = prepare(tiny.job(models.qwen2, path, tmp_path, task=task))["train"]
        table = open_shards(train.folder, train.manifest).take(np.arange(train.manifest.rows))
        assert sum(len(d) for d in table["doc_lengths"].to_pylist()) == 12


# --- rows that cannot be used


BROKEN = {
    b'{"label": "good"}': "column 'text' is missing",
    b'{"text": 5, "label": "good"}': "must be text, got int",
    b'{"text": "  ", "label": "good"}': "column 'text' is empty",
    b'{"text": "dull", "label": "odd"}': "unknown label 'odd'",
    b'{"text": "caf\xe9", "label": "good"}': "invalid UTF-8 at byte 13",
    b'{"text": "dull", "lab': "not valid JSON",
    b'["dull", "good"]': "not a JSON object",
    b'{"text": "\\ud83d", "label": "good"}': "lone surrogate",
    b'{"text": "' + b"dull " * 30 + b'", "label": "good"}': "data.max_length_tokens = 20",
}
"""JSONL lines that cannot be used, and why."""


def strict(models: tiny.Tiny, path: Path, folder: Path, **data: Any) -> JobSpec:
    return tiny.job(
        models.bert,
        path,
        folder,
        task={"type": "text_classification", "labels": list(LABELS)},
        data={"max_length_tokens": 20, "truncation": "error", **data},
    )


def jsonl_lines(rows: Iterable[tiny.Row]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def test_every_kind_of_bad_row_is_named_by_file_line_and_reason(
    models: tiny.Tiny, words: Any, tmp_path: Path
) -> None:
    lines = jsonl_lines(ROWS[:20])
    at = dict(zip(range(2, 19, 2), BROKEN, strict=True))
    for place, line in at.items():
        lines[place - 1] = line
    lines[19 - 1] = b""  # a blank line separates, it is no row
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))

    message = failure(strict(models, path, tmp_path))
    assert message.startswith("9 of 19 rows cannot be used:")
    told = dict(zip(at, message.splitlines()[1:], strict=False))
    for place, line in at.items():
        assert told[place].startswith(f"  {path}, row {place}: ")
        assert BROKEN[line] in told[place]
    assert "data.on_bad_row=skip" in message

    train = prepare(strict(models, path, tmp_path, on_bad_row="skip"))["train"]
    m = train.manifest
    assert (m.rows, m.input_rows, m.bad_rows) == (10, 19, 9)
    assert [(r.file, r.row) for r in m.bad_row_examples] == [(str(path), n) for n in at]
    kept = [i for i in range(20) if i + 1 not in at and i + 1 != 19]
    assert texts(train, words) == [ROWS[i]["text"] for i in kept]


def test_all_bad_rows_are_listed_beside_the_manifest(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [*jsonl_lines(ROWS[:4]), *[b"{"] * 2 * EXAMPLES]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(sources, "PIECE_BYTES", path.stat().st_size // 2)
    done = prepare(strict(models, path, tmp_path, on_bad_row="skip"))["train"]
    listed = [json.loads(line) for line in (done.folder / BAD_ROWS).read_text().splitlines()]
    assert [r["row"] for r in listed] == list(range(5, 5 + 2 * EXAMPLES))
    assert {r["file"] for r in listed} == {str(path)}
    assert len(done.manifest.bad_row_examples) == EXAMPLES


def test_bad_csv_records_are_named(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        b"text,label",
        b"dull,bad",
        b"great,good,extra",
        b"great",
        b"caf\xe9,good",
        b"dull,bad",
    ]
    path.write_bytes(b"\r\n".join(lines))
    message = failure(strict(models, path, tmp_path))
    assert message.startswith("3 of 5 rows cannot be used:")
    assert f"{path}, row 2: has 3 fields where the header has 2" in message
    assert f"{path}, row 3: has 1 fields where the header has 2" in message
    assert f"{path}, row 4: invalid UTF-8" in message


def test_quotes_and_line_breaks_inside_csv_fields_are_text(
    models: tiny.Tiny, words: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        '\ufefflabel,text\nbad,"the film, was\n""dull"""\ngood,great\n', encoding="utf-8"
    )
    train = prepare(strict(models, path, tmp_path))["train"]
    assert texts(train, words)[1] == "great"
    assert train.manifest.rows == 2


def test_bad_parquet_rows_are_named_across_row_groups(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS[:10]]
    rows[7]["label"] = None
    path = tiny.write_parquet(tmp_path / "rows.parquet", rows, group_rows=3)
    assert f"{path}, row 8: column 'label' is missing" in failure(strict(models, path, tmp_path))


def test_a_missing_column_is_named_with_those_that_exist(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [{"sentence": r["text"], "label": r["label"]} for r in ROWS[:4]]
    for path in (
        tiny.write_csv(tmp_path / "a.csv", rows),
        tiny.write_parquet(tmp_path / "a.parquet", rows),
    ):
        message = failure(strict(models, path, tmp_path))
        assert f"{path}: no column 'text'; it has 'sentence', 'label'" in message


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named(
    models: tiny.Tiny, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_text("something else")
    assert str(path) in failure(strict(models, path, tmp_path))


def test_a_compressed_file_that_was_cut_off_is_named(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: cannot be unpacked" in failure(strict(models, path, tmp_path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_a_file_without_rows_is_refused(models: tiny.Tiny, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(
            pa.table({"text": pa.array([], "string"), "label": pa.array([], "string")}), path
        )
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(b""))
    else:
        path.write_text("text,label\n" if name.endswith("csv") else "")
    assert "no usable row" in failure(strict(models, path, tmp_path))


def test_unknown_paths_and_formats_are_refused(models: tiny.Tiny, tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("x")
    assert "format cannot be told" in failure(strict(models, tmp_path / "rows.dat", tmp_path))
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    spec = strict(models, path, tmp_path)
    path.unlink()
    assert "no such file" in failure(spec)


# --- labels


def test_labels_are_discovered_sorted_and_shared_with_evaluation(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    train = tiny.write_csv(
        tmp_path / "train.csv", [{"text": "dull", "label": x} for x in ("z", "a", "z", "m")]
    )
    held = tiny.write_jsonl(tmp_path / "eval.jsonl", [{"text": "great", "label": "z"}])
    done = prepare(tiny.job(models.bert, train, tmp_path, data={"eval": str(held)}))
    assert done["train"].manifest.labels == done["eval"].manifest.labels == ("a", "m", "z")
    reader = open_shards(done["eval"].folder, done["eval"].manifest)
    assert reader.column("label").tolist() == [2]


def test_an_empty_label_is_a_bad_row_and_no_label(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [{"text": "dull", "label": x} for x in ("a", "", "b")]
    path = tiny.write_csv(tmp_path / "train.csv", rows)
    assert f"{path}, row 2: column 'label'" in failure(tiny.job(models.bert, path, tmp_path))
    skipping = tiny.job(models.bert, path, tmp_path, data={"on_bad_row": "skip"})
    assert prepare(skipping)["train"].manifest.labels == ("a", "b")


def test_one_distinct_label_is_refused(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "dull", "label": "a"}] * 3)
    assert "holds one label, 'a'" in failure(tiny.job(models.bert, path, tmp_path))


# --- once, and never half


def test_prepared_data_is_found_again_without_being_written_again(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    spec = tiny.job(models.bert, path, tmp_path, data={"eval_fraction": 0.25})
    assert find_prepared(spec) is None
    first = prepare(spec)
    assert not first["train"].was_ready
    files = [f for one in first.values() for f in one.folder.iterdir()]
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}
    second = prepare(spec)
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files} == before
    for split in ("train", "eval"):
        assert second[split].was_ready
        assert second[split].folder == first[split].folder
        assert second[split].manifest == first[split].manifest
        assert second[split].folder.name == second[split].manifest.fingerprint
    found = find_prepared(spec)
    assert found is not None
    assert found["eval"].folder == first["eval"].folder


def test_the_fingerprint_changes_with_whatever_changes_the_rows(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    model = tmp_path / "model"
    shutil.copytree(models.bert, model)
    task = {"type": "text_classification", "text_column": "text"}

    def fingerprint(**changes: Any) -> str:
        fields = {"task": task, **changes}
        return prepare(tiny.job(model, path, tmp_path, **fields))["train"].manifest.fingerprint

    names = [
        fingerprint(),
        fingerprint(data={"max_length_tokens": 9}),
        fingerprint(data={"on_bad_row": "skip"}),
        fingerprint(data={"shard_rows": 7}),
        fingerprint(data={"eval_fraction": 0.2}),
        fingerprint(data={"eval_fraction": 0.2}, seed=7),
        fingerprint(task={**task, "labels": ["good", "bad"]}),
    ]
    same = fingerprint(optimizer={"lr": 1.0}, seed=9, name="other", batch={"global_batch_size": 3})
    assert same == names[0], "what does not change the rows does not prepare them again"

    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"dull"', '"glum"'))
    names.append(fingerprint())
    path.write_text(path.read_text().replace("dull", "boring", 1))
    names.append(fingerprint())
    assert len(set(names)) == len(names)


def test_a_changed_tokenizer_is_used_by_workers_that_knew_the_old_one(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    model = tmp_path / "model"
    shutil.copytree(models.bert, model)
    spec = tiny.job(model, path, tmp_path)
    unknown = tiny.word_tokenizer().unk_token_id

    def unknown_tokens() -> int:
        train = prepare(spec)["train"]
        table = open_shards(train.folder, train.manifest).take(np.arange(train.manifest.rows))
        return sum(ids.count(unknown) for ids in table["input_ids"].to_pylist())

    assert unknown_tokens() == 0
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"dull"', '"glum"'))
    assert unknown_tokens() == sum(r["text"].count("dull") for r in ROWS)


def test_a_job_with_a_config_in_place_of_weights_is_prepared(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tiny.write_text(tmp_path / "a.txt", tiny.documents(5))
    config = {"model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
    model = {"pretrained": None, "config": config, "tokenizer": str(models.gpt2)}
    spec = tiny.job(models.gpt2, path, tmp_path, task={"type": "causal_lm"}, model=model)
    assert prepare(spec)["train"].manifest.max_length_tokens == 16


@pytest.mark.parametrize(("kind", "limit"), [("bert", 64), ("gpt2", 128)])
def test_rows_longer_than_the_model_has_positions_are_refused(
    models: tiny.Tiny, tmp_path: Path, kind: str, limit: int
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)

    def job(length: int) -> JobSpec:
        data = {"max_length_tokens": length}
        return tiny.job(getattr(models, kind), path, tmp_path, data=data)

    for verb in (prepare, find_prepared):
        with pytest.raises(OrchestratorError) as caught:
            verb(job(limit + 1))
        assert f"data.max_length_tokens = {limit + 1}" in str(caught.value)
        assert f"set data.max_length_tokens={limit} or less" in str(caught.value)
        verb(job(limit))


def test_a_half_written_folder_is_never_taken_for_prepared_data(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    spec = tiny.job(models.bert, path, tmp_path)
    done = prepare(spec)["train"]
    complete = {f.name: f.read_bytes() for f in done.folder.iterdir()}
    # What a killed run leaves: shards in a temporary folder, without a manifest.
    (done.folder / "manifest.json").unlink()
    os.rename(done.folder, done.folder.with_name(f".{done.folder.name}.1.tmp"))
    assert find_prepared(spec) is None
    again = prepare(spec)["train"]
    assert not again.was_ready
    assert {f.name: f.read_bytes() for f in again.folder.iterdir()} == complete


def test_what_killed_runs_left_is_removed_once_it_is_old(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    spec = tiny.job(models.bert, path, tmp_path)
    done = prepare(spec)["train"].folder
    names = ("old", "fresh", "at_work")
    left = [done.with_name(f".{done.name}.{i}.tmp") for i, _ in enumerate(names, start=1)]
    other = done.with_name(".another.1.tmp")
    long_ago = time.time() - 2 * STALE_S
    for folder in (*left, other):
        folder.mkdir()
        (folder / "shard-00000-00000.arrow").write_bytes(b"torn")
    for stale in (left[0], left[2], other):
        os.utime(stale / "shard-00000-00000.arrow", (long_ago, long_ago))
        os.utime(stale, (long_ago, long_ago))
    (left[2] / "shard-00000-00000.arrow").write_bytes(b"just written")
    shutil.rmtree(done)
    prepare(spec)
    remaining = {f.name for f in done.parent.iterdir()}
    assert remaining == {done.name, left[1].name, left[2].name, other.name}


def test_two_drivers_with_one_process_id_do_not_delete_each_others_work(tmp_path: Path) -> None:
    """Pids repeat from pod to pod; both prepare into one shared folder."""
    manifest = Manifest(
        fingerprint="f", inputs=(), features={}, labels=(), max_length_tokens=1, longest_tokens=1,
        rows=1, tokens=1, target_tokens=1, input_rows=1, truncated_rows=0, bad_rows=0, shards=(),
    )  # fmt: skip

    def write(temporary: Path, meanwhile: bool = False) -> Manifest:
        (temporary / "shard").write_bytes(b"first")
        if not meanwhile:
            make_folder(tmp_path / "made", lambda other: write(other, meanwhile=True))
        assert (temporary / "shard").read_bytes() == b"first"
        return manifest

    folder, _ = make_folder(tmp_path / "made", write)
    assert {f.name for f in tmp_path.iterdir()} == {"made"}
    assert {f.name for f in folder.iterdir()} == {"shard", "manifest.json"}


def test_a_folder_that_lost_its_manifest_is_replaced(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    spec = tiny.job(models.bert, path, tmp_path)
    done = prepare(spec)["train"]
    complete = {f.name: f.read_bytes() for f in done.folder.iterdir()}
    (done.folder / "manifest.json").unlink()
    (done.folder / done.manifest.shards[0].file).write_bytes(b"torn")
    again = prepare(spec)["train"]
    assert (again.folder, again.was_ready) == (done.folder, False)
    assert {f.name: f.read_bytes() for f in done.folder.iterdir()} == complete
    assert [f.name for f in done.folder.parent.iterdir()] == [done.folder.name]


def test_a_failed_run_leaves_nothing_that_looks_prepared(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*jsonl_lines(ROWS), b"{"]))
    spec = strict(models, path, tmp_path)
    failure(spec)
    assert find_prepared(spec) is None


def test_a_flipped_bit_and_a_missing_shard_are_noticed(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    done = prepare(tiny.job(models.bert, path, tmp_path, data={"shard_rows": 15}))["train"]
    assert [s.rows for s in done.manifest.shards] == [15, 15, 10]
    verify_shards(done.folder, done.manifest)
    shard = done.folder / done.manifest.shards[1].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name):
        verify_shards(done.folder, done.manifest)
    with pytest.raises(DataError, match=f"{shard.name}.*Delete .* and run prepare again"):
        prepare(tiny.job(models.bert, path, tmp_path, data={"shard_rows": 15}))
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        verify_shards(done.folder, done.manifest)


def test_a_manifest_of_another_version_is_not_read(models: tiny.Tiny, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    done = prepare(tiny.job(models.bert, path, tmp_path))["train"]
    manifest = done.folder / "manifest.json"
    assert read_manifest(done.folder) == done.manifest
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 999'))
    assert read_manifest(done.folder) is None


# --- splits and pieces


def test_the_held_out_split_is_disjoint_complete_and_the_same_each_time(
    models: tiny.Tiny, words: Any, tmp_path: Path
) -> None:
    rows = numbered(400)
    path = tiny.write_jsonl(tmp_path / "a.jsonl", rows)

    def split(folder: str, seed: int) -> tuple[list[str], list[str]]:
        spec = tiny.job(
            models.bert, path, tmp_path / folder, data={"eval_fraction": 0.25}, seed=seed
        )
        done = prepare(spec)
        return texts(done["train"], words), texts(done["eval"], words)

    train, held = split("one", 1)
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(row["text"] for row in rows)
    assert 0.15 < len(held) / 400 < 0.35
    assert split("two", 1) == (train, held)
    assert split("three", 2)[1] != held


def test_more_rows_leave_the_split_of_earlier_ones_alone(
    models: tiny.Tiny, words: Any, tmp_path: Path
) -> None:
    rows = numbered(60)
    held = []
    for name, count in (("short", 40), ("long", 60)):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows[:count])
        spec = tiny.job(models.bert, path, tmp_path, data={"eval_fraction": 0.3})
        held.append(texts(prepare(spec)["eval"], words))
    assert held[1][: len(held[0])] == held[0]


@pytest.mark.parametrize("piece_bytes", [50, 101, 1000])
def test_a_file_cut_into_pieces_loses_no_line_and_numbers_them_right(
    models: tiny.Tiny,
    words: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
) -> None:
    lines = jsonl_lines(ROWS[:15])
    bad = (4, 5, 9, 15)
    for place in bad:
        lines[place - 1] = b"{"
    lines[6 - 1] = b""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
    pieces = sources.split_into_pieces(sources.find_files(str(path), "auto"))
    assert len(pieces) == -(-path.stat().st_size // piece_bytes)
    train = prepare(strict(models, path, tmp_path, on_bad_row="skip"))["train"]
    kept = [i for i in range(15) if i + 1 not in (*bad, 6)]
    assert texts(train, words) == [ROWS[i]["text"] for i in kept]
    assert [r.row for r in train.manifest.bad_row_examples] == list(bad)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["closed", "open"])
def test_pieces_of_any_size_hold_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes, last: bool
) -> None:
    lines = [b"x" * n for n in (1, 5, 0, 12, 3, 3, 40, 1, 7)]
    path = tmp_path / "a.txt"
    path.write_bytes(ending.join(lines) + (ending if last else b""))
    file = sources.find_files(str(path), "auto")
    wanted = [(i, line.decode()) for i, line in enumerate(lines, start=1) if line]
    for size in range(1, path.stat().st_size + 3):
        monkeypatch.setattr(sources, "PIECE_BYTES", size)
        found = []
        for piece in sources.split_into_pieces(file):
            before = readers.line_number_at(piece.file, piece.start) if piece.start else 0
            for item in readers.read_piece(piece, ["text"]):
                assert isinstance(item.row, dict)
                found.append((before + item.number, item.row["text"]))
        assert found == wanted, f"pieces of {size} bytes"


def test_row_groups_are_read_once_each_whatever_the_pieces(
    models: tiny.Tiny, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_parquet(tmp_path / "a.parquet", ROWS, group_rows=3)
    monkeypatch.setattr(sources, "PIECE_BYTES", 400)
    assert len(sources.split_into_pieces(sources.find_files(str(path), "auto"))) > 1
    train = prepare(tiny.job(models.bert, path, tmp_path))["train"]
    assert texts(train, words) == [row["text"] for row in ROWS]


def test_rows_are_read_from_shards_in_the_order_asked_for(
    models: tiny.Tiny, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    done = prepare(tiny.job(models.bert, path, tmp_path, data={"shard_rows": 7}))["train"]
    reader = open_shards(done.folder, done.manifest)
    asked = np.array([39, 0, 7, 6, 20, 7, 21])
    decoded = [
        words.decode(i, skip_special_tokens=True)
        for i in reader.take(asked)["input_ids"].to_pylist()
    ]
    assert decoded == [ROWS[i]["text"] for i in asked]
