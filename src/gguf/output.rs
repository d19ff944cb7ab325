//! Files that appear whole or not at all: written without a name (or under a temporary one) in the directory of
//! their destination, named when all of them are complete.
use super::GgufError;
use crate::interrupted::{self, Leftover};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// A file on its way to `path`.
///
/// On Linux it has no name until [`Output::publish`] (`O_TMPFILE`), so that nothing is left of it even when the
/// process is killed. Where the file system cannot do that, it has a temporary name that is removed on every error.
pub struct Output {
    path: PathBuf,
    writer: BufWriter<Inner>,
    /// Its temporary name, if it has one.
    temporary: Option<Leftover>,
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

impl Seek for Inner {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file().seek(to)
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

/// The folder that a file or folder at `path` will lie in.
///
/// # Errors
/// There is none.
pub fn folder_of(path: &Path) -> Result<&Path, GgufError> {
    let folder = directory(path);
    match folder.is_dir() {
        true => Ok(folder),
        false => Err(GgufError::NoFolder { path: path.into(), folder: folder.into() }),
    }
}

impl Output {
    /// Begins a file that will be `path`.
    ///
    /// # Errors
    /// The directory does not exist or cannot be written, `path` is a directory, or a name that cannot be.
    pub fn create(path: &Path) -> Result<Self, GgufError> {
        if path.is_dir() {
            return Err(GgufError::Output { path: path.into(), problem: "is a directory; name a file" });
        }
        folder_of(path)?;
        // A name that the file system does not take would else be known only when the file is whole.
        if let Err(source) = path.symlink_metadata()
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(GgufError::Write { path: path.into(), source });
        }
        let inner = open(path).map_err(|source| GgufError::Write { path: path.into(), source })?;
        let temporary = match &inner {
            #[cfg(target_os = "linux")]
            Inner::Unnamed(_) => None,
            Inner::Named(file) => Some(Leftover::new(file.path())),
        };
        Ok(Output { path: path.into(), writer: BufWriter::with_capacity(1 << 20, inner), temporary })
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

    /// The file, for a writer that goes back in it.
    pub fn stream(&mut self) -> &mut (impl Write + Seek + use<>) {
        &mut self.writer
    }

    /// Gives the file other permissions than a new one's.
    ///
    /// # Errors
    /// The file system refuses them.
    pub fn permit(&mut self, permissions: std::fs::Permissions) -> Result<(), GgufError> {
        let fail = |source| GgufError::Write { path: self.path.clone(), source };
        self.writer.get_mut().file().set_permissions(permissions).map_err(fail)
    }

    /// Makes the file so long; what was not written reads as zeros and takes no place on disk, where the file system can.
    ///
    /// # Errors
    /// The disk fails.
    pub fn extend_to(&mut self, bytes: u64) -> Result<(), GgufError> {
        let fail = |source| GgufError::Write { path: self.path.clone(), source };
        self.writer.flush().and_then(|()| self.writer.get_mut().file().set_len(bytes)).map_err(fail)
    }

    /// A path under which the file can be read while it has no name. It holds as long as the output.
    ///
    /// # Errors
    /// What was written last does not reach the disk.
    pub fn readable(&mut self) -> Result<PathBuf, GgufError> {
        self.writer.flush().map_err(|source| GgufError::Write { path: self.path.clone(), source })?;
        Ok(match self.writer.get_ref() {
            #[cfg(target_os = "linux")]
            Inner::Unnamed(file) => format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)).into(),
            Inner::Named(file) => file.path().into(),
        })
    }

    /// Gives all `outputs` their names, once every one of them is on disk. Files that had these names are kept aside
    /// until all names are given. One publication at a time changes a directory.
    ///
    /// # Errors
    /// The disk is full, or a name cannot be given; then every destination holds again what it held before.
    pub fn publish(outputs: Vec<Output>) -> Result<(), GgufError> {
        publish_with(outputs, &|new, path| new.persist(path).map_err(|e| e.error))
    }

    /// Gives one output its name without waiting for the disk: for what can be made again.
    ///
    /// # Errors
    /// The disk is full, or the name cannot be given.
    pub fn appear(self) -> Result<(), GgufError> {
        let fail = |source| GgufError::Write { path: self.path.clone(), source };
        let inner = self.writer.into_inner().map_err(|e| fail(e.into_error()))?;
        let _name = interrupted::uninterrupted();
        name(inner, &self.path).and_then(|new| new.persist(&self.path).map_err(|e| e.error)).map_err(fail)
    }
}

/// Gives a complete file its name.
type Rename<'a> = &'a dyn Fn(TempPath, &Path) -> std::io::Result<()>;

fn publish_with(outputs: Vec<Output>, rename: Rename) -> Result<(), GgufError> {
    let fail = |path: &Path, source| GgufError::Write { path: path.into(), source };
    let (mut complete, mut temporary) = (Vec::new(), Vec::new());
    for output in outputs {
        let path = output.path;
        temporary.extend(output.temporary);
        let mut inner = output.writer.into_inner().map_err(|e| fail(&path, e.into_error()))?;
        inner.file().sync_all().map_err(|e| fail(&path, e))?;
        complete.push((inner, path));
    }
    let _names = interrupted::uninterrupted();
    // Two conversions to the same names must not end as one's model beside the other's mmproj. A file system without
    // such locks goes without.
    let _lock = complete.first().and_then(|(_, path)| {
        let directory = File::open(directory(path)).ok()?;
        directory.lock().ok()?;
        Some(directory)
    });
    // A name beside the destination first, then a second one for the old file: what can fail, fails before any
    // destination changes.
    let mut named = Vec::new();
    for (inner, path) in complete {
        let new = name(inner, &path).map_err(|e| fail(&path, e))?;
        named.push((new, path));
    }
    let mut done = Replaced::default();
    for (_, path) in &named {
        done.keep(path).map_err(|e| fail(path, e))?;
    }
    for (new, path) in named {
        rename(new, &path).map_err(|e| fail(&path, e))?;
    }
    done.commit();
    Ok(())
}

/// Destinations, each with its old file under another name; dropped before [`Replaced::commit`], the old files go back.
#[derive(Default)]
struct Replaced(Vec<(PathBuf, Option<TempPath>)>);

impl Replaced {
    /// Keeps the file at `path` aside, if there is one. It stays at `path` too where it can have two names.
    fn keep(&mut self, path: &Path) -> std::io::Result<()> {
        let aside = match path.symlink_metadata() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
            Ok(old) if old.is_dir() => return Err(std::io::ErrorKind::IsADirectory.into()),
            Ok(_) => {
                let second = |aside: &Path| match std::fs::hard_link(path, aside) {
                    Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => std::fs::rename(path, aside),
                    other => other,
                };
                Some(builder().make_in(directory(path), second)?.into_temp_path())
            }
        };
        self.0.push((path.into(), aside));
        Ok(())
    }

    /// The old files are not needed any more.
    fn commit(mut self) {
        self.0.clear();
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        for (path, aside) in self.0.drain(..) {
            let Some(old) = aside else {
                let _ = std::fs::remove_file(path);
                continue;
            };
            let name = old.to_path_buf();
            match old.persist(path) {
                // Of two names of one file, which it has where nothing was replaced, a rename leaves both.
                Ok(()) => drop(std::fs::remove_file(name)),
                // Better under an odd name than lost.
                Err(e) => drop(e.path.keep()),
            }
        }
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
fn name(inner: Inner, path: &Path) -> std::io::Result<TempPath> {
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

    /// Three outputs for `a`, `b`, `c` in `dir`, of which `a` and `b` exist.
    fn three(dir: &Path) -> Vec<Output> {
        std::fs::write(dir.join("a"), "old a").unwrap();
        std::fs::write(dir.join("b"), "old b").unwrap();
        let begin = |name: &str| {
            let mut output = Output::create(&dir.join(name)).unwrap();
            output.write(b"new").unwrap();
            output
        };
        ["a", "b", "c"].map(begin).into()
    }

    fn held(dir: &Path) -> Vec<(String, Vec<u8>)> {
        let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        let read =
            |p: PathBuf| (p.file_name().unwrap().to_string_lossy().into(), std::fs::read(&p).unwrap_or_default());
        let mut held: Vec<_> = files.map(read).collect();
        held.sort();
        held
    }

    /// The third name is a directory's by now: known before anything changes.
    #[test]
    fn a_destination_that_cannot_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let outputs = three(dir.path());
        std::fs::create_dir(dir.path().join("c")).unwrap();
        std::fs::write(dir.path().join("c/inside"), "").unwrap();
        let before = held(dir.path());
        let error = Output::publish(outputs).unwrap_err().to_string();
        assert!(error.contains("/c: cannot write") && error.contains("directory"), "{error}");
        assert_eq!(held(dir.path()), before);
        assert!(dir.path().join("c/inside").exists());
    }

    /// The disk fails at any of the renames: all old files are back, no new one and no temporary name is left.
    #[test]
    fn a_failure_in_the_middle_gives_the_old_files_back() {
        for last in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let outputs = three(dir.path());
            let before = held(dir.path());
            let count = std::cell::Cell::new(0);
            let rename = |new: TempPath, path: &Path| {
                let other = File::open(dir.path()).unwrap();
                assert!(other.try_lock().is_err(), "another conversion could publish here now");
                if count.replace(count.get() + 1) == last {
                    return Err(std::io::ErrorKind::StorageFull.into());
                }
                new.persist(path).map_err(|e| e.error)
            };
            publish_with(outputs, &rename).unwrap_err();
            assert_eq!(held(dir.path()), before, "failing at {last}");
        }
    }

    #[test]
    fn dropped_files_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create(&dir.path().join("a")).unwrap();
        output.write(b"one").unwrap();
        drop(output);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = Output::create(&dir.path().join("no/such")).err().unwrap().to_string();
        assert!(missing.contains(&format!("no folder {}", dir.path().join("no").display())), "{missing}");
        assert!(missing.contains("no/such") && Output::create(Path::new("no-such-folder/a")).is_err(), "{missing}");
    }
}
