#!/usr/bin/env python3
"""Sends mutated requests to one running server: each must be answered within 10 s, with an error object where it is refused,
never with a status of 500, and the server must stay, within 1 GiB, and answer a whole request at the end.

  mutants_http.py PROGRAM MODEL.gguf PICTURES [--count 1000] [--seed 1] [--runtime DIR]
"""
import argparse, base64, json, random, socket, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mutations

SECONDS, MIB = 10, 1024


def body(rng, pictures):
    """A whole request, as programs send it."""
    picture = base64.b64encode(rng.choice(pictures).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}}, {"type": "text", "text": "What is this?"}]
    if rng.random() < 0.3:
        content = "What is a star?"
    stream = rng.random() < 0.3
    value = {"messages": [{"role": "system", "content": "Answer."}, {"role": "user", "content": content}], "max_tokens": 2,
             "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 1, "stop": ["a", "b"],
             "presence_penalty": 0.1, "frequency_penalty": 0.1, "n": 1,
             "response_format": {"type": "text"}, "user": "x"}
    for key in list(value)[1:]:
        if rng.random() < 0.4:
            del value[key]
    value |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2} if stream else {"max_tokens": 2}
    return value


def request(rng, pictures, port):
    """(what, bytes, whether its length is what the head says) of one mutant."""
    value, path, method = body(rng, pictures), "/v1/chat/completions", "POST"
    kind = rng.random()
    if kind < 0.55:
        what, value = mutations.json_mutant(rng, value)
        data = json.dumps(value).encode("utf-8", "surrogatepass")
    elif kind < 0.65:
        what, data = mutations.json_text(rng, json.dumps(value).encode())
    elif kind < 0.8:
        name, picture = rng.choice(pictures).name, mutations.raw(rng, rng.choice(pictures).read_bytes())
        what, url = f"picture: {picture[0]}", "data:image/png;base64," + base64.b64encode(picture[1]).decode()
        url = rng.choice([url, url, url, url, url[:-1], "data:image/png;base64,####", "data:," + name, "file:///etc/passwd", "http://127.0.0.1:1/x", "x" * 100000])
        value["messages"] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        data = json.dumps(value).encode()
    else:
        what, data = "head", json.dumps(value).encode()
        path = rng.choice(["/", "/v1/models", "/v1/chat/completions/", "/../../etc/passwd", "/v1/chat/completions?" + "a" * 9000, "/health", "/%00", "/\xff", "*"])
        method = rng.choice(["GET", "POST", "PUT", "OPTIONS", "HEAD", "X" * 300, "DELETE"])
    heads = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Connection": "close", "Content-Length": str(len(data))}
    if kind >= 0.8:
        key = rng.choice(list(heads) + ["Origin", "Transfer-Encoding", "Expect", "Authorization"])
        heads[key] = rng.choice(["", "x", "chunked", "0", "-1", "18446744073709551616", "a" * 70000, "\xff\xfe", "http://evil.example", "gzip", "100-continue"])
        if rng.random() < 0.3:
            heads.pop(rng.choice(list(heads)))
        what = f"{method[:9]} {path[:40]!r} {key}: {heads.get(key, 'left out')[:30]!r}"
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in heads.items()) + "\r\n"
    whole = head.encode("latin-1") + data
    if rng.random() < 0.08:
        return "raw " + what, mutations.raw(rng, whole)[1], False
    return what, whole, kind < 0.8


def ask(port, data, whole=True):
    """The reply, and the seconds it took. A server may wait for the rest of what is not `whole`: it is told that there is none."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), SECONDS * 2) as s:
        try:
            s.sendall(data)
            if not whole:
                time.sleep(0.02)
                s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        out = b""
        try:
            while piece := s.recv(1 << 16):
                out += piece
        except OSError as e:
            if isinstance(e, TimeoutError):
                return b"", SECONDS * 2
    return out, time.monotonic() - begin


def faults(reply, seconds, whole=True):
    status = int(reply[9:12]) if reply[9:12].isdigit() else 0
    found = []
    if whole and not status:
        found.append("no reply")
    if seconds > SECONDS:
        found.append(f"took {seconds:.1f} s")
    if status >= 500 and status not in (503,):
        found.append(f"status {status}")
    if b"panicked" in reply:
        found.append("panicked")
    if 400 <= status < 500 and b"\r\n\r\n{" in reply and b'"message"' not in reply:
        found.append("an error without a message")
    return status, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("pictures")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--runtime")
    arguments = parser.parse_args()
    pictures = sorted(p for p in Path(arguments.pictures).iterdir() if p.is_file())
    command = [arguments.program, "serve", arguments.model, "--port", "0", "--no-browser", "--threads", "1", "--context", "512"]
    command += ["--runtime", arguments.runtime] if arguments.runtime else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    port = int(server.stdout.readline().strip().rsplit(":", 1)[1])
    statuses, failed = {}, 0
    try:
        for number in range(arguments.count):
            rng = random.Random(f"{arguments.seed} http {number}")
            what, data, whole = request(rng, pictures, port)
            status, found = faults(*ask(port, data, whole), whole)
            if server.poll() is not None:
                found.append(f"the server ended with {server.returncode}")
            statuses[status] = statuses.get(status, 0) + 1
            if found:
                failed += 1
                print(f"http {number}: {', '.join(found)}: {what}")
            if server.poll() is not None:
                break
        plain = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        status, _ = faults(*ask(port, f"{head}Content-Length: {len(plain)}\r\n\r\n".encode() + plain))
        peak = int(next(l for l in Path(f"/proc/{server.pid}/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) >> 10
        if status != 200 or peak > MIB:
            failed += 1
            print(f"at the end: status {status}, {peak} MiB")
    finally:
        server.kill()
        server.wait()
    print(f"http: {arguments.count} mutants, {dict(sorted(statuses.items()))}, peak {peak} MiB\n{failed} findings")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
