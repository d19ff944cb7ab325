//! How much memory this process may still take: what nobody uses, or less where a cgroup or a ulimit says so.
use std::fs::read_to_string;
use std::path::Path;

/// A limit behind which the system ends the process or its allocations fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    /// Bytes that may still be taken.
    pub left: usize,
    /// Who sets it, for messages.
    pub by: &'static str,
}

/// What limits a process's address space: mapped files and what threads only reserve count in it.
pub(crate) const ADDRESS_SPACE: &str = "ulimit -v";

/// All limits that there are.
pub(crate) fn limits() -> impl Iterator<Item = MemoryLimit> {
    let read = |path| read_to_string(path).unwrap_or_default();
    let cgroup = cgroup_left(Path::new("/sys/fs/cgroup"), &read("/proc/self/cgroup"));
    let cgroup = cgroup.map(|left| MemoryLimit { left, by: "the cgroup" });
    let (limits, status) = (read("/proc/self/limits"), read("/proc/self/status"));
    let ulimit = |name, used, by| Some(MemoryLimit { left: ulimit_left(&limits, &status, name, used)?, by });
    let space = ulimit("Max address space", "VmSize:", ADDRESS_SPACE);
    let data = ulimit("Max data size", "VmData:", "ulimit -d");
    [cgroup, space, data].into_iter().flatten()
}

/// Bytes that are free for this process; none where the system does not say.
pub(crate) fn free() -> Option<usize> {
    let unused = kib(&read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:");
    unused.into_iter().chain(limits().map(|limit| limit.left)).min()
}

/// The number behind `key` in lines such as `VmSize:   1234 kB`, in bytes.
fn kib(text: &str, key: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Of the soft limit in the line `name` of /proc/self/limits; `used` names what counts in /proc/self/status.
fn ulimit_left(limits: &str, status: &str, name: &str, used: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let limit: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(kib(status, used)?))
}

/// Of the process's cgroup and those around it, mounted at `mounted`; `own` is /proc/self/cgroup. What the kernel would
/// drop of files that were read does not count as used.
fn cgroup_left(mounted: &Path, own: &str) -> Option<usize> {
    let mut least = None;
    for line in own.lines() {
        let Some((names, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':')) else { continue };
        let (top, [max, used, cache]) = match names {
            "" => (mounted.into(), ["memory.max", "memory.current", "inactive_file "]),
            names if names.split(',').any(|name| name == "memory") => {
                let files = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];
                (mounted.join("memory"), files)
            }
            _ => continue,
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors().map(|group| top.join(group)) {
            let number = |file| read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
            let (Some(max), Some(used)) = (number(max), number(used)) else { continue };
            let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
            let cache = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok()).unwrap_or(0);
            // No limit is a number near the largest in version 1.
            if max < 1 << 60 {
                let left = max.saturating_sub(used.saturating_sub(cache)) as usize;
                least = Some(least.map_or(left, |least: usize| least.min(left)));
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_cgroup_counts() {
        let dir = tempfile::tempdir().unwrap();
        let group = |path: &str, files: [(&str, &str); 3]| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            files.iter().for_each(|(name, text)| std::fs::write(path.join(name), text).unwrap());
        };
        let stat = ("memory.stat", "anon 5\ninactive_file 30\n");
        group("a/b", [("memory.max", "max\n"), ("memory.current", "70\n"), stat]);
        group("a", [("memory.max", "100\n"), ("memory.current", "90\n"), stat]);
        assert_eq!(cgroup_left(dir.path(), "0::/a/b\n"), Some(100 - (90 - 30)));
        assert_eq!(cgroup_left(dir.path(), "0::/elsewhere\n"), None);
        let stat = ("memory.stat", "inactive_file 1\ntotal_inactive_file 10\n");
        let none = ("memory.limit_in_bytes", "9223372036854771712\n");
        group("memory", [none, ("memory.usage_in_bytes", "50\n"), stat]);
        assert_eq!(cgroup_left(dir.path(), "3:cpuset:/\n4:memory:/x\n0::/\n"), None);
        // A container sees its own group at the top, whatever the path says.
        group("memory", [("memory.limit_in_bytes", "60\n"), ("memory.usage_in_bytes", "50\n"), stat]);
        assert_eq!(cgroup_left(dir.path(), "4:memory:/x\n"), Some(60 - (50 - 10)));
    }

    #[test]
    fn ulimits() {
        let limits = "Limit   Soft Limit  Hard Limit  Units\nMax address space   1048576   unlimited   bytes\n";
        let status = "VmPeak:\t 900 kB\nVmSize:\t     600 kB\n";
        assert_eq!(ulimit_left(limits, status, "Max address space", "VmSize:"), Some((1024 - 600) * 1024));
        let none = limits.replace("1048576", "unlimited");
        assert_eq!(ulimit_left(&none, status, "Max address space", "VmSize:"), None);
        assert!(free().is_none_or(|bytes| bytes > 0));
    }
}
