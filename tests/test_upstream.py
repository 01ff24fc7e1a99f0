"""Guards of the patches of Ray's and DeepSpeed's internals: each fails when the upstream code changes.

Tested with ray 2.60.0, deepspeed 0.19.8 and torch 2.13.0.
"""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import ray
import ray._private.node
import ray._private.services
import ray._private.worker

engine = pytest.importorskip("deepspeed.runtime.engine")


def test_ray_prints_lost_nodes_through_the_function_that_the_session_replaces() -> None:
    worker = ray._private.worker
    assert list(inspect.signature(worker.print_to_stdstream).parameters) == [
        "data",
        "ignore_prefix",
    ]
    assert "functools.partial(print_to_stdstream, ignore_prefix=" in inspect.getsource(worker)


def test_ray_looks_up_what_the_local_start_replaces_at_each_call() -> None:
    node = inspect.getsource(ray._private.node)
    assert "ray._private.services.get_node(" in node
    assert "ray._private.parameter.RayParams(" in inspect.getsource(ray.init)
    names = list(inspect.signature(ray._private.services.get_node).parameters)
    assert names == ["gcs_address", "node_id"]


def test_deepspeed_builds_the_shared_memory_op_only_where_it_is_listed() -> None:
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute, it is torch

    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(backend)


def test_deepspeed_reads_and_writes_checkpoints_through_the_methods_that_are_replaced() -> None:
    source = inspect.getsource(engine.DeepSpeedEngine)
    assert "self._get_all_ckpt_names(load_dir, tag)" in source
    assert "checkpoint_engine=self.checkpoint_engine" in source
    assert "self.checkpoint_engine.load(" in source
    assert "self.checkpoint_engine.save(" in source
    assert "torch.save" not in source, "a file would be written past the replaced method"
    finder = inspect.signature(engine.DeepSpeedEngine._get_all_ckpt_names)
    assert list(finder.parameters) == ["self", "checkpoints_path", "tag"]
    assert hasattr(engine.DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict")


def test_zero_3_replaces_torch_s_linear_which_closing_puts_back() -> None:
    from deepspeed.runtime.zero import partition_parameters, stage3

    assert "torch.nn.functional.linear = zero3_linear_wrap" in inspect.getsource(
        partition_parameters
    )
    optimizer = stage3.DeepSpeedZeroOptimizer_Stage3
    for name in (
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
    ):
        assert callable(getattr(optimizer, name))


def test_zero_1_and_2_copy_their_master_weights_with_one_method() -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    assert callable(stage_1_and_2.DeepSpeedZeroOptimizer.update_lp_params)


def test_numpy_s_random_state_is_built_by_the_function_that_is_allowed() -> None:
    state = np.random.get_state()[1]
    assert state.__reduce__()[0] is np._core.multiarray._reconstruct
