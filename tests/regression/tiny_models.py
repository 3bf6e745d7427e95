"""Small model directories for the CUDA regression tests; nothing is downloaded.

Each function writes a configuration and a word-level tokenizer into a directory.
Dimensions that kernels are compiled for are the released models'; layers, experts
and hidden sizes are cut down.
"""

import json
from pathlib import Path
from typing import Any, Dict

NUM_WORDS = 1000
COMMON = dict(
    torch_dtype="bfloat16",
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    tie_word_embeddings=False,
)


def _write_model(path: Path, config: Dict[str, Any]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path.mkdir(parents=True, exist_ok=True)
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, NUM_WORDS)]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(COMMON | config, indent=2))
    return str(path)


def deepseek_v4(path: Path, num_layers: int = 4) -> str:
    """DeepSeek-V4 with three hash layers and FP8 block weights, to be loaded dummy."""
    return _write_model(
        path,
        dict(
            architectures=["DeepseekV4ForCausalLM"],
            model_type="deepseek_v4",
            vocab_size=129280,
            hidden_size=4096,
            num_hidden_layers=num_layers,
            num_attention_heads=64,
            num_key_value_heads=1,
            head_dim=512,
            qk_rope_head_dim=64,
            q_lora_rank=1024,
            o_lora_rank=1024,
            o_groups=8,
            # The gate's kernel reads what it never wrote for less than 225 experts.
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=6,
            moe_intermediate_size=256,
            num_hash_layers=3,
            num_nextn_predict_layers=1,
            compress_ratios=[0, 0, 4, 128, 0],
            compress_rope_theta=160000,
            sliding_window=128,
            index_n_heads=64,
            index_head_dim=128,
            index_topk=512,
            hc_mult=4,
            hc_sinkhorn_iters=20,
            hc_eps=1e-6,
            scoring_func="sqrtsoftplus",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
            rms_norm_eps=1e-6,
            rope_theta=10000,
            max_position_embeddings=65536,
            rope_scaling=dict(
                type="yarn",
                factor=4,
                original_max_position_embeddings=16384,
                beta_fast=32,
                beta_slow=1,
            ),
            quantization_config=dict(
                quant_method="fp8",
                fmt="e4m3",
                activation_scheme="dynamic",
                weight_block_size=[128, 128],
                scale_fmt="ue8m0",
            ),
        ),
    )


def glm_moe_dsa(path: Path, num_layers: int = 6, **overrides: Any) -> str:
    """GlmMoeDsaForCausalLM with GLM-5.2's sharing schedule and one next-token layer."""
    return _write_model(
        path,
        dict(
            architectures=["GlmMoeDsaForCausalLM"],
            model_type="glm_moe_dsa",
            vocab_size=NUM_WORDS,
            hidden_size=1024,
            intermediate_size=1024,
            num_hidden_layers=num_layers,
            num_attention_heads=64,
            num_key_value_heads=64,
            kv_lora_rank=512,
            q_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
            first_k_dense_replace=num_layers,
            moe_layer_freq=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            index_n_heads=32,
            index_head_dim=128,
            index_topk=2048,
            index_topk_freq=4,
            index_skip_topk_offset=3,
            index_share_for_mtp_iteration=True,
            indexer_rope_interleave=True,
            num_nextn_predict_layers=1,
            rms_norm_eps=1e-5,
            rope_theta=1000000,
            rope_interleave=True,
            max_position_embeddings=65536,
            attention_bias=False,
        )
        | overrides,
    )


def gpt_oss(path: Path, num_layers: int = 4) -> str:
    """gpt-oss, sliding and full attention alternating, unquantized."""
    return _write_model(
        path,
        dict(
            architectures=["GptOssForCausalLM"],
            model_type="gpt_oss",
            vocab_size=NUM_WORDS,
            hidden_size=512,
            intermediate_size=512,
            num_hidden_layers=num_layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * (num_layers // 2),
            num_local_experts=8,
            num_experts_per_tok=2,
            swiglu_limit=7.0,
            attention_bias=True,
            rms_norm_eps=1e-5,
            rope_theta=150000,
            rope_scaling=None,
            max_position_embeddings=8192,
        ),
    )


def qwen3_moe(path: Path, num_layers: int = 3) -> str:
    """Qwen3-MoE, every layer sparse."""
    return _write_model(
        path,
        dict(
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            vocab_size=NUM_WORDS,
            hidden_size=512,
            intermediate_size=512,
            moe_intermediate_size=256,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            num_experts=16,
            num_experts_per_tok=4,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
            rms_norm_eps=1e-6,
            rope_theta=1000000,
            max_position_embeddings=8192,
            attention_bias=False,
        ),
    )
