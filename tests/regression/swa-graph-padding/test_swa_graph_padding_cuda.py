"""A padded CUDA graph replay leaves the sliding-window slots of others alone."""

import os
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Optional

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sglang.test.test_utils import maybe_stub_sgl_kernel
from tiny_models import NUM_WORDS, gpt_oss

maybe_stub_sgl_kernel()

from model_runners import load_dummy_model
from sglang.bench_one_batch import prepare_synthetic_inputs_for_latency_test
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
CAPTURED_BS = 4
PROMPT_LEN = 200  # longer than the window of 128
STEPS_BEFORE = 3
# Dummy weights are almost zero; at this spread, log-probabilities differ by about 1.
WEIGHT_STD = 0.05


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestSWAGraphPaddingCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.runner = load_dummy_model(
            gpt_oss(Path(cls.folder.name)),
            attention_backend="triton",
            max_total_tokens=16384,
            cuda_graph_bs=[CAPTURED_BS],
            disable_piecewise_cuda_graph=True,
        )
        torch.manual_seed(SEED)
        for name, parameter in cls.runner.torch_runner.model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.fill_(1)
            else:
                parameter.data.normal_(std=WEIGHT_STD)
        cls.graph_runner = cls.runner.torch_runner.graph_runner
        cls.tokens = torch.randint(
            3,
            NUM_WORDS - 1,
            (2 * CAPTURED_BS, PROMPT_LEN + STEPS_BEFORE + 2),
            generator=torch.Generator().manual_seed(SEED),
        )

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def _extend(self, first: int, num_reqs: int):
        prompts = self.tokens[first : first + num_reqs, :PROMPT_LEN].tolist()
        reqs = prepare_synthetic_inputs_for_latency_test(0, 0, prompts)
        return self.runner.extend(reqs)[2]

    def _decode(self, batch, first: int, num_reqs: int, step: int):
        tokens = self.tokens[first : first + num_reqs, PROMPT_LEN + step].cuda()
        logits = self.runner.decode(tokens, batch)[1]
        return torch.log_softmax(logits.float(), dim=-1)[:num_reqs].clone()

    def _last_logprobs(self, graphs: bool, other_reqs: Optional[int]):
        """Of CAPTURED_BS requests, after a step of a batch of other requests."""
        self.runner.torch_runner.graph_runner = self.graph_runner if graphs else None
        self.runner.clear()
        batch = self._extend(0, CAPTURED_BS)
        other = self._extend(CAPTURED_BS, CAPTURED_BS - 1)
        for step in range(STEPS_BEFORE):
            self._decode(batch, 0, CAPTURED_BS, step)
        if other_reqs:
            self._decode(other, CAPTURED_BS, other_reqs, 0)
        return self._decode(batch, 0, CAPTURED_BS, STEPS_BEFORE)

    def test_padded_replay_leaves_other_requests_alone(self):
        for graphs in (False, True):
            alone = self._last_logprobs(graphs, None)
            beside = self._last_logprobs(graphs, CAPTURED_BS - 1)
            spread = alone.std(dim=-1).min().item()
            self.assertGreater(spread, 0.1, "log-probabilities too flat to tell")
            # The same kernels on the same numbers: nothing may move at all.
            moved = (alone - beside).abs().amax(dim=-1)
            print(f"measured: {graphs=} {spread=:.3f} moved={moved.tolist()}")
            self.assertEqual(
                moved.max().item(),
                0,
                f"log-probabilities moved by {moved.tolist()} after a padded batch "
                f"of others ({graphs=})",
            )

    def test_graphs_equal_eager_after_a_padded_batch(self):
        eager = self._last_logprobs(False, CAPTURED_BS - 1)
        graph = self._last_logprobs(True, CAPTURED_BS - 1)
        # bf16 kernels may split their sums differently when captured; the base
        # release's error is at least five times that.
        error = (eager - graph).abs().amax(dim=-1)
        print(f"measured: graph - eager {error.tolist()}")
        self.assertLess(
            error.max().item(),
            0.02,
            f"log-probabilities under CUDA graphs off the eager ones by "
            f"{error.tolist()}",
        )


if __name__ == "__main__":
    unittest.main()
