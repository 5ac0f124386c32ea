"""More small models with random weights, for ``onnx_models.py``: architectures that the rewriter was not made with."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from onnx_small_models import SMALL, TEXT, Model, Only, decoder, tokens, vision
from torch import nn

PADDED = {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
BATCH, SEQ = {0: "batch"}, {"x": {0: "batch", 1: "seq"}}


def encoder(kind: str, padded: bool = False, only: str = "", **settings: Any) -> Callable[[str], Model]:
    """A model of text; ``only`` is the kind of attention that it has."""

    def made(attention: str) -> Model:
        config = getattr(transformers, f"{kind}Config")(vocab_size=99, **settings)
        model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=only or attention)
        free = {"input_ids": TEXT, **dict.fromkeys(PADDED if padded else (), TEXT)}
        return Model(Only(model), free, input_ids=tokens(2, 9, 90) + 2, **(PADDED if padded else {}))

    return made


def older_decoder(kind: str, only: str = "", **settings: Any) -> Callable[[str], Model]:
    def made(attention: str) -> Model:
        config = getattr(transformers, f"{kind}Config")(vocab_size=99, **settings)
        model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=only or attention)
        return Model(Only(model, use_cache=False), {"input_ids": TEXT}, input_ids=tokens(2, 9, 90) + 2)

    return made


class Pair(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        done = self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False)
        return done.last_hidden_state


def bart(attention: str) -> Model:
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartModel._from_config(config, attn_implementation=attention)
    free = {"input_ids": {0: "batch", 1: "past"}, "decoder_input_ids": TEXT}
    return Model(Pair(model), free, input_ids=tokens(2, 7, 90) + 3, decoder_input_ids=tokens(2, 9, 90) + 3)


def segformer(attention: str) -> Model:
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32
    )
    model = transformers.SegformerModel._from_config(config, attn_implementation="eager")
    return Model(Only(model), {"pixel_values": BATCH}, pixel_values=torch.randn(2, 3, 64, 64))


def wav2vec2(attention: str) -> Model:
    config = transformers.Wav2Vec2Config(
        vocab_size=99, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **SMALL,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model._from_config(config, attn_implementation=attention)
    return Model(Only(model), {"input_values": BATCH}, input_values=torch.randn(2, 400))


class Alone(nn.Module):
    """A module of one tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def vae(attention: str) -> Model:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    module = Attention(64, heads=1, dim_head=64, norm_num_groups=8, residual_connection=True, bias=True,
                       upcast_softmax=True, _from_deprecated_attn_block=True)  # fmt: skip
    if attention == "eager":
        module.set_processor(AttnProcessor())
    return Model(Alone(module), {"x": BATCH}, x=torch.randn(2, 64, 6, 6))


class Padded(nn.Module):
    """PyTorch's own attention with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.module(x, x, x, key_padding_mask=padding.bool(), need_weights=False)[0]


def multi_head(attention: str) -> Model:
    padding = torch.zeros(2, 9, dtype=torch.long)
    return Model(Padded(), {**SEQ, "padding": TEXT}, x=torch.randn(2, 9, 64), padding=padding)


def transformer_encoder(attention: str) -> Model:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    return Model(Alone(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), SEQ, x=torch.randn(2, 9, 64))


PATCHES = {"image_size": 32, "patch_size": 8}
OF_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
FEW = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
MODERN = {"local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, **SMALL}  # fmt: skip
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, **SMALL,
                "norm_rel_ebd": "layer_norm", "share_att_key": True, "max_position_embeddings": 64}  # fmt: skip
MORE: dict[str, Callable[[str], Model]] = {
    "DistilBERT": encoder("DistilBert", dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64),
    "RoBERTa, padded": encoder("Roberta", padded=True, max_position_embeddings=64, pad_token_id=1, **SMALL),
    "ModernBERT": encoder("ModernBert", **MODERN), "ModernBERT, padded": encoder("ModernBert", padded=True, **MODERN),
    "ConvBERT": encoder("ConvBert", only="eager", embedding_size=64, **SMALL),
    "DeBERTa v2": encoder("DebertaV2", only="eager", **DISENTANGLED),
    "XLNet": encoder("XLNet", only="eager", d_model=64, n_layer=2, n_head=4, d_inner=96),
    "OPT": older_decoder("OPT", ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64, **FEW),
    "GPT-NeoX": older_decoder("GPTNeoX", max_position_embeddings=64, **SMALL),
    "BLOOM": older_decoder("Bloom", only="eager", hidden_size=64, n_layer=2, n_head=4),
    "Falcon, ALiBi": older_decoder("Falcon", multi_query=False, alibi=True, **FEW),
    "Qwen3": lambda attention: decoder("Qwen3", attention, head_dim=16),
    "Phi-3, padded": lambda attention: padded_decoder("Phi3", attention, sliding_window=4),
    "BART": bart,
    "DeiT": lambda attention: vision("DeiT", attention, **PATCHES, **SMALL),
    "BEiT": lambda attention: vision("Beit", attention, use_relative_position_bias=True, **PATCHES, **SMALL),
    "DINOv2": lambda attention: vision("Dinov2", attention, **PATCHES, **FEW),
    "Swin v2": lambda attention: vision("Swinv2", "eager", **OF_SWIN),
    "SegFormer": segformer, "Wav2Vec2": wav2vec2, "a VAE's attention": vae,
    "nn.MultiheadAttention, padded": multi_head, "nn.TransformerEncoder": transformer_encoder,
}  # fmt: skip


def padded_decoder(kind: str, attention: str, **settings: Any) -> Model:
    made = decoder(kind, attention, **settings)
    made.inputs |= PADDED
    made.free |= dict.fromkeys(PADDED, TEXT)
    return made
