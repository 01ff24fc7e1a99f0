"""A pretrained head for labels: kept where it stands for the job's labels, else drawn anew."""

from __future__ import annotations

import re
from typing import Any, Literal

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import raw_config
from orchestrator.spec import JobSpec

LABELED = re.compile(r"For(Sequence|Token|Image|Audio)Classification$")
"""Ends of the names of model classes whose outputs stand for labels."""
UNNAMED = re.compile(r"LABEL_\d+$")
"""What `transformers` calls labels that nobody named."""


def fate_of_head(spec: JobSpec, labels: tuple[str, ...]) -> Literal["kept", "new"]:
    """Return whether the pretrained head's outputs mean what the job's labels mean.

    A head of another kind, as one for texts is for words, never does, though its weights may have the
    same name and shape. Labels without names are taken for the job's. Raises OrchestratorError where
    the names are the same in another order: training would start from outputs that mean something else.
    """
    if spec.model.pretrained is None:
        return "kept"
    config = raw_config(spec)
    if not spec.task.labeled_head:
        return "new" if spec.task.head_is_new(config) else "kept"
    kinds = {m[0] for name in config.get("architectures") or () if (m := LABELED.search(name))}
    if kinds and spec.task.auto_class.removeprefix("AutoModel") not in kinds:
        return "new"
    named = config.get("id2label") or {}
    theirs = [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]
    if not theirs or all(UNNAMED.match(name) for name in theirs):
        return "kept"
    ours = [name.casefold() for name in spec.task.config_overrides(labels)["id2label"].values()]
    pretrained = [name.casefold() for name in theirs]
    if pretrained == ours:
        return "kept"
    if sorted(pretrained) == sorted(ours):
        raise OrchestratorError(
            f"task.labels = {list(labels)}: the head of {spec.model.pretrained!r} has the same labels in "
            f"another order. Set task.labels=[{', '.join(theirs)}], in the spelling of the data, to keep it."
        )
    return "new"


def redraw_head(model: Any, seed: int) -> None:
    """Everything outside the model's body as `type(model)` draws it from `seed`, in place."""
    import torch

    torch.manual_seed(seed)
    drawn = dict(type(model)(model.config).named_parameters())
    body = f"{model.base_model_prefix}."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(body):
                parameter.copy_(drawn[name])
