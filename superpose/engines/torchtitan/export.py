"""A trained model in Hugging Face layout, with the config.json that TorchTitan does not write, for plain transformers.

    python -m superpose.engines.torchtitan.export outputs/checkpoint/step-20000 model \
        --module superpose.engines.torchtitan --config llama3_270m_tst

The trainer writes the same config.json beside a last checkpoint that TorchTitan saves in this layout (``last_save_in_hf``).
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torchtitan import trainer as titan
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.config import ConfigManager
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.qwen3 import Qwen3Model
from torchtitan.tools.logging import init_logger, logger

from superpose.engines.torchtitan.rope import NoRoPE
from superpose.errors import InputError

#: Files of a tokenizer in Hugging Face layout.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(config: titan.Trainer.Config, checkpoint: Path, out: Path) -> None:
    """Write the model of a TorchTitan checkpoint to ``out``: safetensors in float32, config.json and tokenizer.

    config: the run's own. Needs one process and the memory of the whole model, on a CPU. Raises InputError where transformers
    has no equal of the model.
    """
    from huggingface_hub import save_torch_state_dict

    spec = config.model_spec
    if spec is None or spec.state_dict_adapter is None:
        raise InputError("this model has no Hugging Face layout in TorchTitan")
    if not (checkpoint / ".metadata").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint of TorchTitan: give a folder such as outputs/checkpoint/step-1000")
    spec.model.update_from_config(config=config)
    hf_config(spec.model)  # before any work: it may not be possible
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    state = ModelWrapper(model).state_dict()
    dcp.load(state, checkpoint_id=checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in spec.state_dict_adapter(spec.model, None).to_hf(state).items()}
    save_torch_state_dict(tensors, out)
    write_hf_config(spec.model, out, Path(config.hf_assets_path))


def write_hf_config(model: Any, out: Path, assets: Path) -> None:
    """config.json of ``model`` (a TorchTitan model configuration), and the tokenizer's files where ``assets`` has them."""
    configuration = hf_config(model)
    tokenizer = assets / "tokenizer.json"
    if tokenizer.is_file():
        for name in TOKENIZER_FILES:
            if (assets / name).is_file():
                shutil.copyfile(assets / name, out / name)
    configuration.save_pretrained(out)
    logger.info(f"Wrote {out / 'config.json'}")


def hf_config(model: Any) -> Any:
    """The transformers configuration of a TorchTitan one of llama3, qwen3, qwen3-MoE or deepseek-v3.

    Raises InputError for a model that transformers cannot express.
    """
    from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig, SmolLM3Config

    attention = model.layers[0].attention
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.n_heads,
        "rms_norm_eps": model.norm.eps,
        "max_position_embeddings": attention.rope.max_seq_len,
        "rope_parameters": _rope(attention),
        "tie_word_embeddings": model.enable_weight_tying,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
    }
    dense = [layer.feed_forward.w1.out_features for layer in model.layers if layer.feed_forward is not None]
    mixed = [layer.moe for layer in model.layers if layer.moe is not None]
    common["intermediate_size"] = dense[0] if dense else model.dim
    if isinstance(model, DeepSeekV3Model.Config):
        return DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], **common, **_deepseek(model, len(dense), mixed))
    common["num_key_value_heads"] = attention.n_kv_heads or attention.n_heads
    common["head_dim"] = attention.head_dim or model.dim // attention.n_heads
    if isinstance(model, Qwen3Model.Config) and not mixed:
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **common)
    if isinstance(model, Qwen3Model.Config):
        moe = mixed[0]
        if moe.load_balance_coeff:
            logger.warning("transformers' Qwen3-MoE has no bias on the router: it routes a little differently than in training")
        return Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            moe_intermediate_size=moe.routed_experts.inner_experts.hidden_dim,
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.router.top_k,
            norm_topk_prob=moe.router.route_norm,
            mlp_only_layers=[index for index, layer in enumerate(model.layers) if layer.moe is None],
            **common,
        )
    if not isinstance(model, Llama3Model.Config):
        raise InputError(f"{type(model).__qualname__} is not one of the models whose config.json superpose knows")
    rotary = [int(not isinstance(layer.attention.rope, NoRoPE.Config)) for layer in model.layers]
    if not all(rotary):
        return SmolLM3Config(architectures=["SmolLM3ForCausalLM"], no_rope_layers=rotary, **common)
    return LlamaConfig(architectures=["LlamaForCausalLM"], **common)


def _rope(attention: Any) -> dict[str, Any]:
    rope = attention.rope
    if rope.scaling == "none" or (rope.scaling == "yarn" and rope.rope_factor == 1):
        return {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "llama":
        return {
            "rope_type": "llama3",
            "rope_theta": rope.theta,
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": rope.rope_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "original_max_position_embeddings": rope.original_seq_len,
        "truncate": rope.truncate,
        "mscale": attention.mscale,
        "mscale_all_dim": attention.mscale,
    }


def _deepseek(model: Any, dense_layers: int, mixed: list[Any]) -> dict[str, Any]:
    attention, moe = model.layers[0].attention, mixed[0]
    if moe.router.score_func != "sigmoid" or model.mtp_layers:
        raise InputError("transformers' DeepSeek-V3 routes by sigmoid and has no layers of multi-token prediction")
    width = moe.routed_experts.inner_experts.hidden_dim
    return {
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "first_k_dense_replace": dense_layers,
        "moe_intermediate_size": width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts.w1.out_features // width,
        "num_experts_per_tok": moe.router.top_k,
        "n_group": moe.router.num_expert_groups or 1,
        "topk_group": moe.router.num_limited_groups or 1,
        "norm_topk_prob": moe.router.route_norm,
        "routed_scaling_factor": moe.router.route_scale,
        "num_nextn_predict_layers": 0,
    }


def main() -> None:
    """``python -m superpose.engines.torchtitan.export CHECKPOINT OUT --module … --config … [options of the run]``"""
    init_logger()
    if len(sys.argv) < 3 or sys.argv[1].startswith("-") or sys.argv[2].startswith("-"):
        raise SystemExit(f"usage: {main.__doc__}")
    config: Any = ConfigManager().parse_args(sys.argv[3:])
    try:
        export(config, Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        logger.error(error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
