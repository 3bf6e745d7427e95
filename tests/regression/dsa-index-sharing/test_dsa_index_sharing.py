"""Regression tests for DeepSeek sparse attention with a top-k shared across layers.

GLM-5.2 and other GlmMoeDsaForCausalLM checkpoints, and DeepSeek-V3.2 ones with
index_topk_freq or index_topk_pattern, run their indexer in some layers only; the
layers between reuse the indices of the layer before. Below index_topk tokens of
context every token is selected and no mistake shows in the output, so these tests
count the indexer's runs and compare the indices that reach the attention kernel.

The real configuration parser, models and attention layers run, on the CPU. What stands
in for a GPU kernel or a process group is a stub: the linear layers, norms, MoE and
communicator, the indexer's kernels (it counts instead) and the attention backend (it
records what it would read).
"""

import dataclasses
import importlib
import json
import os
import shutil
import sys
import tempfile
import unittest
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import huggingface_hub.constants
import torch
from torch import nn
from transformers import AutoConfig

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.models import deepseek_v2
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.utils.hf_transformers_utils import get_config

try:
    from sglang.srt.layers.attention import dsa_backend  # noqa: F401

    SPARSE_BACKEND = "dsa"
except ImportError:
    SPARSE_BACKEND = "nsa"

try:  # since 0.5.14
    from sglang.srt.model_executor import runner as graph_runner
except ImportError:
    from sglang.srt.model_executor import cuda_graph_runner as graph_runner

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

HIDDEN_SIZE = 8
NUM_HEADS = 2
QK_NOPE_HEAD_DIM = 4
QK_ROPE_HEAD_DIM = 2
V_HEAD_DIM = 4
Q_LORA_RANK = 4
KV_LORA_RANK = 4
INDEX_TOPK = 8

# What the models need, small enough that 78 layers take a fraction of a second.
TINY_MODEL = dict(
    vocab_size=32,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=HIDDEN_SIZE,
    moe_intermediate_size=HIDDEN_SIZE,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=NUM_HEADS,
    qk_nope_head_dim=QK_NOPE_HEAD_DIM,
    qk_rope_head_dim=QK_ROPE_HEAD_DIM,
    v_head_dim=V_HEAD_DIM,
    q_lora_rank=Q_LORA_RANK,
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

GLM = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 8,
}

# The schedule of the released GLM-5.2.
GLM_5_2 = {
    **GLM,
    "num_hidden_layers": 78,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_share_for_mtp_iteration": True,
}
GLM_5_2_COMPUTING_LAYERS = [0, 1, 2] + list(range(6, 78, 4))


def model_config(num_hidden_layers, **kwargs):
    return SimpleNamespace(
        architectures=["DeepseekV32ForCausalLM"],
        num_hidden_layers=num_hidden_layers,
        **{**TINY_MODEL, **kwargs},
    )


def write_config(folder, config):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        # Not sorted: the order of the keys matters to one of the tests.
        json.dump(config, f)


class ConfigOnDiskTestCase(CustomTestCase):
    """Each configuration gets a directory of its own: get_config keeps a cache."""

    def setUp(self):
        super().setUp()
        self.root = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.root)
        self.num_configs = 0

    def write(self, *configs, **kwargs):
        folder = os.path.join(self.root, str(self.num_configs))
        self.num_configs += 1
        merged = {}
        for config in (*configs, kwargs):
            merged.update(config)
        write_config(folder, merged)
        return folder

    def parse(self, *configs, **kwargs):
        return get_config(self.write(*configs, **kwargs), trust_remote_code=False)


class TestConfig(ConfigOnDiskTestCase):
    """transformers < 5.10 drops and overwrites keys of GlmMoeDsaConfig."""

    def assert_as_in_the_file(self, config, **expected):
        for key, value in expected.items():
            self.assertEqual(
                getattr(config, key, None),
                value,
                f"config.json says {key}={value!r}, the parsed configuration has "
                f"{getattr(config, key, None)!r}",
            )

    def test_index_topk_freq(self):
        for freq in (4, 2, 1):
            config = self.parse(GLM, index_topk_freq=freq)
            self.assert_as_in_the_file(config, index_topk_freq=freq)

    def test_index_topk_pattern(self):
        config = self.parse(GLM, index_topk_pattern="FFSSFSSS")
        self.assert_as_in_the_file(config, index_topk_pattern="FFSSFSSS")

    def test_offset_and_mtp_sharing(self):
        keys = {"index_skip_topk_offset": 3, "index_share_for_mtp_iteration": True}
        path = self.write(GLM, keys, index_topk_freq=4)
        for is_draft_model in (False, True):
            config = ModelConfig(path, is_draft_model=is_draft_model).hf_config
            self.assert_as_in_the_file(config, **keys)

    def test_qk_rope_head_dim_before_head_dim(self):
        # GLM-5.2 has both, and GlmMoeDsaConfig makes the second an alias of the first.
        config = self.parse(
            GLM, qk_nope_head_dim=192, qk_rope_head_dim=64, head_dim=192
        )
        self.assert_as_in_the_file(config, qk_rope_head_dim=64, qk_nope_head_dim=192)
        self.assertEqual(config.qk_head_dim, 192 + 64)

    def test_qk_rope_head_dim_after_head_dim(self):
        config = self.parse(
            GLM, head_dim=192, qk_nope_head_dim=192, qk_rope_head_dim=64
        )
        self.assert_as_in_the_file(config, qk_rope_head_dim=64, qk_nope_head_dim=192)
        self.assertEqual(config.qk_head_dim, 192 + 64)

    def test_qk_rope_head_dim_alone(self):
        config = self.parse(GLM, qk_nope_head_dim=128, qk_rope_head_dim=32)
        self.assert_as_in_the_file(config, qk_rope_head_dim=32, qk_nope_head_dim=128)
        self.assertEqual(config.qk_head_dim, 128 + 32)

    def test_qk_head_dim_is_the_sum_of_its_parts(self):
        for dims in (
            {"head_dim": 96},
            {"head_dim": 96, "qk_rope_head_dim": 32},
            {"qk_rope_head_dim": 32, "qk_head_dim": 7},
        ):
            config = self.parse(GLM, dims, qk_nope_head_dim=128)
            self.assertEqual(
                config.qk_head_dim,
                config.qk_nope_head_dim + config.qk_rope_head_dim,
                f"qk_head_dim is not qk_nope_head_dim + qk_rope_head_dim for {dims}",
            )

    def test_missing_keys_stay_at_their_defaults(self):
        config = self.parse(GLM)
        default = type(config)()
        self.assertEqual(config.qk_rope_head_dim, default.qk_rope_head_dim)
        self.assertEqual(config.qk_nope_head_dim, default.qk_nope_head_dim)
        self.assertEqual(config.qk_head_dim, default.qk_head_dim)
        self.assertEqual(
            getattr(config, "index_topk_freq", 1),
            getattr(default, "index_topk_freq", 1),
        )
        self.assertIsNone(getattr(config, "index_topk_pattern", None))
        self.assertIsNone(getattr(config, "index_skip_topk_offset", None))

    def test_revision(self):
        repo = os.path.join(self.root, "models--sglang-test--glm-tiny")
        revisions = {
            "main": ("a" * 40, {"index_topk_freq": 2, "qk_rope_head_dim": 32}),
            "next": ("b" * 40, {"index_topk_freq": 4, "qk_rope_head_dim": 16}),
        }
        os.makedirs(os.path.join(repo, "refs"))
        for name, (commit, keys) in revisions.items():
            with open(os.path.join(repo, "refs", name), "w") as f:
                f.write(commit)
            write_config(
                os.path.join(repo, "snapshots", commit),
                {**GLM, "head_dim": 192, **keys},
            )

        constants = huggingface_hub.constants
        with (
            patch.object(constants, "HF_HUB_CACHE", self.root),
            patch.object(constants, "HF_HUB_OFFLINE", True),
        ):
            for name, (commit, keys) in revisions.items():
                for revision in (name, commit):
                    config = get_config(
                        "sglang-test/glm-tiny",
                        trust_remote_code=False,
                        revision=revision,
                    )
                    self.assert_as_in_the_file(config, **keys)
            config = get_config("sglang-test/glm-tiny", trust_remote_code=False)
            self.assert_as_in_the_file(config, **revisions["main"][1])

    def test_other_architectures_are_untouched(self):
        keys = ("head_dim", "qk_rope_head_dim", "qk_head_dim", "index_topk_freq")
        for other in (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
            {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"},
        ):
            path = self.write(
                other, head_dim=48, index_topk_freq=4, num_hidden_layers=2
            )
            expected = AutoConfig.from_pretrained(path)
            config = get_config(path, trust_remote_code=False)
            self.assertEqual(
                {key: getattr(config, key, None) for key in keys},
                {key: getattr(expected, key, None) for key in keys},
                other,
            )

    def test_override_args_win(self):
        path = self.write(GLM, head_dim=192, qk_rope_head_dim=64, index_topk_freq=4)
        overrides = {"index_topk_freq": 2, "qk_rope_head_dim": 32}
        config = get_config(
            path, trust_remote_code=False, model_override_args=overrides
        )
        self.assert_as_in_the_file(config, **overrides)

        path = self.write(GLM, head_dim=192, qk_rope_head_dim=64, index_topk_freq=4)
        config = ModelConfig(path, model_override_args=json.dumps(overrides)).hf_config
        self.assert_as_in_the_file(config, **overrides)


class StubLinear(nn.Module):
    def __init__(self, input_size, output_size, *args, reduce_results=False, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(output_size, input_size), requires_grad=False
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
        return x if residual is None else (x, residual)


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
        return torch.zeros(input_ids.shape[0], self.embedding_dim)


class StubMLP(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


class StubMoE(StubMLP):
    pass


class StubCommunicator:
    """What LayerCommunicator does where there is one rank only."""

    def __init__(self, *args, qkv_latent_func=None, **kwargs):
        self.qkv_latent_func = qkv_latent_func

    def prepare_attn(self, hidden_states, residual, forward_batch, *args, **kwargs):
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(hidden_states, forward_batch, self.qkv_latent_func)
        )
        return hidden_states, hidden_states if residual is None else residual

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


class CountingIndexer(nn.Module):
    """An indexer that writes down its runs. No two runs return the same indices.

    As the real one it selects at most index_topk of the position + 1 tokens of the
    context and fills the rest of a row with -1.
    """

    def __init__(self, *args, layer_id, index_topk, runs, **kwargs):
        super().__init__()
        self.layer_id = layer_id
        self.index_topk = index_topk
        self.runs = runs

    def forward(self, *args, positions=None, **kwargs):
        if positions is None:  # NPU passes hidden_states, q_lora, positions, ...
            positions = args[2]
        num_valid = (positions + 1).clamp(max=self.index_topk)
        columns = torch.arange(self.index_topk, dtype=torch.int32)
        rows = torch.arange(positions.shape[0], dtype=torch.int32).unsqueeze(1)
        first = 10000 * (len(self.runs) + 1)
        topk_indices = torch.where(
            columns < num_valid.unsqueeze(1), first + 100 * rows + columns, -1
        ).to(torch.int32)
        self.runs.append((self.layer_id, topk_indices))
        return topk_indices


@contextmanager
def cpu_layers(runs):
    """Builds the real models with stubs for what needs a GPU or a process group.

    The indexers write their runs into `runs` as (layer id, indices).
    """

    def indexer(*args, **kwargs):
        return CountingIndexer(*args, runs=runs, **kwargs)

    one_rank = SimpleNamespace(
        is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1
    )
    stubs = {
        "ReplicatedLinear": StubLinear,
        "ColumnParallelLinear": StubLinear,
        "RowParallelLinear": StubLinear,
        "RMSNorm": StubNorm,
        "VocabParallelEmbedding": StubEmbedding,
        "get_pp_group": lambda: one_rank,
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
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(patch.object(deepseek_v2, name, stub, create=True))
        yield


def finish_loading(model):
    """The weights that post_load_weights takes from kv_b_proj."""
    for module in model.modules():
        if isinstance(module, deepseek_v2.DeepseekV2AttentionMLA):
            module.w_kc = torch.zeros(NUM_HEADS, QK_NOPE_HEAD_DIM, KV_LORA_RANK)
            module.w_vc = torch.zeros(NUM_HEADS, KV_LORA_RANK, V_HEAD_DIM)
    return model.requires_grad_(False)


def build_attention(config, layer_id, runs, is_nextn=False, alt_stream=None):
    with cpu_layers(runs):
        return finish_loading(
            deepseek_v2.DeepseekV2AttentionMLA(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                qk_nope_head_dim=config.qk_nope_head_dim,
                qk_rope_head_dim=config.qk_rope_head_dim,
                v_head_dim=config.v_head_dim,
                q_lora_rank=config.q_lora_rank,
                kv_lora_rank=config.kv_lora_rank,
                layer_id=layer_id,
                reduce_results=False,
                alt_stream=alt_stream,
                is_nextn=is_nextn,
            )
        )


class RecordingBackend:
    """An attention backend that writes down the indices each layer attends to."""

    use_mha = False
    # The backend says it since 0.5.15.
    prefill_attention_backend_str = decode_attention_backend_str = SPARSE_BACKEND

    def __init__(self):
        self.topk_indices = {}

    def forward(
        self, q, k, v, layer, forward_batch, *args, topk_indices=None, **kwargs
    ):
        self.topk_indices[layer.layer_id] = topk_indices
        return q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)


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


def make_forward_batch(**kwargs):
    """A ForwardBatch, less the fields that this release does not have."""
    known = {field.name for field in dataclasses.fields(ForwardBatch)}
    return ForwardBatch(**{k: v for k, v in kwargs.items() if k in known})


def make_decode_batch(seq_lens, **kwargs):
    seq_lens = torch.tensor(seq_lens, dtype=torch.int64)
    num_seqs = len(seq_lens)
    return make_forward_batch(
        **{
            "forward_mode": ForwardMode.DECODE,
            "batch_size": num_seqs,
            "input_ids": torch.arange(num_seqs),
            "req_pool_indices": torch.arange(num_seqs),
            "seq_lens": seq_lens,
            "seq_lens_cpu": seq_lens.clone(),
            "seq_lens_sum": int(seq_lens.sum()),
            "out_cache_loc": torch.arange(num_seqs),
            "positions": seq_lens - 1,
            **kwargs,
        }
    )


def one_rank():
    """A process without a process group; since 0.5.14 one place says its ranks."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:
        return nullcontext()
    names = ("tp", "moe_ep", "attn_tp", "attn_cp", "attn_dp")
    return get_parallel().override(
        **{f"{name}_size": 1 for name in names}, **{f"{name}_rank": 0 for name in names}
    )


class ModelTestCase(ConfigOnDiskTestCase):
    @classmethod
    def setUpClass(cls):
        server_args = ServerArgs(model_path="dummy", device="cpu")
        server_args.attention_backend = SPARSE_BACKEND
        server_args.prefill_attention_backend = SPARSE_BACKEND
        server_args.decode_attention_backend = SPARSE_BACKEND
        set_global_server_args_for_scheduler(server_args)

    def setUp(self):
        super().setUp()
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(torch.no_grad())
        stack.enter_context(one_rank())
        # Compiling takes longer than everything else here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))

    def assert_indices(self, actual, expected, message):
        self.assertIsNotNone(actual, message)
        self.assertTrue(torch.equal(actual, expected), message)


def computing_layers(num_layers, freq, offset):
    """The definition: layer l computes where max(l - offset + 1, 0) % freq is 0."""
    return [l for l in range(num_layers) if max(l - offset + 1, 0) % freq == 0]


class TestSchedule(ModelTestCase):
    """Which layers of a whole model run their indexer in one forward pass."""

    def run_model(self, config):
        """Returns the indexer's runs, and for each layer the indices that it attended
        to and those that it handed on."""
        runs, handed_on = [], []
        with cpu_layers(runs):
            model = finish_loading(deepseek_v2.DeepseekV2Model(config))
        for layer in model.layers:
            layer.self_attn.register_forward_hook(
                lambda attention, inputs, output: handed_on.append(output[1])
            )
        batch = make_decode_batch([3, 20])
        backend = RecordingBackend()
        with attention_backend(backend, batch):
            model(batch.input_ids, batch.positions, batch)
        return runs, backend.topk_indices, handed_on

    def assert_schedule(self, config, expected, what):
        runs, used, handed_on = self.run_model(config)
        computed = [layer_id for layer_id, _ in runs]
        if computed != expected:
            self.fail(
                f"{what}: layers {computed} ran their indexer, the schedule says "
                f"{expected}"
            )
        indices = None
        found = dict(runs)
        for layer_id in range(config.num_hidden_layers):
            indices = found.get(layer_id, indices)
            self.assert_indices(
                used[layer_id],
                indices,
                f"{what}: layer {layer_id} did not attend to the indices of the last "
                "layer that ran its indexer",
            )
        for layer_id in range(config.num_hidden_layers - 1):
            self.assertEqual(
                handed_on[layer_id] is not None,
                layer_id + 1 not in found,
                f"{what}: layer {layer_id} does not agree with layer {layer_id + 1} "
                "on whether that one shares",
            )

    def test_glm_5_2(self):
        self.assertEqual(len(GLM_5_2_COMPUTING_LAYERS), 21)
        config = model_config(78, index_topk_freq=4, index_skip_topk_offset=3)
        self.assert_schedule(config, GLM_5_2_COMPUTING_LAYERS, "GLM-5.2")

    def test_glm_5_2_from_its_config_file(self):
        config = self.parse(TINY_MODEL, GLM_5_2, head_dim=QK_NOPE_HEAD_DIM)
        self.assert_schedule(
            config, GLM_5_2_COMPUTING_LAYERS, "GLM-5.2 from config.json"
        )

    def test_pattern_from_its_config_file(self):
        config = self.parse(TINY_MODEL, GLM, index_topk_pattern="FFSFSSSF")
        self.assert_schedule(config, [0, 1, 3, 7], "index_topk_pattern of config.json")

    def test_offset_and_frequency(self):
        for offset in (1, 2, 3, 5, 8):
            for freq in (1, 2, 3, 4, 7):
                for num_layers in (1, 2, 11):
                    config = model_config(
                        num_layers, index_topk_freq=freq, index_skip_topk_offset=offset
                    )
                    self.assert_schedule(
                        config,
                        computing_layers(num_layers, freq, offset),
                        f"index_skip_topk_offset={offset}, index_topk_freq={freq}, "
                        f"{num_layers} layers",
                    )

    def test_no_offset(self):
        # Layers 0 and 1 compute, then every index_topk_freq-th: as before the offset.
        for freq in (1, 2, 3, 4, 7):
            for kwargs in ({}, {"index_skip_topk_offset": None}):
                config = model_config(11, index_topk_freq=freq, **kwargs)
                expected = [l for l in range(11) if max(l - 1, 0) % freq == 0]
                self.assert_schedule(config, expected, f"index_topk_freq={freq}")

    def test_no_sharing(self):
        for kwargs in ({}, {"index_skip_topk_offset": 3}):
            self.assert_schedule(
                model_config(5, **kwargs), [0, 1, 2, 3, 4], "no index_topk_freq"
            )

    def test_null_frequency(self):
        # Of DeepSeek's: GlmMoeDsaConfig takes none.
        for kwargs in ({}, {"index_skip_topk_offset": 3}):
            config = model_config(5, index_topk_freq=None, **kwargs)
            self.assert_schedule(config, [0, 1, 2, 3, 4], "index_topk_freq=None")

    def test_pattern(self):
        for pattern in ("F", "FS", "FSSSS", "FFFFF", "FSFSSFF", "FFSSSFSSS"):
            expected = [l for l, kind in enumerate(pattern) if kind == "F"]
            for kwargs in ({}, {"index_topk_freq": 3, "index_skip_topk_offset": 4}):
                for value in (pattern, list(pattern)):
                    config = model_config(
                        len(pattern), index_topk_pattern=value, **kwargs
                    )
                    self.assert_schedule(
                        config, expected, f"index_topk_pattern={value}, {kwargs}"
                    )

    def test_offset_must_be_positive(self):
        for offset in (0, -1, -4):
            config = model_config(4, index_topk_freq=4, index_skip_topk_offset=offset)
            for layer_id in (0, 3):
                try:
                    build_attention(config, layer_id, runs=[])
                except (ValueError, AssertionError) as e:
                    self.assertIn("index_skip_topk_offset", str(e))
                    continue
                self.fail(
                    f"index_skip_topk_offset={offset} was accepted: layer 0 would have "
                    "nothing to reuse"
                )


class GateTestCase(ModelTestCase):
    """One layer, with and without the indices of the layer before."""

    # Layer 0 of four computes, layers 1 to 3 share, for any offset.
    config = model_config(4, index_topk_pattern="FSSS")
    previous = torch.full((2, INDEX_TOPK), 7, dtype=torch.int32)

    def run_layer(self, layer_id, previous, is_nextn=False):
        """Returns the indexer's runs, the indices used, those for the next layer."""
        raise NotImplementedError()

    def assert_computes(self, what, layer_id, previous, **kwargs):
        runs, used, next_indices = self.run_layer(layer_id, previous, **kwargs)
        self.assertEqual(len(runs), 1, f"{what} did not run its indexer")
        self.assert_indices(used, runs[0][1], f"{what} used other indices")
        self.assert_indices(next_indices, used, f"{what} did not hand on its indices")

    def assert_reuses(self, what, layer_id, previous, **kwargs):
        runs, used, next_indices = self.run_layer(layer_id, previous, **kwargs)
        self.assertEqual(len(runs), 0, f"{what} ran its indexer")
        self.assert_indices(used, previous, f"{what} used other indices")
        self.assert_indices(next_indices, used, f"{what} did not hand on its indices")


class GateTests:
    def test_sharing_layer_without_previous_indices(self):
        # E.g. the first layer of a pipeline stage.
        runs, _, _ = self.run_layer(1, None)
        self.assertEqual(
            len(runs),
            0,
            "a sharing layer without previous indices ran its indexer, which has no "
            "weights in the checkpoint",
        )

    def test_sharing_layer_with_previous_indices(self):
        self.assert_reuses("a sharing layer with previous indices", 1, self.previous)

    def test_computing_layer(self):
        self.assert_computes("a computing layer", 0, None)
        self.assert_computes(
            "a computing layer with previous indices", 0, self.previous
        )

    def test_nextn_layer_without_previous_indices(self):
        self.assert_computes("the nextn layer", 0, None, is_nextn=True)

    def test_nextn_layer_with_previous_indices(self):
        self.assert_reuses(
            "the nextn layer with the indices of an earlier draft step",
            0,
            self.previous,
            is_nextn=True,
        )


class TestGate(GateTests, GateTestCase):
    """Eager: everything on one stream."""

    forward_mode = ForwardMode.DECODE
    capture_mode = False
    num_overlaps = 0

    def run_layer(self, layer_id, previous, is_nextn=False):
        runs = []
        alt_stream = MagicMock()
        attention = build_attention(
            self.config, layer_id, runs, is_nextn=is_nextn, alt_stream=alt_stream
        )
        batch = make_decode_batch([3, 20], forward_mode=self.forward_mode)
        backend = RecordingBackend()
        hidden_states = torch.zeros(2, HIDDEN_SIZE)
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(hidden_states, batch, attention.prepare_qkv_latent)
        )
        with (
            attention_backend(backend, batch),
            patch.object(
                graph_runner, "get_is_capture_mode", return_value=self.capture_mode
            ),
            patch("torch.cuda.current_stream", MagicMock()),
            patch("torch.cuda.stream", lambda stream: nullcontext()),
        ):
            output = attention(
                positions=batch.positions,
                hidden_states=hidden_states,
                forward_batch=batch,
                zero_allocator=None,
                prev_topk_indices=previous,
            )
        self.assertEqual(alt_stream.wait_stream.call_count, self.num_overlaps)
        return runs, backend.topk_indices[layer_id], output[1]


class TestGateOverlapped(TestGate):
    """Capture of a decode graph: norms on two streams, then projection and indexer."""

    capture_mode = True
    num_overlaps = 2


class TestGateVerify(TestGate):
    """Capture of a verify graph: norms on two streams, the indexer on its own."""

    forward_mode = ForwardMode.TARGET_VERIFY
    capture_mode = True
    num_overlaps = 1


class TestGateNpu(GateTests, GateTestCase):
    def run_layer(self, layer_id, previous, is_nextn=False):
        stubs = (
            "torch_npu",
            "sgl_kernel_npu",
            "sgl_kernel_npu.norm",
            "sgl_kernel_npu.norm.fused_split_qk_norm",
        )
        with patch.dict(sys.modules, {name: MagicMock() for name in stubs}):
            npu = importlib.import_module(
                "sglang.srt.hardware_backend.npu.modules.deepseek_v2_attention_mla_npu"
            )

        def fused_split_qk_norm(x, q_norm, k_norm, q_rank, k_rank, rope_dim, eps):
            q, k_nope, k_rope = x.split([q_rank, k_rank, rope_dim], dim=-1)
            return q, k_nope.unsqueeze(1), k_rope.unsqueeze(1)

        runs = []
        attention = build_attention(self.config, layer_id, runs, is_nextn=is_nextn)
        batch = make_decode_batch([3, 20], forward_mode=ForwardMode.EXTEND)
        backend = RecordingBackend()
        with (
            attention_backend(backend, batch),
            patch.object(npu, "fused_split_qk_norm", fused_split_qk_norm),
        ):
            state = npu.forward_dsa_prepare_npu(
                attention,
                batch.positions,
                torch.zeros(2, HIDDEN_SIZE),
                batch,
                zero_allocator=None,
                layer_scatter_modes=None,
                prev_topk_indices=previous,
            )
            output = npu.forward_dsa_core_npu(attention, *state)
        return runs, backend.topk_indices[layer_id], output[1]


class TestGateDensePrefill(ModelTestCase):
    """Below index_topk tokens the indexer only stores its keys for later."""

    def num_runs(self, layer_id, is_nextn=False):
        runs = []
        attention = build_attention(
            GateTestCase.config, layer_id, runs, is_nextn=is_nextn
        )
        batch = make_decode_batch([3, 20], forward_mode=ForwardMode.EXTEND)
        hidden_states = torch.zeros(2, HIDDEN_SIZE)
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(hidden_states, batch, attention.prepare_qkv_latent)
        )
        with (
            attention_backend(RecordingBackend(), batch),
            patch.object(attention, "_set_mla_kv_buffer", MagicMock()),
            patch.object(attention, "_concat_and_cast_mha_k", MagicMock()),
        ):
            attention.forward_normal_prepare(
                batch.positions, hidden_states, batch, zero_allocator=None
            )
        return len(runs)

    def test_sharing_layer(self):
        self.assertEqual(
            self.num_runs(1),
            0,
            "a sharing layer ran its indexer in dense prefill, which has no weights in "
            "the checkpoint",
        )

    def test_layers_with_an_indexer(self):
        self.assertEqual(self.num_runs(0), 1)
        self.assertEqual(self.num_runs(0, is_nextn=True), 1)


class TestTwoBatchOverlapRefusal(ConfigOnDiskTestCase):
    """Two-batch overlap drops the indices between layers, or between stages."""

    DEEPSEEK_V32 = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "num_hidden_layers": 8,
    }

    def start(self, *configs, enable_two_batch_overlap=True, pp_size=1, **kwargs):
        path = self.write(TINY_MODEL, *configs, **kwargs)
        # Model-specific defaults are written to the environment.
        with (
            patch.dict(os.environ),
            patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        ):
            server_args = ServerArgs(
                model_path=path,
                device="cpu",
                moe_a2a_backend="deepep",
                enable_two_batch_overlap=enable_two_batch_overlap,
                pp_size=pp_size,
            )
            server_args.check_server_args()

    def assert_refused(self, *configs, **sharing):
        try:
            # A pipeline that carries the indices has none for the next stage.
            self.start(*configs, pp_size=2, **sharing)
        except ValueError as e:
            for setting in ("enable-two-batch-overlap", *sharing):
                self.assertIn(setting, str(e))
        else:
            self.fail(
                "two-batch overlap was accepted for a model that shares indices "
                f"across layers: {sharing}"
            )

    def test_deepseek_with_frequency(self):
        self.assert_refused(self.DEEPSEEK_V32, index_topk_freq=4)

    def test_deepseek_with_pattern(self):
        self.assert_refused(self.DEEPSEEK_V32, index_topk_pattern="FSFSFSFS")

    def test_glm_with_frequency(self):
        self.assert_refused(GLM, index_topk_freq=4)

    def test_glm_with_pattern(self):
        self.assert_refused(GLM, index_topk_pattern="FSFSFSFS")

    def test_without_sharing(self):
        for model in (GLM, self.DEEPSEEK_V32):
            for kwargs in (
                {},
                {"index_topk_freq": 1},
                {"index_topk_freq": 1, "index_skip_topk_offset": 3},
                {"index_topk_pattern": "FFFFFFFF"},
            ):
                self.start(model, **kwargs)

    def test_null_frequency(self):
        self.start(self.DEEPSEEK_V32, index_topk_freq=None)

    def test_without_two_batch_overlap(self):
        for model in (GLM, self.DEEPSEEK_V32):
            for kwargs in (
                {"index_topk_freq": 4},
                {"index_topk_pattern": "FSFSFSFS"},
            ):
                self.start(model, enable_two_batch_overlap=False, **kwargs)


if __name__ == "__main__":
    unittest.main()
