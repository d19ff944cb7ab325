//! LLaVA-OneVision: the names of its tensors, its keys, and what the runtime cannot do.
use super::{Pair, Renamed, Source, TensorSpec};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::ggml::GgmlType;
use crate::gguf::{Card, General, Metadata, Name, Vocabulary, text_metadata, vision_metadata};
use crate::model::llava_onevision::LlavaOnevision;
use crate::model::{ConfigError, TextArch, TextConfig, VisionArch, VisionConfig};

/// A row of the table: GGUF's tensor, the checkpoint's canonical name.
type Row = (TensorSpec, String);

/// Both files of a checkpoint. `name` is the hub's or the directory's; `repository` is `org/name` on the hub.
///
/// # Errors
/// A configuration, vocabulary or tensor that is missing, wrong or beyond the runtime.
pub fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    let model = LlavaOnevision::read(checkpoint)?;
    check_runtime_limits(checkpoint, &model)?;
    let text_rows = text_rows(&model.text);
    let projector_bias = checkpoint.contains("multi_modal_projector.linear_1.bias");
    let vision_rows = vision_rows(&model.vision, model.text.hidden_size, projector_bias);
    let vocabulary = Vocabulary::read(checkpoint, model.text.vocab_size)?;
    let parameters = text_rows.iter().map(|(t, _)| t.elements()).sum();
    let general = General {
        name: Name::parse(name, parameters),
        card: Card::read(checkpoint.dir()),
        repository: repository.map(String::from),
    };
    let mut keys = Metadata::default();
    text_metadata(&mut keys, &general, &model.text);
    vocabulary.write(&mut keys);
    let mut vision_keys = Metadata::default();
    vision_metadata(&mut vision_keys, &general, &model);
    Ok(Pair {
        text: source(checkpoint, keys, text_rows)?,
        mmproj: Some(source(checkpoint, vision_keys, vision_rows)?),
        name: general.name,
        notes: vocabulary.notes,
    })
}

fn source(checkpoint: &Checkpoint, metadata: Metadata, rows: Vec<Row>) -> Result<Source<'_>, Error> {
    let names = rows.iter().map(|(t, from)| (t.name.clone(), from.clone(), t.shape.clone()));
    let values = Box::new(Renamed::new(checkpoint, names)?);
    Ok(Source { metadata, tensors: rows.into_iter().map(|(t, _)| t).collect(), values })
}

/// What transformers can do and llama.cpp's qwen2 cannot.
fn check_runtime_limits(checkpoint: &Checkpoint, m: &LlavaOnevision) -> Result<(), ConfigError> {
    let file = checkpoint.dir().join("config.json");
    if m.text.arch != TextArch::Qwen2 {
        return Err(ConfigError::Unsupported {
            file,
            found: "text_config: llama".into(),
            supported: "qwen2 text models in LLaVA-OneVision",
        });
    }
    if m.text.num_heads * m.text.head_dim != m.text.hidden_size {
        return Err(ConfigError::Invalid {
            file,
            key: "text_config.head_dim".into(),
            found: m.text.head_dim.to_string(),
            want: "hidden_size / num_attention_heads, as llama.cpp's qwen2 has it",
        });
    }
    Ok(())
}

fn vector(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Row {
    (TensorSpec::new(name, shape, GgmlType::F32), from.into())
}

fn matrix(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Row {
    (TensorSpec::new(name, shape, GgmlType::F16), from.into())
}

/// The language model's tensors, in file order: embedding, output, blocks.
fn text_rows(c: &TextConfig) -> Vec<Row> {
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let vocab = [c.vocab_size, hidden];
    let mut rows = vec![
        matrix("token_embd.weight", "language_model.model.embed_tokens.weight", &vocab),
        vector("output_norm.weight", "language_model.model.norm.weight", &[hidden]),
    ];
    if !c.tie_word_embeddings {
        rows.push(matrix("output.weight", "language_model.lm_head.weight", &vocab));
    }
    for layer in 0..c.num_layers {
        let to = |part: &str| format!("blk.{layer}.{part}");
        let from = |part: &str| format!("language_model.model.layers.{layer}.{part}");
        for (name, stored) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
            rows.push(vector(to(&format!("{name}.weight")), from(&format!("{stored}.weight")), &[hidden]));
        }
        let linears = [
            ("attn_q", "self_attn.q_proj", [q, hidden], c.qkv_bias),
            ("attn_k", "self_attn.k_proj", [kv, hidden], c.qkv_bias),
            ("attn_v", "self_attn.v_proj", [kv, hidden], c.qkv_bias),
            ("attn_output", "self_attn.o_proj", [hidden, q], false),
            ("ffn_gate", "mlp.gate_proj", [inner, hidden], false),
            ("ffn_up", "mlp.up_proj", [inner, hidden], false),
            ("ffn_down", "mlp.down_proj", [hidden, inner], false),
        ];
        for (name, stored, shape, bias) in linears {
            rows.push(matrix(to(&format!("{name}.weight")), from(&format!("{stored}.weight")), &shape));
            if bias {
                rows.push(vector(to(&format!("{name}.bias")), from(&format!("{stored}.bias")), &shape[..1]));
            }
        }
    }
    rows
}

/// The tensors of tower, projector and `image_newline`, of the blocks that run only. `width` is the language model's.
fn vision_rows(c: &VisionConfig, width: usize, projector_bias: bool) -> Vec<Row> {
    let (hidden, patch) = (c.hidden_size, c.patch_size);
    let clip = c.arch == VisionArch::Clip;
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
    let positions = c.grid() * c.grid() + usize::from(clip);
    let patches = [hidden, 3, patch, patch];
    let mut rows = vec![
        matrix("v.patch_embd.weight", tower("embeddings.patch_embedding.weight"), &patches),
        vector("v.position_embd.weight", tower("embeddings.position_embedding.weight"), &[positions, hidden]),
    ];
    if clip {
        rows.push(vector("v.class_embd", tower("embeddings.class_embedding"), &[hidden]));
        rows.push(vector("v.pre_ln.weight", tower("pre_layrnorm.weight"), &[hidden]));
        rows.push(vector("v.pre_ln.bias", tower("pre_layrnorm.bias"), &[hidden]));
    } else {
        rows.push(vector("v.patch_embd.bias", tower("embeddings.patch_embedding.bias"), &[hidden]));
    }
    for layer in 0..c.used_layers {
        let (to, from) = (format!("v.blk.{layer}"), tower(&format!("encoder.layers.{layer}")));
        for (name, stored) in [("ln1", "layer_norm1"), ("ln2", "layer_norm2")] {
            for kind in ["weight", "bias"] {
                rows.push(vector(format!("{to}.{name}.{kind}"), format!("{from}.{stored}.{kind}"), &[hidden]));
            }
        }
        let inner = c.intermediate_size;
        let linears = [
            ("attn_q", "self_attn.q_proj", [hidden, hidden]),
            ("attn_k", "self_attn.k_proj", [hidden, hidden]),
            ("attn_v", "self_attn.v_proj", [hidden, hidden]),
            ("attn_out", "self_attn.out_proj", [hidden, hidden]),
            ("ffn_up", "mlp.fc1", [inner, hidden]),
            ("ffn_down", "mlp.fc2", [hidden, inner]),
        ];
        for (name, stored, shape) in linears {
            rows.push(matrix(format!("{to}.{name}.weight"), format!("{from}.{stored}.weight"), &shape));
            rows.push(vector(format!("{to}.{name}.bias"), format!("{from}.{stored}.bias"), &shape[..1]));
        }
    }
    for (name, stored, cols) in [("mm.0", "linear_1", hidden), ("mm.2", "linear_2", width)] {
        let from = format!("multi_modal_projector.{stored}");
        rows.push(matrix(format!("{name}.weight"), format!("{from}.weight"), &[width, cols]));
        if projector_bias {
            rows.push(vector(format!("{name}.bias"), format!("{from}.bias"), &[width]));
        }
    }
    rows.push(vector("v.image_newline", "image_newline", &[width]));
    rows
}
