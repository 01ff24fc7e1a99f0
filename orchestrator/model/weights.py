"""The weights a checkpoint holds, compared with those the model needs, by names and shapes alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of a checkpoint in one piece, in the order in which transformers looks for them; one in several pieces has
an index of the same name and the suffix `.index.json`."""


@dataclass(frozen=True)
class CheckpointFit:
    """Match of a checkpoint's weights with a model's."""

    new: frozenset[str] = frozenset()
    """Parameters of the model that the checkpoint lacks, or holds in another shape: drawn at random."""
    unused: tuple[str, ...] = ()
    """Weights of the checkpoint that the model has no place for."""


def checkpoint_fit(spec: JobSpec, config: Any, model_class: Any) -> CheckpointFit:
    """Compare the job's checkpoint with `model_class(config)` without reading a weight.

    transformers itself loads weights on the meta device, so that its renaming of keys, its merging of
    experts and its tying of weights apply. A checkpoint whose names are unknown here (a GGUF file, a hub id
    without network) is taken to fit.
    """
    names = None if spec.model.gguf_file else _stored_shapes(spec)
    if names is None:
        return CheckpointFit()
    import torch

    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    with quiet_transformers():
        _, info = model_class.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=renamed_body(model_class),
            dtype=torch.float32,
            device_map={"": "meta"},
        )
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return CheckpointFit(
        frozenset(info["missing_keys"]) | mismatched, tuple(sorted(info["unexpected_keys"]))
    )


def renamed_body(model_class: Any) -> dict[str, str] | None:
    """Return `from_pretrained`'s `key_mapping` for a head that calls its body by another name than its siblings.

    `Qwen3ForQuestionAnswering` and its kin hold a `transformer`, the checkpoints of language models a `model`:
    without the mapping nothing of the body would be loaded. None for all other classes.
    """
    own = getattr(model_class, "base_model_prefix", "")  # peft's wrappers have none
    family = next(
        (c for c in model_class.__mro__[1:] if c.__name__.endswith("PreTrainedModel")), model_class
    )
    theirs = getattr(family, "base_model_prefix", "")
    return {rf"^{theirs}\.": f"{own}."} if theirs and own and theirs != own else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bars, and restore them afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _stored_shapes(spec: JobSpec) -> dict[str, tuple[int, ...]] | None:
    """Shape of each weight of the job's checkpoint by its name there; None where they are unknown."""
    if spec.model.pretrained is None:
        return None
    folder = _local_folder(spec)
    if folder is not None:
        for name in WEIGHT_FILES:
            files = _pieces(folder, name)
            if files:
                return {k: s for file in files for k, s in _shapes_in(file)}
    return None if Path(spec.model.pretrained).is_dir() else _hub_shapes(spec)


def _local_folder(spec: JobSpec) -> Path | None:
    """The folder of the checkpoint on this machine: the job's own, or that of the hub's cache."""
    given = Path(spec.model.pretrained or "")
    if given.is_dir():
        return given
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(given), "config.json", revision=spec.model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _pieces(folder: Path, name: str) -> list[Path]:
    """The files of a checkpoint called `name`, or of its index; empty where one of them is missing."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    pieces = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [folder / piece for piece in pieces]
    return files if all(file.is_file() for file in files) else []


def _shapes_in(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no mapping
                yield name, tuple(stored.get_slice(name).get_shape())
        return
    import torch

    state: dict[str, torch.Tensor] = torch.load(file, map_location="meta", weights_only=True)
    for name, tensor in state.items():
        yield name, tuple(tensor.shape)


def _hub_shapes(spec: JobSpec) -> dict[str, tuple[int, ...]] | None:
    """From the headers of the hub's safetensors files, which are read without the weights behind them."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(spec.model.pretrained or "", revision=spec.model.revision)
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError):
        return None
    return {
        name: tuple(tensor.shape)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
