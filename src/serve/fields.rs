//! A JSON object that is taken apart field by field, so that what is left over can be named.
use super::error::ApiError;
use serde_json::{Map, Value};

/// The fields of an object that have not been read yet. One that is null counts as not there.
pub struct Fields {
    map: Map<String, Value>,
    /// Where the object stands: empty, or `messages[0].`.
    at: String,
}

impl Fields {
    /// # Errors
    /// Not an object.
    pub fn of(value: Value, at: &str) -> Result<Self, ApiError> {
        let Value::Object(mut map) = value else {
            let what = if at.is_empty() { "the body" } else { at };
            return Err(ApiError::invalid(at, format!("{what} must be an object")));
        };
        map.retain(|_, value| !value.is_null());
        Ok(Fields { map, at: if at.is_empty() { String::new() } else { format!("{at}.") } })
    }

    /// The full name of a field.
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.at)
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key)
    }

    fn wrong(&self, key: &str, want: &str) -> ApiError {
        let name = self.name(key);
        ApiError::invalid(name.clone(), format!("`{name}` must be {want}"))
    }

    /// # Errors
    /// It is missing.
    pub fn need(&mut self, key: &str) -> Result<Value, ApiError> {
        self.take(key).ok_or_else(|| {
            let name = self.name(key);
            let message = format!("`{name}` is missing");
            ApiError { code: Some("missing_required_parameter"), ..ApiError::invalid(name, message) }
        })
    }

    /// # Errors
    /// It is there and no string.
    pub fn string(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// # Errors
    /// It is there and no boolean.
    pub fn boolean(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// # Errors
    /// It is there and no number from `least` to `most`.
    pub fn number(&mut self, key: &str, least: f64, most: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let number = value.as_f64().filter(|n| (least..=most).contains(n));
        number.map(|n| Some(n as f32)).ok_or_else(|| self.wrong(key, &format!("a number from {least} to {most}")))
    }

    /// # Errors
    /// It is there and no whole number from `least` to `most`.
    pub fn integer(&mut self, key: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let number = value.as_i64().filter(|n| (least..=most).contains(n));
        number.map(Some).ok_or_else(|| {
            let want = match (least, most) {
                (i64::MIN, i64::MAX) => "a whole number".to_string(),
                (_, i64::MAX) => format!("a whole number of at least {least}"),
                _ => format!("a whole number from {least} to {most}"),
            };
            self.wrong(key, &want)
        })
    }

    /// Fields that are left, but for those that `harmless` knows to change nothing.
    ///
    /// # Errors
    /// There is one: of `known`, which OpenAI has and this server does not support, or of no meaning at all.
    pub fn end(self, known: &[&str], harmless: impl Fn(&str, &Value) -> bool) -> Result<(), ApiError> {
        let Some((key, _)) = self.map.iter().find(|(key, value)| !harmless(key, value)) else { return Ok(()) };
        // A name of megabytes need not come back.
        let name: String = self.name(key).chars().take(200).collect();
        Err(match known.contains(&key.as_str()) {
            true => ApiError::unsupported(name.clone(), format!("`{name}` is not supported by this server")),
            false => {
                let message = format!("`{name}` is not a field that this server knows");
                ApiError { code: Some("unknown_parameter"), ..ApiError::invalid(name, message) }
            }
        })
    }
}
