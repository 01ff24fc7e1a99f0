"""Norms that would mix rows, or rows with padding, made to keep them apart."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    import torch


def hold_statistics(model: torch.nn.Module, spec: JobSpec) -> None:
    """Make every batch norm of `model` use its running statistics in training too, in place.

    Scale and shift are trained as before. With statistics of the batch a row's result would depend on
    its neighbors, the micro-batch and the number of workers.

    Raises:
        OrchestratorError: the weights are new, so that there are no statistics to hold, and the job does
            not ask for it; or a layer keeps no running statistics.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise OrchestratorError(
                f"model: {model_type} has a batch norm without running statistics ({name}), so a row's result "
                "would depend on the rows beside it. Choose another model."
            )
    if spec.model.pretrained is None and spec.model.batch_norm == "auto":
        raise OrchestratorError(
            f"model: {model_type} has batch norm, and new weights have no statistics to normalize with. Start "
            "from a pretrained model (model.pretrained), or set model.batch_norm=frozen to train with mean 0 "
            "and variance 1."
        )
    for layer in layers.values():
        kind: Any = type(layer)
        layer.__class__ = _held(kind)
        layer.train(False)


@cache
def _held(kind: Any) -> Any:
    """Return a subclass of a batch norm that stays in evaluation mode."""

    def train(self: Any, mode: bool = True) -> Any:
        return kind.train(self, False)

    return type(kind.__name__, (kind,), {"train": train, "__module__": kind.__module__})


def norm_real_frames(model: torch.nn.Module) -> None:
    """Make the group norm over time of speech models (`feat_extract_norm: group`) leave padding out, in place.

    Its statistics are taken over a whole row, so the padding of a batch would change results. With this a row
    is computed in a batch as it is alone, without padding. Other models are left as they are.
    """
    from torch import nn

    if getattr(getattr(model, "config", None), "feat_extract_norm", "") != "group":
        return
    layers = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _over_real_frames(kind)
    if layers:
        model.register_forward_pre_hook(_note_frames, with_kwargs=True)


def _note_frames(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell the group norms how many frames of each row are real, after the first convolution."""
    mask, config = kwargs.get("attention_mask"), model.config
    frames = None
    if mask is not None:
        samples = mask.sum(-1)
        frames = (samples - config.conv_kernel[0]) // config.conv_stride[0] + 1
    for module in model.modules():
        if hasattr(type(module), "over_real_frames"):
            module.frames = frames


@cache
def _over_real_frames(kind: Any) -> Any:
    """Return a subclass of a group norm whose statistics leave padding out."""
    import torch

    def forward(self: Any, values: torch.Tensor) -> torch.Tensor:
        frames = self.__dict__.get("frames")
        rows, features, time = values.shape
        if frames is None or bool((frames >= time).all()):
            return kind.forward(self, values)
        real = (torch.arange(time, device=values.device) < frames[:, None]).view(rows, 1, 1, time)
        grouped = values.float().view(rows, self.num_groups, -1, time)
        count = real.sum(-1, keepdim=True) * grouped.shape[2]
        mean = (grouped * real).sum((2, 3), keepdim=True) / count
        variance = (((grouped - mean) * real) ** 2).sum((2, 3), keepdim=True) / count
        normed = ((grouped - mean) * (variance + self.eps).rsqrt()).view(rows, features, time)
        scaled: torch.Tensor = normed * self.weight[:, None] + self.bias[:, None]
        return scaled.to(values.dtype)

    members = {"forward": forward, "over_real_frames": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
