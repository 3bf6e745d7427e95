"""With DP attention, a request gets the experts that it was routed to."""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Dict

import pybase64
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import launch_server
from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from tiny_models import NUM_WORDS, qwen3_moe

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


def make_weights(config: Dict, seed: int) -> Dict[str, torch.Tensor]:
    """bf16 weights with which a token alone decides its experts and the next token.

    Each layer's router reads its logits, a permutation of even steps, off the token's
    embedding, and the output layer knows the token before: with margins like these,
    the rounding of another parallel layout changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int, gain: float = 1.0):
        weight = torch.randn(out_features, in_features, generator=generator)
        return (weight * gain * in_features**-0.5).bfloat16()

    hidden, size = config["hidden_size"], config["moe_intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, num_experts = config["head_dim"], config["num_experts"]
    vocab_size, num_layers = config["vocab_size"], config["num_hidden_layers"]
    embedding = torch.randn(vocab_size, hidden, generator=generator)
    steps = torch.linspace(-2, 2, num_experts)
    for layer in range(num_layers):
        order = torch.rand(vocab_size, num_experts, generator=generator).argsort()
        embedding[:, layer * num_experts : (layer + 1) * num_experts] = steps[order]
    weights = {
        "model.embed_tokens.weight": embedding.bfloat16(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": (embedding.roll(1, 0) * hidden**-0.5).bfloat16(),
    }
    for layer in range(num_layers):
        p = f"model.layers.{layer}"
        router = torch.eye(num_experts, hidden).roll(layer * num_experts, 1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        for norm in ("q_norm", "k_norm"):
            weights[f"{p}.self_attn.{norm}.weight"] = torch.ones(dim).bfloat16()
        weights |= {
            f"{p}.self_attn.q_proj.weight": linear(heads * dim, hidden),
            f"{p}.self_attn.k_proj.weight": linear(kv_heads * dim, hidden),
            f"{p}.self_attn.v_proj.weight": linear(kv_heads * dim, hidden),
            f"{p}.self_attn.o_proj.weight": linear(hidden, heads * dim, 0.02),
            f"{p}.mlp.gate.weight": router.bfloat16(),
        }
        for expert in range(num_experts):
            e = f"{p}.mlp.experts.{expert}"
            weights |= {
                f"{e}.gate_proj.weight": linear(size, hidden),
                f"{e}.up_proj.weight": linear(size, hidden),
                f"{e}.down_proj.weight": linear(hidden, size, 0.02),
            }
    return weights


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
        save_file(make_weights(cls.config, SEED), root / "model.safetensors")
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
