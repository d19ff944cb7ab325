//! The pickle in a file of `torch.save`, read as data: nothing is ever called. Only what a dictionary of tensors is made
//! of is known; any other opcode or global is an error.
//!
//! candle_core::pickle is not used: it leaves out, without a word, entries that it does not understand.
use super::Dtype;
use std::collections::HashMap;
use std::rc::Rc;

/// A tensor in the pickle: where it lies in which storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PickledTensor {
    pub storage: Rc<Storage>,
    /// Elements of the storage before the first.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// A storage: the archive's entry `data/KEY`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Storage {
    pub key: String,
    pub dtype: Dtype,
    /// Elements.
    pub len: usize,
}

/// The globals that may be named. Calling one is understood, not done.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", storage) => Global::Storage(match storage {
                "FloatStorage" => Dtype::F32,
                "HalfStorage" => Dtype::F16,
                "BFloat16Storage" => Dtype::BF16,
                "DoubleStorage" => Dtype::F64,
                "LongStorage" => Dtype::I64,
                "IntStorage" => Dtype::I32,
                "ShortStorage" => Dtype::I16,
                "CharStorage" => Dtype::I8,
                "ByteStorage" => Dtype::U8,
                "BoolStorage" => Dtype::BOOL,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

#[derive(Debug, Clone)]
enum Object {
    /// `None`, or a number with a fraction: harmless in metadata.
    Other,
    Bool,
    Int(i64),
    Text(Rc<str>),
    Global(Global),
    Tuple(Rc<[Object]>),
    Dict(Vec<(Object, Object)>),
    Storage(Rc<Storage>),
    Tensor(PickledTensor),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::Other => "no object of note",
            Object::Bool => "a truth value",
            Object::Int(_) => "a number",
            Object::Text(_) => "a text",
            Object::Global(_) => "a class or function",
            Object::Tuple(_) => "a tuple",
            Object::Dict(_) => "a dictionary",
            Object::Storage(_) => "a storage",
            Object::Tensor(_) => "a tensor",
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    stack: Vec<Object>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Object>,
}

/// The tensors of the pickle by name, in its order.
///
/// # Errors
/// In words: what is there that a dictionary of tensors does not need.
pub(super) fn tensors(bytes: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    let mut machine = Machine { bytes, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = loop {
        let at = bytes.len() - machine.bytes.len();
        match machine.step() {
            Ok(None) => (),
            Ok(Some(root)) => break root,
            Err(problem) => return Err(format!("at byte {at} of its pickle: {problem}")),
        }
    };
    let Object::Dict(entries) = root else {
        return Err(format!("holds {}, not a dictionary of tensors", root.kind()));
    };
    entries
        .into_iter()
        .map(|entry| match entry {
            (Object::Text(name), Object::Tensor(tensor)) => Ok((name.to_string(), tensor)),
            (Object::Text(name), other) => Err(format!("`{name}` is {}, not a tensor", other.kind())),
            (other, _) => Err(format!("a key of its dictionary is {}, not a tensor's name", other.kind())),
        })
        .collect()
}

impl Machine<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (taken, rest) = self.bytes.split_first_chunk::<N>().ok_or("it ends in the middle")?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.bytes.iter().position(|b| *b == b'\n').ok_or("it ends in the middle")?;
        let line = String::from_utf8_lossy(&self.bytes[..end]).into_owned();
        self.bytes = &self.bytes[end + 1..];
        Ok(line)
    }

    fn text(&mut self, n: usize) -> Result<Rc<str>, String> {
        let (text, rest) = self.bytes.split_at_checked(n).ok_or("it ends in the middle of a text")?;
        self.bytes = rest;
        std::str::from_utf8(text).map(Rc::from).map_err(|_| "a text that is no UTF-8".into())
    }

    fn pop(&mut self) -> Result<Object, String> {
        // What lies below a mark belongs to what is being built.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("an opcode takes more than there is".into());
        }
        self.stack.pop().ok_or_else(|| "an opcode takes more than there is".into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Object>, String> {
        let at = self.marks.pop().ok_or("no mark where one is needed")?;
        Ok(self.stack.split_off(at.min(self.stack.len())))
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let mut items: Vec<Object> = (0..n).map(|_| self.pop()).collect::<Result<_, _>>()?;
        items.reverse();
        self.stack.push(Object::Tuple(items.into()));
        Ok(())
    }

    fn put(&mut self, key: u32) -> Result<(), String> {
        let top = match self.stack.last().ok_or("nothing to remember")? {
            // A dictionary still grows: only an empty one could be had again, and nobody asks for one.
            Object::Dict(_) => return Ok(()),
            top => top.clone(),
        };
        self.memo.insert(key, top);
        Ok(())
    }

    fn get(&mut self, key: u32) -> Result<(), String> {
        let object = self.memo.get(&key).ok_or("it refers to a dictionary, or to what is not there")?;
        self.stack.push(object.clone());
        Ok(())
    }

    fn set(&mut self, items: Vec<Object>) -> Result<(), String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let Some(Object::Dict(entries)) = self.stack.get_mut(floor..).and_then(<[_]>::last_mut) else {
            return Err("an entry for what is no dictionary".into());
        };
        let mut items = items.into_iter();
        while let Some(key) = items.next() {
            entries.push((key, items.next().ok_or("a key without a value")?));
        }
        Ok(())
    }

    /// One opcode; at the last one what was built.
    fn step(&mut self) -> Result<Option<Object>, String> {
        let [op] = self.take()?;
        match op {
            // PROTO
            0x80 => match self.take()? {
                [2..=5] => (),
                [n] => return Err(format!("pickle protocol {n}")),
            },
            b'c' => self.global()?,
            b'q' => self.take::<1>().and_then(|[key]| self.put(key.into()))?,
            b'r' => self.take().and_then(|key| self.put(u32::from_le_bytes(key)))?,
            b'h' => self.take::<1>().and_then(|[key]| self.get(key.into()))?,
            b'j' => self.take().and_then(|key| self.get(u32::from_le_bytes(key)))?,
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.stack.push(Object::Tuple(Rc::new([]))),
            b't' => self.pop_mark().map(|items| self.stack.push(Object::Tuple(items.into())))?,
            n @ 0x85..=0x87 => self.tuple(usize::from(n - 0x84))?,
            b'}' => self.stack.push(Object::Dict(Vec::new())),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(vec![key, value])?;
            }
            b'u' => self.pop_mark().and_then(|items| self.set(items))?,
            b'X' => {
                let n = u32::from_le_bytes(self.take()?);
                let text = self.text(n as usize)?;
                self.stack.push(Object::Text(text));
            }
            b'K' => self.take::<1>().map(|n| self.stack.push(Object::Int(n[0].into())))?,
            b'M' => self.take().map(|n| self.stack.push(Object::Int(u16::from_le_bytes(n).into())))?,
            b'J' => self.take().map(|n| self.stack.push(Object::Int(i32::from_le_bytes(n).into())))?,
            0x8a => self.long()?,
            b'N' => self.stack.push(Object::Other),
            b'G' => self.take::<8>().map(|_| self.stack.push(Object::Other))?,
            0x88 | 0x89 => self.stack.push(Object::Bool),
            b'Q' => {
                let id = self.pop()?;
                self.stack.push(Object::Storage(storage(&id)?.into()));
            }
            b'R' => self.reduce()?,
            // BUILD: torch.nn.Module.state_dict hangs its version numbers on the dictionary.
            b'b' => match (self.pop()?, self.stack.last()) {
                (Object::Dict(state), Some(Object::Dict(_)))
                    if state.iter().all(|(key, _)| matches!(key, Object::Text(key) if &**key == "_metadata")) => {}
                _ => return Err("a state other than a dictionary's `_metadata`".into()),
            },
            b'.' => {
                let root = self.pop()?;
                let left = self.stack.len() + self.bytes.len();
                return if left == 0 { Ok(Some(root)) } else { Err("it ends, but something is left".into()) };
            }
            _ => return Err(format!("opcode {op:#04x} is no part of a dictionary of tensors; it was not run")),
        }
        Ok(None)
    }

    /// GLOBAL: a module and a name in it.
    fn global(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        let global = Global::of(&module, &name).ok_or_else(|| {
            format!("it names `{module}.{name}`, which is no part of a dictionary of tensors; it was not run")
        })?;
        self.stack.push(Object::Global(global));
        Ok(())
    }

    /// LONG1: numbers beyond 32 bits.
    fn long(&mut self) -> Result<(), String> {
        let [n] = self.take()?;
        if n > 8 || n == 0 {
            return Err(format!("a number of {n} bytes"));
        }
        let mut wide = [0; 8];
        for byte in wide.iter_mut().take(n.into()) {
            [*byte] = self.take()?;
        }
        // The sign is in the last byte.
        let shift = 64 - 8 * u32::from(n);
        self.stack.push(Object::Int(i64::from_le_bytes(wide) << shift >> shift));
        Ok(())
    }

    /// REDUCE: a function's value, of those that are known.
    fn reduce(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let made = match (self.pop()?, arguments) {
            (Object::Global(global), Object::Tuple(arguments)) => call(global, &arguments)?,
            _ => return Err("a call of what is no function".into()),
        };
        self.stack.push(made);
        Ok(())
    }
}

/// What `("storage", torch.FloatStorage, "0", "cpu", 6)` says.
fn storage(id: &Object) -> Result<Storage, String> {
    if let Object::Tuple(id) = id
        && let [
            Object::Text(kind),
            Object::Global(Global::Storage(dtype)),
            Object::Text(key),
            Object::Text(_),
            Object::Int(n),
        ] = &**id
        && &**kind == "storage"
        && let Ok(len) = usize::try_from(*n)
    {
        return Ok(Storage { key: key.to_string(), dtype: *dtype, len });
    }
    Err("a reference to what is no storage".into())
}

/// What a call would make.
fn call(global: Global, arguments: &[Object]) -> Result<Object, String> {
    match (global, arguments) {
        (Global::OrderedDict, []) => Ok(Object::Dict(Vec::new())),
        (Global::RebuildParameter, [tensor @ Object::Tensor(_), Object::Bool, Object::Dict(hooks)])
            if hooks.is_empty() =>
        {
            Ok(tensor.clone())
        }
        (
            Global::RebuildTensor,
            [Object::Storage(storage), Object::Int(offset), shape, strides, Object::Bool, Object::Dict(hooks)],
        ) if hooks.is_empty() => {
            let offset = usize::try_from(*offset).map_err(|_| "a negative offset")?;
            let (shape, strides) = (sizes(shape)?, sizes(strides)?);
            Ok(Object::Tensor(PickledTensor { storage: storage.clone(), offset, shape, strides }))
        }
        _ => Err(format!("a call of {global:?} with arguments that torch.save does not write")),
    }
}

fn sizes(tuple: &Object) -> Result<Vec<usize>, String> {
    let Object::Tuple(items) = tuple else { return Err("a shape that is no tuple".into()) };
    let size = |item: &Object| match item {
        Object::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    items.iter().map(size).collect::<Option<_>>().ok_or_else(|| "a shape or stride that is no number from 0 on".into())
}
