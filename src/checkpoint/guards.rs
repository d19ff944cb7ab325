//! What a folder may hold in place of a plain model: adapters, weights that are quantised already, and the tensor names
//! that training wrappers leave behind. Each is refused by name, with what to do.
use super::{CheckpointError, Dtype};
use serde_json::Value;
use std::path::Path;

/// What a wrapper puts before a module's name, what it is, and how to save without it.
const WRAPPERS: [(&str, &str, &str); 5] = [
    ("base_model.model.", "a PEFT wrapper", "merge the adapter (peft's merge_and_unload) and save what it returns"),
    ("_orig_mod.", "torch.compile", "save the module that was compiled: compiled._orig_mod.save_pretrained(…)"),
    ("_fsdp_wrapped_module.", "FullyShardedDataParallel", "save its full state dict under the model's own names"),
    ("_checkpoint_wrapped_module.", "activation checkpointing", "save the model's own state dict"),
    ("module.", "DataParallel or DistributedDataParallel", "save the model inside: wrapped.module.save_pretrained(…)"),
];

/// Parts of tensor names that peft's methods add: LoRA, DoRA, LoHa, LoKr, OFT, IA3, VeRA, and copies of whole modules.
const ADAPTER_PARTS: [&str; 4] = ["base_layer", "modules_to_save", "original_module", "prompt_encoder"];
const ADAPTER_STARTS: [&str; 6] = ["lora_", "hada_", "lokr_", "oft_", "ia3_", "vera_"];

/// Last parts of the names of packed weights, their scales and zero points: AWQ and GPTQ, bitsandbytes, FP8,
/// compressed-tensors.
const QUANTISED_ENDS: [(&str, &str); 15] = [
    ("qweight", "AWQ or GPTQ"),
    ("qzeros", "AWQ or GPTQ"),
    ("g_idx", "GPTQ"),
    ("scales", "AWQ or GPTQ"),
    ("absmax", "bitsandbytes, 4 bits"),
    ("nested_absmax", "bitsandbytes, 4 bits"),
    ("quant_map", "bitsandbytes, 4 bits"),
    ("SCB", "bitsandbytes, 8 bits"),
    ("weight_format", "bitsandbytes, 8 bits"),
    ("weight_scale", "FP8 or compressed-tensors"),
    ("weight_scale_inv", "FP8"),
    ("input_scale", "FP8"),
    ("weight_packed", "compressed-tensors"),
    ("weight_zero_point", "compressed-tensors"),
    ("weight_shape", "compressed-tensors"),
];

/// Refuses a folder that transformers takes for an adapter: it would load the base model that `adapter_config.json`
/// names, whatever else the folder holds.
pub(super) fn adapter(dir: &Path) -> Result<(), CheckpointError> {
    let path = dir.join("adapter_config.json");
    if !path.exists() {
        return Ok(());
    }
    let config = super::read_json(&path)?;
    let text = |key: &str| config.get(key).and_then(Value::as_str).filter(|s| !s.is_empty());
    let base = text("base_model_name_or_path").unwrap_or("a model that it does not name").to_string();
    let kind = text("peft_type").unwrap_or("PEFT").to_string();
    let weights = ["model.safetensors", "pytorch_model.bin"].iter().any(|file| dir.join(file).exists());
    if weights && dir.join("config.json").exists() {
        return Err(CheckpointError::AdapterBeside { path, kind, base });
    }
    Err(CheckpointError::Adapter { path, kind, base })
}

/// Refuses tensors of an adapter, of a wrapper, or quantised ones. `tensors` are stored names and types.
pub(super) fn tensors<'a>(
    dir: &Path,
    config: &Value,
    tensors: impl Iterator<Item = (&'a str, Dtype)> + Clone,
) -> Result<(), CheckpointError> {
    let mut of_adapter = tensors.clone().map(|(name, _)| name).filter(|name| is_adapter(name));
    if let Some(tensor) = of_adapter.next() {
        let more = of_adapter.count();
        return Err(CheckpointError::Unmerged { path: dir.into(), tensor: tensor.into(), more });
    }
    // Names say more than types, so that all are asked first.
    let by_name = tensors.clone().find_map(|(name, _)| Some((name, packed(name)?)));
    let from_tensors = by_name.or_else(|| tensors.clone().find_map(|(name, dtype)| Some((name, coded(name, dtype)?))));
    if let Some((tensor, how)) = from_tensors {
        let how = quantisation_config(config).unwrap_or_else(|| how.into());
        return Err(CheckpointError::Quantised { path: dir.into(), tensor: tensor.into(), how });
    }
    not_quantised(dir, config)?;
    for (name, _) in tensors {
        // Inside a name, too: wrappers are also put around single blocks.
        let found = WRAPPERS
            .iter()
            .find(|(p, ..)| name.starts_with(p) || (p.starts_with('_') && name.contains(&format!(".{p}"))));
        if let Some(&(prefix, wrapper, advice)) = found {
            return Err(CheckpointError::Wrapped { path: dir.into(), tensor: name.into(), prefix, wrapper, advice });
        }
    }
    Ok(())
}

/// Refuses a configuration that says that the weights are quantised.
pub(super) fn not_quantised(dir: &Path, config: &Value) -> Result<(), CheckpointError> {
    let path = dir.join("config.json");
    quantisation_config(config).map_or(Ok(()), |how| Err(CheckpointError::SaidQuantised { path, how }))
}

fn is_adapter(name: &str) -> bool {
    name.split('.').any(|part| ADAPTER_PARTS.contains(&part) || ADAPTER_STARTS.iter().any(|s| part.starts_with(s)))
}

/// Whose packed weights, scales or zero points have such a name.
fn packed(name: &str) -> Option<&'static str> {
    if name.contains(".quant_state.") {
        return Some("bitsandbytes, 4 bits");
    }
    QUANTISED_ENDS.iter().find(|(end, _)| Some(*end) == name.rsplit('.').next()).map(|(_, how)| *how)
}

/// What a weight of this type is.
fn coded(name: &str, dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 => Some("FP8"),
        // Buffers such as `position_ids` are whole numbers, too, and no weights.
        Dtype::U8 | Dtype::I8 if name.ends_with(".weight") => Some("packed or 8-bit whole numbers"),
        _ => None,
    }
}

/// What `quantization_config` says, in words.
fn quantisation_config(config: &Value) -> Option<String> {
    let sections = [Some(config), config.get("text_config"), config.get("vision_config")];
    let mut all =
        sections.into_iter().flatten().flat_map(|s| [s.get("quantization_config"), s.get("compression_config")]);
    let q = all.find_map(|q| q?.as_object().filter(|q| !q.is_empty()))?;
    let flag = |key: &str| [key, &format!("_{key}")].iter().any(|k| q.get(*k).and_then(Value::as_bool) == Some(true));
    let method = q.get("quant_method").and_then(Value::as_str);
    let bits = q.get("bits").and_then(Value::as_u64);
    let bits = bits.or(flag("load_in_4bit").then_some(4)).or(flag("load_in_8bit").then_some(8));
    let method = match method {
        Some("awq") => "AWQ",
        Some("gptq") => "GPTQ",
        Some("fp8") => return Some("FP8".into()),
        Some("fbgemm_fp8") => return Some("FP8 (fbgemm)".into()),
        None if bits.is_some() => "bitsandbytes",
        other => other.unwrap_or("quantization_config without a quant_method"),
    };
    Some(bits.map_or(method.into(), |bits| format!("{method}, {bits} bits")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_of_plain_models_are_no_adapters_and_not_quantised() {
        for name in [
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
            "vision_tower.vision_model.embeddings.position_ids",
            "vision_tower.vision_model.head.probe",
            "multi_modal_projector.linear_1.bias",
            "image_newline",
        ] {
            assert!(!is_adapter(name) && packed(name).is_none() && coded(name, Dtype::I64).is_none(), "{name}");
        }
    }

    #[test]
    fn what_a_quantization_config_says() {
        for (config, says) in [
            (json!({"quantization_config": {"quant_method": "awq", "bits": 4}}), Some("AWQ, 4 bits")),
            (
                json!({"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 3}}}),
                Some("GPTQ, 3 bits"),
            ),
            (json!({"quantization_config": {"load_in_8bit": true}}), Some("bitsandbytes, 8 bits")),
            (
                json!({"quantization_config": {"quant_method": "bitsandbytes", "_load_in_4bit": true}}),
                Some("bitsandbytes, 4 bits"),
            ),
            (json!({"compression_config": {"quant_method": "compressed-tensors"}}), Some("compressed-tensors")),
            (json!({"quantization_config": {}}), None),
            (json!({"quantization_config": null}), None),
        ] {
            assert_eq!(quantisation_config(&config).as_deref(), says, "{config}");
        }
    }
}
