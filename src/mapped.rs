//! Model files in memory: every map of the program is made here, and a file that can no longer be read is told.
#![allow(unsafe_code)]
use crate::files::open_plain;
use memmap2::Mmap;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

/// A file's bytes, mapped for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    map: Mmap,
    #[cfg(target_os = "linux")]
    listed: bus::Listed,
}

impl MappedFile {
    /// Maps the whole file at `path`.
    ///
    /// # Errors
    /// It is no file, or cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open_plain(path)?;
        // SAFETY: the map is only read. A file that another process changes meanwhile yields other bytes, and the
        // conversion looks for that before it publishes; one that is cut off raises a bus error ([`tell_bus_errors`]).
        let map = unsafe { Mmap::map(&file) }.map_err(|e| match e.kind() {
            io::ErrorKind::OutOfMemory => io::Error::new(
                e.kind(),
                "the address space may not grow by the file's size; allow more (ulimit -v), or limit memory otherwise",
            ),
            _ => e,
        })?;
        Ok(MappedFile {
            #[cfg(target_os = "linux")]
            listed: bus::list(path, &map),
            map,
        })
    }

    /// Tells the system that these bytes will not be read again soon, so that their pages stop counting as this
    /// process's memory. Reading them again is allowed.
    pub fn release(&self, bytes: Range<usize>) {
        #[cfg(unix)]
        // SAFETY: a shared, read-only map of a file: pages dropped here come back from the file when touched. A
        // failure only leaves them resident.
        let _ =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        #[cfg(not(unix))]
        let _ = bytes;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(target_os = "linux")]
impl Drop for MappedFile {
    fn drop(&mut self) {
        self.listed.remove();
    }
}

/// From now on the program ends with a message where a mapped file can no longer be read, because it was cut off or its
/// disk fails. Without this the system ends it with a bus error, which says nothing. For programs, not libraries: it is
/// the whole process's handler.
pub fn tell_bus_errors() {
    #[cfg(target_os = "linux")]
    bus::handle();
}

#[cfg(target_os = "linux")]
mod bus {
    use std::ffi::{CString, c_int, c_void};
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;
    use std::ptr;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

    /// A map, for the handler to find its file's name. Never freed, because the handler may be reading it: some hundred
    /// bytes for every file that is opened once there is a handler.
    #[derive(Debug)]
    struct Entry {
        start: usize,
        /// 0 once the map is gone.
        len: AtomicUsize,
        path: CString,
        next: *const Entry,
    }

    /// The last entry.
    static LIST: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

    static HANDLED: AtomicBool = AtomicBool::new(false);

    #[derive(Debug)]
    pub struct Listed(Option<&'static AtomicUsize>);

    impl Listed {
        pub fn remove(&self) {
            if let Some(len) = self.0 {
                len.store(0, Ordering::Release);
            }
        }
    }

    pub fn list(path: &Path, map: &[u8]) -> Listed {
        if !HANDLED.load(Ordering::Relaxed) {
            return Listed(None);
        }
        let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
        let (start, len) = (map.as_ptr() as usize, AtomicUsize::new(map.len()));
        let mut next = LIST.load(Ordering::Acquire);
        let entry = Box::leak(Box::new(Entry { start, len, path, next }));
        while let Err(other) = LIST.compare_exchange(next, entry, Ordering::AcqRel, Ordering::Acquire) {
            next = other;
            entry.next = next;
        }
        Listed(Some(&entry.len))
    }

    pub fn handle() {
        HANDLED.store(true, Ordering::Relaxed);
        // SAFETY: a handler of the form that SA_SIGINFO asks for, which calls nothing but what a handler may call; the
        // structure is plain data, and zeros are an empty mask.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = tell as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
        }
    }

    /// Only loads, `write` and `_exit` here: a handler may not allocate or lock.
    extern "C" fn tell(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the system passes a valid structure; the address is that of the access for this signal.
        let address = unsafe { (*info).si_addr() } as usize;
        let mut entry: *const Entry = LIST.load(Ordering::Acquire);
        let mut name: &[u8] = b"a file that is mapped into memory";
        // SAFETY: entries are never freed and their links never change once they are listed.
        while let Some(e) = unsafe { entry.as_ref() } {
            if address.wrapping_sub(e.start) < e.len.load(Ordering::Acquire).next_multiple_of(1 << 16) {
                name = e.path.to_bytes();
                break;
            }
            entry = e.next;
        }
        let problem: &[u8] = b": cannot be read any more: it was cut off while it was open, or its disk fails; mend it and begin again\n";
        for part in [b"error: ".as_slice(), name, problem] {
            // SAFETY: the bytes live as long as the program; where nobody reads, nothing can be done.
            unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
        }
        // SAFETY: it does not return.
        unsafe { libc::_exit(1) }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::process::Command;

    /// A file that is cut off while it is mapped ends the program (this test, started again) with its name.
    #[test]
    fn a_file_that_is_cut_off_is_told() {
        if let Some(path) = std::env::var_os("MBQ_CUT_OFF") {
            tell_bus_errors();
            let other = MappedFile::open(&std::env::current_exe().unwrap()).unwrap();
            let map = MappedFile::open(Path::new(&path)).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
            println!("{} {}", map[map.len() - 1], other[0]);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "mapped::tests::a_file_that_is_cut_off_is_told", "--nocapture"]);
        let done = command.env("MBQ_CUT_OFF", &path).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        let begin = format!("error: {}: cannot be read any more", path.display());
        assert!(done.status.code() == Some(1) && said.contains(&begin), "{:?}: {said}", done.status);
    }
}
