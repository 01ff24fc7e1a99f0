"""Messages of a trial that ends before its last step."""

from __future__ import annotations


def divergence(step: int, loss: float, norm: float | None, lr: float) -> str:
    """Of a loss or gradient that is no number any more. `norm`: of the gradient, where it is known."""
    shown = f", gradient norm {norm:.3g}" if norm is not None else ""
    return (
        f"training diverged at step {step}: loss {loss:.4g}{shown}, learning rate {lr:.3g}. "
        "Lower optimizer.lr, lengthen schedule.warmup_steps or lower gradient_clipping."
    )


def how_to_resume(step: int, total_steps: int) -> str:
    """Of a run that was asked to stop."""
    return (
        f"stopped at step {step} of {total_steps} with a committed checkpoint; "
        "run the same command again to go on"
    )
