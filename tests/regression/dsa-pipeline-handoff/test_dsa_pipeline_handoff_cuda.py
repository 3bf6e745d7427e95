"""DSA top-k indices handed on to a pipeline stage that begins with a sharing layer.

A small GLM checkpoint of six layers, of which 0 to 2 compute and 3 to 5 share: the
second of two stages computes no indices at all. Prompts are longer than index_topk:
below that every token is selected and nothing shows.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import Server, launch_server
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import NUM_WORDS, glm_moe_dsa, glm_moe_dsa_weights

register_cuda_ci(est_time=120, suite="stage-b-test-2-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
PROMPT_LENS = (3000, 4600, 7000, 100)
SCORED = 64  # positions at the end of each prompt
NEW_TOKENS = 64
SPARSE_BACKEND = "dsa"
if importlib.util.find_spec("sglang.srt.layers.attention.dsa_backend") is None:
    SPARSE_BACKEND = "nsa"  # until 0.5.12
ARGS = [
    *("--attention-backend", SPARSE_BACKEND),
    *("--moe-runner-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.6", "--max-total-tokens", "65536"),
    *("--max-running-requests", "8", "--chunked-prefill-size", "16384"),
    # Most batches are padded.
    *("--cuda-graph-bs", "1", "4"),
    "--disable-piecewise-cuda-graph",
]
# 0.5.13 serves with the kernels of the release before, too.
ENV = {"SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
PIPELINES = {
    "graphs": [],
    # Another decode kernel than the default, the one that prefill uses.
    "eager": [
        "--disable-cuda-graph",
        *(f"--{SPARSE_BACKEND}-decode-backend", "flashmla_sparse"),
    ],
}
# Mean error of a log-probability: bf16 rounding alone makes it 0.03 to 0.05, another
# selection of as many keys in the sharing layers 0.14 or more.
TOLERANCE = 0.1


def token_logprobs(entries: List) -> torch.Tensor:
    return torch.tensor([logprob for logprob, _, _ in entries])


class TestDSAPipelineHandoffCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        if get_device_count() < 2:
            raise unittest.SkipTest("needs two GPUs")
        from safetensors.torch import save_file

        cls.stack = contextlib.ExitStack()
        cls.pool = ThreadPoolExecutor(1 + len(PIPELINES))
        root = Path(cls.stack.enter_context(tempfile.TemporaryDirectory()))
        cls.model = glm_moe_dsa(root)
        config = json.loads((root / "config.json").read_text())
        save_file(glm_moe_dsa_weights(config, SEED), root / "model.safetensors")
        # Beginnings of one text: a later prompt reads an earlier one's cache.
        generator = torch.Generator().manual_seed(SEED)
        words = torch.randint(
            3, NUM_WORDS - 1, (max(PROMPT_LENS),), generator=generator
        )
        cls.prompts = [words[:n].tolist() for n in PROMPT_LENS]
        # Servers take a minute to start, so they start at the same time.
        cls.whole = cls.pool.submit(
            cls.stack.enter_context, launch_server(cls.model, ARGS, ENV)
        )
        cls.pipelines = {
            name: cls.pool.submit(cls._run_pipeline, args)
            for name, args in PIPELINES.items()
        }

    @classmethod
    def tearDownClass(cls):
        if hasattr(cls, "pool"):
            cls.pool.shutdown(cancel_futures=True)
            cls.stack.close()

    @classmethod
    def _run_pipeline(cls, args: List[str]) -> List[Dict]:
        with launch_server(cls.model, ARGS + ["--pp-size", "2"] + args, ENV) as server:
            # One alone, all together, then again, in slots that were used before.
            return [
                {"prompt": prompt, **result}
                for prompts in (cls.prompts[:1], cls.prompts, cls.prompts[::-1])
                for prompt, result in zip(prompts, cls._generate(server, prompts))
            ]

    @classmethod
    def _generate(cls, server: Server, prompts: List[List[int]]) -> List[Dict]:
        return server.generate(
            prompts,
            NEW_TOKENS,
            return_logprob=True,
            logprob_start_len=[len(prompt) - SCORED - 1 for prompt in prompts],
        )

    def _errors(self, result: Dict) -> List[float]:
        """Mean errors of the log-probabilities: of the prompt's end, of the new tokens.

        The server without a pipeline reads what the one with it wrote.
        """
        prompt, output = result["prompt"], result["output_ids"]
        self.assertEqual(len(output), NEW_TOKENS)
        reread = self.whole.result().generate(
            [prompt + output],
            1,
            return_logprob=True,
            logprob_start_len=len(prompt) - SCORED - 1,
        )[0]
        expected = reread["meta_info"]["input_token_logprobs"][-SCORED - NEW_TOKENS :]
        self.assertEqual([t for _, t, _ in expected], prompt[-SCORED:] + output)
        got = [
            *result["meta_info"]["input_token_logprobs"][-SCORED:],
            *result["meta_info"]["output_token_logprobs"],
        ]
        self.assertEqual([t for _, t, _ in got], prompt[-SCORED:] + output)
        errors = (token_logprobs(got) - token_logprobs(expected)).abs()
        return [errors[:SCORED].mean().item(), errors[SCORED:].mean().item()]

    def _check(self, name: str):
        errors = [self._errors(result) for result in self.pipelines[name].result()]
        print(f"measured: {name}, largest mean errors {[max(e) for e in zip(*errors)]}")
        self.assertLess(
            max(map(max, errors)),
            TOLERANCE,
            "logprobs of two pipeline stages off those without a pipeline by "
            f"{errors} on average (prompt, new tokens)",
        )

    def test_graphs(self):
        self._check("graphs")

    def test_eager(self):
        self._check("eager")


if __name__ == "__main__":
    unittest.main()
