"""HashTopK's token-to-expert table has to be valid before a checkpoint is loaded.

DummyModelLoader fills floating-point tensors only. HashTopK.tid2eid is an int32
tensor that the MoE kernels use as expert indices, so without a checkpoint it must
not hold whatever the memory held before: that ends in an illegal memory access
during CUDA graph capture (https://github.com/sgl-project/sglang/issues/25767).
"""

import unittest
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.model_loader.weight_utils import (  # noqa: E402
    default_weight_loader,
    initialize_dummy_weights,
)
from sglang.srt.server_args import ServerArgs  # noqa: E402

HAS_HASH_TOPK = find_spec("sglang.srt.layers.moe.hash_topk") is not None
if HAS_HASH_TOPK:
    from sglang.srt.layers.moe.hash_topk import HashTopK

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


@contextmanager
def poisoned_memory():
    """Fill new memory with the largest integer of its type, NaN for floats.

    Fresh memory is often zero, and zero is a valid expert id: that hides the bug.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills_memory = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills_memory


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Model loaders build the layers under the model's own dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_hash_topk(vocab_size, columns, num_experts, num_fused_shared_experts=0):
    with poisoned_memory(), default_dtype(torch.bfloat16):
        return HashTopK(
            topk=columns + num_fused_shared_experts,
            num_experts=num_experts,
            num_fused_shared_experts=num_fused_shared_experts,
            vocab_size=vocab_size,
        )


class DummyMoE(nn.Module):
    """What a DeepSeek-V4 hash layer looks like to a weight loader."""

    def __init__(self, topk: nn.Module):
        super().__init__()
        self.topk = topk
        self.gate = nn.Linear(8, topk.num_experts, bias=False)


def global_server_args(server_args):
    """As the process-wide arguments; since 0.5.15 they lie in a context."""
    if hasattr(server_args_module, "_global_server_args"):
        return patch.object(server_args_module, "_global_server_args", server_args)
    from sglang.srt.runtime_context import get_context

    return patch.object(get_context(), "_server_args", server_args)


@unittest.skipUnless(HAS_HASH_TOPK, "this release has no HashTopK (DeepSeek-V4)")
class TestHashTopKDummyWeights(CustomTestCase):
    def setUp(self):
        super().setUp()
        for context in (
            global_server_args(ServerArgs(model_path="dummy")),
            # The fused kernel needs a GPU; the torch path indexes the same way.
            envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(False),
        ):
            context.__enter__()
            self.addCleanup(context.__exit__, None, None, None)

    def assert_valid_experts(self, ids: torch.Tensor, num_experts: int, what: str):
        if ids.numel() == 0:
            return
        low, high = ids.min().item(), ids.max().item()
        self.assertGreaterEqual(
            low, 0, f"{what}: expert id {low} is outside of [0, {num_experts})"
        )
        self.assertLess(
            high,
            num_experts,
            f"{what}: expert id {high} is outside of [0, {num_experts})",
        )

    def assert_default_table(self, topk: nn.Module, vocab_size, columns):
        table, experts = topk.tid2eid, topk.num_experts
        what = f"default tid2eid for {vocab_size=}, {columns=}"
        self.assertEqual(tuple(table.shape), (vocab_size, columns))
        self.assertEqual(table.dtype, torch.int32)
        self.assert_valid_experts(table, experts, what)
        expected = torch.tensor(
            [[(t + c) % experts for c in range(columns)] for t in range(vocab_size)],
            dtype=torch.int32,
        ).reshape(vocab_size, columns)
        wrong = (table != expected).nonzero()
        self.assertEqual(
            len(wrong),
            0,
            f"{what}: {len(wrong)} of {table.numel()} entries are not "
            f"(token id + column) % {experts}, first at {wrong[:1].tolist()}",
        )

    def test_default_table_is_exact(self):
        for vocab_size, columns, num_experts in (
            (1, 1, 1),
            (7, 2, 5),
            (64, 6, 64),
            (300, 6, 256),
            # More columns than experts wraps around within a row.
            (5, 8, 3),
            (6, 3, 1),
            # DeepSeek-V4-Flash: a token id does not fit into a 16-bit type.
            (129280, 6, 256),
        ):
            topk = build_hash_topk(vocab_size, columns, num_experts)
            self.assert_default_table(topk, vocab_size, columns)

    def test_default_table_leaves_out_fused_shared_experts(self):
        """A fused shared expert takes a place in topk, but no column of the table."""
        for vocab_size, columns, num_experts in ((7, 2, 5), (300, 6, 256)):
            topk = build_hash_topk(vocab_size, columns, num_experts, 1)
            self.assert_default_table(topk, vocab_size, columns)

    def test_table_without_columns_is_left_alone(self):
        topk = build_hash_topk(7, 0, 5, num_fused_shared_experts=1)
        self.assertEqual(tuple(topk.tid2eid.shape), (7, 0))
        self.assertEqual(topk.tid2eid.dtype, torch.int32)
        initialize_dummy_weights(topk)
        output = topk(
            hidden_states=torch.randn(7, 8),
            router_logits=torch.randn(7, 5),
            input_ids=torch.arange(7),
        )
        self.assertEqual(output.topk_ids.tolist(), [[5]] * 7)

    def test_table_is_built_on_the_default_device(self):
        with torch.device("meta"):
            topk = HashTopK(
                topk=3, num_experts=5, num_fused_shared_experts=0, vocab_size=7
            )
        self.assertEqual(topk.tid2eid.device.type, "meta")
        self.assertEqual(tuple(topk.tid2eid.shape), (7, 3))

    def test_dummy_loader_leaves_a_valid_table(self):
        for num_fused_shared_experts in (0, 1):
            moe = DummyMoE(build_hash_topk(300, 6, 256, num_fused_shared_experts))
            gate_before = moe.gate.weight.detach().clone()
            initialize_dummy_weights(moe)
            # The loader did its work: it filled what it fills.
            self.assertFalse(torch.equal(moe.gate.weight, gate_before))
            self.assert_valid_experts(
                moe.topk.tid2eid, 256, "tid2eid under dummy weights"
            )

    def test_forward_under_dummy_weights_selects_valid_experts(self):
        num_experts, columns = 16, 4
        for num_fused_shared_experts in (0, 1):
            topk = build_hash_topk(100, columns, num_experts, num_fused_shared_experts)
            initialize_dummy_weights(DummyMoE(topk))
            self.assert_valid_experts(
                topk.tid2eid, num_experts, "tid2eid under dummy weights"
            )
            input_ids = torch.arange(100)
            output = topk(
                hidden_states=torch.randn(100, 8),
                router_logits=torch.randn(100, num_experts),
                input_ids=input_ids,
            )
            self.assertEqual(
                tuple(output.topk_ids.shape),
                (100, columns + num_fused_shared_experts),
            )
            self.assert_valid_experts(
                output.topk_ids[:, :columns], num_experts, "selected by HashTopK"
            )
            # A token is not sent to one expert twice.
            for row in output.topk_ids[:, :columns].tolist():
                self.assertEqual(len(set(row)), columns)
            self.assert_valid_experts(
                output.topk_ids[:, columns:] - num_experts,
                num_fused_shared_experts,
                "shared expert selected by HashTopK",
            )
            self.assertTrue(torch.isfinite(output.topk_weights).all())

    def test_checkpoint_replaces_the_default(self):
        vocab_size, columns, num_experts = 50, 4, 16
        checkpoint = torch.randint(
            0,
            num_experts,
            (vocab_size, columns),
            generator=torch.Generator().manual_seed(0),
        )
        for dtype in (torch.int32, torch.int64):
            moe = DummyMoE(build_hash_topk(vocab_size, columns, num_experts))
            # How DeepseekV4ForCausalLM.load_weights finds and fills it.
            param = dict(moe.named_parameters())["topk.tid2eid"]
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, checkpoint.to(dtype))
            self.assertTrue(
                torch.equal(moe.topk.tid2eid, checkpoint.to(torch.int32)),
                "the checkpoint's own tid2eid did not survive loading",
            )
            self.assertEqual(moe.topk.tid2eid.dtype, torch.int32)
            self.assertFalse(moe.topk.tid2eid.requires_grad)

            input_ids = torch.arange(vocab_size).flip(0)
            output = moe.topk(
                hidden_states=torch.randn(vocab_size, 8),
                router_logits=torch.randn(vocab_size, num_experts),
                input_ids=input_ids,
            )
            self.assertEqual(output.topk_ids.tolist(), checkpoint[input_ids].tolist())

    def test_checkpoint_survives_a_state_dict_round_trip(self):
        saved = build_hash_topk(20, 3, 8)
        saved.tid2eid.data.copy_(torch.arange(60).reshape(20, 3).flip(0) % 8)
        loaded = build_hash_topk(20, 3, 8)
        loaded.load_state_dict(saved.state_dict())
        self.assertTrue(
            torch.equal(loaded.tid2eid, saved.tid2eid),
            "the checkpoint's own tid2eid did not survive loading",
        )


if __name__ == "__main__":
    unittest.main()
