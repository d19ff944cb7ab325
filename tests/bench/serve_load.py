#!/usr/bin/env python3
"""Loads `mbq-convert serve` with many requests of all kinds at once, and checks every answer:

    tests/bench/serve_load.py PROGRAM MODEL.gguf [--requests 1500] [--clients 4] [--kinds text,picture,...] [-- OPTION...]

First each question is asked alone. Then the clients ask them in a mixture: whole, as streams, left in mid-stream,
and spoiled in many ways. An answer that is not the one given alone, and a status that the kind does not have, fail
the run. Options behind `--` are serve's. Resident memory is told at every tenth of the requests.
"""
import argparse
import base64
import collections
import http.client
import json
import pathlib
import random
import re
import struct
import subprocess
import sys
import threading
import time

DEMO = pathlib.Path(__file__).resolve().parents[2] / "demo"
CHAT = "/v1/chat/completions"
KINDS = ["text", "picture", "stream", "leave", "new", "wrong"]


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def about(data, question):
    """A greedy request about a picture, or of text alone."""
    content = [{"type": "image_url", "image_url": {"url": url(data)}}] if data else []
    content.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}


def noise(rng, side=24):
    """A picture that nobody has seen."""
    rows = b"".join(rng.randbytes(3 * side) for _ in range(side))
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54 + len(rows), 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + rows


def spoiled(rng, pictures):
    """Bytes of a request that is wrong, and the statuses that it may have."""
    picture = rng.choice(pictures)
    request = about(picture, "What is in the picture?") | {"max_tokens": 2}
    way = rng.randrange(6)
    if way == 0:  # Some such pictures can be read.
        data = bytearray(rng.choice([picture, noise(rng)]))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return json.dumps(request | {"messages": about(bytes(data), "What?")["messages"]}).encode(), {200, 400, 413}
    if way == 1:
        cut = picture[: rng.randrange(len(picture) - 12)]
        return json.dumps(request | {"messages": about(cut or b"x", "What?")["messages"]}).encode(), {400}
    if way == 2:
        field, value = rng.choice([("temperature", 9), ("tools", [{"type": "function"}]), ("n", 2), ("messages", []),
                                   ("temprature", 1), ("stop", [1]), ("max_tokens", -1)])
        return json.dumps(request | {field: value}).encode(), {400}
    if way == 3:
        return json.dumps(about(None, "star " * 20000)).encode(), {400}
    if way == 4:
        return json.dumps(request | {"model": "gpt-4o"}).encode(), {404}
    body = json.dumps(request).encode()
    return body[: rng.randrange(len(body) - 1)], {400}


class Server:
    def __init__(self, program, model, options):
        command = [program, "serve", model, "--port", "0", "--no-browser", "--quiet", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip().removeprefix("http://")

    def resident(self):
        """Megabytes of memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1e3

    def post(self, body, leave=False):
        """Status and body; with `leave` the client is gone after the answer's first words."""
        connection = http.client.HTTPConnection(self.address, timeout=600)
        try:
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, (response.read(300) if leave else response.read()).decode()
        finally:
            connection.close()


def streamed(text):
    """The content of an answer's events, which must end as a stream ends."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def content(text):
    return json.loads(text)["choices"][0]["message"]["content"]


def ask(server, kind, rng, questions, alone):
    """One request of a kind; what is wrong with its answer, or nothing."""
    if kind == "wrong":
        body, allowed = spoiled(rng, [data for data, _ in questions if data])
        status, text = server.post(body)
        return None if status in allowed else f"{status}, not {allowed}: {text[:300]}: {body[-300:]}"
    if kind == "new":
        status, text = server.post(json.dumps(about(noise(rng), "What is it?") | {"max_tokens": 2}))
        return None if status == 200 else f"{status}: {text[:300]}"
    with_picture = rng.random() < 0.5 if kind in ("stream", "leave") else kind == "picture"
    at = rng.choice([i for i, (data, _) in enumerate(questions) if bool(data) == with_picture])
    request = about(*questions[at])
    if kind == "leave":
        request |= {"stream": True, "ignore_eos": True, "max_tokens": 2000}
        status, text = server.post(json.dumps(request), leave=True)
        return None if status == 200 else f"{status}: {text[:300]}"
    status, text = server.post(json.dumps(request | ({"stream": True} if kind == "stream" else {})))
    if status != 200:
        return f"{status}: {text[:300]}"
    answer = streamed(text) if kind == "stream" else content(text)
    return None if answer == alone[at] else f"{questions[at][1]}: {answer!r}, alone {alone[at]!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--kinds", default=",".join(KINDS), help="repeat one to have more of it")
    parser.add_argument("--seed", type=int, default=1)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    kinds = args.kinds.split(",")
    assert set(kinds) <= set(KINDS), f"kinds are {KINDS}"

    lines = [json.loads(line) for line in (DEMO / "eval/questions.jsonl").read_text().splitlines()[:24]]
    questions = [((DEMO / "eval" / line["image"]).read_bytes(), line["question"]) for line in lines]
    questions += [(None, f"Tell me of {n} stars.") for n in range(12)]
    server = Server(args.program, args.model, sys.argv[at + 1 :])
    try:
        alone = [content(server.post(json.dumps(about(*question)))[1]) for question in questions]
        return 1 if load(server, args, kinds, questions, alone) else 0
    finally:
        server.process.terminate()
        server.process.wait()


def load(server, args, kinds, questions, alone):
    """Asks; the number of wrong answers."""
    numbers, lock = iter(range(args.requests)), threading.Lock()
    seen, faults, start = collections.Counter(), [], time.time()

    def told(i):
        print(f"{i:7} requests, {time.time() - start:6.0f} s, {server.resident():7.1f} MB", flush=True)

    def client():
        while True:
            with lock:
                i = next(numbers, None)
                if i is None:
                    return
                if i % max(args.requests // 10, 1) == 0:
                    told(i)
            rng = random.Random(f"{args.seed}/{i}")
            kind = rng.choice(kinds)
            try:
                fault = ask(server, kind, rng, questions, alone)
            except Exception as error:
                fault = repr(error)
            with lock:
                seen[kind] += 1
                if fault:
                    faults.append(f"{i} ({kind}): {fault}")
                    print(faults[-1], flush=True)

    clients = [threading.Thread(target=client) for _ in range(args.clients)]
    [thread.start() for thread in clients]
    [thread.join() for thread in clients]
    told(args.requests)
    print(f"{dict(seen)}; {len(faults)} wrong; the server {'runs' if server.process.poll() is None else 'has ended'}")
    return len(faults) + (server.process.poll() is not None)


if __name__ == "__main__":
    sys.exit(main())
