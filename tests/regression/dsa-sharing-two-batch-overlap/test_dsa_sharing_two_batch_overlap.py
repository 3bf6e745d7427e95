"""Regression tests for two-batch overlap of a model whose layers share a DSA top-k.

With index_topk_freq or index_topk_pattern (GLM-5.2) a sharing layer attends to the
indices of the layer before it. The two-batch pipeline has to hand them on as the plain
loop over the layers does, to each half of the batch its own: from the dense layers,
which run before the split, to the first layers of both halves, and from layer to layer.

The real model, decoder layers, attention and pipeline run, on the CPU and in one
process: once layer by layer and once in two halves. What stands in for a GPU kernel or
a process group is a stub: the linear layers, norms, MoE and communicator, an indexer
that selects by position and layer, and a sparse attention in torch. Both runs have to
attend to the same indices in every layer and to come to the same hidden states.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import unittest
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.batch_overlap import operations_strategy, two_batch_overlap
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.layers.dp_attention import DpPaddingMode
from sglang.srt.model_executor.forward_batch_info import (
    ForwardBatch,
    ForwardMode,
    compute_position_torch,
)
from sglang.srt.models import deepseek_v2, qwen3_moe
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

try:
    from sglang.srt.layers.attention import dsa_backend  # noqa: F401

    SPARSE_BACKEND = "dsa"
except ImportError:
    SPARSE_BACKEND = "nsa"

try:
    from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context

    residual_batch = None
except ImportError:  # since 0.5.23
    from sglang.srt.layers.layer_boundary.adapters.attention import (
        AttentionInputs,
        get_attn_tp_context,
    )
    from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

HIDDEN_SIZE = 8
NUM_HEADS = 2
QK_NOPE_HEAD_DIM = 4
QK_ROPE_HEAD_DIM = 2
V_HEAD_DIM = 4
KV_LORA_RANK = 4
INDEX_TOPK = 8
SLOTS_OF_A_REQUEST = 64
MAX_REQUESTS = 8

TINY_MODEL = dict(
    vocab_size=32,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=HIDDEN_SIZE,
    moe_intermediate_size=HIDDEN_SIZE,
    num_hidden_layers=11,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=NUM_HEADS,
    qk_nope_head_dim=QK_NOPE_HEAD_DIM,
    qk_rope_head_dim=QK_ROPE_HEAD_DIM,
    v_head_dim=V_HEAD_DIM,
    q_lora_rank=4,
    kv_lora_rank=KV_LORA_RANK,
    index_topk=INDEX_TOPK,
    index_head_dim=4,
    index_n_heads=2,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    pad_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)

# Layers 0, 1, 5 and 9 run their indexer: the first layer of the two-batch pipeline, 3,
# shares the indices of the dense layer 1.
BY_FREQUENCY = {"index_topk_freq": 4}
# Layer 3 runs its own.
BY_PATTERN = {"index_topk_pattern": "FSSFSFFSSSF"}

ONE_RANK = SimpleNamespace(
    is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1
)


def normalized(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class StubLinear(nn.Module):
    def __init__(self, input_size, output_size, *args, reduce_results=False, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(output_size, input_size))
        self.quant_method = None
        self.reduce_results = reduce_results

    def forward(self, x):
        return nn.functional.linear(x, self.weight), None


class StubNorm(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.variance_epsilon = 1e-6

    def forward(self, x, residual=None):
        return normalized(x) if residual is None else (normalized(x + residual), x)


class StubRope(nn.Module):
    def __init__(self):
        super().__init__()
        self.is_neox_style = False
        self.cos_sin_cache = torch.zeros(4096, QK_ROPE_HEAD_DIM)

    def forward(self, positions, q, k):
        return q, k


class StubEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def forward(self, input_ids):
        return self.weight[input_ids]


class StubMLP(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


class StubMoE(StubMLP):
    """The operators of DeepseekV2MoE, without experts and their dispatch."""

    def op_gate(self, state):
        pass

    op_select_experts = op_shared_experts = op_experts = op_gate
    op_dispatch_a = op_dispatch_b = op_combine_a = op_combine_b = op_gate

    def op_output(self, state):
        state.hidden_states_mlp_output = self(state.pop("hidden_states_mlp_input"))


class StubCommunicator:
    """What LayerCommunicator does where there is one rank only."""

    def __init__(self, *args, qkv_latent_func=None, **kwargs):
        self.qkv_latent_func = qkv_latent_func

    def prepare_attn(self, hidden_states, residual, forward_batch, *args, **kwargs):
        if residual is not None:
            hidden_states = hidden_states + residual
        output = normalized(hidden_states)
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(output, forward_batch, self.qkv_latent_func)
        )
        return output, hidden_states

    # Since 0.5.14; it captures for EAGLE3 alone.
    prepare_attn_and_capture_last_layer_outputs = prepare_attn

    def prepare_mlp(self, hidden_states, residual, forward_batch, *args, **kwargs):
        return hidden_states, residual

    def should_fuse_mlp_allreduce_with_next_layer(self, forward_batch):
        return False

    def should_use_reduce_scatter(self, forward_batch):
        return False

    def postprocess_layer(self, hidden_states, residual, forward_batch):
        return hidden_states, residual


class StubBoundary:
    """Since 0.5.23 in place of the communicator: the boundary of a layer's half."""

    incoming_residual_rows = None
    input_on_attn_tp_slices = False

    def __init__(self, qkv_latent_func=None):
        self.qkv_latent_func = qkv_latent_func

    @classmethod
    def of_layer(cls, *, qkv_latent_func, **kwargs):
        return cls(qkv_latent_func), cls()

    def prepare(self, hidden_states, forward_batch, **kwargs):
        residual_batch.stream_of(forward_batch).write(hidden_states)
        output = normalized(hidden_states)
        if self.qkv_latent_func is not None:
            get_attn_tp_context().set_attn_inputs(
                AttentionInputs(output, forward_batch, self.qkv_latent_func)
            )
        return output

    def finish(self, hidden_states, forward_batch):
        stream = residual_batch.stream_of(forward_batch)
        return stream.write(hidden_states + stream.residual)

    complete_now = finish

    @contextmanager
    def exit(self, forward_batch):
        yield SimpleNamespace(finish=lambda x: self.finish(x, forward_batch))


def make_all_layers(num_layers, make, **kwargs):
    layers = nn.ModuleList([make(idx=i, prefix="") for i in range(num_layers)])
    return layers, 0, num_layers


class StubIndexer(nn.Module):
    """Selects cache slots of each token's own request, in every layer others.

    As the real one it selects at most index_topk of the position + 1 tokens of the
    context and fills the rest of a row, and rows of padding, with -1.
    """

    def __init__(self, *args, layer_id, index_topk, runs, **kwargs):
        super().__init__()
        self.layer_id = layer_id
        self.index_topk = index_topk
        self.runs = runs

    def forward(self, *, positions, forward_batch, **kwargs):
        self.runs.append(self.layer_id)
        slots = forward_batch.out_cache_loc.unsqueeze(1)
        position = positions[: slots.shape[0]].unsqueeze(1)
        column = torch.arange(self.index_topk)
        length = position + 1
        chosen = (position * 7 + self.layer_id * 3 + column * 5) % length
        indices = torch.where(column < length, slots - position + chosen, -1)
        return padded(indices.to(torch.int32), positions.shape[0])


def padded(indices, num_rows):
    return nn.functional.pad(indices, (0, 0, 0, num_rows - indices.shape[0]), value=-1)


class SparseAttention(AttentionBackend):
    """An attention backend that attends to the cache slots that the indices name."""

    use_mha = False
    # The backend says it since 0.5.15.
    prefill_attention_backend_str = decode_attention_backend_str = SPARSE_BACKEND
    # Backends have these since 0.5.15.
    token_to_kv_pool = req_to_token_pool = None

    def __init__(self, kv_cache):
        super().__init__()
        self.kv_cache = kv_cache
        self.topk_indices = {}

    def init_forward_metadata(self, forward_batch):
        pass

    def forward(
        self, q, k, v, layer, forward_batch, *args, topk_indices=None, **kwargs
    ):
        self.topk_indices[layer.layer_id] = topk_indices
        slots = forward_batch.out_cache_loc
        cache = self.kv_cache[layer.layer_id]
        cache[slots] = k.reshape(-1, KV_LORA_RANK)[: slots.shape[0]]
        if topk_indices is None:
            return q.new_zeros(q.shape[0], NUM_HEADS * KV_LORA_RANK)
        keys = cache[topk_indices.clamp(min=0).long()]
        scores = torch.einsum("thd,tkd->thk", q.view(-1, NUM_HEADS, KV_LORA_RANK), keys)
        scores = scores.masked_fill((topk_indices < 0).unsqueeze(1), float("-inf"))
        weights = scores.softmax(-1).nan_to_num()
        return torch.einsum("thk,tkd->thd", weights, keys).flatten(1)


@contextmanager
def attention_backend(backend, forward_batch):
    try:
        from sglang.srt.model_executor.forward_context import (
            ForwardContext,
            forward_context,
        )
    except ImportError:
        forward_batch.attn_backend = backend
        yield
    else:
        with forward_context(ForwardContext(attn_backend=backend)):
            yield


@contextmanager
def cpu_layers(runs):
    """The real model with stubs for what needs a GPU or a process group."""

    def indexer(*args, **kwargs):
        return StubIndexer(*args, runs=runs, **kwargs)

    stubs = {
        "ReplicatedLinear": StubLinear,
        "ColumnParallelLinear": StubLinear,
        "RowParallelLinear": StubLinear,
        "RMSNorm": StubNorm,
        "VocabParallelEmbedding": StubEmbedding,
        "get_pp_group": lambda: ONE_RANK,
        "is_dp_attention_enabled": lambda: False,
        "get_embedding_tp_kwargs": dict,
        "Indexer": indexer,
        "DeepseekV2MLP": StubMLP,
        "DeepseekV2MoE": StubMoE,
        "LayerCommunicator": StubCommunicator,
        "LayerScatterModes": MagicMock(),
        "get_rope_wrapper": lambda *args, **kwargs: StubRope(),
        "get_attention_tp_rank": lambda: 0,
        "get_attention_tp_size": lambda: 1,
        "enable_moe_dense_fully_dp": lambda: False,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }
    if residual_batch is not None:
        stubs["make_pp_layers"] = make_all_layers
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(patch.object(deepseek_v2, name, stub, create=True))
        if residual_batch is not None:
            from sglang.srt.layers.layer_boundary.fusions import cutedsl

            stack.enter_context(patch.object(cutedsl, "install_cutedsl_fusion"))
            layer = deepseek_v2.DeepseekV2DecoderLayer
            build = lambda layer, **kwargs: StubBoundary.of_layer(**kwargs)
            stack.enter_context(patch.object(layer, "_build_stages", build))
        yield


@contextmanager
def cpu_pipeline(attn_tp_size=1):
    """The real two-batch pipeline without streaming multiprocessors to share out."""

    def same(*, hidden_states, residual, **kwargs):
        return hidden_states, residual

    with ExitStack() as stack:
        for module, name, stub in (
            ("torch.cuda", "get_device_properties", MagicMock()),
            (operations_strategy, "DeepEPConfig", MagicMock()),
            (two_batch_overlap, "deep_gemm_wrapper", MagicMock()),
            (two_batch_overlap, "is_tbo_enabled", lambda: True),
            # The kernel of compute_position runs on a GPU.
            (two_batch_overlap, "compute_position", compute_position_on_cpu),
            (two_batch_overlap, "CommunicateContext", MagicMock()),
            (
                two_batch_overlap,
                "CommunicateSummableTensorPairFn",
                SimpleNamespace(execute=same),
            ),
            (two_batch_overlap, "tbo_split_moves", lambda rows: (same, same)),
            # Until 0.5.13; ranks() says it since.
            (two_batch_overlap, "get_attention_tp_size", lambda: attn_tp_size),
        ):
            if isinstance(module, str):
                stack.enter_context(patch(f"{module}.{name}", stub))
            else:
                stack.enter_context(patch.object(module, name, stub, create=True))
        stack.enter_context(ranks(attn_tp_size))
        yield


def compute_position_on_cpu(backend, extend_prefix_lens, extend_seq_lens, *args):
    return compute_position_torch(extend_prefix_lens, extend_seq_lens)


def ranks(attn_tp_size=1):
    """A process without a process group; since 0.5.14 one place says its ranks."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:
        return nullcontext()
    more = {"pp_group": ONE_RANK} if residual_batch is not None else {}
    return get_parallel().override(
        **{f"{name}_size": attn_tp_size for name in ("tp", "moe_ep", "attn_tp")},
        **{f"{name}_size": 1 for name in ("attn_cp", "attn_dp")},
        **{f"{n}_rank": 0 for n in ("tp", "moe_ep", "attn_tp", "attn_cp", "attn_dp")},
        **more,
    )


def make_forward_batch(**kwargs):
    """A ForwardBatch, less the fields that this release does not have."""
    known = {field.name for field in dataclasses.fields(ForwardBatch)}
    return ForwardBatch(
        **{key: value for key, value in kwargs.items() if key in known},
        dp_padding_mode=DpPaddingMode.SUM_LEN,
    )


def make_batch(forward_mode, seq_lens, extend_lens):
    """The last extend_lens tokens of requests that are seq_lens long."""
    num_seqs = len(seq_lens)
    positions = [
        torch.arange(seq_len - extend_len, seq_len)
        for seq_len, extend_len in zip(seq_lens, extend_lens)
    ]
    first_slots = [request * SLOTS_OF_A_REQUEST for request in range(num_seqs)]
    slots = [first + each for first, each in zip(first_slots, positions)]
    kwargs = {}
    if forward_mode == ForwardMode.EXTEND:
        prefix_lens = [s - e for s, e in zip(seq_lens, extend_lens)]
        starts = [sum(extend_lens[:i]) for i in range(num_seqs)]
        kwargs = dict(
            extend_num_tokens=sum(extend_lens),
            extend_seq_lens=torch.tensor(extend_lens, dtype=torch.int32),
            extend_seq_lens_cpu=list(extend_lens),
            extend_prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32),
            extend_prefix_lens_cpu=prefix_lens,
            extend_start_loc=torch.tensor(starts, dtype=torch.int32),
            extend_logprob_start_lens_cpu=[0] * num_seqs,
        )
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *positions])
    return make_forward_batch(
        forward_mode=forward_mode,
        global_forward_mode=forward_mode,
        batch_size=num_seqs,
        input_ids=(positions * 3 + 1) % TINY_MODEL["vocab_size"],
        req_pool_indices=torch.arange(num_seqs),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int64),
        seq_lens_cpu=torch.tensor(seq_lens, dtype=torch.int64),
        seq_lens_sum=sum(seq_lens),
        out_cache_loc=torch.cat([torch.empty(0, dtype=torch.int64), *slots]),
        positions=positions,
        **kwargs,
    )


class TestTwoBatchOverlap(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        server_args = ServerArgs(model_path="dummy", device="cpu")
        server_args.attention_backend = SPARSE_BACKEND
        server_args.prefill_attention_backend = SPARSE_BACKEND
        server_args.decode_attention_backend = SPARSE_BACKEND
        set_global_server_args_for_scheduler(server_args)

    def setUp(self):
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(torch.no_grad())
        # Compiling takes longer than everything else here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(0)

    def build(self, sharing):
        self.runs = []
        config = SimpleNamespace(
            architectures=["DeepseekV32ForCausalLM"], **{**TINY_MODEL, **sharing}
        )
        with cpu_layers(self.runs), ranks():
            model = deepseek_v2.DeepseekV2Model(config).requires_grad_(False)
        for layer in model.layers:
            attention = layer.self_attn
            attention.w_kc = torch.randn(NUM_HEADS, QK_NOPE_HEAD_DIM, KV_LORA_RANK)
            attention.w_vc = torch.randn(NUM_HEADS, KV_LORA_RANK, V_HEAD_DIM)
        self.kv_cache = torch.randn(
            len(model.layers), MAX_REQUESTS * SLOTS_OF_A_REQUEST, KV_LORA_RANK
        )
        return model

    def run_plain(self, model, batch):
        """Returns the hidden states and what each layer attended to."""
        self.runs.clear()
        backend = SparseAttention(self.kv_cache.clone())
        with ranks(), attention_backend(backend, batch):
            hidden_states = model(batch.input_ids, batch.positions, batch)
        return hidden_states, backend.topk_indices, list(self.runs)

    def run_in_halves(self, model, batch, prepare):
        """The same, with the rows of both halves' tokens one after the other."""
        self.runs.clear()
        kv_cache = self.kv_cache.clone()
        whole, *halves = (SparseAttention(kv_cache) for _ in range(3))
        with attention_backend(TboAttnBackend(whole, halves), batch):
            prepare(batch)
            hidden_states = model(batch.input_ids, batch.positions, batch)
        topk_indices = dict(whole.topk_indices)
        num_tokens = [len(child.input_ids) for child in batch.tbo_children]
        self.num_tokens = num_tokens
        for layer_id in range(TINY_MODEL["first_k_dense_replace"], len(model.layers)):
            rows = [
                (half.topk_indices[layer_id], n)
                for half, n in zip(halves, num_tokens)
                if n
            ]
            if not rows or any(indices is None for indices, _ in rows):
                topk_indices[layer_id] = None
                continue
            for indices, n in rows:
                self.assertTrue(
                    (indices[n:] == -1).all(),
                    f"layer {layer_id} attends to something in rows of padding",
                )
            topk_indices[layer_id] = torch.cat([indices[:n] for indices, n in rows])
        return hidden_states, topk_indices, list(self.runs)

    def split(self, batch):
        batch.tbo_split_seq_index = two_batch_overlap.compute_split_seq_index(
            forward_mode=batch.forward_mode,
            num_tokens=len(batch.input_ids),
            extend_lens=batch.extend_seq_lens_cpu,
            token_num_per_seq=1,
        )
        two_batch_overlap.TboForwardBatchPreparer.prepare(batch)

    def capture(self, batch):
        """What the CUDA graph runner does with a batch before it captures it."""
        plugin = two_batch_overlap.TboCudaGraphRunnerPlugin()
        plugin.capture_one_batch_size(batch, num_tokens=len(batch.input_ids))

    def assert_same(self, sharing, arguments, prepare=None, attn_tp_size=1):
        model = self.build(sharing)
        hidden_states, indices, runs = self.run_plain(model, make_batch(*arguments))
        self.assertTrue(all(each is not None for each in indices.values()))
        with cpu_pipeline(attn_tp_size):
            halves = self.run_in_halves(
                model, make_batch(*arguments), prepare or self.split
            )
        other = [
            layer_id
            for layer_id, expected in indices.items()
            if halves[1][layer_id] is None
            or not torch.equal(halves[1][layer_id], expected)
        ]
        self.assertEqual(
            other,
            [],
            f"{sharing}: in two halves of {self.num_tokens} tokens these layers attend "
            "to other indices than in one batch",
        )
        dense = TINY_MODEL["first_k_dense_replace"]
        self.assertEqual(
            sorted(halves[2]),
            sorted(runs + [layer_id for layer_id in runs if layer_id >= dense]),
            "each half runs the indexer of the layers that do not share, once",
        )
        torch.testing.assert_close(halves[0], hidden_states)

    def test_decode(self):
        arguments = (ForwardMode.DECODE, [30, 41, 23, 60], [1] * 4)
        for sharing in (BY_FREQUENCY, BY_PATTERN):
            self.assert_same(sharing, arguments)
            self.assertEqual(self.num_tokens, [2, 2])

    def test_decode_in_unequal_halves(self):
        arguments = (ForwardMode.DECODE, [30, 41, 23, 60, 7], [1] * 5)
        self.assert_same(BY_FREQUENCY, arguments)
        self.assertNotEqual(*self.num_tokens)

    def test_decode_as_captured(self):
        arguments = (ForwardMode.DECODE, [30, 41, 23, 60], [1] * 4)
        for sharing in (BY_FREQUENCY, BY_PATTERN):
            self.assert_same(sharing, arguments, prepare=self.capture)
            self.assertEqual(self.num_tokens, [2, 2])

    def test_decode_with_padding(self):
        # Each half has three tokens, and rows for the two attention TP ranks.
        arguments = (ForwardMode.DECODE, [30, 41, 23, 60, 7, 12], [1] * 6)
        self.assert_same(BY_FREQUENCY, arguments, attn_tp_size=2)
        self.assertEqual(self.num_tokens, [3, 3])

    def test_prefill_split_between_requests(self):
        arguments = (ForwardMode.EXTEND, [30, 41, 23], [12, 9, 20])
        for sharing in (BY_FREQUENCY, BY_PATTERN):
            self.assert_same(sharing, arguments)
            self.assertEqual(self.num_tokens, [21, 20])

    def test_prefill_split_within_a_request(self):
        arguments = (ForwardMode.EXTEND, [50, 30], [40, 3])
        for sharing in (BY_FREQUENCY, BY_PATTERN):
            self.assert_same(sharing, arguments)
            self.assertEqual(self.num_tokens, [21, 22])

    def test_without_sharing(self):
        self.assert_same({}, (ForwardMode.DECODE, [30, 41, 23, 60], [1] * 4))

    def test_layers_that_know_no_indices(self):
        # Those of the other models of the pipeline.
        class Qwen3MoeDecoderLayer(qwen3_moe.Qwen3MoeDecoderLayer):
            is_layer_sparse = True
            layer_scatter_modes = MagicMock()

            def __init__(self):
                nn.Module.__init__(self)
                self.mlp = StubMoE()
                self.self_attn = SimpleNamespace(op_prepare=prepare, op_core=core)
                self.layer_communicator = StubCommunicator()
                self.attn_boundary = self.ffn_boundary = StubBoundary()

            def op_comm_prepare_attn(self, state, zero_allocator=None, **inputs):
                # Without overlap all layers are given an allocator.
                super().op_comm_prepare_attn(state, **inputs)

        def prepare(state):
            pass

        def core(state):
            hidden_states = state.pop("hidden_states_after_comm_pre_attn")
            state.hidden_states_after_attn = hidden_states

        hidden_states = torch.randn(4, HIDDEN_SIZE)
        kwargs = {}
        if residual_batch is None:
            forward = two_batch_overlap.model_forward_maybe_tbo
            kwargs.update(residual=None, input_data_scatter_mode=None)
        else:
            forward = two_batch_overlap.model_forward_stages
        for enable_tbo in (True, False):
            batch = make_batch(ForwardMode.DECODE, [30, 41, 23, 60], [1] * 4)
            backend = TboAttnBackend(SparseAttention({}), [SparseAttention({})] * 2)
            with cpu_pipeline(), attention_backend(backend, batch):
                self.split(batch)
                if residual_batch is not None:
                    residual_batch.start(batch)
                output = forward(
                    layers=nn.ModuleList([Qwen3MoeDecoderLayer() for _ in range(2)]),
                    enable_tbo=enable_tbo,
                    positions=batch.positions,
                    forward_batch=batch,
                    hidden_states=hidden_states,
                    **kwargs,
                )
            if residual_batch is None:
                output, _ = output
            self.assertEqual(output.shape, hidden_states.shape)

    def test_rank_without_requests(self):
        # Other ranks of DP attention decode meanwhile.
        model = self.build(BY_FREQUENCY)
        batch = make_batch(ForwardMode.IDLE, [], [])
        batch.global_forward_mode = ForwardMode.DECODE
        with cpu_pipeline():
            hidden_states, _, runs = self.run_in_halves(model, batch, self.split)
        self.assertEqual(self.num_tokens, [0, 0])
        self.assertEqual(hidden_states.shape, (0, HIDDEN_SIZE))
        self.assertEqual(runs, [])


class TestServerArgs(CustomTestCase):
    PREFILL = f"{SPARSE_BACKEND}_prefill_backend"

    def start(
        self,
        sharing,
        architecture="GlmMoeDsaForCausalLM",
        capability=(9, 0),
        **kwargs,
    ):
        config = {
            "architectures": [architecture],
            "model_type": {
                "GlmMoeDsaForCausalLM": "glm_moe_dsa",
                "DeepseekV32ForCausalLM": "deepseek_v32",
            }[architecture],
        }
        # One for each configuration: the parser keeps a cache.
        model_path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, model_path)
        with open(os.path.join(model_path, "config.json"), "w") as f:
            json.dump({**TINY_MODEL, **sharing, **config}, f)
        # Model-specific defaults are written to the environment.
        with (
            patch.dict(os.environ),
            patch("torch.cuda.get_device_capability", return_value=capability),
        ):
            server_args = ServerArgs(
                model_path=model_path,
                device="cpu",
                moe_a2a_backend="deepep",
                enable_two_batch_overlap=True,
                **kwargs,
            )
            if hasattr(server_args, "resolve_once"):  # since 0.5.23
                server_args.resolve_once()
            server_args.check_server_args()

    def test_sharing_is_accepted(self):
        for kwargs in (
            {},
            {"kv_cache_dtype": "fp8_e4m3"},
            {"kv_cache_dtype": "bfloat16", self.PREFILL: "flashmla_sparse"},
            {"kv_cache_dtype": "bf16", self.PREFILL: "flashmla_auto"},
            # The KV cache is bfloat16 on Hopper where nothing is said.
            {self.PREFILL: "flashmla_sparse"},
            {self.PREFILL: "flashmla_auto"},
        ):
            for sharing in (BY_FREQUENCY, BY_PATTERN):
                try:
                    self.start(sharing, "DeepseekV32ForCausalLM", **kwargs)
                except ValueError as e:
                    self.fail(
                        f"two-batch overlap with {sharing}, {kwargs} was refused: {e}"
                    )

    # What is refused, and the reasons.
    REFUSED = [
        ({"pp_size": 2}, ["pipeline parallelism"]),
        (
            {"kv_cache_dtype": "fp8_e4m3", PREFILL: "flashmla_sparse"},
            ["flashmla_sparse with --kv-cache-dtype fp8_e4m3"],
        ),
        (
            {"kv_cache_dtype": "fp8_e4m3", PREFILL: "flashmla_auto"},
            ["flashmla_auto with --kv-cache-dtype fp8_e4m3"],
        ),
        # The KV cache is fp8 on Blackwell where nothing is said.
        (
            {PREFILL: "flashmla_sparse", "capability": (10, 0)},
            ["flashmla_sparse with --kv-cache-dtype fp8_e4m3"],
        ),
        (
            {"pp_size": 2, PREFILL: "flashmla_sparse"},
            ["pipeline parallelism"],
        ),
        (
            {
                "pp_size": 2,
                "kv_cache_dtype": "fp8_e4m3",
                PREFILL: "flashmla_sparse",
            },
            [
                "pipeline parallelism",
                "flashmla_sparse with --kv-cache-dtype fp8_e4m3",
            ],
        ),
    ]
    if residual_batch is not None:  # Prefill backends that are there since 0.5.23.
        REFUSED += [
            (
                {"kv_cache_dtype": "bfloat16", PREFILL: "flashmla_sparse_q8"},
                ["flashmla_sparse_q8 with --kv-cache-dtype bfloat16"],
            ),
            (
                {"kv_cache_dtype": "fp8_e4m3", PREFILL: "triton_sparse_mla"},
                ["triton_sparse_mla with --kv-cache-dtype fp8_e4m3"],
            ),
        ]

    def test_what_the_pipeline_does_not_carry_is_refused(self):
        for kwargs, _ in self.REFUSED:
            for sharing in (BY_FREQUENCY, BY_PATTERN):
                with self.assertRaisesRegex(
                    ValueError, "enable-two-batch-overlap.*index_topk_", msg=kwargs
                ):
                    self.start(sharing, "DeepseekV32ForCausalLM", **kwargs)
        for kwargs, _ in self.REFUSED:
            self.start({}, "DeepseekV32ForCausalLM", **kwargs)

    def test_the_refusal_names_the_reasons_that_hold(self):
        every = {reason for _, reasons in self.REFUSED for reason in reasons}
        for kwargs, reasons in self.REFUSED:
            with self.assertRaises(ValueError) as caught:
                self.start(BY_FREQUENCY, "DeepseekV32ForCausalLM", **kwargs)
            self.assertEqual(
                {reason for reason in every if reason in str(caught.exception)},
                set(reasons),
                f"two-batch overlap with {kwargs} was refused for other reasons than "
                f"those that hold: {caught.exception}",
            )

    @unittest.skipIf(residual_batch is None, "there are none before 0.5.23")
    def test_models_with_layers_of_their_own_are_refused(self):
        from sglang.srt.arg_groups.model_hook import _validate_dsa_tbo_index_sharing

        server_args = ServerArgs(
            model_path="dummy", device="cpu", enable_two_batch_overlap=True
        )
        for architecture in (
            "Glm5NextForConditionalGeneration",
            "HYV4ForCausalLM",
            "LongcatFlashForCausalLM",
            "Dots3NoteForCausalLM",
        ):
            hf_config = SimpleNamespace(architectures=[architecture], **BY_FREQUENCY)
            with self.assertRaisesRegex(
                ValueError,
                f"enable-two-batch-overlap is not supported.* {architecture}\\. Got",
                msg=architecture,
            ):
                _validate_dsa_tbo_index_sharing(server_args, hf_config)


if __name__ == "__main__":
    unittest.main()
