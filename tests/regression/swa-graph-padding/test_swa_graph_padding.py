"""Padded CUDA graph rows must not write into a live request's sliding-window cache.

A batch that is padded up to a captured size writes one KV entry for each padded row
too. out_cache_loc_swa says where: left over from an earlier replay, it points at
slots that a live request may own by now. Padded rows belong in the dummy slot 0,
as they do in out_cache_loc. All CUDA graph runners of a process share the buffer, in
the int32 that its consumers expect
(https://github.com/sgl-project/sglang/pull/24743).
"""

import inspect
import random
import unittest
from types import SimpleNamespace
from unittest.mock import patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.mem_cache import memory_pool  # noqa: E402
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.model_executor import input_buffers  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import (  # noqa: E402
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402

try:
    from sglang.srt.model_executor import piecewise_cuda_graph_runner
    from sglang.srt.model_executor.breakable_cuda_graph_runner import (
        BreakableCudaGraphRunner,
    )
    from sglang.srt.model_executor.cuda_graph_runner import DecodeInputBuffers
    from sglang.srt.model_executor.piecewise_cuda_graph_runner import (
        PiecewiseCudaGraphRunner,
    )

    HAS_SWA_BUFFER = True
except ImportError:
    # Since 0.5.13 the locations are derived from out_cache_loc, in each forward.
    HAS_SWA_BUFFER = False
    from sglang.srt.model_executor.cuda_graph_buffer_registry import (
        build_decode_registry,
    )

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

POOL_SIZE = 64
SWA_POOL_SIZE = 32
SWA_LAYER, FULL_LAYER = 0, 1
SEQ_LEN_FILL_VALUE = 1
HAS_TRANSPOSED_POOL = (
    "enable_kvcache_transpose" in inspect.signature(SWAKVPool.__init__).parameters
)
EXTEND_GRAPHS = {
    "piecewise_cuda_graph_tokens": [4, 8],
    "piecewise_cuda_graph_compiler": "eager",
}


def build_pool() -> SWAKVPool:
    """A hybrid pool whose full slot i is the SWA slot i % 32; slot 0 is the dummy."""
    pool = SWAKVPool(
        size=POOL_SIZE,
        size_swa=SWA_POOL_SIZE,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=4,
        swa_attention_layer_ids=[SWA_LAYER],
        full_attention_layer_ids=[FULL_LAYER],
        device="cpu",
        # Until 0.5.14.
        **({"enable_kvcache_transpose": False} if HAS_TRANSPOSED_POOL else {}),
    )
    mapping = torch.arange(POOL_SIZE + 2) % SWA_POOL_SIZE
    mapping[-1] = -1
    pool.register_mapping(mapping)
    return pool


def write(pool: SWAKVPool, layer, full_rows, swa_rows, kv):
    """Write as the attention backends of the release do."""
    if hasattr(pool, "set_swa_loc"):
        pool.set_swa_loc(swa_rows)
        pool.set_kv_buffer(layer, full_rows, kv, kv)
    elif hasattr(memory_pool, "KVWriteLoc"):  # since 0.5.14
        rows = memory_pool.KVWriteLoc(full_rows, swa_rows)
        pool.set_kv_buffer(layer, rows, kv, kv)
    else:
        pool.set_kv_buffer(layer, full_rows, kv, kv, swa_loc=swa_rows)


class DecodeGraphInputs:
    """The inputs of a hybrid model's decode CUDA graphs, as their runner keeps them."""

    def __init__(self, pool: SWAKVPool, max_bs: int, num_tokens_per_bs: int = 1):
        self.pool = pool
        self.num_tokens_per_bs = num_tokens_per_bs
        common = dict(
            device=torch.device("cpu"),
            max_bs=max_bs,
            max_num_token=max_bs * num_tokens_per_bs,
            seq_len_fill_value=SEQ_LEN_FILL_VALUE,
            cache_loc_dtype=torch.int64,
            enable_mamba_track=False,
            is_encoder_decoder=False,
            encoder_len_fill_value=0,
            require_mlp_tp_gather=False,
        )
        if HAS_SWA_BUFFER:
            self.buffers = DecodeInputBuffers.create(
                hidden_size=8,
                vocab_size=16,
                dtype=torch.float32,
                dp_size=1,
                pp_size=1,
                num_tokens_per_bs=num_tokens_per_bs,
                is_hybrid_swa=pool is not None,
                **common,
            )
        else:
            self.registry = build_decode_registry(**common)

    def replay(self, full_locs, bs: int):
        """Fill the inputs for a batch that is padded to bs.

        Returns where the graph's rows write: in the full and in the SWA pool.
        """
        num_tokens, padded = len(full_locs), bs * self.num_tokens_per_bs
        raw_bs = num_tokens // self.num_tokens_per_bs
        locs = torch.tensor(full_locs, dtype=torch.int64)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=raw_bs,
            input_ids=torch.ones(num_tokens, dtype=torch.int64),
            req_pool_indices=torch.arange(raw_bs),
            seq_lens=torch.full((raw_bs,), 9, dtype=torch.int32),
            seq_lens_cpu=torch.full((raw_bs,), 9, dtype=torch.int32),
            out_cache_loc=locs,
            seq_lens_sum=9 * raw_bs,
            positions=torch.full((num_tokens,), 8, dtype=torch.int64),
        )
        if not HAS_SWA_BUFFER:
            self.registry.fill_from(
                batch,
                raw_bs=raw_bs,
                padded_bs=bs,
                raw_num_tokens=num_tokens,
                padded_num_tokens=padded,
            )
            full_rows = self.registry.get_slot("out_cache_loc").buffer[:padded]
            return full_rows, self.pool.translate_loc_from_full_to_swa(full_rows)

        if self.pool is not None:
            batch.out_cache_loc_swa = self.pool.translate_loc_from_full_to_swa(locs)
        self.buffers.populate_from_forward_batch(
            forward_batch=batch,
            raw_bs=raw_bs,
            raw_num_token=num_tokens,
            bs=bs,
            seq_len_fill_value=SEQ_LEN_FILL_VALUE,
            require_gathered_buffer=False,
            num_tokens_per_bs=self.num_tokens_per_bs,
            nsa_enable_prefill_cp=False,
            enable_num_token_non_padded_flag=False,
        )
        swa_rows = self.buffers.out_cache_loc_swa
        return (
            self.buffers.out_cache_loc[:padded],
            None if swa_rows is None else swa_rows[:padded],
        )


class BuffersAllocated(Exception):
    """The runner has its buffers: what follows in its constructor needs a GPU."""


class StubModelRunner(SimpleNamespace):
    """What the runners for extend batches ask for before they capture."""

    def __init__(self, pool: SWAKVPool, server_args: ServerArgs):
        super().__init__(
            server_args=server_args,
            device="cpu",
            model=SimpleNamespace(),
            is_multimodal=False,
            is_generation=True,
            is_hybrid_swa=True,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            req_to_token_pool=SimpleNamespace(size=8),
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=pool,
            attn_backend=None,
        )

    @property
    def attention_layers(self):
        raise BuffersAllocated()


def global_server_args(server_args):
    """As the process-wide arguments; since 0.5.15 they lie in a context."""
    if hasattr(server_args_module, "_global_server_args"):
        return patch.object(server_args_module, "_global_server_args", server_args)
    from sglang.srt.runtime_context import get_context

    return patch.object(get_context(), "_server_args", server_args)


class SWAGraphPaddingTestCase(CustomTestCase):
    def setUp(self):
        super().setUp()
        server_args = ServerArgs(
            model_path="dummy",
            device="cpu",
            **(EXTEND_GRAPHS if HAS_SWA_BUFFER else {}),
        )
        for context in (
            global_server_args(server_args),
            patch.object(memory_pool, "_is_cuda", False),
            # The process-wide pool of buffers that the runners share.
            patch.dict(input_buffers._forward_input_buffer_pool, clear=True),
        ):
            context.__enter__()
            self.addCleanup(context.__exit__, None, None, None)
        self.pool = build_pool()
        self.model_runner = StubModelRunner(self.pool, server_args)

    def assert_padded_rows_are_dummies(self, rows, num_tokens, earlier_slots, what):
        for row in range(num_tokens, len(rows)):
            slot = rows[row].item()
            used = "which an earlier replay used" if slot in earlier_slots else "not 0"
            self.assertEqual(
                slot, 0, f"{what}: padded row {row} writes into slot {slot}, {used}"
            )


class TestDecodeCudaGraphPadding(SWAGraphPaddingTestCase):
    def test_padded_row_writes_into_the_dummy_slot(self):
        graph = DecodeGraphInputs(self.pool, max_bs=4)
        graph.replay([11, 12, 13, 14], bs=4)
        full_rows, swa_rows = graph.replay([21, 22, 23], bs=4)
        self.assertEqual(full_rows.tolist(), [21, 22, 23, 0])
        self.assertEqual(swa_rows[:3].tolist(), [21, 22, 23])
        self.assert_padded_rows_are_dummies(
            swa_rows, 3, {11, 12, 13, 14}, "out_cache_loc_swa"
        )

    def test_padded_rows_never_write_into_slots_of_earlier_replays(self):
        """Any sequence of batches, over several captured sizes."""
        rng = random.Random(0)
        captured_sizes = [1, 2, 4, 8]
        for num_tokens_per_bs in (1, 2):
            graph = DecodeGraphInputs(self.pool, 8, num_tokens_per_bs)
            earlier_slots = set()
            for step in range(60):
                raw_bs = rng.randint(1, 8)
                bs = min(size for size in captured_sizes if size >= raw_bs)
                num_tokens = raw_bs * num_tokens_per_bs
                locs = rng.sample(range(1, SWA_POOL_SIZE), num_tokens)
                full_rows, swa_rows = graph.replay(locs, bs)
                what = f"{num_tokens_per_bs=}, {step=}, {raw_bs=}, {bs=}"
                self.assertEqual(full_rows[:num_tokens].tolist(), locs, what)
                self.assertEqual(swa_rows[:num_tokens].tolist(), locs, what)
                for name, rows in (
                    ("out_cache_loc", full_rows),
                    ("out_cache_loc_swa", swa_rows),
                ):
                    self.assert_padded_rows_are_dummies(
                        rows, num_tokens, earlier_slots, f"{name}, {what}"
                    )
                earlier_slots.update(locs)

    def test_idle_rank_writes_into_the_dummy_slot(self):
        """Under DP attention a rank without requests replays padded rows only."""
        graph = DecodeGraphInputs(self.pool, max_bs=4)
        graph.replay([11, 12, 13, 14], bs=4)
        _, swa_rows = graph.replay([], bs=4)
        self.assert_padded_rows_are_dummies(
            swa_rows, 0, {11, 12, 13, 14}, "out_cache_loc_swa"
        )

    def test_padded_replay_leaves_a_live_request_alone(self):
        """Write through the pool itself what the graph's rows write."""
        graph = DecodeGraphInputs(self.pool, max_bs=4)

        def run(locs, value):
            full_rows, swa_rows = graph.replay(locs, bs=4)
            kv = torch.full((4, 1, 4), float(value))
            for layer in (SWA_LAYER, FULL_LAYER):
                write(
                    self.pool, SimpleNamespace(layer_id=layer), full_rows, swa_rows, kv
                )

        run([11, 12, 13, 14], 1)
        run([21, 22, 23], 2)
        for name, layer in (("full", FULL_LAYER), ("sliding-window", SWA_LAYER)):
            for kind, cache in zip("KV", self.pool.get_kv_buffer(layer)):
                for slots, value in (([11, 12, 13, 14], 1), ([21, 22, 23], 2)):
                    for slot in slots:
                        self.assertEqual(
                            cache[slot].flatten().tolist(),
                            [float(value)] * 4,
                            f"a padded row overwrote {kind} in the live slot {slot} "
                            f"of the {name} layer",
                        )

    @unittest.skipUnless(HAS_SWA_BUFFER, "this release has no out_cache_loc_swa buffer")
    def test_model_without_sliding_window_is_padded_as_before(self):
        graph = DecodeGraphInputs(None, max_bs=4)
        graph.replay([11, 12, 13, 14], bs=4)
        full_rows, swa_rows = graph.replay([21, 22, 23], bs=4)
        self.assertEqual(full_rows.tolist(), [21, 22, 23, 0])
        self.assertIsNone(swa_rows)


@unittest.skipUnless(HAS_SWA_BUFFER, "this release has no out_cache_loc_swa buffer")
class TestRunnerBuffers(SWAGraphPaddingTestCase):
    def build_runner(self, runner_class):
        """Run the runner's own constructor up to where it needs a GPU."""
        runner = runner_class.__new__(runner_class)
        with (
            patch.multiple(
                piecewise_cuda_graph_runner,
                get_attention_tp_size=lambda: 1,
                get_attention_tp_rank=lambda: 0,
                set_torch_compile_config=lambda: None,
            ),
            self.assertRaises(BuffersAllocated),
        ):
            runner.__init__(self.model_runner)
        return runner

    def assert_dtype(self, buffers, runner_name):
        dtype = buffers.out_cache_loc_swa.dtype
        self.assertEqual(
            dtype,
            torch.int32,
            f"out_cache_loc_swa of the {runner_name} CUDA graph runner is {dtype}, "
            "its consumers expect torch.int32",
        )

    def test_dtype_of_the_decode_runner(self):
        self.assert_dtype(DecodeGraphInputs(self.pool, max_bs=4).buffers, "decode")

    def test_dtype_of_the_piecewise_runner(self):
        runner = self.build_runner(PiecewiseCudaGraphRunner)
        self.assert_dtype(runner.buffers, "piecewise")

    def test_dtype_of_the_breakable_runner(self):
        runner = self.build_runner(BreakableCudaGraphRunner)
        self.assert_dtype(runner.buffers, "breakable")

    def test_runners_of_a_process_share_the_buffer(self):
        """A server allocates decode buffers first, then one extend runner's."""
        for runner_class in (PiecewiseCudaGraphRunner, BreakableCudaGraphRunner):
            input_buffers._forward_input_buffer_pool.clear()
            # The larger buffer of a name serves all of them.
            decode = DecodeGraphInputs(self.pool, max_bs=16)
            decode.buffers.share_buffers()
            try:
                runner = self.build_runner(runner_class)
            except AssertionError as e:
                self.fail(f"{runner_class.__name__} next to the decode runner: {e}")
            self.assertEqual(
                runner.buffers.out_cache_loc_swa.data_ptr(),
                decode.buffers.out_cache_loc_swa.data_ptr(),
                f"{runner_class.__name__} has an out_cache_loc_swa of its own",
            )

    def test_padded_extend_rows_write_into_the_dummy_slot(self):
        for runner_class in (PiecewiseCudaGraphRunner, BreakableCudaGraphRunner):
            input_buffers._forward_input_buffer_pool.clear()
            runner = self.build_runner(runner_class)
            for locs, padded in (([11, 12, 13, 14, 15, 16, 17, 18], 8), ([21, 22], 4)):
                num_tokens = len(locs)
                static_batch = runner.replay_prepare(
                    ForwardBatch(
                        forward_mode=ForwardMode.EXTEND,
                        batch_size=1,
                        input_ids=torch.ones(num_tokens, dtype=torch.int64),
                        req_pool_indices=torch.zeros(1, dtype=torch.int64),
                        seq_lens=torch.tensor([num_tokens]),
                        out_cache_loc=torch.tensor(locs),
                        seq_lens_sum=num_tokens,
                        positions=torch.arange(num_tokens),
                    )
                )
                self.assertEqual(
                    static_batch.out_cache_loc_swa.tolist(),
                    locs + [0] * (padded - num_tokens),
                    f"padded rows of {runner_class.__name__}",
                )
                self.assertEqual(
                    self.pool.swa_loc.data_ptr(),
                    runner.buffers.out_cache_loc_swa.data_ptr(),
                )


if __name__ == "__main__":
    unittest.main()
