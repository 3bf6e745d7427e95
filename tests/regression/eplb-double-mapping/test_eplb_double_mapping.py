"""Every routing function maps logical to physical experts once.

A router chooses logical experts; EPLB says where they lie. On CUDA,
_post_process_topk_ids maps the experts of all routing functions, and those that score
by sqrtsoftplus (DeepSeek-V4) mapped theirs before, too: after the first rebalance the
tokens go to wrong experts (https://github.com/sgl-project/sglang/pull/25285).
"""

import importlib
import unittest
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.eplb.expert_location_dispatch import (  # noqa: E402
    ExpertLocationDispatchInfo,
)
from sglang.srt.layers.moe import topk as topk_module  # noqa: E402
from sglang.srt.layers.moe.hash_topk import HashTopK  # noqa: E402
from sglang.srt.layers.moe.topk import TopKConfig, select_experts  # noqa: E402

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

NUM_TOKENS = 12
NUM_PADDED = 3
TOPK = 2
LAYER_ID = 3
SCORES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def gate(logits, bias, topk, scoring_func="sigmoid", **kwargs):
    """What the gates' kernels compute: weights (tokens, topk) fp32, ids int32."""
    scores = SCORES[scoring_func](logits.float())
    ids = (scores + bias).topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True), ids.int()


def gate_into(weights, ids, logits, renormalize, bias=0.0, scoring_func="sigmoid"):
    for out, result in zip((weights, ids), gate(logits, bias, TOPK, scoring_func)):
        out.copy_(result)


def fused_topk_deepseek(
    logits, bias, num_groups, topk_group, topk, scaling, weights, ids, renormalize
):
    gate_into(weights, ids, logits, renormalize, bias)


def mask_topk_ids(topk_ids, num_token_non_padded):
    topk_ids[num_token_non_padded:] = -1


def hash_topk(router_logits, input_ids, tid2eid, scoring_func, **kwargs):
    ids = tid2eid[input_ids]
    weights = SCORES[scoring_func](router_logits).gather(1, ids.long())
    return weights / weights.sum(dim=-1, keepdim=True), ids


def topk_softmax(weights, ids, logits, renormalize):
    gate_into(weights, ids, logits, renormalize, scoring_func="softmax")


def global_server_args(server_args):
    """As the process-wide arguments; since 0.5.15 they lie in a context."""
    if hasattr(server_args_module, "_global_server_args"):
        return patch.object(server_args_module, "_global_server_args", server_args)
    from sglang.srt.runtime_context import get_context

    return patch.object(get_context(), "_server_args", server_args)


def patch_kernel(module: str, name: str, kernel):
    """A kernel in place of the one that a routing function imports when it runs."""
    if find_spec(module) is None:
        return nullcontext()
    return patch.object(importlib.import_module(module), name, kernel, create=True)


def dispatch_info(num_experts: int, num_redundant: int, algorithm: str):
    """An expert location that leaves no expert in its place.

    Returns it, and physical_to_logical (num_experts + num_redundant,). Each of the
    first `num_redundant` experts has two places, of which this rank uses the later.
    """
    experts = torch.cat(
        [torch.arange(num_experts).roll(5), torch.arange(num_redundant)]
    )
    places = [(experts == e).nonzero().flatten().tolist() for e in range(num_experts)]
    to_all = torch.full((num_experts, len(experts)), -1)
    for expert, each in enumerate(places):
        to_all[expert, : len(each)] = torch.tensor(each)
    info = ExpertLocationDispatchInfo(
        ep_dispatch_algorithm=algorithm,
        partial_logical_to_rank_dispatch_physical_map=to_all.max(dim=1).values,
        partial_logical_to_all_physical_map=to_all,
        partial_logical_to_all_physical_map_num_valid=(to_all != -1).sum(dim=1),
        num_physical_experts=len(experts),
    )
    return info, experts


class Seen:
    """What the capturer of returned experts, and the recorder, are told."""

    def __init__(self):
        self.captured, self.recorded = [], []

    def capture(self, layer_id, topk_indices):
        self.captured.append(topk_indices.clone())

    def on_select_experts(self, topk_ids):
        self.recorded.append(topk_ids.clone())


class MappedOnce:
    """Tests of one routing function."""

    NUM_EXPERTS = 16
    CONFIG = {}
    is_cuda = True
    is_hip = False
    fused_topk_deepseek = None
    jit_kernel = True

    def setUp(self):
        super().setUp()
        self.seen = Seen()
        dsv4 = [f"sglang.jit_kernel.{name}" for name in ("deepseek_v4", "dsv4")]
        for context in (
            patch.object(topk_module, "_is_cuda", self.is_cuda),
            patch.object(topk_module, "_is_hip", self.is_hip),
            # Kernels.
            torch.compiler.set_stance("force_eager"),
            patch.object(
                topk_module,
                "fused_topk_deepseek",
                self.fused_topk_deepseek,
                create=True,
            ),
            patch.object(
                topk_module,
                "moe_fused_gate",
                lambda logits, bias, groups, topk_group, topk, *args: gate(
                    logits, bias, topk
                ),
                create=True,
            ),
            patch.object(topk_module, "kimi_k2_moe_fused_gate", gate, create=True),
            patch.object(topk_module, "topk_softmax", topk_softmax, create=True),
            patch.object(topk_module, "topk_sigmoid", gate_into, create=True),
            patch.object(topk_module, "mask_topk_ids", mask_topk_ids),
            # A kernel that fills the padded rows, since 0.5.15.
            patch.object(
                topk_module, "_can_fuse_padded_region", lambda x: False, create=True
            ),
            patch_kernel("sglang.jit_kernel.moe_fused_gate", "moe_fused_gate", gate),
            patch_kernel(
                "sglang.jit_kernel.grouped_topk",
                "grouped_topk",
                lambda logits, bias, groups, topk_group, topk, *args: gate(
                    logits, bias, topk
                ),
            ),
            *(patch_kernel(module, "hash_topk", hash_topk) for module in dsv4),
            envs.SGLANG_OPT_USE_JIT_KERNEL_FUSED_TOPK.override(self.jit_kernel),
            envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(self.jit_kernel),
            # The process-wide state.
            global_server_args(SimpleNamespace(enable_eplb=True)),
            patch.object(topk_module, "get_global_experts_capturer", lambda: self.seen),
            patch.object(
                topk_module,
                "get_global_expert_distribution_recorder",
                lambda: self.seen,
            ),
        ):
            context.__enter__()
            self.addCleanup(context.__exit__, None, None, None)
        generator = torch.Generator().manual_seed(0)
        # The experts that each token is to choose, (tokens, topk).
        self.chosen = torch.stack(
            [
                torch.randperm(self.NUM_EXPERTS, generator=generator)[:TOPK]
                for _ in range(NUM_TOKENS)
            ]
        )
        self.router_logits = torch.full((NUM_TOKENS, self.NUM_EXPERTS), -4.0)
        self.router_logits.scatter_(
            1, self.chosen, torch.tensor([[3.0, 4.0]] * NUM_TOKENS)
        )

    def select(self, num_token_non_padded=None, expert_location_dispatch_info=None):
        """The weights and the places of the selected experts, (tokens, topk) each."""
        output = select_experts(
            hidden_states=torch.zeros(NUM_TOKENS, 4),
            router_logits=self.router_logits,
            topk_config=TopKConfig(top_k=TOPK, **self.CONFIG),
            layer_id=LAYER_ID,
            num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=expert_location_dispatch_info,
        )
        return output.topk_weights, output.topk_ids

    def check(self, found: torch.Tensor, expected: torch.Tensor):
        found, expected = (x.sort(dim=-1).values.tolist() for x in (found, expected))
        self.assertEqual(found, expected, "the tokens go to other experts' places")

    def test_without_eplb(self):
        _, selected = self.select()
        self.check(selected, self.chosen)

    def test_moved_experts(self):
        info, _ = dispatch_info(self.NUM_EXPERTS, 0, "static")
        to_physical = info.partial_logical_to_rank_dispatch_physical_map
        _, selected = self.select(expert_location_dispatch_info=info)
        self.check(selected, to_physical[self.chosen])

    def test_redundant_experts(self):
        info, _ = dispatch_info(self.NUM_EXPERTS, self.NUM_EXPERTS // 2, "static")
        to_physical = info.partial_logical_to_rank_dispatch_physical_map
        _, selected = self.select(expert_location_dispatch_info=info)
        self.check(selected, to_physical[self.chosen])

    def test_redundant_experts_are_chosen_at_random(self):
        info, physical_to_logical = dispatch_info(
            self.NUM_EXPERTS, self.NUM_EXPERTS // 2, "dynamic"
        )
        _, selected = self.select(expert_location_dispatch_info=info)
        self.check(physical_to_logical[selected], self.chosen)

    def test_padding(self):
        info, _ = dispatch_info(self.NUM_EXPERTS, 0, "static")
        to_physical = info.partial_logical_to_rank_dispatch_physical_map
        num_tokens = NUM_TOKENS - NUM_PADDED
        weights, selected = self.select(torch.tensor(num_tokens), info)
        self.check(selected[:num_tokens], to_physical[self.chosen[:num_tokens]])
        # On AMD GPUs, since 0.5.13 it is the weights that say that a row is padding.
        padded = selected == -1
        if self.is_hip:
            padded |= weights == 0
        expected = [False] * num_tokens + [True] * NUM_PADDED
        self.assertEqual(padded.any(dim=1).tolist(), expected)
        self.assertEqual(padded.all(dim=1).tolist(), expected)

    def test_recorded_are_physical_experts(self):
        info, _ = dispatch_info(self.NUM_EXPERTS, 0, "static")
        self.select(expert_location_dispatch_info=info)
        (recorded,) = self.seen.recorded
        to_physical = info.partial_logical_to_rank_dispatch_physical_map
        self.check(recorded, to_physical[self.chosen])

    def test_captured_are_logical_experts(self):
        """What --enable-return-routed-experts hands out."""
        info, _ = dispatch_info(self.NUM_EXPERTS, 0, "static")
        self.select(expert_location_dispatch_info=info)
        (captured,) = self.seen.captured
        found, expected = (
            x.sort(dim=-1).values.tolist() for x in (captured, self.chosen)
        )
        self.assertEqual(found, expected, "the captured experts are not logical ones")


class TestSqrtsoftplusKernel(MappedOnce, CustomTestCase):
    """DeepSeek-V4's layers that score."""

    CONFIG = dict(
        scoring_func="sqrtsoftplus",
        correction_bias=torch.zeros(MappedOnce.NUM_EXPERTS),
    )


class TestSqrtsoftplusTorch(MappedOnce, CustomTestCase):
    CONFIG = TestSqrtsoftplusKernel.CONFIG
    jit_kernel = False


class TestSqrtsoftplusKernelHip(MappedOnce, CustomTestCase):
    """The same on AMD GPUs, whose other branch has to map them."""

    CONFIG = TestSqrtsoftplusKernel.CONFIG
    is_cuda = False
    is_hip = True


class TestSqrtsoftplusTorchHip(TestSqrtsoftplusKernelHip):
    jit_kernel = False


class TestSoftmax(MappedOnce, CustomTestCase):
    """Qwen3-MoE."""


class TestSoftmaxTorch(MappedOnce, CustomTestCase):
    jit_kernel = False


class TestSigmoid(MappedOnce, CustomTestCase):
    CONFIG = dict(
        scoring_func="sigmoid", correction_bias=torch.zeros(MappedOnce.NUM_EXPERTS)
    )


class TestGrouped(MappedOnce, CustomTestCase):
    """DeepSeek-V2."""

    CONFIG = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2)


class TestBiasedGroupedFlashinfer(MappedOnce, CustomTestCase):
    """DeepSeek-V3."""

    CONFIG = dict(
        use_grouped_topk=True,
        num_expert_group=4,
        topk_group=2,
        correction_bias=torch.zeros(MappedOnce.NUM_EXPERTS),
    )
    fused_topk_deepseek = staticmethod(fused_topk_deepseek)


class TestBiasedGroupedKernel(MappedOnce, CustomTestCase):
    CONFIG = TestBiasedGroupedFlashinfer.CONFIG


class TestBiasedOneGroup(MappedOnce, CustomTestCase):
    """GLM."""

    NUM_EXPERTS = 12
    CONFIG = dict(
        use_grouped_topk=True,
        num_expert_group=1,
        topk_group=1,
        correction_bias=torch.zeros(12),
    )


class TestBiasedGroupedTorch(MappedOnce, CustomTestCase):
    NUM_EXPERTS = 12
    CONFIG = TestBiasedOneGroup.CONFIG | dict(num_expert_group=2, topk_group=2)


class TestKimi(MappedOnce, CustomTestCase):
    NUM_EXPERTS = 384
    CONFIG = TestBiasedOneGroup.CONFIG | dict(correction_bias=torch.zeros(384))


class TestHash(MappedOnce, CustomTestCase):
    """DeepSeek-V4's layers that look the experts of a token id up."""

    # Neither is done there without dsv4-expert-distribution.
    test_recorded_are_physical_experts = None
    test_captured_are_logical_experts = None

    def select(self, num_token_non_padded=None, expert_location_dispatch_info=None):
        hash_topk = HashTopK(
            topk=TOPK,
            num_experts=self.NUM_EXPERTS,
            num_fused_shared_experts=0,
            vocab_size=NUM_TOKENS,
        )
        hash_topk.tid2eid.data.copy_(self.chosen)
        output = hash_topk(
            hidden_states=torch.zeros(NUM_TOKENS, 4),
            router_logits=self.router_logits,
            input_ids=torch.arange(NUM_TOKENS),
            num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=expert_location_dispatch_info,
        )
        return output.topk_weights, output.topk_ids


class TestHashTorch(TestHash):
    jit_kernel = False


if __name__ == "__main__":
    unittest.main()
