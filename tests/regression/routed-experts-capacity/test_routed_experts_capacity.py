"""The routed experts buffer has to hold the rows of the largest forward.

It is sized by requests and by the prefill chunk, but a verify of speculative decoding
has a row for each draft token of each request
(https://github.com/sgl-project/sglang/pull/38717), and with --chunked-prefill-size -1
a prefill has as many rows as its requests have tokens
(https://github.com/sgl-project/sglang/issues/26860).
"""

import contextlib
import dataclasses
import itertools
import json
import tempfile
import unittest
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Dict, List, Optional
from unittest.mock import MagicMock, patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.layers import dp_attention  # noqa: E402
from sglang.srt.layers.utils import cp_utils  # noqa: E402
from sglang.srt.managers import schedule_policy  # noqa: E402
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.eagle_info import EagleVerifyInput  # noqa: E402

try:
    from sglang.srt.state_capturer import routed_experts  # noqa: E402
except ModuleNotFoundError:  # up to 0.5.11
    from sglang.srt.layers.moe import (  # noqa: E402
        routed_experts_capturer as routed_experts,
    )

try:
    from sglang.srt.model_executor.cuda_graph_config import (  # noqa: E402
        Backend,
        CudaGraphConfig,
        PhaseConfig,
    )
except ModuleNotFoundError:  # up to 0.5.13
    CudaGraphConfig = None

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

NUM_LAYERS = 2
TOPK = 3
# Since 0.5.23 the configuration lies in a context, and attn_dp_size in the arguments.
IN_CONTEXT = hasattr(dp_attention, "dp_gather_width")

_torch_zeros = torch.zeros


def zeros_without_pinning(*args, **kwargs):
    """The host cache is pinned memory, which needs a GPU's driver."""
    kwargs.pop("pin_memory", None)
    return _torch_zeros(*args, **kwargs)


def ceil_align(x: int, y: int) -> int:
    return -(-x // y) * y


@dataclass
class Configuration:
    dp_size: int = 1
    attn_tp_size: int = 1
    attn_cp_size: int = 1
    chunked_prefill_size: int = 4
    max_running_requests: int = 8
    draft_tokens: Optional[int] = None
    max_prefill_tokens: int = 16384
    context_len: int = 128
    num_slots: int = 512
    is_multimodal: bool = False
    server_args: Dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def published(self):
        """As the arguments of this process."""
        args = dict(
            tp_size=self.dp_size * self.attn_tp_size * self.attn_cp_size,
            attn_cp_size=self.attn_cp_size,
            chunked_prefill_size=self.chunked_prefill_size,
            max_prefill_tokens=self.max_prefill_tokens,
        )
        if self.draft_tokens is not None:
            args |= dict(
                speculative_algorithm="EAGLE",
                speculative_num_steps=self.draft_tokens - 1,
                speculative_eagle_topk=1,
                speculative_num_draft_tokens=self.draft_tokens,
            )
        args |= self.server_args
        if IN_CONTEXT:
            from sglang.srt.mem_cache.pool_host import common
            from sglang.srt.runtime_context import get_context, get_flags, get_parallel

            args |= dict(attn_dp_size=self.dp_size, enable_return_routed_experts=True)
            with (
                get_context().override_server_args(**args),
                get_parallel().override(attn_dp_rank=0),
                get_flags().dp.override(enabled=self.dp_size > 1),
                patch.object(common, "_cuda_host_register", lambda *_: None),
            ):
                yield
            return
        args |= dict(dp_size=self.dp_size, enable_dp_attention=self.dp_size > 1)
        server_args = ServerArgs(model_path="dummy", **args)
        if hasattr(server_args_module, "_global_server_args"):
            published = patch.object(
                server_args_module, "_global_server_args", server_args
            )
        else:  # since 0.5.15
            from sglang.srt.runtime_context import get_context

            published = patch.object(get_context(), "_server_args", server_args)
        with published, patch.object(torch, "zeros", zeros_without_pinning):
            yield

    @contextlib.contextmanager
    def dp_rank(self, rank: int):
        if IN_CONTEXT:
            from sglang.srt.runtime_context import get_parallel

            with get_parallel().override(attn_dp_rank=rank):
                yield
            return
        with (
            patch.object(dp_attention, "_ENABLE_DP_ATTENTION_FLAG", self.dp_size > 1),
            patch.object(dp_attention, "_ATTN_DP_SIZE", self.dp_size),
            patch.object(dp_attention, "_ATTN_DP_RANK", rank),
        ):
            yield

    def build_capturer(self):
        args = dict(
            model_config=SimpleNamespace(
                hf_text_config=SimpleNamespace(
                    num_hidden_layers=NUM_LAYERS, num_experts_per_tok=TOPK
                ),
                context_len=self.context_len,
                is_draft_model=False,
                is_multimodal=self.is_multimodal,
            ),
            num_tokens=self.num_slots,
            max_running_requests=self.max_running_requests,
            device="cpu",
        )
        if IN_CONTEXT:
            shared = SimpleNamespace(num_fused_shared_experts=0)
            args["model"] = SimpleNamespace(shared_experts_config=shared)
        else:
            args |= dict(enable=True, num_fused_shared_experts=0)
        return routed_experts.RoutedExpertsCapturer.create(**args)


class Slots(TokenToKVPoolAllocator):
    """An allocator of free slots."""

    def __init__(self, num_slots: int):
        self.page_size = 1
        self.num_slots = num_slots

    def available_size(self):
        return self.num_slots


def waiting_request(length: int, ignore_eos: bool):
    return MagicMock(
        sampling_params=SimpleNamespace(max_new_tokens=1, ignore_eos=ignore_eos),
        origin_input_ids=range(length),
        full_untruncated_fill_ids=range(length),
        fill_ids=range(length),
        output_ids=[],
        prefix_indices=[],
        extend_input_len=length,  # up to 0.5.14
        extend_range=SimpleNamespace(length=length),  # 0.5.15
        extend_len=length,
        prefix_len=0,
        host_hit_length=0,
        swa_host_hit_length=0,
        mamba_host_hit_length=0,
        needs_host_load_back=lambda: False,
    )


def admitted_rows(c: Configuration, requests, radix_cache: bool) -> int:
    """The rows of the prefill that PrefillAdder makes of waiting requests."""
    tree_cache = MagicMock(disable=not radix_cache)
    for size in (tree_cache.evictable_size, tree_cache.full_evictable_size):
        size.return_value = 0
    tree_cache.supports_mamba.return_value = False
    tree_cache.is_tree_cache.return_value = False
    adder = schedule_policy.PrefillAdder(
        page_size=1,
        tree_cache=tree_cache,
        token_to_kv_pool_allocator=Slots(c.num_slots),
        running_batch=None,
        new_token_ratio=1.0,
        rem_input_tokens=c.max_prefill_tokens,
        rem_chunk_tokens=None,
    )
    # As Scheduler.get_new_batch_prefill does.
    for request in requests:
        result = adder.add_one_req(
            request, has_chunked_req=False, truncation_align_size=None
        )
        if result != schedule_policy.AddReqResult.CONTINUE:
            break
    return sum(request.extend_len for request in adder.can_run_list)


def most_admitted_rows(c: Configuration, radix_cache: bool) -> int:
    """Over waiting requests up to the context's length, which may ignore EOS."""
    lengths = {1, c.context_len, (c.max_prefill_tokens - 1) % c.context_len or 1}
    requests = {
        key: waiting_request(*key) for key in itertools.product(lengths, (False, True))
    }
    return max(
        admitted_rows(c, [requests[key] for key in zip(queue, flags)], radix_cache)
        for queue in itertools.product(lengths, repeat=4)
        for flags in ([False] * 4, [True] * 4, [False, False, False, True])
    )


@dataclass
class Forward:
    """`rows` has the rows of each DP rank; in a graph, `graph_batch` requests."""

    rows: List[int]
    padded_rows: List[int]
    graph_batch: Optional[int] = None
    rows_per_request: int = 1
    mode: ForwardMode = ForwardMode.DECODE

    @classmethod
    def decode(cls, c: Configuration, requests: List[int], n: Optional[int] = None):
        """Decode, or verify, as a graph and eager, padded in both ways."""
        mode = ForwardMode.DECODE if n is None else ForwardMode.TARGET_VERIFY
        n = n or 1
        rows = [bs * n for bs in requests]
        halves = 2 if c.server_args.get("enable_two_batch_overlap") else 1
        graph_batch = ceil_align(max(requests), halves * c.attn_tp_size)
        yield cls(rows, [graph_batch * n] * c.dp_size, graph_batch, n, mode)
        aligned = [ceil_align(r, c.attn_tp_size) for r in rows]
        yield cls(rows, [max(aligned)] * c.dp_size, None, n, mode)
        yield cls(rows, aligned, None, n, mode)

    @classmethod
    def of_requests(cls, c: Configuration, n: Optional[int] = None):
        most = c.max_running_requests
        for bs in sorted({1, most // 2, most - 1, most}):
            yield from cls.decode(c, [bs] * c.dp_size, n)
            uneven = [max(bs - 2 * rank, 1) for rank in range(c.dp_size - 1)] + [0]
            if c.dp_size > 1:
                yield from cls.decode(c, uneven, n)
                yield from cls.decode(c, uneven[::-1], n)

    @classmethod
    def prefill(cls, c: Configuration, rows: int):
        """Each rank has that many, or only one of them has."""
        for each in [[rows] * c.dp_size] + [
            [rows if rank == busy else 1 for rank in range(c.dp_size)]
            for busy in range(c.dp_size)
        ]:
            aligned = [ceil_align(r, c.attn_tp_size) for r in each]
            yield cls(each, aligned, mode=ForwardMode.EXTEND)


def verify_input(draft_tokens: int) -> EagleVerifyInput:
    """Of a tree: it has more draft tokens than steps."""
    num_steps = max((draft_tokens - 1) // 2, 1)
    args = dict(spec_steps=num_steps, topk=4, draft_token_num=draft_tokens)
    for f in dataclasses.fields(EagleVerifyInput):
        if f.default is dataclasses.MISSING:
            args.setdefault(f.name, None)
    spec_info = EagleVerifyInput(**args)
    if not IN_CONTEXT:  # up to 0.5.15 as the draft worker sets it
        spec_info.num_tokens_per_req = num_steps + 1
    return spec_info


def expert_ids(layer: int, rank: int, rows: int):
    """Ids that name their layer, rank, row and column; none of them is zero."""
    ids = torch.arange(1, rows * TOPK + 1, dtype=torch.int32).reshape(rows, TOPK)
    return ids + 10_000_000 * layer + 100_000 * rank


class TestRoutedExpertsCapacity(CustomTestCase):
    def check(self, c: Configuration, forwards):
        """Each rank reads its own rows back, out of what all the ranks captured."""
        with c.published():
            capturer = c.build_capturer()
            for forward in forwards:
                self.check_forward(c, capturer, forward, f"{c}, {forward}")

    def capture(self, capturer, layer, captured, what):
        try:
            capturer.capture(layer, captured)
        except RuntimeError as e:
            self.fail(
                f"capturing {len(captured)} rows overflows the routed experts "
                f"buffer: {e}; {what}"
            )

    def check_forward(self, c, capturer, forward, what):
        for layer in range(NUM_LAYERS):
            captured = torch.full(
                (sum(forward.padded_rows), TOPK), -1, dtype=torch.int32
            )
            start = 0
            for rank, rows in enumerate(forward.rows):
                captured[start : start + rows] = expert_ids(layer, rank, rows)
                start += forward.padded_rows[rank]
            self.capture(capturer, layer, captured, what)
        if forward.graph_batch is None and forward.rows != forward.padded_rows:
            return  # How eager mode cuts its padding off is not the capturer's.
        for rank, rows in enumerate(forward.rows):
            slots = torch.arange(rows).flip(0)
            for no_copy_to_cpu in (True, False):
                got = self.read_back(
                    c, capturer, forward, rank, slots, no_copy_to_cpu, what
                )
                want = torch.stack(
                    [expert_ids(layer, rank, rows) for layer in range(NUM_LAYERS)],
                    dim=1,
                )
                self.assertTrue(
                    torch.equal(got, want),
                    f"DP rank {rank} did not get its own experts back; {what}",
                )

    def read_back(self, c, capturer, forward, rank, slots, no_copy_to_cpu, what):
        capturer.host_cache.buffer.zero_()
        forward_batch = SimpleNamespace(
            forward_mode=forward.mode,
            out_cache_loc=slots,
            out_cache_loc_virtual=None,  # since 0.5.23
            global_num_tokens_cpu=list(forward.rows),
            global_num_tokens_gpu=torch.tensor(forward.rows, dtype=torch.int32),
            dp_local_start_pos=None,
            dp_local_num_tokens=None,
            spec_info=(
                verify_input(forward.rows_per_request)
                if forward.mode.is_target_verify()
                else None
            ),
        )
        with c.dp_rank(rank):
            try:
                output = capturer.on_forward_end(
                    forward_batch,
                    can_run_graph=forward.graph_batch is not None,
                    cuda_graph_batch=forward.graph_batch,
                    no_copy_to_cpu=no_copy_to_cpu,
                )
            except RuntimeError as e:
                self.fail(f"the rows of DP rank {rank} do not fit: {e}; {what}")
        if no_copy_to_cpu:
            # The overlap scheduler stores the rows later.
            rows = output.topk if hasattr(output, "topk") else output.routed_experts
            self.assertEqual(
                len(rows),
                len(slots),
                f"only {len(rows)} of the {len(slots)} rows of DP rank {rank} lie "
                f"inside the routed experts buffer; {what}",
            )
            if hasattr(output, "copy_to_cpu"):
                output.copy_to_cpu()
            else:  # since 0.5.15
                output.map_device_tensors(torch.Tensor.cpu)
            output.finalize()
        return capturer.host_cache.buffer[slots]

    def check_size(self, c: Configuration, rows_of_a_rank: int):
        with c.published():
            rows = c.build_capturer().device_cache.buffer.shape[0]
        self.assertLessEqual(
            rows,
            rows_of_a_rank * c.dp_size,
            f"the routed experts buffer has {rows} rows, more than a forward can "
            f"fill; {c}",
        )

    def test_decode_and_chunked_prefill(self):
        for dp_size in (1, 2, 4):
            for chunk, most in ((64, 5), (16, 16)):
                c = Configuration(
                    dp_size=dp_size,
                    chunked_prefill_size=chunk,
                    max_running_requests=most,
                )
                self.check(c, Forward.of_requests(c))
                self.check(c, Forward.prefill(c, chunk))
                self.check_size(c, max(chunk, most))

    def test_verify(self):
        for dp_size in (1, 2, 4):
            for draft_tokens in (2, 4, 7):
                # The rows of draft decode are the draft model's.
                c = Configuration(
                    dp_size=dp_size,
                    draft_tokens=draft_tokens,
                    server_args=dict(speculative_eagle_topk=8),
                )
                self.check(c, Forward.of_requests(c, draft_tokens))
                self.check(c, Forward.of_requests(c))
                self.check_size(c, 8 * draft_tokens)

    def test_verify_reads_its_own_rank(self):
        """The rows of all ranks fit, and a rank's begin where the graph put them."""
        for dp_size in (2, 4):
            c = Configuration(dp_size=dp_size, draft_tokens=4, chunked_prefill_size=64)
            self.check(c, Forward.of_requests(c, 4))
            self.check_size(c, 64)

    def test_verify_of_a_longer_adaptive_state(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            slot = {"candidate_steps": [1, 6]}
            json.dump(slot | {"1": slot}, file)  # since 0.5.15 by batch size
            file.flush()
            for initial in (2,) if IN_CONTEXT else (2, 9):
                c = Configuration(
                    draft_tokens=initial,
                    server_args=dict(
                        speculative_adaptive=True,
                        speculative_adaptive_config=file.name,
                    ),
                )
                for draft_tokens in (initial, 7):
                    self.check(c, Forward.of_requests(c, draft_tokens))
                self.check_size(c, 8 * max(initial, 7))

    def test_unchunked_prefill(self):
        """One request of any length or several; without a radix cache, both."""
        for chunk, max_prefill_tokens, context_len in (
            (-1, 20, 50),
            (0, 50, 20),
            (-1, 30, 30),
        ):
            rows = {}
            for radix_cache in (True, False):
                c = Configuration(
                    chunked_prefill_size=chunk,
                    max_prefill_tokens=max_prefill_tokens,
                    context_len=context_len,
                    server_args=dict(disable_radix_cache=not radix_cache),
                )
                with c.published():
                    rows[radix_cache] = most_admitted_rows(c, radix_cache)
                for dp_size in (1, 2, 4):
                    c = dataclasses.replace(c, dp_size=dp_size)
                    self.check(c, Forward.prefill(c, rows[radix_cache]))
                    self.check(c, Forward.of_requests(c))
                    # One token may be left of max_prefill_tokens.
                    self.check_size(c, rows[radix_cache] + 1)
            self.assertLess(rows[True], rows[False])

    def test_unchunked_prefill_up_to_the_slots(self):
        for radix_cache in (True, False):
            c = Configuration(
                chunked_prefill_size=-1,
                max_prefill_tokens=120,
                context_len=100,
                num_slots=80,
                server_args=dict(disable_radix_cache=not radix_cache),
            )
            with c.published():
                rows = max(
                    admitted_rows(c, [waiting_request(n, True)], radix_cache)
                    for n in range(1, 101)
                )
            self.assertGreater(rows, 70)
            self.check(c, Forward.prefill(c, rows))
            self.check_size(c, 80)

    def test_unchunked_prefill_of_a_multimodal_model(self):
        """Under the Transformers backend it has no radix cache, whatever the flag."""
        c = Configuration(
            chunked_prefill_size=-1,
            max_prefill_tokens=20,
            context_len=50,
            is_multimodal=True,
        )
        with c.published():
            rows = most_admitted_rows(c, radix_cache=False)
        self.check(c, Forward.prefill(c, rows))

    def test_unchunked_prefill_and_verify(self):
        for dp_size in (1, 2):
            c = Configuration(
                dp_size=dp_size,
                chunked_prefill_size=-1,
                max_prefill_tokens=4,
                context_len=9,
                draft_tokens=4,
            )
            self.check(c, Forward.prefill(c, 9))
            self.check(c, Forward.of_requests(c, 4))
            self.check_size(c, 8 * 4)

    @unittest.skipUnless(
        hasattr(routed_experts, "get_moe_a2a_backend"), "as with other backends"
    )
    def test_deepep(self):
        """Each DP rank gathers its own rows and reads them from row 0 on."""
        backend = SimpleNamespace(is_deepep=lambda: True, is_deepep_v2=lambda: False)
        c = Configuration(
            dp_size=4, chunked_prefill_size=-1, max_prefill_tokens=60, context_len=90
        )
        with (
            patch.object(routed_experts, "get_moe_a2a_backend", lambda: backend),
            patch.object(
                routed_experts,
                "attn_tp_all_gather_into_tensor",
                lambda gathered, local: gathered.copy_(local),
            ),
            patch.object(
                routed_experts, "get_attention_tp_size", lambda: 1, create=True
            ),
            c.published(),
        ):
            with c.dp_rank(3):
                capturer = c.build_capturer()
                rows = most_admitted_rows(c, radix_cache=True)
                forward = Forward([1, 1, 1, rows], [rows], mode=ForwardMode.EXTEND)
                what = f"DeepEP, {c}"
                for layer in range(NUM_LAYERS):
                    self.capture(capturer, layer, expert_ids(layer, 3, rows), what)
            slots = torch.arange(rows)
            got = self.read_back(c, capturer, forward, 3, slots, True, what)
            want = [expert_ids(layer, 3, rows) for layer in range(NUM_LAYERS)]
            self.assertTrue(torch.equal(got, torch.stack(want, dim=1)), what)
            self.assertLessEqual(
                capturer.device_cache.buffer.shape[0],
                rows,
                "the routed experts buffer has rows of other DP ranks",
            )

    def test_padding(self):
        """A rank pads to a multiple of its attention TP size."""
        for dp_size in (1, 2):
            for draft_tokens in (None, 3):
                c = Configuration(
                    dp_size=dp_size,
                    attn_tp_size=4,
                    max_running_requests=7,
                    draft_tokens=draft_tokens,
                )
                self.check(c, Forward.of_requests(c, draft_tokens))
                self.check_size(c, 8 * (draft_tokens or 1))
            c = Configuration(
                dp_size=dp_size,
                attn_tp_size=4,
                chunked_prefill_size=-1,
                num_slots=57,
            )
            self.check(c, Forward.prefill(c, 57))
            self.check_size(c, 60)

    def test_two_batch_overlap_padding(self):
        """A graph's batch is cut in two halves of such multiples."""
        for dp_size in (1, 2):
            c = Configuration(
                dp_size=dp_size,
                attn_tp_size=4,
                max_running_requests=9,
                draft_tokens=3,
                server_args=dict(enable_two_batch_overlap=True),
            )
            self.check(c, Forward.of_requests(c, 3))
            self.check_size(c, 16 * 3)

    def test_context_parallel_padding(self):
        """Up to 0.5.12 to a multiple of the CP size, then of twice that in zigzag."""
        c = Configuration(attn_cp_size=2, chunked_prefill_size=-1, num_slots=61)
        zigzag = contextlib.nullcontext()
        rows = 64
        if IN_CONTEXT:
            from sglang.srt.layers.cp import base

            kind = base.ContextParallelStrategyKind.ZIGZAG
            zigzag = patch.object(base, "_STRATEGY", SimpleNamespace(kind=kind))
        elif not hasattr(cp_utils, "get_cp_padding_align_size"):
            rows = 62
        with zigzag:
            self.check(c, [Forward([61], [rows], mode=ForwardMode.EXTEND)])
            self.check_size(c, rows)

    def test_dynamic_chunks(self):
        for max_prefill_tokens, rows in ((100, 100), (64, 80)):
            c = Configuration(
                chunked_prefill_size=64,
                max_prefill_tokens=max_prefill_tokens,
                server_args=dict(pp_size=2, enable_dynamic_chunking=True),
            )
            self.check(c, Forward.prefill(c, rows))
            self.check_size(c, rows)

    def test_prefill_graph(self):
        """A prefill is padded up to a captured size."""
        for enabled in (True, False):
            if CudaGraphConfig is None:
                args = dict(
                    piecewise_cuda_graph_tokens=[16, 40],
                    disable_piecewise_cuda_graph=not enabled,
                )
            else:
                backend = Backend.BREAKABLE if enabled else Backend.DISABLED
                prefill = PhaseConfig(backend=backend, bs=[16, 40], max_bs=40)
                args = dict(cuda_graph_config=CudaGraphConfig(prefill=prefill))
            c = Configuration(chunked_prefill_size=32, server_args=args)
            rows = 40 if enabled else 32
            self.check(c, [Forward([32], [rows], mode=ForwardMode.EXTEND)])
            self.check_size(c, rows)


if __name__ == "__main__":
    unittest.main()
