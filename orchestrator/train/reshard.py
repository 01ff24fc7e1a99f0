"""ZeRO shards of one number of workers, loaded by another.

Every rank maps all shards into memory and copies what it needs, so it reads no more than its part of
them, one parameter at a time, and nothing is written. Layouts are those of DeepSpeed 0.19: its own
universal format serves Adam only.

See docs/decisions/0021-zero-shards-are-resharded-on-load-without-the-universal-format.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.train.engine import TAG
from orchestrator.train.tensors import load_tensors

FP32 = "fp32"
"""Names a parameter's master weights beside its optimizer states."""
Group = dict[str, Any]
"""One flat group of one rank's shard: master weights and optimizer states, by name."""


@dataclass(frozen=True)
class Piece:
    """Where some of a parameter's elements lie, in flat order."""

    group: Group
    start: int
    numel: int


def load_resharded(engine: Any, folder: Path, stage: int, world_size: int) -> None:
    """Restore model and optimizer from the shards of `world_size` other ranks. Collective.

    Learning rate, weight decay and the like stay as the engine was opened with. `stage`: 1, 2 or 3.
    """
    model, pieces = _read_pieces(folder, stage, world_size)
    if stage == 3:
        _fill_partitions(engine.optimizer, pieces)
    else:
        _fill_fragments(engine.optimizer, pieces)
    for name, buffer in engine.module.named_buffers():
        if name in model["module"]:
            buffer.copy_(model["module"][name])
    engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]


def read_weights(folder: Path, stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return the fp32 master weights and the buffers by name, whole, from the shards of all ranks.

    Frozen weights are not among them: checkpoints do not hold any.

    Args:
        folder: a checkpoint.
        stage: ZeRO stage of its shards: 1, 2 or 3.
        world_size: number of ranks that wrote them.
    """
    model, pieces = _read_pieces(folder, stage, world_size)
    buffers = {n: t for n, t in model["module"].items() if n in set(model["buffer_names"])}
    found = {n: t.float() if t.is_floating_point() else t for n, t in buffers.items()}
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            parts = [p.group[FP32].narrow(0, p.start, p.numel) for p in pieces[name]]
            found[name] = torch.cat(parts).view(shape)
    for alias, name in (model["shared_params"] or {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _read_pieces(
    folder: Path, stage: int, world_size: int
) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
    """Return (rank 0's file of the model, where each parameter's elements lie in the ranks' shards)."""
    shards = [
        _read(folder, f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt") for r in range(world_size)
    ]
    model = _read(folder, "*mp_rank_00_model_states.pt")
    if stage == 3:
        return model, _pieces_by_shape(shards, model["param_shapes"])
    return model, _pieces_by_mapping(shards)


def _read(folder: Path, pattern: str) -> Any:
    path = min((folder / TAG).glob(pattern))
    return load_tensors(path, mmap=True)


def _groups(flats: list[torch.Tensor], states: dict[int, Group]) -> list[Group]:
    return [{**states.get(i, {}), FP32: flat} for i, flat in enumerate(flats)]


def _pieces_by_mapping(shards: list[Any]) -> dict[str, list[Piece]]:
    """Stages 1 and 2: a rank holds a stretch of each group, and says which parameters lie where."""
    pieces: dict[str, list[Piece]] = {}
    for shard in (s["optimizer_state_dict"] for s in shards):
        states = shard["base_optimizer_state"]["state"]
        groups = _groups(shard["single_partition_of_fp32_groups"], states)
        for group, mapping in zip(groups, shard["param_slice_mappings"], strict=True):
            for name, address in mapping.items():
                pieces.setdefault(name, []).append(Piece(group, address.start, address.numel))
    return pieces


def _pieces_by_shape(shards: list[Any], shapes: list[dict[str, Any]]) -> dict[str, list[Piece]]:
    """Stage 3: each parameter is cut into equal parts, one a rank; the last ones may be padding."""
    pieces: dict[str, list[Piece]] = {}
    for rank, shard in enumerate(s["optimizer_state_dict"] for s in shards):
        groups = _groups(shard["fp32_flat_groups"], shard["optimizer_state_dict"]["state"])
        for group, named in zip(groups, shapes, strict=True):
            start = 0
            for name, shape in named.items():
                part = -(-shape.numel() // len(shards))
                real = min(part, max(0, shape.numel() - rank * part))
                pieces.setdefault(name, []).append(Piece(group, start, real))
                start += part
    return pieces


def _fill_fragments(optimizer: Any, pieces: dict[str, list[Piece]]) -> None:
    """Stages 1 and 2: this rank's stretch of each group, then all weights from all ranks."""
    for flat, parameters in zip(
        optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
    ):
        filler = _Filler(optimizer.optimizer, flat)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else this rank has no element of it
                filler.copy(
                    pieces[optimizer.param_names[parameter]],
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment_address.start,
                    mapping.hp_fragment_address.numel,
                )
    optimizer.update_lp_params()


def _fill_partitions(optimizer: Any, pieces: dict[str, list[Piece]]) -> None:
    """Stage 3: this rank's part of each parameter, in its group's order."""
    optimizer.checkpoint_event_prologue()
    for index, parameters in enumerate(optimizer.fp16_groups):
        filler = _Filler(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat[index])
        end = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            first = min(dist.get_rank() * part, parameter.ds_numel)
            real = min(part, parameter.ds_numel - first)
            filler.copy(pieces[optimizer.param_names[parameter]], first, end, real)
            end += part
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


class _Filler:
    """Fills one flat group of the live engine: master weights and optimizer states."""

    def __init__(self, optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> None:
        self.optimizer, self.flat = optimizer, flat

    def copy(self, pieces: list[Piece], first: int, to: int, numel: int) -> None:
        """Copy `numel` of a parameter's elements, from its `first` on, to the group's from `to` on."""
        live = self.optimizer.state[self.flat]
        for name, value in pieces[0].group.items():
            if name == FP32:
                self._fill(self.flat.data, name, pieces, first, to, numel)
            elif torch.is_tensor(value) and value.dim():
                if name not in live:
                    live[name] = torch.zeros_like(self.flat)
                self._fill(live[name], name, pieces, first, to, numel)
            else:  # a count of steps: each group needs its own, some optimizers count in place
                live[name] = value.clone() if torch.is_tensor(value) else value

    def _fill(
        self,
        target: torch.Tensor,
        name: str,
        pieces: list[Piece],
        first: int,
        to: int,
        numel: int,
    ) -> None:
        begin = 0
        for piece in pieces:
            low, high = max(first, begin), min(first + numel, begin + piece.numel)
            if low < high:
                source = piece.group[name].narrow(0, piece.start + low - begin, high - low)
                target.narrow(0, to + low - first, high - low).copy_(source)
            begin += piece.numel
