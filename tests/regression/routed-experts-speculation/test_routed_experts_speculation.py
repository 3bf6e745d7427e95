"""A request gets the experts of its own tokens with speculative decoding.

The experts are the target's (https://github.com/sgl-project/sglang/pull/26980), they
go where a verify moves the KV cache of its tokens, each worker hands on what its
target captured, and no later forward writes over it
(https://github.com/sgl-project/sglang/pull/34319).
"""

import contextlib
import inspect
import unittest
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.layers import dp_attention  # noqa: E402
from sglang.srt.layers.moe.topk import TopK  # noqa: E402
from sglang.srt.managers.utils import GenerationBatchResult  # noqa: E402
from sglang.srt.model_executor import model_runner  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative import (  # noqa: E402
    eagle_info,
    ngram_info,
    ngram_worker,
    spec_utils,
)

try:
    from sglang.srt.state_capturer import base as state_capturer_base  # noqa: E402
    from sglang.srt.state_capturer import routed_experts  # noqa: E402
except ModuleNotFoundError:  # up to 0.5.11
    state_capturer_base = None
    from sglang.srt.layers.moe import (  # noqa: E402
        routed_experts_capturer as routed_experts,
    )

try:
    from sglang.srt.speculative import eagle_worker_common  # noqa: E402
except ImportError:
    eagle_worker_common = None
try:
    from sglang.srt.speculative import eagle_worker_v2  # noqa: E402
except ImportError:
    eagle_worker_v2 = None

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

NUM_LAYERS = 2
TOPK = 3
DRAFT_TOKENS = 5
STEPS = 2
MAX_LEN = 48
PROMPTS = (3, 6)
# Of two requests with DRAFT_TOKENS rows each: the rows that three verifies accept. The
# first ones are a chain, later ones skip branches of a tree that were not taken.
VERIFIES = (
    ([0, 1], [5]),
    ([0, 2, 4], [5, 8]),
    ([0, 3], [5, 7, 9]),
)
# Since 0.5.23 the configuration lies in a context.
IN_CONTEXT = hasattr(dp_attention, "dp_gather_width")
# Up to 0.5.13 NGRAM's verify moves tokens itself, and EAGLE's can be synchronous.
NGRAM_V1 = hasattr(ngram_info.NgramVerifyInput, "verify")
TREE_V2 = hasattr(spec_utils, "move_accept_tokens_to_target_kvcache") or hasattr(
    getattr(eagle_worker_v2, "EAGLEWorkerV2", None), "_finalize_accept_tree_path"
)
# Since 0.5.15 a result is copied on a stream of its own.
LATE_COPY = hasattr(
    getattr(state_capturer_base, "TopkCaptureOutput", None), "map_device_tensors"
)
_torch_zeros = torch.zeros


def zeros_without_pinning(*args, **kwargs):
    """The host cache is pinned memory, which needs a GPU's driver."""
    kwargs.pop("pin_memory", None)
    return _torch_zeros(*args, **kwargs)


@contextlib.contextmanager
def published(**args):
    """The arguments of this process."""
    args |= dict(chunked_prefill_size=64, enable_return_routed_experts=True)
    if IN_CONTEXT:
        from sglang.srt.mem_cache.pool_host import common
        from sglang.srt.runtime_context import get_context, get_flags, get_parallel

        with (
            get_context().override_server_args(**args),
            get_parallel().override(attn_dp_rank=0),
            get_flags().dp.override(enabled=False),
            patch.object(common, "_cuda_host_register", lambda *_: None),
        ):
            yield
        return
    server_args = ServerArgs(model_path="dummy", **args)
    if hasattr(server_args_module, "_global_server_args"):
        replaced = patch.object(server_args_module, "_global_server_args", server_args)
    else:  # since 0.5.15
        from sglang.srt.runtime_context import get_context

        replaced = patch.object(get_context(), "_server_args", server_args)
    with (
        replaced,
        patch.object(dp_attention, "_ENABLE_DP_ATTENTION_FLAG", False),
        patch.object(torch, "zeros", zeros_without_pinning),
    ):
        yield


@contextlib.contextmanager
def installed_capturer():
    config = SimpleNamespace(
        hf_text_config=SimpleNamespace(
            num_hidden_layers=NUM_LAYERS, num_experts_per_tok=TOPK
        ),
        context_len=MAX_LEN,
        is_draft_model=False,
        is_multimodal=False,
    )
    args = dict(
        model_config=config, num_tokens=256, max_running_requests=8, device="cpu"
    )
    if IN_CONTEXT:
        shared = SimpleNamespace(num_fused_shared_experts=0)
        args["model"] = SimpleNamespace(shared_experts_config=shared)
    else:
        args |= dict(enable=True, num_fused_shared_experts=0)
    before = routed_experts.get_global_experts_capturer()
    routed_experts.set_global_experts_capturer(
        routed_experts.RoutedExpertsCapturer.create(**args)
    )
    try:
        yield routed_experts.get_global_experts_capturer()
    finally:
        routed_experts.set_global_experts_capturer(before)


class Kernel:
    """A function in the place of a Triton kernel, which needs a GPU."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return self.function


def assign_extend_cache_locs(rows, req_to_token, start, end, out, *_):
    slots = [req_to_token[r, s:e] for r, s, e in zip(rows, start, end)]
    out[: sum(map(len, slots))] = torch.cat(slots)


def fill_front_out_cache_loc(num_front, out_cache_loc, out):
    windows = out_cache_loc.view(len(num_front), -1)
    slots = [window[:n] for window, n in zip(windows, num_front)]
    out[: sum(map(len, slots))] = torch.cat(slots)


def fill_accept_out_cache_loc(accept_index, out_cache_loc, out, *_):
    accepted = accept_index[accept_index >= 0].long()
    out[: len(accepted)] = out_cache_loc[accepted]


def fill_bonus_tokens(accept_tokens, accept_lens, bonus_tokens, *_):
    pass  # Nothing here reads them.


def get_target_cache_loc(tgt, to_free, num_correct_drafts, num_free, out_cache_loc, *_):
    windows = out_cache_loc.view(len(num_correct_drafts), -1)
    tgt[:] = torch.cat([w[: n + 1] for w, n in zip(windows, num_correct_drafts)])


def expert_ids(forward: int, rows: int):
    """(rows, layers, experts): ids that name their forward, row, layer and column."""
    shape = (rows, NUM_LAYERS, TOPK)
    return torch.arange(1, rows * NUM_LAYERS * TOPK + 1).view(shape) + 1000 * forward


class Simulation:
    """Two requests, a real capturer, and a target that routes as expert_ids says."""

    def __init__(self, capturer, overlap: bool):
        self.capturer = capturer
        self.overlap = overlap
        self.model_runner = MagicMock(
            mambaish_config=None,
            hybrid_gdn_config=None,
            mamba2_config=None,
            hybrid_lightning_config=None,
            watermark_state=None,
        )
        self.forwards = 0
        generator = torch.Generator().manual_seed(0)
        slots = torch.randperm(2 * MAX_LEN, generator=generator) + 1
        self.pool = SimpleNamespace(req_to_token=slots.view(2, MAX_LEN))
        self.lengths = [0, 0]
        self.expected = [[], []]

    def forward_batch_generation(self, batch=None, forward_batch=None, **_):
        """As ModelRunner.forward and TpModelWorker do, around the real capturer."""
        out_cache_loc = (forward_batch or batch).out_cache_loc
        self.forwards += 1
        self.routed = expert_ids(self.forwards, len(out_cache_loc))
        for layer in range(NUM_LAYERS):
            self.capturer.capture(layer, self.routed[:, layer].int())
        output = self.capturer.on_forward_end(
            SimpleNamespace(out_cache_loc=out_cache_loc, out_cache_loc_virtual=None),
            can_run_graph=False,
            cuda_graph_batch=None,
            no_copy_to_cpu=self.overlap,
        )
        logits = torch.zeros(len(out_cache_loc), 8)
        return GenerationBatchResult(
            logits_output=SimpleNamespace(next_token_logits=logits, hidden_states=None),
            next_token_ids=torch.zeros(2, dtype=torch.int64),
            can_run_cuda_graph=False,
            routed_experts_output=output,
        )

    def slots(self, counts):
        rows = zip(self.pool.req_to_token, self.lengths, counts)
        return torch.cat([row[at : at + count] for row, at, count in rows])

    def batch(self, mode: ForwardMode, counts):
        return SimpleNamespace(
            reqs=[MagicMock(), MagicMock()],
            forward_mode=mode,
            spec_info=SimpleNamespace(hidden_states=torch.zeros(2 * DRAFT_TOKENS, 1)),
            seq_lens=torch.tensor(self.lengths),
            seq_lens_cpu=torch.tensor(self.lengths),
            req_pool_indices=torch.arange(2),
            req_to_token_pool=self.pool,
            input_ids=torch.zeros(sum(counts), dtype=torch.int64),
            out_cache_loc=self.slots(counts),
            has_grammar=False,
            return_logprob=False,
            hisparse_coordinator=None,
            sampling_info=SimpleNamespace(has_watermark_candidates=False),
            mamba_track_indices=None,
        )

    def keep(self, accepted):
        """What the requests must get: the experts of these rows of the last forward."""
        for request, rows in enumerate(accepted):
            self.expected[request] += [self.routed[row] for row in rows]
            self.lengths[request] += len(rows)

    def prefill(self, forward):
        batch = self.batch(ForwardMode.EXTEND, PROMPTS)
        result = forward(batch)
        rows = torch.arange(sum(PROMPTS)).split(PROMPTS)
        self.keep([part.tolist() for part in rows])
        return result

    def verify(self, forward, accepted):
        batch = self.batch(ForwardMode.TARGET_VERIFY, [DRAFT_TOKENS] * 2)
        accept_index = torch.full((2, DRAFT_TOKENS), -1, dtype=torch.int32)
        for request, rows in enumerate(accepted):
            accept_index[request, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
        accept_lens = torch.tensor([len(rows) for rows in accepted], dtype=torch.int32)
        predict = torch.zeros(2 * DRAFT_TOKENS, dtype=torch.int32)
        result = forward(batch, (predict, accept_lens, accept_index))
        self.keep(accepted)
        return result

    def store(self, result, copied: bool = False):
        """As the scheduler does with a result."""
        output = result.routed_experts_output
        if output is None:
            return
        if not copied:
            self.copy(result)
        output.finalize()

    @staticmethod
    def copy(result):
        output = result.routed_experts_output
        if output is None:
            return
        if hasattr(output, "copy_to_cpu"):
            output.copy_to_cpu()
        else:  # since 0.5.15
            output.map_device_tensors(torch.Tensor.clone)

    def returned(self, request: int):
        get = getattr(self.capturer, "get_topk", None) or (
            self.capturer.get_routed_experts  # up to 0.5.11
        )
        return get(request, self.lengths[request] + 1, self.pool)


class RoutedExpertsCase(CustomTestCase):
    def check(self, simulation: Simulation, what: str):
        wrong = []
        for request, expected in enumerate(simulation.expected):
            got = simulation.returned(request)
            self.assertEqual(len(got), len(expected))
            wrong += [
                (request, position)
                for position, (a, b) in enumerate(zip(got, expected))
                if not torch.equal(a.long(), b)
            ]
        self.assertEqual(
            wrong, [], f"(request, token) got other experts than its own: {what}"
        )


class TestTreeVerify(RoutedExpertsCase):
    """What EAGLE and NGRAM do, from the target's forward to the returned rows."""

    @contextlib.contextmanager
    def kernels(self):
        with contextlib.ExitStack() as stack:
            for module in (
                spec_utils,
                ngram_worker,
                eagle_worker_v2,
                eagle_worker_common,
            ):
                for name, kernel in (
                    ("assign_extend_cache_locs", Kernel(assign_extend_cache_locs)),
                    ("fill_accept_out_cache_loc", Kernel(fill_accept_out_cache_loc)),
                    ("fill_bonus_tokens", Kernel(fill_bonus_tokens)),
                    ("fill_front_out_cache_loc_func", fill_front_out_cache_loc),
                    ("fill_accept_out_cache_loc_func", fill_accept_out_cache_loc),
                    ("fill_bonus_tokens_func", fill_bonus_tokens),
                    ("record_stream_for_v2_verify", MagicMock()),
                    ("record_stream_each", MagicMock()),
                    ("commit_mamba_states_after_verify", MagicMock()),
                ):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, kernel))
            yield

    def ngram(self, simulation: Simulation):
        worker = ngram_worker.NGRAMWorker.__new__(ngram_worker.NGRAMWorker)
        worker.device = "cpu"
        worker._target_worker = simulation
        worker.model_runner = simulation.model_runner
        worker.draft_token_num = DRAFT_TOKENS
        worker.speculative_num_draft_tokens = DRAFT_TOKENS
        worker.token_to_kv_pool_allocator = MagicMock()
        worker.ngram_corpus = MagicMock()
        worker._prev_decode_rids = set()
        worker._update_ngram_corpus = MagicMock()
        if not hasattr(type(worker), "target_worker"):
            worker.target_worker = simulation

        def forward(batch, sample=None):
            with (
                patch.object(ngram_worker, "eagle_sample", lambda *_, **__: sample),
                patch.object(ngram_worker, "record_stream_for_v2_verify"),
                patch.object(ngram_worker, "set_time_batch"),
            ):
                return worker.forward_batch_generation(batch)

        return forward, forward

    def eagle(self, simulation: Simulation):
        """A prefill's result is the target's own."""
        allocator = MagicMock()

        def forward(batch, sample):
            predict, accept_lens, accept_index = sample
            sample = (predict, accept_lens, accept_index[:, : STEPS + 1])
            forward_batch = SimpleNamespace(out_cache_loc=batch.out_cache_loc)
            prepared = (forward_batch, False)
            if eagle_worker_common is not None:
                with (
                    patch.object(
                        eagle_worker_common,
                        "eagle_prepare_for_verify",
                        lambda *_, **__: prepared,
                    ),
                    patch.object(
                        eagle_worker_common, "eagle_sample", lambda *_, **__: sample
                    ),
                ):
                    return eagle_worker_common.run_eagle_verify(
                        batch,
                        target_worker=simulation,
                        req_to_token_pool=simulation.pool,
                        token_to_kv_pool_allocator=allocator,
                        plan_stream=None,
                        plan_stream_ctx=contextlib.nullcontext(),
                        topk=2,
                        num_draft_tokens=DRAFT_TOKENS,
                        device="cpu",
                        metadata_ready_pre_pad=False,
                        finalize_tree_path=True,
                    )
            worker = eagle_worker_v2.EAGLEWorkerV2.__new__(
                eagle_worker_v2.EAGLEWorkerV2
            )
            worker.device = "cpu"
            worker.topk = 2
            worker.speculative_num_steps = STEPS
            worker.speculative_num_draft_tokens = DRAFT_TOKENS
            worker.plan_stream = None
            worker.plan_stream_ctx = contextlib.nullcontext()
            worker._target_worker = simulation
            worker.req_to_token_pool = simulation.pool
            worker.token_to_kv_pool_allocator = allocator
            # Up to 0.5.13 these are methods of the input.
            batch.spec_info.prepare_for_v2_verify = lambda *_: prepared
            batch.spec_info.sample = lambda *_: sample
            with contextlib.ExitStack() as stack:
                for name, value in (
                    ("eagle_prepare_for_verify", prepared),
                    ("eagle_sample", sample),
                ):
                    if hasattr(eagle_worker_v2, name):
                        stack.enter_context(
                            patch.object(
                                eagle_worker_v2, name, MagicMock(return_value=value)
                            )
                        )
                return worker.verify(batch)

        return simulation.forward_batch_generation, forward

    def run_through(self, make, overlap: bool, verifies, what: str):
        args = dict(disable_overlap_schedule=not overlap)
        with published(**args), installed_capturer() as capturer, self.kernels():
            simulation = Simulation(capturer, overlap)
            prefill, verify = make(simulation)
            simulation.store(simulation.prefill(prefill))
            for accepted in verifies:
                simulation.store(simulation.verify(verify, accepted))
            self.check(simulation, what)

    @unittest.skipIf(NGRAM_V1, "NGRAM's verify moves its tokens itself")
    def test_ngram(self):
        self.run_through(self.ngram, True, VERIFIES[:1], "NGRAM, a chain")

    @unittest.skipIf(NGRAM_V1, "NGRAM's verify moves its tokens itself")
    def test_ngram_tree(self):
        self.run_through(self.ngram, True, VERIFIES, "NGRAM, a tree")

    @unittest.skipIf(NGRAM_V1, "NGRAM's verify moves its tokens itself")
    def test_ngram_tree_without_overlap(self):
        self.run_through(self.ngram, False, VERIFIES, "NGRAM, a tree, no overlap")

    @unittest.skipUnless(TREE_V2, "the overlapped verify is of a chain")
    def test_eagle_chain(self):
        self.run_through(self.eagle, True, VERIFIES[:1], "EAGLE, a chain")

    @unittest.skipUnless(TREE_V2, "the overlapped verify is of a chain")
    def test_eagle_tree(self):
        self.run_through(self.eagle, True, VERIFIES, "EAGLE, a tree")

    @unittest.skipUnless(TREE_V2, "the overlapped verify is of a chain")
    def test_eagle_tree_without_overlap(self):
        self.run_through(self.eagle, False, VERIFIES, "EAGLE, a tree, no overlap")


class TestSynchronousVerify(RoutedExpertsCase):
    """Up to 0.5.13: the rows are on the host when the verify moves its tokens."""

    @contextlib.contextmanager
    def kernels(self, module):
        with contextlib.ExitStack() as stack:
            for name, kernel in (
                ("get_target_cache_loc", Kernel(get_target_cache_loc)),
                ("assign_req_to_token_pool", Kernel(MagicMock())),
                ("assign_req_to_token_pool_func", MagicMock()),
            ):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, kernel))
            yield

    def run_through(self, verify, page_size: int, what: str):
        with published(disable_overlap_schedule=True), installed_capturer() as capturer:
            simulation = Simulation(capturer, overlap=False)
            simulation.prefill(simulation.forward_batch_generation)

            def forward(batch, sample):
                result = simulation.forward_batch_generation(batch)
                allocator = MagicMock()
                batch.token_to_kv_pool_allocator = allocator
                verify(batch, result, sample, page_size)
                if page_size == 1:
                    # The slots that are not freed become the request's.
                    for request, slots in enumerate(
                        batch.out_cache_loc.split(sample[1].tolist())
                    ):
                        at = simulation.lengths[request]
                        simulation.pool.req_to_token[request, at : at + len(slots)] = (
                            slots
                        )
                return result

            # Freed slots would be allocated anew, so one verify.
            simulation.verify(forward, VERIFIES[1])
            self.check(simulation, f"{what}, pages of {page_size}")

    @unittest.skipUnless(NGRAM_V1, "no such verify")
    def test_ngram(self):
        def verify(batch, result, sample, page_size):
            _, accept_lens, accept_index = sample
            spec_info = ngram_info.NgramVerifyInput(
                batch.input_ids, torch.zeros(1), *[None] * 4, DRAFT_TOKENS
            )
            accepted = accept_index[accept_index >= 0]
            for name in ("accept_indices", "accepted_indices"):
                setattr(spec_info, name, accepted)
            for name in ("num_correct_drafts", "num_accepted_drafts"):
                setattr(spec_info, name, accept_lens - 1)
            for name in ("num_accept_tokens", "num_accepted_tokens"):
                setattr(spec_info, name, accept_lens)
            batch.batch_size = lambda: 2
            batch.reqs = [SimpleNamespace(kv_committed_len=0) for _ in range(2)]
            spec_info._free_cache(batch, page_size, accept_lens - 1)

        with self.kernels(ngram_info):
            for page_size in (1, 4):
                self.run_through(verify, page_size, "NGRAM")

    @unittest.skipUnless(
        hasattr(eagle_info.EagleVerifyInput, "verify"), "no such verify"
    )
    def test_eagle(self):
        def verify(batch, result, sample, page_size):
            predict, accept_lens, accept_index = sample
            window = torch.zeros(2, DRAFT_TOKENS, dtype=torch.int64)
            spec_info = eagle_info.EagleVerifyInput(
                draft_token=batch.input_ids,
                custom_mask=None,
                positions=None,
                **{
                    name: window
                    for name in eagle_info.EagleVerifyInput.__dataclass_fields__
                    if name
                    in (
                        "retrieve_index",
                        "retrieve_next_token",
                        "retrieve_next_sibling",
                    )
                },
                retrieve_cum_len=None,
                spec_steps=STEPS,
                topk=2,
                draft_token_num=DRAFT_TOKENS,
                capture_hidden_mode=None,
                seq_lens_sum=None,
                seq_lens_cpu=None,
            )
            batch.model_config = SimpleNamespace(think_end_id=None, vocab_size=8)
            batch.device = "cpu"
            batch.sampling_info = MagicMock(
                has_custom_logit_processor=False, logit_bias=None, is_all_greedy=True
            )
            batch.sampling_info.__len__.return_value = 2
            batch.sampling_info.penalizer_orchestrator.is_required = False
            result.logits_output.hidden_states = torch.zeros(2 * DRAFT_TOKENS, 1)
            for req in batch.reqs:
                req.finished.return_value = False
                req.grammar = None
                req.require_reasoning = False
                req.kv_committed_len = req.spec_verify_ct = 0
                req.spec_num_correct_drafts = req.spec_accepted_drafts = 0
            found = (predict, accept_index[:, : STEPS + 1], accept_lens - 1)
            out_cache_loc = batch.out_cache_loc
            with patch.object(eagle_info, "verify_tree_greedy_func", lambda **_: found):
                spec_info.verify(
                    batch,
                    result.logits_output,
                    batch.token_to_kv_pool_allocator,
                    page_size,
                )
            if page_size == 1:
                accepted = accept_index[accept_index >= 0].long()
                self.assertTrue(
                    torch.equal(batch.out_cache_loc, out_cache_loc[accepted])
                )

        with self.kernels(eagle_info):
            for page_size in (1, 4):
                self.run_through(verify, page_size, "EAGLE")


@unittest.skipUnless(LATE_COPY, "a result is copied before the next forward")
class TestOverlap(RoutedExpertsCase):
    """Since 0.5.15 a result is copied on a stream of its own."""

    def test_next_forward(self):
        with published(), installed_capturer() as capturer:
            simulation = Simulation(capturer, overlap=True)
            first = simulation.prefill(simulation.forward_batch_generation)
            simulation.forward_batch_generation(
                SimpleNamespace(out_cache_loc=torch.arange(100, 120))
            )
            simulation.store(first)
            self.check(simulation, "the next forward came before the copy")


@unittest.skipIf(
    hasattr(routed_experts, "disable_routed_experts_capture_for_draft"),
    "since 0.5.15 the target alone is captured",
)
class TestDraftModel(CustomTestCase):
    """The experts that are captured and stored are the target's alone."""

    def draft_runner(self, model):
        class Stop(Exception):
            pass

        runner = MagicMock(is_draft_worker=True, device="cpu", model=model)
        runner.server_args.elastic_ep_backend = None
        runner.server_args.enable_deterministic_inference = False
        runner.tp_size = 1
        runner.model_config = SimpleNamespace(
            num_nextn_predict_layers=None,
            num_hidden_layers=1,
            num_attention_layers=1,
            vocab_size=8,
            hf_config=SimpleNamespace(architectures=["Draft"]),
        )
        # The KV cache, the attention backends and the graphs come after one of these.
        runner.adjust_hybrid_swa_layers_for_pp.side_effect = Stop
        runner.configure_kv_cache_dtype.side_effect = Stop
        with (
            contextlib.suppress(Stop),
            patch.object(model_runner, "TorchMemorySaverAdapter"),
            patch.object(model_runner, "create_sampler"),
            patch.object(model_runner, "ExpertLocationUpdater"),
        ):
            initialize = model_runner.ModelRunner.initialize
            # Up to 0.5.13 with the memory that was free before.
            initialize(
                runner, *[1.0] * (len(inspect.signature(initialize).parameters) - 1)
            )
        runner.load_model.assert_called()

    def test_capturer_stays(self):
        with published(), installed_capturer() as capturer:
            model_runner.ModelRunner.init_routed_experts_capturer(
                MagicMock(
                    is_draft_worker=True,
                    device="cpu",
                    max_total_num_tokens=64,
                    page_size=1,
                    max_running_requests=4,
                    model_config=MagicMock(
                        context_len=MAX_LEN,
                        hf_text_config=SimpleNamespace(
                            num_hidden_layers=1, num_experts_per_tok=TOPK
                        ),
                    ),
                    model=SimpleNamespace(num_fused_shared_experts=0),
                    server_args=SimpleNamespace(disable_shared_experts_fusion=False),
                )
            )
            self.assertIs(
                routed_experts.get_global_experts_capturer(),
                capturer,
                "the draft model's capturer took the place of the target's",
            )

    def test_dense_draft_starts(self):
        config = MagicMock(context_len=MAX_LEN)
        config.hf_text_config = SimpleNamespace(num_hidden_layers=1)
        with published(), installed_capturer():
            try:
                model_runner.ModelRunner.init_routed_experts_capturer(
                    MagicMock(is_draft_worker=True, device="cpu", model_config=config)
                )
            except AttributeError as e:
                self.fail(f"a dense draft model does not start: {e}")

    def route(self, topk: TopK, rows: int):
        hidden = torch.zeros(rows, 4)
        logits = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
        return topk.forward_native(hidden, logits)

    def test_rows_are_not_overwritten(self):
        target, draft = (
            TopK(top_k=TOPK, layer_id=0, renormalize=False) for _ in range(2)
        )
        with published(), installed_capturer() as capturer:
            self.draft_runner(torch.nn.Sequential(torch.nn.Identity(), draft))
            buffer = capturer.device_cache.buffer
            self.route(target, 6)
            captured = buffer.clone()
            self.assertTrue(captured[:6, 0].any(), "the target captures")
            self.route(draft, 5)
            self.assertTrue(
                torch.equal(buffer, captured),
                "the draft model wrote over the target's experts",
            )

    def test_forward_stores_nothing(self):
        with published(), installed_capturer() as capturer:
            for is_draft in (False, True):
                runner = MagicMock(is_draft_worker=is_draft, eplb_manager=None)
                runner.msprobe_debugger = runner.canary_manager = None
                runner.enable_elastic_ep = False
                runner.forward_pass_id = 0
                raw = MagicMock(can_run_graph=False)
                runner._forward_raw.return_value = raw
                with patch.object(
                    type(capturer), "on_forward_end", autospec=True
                ) as end:
                    model_runner.ModelRunner.forward(runner, MagicMock())
                self.assertEqual(
                    end.called,
                    not is_draft,
                    "the draft model's forward stored experts",
                )


if __name__ == "__main__":
    unittest.main()
