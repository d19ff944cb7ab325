//! A writer whose owner writes on after a failure.
use std::io::{Result, Seek, SeekFrom, Write};

/// Hands out the first failure of `out`, and then takes everything without writing it: a `ZipWriter` that is dropped finishes
/// its file, and would tell on standard error that the disk is still full.
pub struct UntilFailure<W> {
    out: W,
    position: u64,
    failed: bool,
}

impl<W> UntilFailure<W> {
    pub fn new(out: W) -> Self {
        UntilFailure { out, position: 0, failed: false }
    }

    fn noted<T>(&mut self, done: Result<T>) -> Result<T> {
        self.failed |= done.as_ref().is_err_and(|error| error.kind() != std::io::ErrorKind::Interrupted);
        done
    }
}

impl<W: Write> Write for UntilFailure<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let done = if self.failed { Ok(bytes.len()) } else { self.out.write(bytes) };
        let n = self.noted(done)?;
        self.position += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> Result<()> {
        let done = if self.failed { Ok(()) } else { self.out.flush() };
        self.noted(done)
    }
}

impl<W: Seek> Seek for UntilFailure<W> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let done = match to {
            _ if !self.failed => self.out.seek(to),
            SeekFrom::Start(position) => Ok(position),
            SeekFrom::Current(by) | SeekFrom::End(by) => Ok(self.position.saturating_add_signed(by)),
        };
        self.position = self.noted(done)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::io::Cursor;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    /// A disk with so much room, and how often it was asked for more.
    struct Full<'a>(Cursor<Vec<u8>>, usize, &'a Cell<usize>);

    impl Write for Full<'_> {
        fn write(&mut self, bytes: &[u8]) -> Result<usize> {
            if self.0.position() as usize + bytes.len() > self.1 {
                self.2.set(self.2.get() + 1);
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    impl Seek for Full<'_> {
        fn seek(&mut self, to: SeekFrom) -> Result<u64> {
            self.0.seek(to)
        }
    }

    /// Writes a zip file of two texts and hands out the first failure; what comes after it must not fail any more.
    fn write(room: usize, failures: &Cell<usize>) -> zip::result::ZipResult<u64> {
        let mut zip = ZipWriter::new(UntilFailure::new(Full(Cursor::new(Vec::new()), room, failures)));
        let text = |zip: &mut ZipWriter<_>| {
            zip.start_file("stored", SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored))?;
            zip.write_all(&[7; 300])?;
            zip.start_file("deflated", SimpleFileOptions::default())?;
            zip.write_all(b"two two two two")?;
            zip.flush().map_err(zip::result::ZipError::from)
        };
        let done = text(&mut zip);
        let finished = zip.finish();
        done.and_then(|()| finished.map(|mut out| out.seek(SeekFrom::End(0))).and_then(|end| Ok(end?)))
    }

    #[test]
    fn a_disk_fails_once_wherever_it_is_full() {
        let failures = Cell::new(0);
        let whole = write(usize::MAX, &failures).unwrap() as usize;
        assert!(whole > 400 && failures.get() == 0);
        for room in 0..whole {
            failures.set(0);
            let _ = write(room, &failures);
            assert_eq!(failures.get(), 1, "{room} of {whole}");
        }
    }
}
