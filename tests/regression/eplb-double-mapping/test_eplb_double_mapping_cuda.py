"""DeepSeek-V4 on two GPUs says the same wherever EPLB puts its experts.

A server rebalances, and is compared with itself before. Another one has redundant
experts from the start: a rebalance would put replicas on both GPUs, and without an
all-to-all backend each of these would add the same expert's output
(https://github.com/sgl-project/sglang/pull/32962).
"""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import deepseek_v4, deepseek_v4_weights

register_cuda_ci(est_time=240, suite="stage-b-test-2-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
NUM_LAYERS = 4
NUM_EXPERTS = 256
VOCAB_SIZE = 1024
# All of the first GPU, from where a rebalance moves half of them.
HOT_EXPERTS = range(10, 16)
# Redundant experts of each GPU.
NUM_REDUNDANT = 8
# Together up to 128 tokens, for which all forwards share a kernel that takes long to
# compile.
PROMPT_LENS = (30, 29, 28, 27)
NEW_TOKENS = 8
REBALANCE_ITERATIONS = 100
# Rounding, of sums that other experts' places put in another order, is below 0.05;
# experts in place of others change a prompt's log-probabilities by 0.3 and more.
LIMIT = 0.15
ARGS = [
    *("--moe-runner-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768"),
    # 0.5.12.post1 compiles a kernel for each length up to this.
    *("--chunked-prefill-size", "256"),
    *("--tp", "2", "--ep-size", "2"),
    *("--cuda-graph-bs", "4"),
    "--disable-radix-cache",
]
EPLB = [
    "--enable-eplb",
    *("--eplb-rebalance-num-iterations", str(REBALANCE_ITERATIONS)),
]
ENV = {
    "SGLANG_DSV4_FP4_EXPERTS": "0",
    # Each rank logs for each layer what it sends to others.
    "SGLANG_EXPERT_LOCATION_UPDATER_LOG_METRICS": "1",
}


def log_probabilities(server):
    """For each prompt, those of its own tokens, and the new ones with theirs."""
    prompts = [
        [5 + (i * i + 31 * n + 97 * SEED) % 900 for i in range(n)] for n in PROMPT_LENS
    ]
    results = server.generate(
        prompts, NEW_TOKENS, return_logprob=True, logprob_start_len=0
    )
    return [
        (
            [each[0] for each in result["meta_info"]["input_token_logprobs"][1:]],
            [each[:2] for each in result["meta_info"]["output_token_logprobs"]],
        )
        for result in results
    ]


def difference(found, expected):
    """Each prompt's mean difference, up to where the new tokens part."""
    means = []
    for (prompt, new), (expected_prompt, expected_new) in zip(found, expected):
        pairs = list(zip(prompt, expected_prompt))
        for (value, token), (expected_value, expected_token) in zip(new, expected_new):
            if token != expected_token:
                break
            pairs.append((value, expected_value))
        means.append(sum(abs(a - b) for a, b in pairs) / len(pairs))
    return means


def redundant_location():
    """Of each GPU's experts some twice, on that GPU; the replicas come first."""
    half = NUM_EXPERTS // 2
    replicas = [*range(half, half + NUM_REDUNDANT)], [*HOT_EXPERTS, 0, 1]
    experts = [
        *(*replicas[0], *reversed(range(half, NUM_EXPERTS))),
        *(*replicas[1], *reversed(range(half))),
    ]
    return {"physical_to_logical_map": [experts] * NUM_LAYERS}


@unittest.skipIf(get_device_count() < 2, "needs two GPUs")
class TestEplbDoubleMappingCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        from safetensors.torch import save_file

        cls.folder = tempfile.TemporaryDirectory()
        cls.root = Path(cls.folder.name)
        cls.model = deepseek_v4(cls.root, NUM_LAYERS, vocab_size=VOCAB_SIZE)
        config = json.loads((cls.root / "config.json").read_text())
        weights = deepseek_v4_weights(config, SEED, HOT_EXPERTS, "cuda")
        save_file(weights, cls.root / "model.safetensors")
        del weights
        torch.cuda.empty_cache()
        try:
            with launch_server(cls.model, [*ARGS, *EPLB], ENV) as server:
                cls.expected = log_probabilities(server)
                cls.rebalanced_before = server.log.count("rebalance end")
                server.generate([[7] * 20], REBALANCE_ITERATIONS)
                cls.rebalanced = server.log.count("rebalance end")
                cls.moved_layers = server.log.count("isend_nbytes_of_gpu")
                cls.found = log_probabilities(server)
        except BaseException:
            cls.folder.cleanup()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def _check(self, found, when: str):
        differences = difference(found, self.expected)
        worst = max(differences)
        print(f"measured: {when}, off by {[round(x, 3) for x in differences]}")
        self.assertLess(
            worst, LIMIT, f"{when}, log-probabilities are off by {worst:.3f}"
        )

    def test_log_probabilities_after_a_rebalance(self):
        self.assertEqual(self.rebalanced_before, 0, "the server began with a rebalance")
        self.assertGreater(self.rebalanced, 0, "there was no rebalance")
        self.assertEqual(
            self.moved_layers,
            self.rebalanced * NUM_LAYERS,
            "layers whose experts another GPU got, in all ranks' rebalances",
        )
        self._check(self.found, "after a rebalance")

    def test_log_probabilities_with_redundant_experts(self):
        location = self.root / "location.json"
        location.write_text(json.dumps(redundant_location()))
        args = ["--ep-num-redundant-experts", str(2 * NUM_REDUNDANT)]
        args += ["--init-expert-location", str(location)]
        with launch_server(self.model, [*ARGS, *args], ENV) as server:
            found = log_probabilities(server)
        self._check(found, "with redundant experts")


if __name__ == "__main__":
    unittest.main()
