#!/usr/bin/env python3
"""Runs a command with folders served as repositories of a hub on 127.0.0.1, as far as a download asks for it:

    tests/bench/loopback_hub.py org/name=FOLDER [org/other=FOLDER...] -- COMMAND...

The command finds it through HF_ENDPOINT; its downloads go into a cache of their own, which is removed at the end.
"""
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse


class Hub(http.server.BaseHTTPRequestHandler):
    """`/api/models/NAME/revision/REVISION` and `/NAME/resolve/REVISION/FILE`, ranges too."""

    protocol_version = "HTTP/1.1"
    repositories = {}

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            return self.describe(info[1])
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(file[1], file[2])
        self.refuse(404)

    do_HEAD = do_GET

    def describe(self, name):
        folder = self.repositories.get(name)
        if folder is None:
            return self.refuse(404)
        body = json.dumps({"id": name, "sha": commit(name), "siblings": [{"rfilename": f} for f in files(folder)]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, name, file):
        folder = self.repositories.get(name)
        # Only what is listed is served: a path that leaves the folder is not.
        if folder is None or file not in files(folder):
            return self.refuse(404)
        path = folder / file
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]), size - 1) if wanted and wanted[2] else size - 1
        if wanted and first > last:
            return self.refuse(416)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", f'"{hashlib.sha1(f"{name}/{file}".encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit(name))
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as data:
            data.seek(first)
            left = last - first + 1
            while left and (chunk := data.read(min(left, 1 << 20))):
                self.wfile.write(chunk)
                left -= len(chunk)

    def refuse(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        # A client that has what it wants hangs up.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def commit(name):
    return hashlib.sha1(name.encode()).hexdigest()


def main():
    arguments = sys.argv[1:]
    if "--" not in arguments or arguments[-1] == "--" or arguments[0] == "--":
        sys.exit(__doc__)
    end = arguments.index("--")
    for argument in arguments[:end]:
        name, _, folder = argument.partition("=")
        if not re.fullmatch(r"[^/]+/[^/]+", name) or not pathlib.Path(folder).is_dir():
            sys.exit(f"{argument}: not org/name=FOLDER of a folder that is there")
        Hub.repositories[name] = pathlib.Path(folder)
    server = Server(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tempfile.mkdtemp(prefix="loopback-hub-")
    unset = {"HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": home}
    try:
        sys.exit(subprocess.run(arguments[end + 1 :], env=environment).returncode)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
