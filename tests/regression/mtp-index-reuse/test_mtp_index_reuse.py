"""Regression tests for DSA top-k indices reused across the steps of a draft iteration.

GLM-5.2 (index_share_for_mtp_iteration) selects tokens once in a draft iteration: the
first step runs the next-token layer's indexer, later steps attend to what it found.
Only the time shows when they do not, so these tests count the indexer's runs and
compare the indices that reach the attention backend.

The real draft workers, model runner, next-token model and attention layer run, on the
CPU. What stands in for a GPU kernel or a process group is a stub: the linear layers,
norms and rotary embedding, the indexer (it counts instead) and the attention backend
(it records the indices).
"""

import copy
import dataclasses
import importlib
import unittest
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.environ import envs
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models import deepseek_nextn, deepseek_v2
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.eagle_info import EagleDraftInput

try:  # since 0.5.13
    from sglang.srt.model_executor.forward_context import (
        ForwardContext,
        forward_context,
    )

    SPARSE_BACKEND = "dsa"
except ImportError:
    forward_context = None
    SPARSE_BACKEND = "nsa"

try:  # since 0.5.14
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner
except ImportError:
    EagerRunner = None

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

HIDDEN_SIZE = 8
NUM_HEADS = 2
NOPE, ROPE, V_HEAD_DIM = 4, 2, 4
KV_LORA_RANK = 4
INDEX_TOPK = 8
VOCAB_SIZE = 32


def model_config(**kwargs):
    return SimpleNamespace(
        architectures=["DeepseekV3ForCausalLMNextN"],
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=V_HEAD_DIM,
        q_lora_rank=4,
        kv_lora_rank=KV_LORA_RANK,
        index_topk=INDEX_TOPK,
        index_head_dim=4,
        index_n_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **kwargs,
    )


class StubLinear(nn.Linear):
    def __init__(self, input_size, output_size, *args, reduce_results=False, **kwargs):
        super().__init__(input_size, output_size, bias=False)
        self.quant_method = None
        self.reduce_results = reduce_results

    def forward(self, x):
        return super().forward(x), None


class StubNorm(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, x):
        return x


class StubEmbedding(nn.Embedding):
    def __init__(self, num_embeddings, embedding_dim, **kwargs):
        super().__init__(num_embeddings, embedding_dim)


class StubRope(nn.Module):
    is_neox_style = False
    cos_sin_cache = torch.zeros(4096, ROPE)

    def forward(self, positions, q, k):
        return q, k


class CountingIndexer(nn.Module):
    """An indexer that writes down its runs. No two runs return the same indices."""

    def __init__(self, runs):
        super().__init__()
        self.runs = runs

    def forward(self, x, **kwargs):
        first = 1000 * (len(self.runs) + 1)
        topk_indices = torch.arange(x.shape[0] * INDEX_TOPK, dtype=torch.int32) + first
        topk_indices = topk_indices.view(-1, INDEX_TOPK)
        self.runs.append((topk_indices.clone(), weakref.ref(topk_indices)))
        return topk_indices


class AttentionLayer(nn.Module):
    """A decoder layer with nothing but its attention."""

    def __init__(self, config, layer_id, is_nextn, **kwargs):
        super().__init__()
        self.self_attn = attention = deepseek_v2.DeepseekV2AttentionMLA(
            config=config,
            hidden_size=HIDDEN_SIZE,
            num_heads=NUM_HEADS,
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=ROPE,
            v_head_dim=V_HEAD_DIM,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=KV_LORA_RANK,
            layer_id=layer_id,
            reduce_results=False,
            is_nextn=is_nextn,
        )
        # Taken from kv_b_proj after loading.
        attention.w_kc = torch.zeros(NUM_HEADS, NOPE, KV_LORA_RANK)
        attention.w_vc = torch.zeros(NUM_HEADS, KV_LORA_RANK, V_HEAD_DIM)

    def forward(
        self,
        positions,
        hidden_states,
        forward_batch,
        residual,
        zero_allocator,
        **kwargs,
    ):
        get_attn_tp_context().set_attn_inputs(
            AttentionInputs(
                hidden_states, forward_batch, self.self_attn.prepare_qkv_latent
            )
        )
        topk_indices = None
        output = self.self_attn(
            positions, hidden_states, forward_batch, zero_allocator, **kwargs
        )
        if isinstance(output, tuple):  # not so for a batch without tokens
            output, topk_indices = output
        if hasattr(get_attn_tp_context(), "clear_attn_inputs"):  # since 0.5.13
            get_attn_tp_context().clear_attn_inputs()
        return output, residual, topk_indices


class DraftModel(nn.Module):
    """The real next-token model; its next token is the successor of the last one."""

    def __init__(self, config, runs):
        super().__init__()
        both = {"RMSNorm": StubNorm, "ReplicatedLinear": StubLinear}
        nextn = {
            "DeepseekV2DecoderLayer": AttentionLayer,
            "VocabParallelEmbedding": StubEmbedding,
            "get_embedding_tp_kwargs": dict,
        }
        attention = {
            "ColumnParallelLinear": StubLinear,
            "RowParallelLinear": StubLinear,
            "Indexer": lambda *args, **kwargs: CountingIndexer(runs),
            "get_rope_wrapper": lambda *args, **kwargs: StubRope(),
            "get_attention_tp_rank": lambda: 0,
            "get_attention_tp_size": lambda: 1,
        }
        with ExitStack() as stack:
            for module, stubs in (
                (deepseek_nextn, both | nextn),
                (deepseek_v2, both | attention),
            ):
                for name, stub in stubs.items():
                    stack.enter_context(patch.object(module, name, stub, create=True))
            self.model = deepseek_nextn.DeepseekModelNextN(config)

    def forward(self, input_ids, positions, forward_batch):
        hidden_states = self.model(input_ids, positions, forward_batch)
        successor = (input_ids.unsqueeze(1) + 1) % VOCAB_SIZE
        return SimpleNamespace(
            next_token_logits=-(torch.arange(VOCAB_SIZE) - successor).abs().float(),
            hidden_states=hidden_states,
        )


class DraftRunner(ModelRunner):
    """The real forward pass, which since 0.5.13 runs each step on a copy of the batch.

    What the constructor sets up takes a GPU, so it is not run.
    """

    def __init__(self, config, attn_backend, copy_batch):
        self.model_config = SimpleNamespace(hf_config=config)
        self.attn_backend = attn_backend
        self.copy_batch = copy_batch
        self.runs = []
        self.model = DraftModel(config, self.runs).requires_grad_(False)
        self.server_args = ServerArgs(model_path="dummy", device="cpu")
        self.device = "cuda"  # up to 0.5.13.post1 nothing else gets a copy
        self.support_pp = False
        self.spec_algorithm = MagicMock()
        self.device_timer = self.canary_manager = self.hisparse_coordinator = None
        self.graph_runner = self.req_to_token_pool = None
        self.decode_cuda_graph_runner = self.prefill_cuda_graph_runner = None
        if EagerRunner is not None:
            self.eager_runner = object.__new__(EagerRunner)
            self.eager_runner.model_runner = self

    def forward(self, forward_batch, skip_attn_backend_init=True):
        batch = self.copy_batch(forward_batch)
        if forward_context is None:
            return self._forward_raw(batch, skip_attn_backend_init, None)
        return self._forward_raw(batch, None)


class RecordingBackend:
    """An attention backend that writes down the indices that each step attends to."""

    use_mha = False
    # The backend says it since 0.5.15.
    prefill_attention_backend_str = decode_attention_backend_str = SPARSE_BACKEND

    def __init__(self):
        self.read = []
        self.fail_at = None

    def forward(self, q, k, v, layer, *args, topk_indices, **kwargs):
        if len(self.read) + 1 == self.fail_at:
            raise DraftError()
        self.read.append(topk_indices.clone())
        return q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)


class DraftError(Exception):
    pass


@contextmanager
def attention_backend(backend, forward_batch):
    if forward_context is None:
        forward_batch.attn_backend = backend
        yield
    else:
        with forward_context(ForwardContext(attn_backend=backend)):
            yield


class Draft:
    """A draft worker as an iteration sees it."""

    def __init__(
        self, worker_class, steps, topk=1, copy_batch=lambda batch: batch, **config
    ):
        config = model_config(**config)
        self.backend = RecordingBackend()
        self.runner = DraftRunner(config, self.backend, copy_batch)
        # What the constructor sets up takes a GPU, so it is not run.
        self.worker = worker = object.__new__(worker_class)
        worker.topk = topk
        worker.speculative_num_steps = steps
        worker.speculative_num_draft_tokens = steps + 1
        worker.hot_token_id = None
        worker.device = "cpu"
        worker.server_args = self.runner.server_args
        worker.draft_runner = worker._model_runner = self.runner
        worker.draft_attn_backend = SimpleNamespace(
            attn_backends=[self.backend] * steps
        )
        worker._topk1_parents_prealloc = torch.arange(-1, steps - 1).repeat(8, 1)
        worker._topk1_score_indices_prealloc = torch.arange(steps).repeat(8, 1)
        if hasattr(worker, "_init_dsa_index_share_state"):  # since 0.5.15
            worker._init_dsa_index_share_state()
        else:  # the constructor does it since 0.5.13.post1
            worker.index_share_for_mtp_iteration = topk == 1 and getattr(
                config, "index_share_for_mtp_iteration", False
            )

    def make_batch(self, num_seqs=3):
        batch = make_decode_batch(
            num_seqs,
            spec_info=EagleDraftInput(capture_hidden_mode=CaptureHiddenMode.LAST),
        )
        batch.forward_metadata_ready = True
        return self.refill(batch)

    def refill(self, batch, num_seqs=None):
        """Makes a batch and its spec_info ready for the next iteration."""
        if num_seqs is not None:
            batch.batch_size = num_seqs
            batch.seq_lens = torch.full((num_seqs,), 20)
        num_seqs, topk = batch.batch_size, self.worker.topk
        batch.positions = batch.seq_lens.repeat_interleave(topk)
        batch.input_ids = torch.zeros(num_seqs * topk, dtype=torch.int64)
        batch.out_cache_loc = torch.arange(
            num_seqs * topk * self.worker.speculative_num_steps
        )
        batch.spec_info.topk_p = torch.linspace(0.6, 0.4, topk).repeat(num_seqs, 1)
        batch.spec_info.topk_index = torch.arange(topk).repeat(num_seqs, 1)
        batch.spec_info.hidden_states = torch.zeros(num_seqs, HIDDEN_SIZE)
        return batch

    @contextmanager
    def recorded(self, fail_at=None):
        """What the indexer found, and what each step attended to."""
        self.runner.runs.clear()
        self.backend.read, self.backend.fail_at = [], fail_at
        found = []
        yield found, self.backend.read
        found.extend(indices for indices, _ in self.runner.runs)

    def iterate(self, batch, fail_at=None):
        with self.recorded(fail_at) as (found, read):
            self.worker.draft_forward(batch)
        return found, read

    def forward(self, batch):
        """One forward pass outside of an iteration."""
        with self.recorded() as (found, read):
            with attention_backend(self.backend, batch):
                self.runner.forward(batch)
        return found, read


def make_decode_batch(num_seqs, **kwargs):
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE if num_seqs else ForwardMode.IDLE,
        batch_size=num_seqs,
        input_ids=torch.arange(num_seqs),
        req_pool_indices=torch.arange(num_seqs),
        seq_lens=torch.full((num_seqs,), 20),
        seq_lens_cpu=torch.full((num_seqs,), 20),
        seq_lens_sum=20 * num_seqs,
        out_cache_loc=torch.arange(num_seqs),
        positions=torch.full((num_seqs,), 19),
        **kwargs,
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


class SparseModelTestCase(CustomTestCase):
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
        stack.enter_context(one_rank())
        if hasattr(envs, "SGLANG_EAGER_INPUT_NO_COPY"):  # since 0.5.14
            # The copy by itself, without the static buffers of a GPU.
            stack.enter_context(envs.SGLANG_EAGER_INPUT_NO_COPY.override(True))
        # Compiling takes longer than everything else here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))


class DraftStepTests:
    """One indexer run for a whole draft iteration."""

    module = None
    worker_class = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            module = importlib.import_module(cls.module)
        except ModuleNotFoundError as e:
            raise unittest.SkipTest(f"this release has no {cls.module}") from e
        cls.worker = getattr(module, cls.worker_class)

    def draft(self, steps=4, **kwargs):
        kwargs = {"index_share_for_mtp_iteration": True, **kwargs}
        return Draft(self.worker, steps, **kwargs)

    def assert_one_run(self, found, read, steps):
        self.assertEqual(len(read), steps - 1, "not every step attended")
        self.assertEqual(
            len(found),
            1,
            f"the indexer ran {len(found)} times in a draft iteration of {steps} steps",
        )
        for step, indices in enumerate(read):
            self.assertTrue(
                torch.equal(indices, found[0]),
                f"step {step} did not attend to the first step's indices",
            )

    def assert_own_indices(self, found, read, passes):
        self.assertEqual(len(read), passes, "not every forward pass attended")
        self.assertEqual(
            len(found), passes, "a forward pass reused indices that were not its own"
        )
        for own, indices in zip(found, read):
            self.assertTrue(torch.equal(indices, own))

    def test_later_steps_reuse(self):
        for steps in (2, 3, 5, 7):
            draft = self.draft(steps)
            self.assert_one_run(*draft.iterate(draft.make_batch()), steps)

    def test_later_steps_reuse_on_a_copy_of_the_batch(self):
        # What a step writes to a copy of the batch is lost.
        for copy_batch in (copy.copy, dataclasses.replace):
            draft = self.draft(copy_batch=copy_batch)
            self.assert_one_run(*draft.iterate(draft.make_batch()), 4)

    def test_one_step(self):
        draft = self.draft(1)
        self.assert_own_indices(*draft.iterate(draft.make_batch()), 0)

    def test_iterations_do_not_share(self):
        # A capture's warm-up runs iterate on one batch, too.
        draft = self.draft()
        batch = draft.make_batch()
        for num_seqs in (3, 3, 2):
            found, read = draft.iterate(draft.refill(batch, num_seqs))
            self.assert_one_run(found, read, 4)

    def test_idle_batch(self):
        # A rank without requests takes part in the iteration of the others.
        draft = self.draft()
        for num_seqs in (0, 3, 0):
            found, read = draft.iterate(draft.make_batch(num_seqs))
            if num_seqs:
                self.assert_one_run(found, read, 4)
            else:
                self.assert_own_indices(found, read, 0)

    def test_an_exception_ends_the_reuse(self):
        for fail_at in (1, 2, 3):
            draft = self.draft()
            batch = draft.make_batch()
            with self.assertRaises(DraftError):
                draft.iterate(batch, fail_at)
            self.assert_one_run(*draft.iterate(draft.refill(batch)), 4)

    def test_forward_outside_of_an_iteration(self):
        draft = self.draft()
        batch = draft.make_batch()
        draft.iterate(batch)
        for _ in range(2):
            self.assert_own_indices(*draft.forward(draft.refill(batch)), 1)

    def test_forward_with_other_spec_info(self):
        # E.g. a draft extend's, which is of another class.
        draft = self.draft()
        batch = draft.make_batch()
        batch.spec_info = SimpleNamespace(hidden_states=batch.spec_info.hidden_states)
        for _ in range(2):
            self.assert_own_indices(*draft.forward(batch), 1)

    def test_other_batch_with_the_same_spec_info(self):
        # E.g. after a failed iteration.
        draft = self.draft()
        batch, other = draft.make_batch(), draft.make_batch()
        with self.assertRaises(DraftError):
            draft.iterate(batch, fail_at=3)
        other.spec_info = batch.spec_info
        for _ in range(2):
            self.assert_own_indices(*draft.forward(draft.refill(other)), 1)

    def test_indices_end_with_the_iteration(self):
        # In a captured graph they are memory of its pool. And a draft extend's are of
        # every token.
        draft = self.draft()
        batch = draft.make_batch()
        for run in (draft.iterate, draft.forward):
            run(draft.refill(batch))
            kept = [ref for _, ref in draft.runner.runs if ref() is not None]
            self.assertEqual(kept, [], "indices are kept after their use")

    def test_topk_above_one(self):
        # Candidates are reordered between the steps.
        for topk in (2, 3):
            draft = self.draft(5, topk=topk)
            self.assert_own_indices(*draft.iterate(draft.make_batch()), 4)

    def test_not_configured(self):
        for config in ({}, {"index_share_for_mtp_iteration": False}):
            draft = Draft(self.worker, 5, **config)
            self.assert_own_indices(*draft.iterate(draft.make_batch()), 4)


class TestEagleWorker(DraftStepTests, SparseModelTestCase):
    module = "sglang.srt.speculative.eagle_worker"
    worker_class = "EAGLEWorker"


class TestEagleWorkerV2(DraftStepTests, SparseModelTestCase):
    module = "sglang.srt.speculative.eagle_worker_v2"
    worker_class = "EagleDraftWorker"


class TestTwoBatchOverlapFilter(SparseModelTestCase):
    """filter_batch refuses a field with a value that it was not told about."""

    # Set anew in the children, whatever the parent says.
    RESET = {
        "temp_scaled_logprobs",
        "top_p_normalized_logprobs",
        "return_hidden_states_before_norm",
        "forward_metadata_ready",
        "forward_metadata_replan_equivalent",
    }

    def split(self, **kwargs):
        batch = make_decode_batch(4, tbo_split_seq_index=2, **kwargs)
        backend = TboAttnBackend(MagicMock(), [MagicMock(), MagicMock()])
        with (
            attention_backend(backend, batch),
            # Until 0.5.13; one_rank says it since.
            patch.object(
                two_batch_overlap, "get_attention_tp_size", lambda: 1, create=True
            ),
        ):
            two_batch_overlap.TboForwardBatchPreparer.prepare_raw(
                batch, tbo_children_num_token_non_padded=torch.tensor([2, 2])
            )
        return batch.tbo_children

    def test_fields_at_their_defaults(self):
        children = self.split()
        self.assertEqual([child.batch_size for child in children], [2, 2])
        self.assertEqual(
            [child.req_pool_indices.tolist() for child in children], [[0, 1], [2, 3]]
        )

    def test_flags_reach_the_children(self):
        fields = dataclasses.fields(ForwardBatch)
        flags = [field for field in fields if isinstance(field.default, bool)]
        self.assertGreater(len(flags), 0)
        for flag in flags:
            for value in (False, True):
                for child in self.split(**{flag.name: value}):
                    if flag.name not in self.RESET:
                        self.assertIs(
                            getattr(child, flag.name),
                            value,
                            f"{flag.name}={value} is lost in a child batch",
                        )


if __name__ == "__main__":
    unittest.main()
