//! JSON configurations: keys by their path, for messages.
use serde_json::Value;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{file}: key `{key}` is missing")]
    Missing { file: PathBuf, key: String },
    #[error("{file}: key `{key}` is {found}; expected {want}")]
    Invalid { file: PathBuf, key: String, found: String, want: &'static str },
    #[error("{file}: model_type `{found}` is not supported; supported: {supported}")]
    Unsupported { file: PathBuf, found: String, supported: String },
}

/// A JSON object and where it stands, for messages.
pub(crate) struct Section<'a> {
    pub file: PathBuf,
    pub path: String,
    pub json: &'a Value,
}

impl<'a> Section<'a> {
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { file: self.file.clone(), key: self.key(key) }
    }

    pub fn invalid(&self, key: &str, want: &'static str) -> ConfigError {
        let found = self.json.get(key).map_or("absent".into(), |v| {
            let text = v.to_string();
            if text.len() > 80 { format!("{}…", text.chars().take(80).collect::<String>()) } else { text }
        });
        ConfigError::Invalid { file: self.file.clone(), key: self.key(key), found, want }
    }

    pub fn section(&self, key: &str) -> Result<Section<'a>, ConfigError> {
        let json = self.get(key).ok_or_else(|| self.missing(key))?;
        if !json.is_object() {
            return Err(self.invalid(key, "an object"));
        }
        Ok(Section { file: self.file.clone(), path: self.key(key), json })
    }

    fn typed<T>(
        &self,
        key: &str,
        want: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.invalid(key, want))).transpose()
    }

    /// A count that may be absent.
    pub fn size_opt(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(key, "a positive integer", |v| v.as_u64().filter(|&n| n > 0 && n < 1 << 32).map(|n| n as usize))
    }

    pub fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.size_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// An epsilon, a base, a factor: none of them is zero or less, and f32 holds them.
    pub fn float_opt(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let fits = |x: &f64| *x as f32 > 0.0 && (*x as f32).is_finite();
        self.typed(key, "a positive number", |v| v.as_f64().filter(fits))
    }

    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn str_opt(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn str(&self, key: &str) -> Result<&'a str, ConfigError> {
        self.str_opt(key)?.ok_or_else(|| self.missing(key))
    }
}
