"""The routed experts buffer has to hold the rows of every DP attention rank.

Under DP attention, each rank captures the experts of the gathered batch: rank r's
rows begin at r * cuda_graph_batch (at the sum of the earlier ranks' tokens in eager
mode), and the rank reads its own rows back from there. A rank runs up to
max_running_requests requests, so the buffer needs dp_size times as many rows
(https://github.com/sgl-project/sglang/pull/26123).
"""

import unittest
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.layers import dp_attention  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

try:
    from sglang.srt.state_capturer.routed_experts import (  # noqa: E402
        RoutedExpertsCapturer,
    )
except ModuleNotFoundError:  # up to 0.5.11
    from sglang.srt.layers.moe.routed_experts_capturer import (  # noqa: E402
        RoutedExpertsCapturer,
    )

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

NUM_LAYERS = 2
TOPK = 3
NUM_SLOTS = 256

# (dp_size, chunked_prefill_size of a rank, max_running_requests of a rank)
MORE_REQUESTS_THAN_ONE_CHUNK = (
    (2, 4, 16),
    (2, 12, 16),
    (4, 2, 9),
    (8, 3, 20),
)
FEWER_REQUESTS_THAN_ONE_CHUNK = ((2, 64, 16), (4, 16, 16), (8, 20, 3))
ONE_RANK = ((1, 4, 16), (1, 64, 16))
CONFIGURATIONS = MORE_REQUESTS_THAN_ONE_CHUNK + FEWER_REQUESTS_THAN_ONE_CHUNK + ONE_RANK

_torch_zeros = torch.zeros


def zeros_without_pinning(*args, **kwargs):
    """The host cache is pinned memory, which needs a GPU's driver."""
    kwargs.pop("pin_memory", None)
    return _torch_zeros(*args, **kwargs)


def global_server_args(server_args):
    """As the process-wide arguments; since 0.5.15 they lie in a context."""
    if hasattr(server_args_module, "_global_server_args"):
        return patch.object(server_args_module, "_global_server_args", server_args)
    from sglang.srt.runtime_context import get_context

    return patch.object(get_context(), "_server_args", server_args)


def build_capturer(
    dp_size, chunked_prefill_size, max_running_requests, num_fused_shared_experts=0
):
    server_args = ServerArgs(
        model_path="dummy",
        tp_size=dp_size,
        dp_size=dp_size,
        chunked_prefill_size=chunked_prefill_size,
        enable_dp_attention=dp_size > 1,
    )
    text_config = SimpleNamespace(
        num_hidden_layers=NUM_LAYERS, num_experts_per_tok=TOPK
    )
    with (
        global_server_args(server_args),
        patch.object(torch, "zeros", zeros_without_pinning),
    ):
        return RoutedExpertsCapturer.create(
            enable=True,
            model_config=SimpleNamespace(hf_text_config=text_config),
            num_fused_shared_experts=num_fused_shared_experts,
            num_tokens=NUM_SLOTS,
            max_running_requests=max_running_requests,
            device="cpu",
        )


@contextmanager
def dp_attention_rank(rank: int, dp_size: int):
    with (
        patch.object(dp_attention, "_ENABLE_DP_ATTENTION_FLAG", dp_size > 1),
        patch.object(dp_attention, "_ATTN_DP_SIZE", dp_size),
        patch.object(dp_attention, "_ATTN_DP_RANK", rank),
    ):
        yield


def expert_ids(layer: int, rank: int, num_tokens: int, columns: int):
    """Ids that name their layer, rank, token and column; none of them is zero."""
    ids = torch.arange(1, num_tokens * columns + 1, dtype=torch.int32)
    return ids.reshape(num_tokens, columns) + 1_000_000 * layer + 10_000 * rank


def gathered_expert_ids(layer, tokens_of_rank, graph_batch, columns):
    """What every rank captures in a layer: the gathered rows of all the ranks.

    A CUDA graph pads each rank's rows to its batch, eager mode does not.
    """
    rows = []
    for rank, num_tokens in enumerate(tokens_of_rank):
        rows.append(expert_ids(layer, rank, num_tokens, columns))
        if graph_batch is not None:
            padding = graph_batch - num_tokens
            rows.append(torch.full((padding, columns), -1, dtype=torch.int32))
    return torch.cat(rows)


def forward_batches(dp_size, chunked_prefill_size, max_running_requests):
    """Yield (tokens of each rank, graph batch) of what a server may run.

    The graph batch is None in eager mode.
    """
    for batch in range(1, max_running_requests + 1):
        full = [batch] * dp_size
        # The other ranks have fewer requests, the last one none.
        uneven = [max(batch - 2 * rank, 1) for rank in range(dp_size - 1)] + [0]
        for tokens_of_rank in (full, uneven, uneven[::-1]):
            yield tokens_of_rank, batch
            # Eager decode: without CUDA graphs, or above the captured sizes.
            yield tokens_of_rank, None
    # Prefill: each rank has one chunk, or only one of them has.
    yield [chunked_prefill_size] * dp_size, None
    for rank in range(dp_size):
        yield [chunked_prefill_size if r == rank else 1 for r in range(dp_size)], None


class TestRoutedExpertsDpBuffer(CustomTestCase):
    def on_forward_end(
        self, capturer, slots, rank, tokens_of_rank, graph_batch, no_copy_to_cpu
    ):
        forward_batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            out_cache_loc=slots,
            global_num_tokens_cpu=list(tokens_of_rank),
            global_num_tokens_gpu=torch.tensor(tokens_of_rank, dtype=torch.int32),
            dp_local_start_pos=None,
            dp_local_num_tokens=None,
        )
        with dp_attention_rank(rank, len(tokens_of_rank)):
            return capturer.on_forward_end(
                forward_batch,
                can_run_graph=graph_batch is not None,
                cuda_graph_batch=graph_batch,
                no_copy_to_cpu=no_copy_to_cpu,
            )

    def check_slices(self, configuration):
        """Each rank's slice has a row for each of the rank's tokens."""
        capturer = build_capturer(*configuration)
        for tokens_of_rank, graph_batch in forward_batches(*configuration):
            for rank, num_tokens in enumerate(tokens_of_rank):
                output = self.on_forward_end(
                    capturer,
                    torch.arange(num_tokens),
                    rank,
                    tokens_of_rank,
                    graph_batch,
                    no_copy_to_cpu=True,
                )
                rows = output.topk if hasattr(output, "topk") else output.routed_experts
                self.assertEqual(
                    tuple(rows.shape),
                    (num_tokens, NUM_LAYERS, TOPK),
                    f"{configuration=}, {tokens_of_rank=}, {graph_batch=}: only "
                    f"{len(rows)} of the {num_tokens} rows of DP rank {rank} lie "
                    f"inside the routed experts buffer",
                )

    def check_rows(self, configuration, num_fused_shared_experts=0):
        """Each rank reads its own rows back, out of what all the ranks captured."""
        capturer = build_capturer(*configuration, num_fused_shared_experts)
        host_buffer = capturer.host_cache.buffer
        columns = TOPK + num_fused_shared_experts
        for tokens_of_rank, graph_batch in forward_batches(*configuration):
            what = f"{configuration=}, {tokens_of_rank=}, {graph_batch=}"
            for layer in range(NUM_LAYERS):
                rows = gathered_expert_ids(layer, tokens_of_rank, graph_batch, columns)
                try:
                    capturer.capture(layer, rows)
                except RuntimeError as e:
                    self.fail(
                        f"{what}: capturing the {len(rows)} rows of all DP ranks "
                        f"overflows the routed experts buffer: {e}"
                    )
            for rank, num_tokens in enumerate(tokens_of_rank):
                own_rows = torch.stack(
                    [
                        expert_ids(layer, rank, num_tokens, columns)[:, :TOPK]
                        for layer in range(NUM_LAYERS)
                    ],
                    dim=1,
                )
                slots = torch.arange(num_tokens).flip(0) * 2 + rank
                for no_copy_to_cpu in (True, False):
                    host_buffer.zero_()
                    output = self.on_forward_end(
                        capturer,
                        slots,
                        rank,
                        tokens_of_rank,
                        graph_batch,
                        no_copy_to_cpu,
                    )
                    if no_copy_to_cpu:
                        # The overlap scheduler stores the rows later.
                        if hasattr(output, "copy_to_cpu"):
                            output.copy_to_cpu()
                        else:  # since 0.5.15
                            output.map_device_tensors(torch.Tensor.cpu)
                        output.finalize()
                    self.assertTrue(
                        torch.equal(host_buffer[slots], own_rows),
                        f"{what}: DP rank {rank} did not get its own experts back",
                    )

    def test_slices_lie_inside_with_more_requests_than_one_chunk(self):
        for configuration in MORE_REQUESTS_THAN_ONE_CHUNK:
            self.check_slices(configuration)

    def test_slices_lie_inside_with_fewer_requests_than_one_chunk(self):
        for configuration in FEWER_REQUESTS_THAN_ONE_CHUNK + ONE_RANK:
            self.check_slices(configuration)

    def test_own_rows_with_more_requests_than_one_chunk(self):
        for configuration in MORE_REQUESTS_THAN_ONE_CHUNK:
            self.check_rows(configuration)

    def test_own_rows_with_fewer_requests_than_one_chunk(self):
        for configuration in FEWER_REQUESTS_THAN_ONE_CHUNK + ONE_RANK:
            self.check_rows(configuration)

    def test_own_rows_without_the_fused_shared_experts(self):
        self.check_rows((2, 4, 16), num_fused_shared_experts=1)

    def test_buffer_is_not_larger_than_needed(self):
        for configuration in CONFIGURATIONS:
            dp_size, chunked_prefill_size, max_running_requests = configuration
            rows = build_capturer(*configuration).device_cache.buffer.shape[0]
            self.assertLessEqual(
                rows,
                max(chunked_prefill_size * dp_size, max_running_requests * dp_size),
                f"{configuration=}: the routed experts buffer has {rows} rows, more "
                "than all DP ranks can fill",
            )


if __name__ == "__main__":
    unittest.main()
