"""Several documents in one sequence, so that little or nothing is padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.tasks.base import EncodedRow
from orchestrator.tasks.batches import pad

if TYPE_CHECKING:
    import numpy as np
    import torch

Packing = bool | Literal["mask"]
"""How the documents of a row are kept apart: by positions that begin again (true), by a mask of blocks as well, or not
at all (false): a row is one document."""


def row_inputs(
    rows: Sequence[Mapping[str, np.ndarray]], pad_id: int, packing: Packing
) -> dict[str, torch.Tensor]:
    """`input_ids` of rows, and what tells their documents apart, all (rows, longest row).

    Rows of one document have an `attention_mask`. Others have `position_ids`, which begin at 0 in every
    document, and `documents`, their numbers, where `packing` is a mask. Padding is one more document.
    """
    import numpy as np
    import torch

    ids = [row["input_ids"] for row in rows]
    out = {"input_ids": pad(ids, pad_id)}
    if not packing:
        return {**out, "attention_mask": pad([np.ones(len(one), dtype=np.int64) for one in ids], 0)}
    longest = out["input_ids"].shape[1]
    lengths = [
        [*row["doc_lengths"], longest - len(one)] for row, one in zip(rows, ids, strict=True)
    ]
    positions = [np.concatenate([np.arange(n) for n in one]) for one in lengths]
    out["position_ids"] = torch.from_numpy(np.stack(positions))
    if packing == "mask":
        numbers = [np.repeat(np.arange(len(one)), one) for one in lengths]
        out["documents"] = torch.from_numpy(np.stack(numbers))
    return out


def model_inputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `model` for a batch of `row_inputs`.

    Masks of blocks are (rows, 1, longest, longest), in the precision of the model: 0 where a token attends, the
    most negative number elsewhere. Models with layers of several kinds get one mask for each kind.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "position_ids" not in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    if "documents" not in batch:
        return {**inputs, "position_ids": batch["position_ids"]}
    plain = _plain(model)
    if "position_ids" in inspect.signature(type(plain).forward).parameters:
        inputs["position_ids"] = batch["position_ids"]
    dtype = next(p.dtype for p in plain.parameters() if p.is_floating_point())
    masks = block_masks(plain.config.get_text_config(), batch["documents"], dtype)
    return {**inputs, "attention_mask": masks}


def _plain(model: Any) -> Any:
    """The model inside an engine and an adapter."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def block_masks(config: Any, documents: torch.Tensor, dtype: torch.dtype) -> Any:
    """A mask for documents (rows, longest), or one by kind of layer where the config names kinds."""
    import torch

    place = torch.arange(documents.shape[1], device=documents.device)
    distance = place[:, None] - place[None, :]
    inside = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    window = getattr(config, "sliding_window", None)
    windowed = inside & (distance < window) if window else inside
    kinds = set(getattr(config, "layer_types", None) or ())

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)

    if not kinds - {"full_attention"}:
        return additive(inside if kinds else windowed)
    return {kind: additive(windowed if "sliding" in kind else inside) for kind in kinds}


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


def cut_long(rows: Sequence[EncodedRow], max_length: int) -> list[EncodedRow]:
    """Return the rows' documents, one a row, in pieces of `max_length` tokens where they are longer."""
    return [
        document(ids[start : start + max_length], targets[start : start + max_length])
        for ids, targets in _documents(rows)
        for start in range(0, len(ids), max_length)
    ]


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
