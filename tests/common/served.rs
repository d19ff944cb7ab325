//! A server of the program for tests, and a client that sends what it is told to.
use super::{convert, root, runtime_dir};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// `mbq-convert serve` on a port of its own, ended when it is dropped.
pub struct Served {
    pub child: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The text of a whole answer.
    pub fn text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }

    /// Status and code of a refusal, which must be OpenAI's error object.
    pub fn refusal(&self) -> (u16, String) {
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{}", self.body);
        assert!(error["type"].is_string() && error.get("param").is_some(), "{}", self.body);
        (self.status, error["code"].as_str().unwrap().to_owned())
    }

    /// The data of its events.
    pub fn events(&self) -> Vec<String> {
        assert!(self.head.to_lowercase().contains("content-type: text/event-stream"), "{}", self.head);
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).map(String::from).collect()
    }
}

/// The demo model in 3 bits; none without a runtime.
pub fn demo() -> Option<&'static Path> {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    runtime_dir()?;
    let make = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("served");
        std::fs::create_dir_all(&folder).unwrap();
        convert(&root().join("demo/model"), "mbq3", &folder)
    };
    Some(MODEL.get_or_init(make))
}

/// A command of the program, with the runtime that is tested.
pub fn program(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
    program.arg(command);
    if let Some(dir) = std::env::var_os("MBQ_RUNTIME") {
        program.arg("--runtime").arg(dir);
    }
    program
}

impl Served {
    /// Serves the demo model; none without a runtime.
    pub fn start(args: &[&str]) -> Option<Self> {
        Some(Self::of(demo()?, args))
    }

    /// Serves `model`.
    pub fn of(model: &Path, args: &[&str]) -> Self {
        let mut command = program("serve");
        command.arg(model).args(["--port", "0", "--no-browser", "--threads", "1"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).env_remove("MBQ_API_KEY").spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim();
        let address = url.strip_prefix("http://").unwrap_or_else(|| panic!("it did not start: {line:?}")).to_owned();
        Served { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(120))).unwrap();
        stream
    }

    /// Sends bytes as they are and reads to the end.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that refuses early does not take everything.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    /// A request with these headers beside the usual ones.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.raw(&self.request(method, path, headers, body))
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        let usual = [("Host", self.address.as_str()), ("Content-Type", "application/json")];
        let given = |name: &str| headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
        for (name, value) in usual.iter().filter(|(name, _)| !given(name)).chain(headers) {
            head += &format!("{name}: {value}\r\n");
        }
        if !given("Content-Length") && !given("Transfer-Encoding") {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        [head.as_bytes(), b"\r\n", body].concat()
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub fn chat(&self, body: &Value) -> Reply {
        self.send("POST", "/v1/chat/completions", &[], body.to_string().as_bytes())
    }
}

/// Reads a reply to its end.
pub fn read(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A server that refuses early resets the connection.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { dechunked(body) } else { body.to_owned() };
    Reply { status, head: head.to_owned(), body }
}

/// The parts of a chunked body; lengths count bytes, so it is not cut inside of characters.
fn dechunked(body: &str) -> String {
    let mut rest = body.as_bytes();
    let mut out = Vec::new();
    while let Some(at) = rest.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&rest[..at]).ok().and_then(|s| usize::from_str_radix(s, 16).ok()).unwrap_or(0);
        if size == 0 {
            break;
        }
        out.extend_from_slice(&rest[at + 2..at + 2 + size]);
        rest = &rest[at + 2 + size + 2..];
    }
    String::from_utf8(out).unwrap()
}

/// The picture at `path` below demo/ as a part of a message.
pub fn picture(path: &str) -> Value {
    use base64::Engine;
    let bytes = std::fs::read(root().join("demo").join(path)).unwrap();
    let url = format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes));
    json!({"type": "image_url", "image_url": {"url": url}})
}

/// A greedy request about a picture.
pub fn about(path: &str, question: &str) -> Value {
    let content = json!([picture(path), {"type": "text", "text": question}]);
    json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32})
}

/// A greedy request of text alone.
pub fn text(question: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 32})
}
