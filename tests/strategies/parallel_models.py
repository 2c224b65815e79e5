"""Small networks of every family that a built-in tensor plan knows, each with inputs and the names it is refused by."""

import torch
from torch import nn

from lightning_opt.models import GPT, MLP, TextEncoder, ViT

VOCAB, LENGTH = 40, 10


def ids():
    return torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))


def ours():
    torch.manual_seed(0)
    wide = {"dim": 16, "depth": 2, "heads": 4}
    return {
        "text_encoder": (TextEncoder(num_outputs=3, vocab_size=VOCAB, max_length=LENGTH, **wide), {"input_ids": ids()}),
        "fused": (TextEncoder(num_outputs=3, vocab_size=VOCAB, fused_qkv=True, **wide), {"input_ids": ids()}),
        "gpt_tied": (GPT(vocab_size=VOCAB, **wide), {"input_ids": ids()}),
        "gpt_head": (GPT(vocab_size=VOCAB, tied_embeddings=False, fused_qkv=True, **wide), {"input_ids": ids()}),
        "gpt_odd_vocabulary": (GPT(vocab_size=VOCAB + 1, **wide), {"input_ids": ids()}),
        "vit": (ViT(num_outputs=3, image_size=8, in_channels=1, **wide), {"x": torch.rand(2, 1, 8, 8)}),
        "mlp": (MLP(num_outputs=3, in_features=6, hidden=(8, 12)), {"x": torch.rand(4, 6)}),
        "mlp_odd": (MLP(num_outputs=3, in_features=6, hidden=(8,)), {"x": torch.rand(4, 6)}),
    }


def hugging_face():
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
    from transformers import models as hf

    torch.manual_seed(0)
    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = {**small, "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    llama = {**small, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
    gpt2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0}
    made = {
        "bert": AutoModelForSequenceClassification.from_config(hf.bert.BertConfig(**bert)),
        "bert_mlm": AutoModelForMaskedLM.from_config(hf.bert.BertConfig(**bert)),
        "roberta": AutoModelForMaskedLM.from_config(hf.roberta.RobertaConfig(**bert, max_position_embeddings=32)),
        "electra": AutoModelForMaskedLM.from_config(hf.electra.ElectraConfig(**bert, embedding_size=16)),
        "distilbert": AutoModelForSequenceClassification.from_config(
            hf.distilbert.DistilBertConfig(
                vocab_size=VOCAB,
                dim=16,
                n_layers=2,
                n_heads=4,
                hidden_dim=32,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
            )
        ),
        "modernbert": AutoModelForMaskedLM.from_config(
            hf.modernbert.ModernBertConfig(**small, intermediate_size=32, pad_token_id=0, max_position_embeddings=32)
        ),
        "gpt2": AutoModelForCausalLM.from_config(hf.gpt2.GPT2Config(**gpt2, attn_pdrop=0, n_positions=32)),
        "llama": AutoModelForCausalLM.from_config(hf.llama.LlamaConfig(**llama)),
        "llama_tied": AutoModelForCausalLM.from_config(hf.llama.LlamaConfig(**llama, tie_word_embeddings=True)),
        "mistral": AutoModelForCausalLM.from_config(hf.mistral.MistralConfig(**llama)),
        "qwen3": AutoModelForCausalLM.from_config(hf.qwen3.Qwen3Config(**llama, head_dim=4)),
        "gpt_neox": AutoModelForCausalLM.from_config(
            hf.gpt_neox.GPTNeoXConfig(**small, intermediate_size=32, max_position_embeddings=32)
        ),
        "opt": AutoModelForCausalLM.from_config(
            hf.opt.OPTConfig(**small, ffn_dim=32, dropout=0.0, max_position_embeddings=32, word_embed_proj_dim=16)
        ),
        "gemma": AutoModelForCausalLM.from_config(hf.gemma.GemmaConfig(**llama, head_dim=4)),
    }
    return {name: (model, {"input_ids": ids() % (VOCAB - 2) + 2}) for name, model in made.items()}


class Tower(nn.Module):
    """Somebody's network: no plan knows its names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.gain * self.second(torch.tanh(self.first(x)))
