"""The worker of bench_mtp_reuse.py: draft iterations of one next-token layer with GLM-5.2's dimensions.

SGLang's own draft worker (spec v2) and CUDA graphs, over caches full of random numbers. Three graphs of each
iteration: `without` runs the indexer in each forward pass, `with` in the first alone, and `none` in no pass:
it takes indices that `with` found, which is what reuse could come to at best. Each row keeps its experts in
all passes: otherwise the variants, which draft other tokens, would read other numbers of experts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "regression"))

import process

PAGE = 64
TOPK = 2048
# Released; the target has one dense layer instead of 78, which a draft iteration never runs.
DIMENSIONS = {
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": TOPK,
    "intermediate_size": 12288,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "vocab_size": 154880,
    "max_position_embeddings": 202752,
}
VARIANTS = ("without", "with", "none")
ROUNDS = 15
REPLAYS = 4  # in a row, for one sample
STATE: dict[str, Any] = {}


def load(steps: list[int], batches: list[int], contexts: list[int]) -> dict[str, Any]:
    """Build the draft worker, fill its caches, and capture every graph."""
    import torch
    from servers import reserve_ports
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from sglang.srt.speculative import eagle_worker_v2
    from tiny_models import glm_moe_dsa

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    # Each request's slots, with room for what is drafted.
    span = max(contexts) + 2 * PAGE
    port, guard = reserve_ports()
    with guard, tempfile.TemporaryDirectory() as folder:
        server_args = ServerArgs(
            model_path=glm_moe_dsa(Path(folder), 1, **DIMENSIONS),
            load_format="dummy",
            moe_runner_backend="triton",
            mem_fraction_static=0.85,
            grammar_backend="none",
            nccl_port=port,
            max_total_tokens=max(batches) * span + 2 * PAGE,
            max_running_requests=max(batches),
            cuda_graph_bs=list(batches),
            disable_piecewise_cuda_graph=True,
            disable_radix_cache=True,
            speculative_algorithm="EAGLE",
            speculative_num_steps=max(steps),
            speculative_eagle_topk=1,
            speculative_num_draft_tokens=max(steps) + 1,
        )
        # The graphs that are wanted are captured below.
        server_args.disable_cuda_graph = True
        set_global_server_args_for_scheduler(server_args)
        initialize_moe_config(server_args)
        initialize_fp8_gemm_config(server_args)
        initialize_fp4_gemm_config(server_args)
        ranks = {"gpu_id": 0, "tp_rank": 0, "moe_ep_rank": 0, "attn_cp_rank": 0, "moe_dp_rank": 0}
        ranks |= {"dp_rank": None, "nccl_port": port}
        target = TpModelWorker(server_args=server_args, pp_rank=0, **ranks)
        server_args.context_length = target.model_runner.model_config.context_len
        draft = eagle_worker_v2.EagleDraftWorker(server_args=server_args, target_worker=target, **ranks)
    server_args.disable_cuda_graph = False

    model = draft.draft_runner.model
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=0.02)
    STATE.update(draft=draft, worker=eagle_worker_v2, calls=0, variant="", kept={}, graphs={})
    STATE["indices"] = torch.zeros((max(batches), TOPK), dtype=torch.int32, device="cuda")
    _hook(model.model.decoder.self_attn.indexer)
    _fix_experts(model.model.decoder.mlp.gate, max(batches))
    _fill_caches(span, max(batches))
    begin = time.monotonic()
    runs = {}
    for number in steps:
        for variant in VARIANTS:
            runs[f"{number} {variant}"] = _capture(number, variant)
    return {
        "dimensions": DIMENSIONS,
        "kv cache": str(draft.draft_runner.token_to_kv_pool.kv_buffer[0].dtype),
        "decode backend": server_args.nsa_decode_backend,
        "indexer runs": runs,
        "capture seconds": time.monotonic() - begin,
    }


def _hook(indexer: Any) -> None:
    """Count the indexer's runs, keep what it returns, and stand in for it in `none`."""
    forward = indexer.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        x = kwargs["x"] if "x" in kwargs else args[0]
        rows = (x[0] if isinstance(x, tuple) else x).shape[0]
        if STATE["variant"] == "none":
            return STATE["indices"][:rows]
        STATE["calls"] += 1
        indices = forward(*args, **kwargs)
        # What is referred to keeps its place in the graphs' memory.
        STATE["kept"][STATE["key"], rows] = indices
        return indices

    indexer.forward = hooked


def _fix_experts(gate: Any, batch: int) -> None:
    """Have the gate find the same for a row whatever the row holds."""
    import torch

    forward = gate.forward
    found = torch.randn((batch, DIMENSIONS["n_routed_experts"]), device="cuda")

    def fixed(*args: Any, **kwargs: Any) -> Any:
        logits = forward(*args, **kwargs)
        return logits.copy_(found[: len(logits)])

    gate.forward = fixed


def _fill_caches(span: int, batch: int) -> None:
    """Random keys and latents everywhere, and pages in random order."""
    import torch

    runner = STATE["draft"].draft_runner
    pool = runner.token_to_kv_pool
    buffer = pool.kv_buffer[0]
    if buffer.dtype == torch.uint8:
        raise RuntimeError("the latents are packed: random bytes would be no numbers")
    for chunk in buffer.split(1 << 18):
        chunk.copy_(torch.randn(chunk.shape, device="cuda", dtype=torch.bfloat16))
    for chunk in pool.index_k_with_scale_buffer[0].split(1 << 12):
        keys = torch.randn((len(chunk), PAGE * 128), device="cuda").to(torch.float8_e4m3fn)
        scales = torch.rand((len(chunk), PAGE), device="cuda") * 0.01 + 0.01
        chunk.copy_(torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], dim=1))
    pages = span // PAGE
    # Page 0 is where padding writes.
    order = torch.randperm(batch * pages, device="cuda") + 1
    slots = (order[:, None] * PAGE + torch.arange(PAGE, device="cuda")).view(batch, span)
    table = runner.req_to_token_pool.req_to_token
    # The last rows: the first one may be that of padding.
    table[-batch:, :span] = slots.to(table.dtype)
    STATE["slots"] = slots


def _capture(steps: int, variant: str) -> int:
    """Capture an iteration of so many steps at every batch size; how often the indexer runs in one."""
    draft, worker = STATE["draft"], STATE["worker"]
    runner = draft.draft_runner
    draft.speculative_num_steps, draft.speculative_num_draft_tokens = steps, steps + 1
    backend = worker.DraftBackendFactory(draft.server_args, runner, draft.topk, steps).create_decode_backend()
    draft.draft_attn_backend = runner.draft_attn_backend = backend
    runner.model_config.hf_config.index_share_for_mtp_iteration = variant == "with"
    STATE["variant"], STATE["key"] = variant, (steps, variant)
    before = STATE["calls"]
    with worker.speculative_moe_backend_context(), worker.speculative_moe_a2a_backend_context():
        graphs = worker.EAGLEDraftCudaGraphRunner(
            draft, draft_attn_backend=backend, speculative_num_steps=steps
        )
    STATE["graphs"][steps, variant] = graphs
    # Each batch size is run three times: to warm up, once more, and for its graph.
    calls, rest = divmod(STATE["calls"] - before, 3 * len(graphs.capture_bs))
    expected = {"without": steps - 1, "with": 1, "none": 0}[variant]
    if rest or calls != expected:
        raise RuntimeError(f"{variant}: the indexer ran {calls} times in {steps} steps, not {expected}")
    return calls


def _batch(graphs: Any, steps: int, batch: int, context: int) -> Any:
    """A batch as the draft worker hands it to its graphs."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
    from sglang.srt.speculative.eagle_info import EagleDraftInput

    runner = STATE["draft"].draft_runner
    hidden = graphs.buffers.hidden_states
    rows = runner.req_to_token_pool.req_to_token.shape[0]
    first = rows - len(STATE["slots"])
    lengths = torch.full((batch,), context, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=batch,
        input_ids=None,
        req_pool_indices=torch.arange(first, first + batch, device="cuda"),
        seq_lens=lengths.cuda(),
        seq_lens_cpu=lengths,
        seq_lens_sum=batch * context,
        out_cache_loc=STATE["slots"][:batch, context : context + steps].reshape(-1),
        positions=lengths.cuda(),
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool=runner.token_to_kv_pool,
        return_logprob=False,
        spec_algorithm=runner.spec_algorithm,
        spec_info=EagleDraftInput(
            topk_p=torch.ones((batch, 1), device="cuda"),
            topk_index=torch.full((batch, 1), 5, dtype=torch.int64, device="cuda"),
            hidden_states=torch.randn((batch, hidden.shape[1]), dtype=hidden.dtype, device="cuda"),
            capture_hidden_mode=CaptureHiddenMode.LAST,
        ),
        capture_hidden_mode=CaptureHiddenMode.LAST,
    )


def iterate(steps: int, batch: int, context: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of an iteration in each variant, round by round.

    `iteration` is by the clock, from a batch to its draft tokens, what is prepared for the graph included;
    `graph` is the GPU's time for the graph alone.
    """
    import torch

    graphs = {variant: STATE["graphs"][steps, variant] for variant in VARIANTS}
    batches = {variant: _batch(graphs[variant], steps, batch, context) for variant in VARIANTS}
    for variant in ("without", "with"):
        graphs[variant].replay(batches[variant])
    found = STATE["kept"][(steps, "with"), batch]
    if found.shape != (batch, TOPK) or int(found.min()) < 0:
        raise RuntimeError(f"the indexer found {tuple(found.shape)}, from {int(found.min())}")
    STATE["indices"][:batch].copy_(found)
    times: dict[str, dict[str, list[float]]] = {
        variant: {"iteration": [], "graph": []} for variant in VARIANTS
    }
    for number in range(ROUNDS + 2):
        turn = number % len(VARIANTS)
        for variant in VARIANTS[turn:] + VARIANTS[:turn]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            samples = []
            for _ in range(REPLAYS):
                torch.cuda.synchronize()
                clock = time.perf_counter()
                graphs[variant].replay(batches[variant])
                torch.cuda.synchronize()
                samples.append(time.perf_counter() - clock)
            begin.record()
            for _ in range(REPLAYS):
                graphs[variant].graphs[batch].replay()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                times[variant]["iteration"].append(statistics.median(samples))
                times[variant]["graph"].append(begin.elapsed_time(end) / 1000 / REPLAYS)
    return times


if __name__ == "__main__":
    process.serve({"load": load, "iterate": iterate})
