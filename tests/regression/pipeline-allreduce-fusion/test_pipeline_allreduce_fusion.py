"""What a pipeline stage sends is complete, with the fused all-reduce as well.

With it, a layer leaves the all-reduce of its MLP or MoE to the next layer's norm. The next
layer may be in another pipeline stage, which is sent tensors and no word about a sum that
they lack (https://github.com/sgl-project/sglang/issues/27744, repaired for Qwen's MoE
models by https://github.com/sgl-project/sglang/pull/28619).

All ranks run in one process, on the CPU: the real models, decoder layers, MLP and MoE
blocks, communicator and norms. Each tensor parallel rank is a thread with weights of its
own, and a process group sums what its threads have. Stubs stand for the attention, the
experts' kernels and FlashInfer's, and for what makes it available: a GPU.
"""

import os
import threading
import unittest
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.distributed import parallel_state
from sglang.srt.layers import communicator, dp_attention, flashinfer_comm_fusion
from sglang.srt.model_executor.forward_batch_info import ForwardMode, PPProxyTensors
from sglang.srt.models import deepseek_v2, gpt_oss, qwen2_moe, qwen3_moe
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

HIDDEN_SIZE = 16
VOCAB_SIZE = 32
MAX_FUSED_TOKENS = 2048

THREAD = threading.local()


class ThreadGroup:
    """A process group whose ranks are threads of this process."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.parts = [None] * world_size

    @property
    def rank_in_group(self):
        return THREAD.rank % self.world_size

    def all_reduce(self, tensor):
        if self.world_size == 1:
            return tensor
        self.parts[self.rank_in_group] = tensor
        self.barrier.wait()
        total = sum(self.parts)
        self.barrier.wait()
        return total


def fused_allreduce_norm(
    input_tensor, residual, weight, eps, use_attn_tp_group, **kwargs
):
    """What FlashInfer's kernel does, in the group that it does it in."""
    if use_attn_tp_group:
        group = parallel_state.get_attn_tp_group()
    elif parallel_state.get_moe_ep_group().world_size > 1:
        group = parallel_state.get_moe_ep_group()
    else:
        group = parallel_state.get_moe_tp_group()
    residual = group.all_reduce(input_tensor) + residual
    variance = residual.pow(2).mean(-1, keepdim=True)
    return residual * torch.rsqrt(variance + eps) * weight, residual


class StubEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, **kwargs):
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, input_ids):
        columns = torch.arange(1.0, self.embedding_dim + 1)
        return torch.sin(input_ids.unsqueeze(1) * columns)


class PartialSum(nn.Module):
    """What a rank has of a sum: its own weight's product."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN_SIZE, HIDDEN_SIZE))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states @ self.weight


class StubAttention(PartialSum):
    prepare_qkv_latent = None
    next_skip_topk = False

    def forward(self, positions=None, hidden_states=None, **kwargs):
        return super().forward(hidden_states)


class StubExperts(PartialSum):
    should_fuse_routed_scaling_factor_in_topk = False
    quant_method = None
    moe_runner_config = SimpleNamespace(inplace=True)


class StubGate(nn.Module):
    e_score_correction_bias = None

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, *args, **kwargs):
        return None


MOE_STUBS = {
    "get_moe_impl_class": lambda quant_config: StubExperts,
    "TopK": StubGate,
}
STUBS = [
    (deepseek_v2, {"DeepseekV2AttentionMLA": StubAttention, "MoEGate": StubGate}),
    (deepseek_v2, MOE_STUBS | {"VocabParallelEmbedding": StubEmbedding}),
    (gpt_oss, {"GptOssAttention": StubAttention}),
    (gpt_oss, MOE_STUBS | {"VocabParallelEmbedding": StubEmbedding}),
    (qwen3_moe, {"Qwen3MoeAttention": StubAttention} | MOE_STUBS),
    (qwen2_moe, {"VocabParallelEmbedding": StubEmbedding}),
]


def model_config(num_hidden_layers, **kwargs):
    config = dict(
        architectures=["Model"],
        num_hidden_layers=num_hidden_layers,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE,
        moe_intermediate_size=HIDDEN_SIZE,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        pad_token_id=0,
        torch_dtype=torch.float32,
        dtype=torch.float32,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return SimpleNamespace(**{**config, **kwargs})


def deepseek(num_layers):
    """Its first three layers are dense, the others MoE with a shared expert."""
    config = model_config(
        num_layers,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        q_lora_rank=4,
        kv_lora_rank=4,
        n_routed_experts=8,
        n_shared_experts=1,
        first_k_dense_replace=3,
        moe_layer_freq=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        scoring_func="sigmoid",
    )
    return deepseek_v2.DeepseekV2Model(config)


def gpt_oss_model(num_layers):
    config = model_config(
        num_layers,
        num_local_experts=8,
        swiglu_limit=7.0,
        attention_bias=True,
        sliding_window=128,
        layer_types=["full_attention"] * num_layers,
    )
    return gpt_oss.GptOssModel(config)


def qwen3_moe_model(num_layers):
    config = model_config(
        num_layers,
        num_experts=8,
        norm_topk_prob=True,
        attention_bias=False,
        rope_theta=10000.0,
        rope_scaling=None,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return qwen3_moe.Qwen3MoeModel(config)


MODELS = {"DeepSeek": deepseek, "gpt-oss": gpt_oss_model, "Qwen3-MoE": qwen3_moe_model}
# The layers of each stage; None: as they are shared out by default.
SPLITS = [(6, 2, None), (7, 2, None), (7, 3, None), (6, 2, (4, 2)), (6, 3, (1, 3, 2))]
# Tensor and expert parallel ranks. With both kinds of MoE ranks at once, layers within a
# stage lack a sum too (https://github.com/sgl-project/sglang/pull/32012).
PARALLEL = [(2, 1), (2, 2), (4, 4)]


@contextmanager
def parallel(tp_size, ep_size):
    whole, one = ThreadGroup(tp_size), ThreadGroup(1)
    groups = dict(_TP=whole, _ATTN_TP=whole, _ATTN_CP=one, _MOE_DP=one)
    groups["_MOE_EP"] = whole if ep_size == tp_size else ThreadGroup(ep_size)
    groups["_MOE_TP"] = whole if ep_size == 1 else ThreadGroup(tp_size // ep_size)
    with ExitStack() as stack:
        for name, group in groups.items():
            stack.enter_context(patch.object(parallel_state, name, group))
        for name, value in {"_ATTN_DP_SIZE": 1, "_ATTN_DP_RANK": 0}.items():
            stack.enter_context(patch.object(dp_attention, name, value))
        yield whole


@contextmanager
def fusion(enabled=True):
    """As on Hopper with the default flags, or not at all."""
    with (
        patch.object(communicator, "_is_sm90_supported", enabled),
        patch.object(communicator, "_is_sm100_supported", False),
        patch.object(communicator, "_is_flashinfer_available", True),
        patch.object(
            flashinfer_comm_fusion,
            "flashinfer_allreduce_residual_rmsnorm",
            fused_allreduce_norm,
        ),
    ):
        yield


def build_stage(build, num_layers, pp_rank, pp_size, partition, tp_rank):
    pp_group = SimpleNamespace(
        is_first_rank=pp_rank == 0,
        is_last_rank=pp_rank == pp_size - 1,
        rank_in_group=pp_rank,
        world_size=pp_size,
    )
    env = {}
    if partition is not None:
        env["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, partition))
    THREAD.rank = tp_rank
    with ExitStack() as stack:
        for module, stubs in STUBS:
            for name, stub in stubs.items():
                stack.enter_context(patch.object(module, name, stub))
        stack.enter_context(patch.object(parallel_state, "_PP", pp_group))
        stack.enter_context(patch.dict(os.environ, env))
        stage = build(num_layers)
    for name, parameter in stage.named_parameters():
        if name.rpartition(".")[0].endswith("norm"):
            nn.init.ones_(parameter)
            continue
        seed = zlib.crc32(f"{name} of rank {tp_rank}".encode())
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(parameter, std=HIDDEN_SIZE**-0.5, generator=generator)
    return stage.requires_grad_(False)


def build_pipeline(build, num_layers, pp_size, partition, tp_size):
    """The stages, each a list of one model for each tensor parallel rank."""
    return [
        [
            build_stage(build, num_layers, pp_rank, pp_size, partition, tp_rank)
            for tp_rank in range(tp_size)
        ]
        for pp_rank in range(pp_size)
    ]


def make_batch(num_tokens, forward_mode=ForwardMode.DECODE):
    return SimpleNamespace(
        input_ids=torch.arange(num_tokens) % VOCAB_SIZE,
        positions=torch.arange(num_tokens),
        forward_mode=forward_mode,
        can_run_tbo=False,
        attn_cp_metadata=None,
    )


def run_ranks(stage, group, batch, received=None):
    """The outputs of a stage's ranks, which run at the same time."""

    def run(rank):
        THREAD.rank = rank
        proxy_tensors = received and PPProxyTensors(received)
        try:
            with torch.no_grad():
                return stage[rank](
                    batch.input_ids,
                    batch.positions,
                    batch,
                    pp_proxy_tensors=proxy_tensors,
                )
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(len(stage)) as pool:
        futures = [pool.submit(run, rank) for rank in range(len(stage))]
    errors = [future.exception() for future in futures if future.exception()]
    # The others' are that they waited for it in vain.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    for error in errors:
        raise error
    return [future.result() for future in futures]


def send(outputs):
    """What the next stage gets: of each tensor, a slice of each rank's."""
    received = {}
    for name in ("hidden_states", "residual"):
        of_ranks = [output[name] for output in outputs]
        slices = [t.reshape(len(of_ranks), -1)[r] for r, t in enumerate(of_ranks)]
        received[name] = torch.cat(slices).reshape(of_ranks[0].shape)
    return received


def each(parallel_sizes):
    """Every model and split: in words, its parallel sizes, build_pipeline's arguments."""
    for tp_size, ep_size in parallel_sizes:
        for name, build in MODELS.items():
            for num_layers, pp_size, partition in SPLITS:
                layers = partition or num_layers
                what = f"{name}, {pp_size} stages of {layers} layers, {tp_size=} {ep_size=}"
                args = (build, num_layers, pp_size, partition, tp_size)
                yield what, (tp_size, ep_size), args


class PipelineTestCase(CustomTestCase):
    def setUp(self):
        super().setUp()
        self.server_args = ServerArgs(model_path="dummy", device="cpu")
        self.server_args.disable_shared_experts_fusion = True
        self.server_args.enable_flashinfer_allreduce_fusion = True
        # What says so since 0.5.14.
        self.server_args.flashinfer_allreduce_fusion_backend = "auto"
        set_global_server_args_for_scheduler(self.server_args)


class TestDecision(PipelineTestCase):
    """Which layers leave their all-reduce to the next one."""

    def fusing_layers(self, stages, num_tokens):
        batch = make_batch(num_tokens)
        return [
            [
                layer_id
                for layer_id in range(ranks[0].start_layer, ranks[0].end_layer)
                if ranks[0]
                .layers[layer_id]
                .layer_communicator.should_fuse_mlp_allreduce_with_next_layer(batch)
            ]
            for ranks in stages
        ]

    def check(self, stages, num_tokens, what):
        self.assertEqual(
            self.fusing_layers(stages, num_tokens),
            [
                list(range(ranks[0].start_layer, ranks[0].end_layer - 1))
                for ranks in stages
            ],
            f"{what}: not each layer but the last of a stage left its sum to the next",
        )

    def check_flashinfer(self, parallel_sizes):
        for what, sizes, args in each(parallel_sizes):
            with parallel(*sizes), fusion():
                stages = build_pipeline(*args)
                for num_tokens in (1, 3, MAX_FUSED_TOKENS):
                    self.check(stages, num_tokens, what)
                for num_tokens in (0, MAX_FUSED_TOKENS + 1):
                    self.assertFalse(any(self.fusing_layers(stages, num_tokens)), what)

    def test_tensor_parallel(self):
        self.check_flashinfer([(2, 1), (4, 1)])

    def test_expert_parallel(self):
        self.check_flashinfer([(2, 2), (4, 2)])

    def test_aiter(self):
        """The other branch, for AMD's GPUs."""
        self.server_args.enable_aiter_allreduce_fusion = True
        for what, sizes, args in each([(2, 1)]):
            with parallel(*sizes), patch.object(communicator, "_use_aiter", True):
                self.check(build_pipeline(*args), 3, what)

    def test_without_a_pipeline(self):
        for tp_size in (1, 2):
            for name, build in MODELS.items():
                with parallel(tp_size, 1), fusion():
                    stages = build_pipeline(build, 6, 1, None, tp_size)
                    expected = [[0, 1, 2, 3, 4] if tp_size > 1 else []]
                    self.assertEqual(self.fusing_layers(stages, 3), expected, name)

    def test_dp_attention(self):
        with patch.object(dp_attention, "_ENABLE_DP_ATTENTION_FLAG", True), fusion():
            with parallel(2, 1):
                stages = build_pipeline(deepseek, 6, 2, None, 2)
                self.assertEqual(self.fusing_layers(stages, 3), [[], []])


class TestSums(PipelineTestCase):
    """What the stages send and put out, against one stage without the fusion."""

    def check(self, parallel_sizes, num_tokens, forward_mode=ForwardMode.DECODE):
        batch = make_batch(num_tokens, forward_mode)
        for what, sizes, args in each(parallel_sizes):
            with parallel(*sizes) as group:
                self.check_pipeline(batch, what, group, *args)

    def check_pipeline(
        self, batch, what, group, build, num_layers, pp_size, partition, tp_size
    ):
        (whole,) = build_pipeline(build, num_layers, 1, None, tp_size)
        after = {}
        for layer_id, layer in enumerate(whole[0].layers):
            layer.register_forward_hook(
                lambda _, inputs, outputs, layer_id=layer_id: after.update(
                    {layer_id: [tensor.clone() for tensor in outputs[:2]]}
                )
            )
        with fusion(False):
            expected = run_ranks(whole, group, batch)
        stages = build_pipeline(build, num_layers, pp_size, partition, tp_size)
        received = None
        for stage in stages:
            with fusion():
                outputs = run_ranks(stage, group, batch, received)
            if stage is stages[-1]:
                break
            last_layer = stage[0].end_layer - 1
            for rank, output in enumerate(outputs):
                for name, tensor in zip(
                    ("hidden_states", "residual"), after[last_layer]
                ):
                    torch.testing.assert_close(
                        output[name],
                        tensor,
                        msg=lambda m: f"{what}: {name} that rank {rank} sent after layer "
                        f"{last_layer} are not the sum of all ranks'\n{m}",
                    )
            received = send(outputs)
        for output, tensor in zip(outputs, expected, strict=True):
            torch.testing.assert_close(
                output, tensor, msg=lambda m: f"{what}: another output\n{m}"
            )

    def test_decode(self):
        self.check(PARALLEL, 4)

    def test_prefill(self):
        self.check([(2, 1)], 24, ForwardMode.EXTEND)

    def test_long_prefill(self):
        """Too many tokens for the fusion."""
        self.check([(2, 1)], MAX_FUSED_TOKENS + 2, ForwardMode.EXTEND)


if __name__ == "__main__":
    unittest.main()
