"""With DP attention, a request gets the experts that it was routed to."""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

import pybase64
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import NUM_WORDS, qwen3_moe, qwen3_moe_weights

register_cuda_ci(est_time=120, suite="stage-b-test-2-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
ARGS = [
    *("--moe-runner-backend", "triton"),
    *("--attention-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "65536"),
    # More running requests than the tokens of one prefill chunk.
    *("--chunked-prefill-size", "128"),
    *("--max-running-requests", "512"),
    *("--cuda-graph-max-bs", "256"),
    "--enable-return-routed-experts",
    "--disable-radix-cache",
]
DP_ARGS = ["--tp", "2", "--dp", "2", "--enable-dp-attention"]


def extract_routed_experts(encoded: str) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(pybase64.b64decode(encoded)), dtype=torch.int32
    ).clone()


class TestRoutedExpertsDPBufferCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        if get_device_count() < 2:
            raise unittest.SkipTest("needs two GPUs")
        from safetensors.torch import save_file

        cls.folder = tempfile.TemporaryDirectory()
        root = Path(cls.folder.name)
        cls.model = qwen3_moe(root)
        cls.config = json.loads((root / "config.json").read_text())
        save_file(qwen3_moe_weights(cls.config, SEED), root / "model.safetensors")
        generator = torch.Generator().manual_seed(SEED)
        cls.prompts = [
            torch.randint(3, NUM_WORDS - 1, (5 + n % 40,), generator=generator).tolist()
            for n in range(192)
        ]

    @classmethod
    def tearDownClass(cls):
        if hasattr(cls, "folder"):
            cls.folder.cleanup()

    def test_experts_equal_those_without_dp_attention(self):
        new_tokens = 6
        results = {}
        for name, args in (("dp", DP_ARGS), ("plain", [])):
            with launch_server(self.model, ARGS + args) as server:
                results[name] = server.generate(
                    self.prompts, new_tokens, return_routed_experts=True
                )
        shape = (
            -1,
            self.config["num_hidden_layers"],
            self.config["num_experts_per_tok"],
        )
        wrong = []
        for i, (dp, plain) in enumerate(zip(results["dp"], results["plain"])):
            self.assertEqual(dp["output_ids"], plain["output_ids"])
            got, want = (
                extract_routed_experts(r["meta_info"]["routed_experts"]).view(shape)
                for r in (dp, plain)
            )
            self.assertEqual(len(got), len(self.prompts[i]) + new_tokens - 1)
            if not torch.equal(got.sort(-1).values, want.sort(-1).values):
                wrong.append(i)
        print(f"measured: {len(wrong)} of {len(self.prompts)} requests differ")
        self.assertEqual(wrong, [], f"{len(wrong)} requests got other rows' experts")


if __name__ == "__main__":
    unittest.main()
