//! Hub ids, against a server on the loopback that speaks as much of the hub's protocol as a download needs.
mod tiny;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use tiny::{Naming, checkpoint, listing, program, text};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has seen and how it behaves.
#[derive(Default)]
struct State {
    /// "path range authorization" of every request.
    requests: Vec<String>,
    /// While set, the weights stop after half of their bytes, and then are not served.
    cut: bool,
    cut_once: bool,
    /// Files, or with "info" the list of them, are refused: (which, status, X-Error-Code, X-Error-Message).
    refusal: Option<(&'static str, &'static str, &'static str, &'static str)>,
    /// In place of the commit, and of what files' contents are called.
    commit: Option<&'static str>,
    etag: Option<&'static str>,
}

/// The files of a repository.
type Files = BTreeMap<String, Vec<u8>>;

struct Server {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves the files of `dir` as `org/tiny` at revision `main`.
    fn start(dir: &Path) -> Self {
        Self::of(&[("org/tiny", dir)])
    }

    /// Serves repositories, each with its files, at revision `main`.
    fn of(repositories: &[(&str, &Path)]) -> Self {
        let files = |dir: &Path| -> Files {
            listing(dir).into_iter().map(|f| (f.clone(), std::fs::read(dir.join(f)).unwrap())).collect()
        };
        let repositories: BTreeMap<String, Files> =
            repositories.iter().map(|(name, dir)| (name.to_string(), files(dir))).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        // Ends with the test process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &repositories, &shared);
            }
        });
        Server { endpoint, state }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn answer(mut stream: TcpStream, all: &BTreeMap<String, Files>, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{path} {} {}", header("range"), header("authorization")));
    let reply = |stream: &mut TcpStream, status: &str, extra: &str, length: usize, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    };
    if let Some((what, status, code, message)) = state.refusal
        && (if what == "info" { path.starts_with("/api/") } else { path.ends_with(what) })
    {
        let headers = [("X-Error-Code", code), ("X-Error-Message", message)];
        let headers = headers.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("{k}: {v}\r\n"));
        return reply(&mut stream, status, &headers.collect::<String>(), 0, b"");
    }
    let info = path.strip_prefix("/api/models/").and_then(|rest| rest.strip_suffix("/revision/main"));
    if let Some(files) = info.and_then(|name| all.get(name)) {
        let siblings: Vec<_> = files.keys().map(|f| serde_json::json!({"rfilename": f})).collect();
        let commit = state.commit.unwrap_or(SHA);
        let body = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
        return reply(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.len(), body.as_bytes());
    }
    let file = path.strip_prefix('/').and_then(|rest| rest.split_once("/resolve/main/"));
    let Some((name, bytes)) = file.and_then(|(name, file)| all.get(name)?.get_key_value(file)) else {
        return reply(&mut stream, "404 Not Found", "", 0, b"");
    };
    let range = header("range");
    let (from, to) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(bytes.len(), |to: usize| (to + 1).min(bytes.len()));
    let etag = state.etag.map_or_else(|| format!("{name}-etag"), String::from);
    let extra = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {SHA}\r\nContent-Range: bytes {from}-{}/{}\r\n",
        to - 1,
        bytes.len()
    );
    let mut body = &bytes[from..to];
    if state.cut && name.ends_with(".safetensors") && body.len() > 1 {
        if std::mem::replace(&mut state.cut_once, true) {
            return reply(&mut stream, "503 Service Unavailable", "", 0, b"");
        }
        body = &body[..body.len() / 2];
    }
    reply(&mut stream, "206 Partial Content", &extra, to - from, body)
}

fn hub(server: &Server, home: &Path) -> Command {
    let mut command = program();
    command.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", home).args(["--type", "q4_0", "--method", "rtn"]);
    command
}

fn fetch(server: &Server, home: &Path, out: &Path, args: &[&str]) -> Output {
    hub(server, home).args(args).arg("-o").arg(out).output().unwrap()
}

#[test]
fn a_model_is_downloaded_once_and_converted() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 2);
    std::fs::write(model.join("pytorch_model.bin"), "not wanted").unwrap();
    std::fs::write(model.join("README.md"), "---\nlicense: mit\n---\n").unwrap();
    let server = Server::start(&model);
    let (home, out) = (parent.path().join("home"), parent.path().join("o.gguf"));
    let done = hub(&server, &home).env("HF_TOKEN", "secret").arg("org/tiny").arg("-o").arg(&out).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let requests = server.requests();
    assert!(requests.iter().all(|r| r.ends_with("Bearer secret")), "{requests:?}");
    assert!(requests.iter().any(|r| r.contains("model-00002-of-00002.safetensors")));
    assert!(!requests.iter().any(|r| r.contains("pytorch_model")), "only what is read is downloaded");
    // The Python library's layout, so that both share one cache.
    let snapshot = home.join("hub/models--org--tiny/snapshots").join(SHA);
    assert_eq!(std::fs::read(snapshot.join("config.json")).unwrap(), std::fs::read(model.join("config.json")).unwrap());
    assert_eq!(std::fs::read_to_string(home.join("hub/models--org--tiny/refs/main")).unwrap(), SHA);

    let file = mbq_convert::gguf::GgufFile::open(&out).unwrap();
    let string = |key: &str| file.metadata.get(key).unwrap().as_str().unwrap().to_string();
    assert_eq!(string("general.name"), "tiny");
    assert_eq!(string("general.source.huggingface.repository"), "org/tiny");
    assert_eq!(string("general.license"), "mit");

    // Again: nothing but the question which commit `main` is. Offline: not even that.
    std::fs::remove_file(&out).unwrap();
    assert!(fetch(&server, &home, &out, &["org/tiny@main"]).status.success());
    assert_eq!(server.requests().len(), 1);
    std::fs::remove_file(&out).unwrap();
    assert!(fetch(&server, &home, &out, &["org/tiny", "--offline"]).status.success());
    assert_eq!(server.requests().len(), 0);
    assert!(out.exists());
}

/// A model that is refused costs its small files alone.
#[test]
fn what_is_not_supported_is_refused_before_its_weights_come() {
    let quantised = r#"{"model_type": "llava_onevision", "quantization_config": {"quant_method": "awq", "bits": 4}}"#;
    for (file, text_of, words) in [
        ("config.json", r#"{"model_type": "molmo"}"#, &["molmo", "llava_onevision"][..]),
        ("config.json", quantised, &["AWQ, 4 bits"]),
        ("config.json", "{", &["config.json"]),
        ("adapter_config.json", r#"{"base_model_name_or_path": "org/base"}"#, &["adapter", "org/base"]),
    ] {
        let parent = tempfile::tempdir().unwrap();
        let model = checkpoint(parent.path(), Naming::Published, 2);
        std::fs::write(model.join(file), text_of).unwrap();
        let server = Server::start(&model);
        let out = parent.path().join("o.gguf");
        let done = fetch(&server, &parent.path().join("home"), &out, &["org/tiny"]);
        let message = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{message}");
        words.iter().for_each(|w| assert!(message.contains(w), "{w}: {message}"));
        let requests = server.requests();
        assert!(requests.iter().any(|r| r.contains("config.json")), "{requests:?}");
        assert!(!requests.iter().any(|r| r.contains(".safetensors ")), "{requests:?}");
    }
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let half = std::fs::metadata(model.join("model.safetensors")).unwrap().len() / 2;
    let server = Server::start(&model);
    let (home, out) = (parent.path().join("home"), parent.path().join("o.gguf"));
    server.state.lock().unwrap().cut = true;
    let done = fetch(&server, &home, &out, &["org/tiny"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("model.safetensors"), "{}", text(&done.stderr));
    assert!(!out.exists());
    server.requests();
    server.state.lock().unwrap().cut = false;
    let done = fetch(&server, &home, &out, &["org/tiny"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let requests = server.requests();
    assert!(requests.iter().any(|r| r.contains(&format!("model.safetensors bytes={half}-"))), "{requests:?}");
    let cached = home.join("hub/models--org--tiny/snapshots").join(SHA).join("model.safetensors");
    assert!(std::fs::read(cached).unwrap() == std::fs::read(model.join("model.safetensors")).unwrap());
}

/// Names that the server gives become names of files and folders, and lead nowhere else.
#[test]
fn a_server_names_nothing_outside_of_the_cache() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let server = Server::start(&model);
    let (home, out) = (parent.path().join("a/b/home"), parent.path().join("o.gguf"));
    let absolute: &'static str = parent.path().join("escaped").display().to_string().leak();
    for (commit, etag, word) in [
        (Some("../../../../../escaped"), None, "the commit"),
        (Some(absolute), None, "the commit"),
        (Some(""), None, "the commit"),
        (None, Some("../../../../../../escaped"), "ETag"),
        (None, Some(absolute), "ETag"),
        (None, Some(".."), "ETag"),
        (Some("1111111111111111111111111111111111111111"), None, "was changed"),
    ] {
        let mut state = server.state.lock().unwrap();
        (state.commit, state.etag) = (commit, etag);
        drop(state);
        let done = fetch(&server, &home, &out, &["org/tiny"]);
        assert_eq!(done.status.code(), Some(1), "{commit:?} {etag:?}");
        assert!(text(&done.stderr).contains(word), "{}", text(&done.stderr));
        assert_eq!(listing(parent.path()).iter().filter(|name| *name != "a").collect::<Vec<_>>(), ["tiny-model"]);
    }
}

#[test]
fn what_is_not_there_is_said() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let server = Server::start(&model);
    let (home, out) = (parent.path().join("home"), parent.path().join("o.gguf"));
    for (id, args, words) in [
        ("org/nothing", &[][..], &["org/nothing", "no such model"][..]),
        ("org/tiny@v9", &[], &["org/tiny@v9", "revision"]),
        ("org/tiny", &["--offline"], &["org/tiny", "cache", "--offline"]),
        ("just-a-name", &[], &["just-a-name", "org/name"]),
    ] {
        let done = fetch(&server, &home, &out, &[args, &[id]].concat());
        assert_eq!(done.status.code(), Some(1), "{id}");
        words.iter().for_each(|w| assert!(text(&done.stderr).contains(w), "{}", text(&done.stderr)));
        assert!(!out.exists());
    }
    // Nobody listens.
    let dead = Server { endpoint: "http://127.0.0.1:1".into(), state: server.state.clone() };
    let done = fetch(&dead, &home, &out, &["org/tiny"]);
    assert!(text(&done.stderr).contains("http://127.0.0.1:1"), "{}", text(&done.stderr));
    assert_eq!(done.status.code(), Some(1));
}

/// A LLaVA of the layout that its own code saves names its tower's repository.
#[test]
fn a_tower_of_its_own_is_downloaded_too() {
    let parent = tempfile::tempdir().unwrap();
    let dir = tiny::llava::checkpoint(parent.path(), false, Naming::Published, 1);
    let tower = parent.path().join("clip");
    std::fs::create_dir(&tower).unwrap();
    let (config, processor) = tiny::llava::configuration(false);
    std::fs::rename(dir.join("preprocessor_config.json"), tower.join("preprocessor_config.json")).unwrap();
    let write = |path: &Path, json: serde_json::Value| std::fs::write(path, json.to_string()).unwrap();
    assert!(processor["image_mean"].is_array());
    let clip = serde_json::json!({"model_type": "clip", "vision_config": config["vision_config"]});
    write(&tower.join("config.json"), clip);
    let mut own = config["text_config"].clone();
    let more = serde_json::json!({"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "maker/clip",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"});
    own.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    write(&dir.join("config.json"), own);
    let (of_tower, rest): (tiny::Tensors, tiny::Tensors) =
        tiny::llava::tensors(false).into_iter().partition(|(name, _)| name.starts_with("vision_tower."));
    let short = |(name, t): (String, _)| (name.replace("vision_tower.", ""), t);
    tiny::write_weights(&tower, &of_tower.into_iter().map(short).collect(), 1);
    tiny::write_weights(&dir, &rest, 1);
    let server = Server::of(&[("org/tiny", &dir), ("maker/clip", &tower)]);
    let (home, out) = (parent.path().join("home"), parent.path().join("o.gguf"));
    for args in [&["org/tiny"][..], &["org/tiny", "--offline"], &[dir.to_str().unwrap(), "--offline"]] {
        let done = fetch(&server, &home, &out, args);
        assert!(done.status.success(), "{}", text(&done.stderr));
        std::fs::remove_file(&out).unwrap();
    }
    assert!(server.requests().iter().any(|r| r.starts_with("/maker/clip/resolve/main/model.safetensors ")));

    // No tower: its weights are not asked for.
    write(&tower.join("config.json"), serde_json::json!({"model_type": "vit"}));
    let server = Server::of(&[("org/tiny", &dir), ("maker/clip", &tower)]);
    let done = fetch(&server, &parent.path().join("other"), &out, &["org/tiny"]);
    let message = text(&done.stderr);
    assert!(!done.status.success());
    assert!(["maker/clip", "clip or siglip"].iter().all(|word| message.contains(word)), "{message}");
    let requests = server.requests();
    assert!(!requests.iter().any(|r| r.starts_with("/maker/clip") && r.contains(".safetensors ")), "{requests:?}");
}

/// Refusals are told apart by the headers that the hub sends with them.
#[test]
fn refusals_are_told_apart() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let server = Server::start(&model);
    let (home, out) = (parent.path().join("home"), parent.path().join("o.gguf"));
    let licence = format!("accept the licence at {}/org/tiny", server.endpoint);
    let gated = "Access to model org/tiny is restricted.";
    for (refusal, token, words) in [
        // A gated model's list of files is public, its files are not.
        (("config.json", "401 Unauthorized", "GatedRepo", gated), None, &[&licence, "set HF_TOKEN", gated][..]),
        (("config.json", "403 Forbidden", "GatedRepo", gated), Some("t"), &[&licence, "the account that accepted it"]),
        (("info", "401 Unauthorized", "GatedRepo", ""), None, &[&licence, "set HF_TOKEN"]),
        (
            ("info", "401 Unauthorized", "", "Invalid credentials in Authorization header"),
            Some("t"),
            &["does not know the access token", "settings/tokens"],
        ),
        (("info", "401 Unauthorized", "", "Invalid username or password."), Some("t"), &["the access token"]),
        (("info", "401 Unauthorized", "RepoNotFound", "Repository not found"), None, &["no such model", "private"]),
        (("info", "404 Not Found", "RepoNotFound", ""), Some("t"), &["no such model"]),
        (("info", "404 Not Found", "RevisionNotFound", "Invalid rev id: main"), None, &["no such revision"]),
        (("config.json", "404 Not Found", "EntryNotFound", ""), None, &["no file config.json"]),
        (("info", "403 Forbidden", "", "Access to this resource is disabled."), None, &["403", "is disabled"]),
        (("info", "500 Internal Server Error", "", ""), None, &["500"]),
    ] {
        server.state.lock().unwrap().refusal = Some(refusal);
        let mut command = hub(&server, &home);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        let done = command.arg("org/tiny").arg("-o").arg(&out).output().unwrap();
        let message = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{refusal:?}: {message}");
        assert!(words.iter().all(|w| message.contains(w)) && message.contains("org/tiny"), "{refusal:?}: {message}");
        assert!(!out.exists());
    }
}

/// A snapshot in the cache, given as a directory, is the model it is a snapshot of, not its commit.
#[test]
fn a_snapshot_has_its_models_name() {
    let parent = tempfile::tempdir().unwrap();
    let snapshot = parent.path().join("models--org--tiny-0.5b-chat/snapshots").join(SHA);
    std::fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    std::fs::rename(checkpoint(parent.path(), Naming::Published, 1), &snapshot).unwrap();
    let out = parent.path().join("o.gguf");
    let done = program().arg(&snapshot).args(["--type", "q4_0", "--method", "rtn", "-o"]).arg(&out).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let file = mbq_convert::gguf::GgufFile::open(&out).unwrap();
    let string = |key: &str| file.metadata.get(key).unwrap().as_str().unwrap().to_string();
    assert_eq!(string("general.name"), "tiny-0.5b-chat");
    assert_eq!(string("general.source.huggingface.repository"), "org/tiny-0.5b-chat");
}
