//! Activations that wait between two passes: a tensor per chunk of the batch, on the device while there is room, else
//! in host memory, else in a file. Where they wait changes nothing about their values.
use crate::text::ops::select_rows;
use candle_core::{Device, Result, Tensor, bail};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The memory that streams share.
#[derive(Debug, Clone)]
pub struct Room {
    device: Device,
    state: Arc<Mutex<RoomState>>,
}

#[derive(Debug)]
struct RoomState {
    /// Bytes that streams may take, and those that they do.
    host: [usize; 2],
    accelerator: [usize; 2],
    dir: PathBuf,
    /// Opened when first needed; it has no name, so that nothing is left behind.
    file: Option<File>,
    /// Bytes of the file, and the parts of it that are free: where and how long.
    end: u64,
    free: Vec<(u64, usize)>,
}

/// Where a chunk's tensor is.
#[derive(Debug)]
enum Slot {
    Empty,
    Device(Tensor),
    Host(Tensor),
    File { at: u64, shape: Vec<usize> },
}

impl Room {
    /// Room for tensors of `device`: `host` bytes in memory, none on the device yet, the rest in a file in `dir`.
    pub fn new(device: &Device, host: usize, dir: &Path) -> Self {
        let state =
            RoomState { host: [host, 0], accelerator: [0, 0], dir: dir.into(), file: None, end: 0, free: Vec::new() };
        Room { device: device.clone(), state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, RoomState> {
        // A panic elsewhere leaves numbers that are still consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what streams may take from now on; those that are there move with [`Stream::settle`].
    pub fn limit(&self, host: usize, accelerator: usize) {
        let mut state = self.state();
        state.host[0] = host;
        state.accelerator[0] = if self.device.is_cpu() { 0 } else { accelerator };
    }

    /// Bytes of memory that are still free for streams.
    pub fn left(&self) -> usize {
        let state = self.state();
        let of = |[limit, used]: [usize; 2]| limit.saturating_sub(used);
        of(state.host) + of(state.accelerator)
    }

    /// Bytes of those that are free where the work is done: on the device, if it has memory of its own.
    pub fn near(&self) -> usize {
        let state = self.state();
        let [limit, used] = if self.device.is_cpu() { state.host } else { state.accelerator };
        limit.saturating_sub(used)
    }

    /// Bytes that went to the file so far.
    pub fn spilled(&self) -> u64 {
        self.state().end
    }

    /// An empty stream.
    pub fn stream(&self) -> Stream {
        Stream { room: self.clone(), slots: Vec::new() }
    }

    fn put(&self, t: Tensor) -> Result<Slot> {
        let bytes = t.elem_count() * t.dtype().size_in_bytes();
        let mut state = self.state();
        let fits = |[limit, used]: [usize; 2]| used + bytes <= limit;
        if fits(state.accelerator) {
            state.accelerator[1] += bytes;
            return Ok(Slot::Device(t.to_device(&self.device)?));
        }
        if fits(state.host) {
            state.host[1] += bytes;
            return Ok(Slot::Host(t.to_device(&Device::Cpu)?));
        }
        let shape = t.dims().to_vec();
        let values: Vec<f32> = t.flatten_all()?.to_vec1()?;
        let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let at = state.write(&values)?;
        Ok(Slot::File { at, shape })
    }

    fn release(&self, slot: &mut Slot) {
        let mut state = self.state();
        match std::mem::replace(slot, Slot::Empty) {
            Slot::Empty => (),
            Slot::Device(t) => state.accelerator[1] -= t.elem_count() * t.dtype().size_in_bytes(),
            Slot::Host(t) => state.host[1] -= t.elem_count() * t.dtype().size_in_bytes(),
            Slot::File { at, shape } => state.free.push((at, 4 * shape.iter().product::<usize>())),
        }
    }

    fn read(&self, at: u64, shape: &[usize]) -> Result<Tensor> {
        let mut bytes = vec![0; 4 * shape.iter().product::<usize>()];
        self.state().read(at, &mut bytes)?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

impl RoomState {
    fn write(&mut self, bytes: &[u8]) -> Result<u64> {
        // Chunks keep their shape from pass to pass: a free part of the same length is nearly always there.
        let free = self.free.iter().position(|&(_, len)| len == bytes.len());
        let at = match free {
            Some(i) => self.free.swap_remove(i).0,
            None => self.end,
        };
        let wrote = (|| {
            let file = match &mut self.file {
                Some(file) => file,
                none => {
                    std::fs::create_dir_all(&self.dir)?;
                    none.insert(tempfile::tempfile_in(&self.dir)?)
                }
            };
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        })();
        match wrote {
            Ok(()) => self.end = self.end.max(at + bytes.len() as u64),
            Err(e) => bail!(
                "activations do not fit the memory they may take and cannot be written to {}: {e}; \
                 allow more (--memory) or name another --work-dir",
                self.dir.display()
            ),
        }
        Ok(at)
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let Some(file) = &mut self.file else { bail!("activations were never written") };
        match file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(bytes)) {
            Ok(()) => Ok(()),
            Err(e) => bail!("activations cannot be read back from {}: {e}", self.dir.display()),
        }
    }
}

/// A tensor per chunk.
#[derive(Debug)]
pub struct Stream {
    room: Room,
    slots: Vec<Slot>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let room = self.room.clone();
        self.slots.iter_mut().for_each(|slot| room.release(slot));
    }
}

impl Stream {
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn room(&self) -> &Room {
        &self.room
    }

    /// Appends the next chunk's tensor, f32.
    ///
    /// # Errors
    /// It cannot be moved, or the file cannot be written.
    pub fn push(&mut self, t: Tensor) -> Result<()> {
        let slot = self.room.put(t)?;
        self.slots.push(slot);
        Ok(())
    }

    /// Replaces chunk `i`'s tensor.
    ///
    /// # Errors
    /// As [`Stream::push`].
    pub fn set(&mut self, i: usize, t: Tensor) -> Result<()> {
        self.room.release(&mut self.slots[i]);
        self.slots[i] = self.room.put(t)?;
        Ok(())
    }

    fn stored(&self, i: usize) -> Result<Tensor> {
        match &self.slots[i] {
            Slot::Empty => bail!("chunk {i} was taken already"),
            Slot::Device(t) | Slot::Host(t) => Ok(t.clone()),
            Slot::File { at, shape } => self.room.read(*at, shape),
        }
    }

    /// Chunk `i`'s tensor, on the device.
    ///
    /// # Errors
    /// It cannot be moved, or the file cannot be read.
    pub fn get(&self, i: usize) -> Result<Tensor> {
        self.stored(i)?.to_device(&self.room.device)
    }

    /// Rows `rows` of chunk `i`, on the device: no more than they are moved there.
    ///
    /// # Errors
    /// As [`Stream::get`].
    pub fn rows(&self, i: usize, rows: &[u32]) -> Result<Tensor> {
        select_rows(&self.stored(i)?, rows)?.to_device(&self.room.device)
    }

    /// Chunk `i`'s tensor, which is gone from the stream then.
    ///
    /// # Errors
    /// As [`Stream::get`].
    pub fn take(&mut self, i: usize) -> Result<Tensor> {
        let t = self.get(i)?;
        self.room.release(&mut self.slots[i]);
        Ok(t)
    }

    /// Moves every tensor to where the limits as they are now have it.
    ///
    /// # Errors
    /// As [`Stream::push`].
    pub fn settle(&mut self) -> Result<()> {
        for i in 0..self.len() {
            if !matches!(self.slots[i], Slot::Empty) {
                let t = self.stored(i)?;
                self.set(i, t)?;
            }
        }
        Ok(())
    }

    /// The same tensors once more.
    ///
    /// # Errors
    /// As [`Stream::push`].
    pub fn copy(&self) -> Result<Stream> {
        let mut copy = self.room.stream();
        for i in 0..self.len() {
            copy.push(self.get(i)?)?;
        }
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Two of three tensors fit: the third goes to the file, comes back with its bits, and its place is used again.
    #[test]
    fn what_does_not_fit_is_spilled_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = |seed: u32| {
            let data: Vec<f32> = (0..24).map(|i| f32::from_bits(0x3f00_0000 + seed * 1000 + i * 77)).collect();
            Tensor::from_vec(data, (6, 4), &Device::Cpu).unwrap()
        };
        let room = Room::new(&Device::Cpu, 2 * 96, dir.path());
        let mut stream = room.stream();
        (0..3).for_each(|i| stream.push(tensor(i)).unwrap());
        assert_eq!((room.spilled(), room.left()), (96, 0));
        (0..3).for_each(|i| assert_eq!(values(&stream.get(i as usize).unwrap()), values(&tensor(i))));
        let rows = stream.rows(2, &[1, 5]).unwrap();
        assert_eq!(values(&rows), [&values(&tensor(2))[4..8], &values(&tensor(2))[20..]].concat());

        stream.set(2, tensor(7)).unwrap();
        let copy = stream.copy().unwrap();
        assert_eq!(room.spilled(), 4 * 96, "the copy is spilled, the place of the old tensor used again");
        assert_eq!(values(&copy.get(2).unwrap()), values(&tensor(7)));
        drop(copy);
        assert_eq!(values(&stream.take(0).unwrap()), values(&tensor(0)));
        assert!(stream.get(0).is_err());
        room.limit(0, 1 << 20);
        stream.settle().unwrap();
        assert_eq!((room.left(), room.spilled()), (0, 4 * 96), "there is no accelerator to move to");
        assert_eq!(values(&stream.get(1).unwrap()), values(&tensor(1)));
        drop(stream);
        room.limit(500, 0);
        assert_eq!(room.left(), 500);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        let mut stream = Room::new(&Device::Cpu, 0, &blocked).stream();
        let error = stream.push(Tensor::new(&[1f32], &Device::Cpu).unwrap()).unwrap_err().to_string();
        assert!(error.contains("--work-dir") && error.contains("file"), "{error}");
    }
}
