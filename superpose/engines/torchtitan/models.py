"""The paper's model shapes, built of TorchTitan's own parts with the initialisation of its llama3 and qwen3."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

from superpose.engines.torchtitan.rope import NoRoPE

#: Of the Llama 3 tokenizer.
VOCABULARY = 128_256
EPS = 1e-6
POSITIONS = 2048

Init = dict[str, Callable[..., object]]


def llama(
    *,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    theta: float,
    no_rope_every: int = 0,
    vocabulary: int = VOCABULARY,
    positions: int = POSITIONS,
) -> Llama3Model.Config:
    """A Llama without tied embeddings; where ``no_rope_every`` is n, each n-th layer goes without RoPE, as in SmolLM3."""
    linear: Init = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
    blocks = []
    for index in range(layers):
        depth: Init = {"weight": partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, index))}
        kind = NoRoPE if no_rope_every and (index + 1) % no_rope_every == 0 else ComplexRoPE
        blocks.append(
            Llama3TransformerBlock.Config(
                attention_norm=_norm(dim),
                ffn_norm=_norm(dim),
                attention=make_gqa_config(
                    dim=dim,
                    n_heads=heads,
                    n_kv_heads=kv_heads,
                    wqkv_param_init=linear,
                    wo_param_init=depth,
                    inner_attention=get_attention_config("flex"),
                    rope=kind.Config(dim=dim // heads, max_seq_len=positions, theta=theta),
                ),
                feed_forward=make_ffn_config(dim=dim, hidden_dim=hidden, w1_param_init=linear, w2w3_param_init=depth),
            )
        )
    return Llama3Model.Config(
        dim=dim,
        vocab_size=vocabulary,
        tok_embeddings=_embedding(vocabulary, dim, std=1.0),
        norm=_norm(dim),
        lm_head=Linear.Config(
            in_features=dim,
            out_features=vocabulary,
            param_init={"weight": partial(nn.init.trunc_normal_, std=dim**-0.5, a=-3 * dim**-0.5, b=3 * dim**-0.5)},
        ),
        layers=blocks,
    )


def qwen_moe(
    *,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    experts: int,
    top_k: int,
    vocabulary: int = VOCABULARY,
    positions: int = POSITIONS,
) -> Qwen3Model.Config:
    """A Qwen3 mixture of experts of width ``hidden`` each, balanced by TorchTitan's bias on the router."""
    linear: Init = {"weight": partial(nn.init.normal_, std=0.02)}
    output = partial(nn.init.normal_, std=0.02 / (2 * layers) ** 0.5)
    blocks = [
        Qwen3TransformerBlock.Config(
            attention_norm=_norm(dim),
            ffn_norm=_norm(dim),
            attention=make_gqa_config(
                dim=dim,
                n_heads=heads,
                n_kv_heads=kv_heads,
                head_dim=head_dim,
                wqkv_param_init=linear,
                wo_param_init={"weight": output},
                inner_attention=get_attention_config("flex"),
                rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=positions, theta=1_000_000.0),
                qk_norm=_norm(head_dim),
            ),
            moe=make_moe_config(
                num_experts=experts,
                router=make_router_config(
                    dim=dim,
                    num_experts=experts,
                    gate_param_init=linear,
                    top_k=top_k,
                    score_func="softmax",
                    route_norm=True,
                ),
                routed_experts=make_routed_experts_config(
                    dim=dim,
                    hidden_dim=hidden,
                    num_experts=experts,
                    top_k=top_k,
                    param_init={"w1_EFD": linear["weight"], "w2_EDF": output, "w3_EFD": linear["weight"]},
                    comm_backend="standard",
                ),
            ),
        )
        for _ in range(layers)
    ]
    return Qwen3Model.Config(
        dim=dim,
        vocab_size=vocabulary,
        tok_embeddings=_embedding(vocabulary, dim, std=0.02),
        norm=_norm(dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=linear),
        layers=blocks,
    )


def _norm(width: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=EPS, param_init={"weight": nn.init.ones_})


def _embedding(vocabulary: int, dim: int, *, std: float) -> Embedding.Config:
    return Embedding.Config(
        num_embeddings=vocabulary, embedding_dim=dim, param_init={"weight": partial(nn.init.normal_, std=std)}
    )
