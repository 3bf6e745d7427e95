"""DSA top-k indices reused across the steps of a draft iteration, with real servers.

The indexer's calls are counted in each draft iteration, eager ones and those that a
CUDA graph captures, and the text is held against that without speculation.
"""

import collections
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

from servers import launch_server
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import NUM_WORDS, glm_moe_dsa, glm_moe_dsa_weights

register_cuda_ci(est_time=200, suite="stage-b-test-1-gpu-large")

SEED = int(os.environ.get("REGRESSION_SEED", "0"))
# Two cross the top-k of 2048. The short one does not, but its draft steps grow past
# the indices that they reuse.
PROMPT_LENS = (3000, 5200, 100)
NEW_TOKENS = 24
# Up to 0.5.12 they have another name, and there are two draft workers.
BEFORE_0_5_13 = importlib.util.find_spec("sglang.srt.layers.attention.dsa") is None
ARGS = [
    *("--attention-backend", "nsa" if BEFORE_0_5_13 else "dsa"),
    *("--moe-runner-backend", "triton"),
    *("--grammar-backend", "none"),
    *("--mem-fraction-static", "0.6", "--max-total-tokens", "65536"),
    *("--cuda-graph-max-bs", "4"),
    *("--max-running-requests", "4"),
    "--disable-radix-cache",
    "--disable-piecewise-cuda-graph",
]
# It serves with the kernels of the release before, too.
ENV = {"SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
# Logits of 8 to 16 are 1/16 apart in bf16, and each of two ways to a token's hidden
# state is some steps off; a token of another text is several units behind.
TIE = 0.5

SERVERS_AT_A_TIME = 3

Draft = collections.namedtuple("Draft", "worker steps graphs")
DRAFTS = [
    Draft("EagleDraftWorker", steps=3, graphs=True),
    Draft("EagleDraftWorker", steps=5, graphs=False),
]
if BEFORE_0_5_13:
    DRAFTS += [
        Draft("EAGLEWorker", steps=5, graphs=True),
        Draft("EAGLEWorker", steps=3, graphs=False),
    ]


def count_indexer_calls() -> None:
    """Append a JSON line to $INDEXER_CALLS for each draft iteration.

    Runs in the scheduler process: multiprocessing's spawn imports the main module,
    this file, there again. Under CUDA graphs it counts what a graph captures.
    """
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    workers = [EagleDraftWorker]
    if BEFORE_0_5_13:
        from sglang.srt.layers.attention.nsa.nsa_indexer import Indexer
        from sglang.srt.speculative.eagle_worker import EAGLEWorker

        workers.append(EAGLEWorker)
    else:
        from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    calls = 0
    forward_cuda = Indexer.forward_cuda

    def counting_forward_cuda(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return forward_cuda(self, *args, **kwargs)

    def counting(draft_forward):
        def counting_draft_forward(self, forward_batch):
            before = calls
            result = draft_forward(self, forward_batch)
            record = dict(
                worker=type(self).__name__,
                capturing=torch.cuda.is_current_stream_capturing(),
                calls=calls - before,
            )
            with open(os.environ["INDEXER_CALLS"], "a") as file:
                file.write(json.dumps(record) + "\n")
            return result

        return counting_draft_forward

    Indexer.forward_cuda = counting_forward_cuda
    for worker in workers:
        worker.draft_forward = counting(worker.draft_forward)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestMTPIndexReuseCuda(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        from safetensors.torch import save_file

        cls.folder = tempfile.TemporaryDirectory()
        root = Path(cls.folder.name)
        cls.model = glm_moe_dsa(root / "model")
        config = json.loads((root / "model" / "config.json").read_text())
        save_file(glm_moe_dsa_weights(config, SEED), root / "model/model.safetensors")
        generator = torch.Generator().manual_seed(SEED)
        cls.prompts = [
            torch.randint(3, NUM_WORDS - 1, (n,), generator=generator).tolist()
            for n in PROMPT_LENS
        ]
        # Servers take a minute to start, so they start at the same time.
        cls.pool = ThreadPoolExecutor(SERVERS_AT_A_TIME)
        cls.stack = contextlib.ExitStack()
        cls.plain = cls.pool.submit(
            cls.stack.enter_context, launch_server(cls.model, ARGS, ENV)
        )
        cls.drafts = {draft: cls.pool.submit(cls._draft, draft) for draft in DRAFTS}

    @classmethod
    def tearDownClass(cls):
        cls.pool.shutdown(cancel_futures=True)
        cls.stack.close()
        cls.folder.cleanup()

    @classmethod
    def _draft(cls, draft: Draft) -> Dict:
        calls = Path(cls.folder.name) / f"calls-{'-'.join(map(str, draft))}"
        args = ARGS + [
            *("--speculative-algorithm", "EAGLE"),
            *("--speculative-num-steps", str(draft.steps)),
            *("--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", str(draft.steps + 1)),
        ]
        if not draft.graphs:
            args.append("--disable-cuda-graph")
        env = ENV | {
            "INDEXER_CALLS": str(calls),
            "SGLANG_ENABLE_SPEC_V2": str(draft.worker == "EagleDraftWorker"),
        }
        command = [sys.executable, __file__, "serve"]
        with launch_server(cls.model, args, env, command) as server:
            # One alone and all together.
            prompts = cls.prompts[:1] + cls.prompts
            results = server.generate(prompts[:1], NEW_TOKENS)
            results += server.generate(cls.prompts, NEW_TOKENS)
        outputs = [
            (prompt, result["output_ids"]) for prompt, result in zip(prompts, results)
        ]
        records = [json.loads(line) for line in calls.read_text().splitlines()]
        return dict(records=records, outputs=outputs)

    def test_one_indexer_call_in_a_draft_iteration(self):
        runs = {draft: run.result() for draft, run in self.drafts.items()}
        for draft, run in runs.items():
            found = collections.Counter(record["calls"] for record in run["records"])
            print(f"measured: {draft} indexer calls {dict(found)}")
            with self.subTest(draft=draft):
                captured = any(record["capturing"] for record in run["records"])
                self.assertEqual(captured, draft.graphs, "what was counted")
                workers = {record["worker"] for record in run["records"]}
                self.assertEqual(workers, {draft.worker}, "what was counted")
                self.assertEqual(
                    set(found) - {0},  # idle batches
                    {1},
                    f"the indexer ran {dict(found)} times in a draft iteration of "
                    f"{draft.steps} steps ({draft})",
                )

    def test_text_equals_that_without_speculation(self):
        """Each token is what the target alone would say, but for rounding ties."""
        server = self.plain.result()
        alone = [r["output_ids"] for r in server.generate(self.prompts, NEW_TOKENS)]
        expected = dict(zip(map(len, self.prompts), alone))
        for draft, run in self.drafts.items():
            behind = [0.0]
            for prompt, output in run.result()["outputs"]:
                self.assertEqual(len(output), NEW_TOKENS)
                if output != expected[len(prompt)]:
                    behind += server.behind_the_best(prompt, output)
            print(f"measured: {draft} at most {max(behind):.3f} behind the best")
            self.assertLess(
                max(behind),
                TIE,
                f"text differs from the one without speculation ({draft})",
            )


if os.environ.get("INDEXER_CALLS") and __name__ in ("__main__", "__mp_main__"):
    count_indexer_calls()

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        from sglang.srt.entrypoints.http_server import launch_server as serve
        from sglang.srt.server_args import prepare_server_args

        serve(prepare_server_args(sys.argv[2:]))
    else:
        unittest.main()
