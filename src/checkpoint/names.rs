/// Prefixes of transformers 5, of nested saves and of text models, and what the published llava-hf files (and Qwen's for
/// `visual`) call the same tensor.
const PREFIXES: [(&str, &str); 17] = [
    ("model.language_model.", "language_model.model."),
    // Idefics3 and SmolVLM.
    ("model.text_model.", "language_model.model."),
    ("model.vision_model.", "vision_tower.vision_model."),
    ("model.connector.", "connector."),
    // Qwen2-VL and Qwen2.5-VL are published with a plain text model's names.
    ("model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("model.visual.", "visual."),
    // LLaVA's own layout.
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    // InternLM2, in InternVL's original layout.
    ("language_model.model.tok_embeddings.", "language_model.model.embed_tokens."),
    ("language_model.output.", "language_model.lm_head."),
];

/// The canonical name of a stored tensor: that of the published llava-hf repositories (transformers 4).
pub fn canonical(stored: &str) -> String {
    let name = PREFIXES
        .iter()
        .find_map(|(from, to)| stored.strip_prefix(from).map(|rest| format!("{to}{rest}")))
        .unwrap_or_else(|| stored.to_string());
    match name.strip_prefix("vision_tower.") {
        Some(rest) if !rest.starts_with("vision_model.") => format!("vision_tower.vision_model.{rest}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn both_schemes_meet() {
        for (stored, name) in [
            ("language_model.model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
            ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
            ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
            ("model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
            ("model.text_model.norm.weight", "language_model.model.norm.weight"),
            ("model.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
            ("model.connector.modality_projection.proj.weight", "connector.modality_projection.proj.weight"),
            ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
            ("model.norm.weight", "language_model.model.norm.weight"),
            ("visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
            ("model.visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
            ("lm_head.weight", "language_model.lm_head.weight"),
            ("language_model.lm_head.weight", "language_model.lm_head.weight"),
            ("language_model.model.tok_embeddings.weight", "language_model.model.embed_tokens.weight"),
            ("language_model.output.weight", "language_model.lm_head.weight"),
            ("model.image_newline", "image_newline"),
            ("image_newline", "image_newline"),
            (
                "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
            ),
            ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
            (
                "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
                "vision_tower.vision_model.post_layernorm.bias",
            ),
            ("model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
            ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
            ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ] {
            assert_eq!(canonical(stored), name);
        }
    }
}
