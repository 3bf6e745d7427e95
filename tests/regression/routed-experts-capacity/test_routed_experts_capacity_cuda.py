"""A request gets its experts from a verify, and from an unchunked prefill.

The drafts are n-grams: up to 0.5.14 a draft model's runner would put its own capturer
in place of the target's, and no experts with it would be the target's.
"""

import json
import os
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybase64
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import NUM_WORDS, qwen3_moe, qwen3_moe_weights

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
MAX_PREFILL_TOKENS = 512
CONTEXT_LENGTH = 2048
DRAFT_TOKENS = 8
NEW_TOKENS = 12
ARGS = [
    *("--moe-runner-backend", "triton"),
    *("--attention-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "65536"),
    *("--context-length", str(CONTEXT_LENGTH)),
    *("--max-prefill-tokens", str(MAX_PREFILL_TOKENS)),
    *("--max-running-requests", "64", "--cuda-graph-max-bs", "64"),
    # A prefill graph could be larger than a chunk.
    "--disable-piecewise-cuda-graph",
    "--enable-return-routed-experts",
    "--disable-radix-cache",
]
CHUNKS = ["--chunked-prefill-size", "128"]
SERVERS = {
    "plain": CHUNKS,
    # 64 requests have 512 rows in a verify.
    "verify": CHUNKS
    + [
        *("--speculative-algorithm", "NGRAM"),
        *("--speculative-num-draft-tokens", str(DRAFT_TOKENS)),
    ],
    "unchunked": ["--chunked-prefill-size", "-1"],
}


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestRoutedExpertsCapacityCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        from safetensors.torch import save_file

        cls.folder = tempfile.TemporaryDirectory()
        root = Path(cls.folder.name)
        cls.model = qwen3_moe(root)
        cls.config = json.loads((root / "config.json").read_text())
        save_file(qwen3_moe_weights(cls.config, SEED), root / "model.safetensors")
        generator = torch.Generator().manual_seed(SEED)
        # As many as run at once, then pairs of which an unchunked forward has one:
        # the second is longer than all that max_prefill_tokens leave.
        lengths = [5 + n % 40 for n in range(64)]
        lengths += [MAX_PREFILL_TOKENS - 12, CONTEXT_LENGTH - 48] * 6
        cls.prompts = [
            torch.randint(3, NUM_WORDS - 1, (n,), generator=generator).tolist()
            for n in lengths
        ]
        # Servers take most of the time, so they start together.
        cls.pool = ThreadPoolExecutor(len(SERVERS))
        cls.results = {
            name: cls.pool.submit(cls._generate_twice, args)
            for name, args in SERVERS.items()
        }

    @classmethod
    def tearDownClass(cls):
        cls.pool.shutdown()
        cls.folder.cleanup()

    @classmethod
    def _generate_twice(cls, args):
        """The second time, n-grams of the first one are drafts."""
        with launch_server(cls.model, ARGS + args) as server:
            return [
                server.generate(cls.prompts, NEW_TOKENS, return_routed_experts=True)
                for _ in range(2)
            ]

    def _experts(self, result) -> torch.Tensor:
        """(tokens, layers, experts of a token), in the order of their ids"""
        encoded = result["meta_info"]["routed_experts"]
        flat = torch.frombuffer(
            bytearray(pybase64.b64decode(encoded)), dtype=torch.int32
        )
        layers = self.config["num_hidden_layers"]
        experts = flat.view(-1, layers, self.config["num_experts_per_tok"])
        return experts.sort(-1).values

    def check_against_plain(self, name: str):
        plain = self.results["plain"].result()
        for nth, (results, expected) in enumerate(
            zip(self.results[name].result(), plain)
        ):
            wrong = []
            for prompt, got, want in zip(self.prompts, results, expected):
                self.assertEqual(got["output_ids"], want["output_ids"])
                experts = self._experts(got)
                self.assertEqual(len(experts), len(prompt) + NEW_TOKENS - 1)
                if not torch.equal(experts, self._experts(want)):
                    wrong.append(len(prompt))
            print(
                f"measured: {len(wrong)} of {len(self.prompts)} requests got other "
                f"experts from {name}, run {nth}"
            )
            self.assertEqual(
                wrong, [], f"{len(wrong)} requests got other rows' experts from {name}"
            )

    def test_verify(self):
        self.check_against_plain("verify")
        verifies = [
            result["meta_info"]["spec_verify_ct"]
            for result in self.results["verify"].result()[1]
        ]
        print(f"measured: {sum(verifies) / len(verifies):.2f} verifies a request")
        self.assertLess(
            sum(verifies),
            len(verifies) * (NEW_TOKENS - 1),
            "no draft was accepted, so no verify had more than one row of a request",
        )

    def test_unchunked_prefill(self):
        self.check_against_plain("unchunked")


if __name__ == "__main__":
    unittest.main()
