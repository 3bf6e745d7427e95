"""DeepSeek-V4 with dummy weights captures CUDA graphs and generates.

The table from token id to expert ids is int32, which the dummy loader does not fill.
Fresh device memory may be zero and hide that, so the process first fills memory with
a pattern and frees it.
"""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-large")

POISON_BYTES = 8 << 30
# Up to 128 tokens, extend and decode share a kernel that takes long to compile.
BATCH = (4, 24)
DECODE_STEPS = 8


def _capture_and_generate(model_path: str) -> None:
    poison = torch.full((POISON_BYTES // 4,), 0x7F7F7F7F, dtype=torch.int32).cuda()
    del poison

    from model_runners import load_dummy_model
    from sglang.bench_one_batch import prepare_synthetic_inputs_for_latency_test
    from sglang.srt.layers.moe.hash_topk import HashTopK

    runner = load_dummy_model(model_path, max_total_tokens=32768, cuda_graph_bs=[1, 4])

    tables = [m for m in runner.torch_runner.model.modules() if isinstance(m, HashTopK)]
    assert tables, "the model has no hash layers"
    for table in tables:
        low, high = table.tid2eid.min().item(), table.tid2eid.max().item()
        assert 0 <= low <= high < table.num_experts, f"expert ids {low}..{high}"
    print(f"measured: {len(tables)} hash layers, expert ids {low} to {high}")

    reqs = prepare_synthetic_inputs_for_latency_test(*BATCH)
    next_token_ids, _, batch = runner.extend(reqs)
    for _ in range(DECODE_STEPS):
        next_token_ids, logits = runner.decode(next_token_ids, batch)
        assert logits.isfinite().all(), "logits are not finite"
    vocab_size = runner.torch_runner.model_config.vocab_size
    assert ((next_token_ids >= 0) & (next_token_ids < vocab_size)).all()


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestHashTopKDummyWeightsCuda(CustomTestCase):
    def test_capture_and_generate(self):
        from tiny_models import deepseek_v4

        with tempfile.TemporaryDirectory() as folder:
            # A CUDA error poisons its process, so the model runs in one of its own.
            result = subprocess.run(
                [sys.executable, __file__, deepseek_v4(Path(folder))],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SGLANG_DSV4_FP4_EXPERTS": "0"},
                text=True,
                errors="replace",
            )
        self.assertEqual(result.returncode, 0, result.stdout[-6000:])
        for line in result.stdout.splitlines():
            if line.startswith("measured: "):
                print(line)


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        _capture_and_generate(sys.argv[1])
    else:
        unittest.main()
