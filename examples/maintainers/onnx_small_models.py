"""Small models with random weights, for ``onnx_models.py``: twelve architectures, with caches and padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import T5EncoderModel


class Model:
    """A module, its inputs, and which of their axes are free."""

    def __init__(self, module: nn.Module, free: dict[str, dict[int, str]], **inputs: torch.Tensor) -> None:
        self.module, self.inputs, self.free = module.eval(), inputs, free
        for parameter in module.parameters():
            if not parameter.any():  # biases that begin at zero would prove to be none
                nn.init.normal_(parameter, std=0.5)


class Only(nn.Module):
    """A model of transformers with tensors in and one tensor out."""

    def __init__(self, model: nn.Module, output: str = "last_hidden_state", **fixed: Any) -> None:
        super().__init__()
        self.model, self.output, self.fixed = model, output, fixed
        self.unpadded = False

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        if self.unpadded and "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return getattr(self.model(**inputs, **self.fixed), self.output)


def tokens(batch: int = 2, seq: int = 9, vocabulary: int = 99) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, seq))


TEXT = {0: "batch", 1: "seq"}


def bert(attention: str) -> Model:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = BertModel._from_config(config, attn_implementation=attention)
    return Model(Only(model), {"input_ids": TEXT}, input_ids=tokens())


def bert_padded(attention: str) -> Model:
    made = bert(attention)
    made.inputs["attention_mask"] = torch.ones_like(made.inputs["input_ids"])
    made.free["attention_mask"] = TEXT
    return made


def gpt2(attention: str) -> Model:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = GPT2Model._from_config(config, attn_implementation=attention)
    return Model(Only(model, use_cache=False), {"input_ids": TEXT}, input_ids=tokens())


def decoder(kind: str, attention: str, **more: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=64, **{"pad_token_id": 0, **more},
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=attention)
    return Model(Only(model, use_cache=False), {"input_ids": TEXT}, input_ids=tokens())


def llama(attention: str) -> Model:
    return decoder("Llama", attention)


def mistral(attention: str) -> Model:
    return decoder("Mistral", attention, sliding_window=4)


def gemma2(attention: str) -> Model:
    attention = "eager"  # the only one with its soft cap
    return decoder("Gemma2", attention, head_dim=16, sliding_window=4, query_pre_attn_scalar=16)


class Cached(nn.Module):
    """A decoder with the keys and values of earlier steps as inputs and outputs."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor) -> Any:
        from transformers import DynamicCache

        pairs = [(past_key[layer], past_value[layer]) for layer in range(self.layers)]
        cache = DynamicCache(pairs)
        done = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        kept = [(layer.keys, layer.values) for layer in done.past_key_values.layers]
        return done.last_hidden_state, torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])


def llama_cached(attention: str) -> Model:
    module = llama(attention).module.model
    past = torch.randn(2, 2, 2, 5, 16)
    free = {0: "layers", 1: "batch", 3: "past"}
    del free[0]
    return Model(
        Cached(module, 2), {"input_ids": TEXT, "past_key": free, "past_value": free},
        input_ids=tokens(2, 3), past_key=past, past_value=past.clone(),
    )  # fmt: skip


def t5(attention: str) -> Model:
    from transformers import T5Config

    config = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return Model(Only(T5EncoderModel(config)), {"input_ids": TEXT}, input_ids=tokens())


def vision(kind: str, attention: str, free: dict[int, str] | None = None, **settings: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=attention)
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return Model(Only(model), {"pixel_values": free or {0: "batch"}}, pixel_values=torch.randn(2, 3, size, size))


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def vit(attention: str) -> Model:
    return vision("ViT", attention, image_size=32, patch_size=8, **SMALL)


def clip_vision(attention: str) -> Model:
    return vision("CLIPVision", attention, image_size=32, patch_size=8, **SMALL)


def clip_text(attention: str) -> Model:
    import transformers

    config = transformers.CLIPTextConfig(vocab_size=99, max_position_embeddings=32, eos_token_id=98, **SMALL)
    model = transformers.CLIPTextModel._from_config(config, attn_implementation=attention)
    return Model(Only(model), {"input_ids": TEXT}, input_ids=tokens())


def swin(attention: str) -> Model:
    if attention == "sdpa":
        attention = "eager"  # the only one that it has
    return vision(
        "Swin", attention, image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
    )


def sam_encoder(attention: str) -> Model:
    return vision(
        "SamVision", attention, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64,
        patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=96, output_channels=16,
    )  # fmt: skip


def _whisper(attention: str) -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=99, num_mel_bins=16, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=24,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return WhisperModel._from_config(config, attn_implementation=attention)


def whisper_encoder(attention: str) -> Model:
    features = torch.randn(2, 16, 48)
    return Model(Only(_whisper(attention).encoder), {"input_features": {0: "batch"}}, input_features=features)


def whisper_decoder(attention: str) -> Model:
    decoder = Only(_whisper(attention).decoder, use_cache=False)
    return Model(
        decoder, {"input_ids": TEXT, "encoder_hidden_states": {0: "batch"}},
        input_ids=tokens(), encoder_hidden_states=torch.randn(2, 24, 64),
    )  # fmt: skip


class CachedCross(nn.Module):
    """Whisper's decoder with a cache: self-attention over earlier steps, and attention over the encoder's result."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Any, encoder_hidden_states: Any, past_key: Any, past_value: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        own = DynamicCache([(past_key[layer], past_value[layer]) for layer in range(2)])
        done = self.decoder(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
            past_key_values=EncoderDecoderCache(own, DynamicCache()), use_cache=True,
        )  # fmt: skip
        kept = done.past_key_values.self_attention_cache.layers
        return done.last_hidden_state, torch.stack([x.keys for x in kept]), torch.stack([x.values for x in kept])


def whisper_decoder_cached(attention: str) -> Model:
    past, free = torch.randn(2, 2, 4, 5, 16), {1: "batch", 3: "past"}
    return Model(
        CachedCross(_whisper(attention).decoder),
        {"input_ids": TEXT, "encoder_hidden_states": {0: "batch"}, "past_key": free, "past_value": free},
        input_ids=tokens(2, 3), encoder_hidden_states=torch.randn(2, 24, 64), past_key=past, past_value=past.clone(),
    )  # fmt: skip


class Transformer2D(nn.Module):
    """A DiT with its labels and steps as inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Any, timestep: Any, class_labels: Any) -> Any:
        return self.model(hidden_states, timestep=timestep, class_labels=class_labels).sample


def dit(attention: str) -> Model:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    if attention == "eager":
        for block in model.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
    batch = {0: "batch"}
    return Model(
        Transformer2D(model), {"hidden_states": batch, "timestep": batch, "class_labels": batch},
        hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 5]),
    )  # fmt: skip


MODELS: dict[str, Callable[[str], Model]] = {
    "BERT": bert, "BERT, padded": bert_padded, "GPT-2": gpt2, "Llama": llama, "Llama, cached": llama_cached,
    "Gemma 2": gemma2, "Mistral": mistral, "T5 encoder": t5, "ViT": vit, "Swin": swin, "SAM encoder": sam_encoder,
    "Whisper encoder": whisper_encoder, "Whisper decoder": whisper_decoder,
    "Whisper decoder, cached": whisper_decoder_cached, "CLIP vision": clip_vision, "CLIP text": clip_text, "DiT": dit,
}  # fmt: skip
