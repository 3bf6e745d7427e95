"""A token's DSA top-k indices as the next pipeline stage gets them, on four GPUs.

Two stages of two ranks, each rank a process with a GPU of its own. The ranks of the first
stage run the indexer's top-k kernel on the same scores and send their rows; those of the
next one have to get, of each token, the set of indices that the kernel gives there too.
"""

import os
import subprocess
import sys
import unittest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import reserve_ports
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=60, suite="stage-c-test-4-gpu-h100")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
INDEX_TOPK = 2048
TP_SIZE, PP_SIZE = 2, 2
HIDDEN_SIZE = 1024
# Decode batches and the length of their requests; one token and three are no multiple of TP_SIZE.
BATCHES = [(n, length) for n in (1, 2, 3, 4) for length in (3000, 5200, 16384)]


def make_scores(num_tokens: int, length: int) -> torch.Tensor:
    """(num_tokens, length) float32; no two of a row are alike, so its top-k is one set."""
    generator = torch.Generator("cuda").manual_seed(SEED + 1000 * num_tokens + length)
    order = torch.rand(num_tokens, length, generator=generator, device="cuda")
    return (order.argsort(-1).float() / length).contiguous()


def top_k(scores: torch.Tensor) -> torch.Tensor:
    """(num_tokens, INDEX_TOPK) int32, as a decode step's indexer makes them."""
    from sgl_kernel import fast_topk_transform_fused

    num_tokens, length = scores.shape
    ints = dict(dtype=torch.int32, device="cuda")
    lengths = torch.full((num_tokens,), length, **ints)
    # Each request has the same places in the KV cache, so that places are positions.
    table = torch.arange(length, **ints).repeat(num_tokens, 1)
    cu_seqlens = torch.arange(num_tokens + 1, **ints)
    return fast_topk_transform_fused(scores, lengths, table, cu_seqlens, INDEX_TOPK)


def run_rank(rank: int, init_method: str) -> None:
    from sglang.srt.distributed import (
        get_pp_group,
        get_tp_group,
        init_distributed_environment,
        initialize_model_parallel,
    )

    torch.cuda.set_device(rank)
    init_distributed_environment(
        TP_SIZE * PP_SIZE, rank, init_method, local_rank=rank, backend="nccl"
    )
    initialize_model_parallel(
        tensor_model_parallel_size=TP_SIZE, pipeline_model_parallel_size=PP_SIZE
    )
    for num_tokens, length in BATCHES:
        scores = make_scores(num_tokens, length)
        hidden_states = scores[:, :HIDDEN_SIZE].contiguous()
        if get_pp_group().is_first_rank:
            tensors = {"hidden_states": hidden_states, "topk_indices": top_k(scores)}
            get_pp_group().send_tensor_dict(tensors, all_gather_group=get_tp_group())
            continue
        received = get_pp_group().recv_tensor_dict(all_gather_group=get_tp_group())
        torch.testing.assert_close(received["hidden_states"], hidden_states)
        # What is there twice has taken another one's place.
        rows = zip(received["topk_indices"].tolist(), top_k(scores).tolist())
        lost = [INDEX_TOPK - len(set(row) & set(own)) for row, own in rows]
        print(f"lost {rank} {num_tokens} {length} {lost}", flush=True)
    torch.distributed.barrier()


class TestDSAPipelineRowsCuda(CustomTestCase):
    def test_decode_batches(self):
        if get_device_count() < TP_SIZE * PP_SIZE:
            self.skipTest("needs four GPUs")
        port, guard = reserve_ports()
        with guard:
            command = [sys.executable, __file__, f"tcp://127.0.0.1:{port}"]
            ranks = [
                subprocess.Popen(
                    [*command, str(rank)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(TP_SIZE * PP_SIZE)
            ]
            outputs = []
            try:
                for process in ranks:
                    outputs.append(process.communicate(timeout=300)[0])
            finally:
                for process in ranks:
                    process.kill()
        for process, output in zip(ranks, outputs):
            self.assertEqual(process.returncode, 0, output[-4000:])
        lines = [
            line.removeprefix("lost ").split(maxsplit=3)
            for line in "\n".join(outputs).splitlines()
            if line.startswith("lost ")
        ]
        self.assertEqual(len(lines), TP_SIZE * len(BATCHES))
        most = {}
        for _, num_tokens, length, lost in lines:
            numbers = [int(each) for each in lost.strip("[]").split(",")]
            key = f"{num_tokens} of {length} keys"
            most[key] = max(most.get(key, 0), *numbers)
        print(f"measured: indices lost of {INDEX_TOPK}, at most: {most}")
        self.assertEqual(
            sum(most.values()),
            0,
            f"the next stage got rows without some of their indices: {most}",
        )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("tcp:"):
        run_rank(int(sys.argv[2]), sys.argv[1])
    else:
        unittest.main()
