#!/usr/bin/env python3
"""Print the table of docs/routed-experts-buffer.md, from a patched tree of 0.5.12.

Run as PYTHONPATH=TREE python scripts/routed_experts_buffer.py, in the environment of scripts/test.sh. The
buffer is the patched code's own, allocated on PyTorch's meta device.
"""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from sglang.test.test_utils import maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.layers.moe import MoeA2ABackend  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.state_capturer import routed_experts  # noqa: E402

GIB = 1024**3
MODEL = SimpleNamespace(
    hf_text_config=SimpleNamespace(num_hidden_layers=61, num_experts_per_tok=8),
    context_len=163_840,
    is_multimodal=False,
    is_draft_model=False,
)
SLOTS = 1_000_000
DP = {"tp_size": 16, "dp_size": 16, "enable_dp_attention": True}
VERIFY = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}
# DP attention cuts the chunks among its ranks.
RANK_CHUNKS = {"chunked_prefill_size": 8192 // 16}
UNCHUNKED = {"chunked_prefill_size": -1}
# (words, arguments, requests that run at once on a DP rank)
CONFIGURATIONS = (
    ("`--tp-size 8`, chunks of 8,192", {"tp_size": 8}, 256),
    ("the same, EAGLE with 4 draft tokens", dict(tp_size=8, **VERIFY), 256),
    ("the same, 4,096 requests", dict(tp_size=8, **VERIFY), 4096),
    ("`--tp-size 8`, unchunked", dict(tp_size=8, **UNCHUNKED), 256),
    ("the same, `--disable-radix-cache`", dict(tp_size=8, disable_radix_cache=True, **UNCHUNKED), 256),
    ("`--dp-size 16`, chunks of 8,192, 512 on a rank", DP | RANK_CHUNKS, 256),
    ("the same, EAGLE with 4 draft tokens", DP | RANK_CHUNKS | VERIFY, 256),
    ("`--dp-size 16`, unchunked", DP | UNCHUNKED, 256),
    ("the same, `--disable-radix-cache`", DP | UNCHUNKED | {"disable_radix_cache": True}, 256),
    ("the same, `--max-prefill-tokens 4096 --context-length 32768`", "short", 256),
    ("`--dp-size 16`, unchunked, `--moe-a2a-backend deepep`", "deepep", 256),
)

_zeros = torch.zeros


def zeros_on_meta(*size: Any, pin_memory: Any = False, device: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
    """`torch.zeros` without memory."""
    return _zeros(*size, device="meta", **kwargs)


def buffer_of(args: Any, requests: int) -> Any:
    """The patched capturer's buffer under these arguments of the server."""
    model, backend = MODEL, MoeA2ABackend.NONE
    if args == "short":
        args = DP | UNCHUNKED | {"disable_radix_cache": True, "max_prefill_tokens": 4096}
        model = SimpleNamespace(**vars(MODEL) | {"context_len": 32_768})
    elif args == "deepep":
        args, backend = DP | UNCHUNKED, MoeA2ABackend.DEEPEP
    server_args = ServerArgs(
        model_path="dummy",
        **{"chunked_prefill_size": 8192, "max_prefill_tokens": 16_384, "disable_piecewise_cuda_graph": True}
        | args,
    )
    with (
        patch.object(server_args_module, "_global_server_args", server_args),
        patch.object(torch, "zeros", zeros_on_meta),
        patch.object(routed_experts, "get_moe_a2a_backend", lambda: backend),
        patch.object(routed_experts, "is_dp_attention_enabled", lambda: False),
    ):
        return routed_experts.RoutedExpertsCapturer.create(
            enable=True,
            model_config=model,
            num_fused_shared_experts=0,
            num_tokens=SLOTS,
            max_running_requests=requests,
            device="meta",
        ).device_cache


def main() -> None:
    """Print the table."""
    print("| configuration | rows | GiB on each GPU |\n| --- | ---: | ---: |")
    for words, args, requests in CONFIGURATIONS:
        cache = buffer_of(args, requests)
        print(f"| {words} | {cache.buffer.shape[0]:,} | {cache.get_buffer_size_bytes() / GIB:.2f} |")


if __name__ == "__main__":
    main()
