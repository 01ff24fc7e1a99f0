"""Sources of rows, and their order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.spec.paths import PathText
from orchestrator.values import Frozen

FILES = Affects(Effect.ROWS, Effect.CHECKPOINT, Effect.TRAINING, names_content=True)


class OrderSpec(Frozen):
    """The order of rows: a pure function of data, seed, epoch and global batch, never of workers."""

    shuffle: Literal["full", "windows", "none"] = "full"
    """`full`: one permutation of all rows per epoch. `windows`: shuffles shards, then rows within a
    window, so that reads stay local on data larger than memory. `none`: the order of the files."""
    window_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Rows per shuffle window under `windows`."""
    group_by_length: bool | Literal["auto"] = "auto"
    """Form batches of similar length inside pools of 50 global batches: less padding. `auto`: on,
    unless rows are packed to one length."""


class DataSpec(Frozen):
    """Input files. Paths, globs, lists of them, or any URL that pyarrow's or fsspec's file systems read.

    `~` is the home folder. A file of exactly the given name wins over a glob; globs skip hidden files.
    """

    train: Annotated[PathText | tuple[PathText, ...], FILES]
    """Training rows."""
    eval: Annotated[PathText | tuple[PathText, ...] | None, FILES] = None
    """Evaluation rows. At most one of `eval` and `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the training rows, chosen by a hash of `seed` and row number."""
    format: Literal["auto", "parquet", "jsonl", "csv", "text"] = "auto"
    """`auto` goes by the file name's ending. Blank lines of text, JSONL and CSV separate; they are no rows.
    `jsonl` also reads one JSON array of objects, and an object with the rows in a list (`{"data": […]}`)."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character between the fields of CSV files. Default: a tab for names ending in `.tsv`, else a comma."""
    parse_special_tokens: bool = False
    """Read the name of a control token inside a text (`[SEP]`, `<mask>`, `<extra_id_0>`) as that token. Default:
    as ordinary text; a language model's documents and chats always hold control tokens."""
    max_length_tokens: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Longest row in tokens. `auto`: the model's own limit, at most 512."""
    truncation: Literal["truncate", "error"] = "truncate"
    """Treatment of longer rows; truncations are counted in the manifest."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` names file and row and stops; `skip` counts them in the manifest and lists
    them all in `bad_rows.jsonl` beside it."""
    order: OrderSpec = OrderSpec()
    """Order of training rows."""
    shard_rows: Annotated[int, Field(ge=1)] = 65_536
    """Most rows per Arrow shard."""
    prepared_dir: Annotated[PathText, Affects()] = "prepared"
    """Folder of prepared shards, one folder per fingerprint; shared by all runs. Not a URL."""
