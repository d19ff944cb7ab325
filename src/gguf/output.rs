//! Files that appear whole or not at all: written without a name (or under a temporary one) in the directory of
//! their destination, named when all of them are complete.
use super::GgufError;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file on its way to `path`.
///
/// On Linux it has no name until [`Output::publish`] (`O_TMPFILE`), so that nothing is left of it even when the
/// process is killed. Where the file system cannot do that, it has a temporary name that is removed on every error.
pub struct Output {
    path: PathBuf,
    writer: BufWriter<Inner>,
}

enum Inner {
    #[cfg(target_os = "linux")]
    Unnamed(File),
    Named(tempfile::NamedTempFile),
}

impl Write for Inner {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.file().write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file().flush()
    }
}

impl Inner {
    fn file(&mut self) -> &mut File {
        match self {
            #[cfg(target_os = "linux")]
            Inner::Unnamed(file) => file,
            Inner::Named(file) => file.as_file_mut(),
        }
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Output {
    /// Begins a file that will be `path`.
    ///
    /// # Errors
    /// The directory does not exist or cannot be written, or `path` is a directory.
    pub fn create(path: &Path) -> Result<Self, GgufError> {
        if path.is_dir() {
            return Err(GgufError::Output { path: path.into(), problem: "is a directory; name a file" });
        }
        let inner = open(path).map_err(|source| GgufError::Write { path: path.into(), source })?;
        Ok(Output { path: path.into(), writer: BufWriter::with_capacity(1 << 20, inner) })
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        self.writer.write_all(bytes).map_err(|source| GgufError::Write { path: self.path.clone(), source })
    }

    /// Gives all `outputs` their names, once every one of them is on disk.
    ///
    /// # Errors
    /// The disk is full, or a name cannot be given; then those already given in this call are taken back.
    pub fn publish(outputs: Vec<Output>) -> Result<(), GgufError> {
        let mut complete = Vec::new();
        for output in outputs {
            let path = output.path;
            let fail = |source| GgufError::Write { path: path.clone(), source };
            let mut inner = output.writer.into_inner().map_err(|e| fail(e.into_error()))?;
            inner.file().sync_all().map_err(fail)?;
            complete.push((inner, path));
        }
        // A name beside the destination first: what can fail, fails before any destination changes.
        let mut named = Vec::new();
        for (inner, path) in complete {
            let temp = name(inner, &path).map_err(|source| GgufError::Write { path: path.clone(), source })?;
            named.push((temp, path));
        }
        let mut done: Vec<PathBuf> = Vec::new();
        for (temp, path) in named {
            if let Err(e) = temp.persist(&path) {
                done.iter().for_each(|p| drop(std::fs::remove_file(p)));
                return Err(GgufError::Write { path, source: e.error });
            }
            done.push(path);
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
fn open(path: &Path) -> std::io::Result<Inner> {
    use rustix::fs::{Mode, OFlags};
    let mode = Mode::from_raw_mode(0o666);
    match rustix::fs::open(directory(path), OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        // Linking needs /proc; without it the file could not be named in the end.
        Ok(fd) if Path::new("/proc/self/fd").exists() => Ok(Inner::Unnamed(fd.into())),
        _ => named(path),
    }
}

#[cfg(not(target_os = "linux"))]
fn open(path: &Path) -> std::io::Result<Inner> {
    named(path)
}

fn named(path: &Path) -> std::io::Result<Inner> {
    Ok(Inner::Named(builder().tempfile_in(directory(path))?))
}

fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".mbq-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The umask narrows it, as for any new file.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
}

/// A temporary name in the destination's directory.
fn name(inner: Inner, path: &Path) -> std::io::Result<tempfile::TempPath> {
    match inner {
        Inner::Named(file) => Ok(file.into_temp_path()),
        #[cfg(target_os = "linux")]
        Inner::Unnamed(file) => {
            use rustix::fs::{AtFlags, CWD};
            use std::os::fd::AsRawFd;
            let fd = format!("/proc/self/fd/{}", file.as_raw_fd());
            let link = |temp: &Path| Ok(rustix::fs::linkat(CWD, &fd, CWD, temp, AtFlags::SYMLINK_FOLLOW)?);
            Ok(builder().make_in(directory(path), link)?.into_temp_path())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_a_name_before_all_have() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&b, "old").unwrap();
        let mut first = Output::create(&a).unwrap();
        first.write(b"one").unwrap();
        let mut second = Output::create(&b).unwrap();
        second.write(b"two").unwrap();
        assert!(!a.exists());
        assert_eq!(std::fs::read(&b).unwrap(), b"old");
        Output::publish(vec![first, second]).unwrap();
        assert_eq!((std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap()), (b"one".to_vec(), b"two".to_vec()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary name is left");
    }

    #[test]
    fn dropped_files_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create(&dir.path().join("a")).unwrap();
        output.write(b"one").unwrap();
        drop(output);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = Output::create(&dir.path().join("no/such")).err().unwrap().to_string();
        assert!(missing.contains("no/such"), "{missing}");
    }
}
