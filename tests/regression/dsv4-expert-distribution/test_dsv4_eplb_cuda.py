"""DeepSeek-V4 on two GPUs rebalances its experts by what was recorded."""

import os
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import deepseek_v4

register_cuda_ci(est_time=120, suite="stage-b-test-2-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
ARGS = [
    *("--load-format", "dummy"),
    *("--moe-runner-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768"),
    # 0.5.12.post1 compiles a kernel for each length up to this.
    *("--chunked-prefill-size", "256"),
    *("--tp", "2", "--ep-size", "2", "--enable-eplb"),
    *("--eplb-rebalance-num-iterations", "20"),
    *("--cuda-graph-bs", "4"),
    "--disable-radix-cache",
]


@unittest.skipIf(get_device_count() < 2, "needs two GPUs")
class TestDsv4EplbCuda(CustomTestCase):
    def test_eplb_rebalances(self):
        prompt = [5 + (i + 97 * SEED) % 900 for i in range(40)]
        env = {"SGLANG_DSV4_FP4_EXPERTS": "0"}
        with tempfile.TemporaryDirectory() as folder:
            with launch_server(deepseek_v4(Path(folder)), ARGS, env) as server:
                results = [server.generate([prompt], 30)[0] for _ in range(3)]
                rebalanced = server.log.count("rebalance end")
        print(f"measured: {rebalanced} rebalances")
        self.assertGreater(rebalanced, 0)
        for result in results:
            self.assertEqual(len(result["output_ids"]), 30)


if __name__ == "__main__":
    unittest.main()
