//! Whether a checkpoint is still the one it was.
use super::Checkpoint;
use crate::digest::{self, WHOLE, hex};
use sha2::{Digest, Sha256};

impl Checkpoint {
    /// A digest of `config.json` and the weights: of all bytes where they are few (256 MiB), else of each file's size, time
    /// of last change, first 64 KiB and 64 pieces of 4 KiB. 64 hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        let all: usize = self.shards.iter().map(|s| s.map.len()).sum();
        self.digest(all <= WHOLE)
    }

    fn digest(&self, whole: bool) -> String {
        let hash = Sha256::new().chain_update(self.config.to_string());
        let files: Vec<_> = self.shards.iter().map(|s| (s.path.as_path(), &s.map[..])).collect();
        hex(&digest::files(hash, &files, whole).finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// `n` weights, all 1 but the last.
    fn write(path: &Path, n: usize, last: f32) {
        let header = format!("{{\"t\":{{\"dtype\":\"F32\",\"shape\":[{n}],\"data_offsets\":[0,{}]}}}}", 4 * n);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        (0..n).for_each(|i| bytes.extend(if i + 1 == n { last } else { 1.0f32 }.to_le_bytes()));
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn another_weight_config_or_time() {
        let dir = tempfile::tempdir().unwrap();
        let (weights, config) = (dir.path().join("model.safetensors"), dir.path().join("config.json"));
        let digests = || [true, false].map(|whole| Checkpoint::open(dir.path()).unwrap().digest(whole));
        std::fs::write(&config, "{}").unwrap();
        write(&weights, 1 << 18, 1.0);
        let time = std::fs::metadata(&weights).unwrap().modified().unwrap();
        let set = |time| std::fs::File::options().write(true).open(&weights).unwrap().set_modified(time).unwrap();
        let [whole, sampled] = digests();
        write(&weights, 1 << 18, 2.0);
        set(time);
        let [other_whole, other_sampled] = digests();
        assert!(whole != other_whole && sampled != other_sampled, "the last weight");
        write(&weights, 1 << 18, 1.0);
        set(time);
        assert_eq!(digests(), [whole.clone(), sampled.clone()]);
        set(time + std::time::Duration::from_nanos(1_000_000_000));
        let [late_whole, late_sampled] = digests();
        assert!(whole == late_whole && sampled != late_sampled, "the time");
        set(time);
        std::fs::write(&config, "{\"a\": 1}").unwrap();
        let [other_whole, other_sampled] = digests();
        assert!(whole != other_whole && sampled != other_sampled, "the configuration");
    }
}
