"""Built-in tensor-parallel plans: what the layers of known networks are called, and how each is cut.

To add one, add a `Family`: nothing else names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A plan for every network whose modules are called like this.

    Args:
        name: For messages.
        plan: Pattern -> kind; `fnmatch` over whole names, where `*` also matches dots; "" is the network itself.
        has: Patterns that must match something.
        lacks: Patterns that must match nothing.
    """

    name: str
    plan: Mapping[str, str]
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


_BLOCKS = {
    "*blocks.*.attention.query": "colwise",
    "*blocks.*.attention.key": "colwise",
    "*blocks.*.attention.value": "colwise",
    "*blocks.*.attention.qkv": "fused_qkv",
    "*blocks.*.attention.out": "rowwise",
    "*blocks.*.up": "colwise",
    "*blocks.*.down": "rowwise",
}
_LLAMA_BLOCKS = {
    "*layers.*.self_attn.q_proj": "colwise",
    "*layers.*.self_attn.k_proj": "colwise",
    "*layers.*.self_attn.v_proj": "colwise",
    "*layers.*.self_attn.q_norm": "shared",
    "*layers.*.self_attn.k_norm": "shared",
    "*layers.*.self_attn.o_proj": "rowwise",
    "*layers.*.mlp.gate_proj": "colwise",
    "*layers.*.mlp.up_proj": "colwise",
    "*layers.*.mlp.down_proj": "rowwise",
}

FAMILIES: tuple[Family, ...] = (
    Family("a text encoder", {**_BLOCKS, "*token_embedding": "vocab"}, has=("*embedding_norm",)),
    Family(
        "a GPT with its own head",
        {**_BLOCKS, "*token_embedding": "vocab", "*head": "gathered"},
        has=("*head", "*token_embedding"),
        lacks=("*embedding_norm",),
    ),
    Family(
        "a GPT that reads logits with its embedding",
        {**_BLOCKS, "token_embedding": "vocab", "norm": "hands_on", "": "joined"},
        has=("token_embedding", "norm"),
        lacks=("head", "embedding_norm"),
    ),
    Family("blocks of attention and a perceptron", _BLOCKS),
    Family(
        "BERT, RoBERTa, ELECTRA",
        {
            "*layer.*.attention.self.query": "colwise",
            "*layer.*.attention.self.key": "colwise",
            "*layer.*.attention.self.value": "colwise",
            "*layer.*.attention.output.dense": "rowwise",
            "*layer.*.intermediate.dense": "colwise",
            "*layer.*.output.dense": "rowwise",
            "*embeddings.word_embeddings": "vocab",
            "*predictions.decoder": "gathered",
            "lm_head.decoder": "gathered",
            "*.lm_head.decoder": "gathered",
            "*generator_lm_head": "gathered",
        },
    ),
    Family(
        "DistilBERT",
        {
            "*layer.*.attention.q_lin": "colwise",
            "*layer.*.attention.k_lin": "colwise",
            "*layer.*.attention.v_lin": "colwise",
            "*layer.*.attention.out_lin": "rowwise",
            "*layer.*.ffn.lin1": "colwise",
            "*layer.*.ffn.lin2": "rowwise",
            "*embeddings.word_embeddings": "vocab",
            "*vocab_projector": "gathered",
        },
    ),
    Family(
        "ModernBERT",
        {
            "*layers.*.attn.Wqkv": "fused_qkv",
            "*layers.*.attn.Wo": "rowwise",
            "*layers.*.mlp.Wi": "fused_gate",
            "*layers.*.mlp.Wo": "rowwise",
            "*embeddings.tok_embeddings": "vocab",
            "decoder": "gathered",
            "*.decoder": "gathered",
        },
    ),
    Family(
        "GPT-2",
        {
            "*h.*.attn.c_attn": "fused_qkv",
            "*h.*.attn.c_proj": "rowwise",
            "*h.*.mlp.c_fc": "colwise",
            "*h.*.mlp.c_proj": "rowwise",
            "*wte": "vocab",
            "*lm_head": "gathered",
        },
    ),
    Family("Llama, Qwen, Mistral", {**_LLAMA_BLOCKS, "*embed_tokens": "vocab", "*lm_head": "gathered"}),
    Family(
        "OPT",
        {
            "*layers.*.self_attn.q_proj": "colwise",
            "*layers.*.self_attn.k_proj": "colwise",
            "*layers.*.self_attn.v_proj": "colwise",
            "*layers.*.self_attn.out_proj": "rowwise",
            "*layers.*.fc1": "colwise",
            "*layers.*.fc2": "rowwise",
            "*embed_tokens": "vocab",
            "*lm_head": "gathered",
        },
    ),
    Family(
        "GPT-NeoX",
        {
            "*layers.*.attention.query_key_value": "colwise",  # each head's three matrices lie together in it
            "*layers.*.attention.dense": "rowwise",
            "*layers.*.mlp.dense_h_to_4h": "colwise",
            "*layers.*.mlp.dense_4h_to_h": "rowwise",
            "*embed_in": "vocab",
            "*embed_out": "gathered",
            "*lm_head": "gathered",
        },
    ),
)
