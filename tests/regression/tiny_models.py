"""Small model directories for the CUDA regression tests; nothing is downloaded.

Each function writes a configuration and a word-level tokenizer into a directory.
Dimensions that kernels are compiled for are the released models'; layers, experts
and hidden sizes are cut down.
"""

import json
import math
from pathlib import Path
from typing import Any, Dict, Sequence

import torch

NUM_WORDS = 1000
# With sharper attention, bf16 rounding grows as much as a wrong selection does.
GLM_HEAD_GAIN = 3.0
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


def deepseek_v4(path: Path, num_layers: int = 4, **overrides: Any) -> str:
    """DeepSeek-V4 with three hash layers and FP8 block weights."""
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
        )
        | overrides,
    )


def deepseek_v4_weights(
    config: Dict[str, Any], seed: int, hot_experts: Sequence[int], device: str
) -> Dict[str, torch.Tensor]:
    """Weights under the names of a released checkpoint, without a next-token layer.

    The layers that score choose `hot_experts` for every token, by a bias that no
    rounding makes up for, and these weigh much in the output. FP8 weights have scales
    (rows / 128, columns / 128) that are powers of two.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return (randn(out_features, in_features) * in_features**-0.5).bfloat16().cpu()

    def fp8(name: str, out_features: int, in_features: int, gain: float = 1.0):
        scale = 2.0 ** round(math.log2(gain * in_features**-0.5))
        blocks = out_features // 128, in_features // 128
        weight = randn(out_features, in_features).to(torch.float8_e4m3fn)
        return {
            f"{name}.weight": weight.cpu(),
            f"{name}.scale": torch.full(blocks, scale),
        }

    def mlp(name: str, gain: float = 1.0) -> Dict[str, torch.Tensor]:
        size = config["moe_intermediate_size"]
        return (
            fp8(f"{name}.w1", size, hidden)
            | fp8(f"{name}.w3", size, hidden)
            | fp8(f"{name}.w2", hidden, size, gain)
        )

    def compressor(name: str, ratio: int, dim: int) -> Dict[str, torch.Tensor]:
        # Those of four tokens overlap.
        dim_out = dim * (2 if ratio == 4 else 1)
        return {
            f"{name}.wkv.weight": linear(dim_out, hidden),
            f"{name}.wgate.weight": linear(dim_out, hidden),
            f"{name}.ape": torch.zeros(ratio, dim_out),
            f"{name}.norm.weight": torch.ones(dim),
        }

    hidden, heads, dim = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["head_dim"],
    )
    q_lora, o_lora, groups = (
        config["q_lora_rank"],
        config["o_lora_rank"],
        config["o_groups"],
    )
    vocab_size, num_experts = config["vocab_size"], config["n_routed_experts"]
    hc_mult = config["hc_mult"]
    hc_out = (2 + hc_mult) * hc_mult
    bias = torch.zeros(num_experts)
    bias[list(hot_experts)] = 10.0
    weights = {
        "embed.weight": randn(vocab_size, hidden).bfloat16().cpu(),
        "head.weight": linear(vocab_size, hidden),
        "norm.weight": torch.ones(hidden).bfloat16(),
        "hc_head_fn": linear(hc_mult, hc_mult * hidden).float(),
        "hc_head_base": torch.zeros(hc_mult),
        "hc_head_scale": torch.ones(1),
    }
    for layer in range(config["num_hidden_layers"]):
        p = f"layers.{layer}"
        a = f"{p}.attn"
        for name in ("attn", "ffn"):
            weights |= {
                f"{p}.{name}_norm.weight": torch.ones(hidden).bfloat16(),
                f"{p}.hc_{name}_fn": linear(hc_out, hc_mult * hidden).float(),
                f"{p}.hc_{name}_base": torch.zeros(hc_out),
                f"{p}.hc_{name}_scale": torch.ones(3),
            }
        weights |= {
            f"{a}.attn_sink": torch.zeros(heads),
            f"{a}.q_norm.weight": torch.ones(q_lora).bfloat16(),
            f"{a}.kv_norm.weight": torch.ones(dim).bfloat16(),
        }
        weights |= fp8(f"{a}.wq_a", q_lora, hidden)
        weights |= fp8(f"{a}.wkv", dim, hidden)
        weights |= fp8(f"{a}.wq_b", heads * dim, q_lora)
        weights |= fp8(f"{a}.wo_a", groups * o_lora, heads * dim // groups)
        weights |= fp8(f"{a}.wo_b", hidden, groups * o_lora)
        ratio = config["compress_ratios"][layer]
        if ratio:
            weights |= compressor(f"{a}.compressor", ratio, dim)
        if ratio == 4:
            index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
            weights |= fp8(f"{a}.indexer.wq_b", index_heads * index_dim, q_lora)
            weights |= compressor(f"{a}.indexer.compressor", ratio, index_dim)
            weights[f"{a}.indexer.weights_proj.weight"] = linear(index_heads, hidden)
        weights[f"{p}.ffn.gate.weight"] = linear(num_experts, hidden)
        if layer < config["num_hash_layers"]:
            order = torch.rand(
                vocab_size, num_experts, generator=generator, device=device
            ).argsort()
            table = order[:, : config["num_experts_per_tok"]].int()
            weights[f"{p}.ffn.gate.tid2eid"] = table.contiguous().cpu()
        else:
            weights[f"{p}.ffn.gate.bias"] = bias.clone()
        weights |= mlp(f"{p}.ffn.shared_experts")
        for expert in range(num_experts):
            weights |= mlp(f"{p}.ffn.experts.{expert}", gain=4.0)
    return weights


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


def glm_moe_dsa_weights(config: Dict[str, Any], seed: int) -> Dict[str, torch.Tensor]:
    """bf16 weights under the names of a released checkpoint.

    As there, layers that share another one's top-k have none of an indexer.
    """
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int, gain: float = 1.0):
        weight = torch.randn(out_features, in_features, generator=generator)
        return (weight * gain * in_features**-0.5).bfloat16()

    hidden, q_lora, kv_lora = (
        config["hidden_size"],
        config["q_lora_rank"],
        config["kv_lora_rank"],
    )
    heads, nope, rope, v_dim = (
        config["num_attention_heads"],
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    ones = torch.ones

    def mlp(prefix: str, size: int) -> Dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": linear(size, hidden),
            f"{prefix}.up_proj.weight": linear(size, hidden),
            f"{prefix}.down_proj.weight": linear(hidden, size),
        }

    weights = {
        "model.embed_tokens.weight": torch.randn(
            config["vocab_size"], hidden, generator=generator
        ).bfloat16(),
        "model.norm.weight": ones(hidden).bfloat16(),
        "lm_head.weight": linear(config["vocab_size"], hidden, GLM_HEAD_GAIN),
    }
    freq, offset = config["index_topk_freq"], config["index_skip_topk_offset"]
    for layer in range(config["num_hidden_layers"] + 1):
        p = f"model.layers.{layer}"
        a = f"{p}.self_attn"
        weights |= {
            f"{p}.input_layernorm.weight": ones(hidden).bfloat16(),
            f"{p}.post_attention_layernorm.weight": ones(hidden).bfloat16(),
            f"{a}.q_a_proj.weight": linear(q_lora, hidden),
            f"{a}.q_a_layernorm.weight": ones(q_lora).bfloat16(),
            f"{a}.q_b_proj.weight": linear(heads * (nope + rope), q_lora),
            f"{a}.kv_a_proj_with_mqa.weight": linear(kv_lora + rope, hidden),
            f"{a}.kv_a_layernorm.weight": ones(kv_lora).bfloat16(),
            f"{a}.kv_b_proj.weight": linear(heads * (nope + v_dim), kv_lora),
            f"{a}.o_proj.weight": linear(hidden, heads * v_dim),
        }
        is_nextn = layer == config["num_hidden_layers"]
        if is_nextn or max(layer - offset + 1, 0) % freq == 0:
            weights |= {
                f"{a}.indexer.wq_b.weight": linear(index_heads * index_dim, q_lora),
                f"{a}.indexer.wk.weight": linear(index_dim, hidden),
                f"{a}.indexer.k_norm.weight": ones(index_dim).bfloat16(),
                f"{a}.indexer.k_norm.bias": torch.zeros(index_dim).bfloat16(),
                f"{a}.indexer.weights_proj.weight": linear(index_heads, hidden),
            }
        if not is_nextn:
            weights |= mlp(f"{p}.mlp", config["intermediate_size"])
            continue
        num_experts = config["n_routed_experts"]
        weights |= {
            f"{p}.enorm.weight": ones(hidden).bfloat16(),
            f"{p}.hnorm.weight": ones(hidden).bfloat16(),
            f"{p}.eh_proj.weight": linear(hidden, 2 * hidden),
            f"{p}.shared_head.norm.weight": ones(hidden).bfloat16(),
            f"{p}.mlp.gate.weight": linear(num_experts, hidden),
            f"{p}.mlp.gate.e_score_correction_bias": torch.zeros(num_experts),
        }
        size = config["moe_intermediate_size"]
        weights |= mlp(f"{p}.mlp.shared_experts", size)
        for expert in range(num_experts):
            weights |= mlp(f"{p}.mlp.experts.{expert}", size)
    return weights


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


def qwen3_moe_weights(config: Dict, seed: int) -> Dict[str, torch.Tensor]:
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
