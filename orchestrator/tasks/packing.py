"""Several documents in one sequence, so that little or nothing is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.tasks.base import EncodedRow


def document(ids: list[int], targets: list[int]) -> EncodedRow:
    """One document. Its first token has nothing before it to be predicted from."""
    targets = [0, *targets[1:]]
    return {
        "input_ids": ids,
        "is_target": targets,
        "doc_lengths": [len(ids)],
        "n_targets": sum(targets),
        "truncated": 0,
    }


def pack_stream(
    rows: Sequence[EncodedRow], max_length: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Fill each sequence to the last token, splitting documents; the unfilled rest is kept back."""
    out: list[EncodedRow] = []
    held: list[EncodedRow] = []
    room = max_length
    for ids, targets in _documents(rows):
        while ids:
            piece = document(ids[:room], targets[:room])
            held.append(piece)
            room -= len(piece["input_ids"])
            ids, targets = ids[len(piece["input_ids"]) :], targets[len(piece["input_ids"]) :]
            if room == 0:
                out.append(_join(held))
                held, room = [], max_length
    return out, [_join(held)] if held else []


def pack_whole(rows: Sequence[EncodedRow], max_length: int) -> list[EncodedRow]:
    """First-fit decreasing over a batch of rows: an answer is never cut from its prompt."""
    bins: list[list[EncodedRow]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        length = len(row["input_ids"])
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([row])
            room.append(max_length - length)
        else:
            bins[place].append(row)
            room[place] -= length
    return [_join(b) for b in bins]


def _documents(rows: Sequence[EncodedRow]) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, targets) of each document; rows that were kept back hold several."""
    for row in rows:
        stop = 0
        for length in row["doc_lengths"]:
            start, stop = stop, stop + length
            yield row["input_ids"][start:stop], row["is_target"][start:stop]


def _join(rows: Sequence[EncodedRow]) -> EncodedRow:
    joined = {
        name: [v for row in rows for v in row[name]]
        for name in ("input_ids", "is_target", "doc_lengths")
    }
    return {
        **joined,
        "n_targets": sum(joined["is_target"]),
        "truncated": sum(row["truncated"] for row in rows),
    }
