"""A ModelRunner in a test's own process, as SGLang's benchmark of one batch has it."""

from typing import Any

from servers import reserve_ports
from sglang.bench_one_batch import load_model
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
from sglang.srt.server_args import (
    PortArgs,
    ServerArgs,
    set_global_server_args_for_scheduler,
)


def load_dummy_model(model_path: str, **server_args: Any):
    """The benchmark's runner, with extend and decode, of dummy weights."""
    port, guard = reserve_ports()
    args = ServerArgs(
        model_path=model_path,
        load_format="dummy",
        moe_runner_backend="triton",
        mem_fraction_static=0.5,
        grammar_backend="none",
        nccl_port=port,
        **server_args,
    )
    set_global_server_args_for_scheduler(args)
    initialize_moe_config(args)
    initialize_fp8_gemm_config(args)
    initialize_fp4_gemm_config(args)
    with guard:
        return load_model(args, PortArgs.init_new(args), 0, 0)[0]
