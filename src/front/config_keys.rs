//! Keys of `config.json` that change what a model computes. transformers lets any key stand in a configuration: most
//! say nothing about the arithmetic (generation defaults, labels, training), a few change it, and a converter that
//! passes over one of those writes a file that answers wrongly without a word.
use super::config::{ConfigError, Section};
use serde_json::Value;

/// What is done with a key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum KeyRule {
    /// Read and obeyed, elsewhere.
    Read,
    /// Of no effect on the results, or none that a fixed checkpoint could show.
    Harmless,
    /// Only with values under which it changes nothing: no, none or nothing.
    Off,
    /// Only true (or absent).
    On,
    /// Only this number.
    Number(f64),
    /// Only this word.
    Word(&'static str),
}

use KeyRule::*;

/// transformers' `Qwen2Config` and `LlamaConfig`, and what custom code built on them adds.
pub(crate) const TEXT: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("hidden_size", Read),
    ("intermediate_size", Read),
    ("num_hidden_layers", Read),
    ("num_attention_heads", Read),
    ("num_key_value_heads", Read),
    ("head_dim", Read),
    ("vocab_size", Read),
    ("max_position_embeddings", Read),
    ("rms_norm_eps", Read),
    ("hidden_act", Read),
    ("rope_theta", Read),
    ("rope_scaling", Read),
    ("rope_parameters", Read),
    ("tie_word_embeddings", Read),
    ("use_sliding_window", Read),
    ("sliding_window", Read),
    ("max_window_layers", Read),
    ("layer_types", Read),
    // Qwen2's biases are not optional; a bias on o_proj is a tensor that nobody claims.
    ("attention_bias", Read),
    ("attention_dropout", Harmless),
    ("initializer_range", Harmless),
    ("use_cache", Harmless),
    ("bos_token_id", Harmless),
    ("eos_token_id", Harmless),
    ("pad_token_id", Harmless),
    // Sums the same products in another order.
    ("pretraining_tp", Harmless),
    ("mlp_bias", Off),
    ("qk_norm", Off),
    ("use_qk_norm", Off),
    ("qk_layernorm", Off),
    ("qk_layer_norms", Off),
    ("qk_normalization", Off),
    ("partial_rotary_factor", Number(1.0)),
    ("rotary_pct", Number(1.0)),
    ("rope_interleaved", Off),
    ("no_rope_layers", Off),
    ("no_rope_layer_interval", Off),
    ("use_dynamic_ntk", Off),
    ("use_logn_attn", Off),
    ("alibi", Off),
    ("hidden_activation", Word("silu")),
    ("position_embedding_type", Word("rope")),
    ("logit_scale", Number(1.0)),
    ("logits_scaling", Number(1.0)),
    ("lm_head_multiplier", Number(1.0)),
    ("embedding_multiplier", Number(1.0)),
    ("residual_multiplier", Number(1.0)),
    ("attention_multiplier", Off),
    ("query_pre_attn_scalar", Off),
    ("attn_logit_softcapping", Off),
    ("final_logit_softcapping", Off),
    ("attn_temperature_tuning", Off),
    ("scale_attn_by_inverse_layer_idx", Off),
    ("scale_depth", Off),
    ("scale_emb", Number(1.0)),
    ("attention_chunk_size", Off),
    ("is_causal", On),
    ("use_bidirectional_attention", Off),
    ("add_cross_attention", Off),
    ("is_encoder_decoder", Off),
    ("pruned_heads", Off),
    ("num_experts", Off),
    ("num_local_experts", Off),
    ("moe_config", Off),
    // InternLM2's.
    ("bias", Off),
];

/// transformers' `SiglipVisionConfig` and `CLIPVisionConfig`, and what other ViTs add.
pub(crate) const VISION: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("hidden_size", Read),
    ("intermediate_size", Read),
    ("num_hidden_layers", Read),
    ("num_attention_heads", Read),
    ("image_size", Read),
    ("patch_size", Read),
    ("hidden_act", Read),
    ("layer_norm_eps", Read),
    ("num_channels", Number(3.0)),
    // The pooling head is not used.
    ("vision_use_head", Harmless),
    ("projection_dim", Harmless),
    ("attention_dropout", Harmless),
    ("dropout", Harmless),
    ("drop_path_rate", Harmless),
    ("initializer_range", Harmless),
    ("initializer_factor", Harmless),
    ("qkv_bias", On),
    ("attention_bias", On),
    ("qk_normalization", Off),
    ("use_qk_norm", Off),
    ("norm_type", Word("layer_norm")),
    ("spatial_merge_size", Number(1.0)),
    ("temporal_patch_size", Number(1.0)),
    ("window_size", Off),
    ("pruned_heads", Off),
];

/// transformers' `LlavaOnevisionConfig`.
pub(crate) const LLAVA_ONEVISION: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("image_token_index", Read),
    ("image_token_id", Read),
    ("projector_hidden_act", Read),
    ("vision_feature_select_strategy", Read),
    ("vision_feature_layer", Read),
    ("vision_aspect_ratio", Read),
    ("image_grid_pinpoints", Read),
    ("multimodal_projector_bias", Read),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // Videos are not converted.
    ("video_token_index", Harmless),
    ("video_token_id", Harmless),
    ("ignore_index", Harmless),
    // `image_newline` is always there in this family.
    ("use_image_newline_parameter", Harmless),
    ("logit_scale", Number(1.0)),
];

/// transformers' `Qwen2VLConfig`, `Qwen2_5_VLConfig` and `Qwen3VLConfig`, but for the text model's keys that may lie among
/// them.
pub(crate) const QWEN_VL: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    ("vision_start_token_id", Read),
    ("vision_end_token_id", Read),
    // Where a picture goes is said by the runtime.
    ("image_token_id", Harmless),
    // Videos are not converted.
    ("video_token_id", Harmless),
    ("vision_token_id", Harmless),
    ("logit_scale", Number(1.0)),
];

/// transformers' `Qwen2VLVisionConfig`, `Qwen2_5_VLVisionConfig` and `Qwen3VLVisionConfig`.
pub(crate) const QWEN_VISION: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("depth", Read),
    ("embed_dim", Read),
    ("hidden_size", Read),
    ("out_hidden_size", Read),
    ("intermediate_size", Read),
    ("mlp_ratio", Read),
    ("num_heads", Read),
    ("hidden_act", Read),
    ("patch_size", Read),
    ("window_size", Read),
    ("fullatt_block_indexes", Read),
    ("num_position_embeddings", Read),
    ("deepstack_visual_indexes", Read),
    ("spatial_merge_size", Number(2.0)),
    ("temporal_patch_size", Number(2.0)),
    ("in_channels", Number(3.0)),
    // An old name of the channels, which no class reads.
    ("in_chans", Harmless),
    ("spatial_patch_size", Harmless),
    // Videos are not converted.
    ("tokens_per_second", Harmless),
    ("initializer_range", Harmless),
    ("rope_parameters", Read),
    ("qk_normalization", Off),
    ("use_qk_norm", Off),
    ("pruned_heads", Off),
];

/// transformers' `LlavaConfig` and `LlavaNextConfig`.
pub(crate) const LLAVA: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("image_token_index", Read),
    ("image_token_id", Read),
    ("projector_hidden_act", Read),
    ("vision_feature_select_strategy", Read),
    ("vision_feature_layer", Read),
    ("image_grid_pinpoints", Read),
    ("multimodal_projector_bias", Read),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // The processor's, for prompts that are made before the picture is seen.
    ("image_seq_length", Harmless),
    ("ignore_index", Harmless),
    ("pad_token_id", Harmless),
    // The text model's counts.
    ("vocab_size", Harmless),
    // `image_newline` is always there in LLaVA-NeXT.
    ("use_image_newline_parameter", Harmless),
    ("logit_scale", Number(1.0)),
];

/// transformers' `Idefics3Config` and `SmolVLMConfig`.
pub(crate) const IDEFICS3: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("scale_factor", Read),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // Where a picture goes is said by the runtime.
    ("image_token_id", Harmless),
    ("pad_token_id", Harmless),
    ("use_cache", Harmless),
    // The text model's counts.
    ("vocab_size", Harmless),
    ("logit_scale", Number(1.0)),
];

/// transformers' `Gemma3Config`.
pub(crate) const GEMMA3: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("mm_tokens_per_image", Read),
    ("boi_token_index", Read),
    ("eoi_token_index", Read),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // Where a picture goes is said by the runtime.
    ("image_token_index", Harmless),
    ("initializer_range", Harmless),
    ("logit_scale", Number(1.0)),
];

/// transformers' `Gemma3TextConfig`.
pub(crate) const GEMMA3_TEXT: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("hidden_size", Read),
    ("intermediate_size", Read),
    ("num_hidden_layers", Read),
    ("num_attention_heads", Read),
    ("num_key_value_heads", Read),
    ("head_dim", Read),
    ("vocab_size", Read),
    ("max_position_embeddings", Read),
    ("rms_norm_eps", Read),
    ("hidden_activation", Word("gelu_pytorch_tanh")),
    ("query_pre_attn_scalar", Read),
    ("sliding_window", Read),
    ("sliding_window_pattern", Read),
    ("_sliding_window_pattern", Read),
    ("layer_types", Read),
    ("rope_theta", Read),
    ("rope_local_base_freq", Read),
    ("rope_scaling", Read),
    ("rope_parameters", Read),
    ("tie_word_embeddings", Read),
    ("attention_bias", Off),
    ("attention_dropout", Harmless),
    ("initializer_range", Harmless),
    ("use_cache", Harmless),
    ("bos_token_id", Harmless),
    ("eos_token_id", Harmless),
    ("pad_token_id", Harmless),
    ("cache_implementation", Harmless),
    ("attn_logit_softcapping", Off),
    ("final_logit_softcapping", Off),
    ("use_bidirectional_attention", Off),
    ("add_cross_attention", Off),
    ("is_encoder_decoder", Off),
    ("pruned_heads", Off),
];

/// transformers' `InternVLConfig`.
pub(crate) const INTERNVL: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("text_config", Read),
    ("vision_config", Read),
    ("image_token_id", Read),
    ("downsample_ratio", Number(0.5)),
    ("projector_hidden_act", Word("gelu")),
    ("vision_feature_layer", Number(-1.0)),
    ("vision_feature_select_strategy", Word("default")),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // The processor's, for prompts that are made before the picture is seen.
    ("image_seq_length", Harmless),
    ("logit_scale", Number(1.0)),
];

/// OpenGVLab's `InternVLChatConfig`.
pub(crate) const INTERNVL_CHAT: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("llm_config", Read),
    ("vision_config", Read),
    ("force_image_size", Read),
    ("min_dynamic_patch", Read),
    ("max_dynamic_patch", Read),
    ("ps_version", Read),
    ("downsample_ratio", Number(0.5)),
    ("select_layer", Number(-1.0)),
    ("dynamic_image_size", On),
    ("use_thumbnail", On),
    ("pad2square", Off),
    ("image_fold", Off),
    // Above zero the weights are those of an adapter.
    ("use_backbone_lora", Off),
    ("use_llm_lora", Off),
    ("tie_word_embeddings", Read),
    ("quantization_config", Read),
    ("transformers_weights", Read),
    // The prompts of their `chat`; the tokenizer's template is what other programs use.
    ("template", Harmless),
    ("system_message", Harmless),
    // The text model's.
    ("hidden_size", Harmless),
];

/// transformers' `InternVLVisionConfig` and OpenGVLab's `InternVisionConfig`.
pub(crate) const INTERN_VIT: &[(&str, KeyRule)] = &[
    ("model_type", Read),
    ("hidden_size", Read),
    ("intermediate_size", Read),
    ("num_hidden_layers", Read),
    ("num_attention_heads", Read),
    ("image_size", Read),
    ("patch_size", Read),
    ("layer_norm_eps", Read),
    ("norm_type", Read),
    ("attention_bias", Read),
    ("qkv_bias", Read),
    ("use_qk_norm", Read),
    ("qk_normalization", Read),
    ("hidden_act", Word("gelu")),
    ("num_channels", Number(3.0)),
    ("use_absolute_position_embeddings", On),
    // Else there is a norm behind the last block.
    ("use_mean_pooling", On),
    // Of training; the trained scales are tensors.
    ("layer_scale_init_value", Harmless),
    ("use_mask_token", Harmless),
    ("hidden_dropout_prob", Harmless),
    ("projection_dropout", Harmless),
    ("attention_dropout", Harmless),
    ("dropout", Harmless),
    ("drop_path_rate", Harmless),
    ("initializer_range", Harmless),
    ("initializer_factor", Harmless),
    ("use_flash_attn", Harmless),
    ("pruned_heads", Off),
];

/// Refuses the keys of `section` that `table` allows only with other values.
///
/// # Errors
/// Such a key; the message names it, its value and what is understood.
pub(crate) fn check(section: &Section, table: &[(&str, KeyRule)]) -> Result<(), ConfigError> {
    for (name, key) in table {
        let Some(value) = section.get(name) else { continue };
        let (neutral, want) = match key {
            Read | Harmless => continue,
            Off => (is_nothing(value), "false, 0 or absent: what it switches on is not supported"),
            On => (value.as_bool() == Some(true), "true or absent: models without it are not supported"),
            Number(n) => (value.as_f64() == Some(*n), "its neutral value or absent: anything else is not supported"),
            Word(w) => (value.as_str() == Some(w), "what this architecture has, or absent"),
        };
        if !neutral {
            return Err(section.invalid(name, want));
        }
    }
    Ok(())
}

pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::Bool(true) => false,
    }
}

/// Refuses a text model some of whose `layers` blocks see only the last tokens. Follows transformers' `Qwen2Config`: without
/// `use_sliding_window` the width is not used, and with it the blocks from `max_window_layers` on slide, which is `first`
/// where the key is absent.
///
/// # Errors
/// A block slides, or is of a kind that is not supported.
pub(crate) fn check_windows(s: &Section, layers: usize, first: u64) -> Result<(), ConfigError> {
    if let Some(types) = s.get("layer_types") {
        let types = types.as_array().ok_or_else(|| s.invalid("layer_types", "a list"))?;
        if types.iter().any(|t| t.as_str() != Some("full_attention")) {
            return Err(s.invalid("layer_types", "full_attention in every block: sliding windows are not supported"));
        }
        return Ok(());
    }
    let slides =
        s.bool_opt("use_sliding_window")?.unwrap_or(false) && s.json.get("sliding_window") != Some(&Value::Null);
    let from = match s.get("max_window_layers") {
        None => first,
        Some(v) => v.as_u64().ok_or_else(|| s.invalid("max_window_layers", "a whole number"))?,
    };
    if slides && from < layers as u64 {
        return Err(s.invalid("use_sliding_window", "false: attention to a sliding window is not supported"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn section(json: &Value) -> Section<'_> {
        Section { file: "config.json".into(), path: "text_config".into(), json }
    }

    #[test]
    fn windows_as_transformers_reads_them() {
        for (json, slides) in [
            (json!({}), false),
            (json!({"use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 0}), false),
            (json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0}), false),
            (json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 4}), false),
            (json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 3}), true),
            (json!({"use_sliding_window": true, "max_window_layers": 0}), true),
            (json!({"layer_types": ["full_attention", "full_attention"]}), false),
            (json!({"layer_types": ["full_attention", "sliding_attention"]}), true),
        ] {
            let message = check_windows(&section(&json), 4, 28).err().map(|e| e.to_string());
            assert_eq!(message.is_some(), slides, "{json}: {message:?}");
        }
    }

    #[test]
    fn neutral_values_pass_and_others_are_named() {
        let pass = json!({"mlp_bias": false, "qk_norm": null, "partial_rotary_factor": 1, "logit_scale": 1.0, "pruned_heads": {},
                          "no_rope_layers": [], "pretraining_tp": 2, "temperature": 0.5, "is_causal": true});
        check(&section(&pass), TEXT).unwrap();
        for (key, value) in [
            ("mlp_bias", json!(true)),
            ("qk_layernorm", json!(true)),
            ("partial_rotary_factor", json!(0.5)),
            ("logit_scale", json!(0.0625)),
            ("final_logit_softcapping", json!(30.0)),
            ("pruned_heads", json!({"0": [1]})),
            ("is_causal", json!(false)),
        ] {
            let message = check(&section(&json!({key: value})), TEXT).unwrap_err().to_string();
            assert!(message.contains(&format!("text_config.{key}")), "{message}");
        }
    }

    /// Fields of transformers' classes, read off `dataclasses.fields` and the signatures of `__init__` of 5.24 and 4.45, and
    /// the table that has to know them.
    const FIELDS: &[(&[(&str, KeyRule)], &str)] = &[
        (
            TEXT,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads \
             hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings \
             rope_parameters rope_theta rope_scaling use_sliding_window sliding_window max_window_layers \
             layer_types attention_dropout pad_token_id bos_token_id eos_token_id",
        ),
        (
            TEXT,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads \
             hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id \
             bos_token_id eos_token_id pretraining_tp tie_word_embeddings rope_theta rope_scaling rope_parameters \
             attention_bias attention_dropout mlp_bias head_dim",
        ),
        (
            VISION,
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size \
             patch_size hidden_act layer_norm_eps attention_dropout vision_use_head projection_dim \
             initializer_range initializer_factor",
        ),
        (
            LLAVA_ONEVISION,
            "vision_config text_config image_token_index video_token_index projector_hidden_act \
             vision_feature_select_strategy vision_feature_layer multimodal_projector_bias tie_word_embeddings \
             image_grid_pinpoints vision_aspect_ratio",
        ),
        (
            LLAVA,
            "vision_config text_config image_token_index image_seq_length projector_hidden_act \
             vision_feature_select_strategy vision_feature_layer multimodal_projector_bias tie_word_embeddings \
             image_grid_pinpoints use_image_newline_parameter ignore_index vocab_size",
        ),
        (
            QWEN_VL,
            "text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id \
             tie_word_embeddings",
        ),
        (
            QWEN_VISION,
            "depth embed_dim hidden_size hidden_act mlp_ratio num_heads in_channels patch_size spatial_merge_size \
             temporal_patch_size initializer_range rope_parameters intermediate_size tokens_per_second \
             window_size out_hidden_size fullatt_block_indexes num_position_embeddings deepstack_visual_indexes",
        ),
        (IDEFICS3, "use_cache image_token_id tie_word_embeddings vision_config text_config scale_factor pad_token_id"),
        (
            GEMMA3,
            "text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index \
             initializer_range tie_word_embeddings",
        ),
        (
            GEMMA3_TEXT,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads \
             head_dim hidden_activation max_position_embeddings initializer_range rms_norm_eps use_cache \
             pad_token_id eos_token_id bos_token_id tie_word_embeddings rope_parameters attention_bias \
             attention_dropout query_pre_attn_scalar sliding_window layer_types final_logit_softcapping \
             attn_logit_softcapping use_bidirectional_attention sliding_window_pattern rope_theta \
             rope_local_base_freq rope_scaling",
        ),
        (
            INTERNVL,
            "vision_config text_config image_token_id image_seq_length downsample_ratio projector_hidden_act \
             vision_feature_layer vision_feature_select_strategy tie_word_embeddings",
        ),
        (
            INTERN_VIT,
            "hidden_size num_hidden_layers num_attention_heads attention_bias use_qk_norm intermediate_size \
             hidden_act hidden_dropout_prob attention_dropout projection_dropout initializer_range norm_type \
             layer_norm_eps image_size patch_size num_channels use_mask_token use_absolute_position_embeddings \
             layer_scale_init_value use_mean_pooling",
        ),
    ];

    /// Every field of the configuration classes is in the tables, so that a new one is looked at.
    #[test]
    fn fields_of_transformers_classes_are_known() {
        for (table, fields) in FIELDS {
            for field in fields.split_whitespace() {
                assert!(table.iter().any(|(key, _)| *key == field), "{field}");
            }
        }
    }

    /// The configurations that people have pass, where they are of an architecture that is supported.
    #[test]
    fn published_configurations_pass() {
        let Some(shared) = std::env::var_os("MBQ_SHARED") else {
            return eprintln!("skipped: MBQ_SHARED is not set");
        };
        let mut read = 0;
        for folder in std::fs::read_dir(std::path::Path::new(&shared).join("published")).unwrap() {
            let folder = folder.unwrap().path();
            for name in ["config.json", "config.quoted.json"] {
                let Ok(bytes) = std::fs::read(folder.join(name)) else { continue };
                let config: Value = serde_json::from_slice(&bytes).unwrap();
                for key in ["text_config", "llm_config", "vision_config"] {
                    let Some(json) = config.get(key) else { continue };
                    let table = match json.get("model_type").and_then(Value::as_str) {
                        Some("qwen2" | "llama" | "qwen3_vl_text") => TEXT,
                        Some("siglip_vision_model" | "clip_vision_model") => VISION,
                        _ => continue,
                    };
                    read += 1;
                    check(&section(json), table).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
                    if table == TEXT {
                        check_windows(&section(json), 24, 28).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
                    }
                }
                // lmms-lab's fine-tunes have the text model's keys on the outside.
                if config.get("use_sliding_window").is_some() {
                    read += 1;
                    check(&section(&config), TEXT).unwrap();
                    check_windows(&section(&config), 28, 28).unwrap();
                }
            }
        }
        assert!(read >= 10, "{read}");
    }
}
