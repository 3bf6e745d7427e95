"""The worker of bench_overhead.py: prefill and decode steps of a small model on the tree it runs on."""

from __future__ import annotations

import collections
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "regression"))

import process

STATE: dict[str, Any] = {}


class Forward:
    """A ModelRunner's `forward`, timed, or recorded by the profiler."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.profiled = False
        self.wall: list[float] = []
        self.gpu: list[float] = []
        self.trace: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if self.profiled:
            return self._profile(*args, **kwargs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        clock = time.perf_counter()
        begin.record()
        result = self._forward(*args, **kwargs)
        end.record()
        torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - clock)
        self.gpu.append(begin.elapsed_time(end) / 1000)
        return result

    def _profile(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            result = self._forward(*args, **kwargs)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            self.trace = json.loads(path.read_text())["traceEvents"]
        return result

    def take(self) -> dict[str, list[float]]:
        """What was timed since the last call."""
        taken = {"wall": self.wall, "gpu": self.gpu}
        self.wall, self.gpu = [], []
        return taken


def load(model: str, overrides: dict[str, Any], server_args: dict[str, Any]) -> dict[str, Any]:
    """Build the model, with dummy weights, and capture its graphs."""
    import numpy
    import tiny_models
    import torch
    from model_runners import load_dummy_model

    numpy.random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = getattr(tiny_models, model)(Path(folder), **overrides)
        runner = load_dummy_model(path, disable_piecewise_cuda_graph=True, **server_args)
    STATE["runner"] = runner
    STATE["forward"] = runner.torch_runner.forward = Forward(runner.torch_runner.forward)
    # The collector's turns are no part of a step.
    gc.disable()
    # The sides take turns on one core: none has the faster one.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return {"graphs": sorted(runner.torch_runner.graph_runner.capture_bs)}


def steps(batch: int, prompt: int, decodes: int, profiled: bool = False) -> dict[str, Any]:
    """A prefill of `batch` prompts and so many decode steps, from empty caches."""
    from sglang.bench_one_batch import prepare_synthetic_inputs_for_latency_test

    runner, forward = STATE["runner"], STATE["forward"]
    runner.clear()
    # The smallest vocabulary has a thousand words.
    prompts = [[3 + (number * 131 + place) % 900 for place in range(prompt)] for number in range(batch)]
    tokens, _, running = runner.extend(prepare_synthetic_inputs_for_latency_test(0, 0, prompts))
    prefill = forward.take()
    forward.profiled = profiled
    try:
        for _ in range(decodes):
            tokens, _ = runner.decode(tokens, running)
    finally:
        forward.profiled = False
    decode = forward.take()
    if profiled:
        return counted(forward.trace)
    return {
        "prefill": {kind: times[0] for kind, times in prefill.items()},
        "decode": {kind: statistics.median(times) for kind, times in decode.items()},
    }


def counted(trace: list[dict[str, Any]]) -> dict[str, Any]:
    """What ran on the GPU in the last profiled step, and what the CPU launched for it, by name."""
    kinds = {"kernel", "gpu_memset", "gpu_memcpy"}
    ran = collections.Counter(event["name"] for event in trace if event.get("cat") in kinds)
    launched = collections.Counter(
        event["name"]
        for event in trace
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(word in event["name"] for word in ("Launch", "Memset", "Memcpy"))
    )
    return {"ran": dict(ran), "launched": dict(launched)}


def routed_experts(dp: int, chunk: int, running: int, layers: int, topk: int) -> int:
    """The bytes of the buffer on the device that --enable-return-routed-experts allocates.

    `chunk` and `running` are the prefill chunk and the most running requests of one rank.
    """
    from sglang.srt import server_args as module
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

    server_args = module.ServerArgs(
        model_path="dummy",
        tp_size=dp,
        dp_size=dp,
        chunked_prefill_size=chunk,
        enable_dp_attention=dp > 1,
    )
    text_config = SimpleNamespace(num_hidden_layers=layers, num_experts_per_tok=topk)
    with mock.patch.object(module, "_global_server_args", server_args):
        capturer = RoutedExpertsCapturer.create(
            enable=True,
            model_config=SimpleNamespace(hf_text_config=text_config),
            num_fused_shared_experts=0,
            num_tokens=256,
            max_running_requests=running,
            device="cuda",
        )
    buffer = capturer.device_cache.buffer
    return buffer.numel() * buffer.element_size()


if __name__ == "__main__":
    process.serve({"load": load, "steps": steps, "routed_experts": routed_experts})
