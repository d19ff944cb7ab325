//! Which of llama.cpp's pre-tokenizers a `tokenizer.json` asks for.
//!
//! llama.cpp names a fixed set and its own converter finds the name by hashing the ids of a test string, which fails
//! for every vocabulary that is not in its table: fine-tunes with added tokens, trimmed vocabularies. Here the rules
//! of `tokenizer.json` decide: they are run over a probe text beside the rules of each known name, and the name whose
//! rules cut the text into the same pieces is taken. So the spelling of a regex does not matter, only what it does.
use serde_json::{Value, json};
use std::sync::OnceLock;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// A pre-tokenizer of llama.cpp: its name, the rules it stands for, and whether it takes whole words from the
/// vocabulary before it merges (`ignore_merges` in `tokenizer.json`).
struct Known {
    name: &'static str,
    ignore_merges: bool,
    rules: fn() -> Value,
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Words and their leading mark as `word`, digits in groups as `digits`, the rest as in all GPT-4-like rules.
fn gpt4_like(word: &str, digits: &str, other: &str) -> Value {
    let regex = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}+|{digits}| ?{other}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
}

const KNOWN: [Known; 5] = [
    Known { name: "qwen2", ignore_merges: false, rules: || gpt4_like(r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]") },
    Known { name: "llama-bpe", ignore_merges: true, rules: || gpt4_like(r"\p{L}", r"\p{N}{1,3}", r"[^\s\p{L}\p{N}]") },
    Known {
        name: "qwen35",
        ignore_merges: false,
        rules: || gpt4_like(r"[\p{L}\p{M}]", r"\p{N}", r"[^\s\p{L}\p{M}\p{N}]"),
    },
    Known { name: "gpt-2", ignore_merges: false, rules: || byte_level(true) },
    Known {
        name: "smollm",
        ignore_merges: false,
        rules: || {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]})
        },
    },
];

/// Text in which the known rules, and likely variants of them, cut differently: contractions in both cases, digit
/// runs, scripts, combining marks, runs of spaces and line ends, marks before words and before line ends.
const PROBE: &str = "It's WE'RE they'Ve i'M x'Ll d'D'q 1 12 123 1234 12345678 ¼ Ⅷ ٣٤٥ 3.14 v2beta7 \t\ttab\r\n\r\n  two \n \
    \n\n   three   end   \u{a0}nbsp\u{3000}wide _snake_case (paren) #tag $9.99 /path/to.rs ```\nfn main() {}\n``` ... \
    !?!\n---\n  \n naïve Ünïcode cafe\u{301} n\u{303}o हिन्दी ภาษาไทย 中文字符 日本語テキスト 한국어 русский عربى עברית \
    👍🏽👩\u{200d}👩 ✅❤\u{fe0f} a\u{200b}b\u{feff}c don’t “quoted” a+b=c <|x|> end \n";

/// A piece of text and its byte range.
type PatternPiece = (String, (usize, usize));

/// The cuts of `rules` in [`PROBE`], with the text that each piece becomes.
fn pieces(rules: &PreTokenizerWrapper) -> Result<Vec<PatternPiece>, String> {
    let mut text = PreTokenizedString::from(PROBE);
    rules.pre_tokenize(&mut text).map_err(|e| e.to_string())?;
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(piece, at, _)| (piece.to_string(), at)).collect())
}

/// llama.cpp's name for `pre_tokenizer` (that field of `tokenizer.json`), given its model's `ignore_merges`.
///
/// # Errors
/// Rules that cannot be read, or that no known name stands for; the text is for the user.
pub fn detect(pre_tokenizer: &Value, ignore_merges: bool) -> Result<&'static str, String> {
    let read = |rules: &Value| serde_json::from_value::<PreTokenizerWrapper>(rules.clone()).map_err(|e| e.to_string());
    let cuts = pieces(&read(pre_tokenizer)?)?;
    // Of the known rules, once: their expressions take longer to compile than all else here.
    static CUTS: OnceLock<[Result<Vec<PatternPiece>, String>; KNOWN.len()]> = OnceLock::new();
    let all = CUTS.get_or_init(|| KNOWN.map(|known| pieces(&read(&(known.rules)())?)));
    for (known, of_known) in KNOWN.iter().zip(all) {
        if *of_known.as_ref().map_err(String::clone)? == cuts {
            return match known.ignore_merges == ignore_merges {
                true => Ok(known.name),
                false => Err(format!("rules of `{}`, but with ignore_merges = {ignore_merges}", known.name)),
            };
        }
    }
    let names = KNOWN.map(|k| k.name).join(", ");
    Err(format!("these rules cut text as none of llama.cpp's pre-tokenizers that are known here does ({names})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_rule_is_told_from_the_others() {
        for known in KNOWN {
            assert_eq!(detect(&(known.rules)(), known.ignore_merges), Ok(known.name));
            assert!(detect(&(known.rules)(), !known.ignore_merges).unwrap_err().contains("ignore_merges"));
        }
    }

    #[test]
    fn the_spelling_does_not_matter() {
        let regex = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let rules = json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]});
        assert_eq!(detect(&rules, false), Ok("qwen2"));
    }

    #[test]
    fn other_rules_are_refused() {
        let prefix = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        assert!(detect(&prefix, false).unwrap_err().contains("none of"));
        assert!(detect(&json!({"type": "Whitespace"}), false).is_err());
        assert!(detect(&json!({"type": "NoSuchThing"}), false).is_err());
        let two_digits = gpt4_like(r"\p{L}", r"\p{N}{1,2}", r"[^\s\p{L}\p{N}]");
        assert!(detect(&two_digits, false).is_err());
    }
}
