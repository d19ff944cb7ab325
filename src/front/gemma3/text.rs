//! `text_config` of Gemma 3, most of which published files leave out: transformers' `Gemma3TextConfig` has the values.
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys;
use crate::front::decoder::{DecoderArch, DecoderConfig, Windows, check_groups, check_head_dim};

/// Of so many blocks the last sees all tokens; llama.cpp has it built in.
const PATTERN: usize = 6;
/// llama.cpp knows Gemma 3 27B, whose scores are scaled otherwise, by its blocks.
const LAYERS_27B: usize = 62;

/// Reads `text_config`. `tied` is the outer configuration's `tie_word_embeddings`.
///
/// # Errors
/// A key that is wrong, or a value that llama.cpp does not compute with.
pub(super) fn read(s: &Section, tied: Option<bool>) -> Result<DecoderConfig, ConfigError> {
    if s.str_opt("model_type")?.is_some_and(|found| found != "gemma3_text") {
        return Err(s.invalid("model_type", "gemma3_text"));
    }
    config_keys::check(s, config_keys::GEMMA3_TEXT)?;
    let size = |key: &str, default: usize| Ok::<_, ConfigError>(s.size_opt(key)?.unwrap_or(default));
    let num_layers = size("num_hidden_layers", 26)?;
    check_pattern(s, num_layers)?;
    let (hidden_size, num_heads, head_dim) =
        (size("hidden_size", 2304)?, size("num_attention_heads", 8)?, size("head_dim", 256)?);
    let num_kv_heads = size("num_key_value_heads", 4)?;
    check_groups(s, num_heads, num_kv_heads)?;
    check_head_dim(s, head_dim)?;
    let scaled_by = if num_layers == LAYERS_27B { hidden_size / num_heads } else { head_dim };
    if s.float_opt("query_pre_attn_scalar")?.unwrap_or(256.0) != scaled_by as f64 {
        let want = "head_dim (of 62 blocks: hidden_size / num_attention_heads), by which llama.cpp scales";
        return Err(s.invalid("query_pre_attn_scalar", want));
    }
    if s.json.get("sliding_window").is_some_and(serde_json::Value::is_null) {
        return Err(s.invalid("sliding_window", "a number of tokens"));
    }
    let (rope_theta, rope_factor) = full_rope(s)?;
    Ok(DecoderConfig {
        arch: DecoderArch::Gemma3,
        hidden_size,
        intermediate_size: size("intermediate_size", 9216)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: size("vocab_size", 262_208)?,
        max_position_embeddings: size("max_position_embeddings", 131_072)?,
        rms_norm_eps: s.float_opt("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_factor,
        windows: Some(Windows { tokens: size("sliding_window", 4096)?, rope_theta: local_rope(s)? }),
        rope_sections: None,
        deepstack_layers: 0,
        tie_word_embeddings: tied.or(s.bool_opt("tie_word_embeddings")?).unwrap_or(true),
        qkv_bias: false,
    })
}

/// Refuses blocks whose kinds differ from llama.cpp's: all but every sixth have a window.
fn check_pattern(s: &Section, layers: usize) -> Result<(), ConfigError> {
    const WANT: &str = "a window in all blocks but every sixth, as llama.cpp has it";
    for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
        if s.size_opt(key)?.is_some_and(|n| n != PATTERN) {
            return Err(s.invalid(key, WANT));
        }
    }
    let Some(types) = s.get("layer_types") else { return Ok(()) };
    let kind = |i: usize| if (i + 1).is_multiple_of(PATTERN) { "full_attention" } else { "sliding_attention" };
    let found: Option<Vec<&str>> = types.as_array().and_then(|l| l.iter().map(|v| v.as_str()).collect());
    if found.is_none_or(|found| !(0..layers).map(kind).eq(found)) {
        return Err(s.invalid("layer_types", WANT));
    }
    Ok(())
}

/// A part of transformers 5's `rope_parameters`.
fn parameters<'a>(s: &Section<'a>, kind: &str) -> Result<Option<Section<'a>>, ConfigError> {
    const KEY: &str = "rope_parameters";
    let Some(_) = s.get(KEY) else { return Ok(None) };
    let all = s.section(KEY)?;
    if let Some((key, _)) = all.json.as_object().and_then(|o| o.iter().find(|(_, v)| !v.is_object() && !v.is_null())) {
        return Err(all.invalid(key, "absent: one set for full_attention and one for sliding_attention"));
    }
    all.get(kind).map(|_| all.section(kind)).transpose()
}

/// Base and linear factor of the positions in blocks that see everything.
fn full_rope(s: &Section) -> Result<(f64, f64), ConfigError> {
    let old = s.get("rope_scaling").map(|_| s.section("rope_scaling")).transpose()?;
    let new = parameters(s, "full_attention")?;
    let mut factor = 1.0;
    for rope in [&old, &new].into_iter().flatten() {
        let kind = match rope.str_opt("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.str_opt("type")?,
        };
        factor = match kind {
            None | Some("default") => 1.0,
            Some("linear") => rope.float_opt("factor")?.ok_or_else(|| rope.missing("factor"))?,
            Some(_) => return Err(rope.invalid("rope_type", "linear or default")),
        };
        if factor < 1.0 {
            return Err(rope.invalid("factor", "at least 1"));
        }
    }
    let theta = new.map(|rope| rope.float_opt("rope_theta")).transpose()?.flatten();
    Ok((theta.or(s.float_opt("rope_theta")?).unwrap_or(1e6), factor))
}

/// Base of the positions in blocks with a window.
fn local_rope(s: &Section) -> Result<f64, ConfigError> {
    let new = parameters(s, "sliding_attention")?;
    if let Some(rope) = &new
        && !matches!(rope.str_opt("rope_type")?, None | Some("default"))
    {
        return Err(rope.invalid("rope_type", "default: llama.cpp scales no positions within windows"));
    }
    let theta = new.map(|rope| rope.float_opt("rope_theta")).transpose()?.flatten();
    Ok(theta.or(s.float_opt("rope_local_base_freq")?).unwrap_or(10_000.0))
}
