"""DeepSeek-V4 records its expert distribution, hash layers included."""

import os
import sys
import tempfile
import unittest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import deepseek_v4

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
NUM_LAYERS = 4
TOPK = 6
# Up to 128 tokens, all forwards share a kernel that takes long to compile.
PROMPT_LENS = (17, 33, 70)
NEW_TOKENS = 9
ARGS = [
    *("--load-format", "dummy"),
    *("--moe-runner-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768"),
    # 0.5.12.post1 compiles a kernel for each length up to this.
    *("--chunked-prefill-size", "256"),
    *("--expert-distribution-recorder-mode", "stat"),
    "--disable-radix-cache",
    # Overlapped, a finished request runs one more step, which counts too.
    "--disable-overlap-schedule",
]
ENV = {"SGLANG_DSV4_FP4_EXPERTS": "0"}


def _record(server, folder: str) -> torch.Tensor:
    """Logical counts (layers, experts) of one recorded run."""
    server.post("start_expert_distribution_record")
    prompts = [[5 + (i + 97 * SEED) % 900 for i in range(n)] for n in PROMPT_LENS]
    server.generate(prompts, NEW_TOKENS)
    server.post("stop_expert_distribution_record")
    server.post("dump_expert_distribution_record")
    (dump,) = Path(folder).glob("*.pt")
    data = torch.load(dump, weights_only=False)
    dump.unlink()
    return data["logical_count"].sum(dim=0)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestDsv4ExpertDistributionCuda(CustomTestCase):
    def _check(self, counts: torch.Tensor):
        # The last new token of a request is sampled, never run.
        tokens = sum(PROMPT_LENS) + len(PROMPT_LENS) * (NEW_TOKENS - 1)
        print(f"measured: {counts.sum(dim=-1).tolist()} of {tokens * TOPK} selected")
        self.assertEqual(counts.shape[0], NUM_LAYERS)
        self.assertEqual(
            counts.sum(dim=-1).tolist(),
            [tokens * TOPK] * NUM_LAYERS,
            "counts of the layers, of which the first three are hash layers",
        )

    def test_every_layer_is_counted(self):
        # No batch is padded: without DeepEP the model tells no layer of padding.
        args = [*ARGS, "--cuda-graph-bs", "1", "2", "3"]
        with tempfile.TemporaryDirectory() as folder:
            model = deepseek_v4(Path(folder) / "model", NUM_LAYERS)
            env = {**ENV, "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": folder}
            with launch_server(model, args, env) as server:
                self._check(_record(server, folder))
                # Recording again starts from zero.
                self._check(_record(server, folder))


if __name__ == "__main__":
    unittest.main()
