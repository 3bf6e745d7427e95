"""A pipeline stage whose first layer shares the top-k of the stage before.

DeepSeek sparse attention layers may share one top-k (index_topk_freq or
index_topk_pattern; GLM-5.2). A pipeline stage may begin with a layer that shares:
layer 39 of GLM-5.2's 78 with two stages. Its indices have to come along with the
hidden states (https://github.com/sgl-project/sglang/issues/28537).

All stages of a pipeline run in one process, on the CPU: the real models, the real
sending and receiving of tensor dictionaries and the real CUDA graph runner. What
stands in for a GPU kernel or a process group is a stub: the linear layers, norms, MoE
and communicator, the indexer's kernels and the attention backend, whose output depends
on the indices, the transport, and a graph that runs what it captured again.
"""

import collections
import contextlib
import dataclasses
import os
import unittest
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.distributed import parallel_state
from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor import input_buffers
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    PPProxyTensors,
)
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models import deepseek_v2
from sglang.srt.models.glm4_moe import GlmMoeDsaForCausalLM
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

try:
    from sglang.srt.layers.attention import dsa_backend  # noqa: F401

    SPARSE_BACKEND = "dsa"
except ImportError:
    SPARSE_BACKEND = "nsa"

try:  # since 0.5.14
    from sglang.srt.model_executor.runner import (
        decode_cuda_graph_runner as graph_runner,
    )

    DecodeRunner = graph_runner.DecodeCudaGraphRunner
except ImportError:
    from sglang.srt.model_executor import cuda_graph_runner as graph_runner

    DecodeRunner = graph_runner.CudaGraphRunner

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

HIDDEN_SIZE = 8
NUM_HEADS = 2
QK_NOPE_HEAD_DIM = 4
QK_ROPE_HEAD_DIM = 2
V_HEAD_DIM = 4
KV_LORA_RANK = 4
INDEX_TOPK = 8
VOCAB_SIZE = 32
CAPTURE_BS = [1, 2, 4, 8]


def model_config(num_hidden_layers, **kwargs):
    config = dict(
        architectures=["GlmMoeDsaForCausalLM"],
        num_hidden_layers=num_hidden_layers,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE,
        moe_intermediate_size=HIDDEN_SIZE,
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
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return SimpleNamespace(**{**config, **kwargs})


def pattern_config(pattern, **kwargs):
    return model_config(len(pattern), index_topk_pattern=pattern, **kwargs)


class StubLinear(nn.Module):
    def __init__(self, input_size, output_size, *args, reduce_results=False, **kwargs):
        super().__init__()
        weight = torch.linspace(-0.5, 0.5, input_size * output_size)
        self.weight = nn.Parameter(
            weight.view(output_size, input_size), requires_grad=False
        )
        self.quant_method = None
        self.reduce_results = reduce_results

    def forward(self, x):
        return nn.functional.linear(x, self.weight), None


class StubNorm(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.variance_epsilon = 1e-6

    def forward(self, x, residual=None):
        return x if residual is None else (x + residual, residual)


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
        self.embedding_dim = embedding_dim

    def forward(self, input_ids):
        return input_ids.unsqueeze(1) * torch.linspace(0, 0.1, self.embedding_dim)


class StubLogitsProcessor(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, input_ids, hidden_states, *args):
        return LogitsProcessorOutput(next_token_logits=hidden_states)


class StubMLP(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states / 2


class StubMoE(StubMLP):
    pass


class StubCommunicator:
    """What LayerCommunicator does where there is one rank only."""

    def __init__(self, *args, qkv_latent_func=None, **kwargs):
        self.qkv_latent_func = qkv_latent_func

    def prepare_attn(self, hidden_states, residual, forward_batch, *args, **kwargs):
        if residual is not None:
            hidden_states = hidden_states + residual
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(hidden_states, forward_batch, self.qkv_latent_func)
        )
        return hidden_states, hidden_states

    # Since 0.5.14; it captures for EAGLE3 alone.
    prepare_attn_and_capture_last_layer_outputs = prepare_attn

    def prepare_mlp(self, hidden_states, residual, forward_batch, *args, **kwargs):
        return hidden_states + residual, hidden_states + residual

    def should_fuse_mlp_allreduce_with_next_layer(self, forward_batch):
        return False

    def should_use_reduce_scatter(self, forward_batch):
        return False

    def postprocess_layer(self, hidden_states, residual, forward_batch):
        return hidden_states, residual


class StubIndexer(nn.Module):
    """An indexer whose indices tell the layer and the token's position.

    As the real one it selects at most index_topk of the position + 1 tokens of the
    context and fills the rest of a row with -1.
    """

    def __init__(self, *args, layer_id, index_topk, **kwargs):
        super().__init__()
        self.layer_id = layer_id
        self.index_topk = index_topk

    def forward(self, *args, positions, **kwargs):
        columns = torch.arange(self.index_topk, dtype=torch.int32)
        num_valid = (positions + 1).clamp(max=self.index_topk).unsqueeze(1)
        first = 10000 * (self.layer_id + 1) + 10 * positions.unsqueeze(1)
        return torch.where(columns < num_valid, first + columns, -1).to(torch.int32)


class StubBackend:
    """An attention backend that writes down the indices each layer attends to."""

    # The backend says it since 0.5.15.
    prefill_attention_backend_str = decode_attention_backend_str = SPARSE_BACKEND

    def __init__(self, use_mha=False):
        self.use_mha = use_mha
        self.topk_indices = {}

    def forward(
        self, q, k, v, layer, forward_batch, *args, topk_indices=None, **kwargs
    ):
        self.topk_indices[layer.layer_id] = topk_indices
        output = q.flatten(1).mean(-1)
        if topk_indices is not None:
            output = output + topk_indices.clamp(min=0).float().mean(-1) / 1e5
        width = layer.tp_q_head_num * layer.v_head_dim
        return output.unsqueeze(1).expand(-1, width).contiguous()

    def get_cuda_graph_seq_len_fill_value(self):
        return 1

    def __getattr__(self, name):
        # The metadata of a batch or of a graph.
        if name.startswith(("init_", "on_after_cuda_graph_")):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def stage_group(rank, num_stages):
    return SimpleNamespace(
        is_first_rank=rank == 0,
        is_last_rank=rank == num_stages - 1,
        rank_in_group=rank,
        world_size=num_stages,
    )


@contextmanager
def cpu_layers(pp_group):
    """Builds a stage of the real models with stubs for what needs a GPU or a process
    group."""
    stubs = {
        "ReplicatedLinear": StubLinear,
        "ColumnParallelLinear": StubLinear,
        "RowParallelLinear": StubLinear,
        "RMSNorm": StubNorm,
        "VocabParallelEmbedding": StubEmbedding,
        "ParallelLMHead": StubEmbedding,
        "LogitsProcessor": StubLogitsProcessor,
        "get_pp_group": lambda: pp_group,
        "is_dp_attention_enabled": lambda: False,
        "get_embedding_tp_kwargs": dict,
        "Indexer": StubIndexer,
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
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(patch.object(deepseek_v2, name, stub, create=True))
        yield


def build_stages(config, num_stages, partition=None):
    """The models of a pipeline; ``partition`` says how many layers each has."""
    env = {}
    if partition:
        env["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, partition))
    stages = []
    with patch.dict(os.environ, env):
        for rank in range(num_stages):
            with cpu_layers(stage_group(rank, num_stages)):
                model = GlmMoeDsaForCausalLM(config)
            for module in model.modules():
                if isinstance(module, deepseek_v2.DeepseekV2AttentionMLA):
                    # What post_load_weights takes from kv_b_proj.
                    module.w_kc = torch.full(
                        (NUM_HEADS, QK_NOPE_HEAD_DIM, KV_LORA_RANK), 0.1
                    )
                    module.w_vc = torch.full((NUM_HEADS, KV_LORA_RANK, V_HEAD_DIM), 0.1)
            stages.append(model.requires_grad_(False))
    return stages


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


def make_batch(seq_lens, forward_mode=ForwardMode.DECODE, **kwargs):
    seq_lens = torch.tensor(seq_lens, dtype=torch.int64)
    num_seqs = len(seq_lens)
    fields = {
        "forward_mode": forward_mode,
        "batch_size": num_seqs,
        "input_ids": seq_lens % VOCAB_SIZE,
        "req_pool_indices": torch.arange(num_seqs),
        "seq_lens": seq_lens,
        "seq_lens_cpu": seq_lens.clone(),
        "seq_lens_sum": int(seq_lens.sum()),
        "out_cache_loc": torch.arange(num_seqs),
        "positions": seq_lens - 1,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
        "num_token_non_padded": torch.tensor(num_seqs, dtype=torch.int32),
        **kwargs,
    }
    known = {field.name for field in dataclasses.fields(ForwardBatch)}
    return ForwardBatch(**{k: v for k, v in fields.items() if k in known})


def extend_batch(num_tokens):
    positions = torch.arange(num_tokens)
    return make_batch(
        [num_tokens],
        ForwardMode.EXTEND,
        input_ids=positions % VOCAB_SIZE,
        positions=positions,
        out_cache_loc=positions,
        extend_num_tokens=num_tokens,
        extend_seq_lens=torch.tensor([num_tokens]),
        extend_seq_lens_cpu=[num_tokens],
        extend_prefix_lens=torch.tensor([0]),
        extend_prefix_lens_cpu=[0],
    )


@contextmanager
def one_rank():
    """A process without process groups; since 0.5.14 one place says its ranks."""
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    with ExitStack() as stack:
        for name in ("_TP", "_ATTN_TP", "_ATTN_CP", "_MOE_EP"):
            if hasattr(parallel_state, name):
                stack.enter_context(patch.object(parallel_state, name, group))
        with contextlib.suppress(ImportError):
            from sglang.srt.runtime_context import get_parallel

            names = ("tp", "moe_ep", "attn_tp", "attn_cp", "attn_dp")
            sizes = {f"{name}_size": 1 for name in names}
            ranks = {f"{name}_rank": 0 for name in names}
            stack.enter_context(get_parallel().override(**sizes, **ranks))
        yield


def over_the_wire(proxy_tensors):
    group = object.__new__(parallel_state.GroupCoordinator)
    vars(group).update(
        world_size=2, rank_in_group=0, ranks=[0, 1], device_group=0, cpu_group=0
    )
    objects, tensors = collections.deque(), collections.deque()

    def send_object(group, obj, *args, **kwargs):
        objects.append(obj)
        return []

    def send_tensor(tensor, *args, **kwargs):
        tensors.append(tensor.clone())

    def receive_object(group, *args, **kwargs):
        return objects.popleft()

    def receive_tensor(tensor, *args, **kwargs):
        tensor.copy_(tensors.popleft())
        return MagicMock()

    with (
        patch.object(parallel_state.GroupCoordinator, "send_object", send_object),
        patch.object(parallel_state.GroupCoordinator, "recv_object", receive_object),
        patch("torch.distributed.isend", send_tensor),
        patch("torch.distributed.irecv", receive_tensor),
        patch("torch.distributed.is_initialized", lambda: True),
    ):
        group.send_tensor_dict(
            {**proxy_tensors.tensors, "__msg_type__": "proxy"}, async_send=True
        )
        return PPProxyTensors(group.recv_tensor_dict())


Run = collections.namedtuple("Run", "output topk_indices sent")


def run_pipeline(stages, batch, backend=None):
    """The last stage's output, the indices that each layer attended to, and what each
    stage sent."""
    backend = backend or StubBackend()
    sent, proxy_tensors = [], None
    with attention_backend(backend, batch):
        for stage in stages:
            output = stage(
                batch.input_ids, batch.positions, batch, pp_proxy_tensors=proxy_tensors
            )
            if stage is not stages[-1]:
                sent.append(output.tensors)
                proxy_tensors = over_the_wire(output)
    return Run(output.next_token_logits, backend.topk_indices, sent)


class PipelineTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.server_args = ServerArgs(
            model_path="dummy",
            device="cpu",
            pp_size=2,
        )
        cls.server_args.attention_backend = SPARSE_BACKEND
        cls.server_args.prefill_attention_backend = SPARSE_BACKEND
        cls.server_args.decode_attention_backend = SPARSE_BACKEND
        set_global_server_args_for_scheduler(cls.server_args)

    def setUp(self):
        super().setUp()
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(torch.no_grad())
        stack.enter_context(one_rank())
        # Compiling takes longer than everything else here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The process-wide pool of buffers that graph runners share.
        stack.enter_context(
            patch.dict(input_buffers._forward_input_buffer_pool, clear=True)
        )

    def assert_same_run(self, run, expected, stages, what):
        """Each layer attends to what it attends to without a pipeline."""
        first_layers = {stage.start_layer for stage in stages[1:]}
        for layer_id, indices in expected.topk_indices.items():
            got = run.topk_indices[layer_id]
            place = ", the first of its stage," if layer_id in first_layers else ""
            self.assertTrue(
                got is not None and torch.equal(got, indices),
                f"{what}: layer {layer_id}{place} did not attend to the indices that it "
                f"attends to without a pipeline but to {got}",
            )
        torch.testing.assert_close(
            run.output, expected.output, msg=lambda m: f"{what}: other output. {m}"
        )


class TestStages(PipelineTestCase):
    """Eager: everything but the CUDA graph runner."""

    def check(self, config, num_stages, partition=None, handed_on=None):
        """``handed_on``: which stages hand on indices."""
        (whole,) = build_stages(config, 1)
        stages = build_stages(config, num_stages, partition)
        for batch in (make_batch([3, 20]), make_batch([7]), extend_batch(12)):
            what = f"{num_stages} stages, {partition=}, {batch.forward_mode.name}"
            expected = run_pipeline([whole], batch)
            run = run_pipeline(stages, batch)
            self.assert_same_run(run, expected, stages, what)
            self.assertEqual(
                ["topk_indices" in tensors for tensors in run.sent], handed_on, what
            )
            for tensors in run.sent:
                self.assertLessEqual(
                    tensors.keys(), {"hidden_states", "residual", "topk_indices"}
                )
                if "topk_indices" in tensors:
                    self.assertEqual(tensors["topk_indices"].dtype, torch.int32)
                    self.assertEqual(
                        tensors["topk_indices"].shape,
                        (len(batch.input_ids), INDEX_TOPK),
                    )

    def test_glm_5_2(self):
        config = model_config(78, index_topk_freq=4, index_skip_topk_offset=3)
        self.check(config, 2, handed_on=[True])

    def test_frequency_without_offset(self):
        # Layers 0 and 1 compute, then every index_topk_freq-th.
        config = model_config(8, index_topk_freq=3)
        self.check(config, 2, [2, 6], handed_on=[True])
        self.check(config, 2, [3, 5], handed_on=[True])
        self.check(config, 2, [4, 4], handed_on=[False])

    def test_pattern(self):
        config = pattern_config("FFSSFSSF")
        for first, handed_on in (
            (1, False),
            (2, True),
            (3, True),
            (4, False),
            (7, False),
        ):
            self.check(config, 2, [first, 8 - first], handed_on=[handed_on])

    def test_several_stages(self):
        config = pattern_config("FSSSSSSF")
        self.check(config, 4, [2, 2, 2, 2], handed_on=[True, True, True])
        self.check(config, 3, [1, 6, 1], handed_on=[True, False])
        self.check(config, 3, [3, 1, 4], handed_on=[True, True])

    def test_models_that_do_not_share(self):
        self.check(model_config(6), 2, handed_on=[False])
        self.check(pattern_config("FFFFFF"), 3, handed_on=[False, False])

    def test_model_with_dense_attention(self):
        config = model_config(4, architectures=["DeepseekV3ForCausalLM"])
        del config.index_topk
        stages = build_stages(config, 2)
        run = run_pipeline(stages, make_batch([3, 20]))
        self.assertEqual(run.sent[0].keys(), {"hidden_states", "residual"})

    def test_batches_do_not_share(self):
        config = pattern_config("FFSSFSSF")
        (whole,) = build_stages(config, 1)
        stages = build_stages(config, 2, [3, 5])
        for seq_lens in ([3, 20], [5], [20, 3, 11], [1]):
            batch = make_batch(seq_lens)
            expected = run_pipeline([whole], batch)
            self.assert_same_run(
                run_pipeline(stages, batch), expected, stages, f"{seq_lens=}"
            )

    def test_no_tokens(self):
        """A rank without requests under DP attention."""
        stages = build_stages(pattern_config("FSSSSSSF"), 3, [2, 3, 3])
        for mode in (ForwardMode.IDLE, ForwardMode.DECODE, ForwardMode.EXTEND):
            run = run_pipeline(stages, make_batch([], mode))
            self.assertEqual(run.output.shape, (0, HIDDEN_SIZE))
            for tensors in run.sent:
                self.assertIn(
                    "topk_indices",
                    tensors,
                    f"a batch without tokens ({mode.name}) was sent without the key of "
                    "other batches, which a CUDA graph expects",
                )
                self.assertEqual(tensors["topk_indices"].shape, (0, INDEX_TOPK))
                self.assertEqual(tensors["topk_indices"].dtype, torch.int32)

    def test_dense_prefill(self):
        """Below index_topk tokens no layer selects, and none needs indices."""
        config = pattern_config("FFSSFSSF")
        (whole,) = build_stages(config, 1)
        stages = build_stages(config, 2, [3, 5])
        attention = deepseek_v2.DeepseekV2AttentionMLA

        def concat(attention, k_nope, k_pe, forward_batch):
            k_pe = k_pe.expand(-1, attention.num_local_heads, -1)
            return torch.cat((k_nope, k_pe), -1)

        with (
            patch.object(attention, "_set_mla_kv_buffer", MagicMock()),
            patch.object(attention, "_concat_and_cast_mha_k", concat),
        ):
            expected = run_pipeline([whole], extend_batch(5), StubBackend(use_mha=True))
            run = run_pipeline(stages, extend_batch(5), StubBackend(use_mha=True))
        self.assertEqual(set(run.topk_indices.values()), {None})
        torch.testing.assert_close(run.output, expected.output)


class StubRunner(ModelRunner):
    """What the graph runner asks for, and the real methods."""

    def __init__(self, model, config, rank, server_args):
        group = SimpleNamespace(barrier=lambda: None)
        vars(self).update(
            server_args=server_args,
            device="cpu",
            gpu_id=0,
            model=model,
            model_config=SimpleNamespace(
                hidden_size=HIDDEN_SIZE,
                vocab_size=VOCAB_SIZE,
                dtype=torch.float32,
                is_encoder_decoder=False,
                hf_config=config,
                hf_text_config=config,
            ),
            pp_rank=rank,
            pp_size=server_args.pp_size,
            start_layer=model.start_layer,
            end_layer=model.end_layer,
            attn_backend=StubBackend(),
            attn_cp_size=1,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            is_draft_worker=False,
            is_generation=True,
            is_hybrid_swa=False,
            use_ngram_embedding=False,
            req_to_token_pool=SimpleNamespace(size=CAPTURE_BS[-1]),
            token_to_kv_pool=None,
            hisparse_coordinator=None,
            canary_manager=None,
            device_timer=None,
            # Since 0.5.15.
            graph_shared_output=SimpleNamespace(
                get_logits_buffer=lambda vocab_size, rows: torch.zeros(rows, vocab_size)
            ),
            tp_group=group,
        )


class StubGraph:
    """Runs what it captured again, into the output of the capture."""

    def capture(self, run_once):
        self.run_once, self.output = run_once, run_once()
        return self.output

    def replay(self):
        output = self.run_once()
        if isinstance(output, PPProxyTensors):
            for key, tensor in output.tensors.items():
                self.output.tensors[key].copy_(tensor)
        else:
            self.output.next_token_logits.copy_(output.next_token_logits)


class StubGraphBackend:
    """How graphs are captured since 0.5.14."""

    def __init__(self):
        self.graphs = {}

    def capture_one(self, shape_key, run_once, *args, **kwargs):
        self.graphs[shape_key] = StubGraph()
        self.graphs[shape_key].capture(run_once)

    def replay_session(self):
        return nullcontext()

    def replay(self, shape_key, *args, **kwargs):
        self.graphs[shape_key].replay()
        return self.graphs[shape_key].output


class StageRunner:
    """A stage under the real decode runner, with graphs that run on the CPU."""

    def __init__(self, model, config, rank, server_args):
        self.model_runner = StubRunner(model, config, rank, server_args)
        with (
            patch.object(DecodeRunner, "capture", lambda runner: None),
            patch.object(
                graph_runner,
                "get_batch_sizes_to_capture",
                lambda *args: (CAPTURE_BS, []),
            ),
            patch.object(
                graph_runner,
                "resolve_decode_backend",
                lambda runner: StubGraphBackend(),
                create=True,
            ),
        ):
            self.runner = DecodeRunner(self.model_runner)
        self.runner.device_module = MagicMock()
        self.runner.stream = None
        self.runner._create_device_graph = StubGraph
        self.runner._capture_graph = lambda graph, pool, stream, run_once: (
            graph.capture(run_once)
        )

    @property
    def backend(self):
        return self.model_runner.attn_backend

    @property
    def buffers(self):
        return self.runner.buffers.pp_proxy_tensors

    def capture(self):
        for bs in reversed(CAPTURE_BS):
            if hasattr(self.runner, "capture_one_shape"):
                self.runner.capture_one_shape(bs, self.model_runner.model.forward)
                continue
            graph, output = self.runner.capture_one_batch_size(
                bs, self.model_runner.model.forward
            )
            self.runner.graphs[bs], self.runner.output_buffers[bs] = graph, output

    def replay(self, batch, proxy_tensors=None):
        with attention_backend(self.backend, batch):
            if hasattr(self.runner, "execute"):
                return self.runner.execute(batch, pp_proxy_tensors=proxy_tensors)
            return self.runner.replay(batch, pp_proxy_tensors=proxy_tensors)

    def dummy_run(self, batch_size):
        if hasattr(self.model_runner, "_dummy_run"):
            self.model_runner._dummy_run(batch_size)
        else:  # since 0.5.14
            buffers = self.runner._alloc_dummy_decode_buffers(batch_size)
            self.runner._dummy_run(batch_size, buffers=buffers)


class TestDecodeGraphs(PipelineTestCase):
    """Stages under the CUDA graph runner."""

    def setUp(self):
        super().setUp()
        self.config = pattern_config("FFSSFSSF")

    def build(self, partition):
        self.stages = build_stages(self.config, len(partition), partition)
        runners = []
        for rank, stage in enumerate(self.stages):
            # Each stage is a process with buffers of its own.
            input_buffers._forward_input_buffer_pool.clear()
            runners.append(StageRunner(stage, self.config, rank, self.server_args))
        return runners

    def test_buffers_hold_what_is_sent(self):
        for partition, expected in (
            ([3, 5], {"hidden_states", "residual", "topk_indices"}),
            ([4, 4], {"hidden_states", "residual"}),
        ):
            first, second = self.build(partition)
            self.assertEqual(first.buffers.keys(), {"hidden_states", "residual"})
            self.assertEqual(
                second.buffers.keys(),
                expected,
                f"the buffers of a decode graph of a stage that begins with layer "
                f"{partition[0]} are {sorted(second.buffers)}",
            )
            for batch in (make_batch([3, 20]), make_batch([], ForwardMode.IDLE)):
                sent = run_pipeline(self.stages, batch).sent[0]
                self.assertEqual(sent.keys(), second.buffers.keys())
                for key, tensor in sent.items():
                    buffer = second.buffers[key]
                    self.assertEqual(tensor.dtype, buffer.dtype, key)
                    self.assertEqual(tensor.shape[1:], buffer.shape[1:], key)
                    self.assertEqual(buffer.shape[0], CAPTURE_BS[-1], key)

    def test_replay(self):
        """Any sequence of batches, captured sizes larger than the batch included."""
        (whole,) = build_stages(self.config, 1)
        for partition in ([3, 5], [2, 1, 5], [4, 4]):
            runners = self.build(partition)
            for runner in runners:
                runner.capture()
            for seq_lens in ([3, 20, 7], [5], [], [9, 1, 30, 4, 25], [2, 2], [6] * 8):
                what = f"CUDA graphs of {partition=}, {seq_lens=}"
                expected = run_pipeline([whole], make_batch(seq_lens))
                topk_indices, proxy_tensors = {}, None
                for runner in runners:
                    batch = make_batch(
                        seq_lens, ForwardMode.DECODE if seq_lens else ForwardMode.IDLE
                    )
                    output = runner.replay(batch, proxy_tensors)
                    topk_indices |= runner.backend.topk_indices
                    if runner is not runners[-1]:
                        proxy_tensors = over_the_wire(output)
                # What is behind the batch is padding.
                run = Run(
                    output.next_token_logits,
                    {
                        layer_id: None if indices is None else indices[: len(seq_lens)]
                        for layer_id, indices in topk_indices.items()
                    },
                    None,
                )
                self.assert_same_run(run, expected, self.stages, what)

    def test_dummy_run(self):
        """Warmup and profiling begin in each stage with buffers of their own."""
        for partition in ([3, 5], [4, 4]):
            _, second = self.build(partition)
            second.backend.topk_indices.clear()
            second.dummy_run(4)
            used = second.backend.topk_indices
            self.assertEqual(set(used), set(range(partition[0], 8)))
            if self.config.index_topk_pattern[partition[0]] == "S":
                indices = used[partition[0]]
                self.assertTrue(
                    indices is not None
                    and torch.equal(indices, torch.zeros(4, INDEX_TOPK).int()),
                    f"layer {partition[0]}, the first of its stage, began a dummy run "
                    f"with the indices {indices}, not with those of the buffers",
                )


if __name__ == "__main__":
    unittest.main()
