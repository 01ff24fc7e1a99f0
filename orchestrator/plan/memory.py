"""Bytes per worker, by component. Pure arithmetic.

Model states follow Rajbhandari et al. (arXiv 1910.02054, table 1) as DeepSpeed 0.19 allocates them;
activations follow Korthikanti et al. (arXiv 2205.05198, eq. 2) per layer.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.values import Frozen

Stage = Literal[0, 1, 2, 3]
"""ZeRO: what is sharded."""
RUNTIME_BYTES = 900 * 2**20
"""A worker process with torch, transformers, DeepSpeed and Ray before any model: measured on CPU."""
GPU_RUNTIME_BYTES = 1536 * 2**20
"""CUDA context, NCCL buffers and allocator slack on a GPU: an allowance, not a measurement."""


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits, with double quantization: an 8-bit scale for each 64, an fp32 one for each 256 of
those (Dettmers et al., arXiv 2305.14314, section 3)."""


class ModelStats(Frozen):
    """Sizes of a model for memory arithmetic. Counts are elements, not bytes."""

    model_type: str
    parameters: int
    trainable: int
    hidden_matrices: int = 0
    """Of `trainable`, those in matrices inside the body: no embeddings, no head, no vectors."""
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    eager_attention: bool
    values_per_token: int = 0
    """Kept per token before the layers: by convolutions over a waveform."""
    image_tokens: int = 0
    """Patches of an image, which rows of images are as long as."""
    kept_values: int = 0
    """Of a row of fixed size, kept for the backward pass, as counted in a forward pass; 0 where it was not."""
    decoder_layers: int = 0
    """Of a model that also has an encoder, whose layers `layers` then counts."""
    adapted_modules: tuple[str, ...] = ()
    """Last parts of the names of the modules that have adapters."""
    quantized: int = 0
    """Of `parameters`, those held in 4 bits."""
    hidden_pairs: tuple[tuple[int, int], ...] = ()
    """(layer, teacher's layer), from 1, whose outputs are compared, through a projection each."""
    teacher_hidden_size: int = 0

    @property
    def frozen(self) -> int:
        return self.parameters - self.trainable

    @property
    def projection(self) -> int:
        """Trained along to compare hidden states with a teacher's; no part of the model, and not exported."""
        return len(self.hidden_pairs) * (self.hidden_size + 1) * self.teacher_hidden_size

    @property
    def moving(self) -> int:
        """Return the elements that the optimizer steps."""
        return self.trainable + self.projection

    @property
    def deepest(self) -> int:
        """Return the number of layers of the encoder or of the decoder, whichever has more."""
        return max(self.layers, self.decoder_layers)


class MemorySetup(Frozen):
    """Precision and sharding with which the model is held."""

    world_size: int
    stage: Stage
    bf16: bool
    optimizer_states: float
    """fp32 values the optimizer keeps per trained element, a mean over all: 2 for Adam, 1 for momentum, 1 more
    for an average of the weights."""
    averages: bool = False
    """Checkpoints hold the averaged weights in one piece too."""
    offload_optimizer: bool
    offload_param: bool
    bucket_elements: int
    gradient_checkpointing: bool
    on_gpu: bool
    all_logits: bool
    """The head predicts at every position (language models), not once per row."""
    distils: bool = False
    """Predictions are softened and compared with a teacher's, beside the task's own loss."""


def memory_bytes(
    model: ModelStats,
    setup: MemorySetup,
    micro_batch_size: int,
    tokens_per_row: int,
    target_tokens_per_row: int = 0,
) -> dict[str, int]:
    """Peak bytes per worker by component, of device memory (host memory where there is no GPU).

    `target_tokens_per_row`: what a decoder reads beside an encoder's `tokens_per_row`.
    """
    counts = (micro_batch_size, tokens_per_row, target_tokens_per_row)
    word = 2 if setup.bf16 else 4
    share = setup.world_size
    shards_params, shards_grads = setup.stage == 3, setup.stage >= 2
    shards_optimizer = setup.stage >= 1
    states = {
        "parameters": word
        * (model.parameters + model.projection - model.quantized)
        // (share if shards_params else 1)
        + int(NF4_BYTES * model.quantized),
        "gradients": word * model.moving // (share if shards_grads else 1),
        "master weights": 4 * model.moving // (share if shards_optimizer else 1)
        if shards_optimizer or setup.bf16
        else 0,
        "optimizer": 4
        * round(setup.optimizer_states * model.moving)
        // (share if shards_optimizer else 1),
    }
    if setup.on_gpu and setup.offload_optimizer:
        states["master weights"] = states["optimizer"] = 0
    if setup.on_gpu and setup.offload_param:
        states["parameters"] = 0
    buckets = 2 * word * min(setup.bucket_elements, model.moving) if shards_optimizer else 0
    return {
        **states,
        "buckets": buckets,
        "activations": activation_bytes(model, setup, *counts),
        "logits": _logit_bytes(model, setup, *counts),
        "runtime": GPU_RUNTIME_BYTES if setup.on_gpu else RUNTIME_BYTES,
    }


def activation_bytes(
    model: ModelStats,
    setup: MemorySetup,
    micro_batch_size: int,
    tokens_per_row: int,
    target_tokens_per_row: int = 0,
) -> int:
    """Activations kept for the backward pass.

    Per layer and token: 34 hidden-sized half-precision values with a 4× wide MLP, of which the MLP
    accounts for 19; eager attention adds 5 × heads × tokens. A decoder's layers also attend to the
    encoder, by the same count: 9 more values per target token (input, queries, context, norm, dropout
    mask), 4 per source token (keys, values). fp32 doubles all of it. Where a forward pass was counted
    (`kept_values`), that counts instead.
    """
    scale = 1 if setup.bf16 else 2
    if model.kept_values and not setup.gradient_checkpointing:
        return 2 * scale * micro_batch_size * model.kept_values
    tokens, targets = (
        scale * micro_batch_size * tokens_per_row,
        scale * micro_batch_size * target_tokens_per_row,
    )
    hidden, eager = model.hidden_size, 5 * model.heads if model.eager_attention else 0
    per_token = hidden * (15 + 19 * model.intermediate_size / max(4 * hidden, 1))
    encoder = int(tokens * (per_token + eager * tokens_per_row))
    across = targets * (9 * hidden + eager * tokens_per_row) + tokens * 4 * hidden
    decoder = int(targets * (per_token + eager * target_tokens_per_row) + across)
    before = 2 * tokens * model.values_per_token
    if setup.gradient_checkpointing:
        kept = 2 * hidden * (model.layers * tokens + model.decoder_layers * targets)
        return max(encoder, decoder if model.decoder_layers else 0) + kept + before
    return model.layers * encoder + model.decoder_layers * decoder + before


def _logit_bytes(
    model: ModelStats,
    setup: MemorySetup,
    micro_batch_size: int,
    tokens_per_row: int,
    target_tokens_per_row: int,
) -> int:
    """Logits, their fp32 copy and their gradient, where every position predicts; as much again, softened, for
    a teacher's loss."""
    if not setup.all_logits:
        return 0
    predicting = target_tokens_per_row if model.decoder_layers else tokens_per_row
    copies = 6 if setup.distils else 3
    return copies * 4 * micro_batch_size * predicting * model.vocab_size


def checkpoint_bytes(model: ModelStats, setup: MemorySetup) -> int:
    """One checkpoint on disk, all ranks together; frozen weights are not in it."""
    word = 2 if setup.bf16 else 4
    master = 4 if setup.stage >= 1 or setup.bf16 else 0
    whole = word if setup.averages else 0
    scales = int((NF4_BYTES - 0.5) * model.quantized)  # DeepSpeed does not know them for frozen
    states = round(setup.optimizer_states * model.moving)
    return model.moving * (word + master + whole) + 4 * states + scales
