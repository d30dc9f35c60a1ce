"""Tiny configs of many architectures, and what of each can be cut: a row says all there is to say.

`proved` are the names of all axes that are proved, no more and no fewer; `refused` those whose
refusal matters, with a word of the reason.
"""

from dataclasses import dataclass, field

import transformers as hf
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    model: str  # the class, as config.architectures names it
    config: PretrainedConfig
    proved: str = ""
    refused: dict[str, str] = field(default_factory=dict)


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3,
         "intermediate_size": 48}
TEXT = {**SIZES, **TOKENS, "vocab_size": 99, "max_position_embeddings": 40}
# A random permutation of two key/value heads would only be a swap: six query heads, three of them.
GROUPED = {**TEXT, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
OWN = {**GROUPED, "head_dim": 8}
IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 5}
TOWERS = {
    "text_config": {**TEXT, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2},
    "vision_config": {**SIZES, "intermediate_size": 40, "image_size": 16, "patch_size": 4},
}
SIGLIP = {**TOWERS, "text_config": TEXT}
EXPERTS = {"experts_implementation": "eager"}  # the fused kernel wants widths of 16 bytes
LM = "ForCausalLM"
CLS = "ForSequenceClassification"
BERT = "hidden heads ffn layers vocab"
LLAMA = "hidden heads queries ffn layers vocab"
SEQ2SEQ = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
           "vocab_size": 99, "max_position_embeddings": 40, "decoder_start_token_id": 2, **TOKENS,
           "forced_eos_token_id": None}
BART = "hidden heads encoder_ffn_dim decoder_ffn_dim encoder_layers decoder_layers vocab"
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3,
      "num_heads": 3, "vocab_size": 99, "decoder_start_token_id": 0, "pad_token_id": 0,
      "eos_token_id": 1}

FAMILIES = {
    "BERT": Family("Bert" + CLS, hf.BertConfig(**TEXT, num_labels=5), BERT),
    "RoBERTa": Family("Roberta" + CLS, hf.RobertaConfig(**TEXT, num_labels=5), BERT),
    "XLM-RoBERTa": Family("XLMRobertaForMaskedLM", hf.XLMRobertaConfig(**TEXT), BERT),
    "MPNet": Family("MPNet" + CLS, hf.MPNetConfig(**TEXT, num_labels=5), BERT),
    "DistilBERT": Family(
        "DistilBert" + CLS,
        hf.DistilBertConfig(dim=32, n_heads=4, n_layers=3, hidden_dim=48, vocab_size=99,
                            max_position_embeddings=40, num_labels=5), BERT),
    "ELECTRA": Family("Electra" + CLS, hf.ElectraConfig(**TEXT, embedding_size=16, num_labels=5),
                      BERT + " embedding_size"),
    "ALBERT": Family("Albert" + CLS, hf.AlbertConfig(**TEXT, embedding_size=16, num_labels=5),
                     "hidden heads ffn vocab embedding_size"),
    "DeBERTa-v2": Family(
        "DebertaV2" + CLS,
        hf.DebertaV2Config(**TEXT, num_labels=5, relative_attention=True, position_buckets=8,
                           pos_att_type=["p2c", "c2p"], position_biased_input=False,
                           norm_rel_ebd="layer_norm", share_att_key=True), BERT),
    "ModernBERT": Family("ModernBertForMaskedLM",
                         hf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2), BERT),
    "Llama": Family("Llama" + LM, hf.LlamaConfig(**OWN), LLAMA),
    "Qwen2": Family("Qwen2" + LM, hf.Qwen2Config(**OWN), LLAMA),
    "Qwen3": Family("Qwen3" + LM, hf.Qwen3Config(**OWN), LLAMA),
    "Mistral": Family("Mistral" + LM, hf.MistralConfig(**OWN), LLAMA),
    "Gemma2": Family("Gemma2" + LM, hf.Gemma2Config(**OWN), LLAMA),
    "Gemma3-text": Family("Gemma3" + LM, hf.Gemma3TextConfig(**OWN), LLAMA),
    "OLMo2": Family("Olmo2" + LM, hf.Olmo2Config(**OWN), LLAMA),
    "StableLM": Family("StableLm" + LM, hf.StableLmConfig(**GROUPED),
                       "hidden heads ffn layers vocab"),
    "SmolLM3": Family("SmolLM3" + LM, hf.SmolLM3Config(**OWN), LLAMA),
    "Granite": Family("Granite" + LM, hf.GraniteConfig(**OWN), LLAMA),
    "Phi": Family("Phi" + LM, hf.PhiConfig(**OWN), LLAMA),
    "Phi3": Family("Phi3" + LM, hf.Phi3Config(**OWN), LLAMA),
    "GPT-2": Family("GPT2LMHeadModel",
                    hf.GPT2Config(n_embd=32, n_head=4, n_layer=3, n_positions=40, vocab_size=99,
                                  n_inner=48, **TOKENS), BERT),
    "GPT-NeoX": Family("GPTNeoX" + LM, hf.GPTNeoXConfig(**TEXT), BERT),
    "OPT": Family("OPT" + LM,
                  hf.OPTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3,
                               ffn_dim=48, vocab_size=99, max_position_embeddings=40,
                               word_embed_proj_dim=32, **TOKENS), BERT),
    "OPT-proj": Family("OPT" + LM,
                       hf.OPTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3,
                                    ffn_dim=48, vocab_size=99, max_position_embeddings=40,
                                    word_embed_proj_dim=16, do_layer_norm_before=False, **TOKENS),
                       BERT + " word_embed_proj_dim"),
    "Falcon-new": Family(
        "Falcon" + LM,
        hf.FalconConfig(hidden_size=48, num_attention_heads=6, num_kv_heads=3, vocab_size=99,
                        num_hidden_layers=3, ffn_hidden_size=40, new_decoder_architecture=True,
                        **TOKENS), BERT),
    "Falcon-mqa": Family(
        "Falcon" + LM,
        hf.FalconConfig(hidden_size=32, num_attention_heads=4, vocab_size=99, num_hidden_layers=3,
                        ffn_hidden_size=48, multi_query=True, new_decoder_architecture=False,
                        **TOKENS), BERT),
    "T5": Family("T5ForConditionalGeneration", hf.T5Config(**T5),
                 "hidden heads ffn num_layers num_decoder_layers vocab"),
    "T5-v1.1": Family("T5ForConditionalGeneration",
                      hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
                      "hidden heads ffn num_layers num_decoder_layers vocab"),
    "BART": Family("BartForConditionalGeneration", hf.BartConfig(**SEQ2SEQ), BART),
    "Marian": Family("MarianMTModel", hf.MarianConfig(**SEQ2SEQ),
                     "encoder_ffn_dim decoder_ffn_dim encoder_layers decoder_layers vocab",
                     {"hidden": "computed anew"}),
    "Pegasus": Family("PegasusForConditionalGeneration", hf.PegasusConfig(**SEQ2SEQ), BART),
    "ViT": Family("ViTForImageClassification", hf.ViTConfig(**SIZES, **IMAGE),
                  "hidden heads ffn layers"),
    "DeiT": Family("DeiTForImageClassification", hf.DeiTConfig(**SIZES, **IMAGE),
                   "hidden heads ffn layers"),
    "BEiT": Family("BeitForImageClassification",
                   hf.BeitConfig(**SIZES, **IMAGE, use_relative_position_bias=True,
                                 layer_scale_init_value=0.1), "hidden heads ffn layers"),
    "DINOv2": Family("Dinov2ForImageClassification",
                     hf.Dinov2Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=3,
                                     mlp_ratio=4, **IMAGE), "hidden heads ffn layers"),
    "DINOv2-swiglu": Family(
        "Dinov2ForImageClassification",
        hf.Dinov2Config(hidden_size=48, num_attention_heads=4, num_hidden_layers=3, mlp_ratio=4,
                        use_swiglu_ffn=True, **IMAGE), "hidden heads ffn layers"),
    "Swin": Family("SwinForImageClassification",
                   hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
                                 num_heads=[2, 4], window_size=4, num_labels=5),
                   "hidden heads ffn depths[0] depths[1]"),
    "PoolFormer": Family("PoolFormerForImageClassification",
                         hf.PoolFormerConfig(hidden_sizes=[16, 24, 32, 40], depths=[2, 2, 1, 1],
                                             num_labels=5),
                         "hidden_sizes[0] hidden_sizes[1] hidden_sizes[2] hidden_sizes[3] ffn "
                         "depths[0] depths[1]", {"depths[2]": "one layer only"}),
    "ResNet-bottleneck": Family(
        "ResNetForImageClassification",
        hf.ResNetConfig(embedding_size=12, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5,
                        layer_type="bottleneck"),
        "hidden_sizes[0] hidden_sizes[1] embedding_size depths[0] depths[1]"),
    "ResNet-basic": Family(
        "ResNetForImageClassification",
        hf.ResNetConfig(embedding_size=12, hidden_sizes=[16, 24], depths=[2, 2], num_labels=5,
                        layer_type="basic"),
        "hidden_sizes[0] hidden_sizes[1] embedding_size depths[0] depths[1]"),
    "RegNet-y": Family(
        "RegNetForImageClassification",
        hf.RegNetConfig(embedding_size=16, hidden_sizes=[24, 32], depths=[2, 2], groups_width=8,
                        layer_type="y", num_labels=5),
        "hidden_sizes[0] hidden_sizes[1] embedding_size depths[0] depths[1]"),
    "RegNet-x": Family(
        "RegNetForImageClassification",
        hf.RegNetConfig(embedding_size=12, hidden_sizes=[24, 32], depths=[2, 2], groups_width=8,
                        layer_type="x", num_labels=5),
        "hidden_sizes[0] hidden_sizes[1] embedding_size depths[0] depths[1]"),
    "ConvNeXt": Family("ConvNextForImageClassification",
                       hf.ConvNextConfig(hidden_sizes=[16, 24], depths=[2, 2], num_stages=2,
                                         image_size=32, num_labels=5,
                                         layer_scale_init_value=0.1),
                       "hidden_sizes[0] hidden_sizes[1] depths[0] depths[1]"),
    "MobileNetV2": Family(
        "MobileNetV2ForImageClassification",
        hf.MobileNetV2Config(image_size=32, depth_multiplier=0.5, depth_divisible_by=2,
                             min_depth=2, expand_ratio=2.0, num_labels=5),
        "depth_multiplier expand_ratio"),
    "EfficientNet": Family(
        "EfficientNetForImageClassification",
        hf.EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=32,
            in_channels=[32, 16], out_channels=[16, 32], kernel_sizes=[3, 3], strides=[1, 2],
            num_block_repeats=[2, 2], expand_ratios=[2, 3], depthwise_padding=[], num_labels=5),
        # All stages' blocks stand in one list, so a stage's layers have no numbers of their own.
        "width_coefficient in_channels[1] out_channels[1] expand_ratios[1] "
        "squeeze_expansion_ratio", {"num_block_repeats[1]": "which parameters there are"}),
    "Wav2Vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        hf.Wav2Vec2Config(**SIZES, vocab_size=32, conv_dim=[16, 24], conv_stride=[5, 4],
                          conv_kernel=[10, 8], num_feat_extract_layers=2, num_labels=5,
                          num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
                          classifier_proj_size=20),
        "hidden heads ffn layers conv_dim[0] conv_dim[1] classifier_proj_size"),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        hf.WhisperConfig(d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40,
                         vocab_size=99, num_mel_bins=8, max_source_positions=20,
                         max_target_positions=30, decoder_start_token_id=2, **TOKENS), BART),
    "CLIP": Family("CLIPModel", hf.CLIPConfig(**TOWERS, projection_dim=20),
                   "text_config.hidden_size text_config.num_attention_heads "
                   "text_config.intermediate_size text_config.num_hidden_layers "
                   "vision_config.hidden_size vision_config.num_attention_heads "
                   "vision_config.intermediate_size vision_config.num_hidden_layers "
                   "projection_dim", {"vocab": "under other ids"}),  # it reads at the largest id
    "SigLIP": Family("SiglipModel", hf.SiglipConfig(**SIGLIP),
                     "text_config.hidden_size text_config.num_attention_heads ffn vocab "
                     "text_config.projection_size vision_config.num_attention_heads "
                     "vision_config.intermediate_size text_config.num_hidden_layers "
                     "vision_config.num_hidden_layers"),
    "Mixtral": Family("Mixtral" + LM, hf.MixtralConfig(**OWN, **EXPERTS, num_local_experts=4),
                      LLAMA, {"num_local_experts": "only in units of several"}),
    "Qwen3-MoE": Family("Qwen3Moe" + LM,
                        hf.Qwen3MoeConfig(**OWN, **EXPERTS, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=24),
                        LLAMA, {"num_local_experts": "only in units of several"}),
    "Mamba": Family("Mamba" + LM,
                    hf.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=8,
                                   vocab_size=99, **TOKENS),
                    "hidden intermediate_size state_size layers vocab"),
    "Mamba2": Family("Mamba2" + LM,
                     hf.Mamba2Config(hidden_size=32, num_hidden_layers=3, state_size=8,
                                     num_heads=8, head_dim=8, n_groups=2, chunk_size=4,
                                     vocab_size=99, **TOKENS), "layers vocab",
                     {"hidden_size": "no layout", "num_heads": "no layout"}),  # [x | B | C]
}  # fmt: skip


def build(family: Family):
    """What `find_axes` and `prove_axes` build with."""
    return getattr(hf, family.model)._from_config
