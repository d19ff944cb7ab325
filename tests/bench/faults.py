#!/usr/bin/env python3
"""faults.py PROGRAM [--seed N] [--moments N] [--quick] [--cuda RUNTIME] [KIND ...]

What goes wrong around a conversion, an evaluation or a server is done to them on the demo model: kinds are kills,
disk, reads, readonly, two, memory, signals, names, clock, long and questions (all, if none is named). PROGRAM is mbq-convert. Every
run must end in the very bytes of an undisturbed one, or in a message that names the file and leaves nothing half done.
Mounts, other users and cgroups need root; without it those parts are skipped and said so. --quick is the part that
the ordinary tests run. --cuda calibrates and evaluates on a GPU, with the llama.cpp in the folder RUNTIME.
"""
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
CALIBRATED = ["--calib", DEMO / "calib/pairs.json", "--samples", "2", "--memory", "64M", "--resume"]
KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


class Findings(list):
    """What was not as it should be, and how much was."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def check(self, true, what):
        self.count += 1
        if not true:
            self.append(what)
            print("FOUND", what, flush=True)


class Job:
    """A command with a folder of its own."""

    def __init__(self, options, folder, env=None):
        self.options, self.folder = options, pathlib.Path(folder)
        self.cache = options.cache
        self.env = {**os.environ, "XDG_CACHE_HOME": str(self.cache), **(env or {})}
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self, args):
        return [self.options.program, *map(str, args)]

    def start(self, args, **more):
        # A script in the background ignores SIGINT, and so would all that it starts.
        prepare = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        more = {"env": self.env, "preexec_fn": prepare, **more}
        return subprocess.Popen(self.command(args), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, **more)

    def run(self, args, **more):
        child = self.start(args, **more)
        said = child.communicate(timeout=600)[1].decode(errors="replace")
        return child.returncode, said

    def digests(self):
        """Of every file, times left out of records."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                if path.name.endswith(".json") and data:
                    data = json.dumps(self.timeless(json.loads(data))).replace(str(self.folder), "DIR").encode()
                found[str(path.relative_to(self.folder))] = hashlib.sha256(data).hexdigest()
        return found

    def timeless(self, value):
        if isinstance(value, dict):
            times = re.compile("second|wall|load|time|cost|speed|cache")
            return {k: self.timeless(v) for k, v in value.items() if not times.search(k)}
        return [self.timeless(v) for v in value] if isinstance(value, list) else value


def convert(folder, *more, model=DEMO / "model"):
    return [model, "-o", folder / "o.gguf", "--quiet", *more]


def evaluate(options, folder, *more, data=DEMO / "eval/questions.jsonl"):
    models = options.models
    return ["eval", models / "q.gguf", "--reference", models / "f.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "--data",
            data, "--limit", "24", "--max-tokens", "8", "--resamples", "50", "--threads", "1", "--cache", folder / "cache",
            "--json", folder / "e.json", "--quiet", *options.runtime, *more]


def prepare(options):
    """Models to evaluate, serve and bundle; the runtime is in the cache afterwards."""
    options.cache.mkdir(parents=True, exist_ok=True)
    models = Job(options, options.models)
    for name, ty in (("f", "f16"), ("q", "q4_0")):
        code, said = models.run([DEMO / "model", "-o", options.models / f"{name}.gguf", "--type", ty, "--method", "rtn", "--quiet"])
        assert code == 0, said
    os.remove(options.models / "mmproj-q-f16.gguf")
    first = Job(options, options.work / "first")
    code, said = first.run(evaluate(options, first.folder))
    assert code == 0, said


def is_clear(said, name):
    """One error, which names `name`."""
    return said.count("error: ") == 1 and name in said and "panicked" not in said


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def small(at, size):
    """A file system of `size` bytes, or None without root."""
    at.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield at if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", at])


@kind
def kills(options, found):
    """SIGKILL at random moments, once or several times, then the same command again."""
    cases = {"default": lambda d: convert(d, *CALIBRATED), "rotated": lambda d: convert(d, *CALIBRATED, "--rotate", "on"),
             "scales": lambda d: convert(d, *CALIBRATED, "--method", "mbq-scales"),
             "eval": lambda d: evaluate(options, d)}
    moments = 1 if options.quick else options.moments
    for name, args in cases.items():
        if options.quick and name != "eval":  # tests/calibrate.rs kills calibrations
            continue
        whole = Job(options, options.work / f"whole-{name}" / "d")
        start = time.monotonic()
        code, said = whole.run(args(whole.folder))
        seconds, want = time.monotonic() - start, whole.digests()
        assert code == 0, said
        killed = resumed = 0
        while killed < moments:
            pieces = Job(options, options.work / f"pieces-{name}" / "d")
            for _ in range(options.random.choice([1, 1, 2, 3])):
                child = pieces.start(args(pieces.folder))
                try:
                    child.wait(options.random.random() * seconds)
                except subprocess.TimeoutExpired:
                    child.kill()
                    killed += 1
                child.communicate()
            resumed += any("progress" in f or f.startswith("cache") for f in left(pieces.folder))
            code, said = pieces.run(args(pieces.folder))
            have = pieces.digests()
            skip = (lambda d: {k: v for k, v in d.items() if not k.startswith("cache")}) if name == "eval" else dict
            found.check(code == 0 and skip(have) == skip(want),
                        f"kills {name}: {code} {said} {[k for k in set(have) | set(want) if have.get(k) != want.get(k)]}")
            shutil.rmtree(pieces.folder)
        print(f"kills: {name}: {killed} kills, {resumed} resumed, a whole run {seconds:.1f} s", flush=True)


@kind
def disk(options, found):
    """The disk fills at every stage of writing: output, work folder, cache, what an evaluation keeps, a bundle."""
    models = options.models
    cases = {
        "output": lambda d, o: convert(d, "--method", "rtn", "--type", "q8_0"),
        "calibrated": lambda d, o: convert(d, *CALIBRATED),
        "scales": lambda d, o: convert(d, *CALIBRATED, "--method", "mbq-scales"),
        "spilled": lambda d, o: convert(d, "--samples", "4", "--memory", "1M", "--resume"),
        "split": lambda d, o: convert(d, "--method", "rtn", "--type", "q8_0", "--split-max-size", "600K"),
        "imatrix": lambda d, o: convert(d, "--method", "rtn", "--type", "q4_0", "--imatrix", "image", "--samples", "2"),
        "work": lambda d, o: convert(o, *CALIBRATED, "--work-dir", d / "w"),
        "eval": lambda d, o: evaluate(options, d, "--html", d / "e.html"),
        "bundle": lambda d, o: ["bundle", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "-o", d / "b.zip"],
        "install": lambda d, o: ["runtime", "install", d / "r"],
        "cache": lambda d, o: convert(o, "--samples", "2"),
    }
    names = ["output", "eval"] if options.quick else cases
    for name in names:
        args, full, failures, full_at, size = cases[name], options.work / "small", 0, 0, 16 << 10
        outside = Job(options, options.work / "outside")
        done, resumed, start = False, 0, time.monotonic()
        while not done:
            with small(full, size) as place:
                if place is None:
                    return print("disk: skipped, mounting needs root")
                job = Job(options, place)
                if name == "cache":
                    job.env["XDG_CACHE_HOME"] = str(place)
                code, said = job.run(args(place, outside.folder))
                done = code == 0
                if not done:
                    failures, full_at = failures + 1, size
                    outputs = [f for f in left(place) if f.endswith((".gguf", ".zip", ".mbq.json", "part")) or ".tmp" in f]
                    outputs += left(outside.folder)
                    found.check(code == 1 and is_clear(said, str(place)) and "space" in said, f"disk {name} {size}: {code} {said}")
                    found.check(re.search("room|free|--work-dir|--cache|--memory|another", said), f"disk {name} {size}: no advice: {said}")
                    found.check(not outputs, f"disk {name} {size}: left {outputs} {said}")
                    if options.random.random() < .4 and resumed < 4:  # whole runs take the longest
                        resumed += 1
                        subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
                        code, said = job.run(args(place, outside.folder))
                        found.check(code == 0, f"disk {name} {size}: not with room either: {code} {said}")
            shutil.rmtree(outside.folder)
            outside.folder.mkdir()
            size = int(size * (3 if options.quick else 1.45))
        print(f"disk: {name}: {failures} sizes were too small, the last of {full_at >> 10} KiB; {resumed} went on with room; "
              f"{time.monotonic() - start:.0f} s", flush=True)


@kind
def reads(options, found):
    """Files that are cut off while they are read, folders in place of files, files that the disk does not give."""
    folder = options.work / "reads"
    model = folder / "model"
    shutil.copytree(DEMO / "model", model)
    job = Job(options, folder / "out")
    every = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json")
    for name in every[:1] if options.quick else every:
        for what in ("folder", "EIO", "empty"):
            path = model / name
            kept = path.read_bytes()
            path.unlink()
            if what == "folder":
                path.mkdir()
            elif what == "EIO":
                path.symlink_to("/proc/self/mem")
            else:
                path.touch()
            code, said = job.run(convert(job.folder, *CALIBRATED, model=model))
            found.check(code == 1 and is_clear(said, name) and not left(job.folder), f"reads {name} {what}: {code} {said} {left(job.folder)}")
            path.rmdir() if what == "folder" else path.unlink()
            path.write_bytes(kept)
    lists = {"pairs.json": '[{"image": "p.png", "question": "?", "answer": "A star."}]',
             "questions.jsonl": '{"image": "p.png", "question": "?", "answer": "A star."}'}
    commands = {"pairs.json": convert(job.folder, "--memory", "64M", "--calib", folder / "pairs.json"),
                "questions.jsonl": evaluate(options, job.folder, data=folder / "questions.jsonl")}
    for name, command in commands.items():
        for broken in (name, "p.png"):
            for what in ("folder", "EIO"):
                (folder / name).write_text(lists[name])
                shutil.copy(DEMO / "pictures/red-star.png", folder / "p.png")
                path = folder / broken
                path.unlink()
                path.mkdir() if what == "folder" else path.symlink_to("/proc/self/mem")
                code, said = job.run(command)
                rest = [f for f in left(job.folder) if not f.startswith("cache")]
                found.check(code == 1 and is_clear(said, broken) and not rest, f"reads {name} {broken} {what}: {code} {said} {rest}")
                path.rmdir() if what == "folder" else path.unlink()
    # Cut off under the program, at random moments.
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    for name, more in (("rtn", ["--method", "rtn", "--type", "q8_0"]), ("calibrated", CALIBRATED))[:1 if options.quick else 2]:
        start = time.monotonic()
        whole = Job(options, folder / f"whole-{name}")
        assert whole.run(convert(whole.folder, *more, model=model))[0] == 0
        seconds, want = time.monotonic() - start, whole.digests()["o.gguf"]
        ends = {}
        for _ in range(3 if options.quick else 25):
            child = job.start(convert(job.folder, *more, model=model))
            time.sleep(options.random.random() * seconds)
            os.truncate(weights, options.random.choice([0, len(kept) // 3, len(kept) // 2 + 11, len(kept) - 100]))
            said = child.communicate(timeout=300)[1].decode(errors="replace")
            code = child.returncode
            ends[code] = ends.get(code, 0) + 1
            fine = job.digests().get("o.gguf") == want if code == 0 else code == 1 and (is_clear(said, "model.safetensors") or "changed while" in said)
            found.check(fine and (code == 0 or not [f for f in left(job.folder) if "progress" not in f]), f"reads cut {name}: {code} {said} {left(job.folder)}")
            weights.write_bytes(kept)
            shutil.rmtree(job.folder)
            job.folder.mkdir()
        print(f"reads: {name}: cut off at random moments: {ends}", flush=True)


@kind
def readonly(options, found):
    """Folders that may not be written, by mount and by permission."""
    folder = options.work / "readonly"
    outside = Job(options, folder / "outside")
    models = options.models

    def tried(place, why, **more):
        for name, args, env in (
            ("output", convert(place, *CALIBRATED), {}),
            ("rtn", convert(place, "--method", "rtn", "--type", "q4_0"), {}),
            ("work", convert(outside.folder, *CALIBRATED, "--work-dir", place / "w"), {}),
            ("cache", convert(outside.folder, *CALIBRATED), {"XDG_CACHE_HOME": str(place)}),
            ("eval", evaluate(options, place), {}),
            ("evalcache", [a if a != place / "e.json" else outside.folder / "e.json" for a in evaluate(options, place)], {}),
            ("bundle", ["bundle", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "-o", place / "b"], {}),
            ("install", ["runtime", "install", place / "r"], {}),
            ("inspect", ["report", models / "q.gguf", "-o", place / "r.html"], {}),
        ):
            job = Job(options, outside.folder, env)
            code, said = job.run(args, **more)
            found.check(code == 1 and is_clear(said, str(place)) and not left(outside.folder), f"readonly {why} {name}: {code} {said} {left(outside.folder)}")

    with small(folder / "mount", 1 << 20) as place:
        if place is None:
            return print("readonly: skipped, mounting needs root")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        tried(place, "mount")
    if os.geteuid() == 0:
        closed = folder / "closed"
        closed.mkdir()
        closed.chmod(0o555)
        for path in (outside.folder, options.work, options.cache, *options.cache.rglob("*")):
            path.chmod(0o777 if path.is_dir() or os.access(path, os.X_OK) else 0o666)
        tried(closed, "user", user=65534, group=65534)
        # A model that may not be read.
        model = folder / "model"
        shutil.copytree(DEMO / "model", model)
        (model / "model.safetensors").chmod(0)
        code, said = outside.run(convert(outside.folder, *CALIBRATED, model=model), user=65534, group=65534)
        found.check(code == 1 and is_clear(said, "model.safetensors"), f"readonly weights: {code} {said}")


@kind
def two(options, found):
    """Two at once on one output, one cache, one fresh cache folder."""
    for name, more in (("rtn", ["--method", "rtn", "--type", "q4_0"]), ("calibrated", CALIBRATED)):
        for i in range(2 if options.quick else 12):
            job = Job(options, options.work / f"two-{name}")
            job.env["XDG_CACHE_HOME"] = str(options.work / f"two-cache-{name}-{i % 3}")
            children = [job.start(convert(job.folder, *more))]
            time.sleep(options.random.random() * .3)
            children.append(job.start(convert(job.folder, *more)))
            ends = [(child.communicate(timeout=300)[1].decode(), child.returncode) for child in children]
            bad = [said for said, code in ends if code]
            fine = all("another conversion works here" in said for said in bad) and len(bad) < 2 and (name != "rtn" or not bad)
            want = ["mmproj-o-f16.gguf", "o.gguf", "o.mbq.json"]
            found.check(fine and left(job.folder) == want, f"two {name}: {ends} {left(job.folder)}")
            code, said = job.run(["inspect", "--verify", job.folder / "o.gguf"])
            found.check(code == 0, f"two {name}: {said}")
            shutil.rmtree(job.folder)
    job = Job(options, options.work / "two-eval")
    children = [job.start(evaluate(options, job.folder)) for _ in range(2)]
    ends = sorted((child.communicate(timeout=300)[1].decode(), child.returncode) for child in children)
    found.check(all(code == 0 or "in use by another" in said for said, code in ends) and any(code == 0 for _, code in ends), f"two eval: {ends}")
    print("two: done", flush=True)


@kind
def memory(options, found):
    """Address space and a cgroup's memory, too little and enough: the same bytes, or a clear end, no abort."""
    args = lambda folder: convert(folder, *CALIBRATED)
    whole = Job(options, options.work / "memory-whole")
    want = None
    if not options.quick:
        assert whole.run(args(whole.folder))[0] == 0
        want = whole.digests()["o.gguf"]
    job = Job(options, options.work / "memory")

    def judge(what, code, said):
        fine = job.digests().get("o.gguf") == want if code == 0 else code == 1 and said.startswith("error: ") and not left(job.folder)
        found.check(fine, f"memory {what}: {code} {said} {left(job.folder)}")
        shutil.rmtree(job.folder)
        job.folder.mkdir()
        return code

    ends = []
    for mib in (400,) if options.quick else (64, 100, 150, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1600, 2400, 4800):
        def limited():
            resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
        code, said = job.run(args(job.folder), preexec_fn=limited)
        ends.append((mib, judge(f"ulimit -v {mib}M", code, said), said.strip()[:150]))
    print("memory: address space:", *ends, sep="\n  ", flush=True)
    groups = [p for p in (pathlib.Path("/sys/fs/cgroup/memory"), pathlib.Path("/sys/fs/cgroup")) if (p / "cgroup.procs").exists()]
    own = next((p for p in groups if os.access(p, os.W_OK) and os.geteuid() == 0), None)
    if own is None:
        return print("memory: no cgroup to write here")
    old = own.name == "memory"
    for line in open("/proc/self/cgroup"):
        _, names, path = line.strip().split(":", 2)
        if (old and names == "memory") or (not old and names == ""):
            own = own / path.lstrip("/")
    group = own / "mbq-faults"
    try:
        group.mkdir(exist_ok=True)
        limit = group / ("memory.limit_in_bytes" if old else "memory.max")
        ends = []
        for mib in (48,) if options.quick else (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
            limit.write_text(str(mib << 20))
            def inside():
                (group / "cgroup.procs").write_text(str(os.getpid()))
            code, said = job.run(args(job.folder), preexec_fn=inside)
            ends.append((mib, judge(f"cgroup {mib}M", code, said), said.strip()[:150]))
        print("memory: cgroup:", *ends, sep="\n  ", flush=True)
    except OSError as e:
        print(f"memory: no cgroup can be made here: {e}")
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@kind
def signals(options, found):
    """SIGINT and SIGTERM at random moments of every command that takes a while."""
    models = options.models
    cases = {
        "rtn": lambda d: convert(d, "--method", "rtn", "--type", "q4_0"),
        "default": lambda d: convert(d, *CALIBRATED),
        "imatrix": lambda d: ["imatrix", DEMO / "model", "-o", d / "i.gguf", "--samples", "2", "--quiet"],
        "eval": lambda d: evaluate(options, d),
        "serve": lambda d: ["serve", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "--port", "0", "--no-browser"],
        "bundle": lambda d: ["bundle", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "-o", d / "b.zip", "--quiet"],
        "bundled folder": lambda d: ["bundle", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "-o", d / "b", "--quiet"],
        "install": lambda d: ["runtime", "install", d / "r"],
        "source": lambda d: ["runtime", "source", d / "s"],
        "inspect": lambda d: ["inspect", "--verify", models / "f.gguf"],
        "fresh cache": lambda d: convert(d, *CALIBRATED),
        "chat": lambda d: ["chat", models / "q.gguf", "--mmproj", models / "mmproj-f-f16.gguf", "-p", "?", "--", "-n", "2000", "--ignore-eos"],
    }
    for name in ("rtn", "serve", "install") if options.quick else cases:
        args, ends = cases[name], {}
        for which in (signal.SIGINT, signal.SIGTERM):
            for i in range(1 if options.quick else 4):
                job = Job(options, options.work / "signals")
                if name == "fresh cache":
                    job.env["XDG_CACHE_HOME"] = str(job.folder / "cache")
                child = job.start(args(job.folder), start_new_session=True)
                # The first moments belong to the loader: nothing has begun.
                time.sleep(.02 + options.random.random() * (2.0 if name in ("default", "eval", "serve", "imatrix", "chat") else .4))
                begun = time.monotonic()
                child.send_signal(which)
                said = child.communicate(timeout=60)[1].decode(errors="replace")
                took, code = time.monotonic() - begun, child.returncode
                ends[code] = ends.get(code, 0) + 1
                rest = left(job.folder)
                odd = [f for f in rest if ".part" in f or ".tmp" in f or ".lock" in f or ".runtime-" in f or f.endswith("part")]
                half = [f for f in rest if f.endswith((".gguf", ".zip")) and code != 0]
                served = name == "serve" and code == 0
                found.check(code in (0, 1, -which, 128 + which) and not odd and not half and "panicked" not in said and took < 5,
                            f"signals {name} {which.name}: {code} in {took:.1f} s, left {odd + half}, {said}")
                for _ in range(20):  # a tool that ends with its parent needs a moment
                    alive = subprocess.run(["pgrep", "-s", str(child.pid)], capture_output=True).stdout.split()
                    if not alive:
                        break
                    time.sleep(.1)
                found.check(not alive, f"signals {name} {which.name}: still there: {alive}")
                for pid in alive:
                    os.kill(int(pid), signal.SIGKILL)
                shutil.rmtree(job.folder)
        print(f"signals: {name}: {ends}", flush=True)


@kind
def names(options, found):
    """Names that are not UTF-8, very long ones and odd ones, for models, outputs, pictures and folders."""
    folder = options.work / "names"
    for label, name in (("not UTF-8", b"mod\xe9\xff l"),) if options.quick else (("not UTF-8", b"mod\xe9\xff l"), ("odd", "a 'b\" $c %s\n\u4e2d,".encode()), ("long", b"n" * 200)):
        base = folder / label.replace(" ", "")
        base.mkdir(parents=True)
        model, out = os.path.join(os.fsencode(base), name), os.path.join(os.fsencode(base), b"out " + name)
        shutil.copytree(os.fsencode(DEMO / "model"), model)
        os.mkdir(out)
        job = Job(options, base)
        run = lambda *args: subprocess.run([options.program, *args], env=job.env, capture_output=True)
        gguf = os.path.join(out, name[:150] + b".gguf")
        pictures, pairs = (os.path.join(os.fsencode(base), name + end) for end in (b"-pictures", b".json"))
        os.mkdir(pictures)
        shutil.copy(DEMO / "pictures/red-star.png", os.path.join(pictures, b"p.png"))
        open(pairs, "w").write('[{"image": "p.png", "question": "?", "answer": "A star."}]')
        for more in (["--method", "rtn", "--type", "q4_0"], ["--samples", "2", "--memory", "64M", "--image-root", pictures, "--calib", pairs]):
            done = run(model, "-o", gguf, "--quiet", *more)
            said = done.stderr.decode(errors="replace")
            found.check(done.returncode == 0, f"names {label} convert: {done.returncode} {said}")
            # What is named after it has a replacement character for what is not UTF-8.
            beside = lambda name: os.path.join(out, name.decode(errors="replace").encode())
            record = beside(os.path.basename(gguf)[:-5] + b".mbq.json")
            good = os.path.exists(record) and os.path.getsize(record) > 100
            found.check(good and json.loads(open(record, "rb").read())["method"], f"names {label}: the record is empty")
        done = run("inspect", "--verify", gguf)
        found.check(done.returncode == 0, f"names {label} inspect: {done.stderr}")
        done = run("inspect", "--json", gguf)
        found.check(done.returncode == 0 and json.loads(done.stdout.decode(errors="replace")), f"names {label} inspect --json: {done.stderr}")
        done = run(model, "-o", gguf, "--quiet", "--json", "--method", "rtn")
        found.check(done.returncode == 0, f"names {label} convert --json: {done.stderr}")
        picture = os.path.join(os.fsencode(base), name + b".png")
        shutil.copy(os.fsencode(DEMO / "pictures/red-star.png"), picture)
        done = run("chat", gguf, "--image", picture, "-p", "What is in the picture?", "--", "--temp", "0")
        found.check(done.returncode == 0 and b"star" in done.stdout, f"names {label} chat: {done.returncode} {done.stdout} {done.stderr}")
        questions = os.path.join(os.fsencode(base), name + b".jsonl")
        open(questions, "w").write('{"image": "p.png", "question": "What is in the picture?", "answer": "a red star"}\n')
        html = os.path.join(os.fsencode(base), name + b".html")
        done = run("eval", gguf, "--reference", gguf, "--data", questions, "--image-root", pictures, "--max-tokens", "4", "--mmproj",
                   beside(b"mmproj-" + name[:150] + b"-f16.gguf"), "--cache", os.path.join(os.fsencode(base), b"c" + name), "--json",
                   questions + b".json", "--html", html, "--quiet")
        found.check(done.returncode == 0, f"names {label} eval: {done.stderr}")
        done = run("bundle", gguf, "-o", os.path.join(os.fsencode(base), b"b-" + name[:100]))
        found.check(done.returncode == 0 or done.stderr.count(b"error: ") == 1, f"names {label} bundle: {done.stderr}")
        print("names:", label, "bundle:", done.stderr.decode(errors="replace").strip()[-200:])
        done = run("report", gguf, "-o", html)
        found.check(done.returncode == 0, f"names {label} report: {done.stderr}")
    # Longer than a file's name may be: told before the work, not after it.
    base = folder / "too-long"
    base.mkdir()
    job = Job(options, base)
    for length in (245, 300) if options.quick else (235, 245, 250, 255, 300):
        for more in (["--method", "rtn", "--type", "q4_0"], CALIBRATED):
            if length == 235 and more != CALIBRATED:
                continue
            code, said = job.run([DEMO / "model", "-o", base / ("n" * (length - 5) + ".gguf"), "--quiet", *more])
            found.check(code == 1 and is_clear(said, "nnnn") and not left(base), f"names of {length}: {code} {said[:300]} {len(left(base))} files")
    print("names: done", flush=True)


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) { static unsigned state = 1; state = state * 1103515245u + 12345u; return (long)(state >> 8) * 60 - 500000000L; }
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += jump();
    return r;
}
time_t time(time_t *out) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); if (out) *out = t.tv_sec; return t.tv_sec; }
int gettimeofday(struct timeval *t, void *z) { struct timespec s; clock_gettime(CLOCK_REALTIME, &s); t->tv_sec = s.tv_sec; t->tv_usec = s.tv_nsec / 1000; return 0; }
"""


@kind
def clock(options, found):
    """The system's clock jumps by years, back and forth, at every look."""
    folder = options.work / "clock"
    folder.mkdir()
    (folder / "clock.c").write_text(CLOCK)
    made = subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "clock.so", folder / "clock.c", "-ldl"]).returncode == 0
    if not made:
        return print("clock: skipped, no compiler")
    for name, args in (("default", lambda d: convert(d, *CALIBRATED)), ("eval", lambda d: evaluate(options, d))):
        want = Job(options, folder / f"whole-{name}" / "d")
        assert want.run(args(want.folder))[0] == 0
        job = Job(options, folder / f"jumps-{name}" / "d", {"LD_PRELOAD": str(folder / "clock.so")})
        code, said = job.run(args(job.folder))
        keep = lambda d: {k: v for k, v in d.items() if not k.startswith("cache")}
        found.check(code == 0 and keep(job.digests()) == keep(want.digests()), f"clock {name}: {code} {said}")
    print("clock: done", flush=True)


@kind
def long(options, found):
    """10,000 pairs of which 512 are used, prompts with 20 pictures."""
    folder = options.work / "long"
    job = Job(options, folder)
    shutil.copytree(DEMO / "eval/images", folder / "images")
    pictures = [f"images/{i % 64:03}.png" for i in range(10000)]
    pairs = [{"image": p, "question": f"What is in picture {i}?", "answer": "a red star"} for i, p in enumerate(pictures)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    used = ["--calib", folder / "pairs.json", "--samples", "512", "--set", "own-answers=off"]
    start = time.monotonic()
    child = job.start(convert(folder, *used))
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    record = json.loads((folder / "o.mbq.json").read_text())["calibration"]["settings"] if status == 0 else {}
    found.check(record.get("samples") == 512, f"long pairs: {status} {said} {record}")
    print(f"long: 10,000 pairs, {record.get('samples')} used: {time.monotonic() - start:.0f} s, {usage.ru_maxrss >> 10} MiB", flush=True)

    many = ["images/000.png", "images/001.png"] * 10
    turn = [{"role": "user", "content": "<image>" * 20 + "What is in the last picture?"}, {"role": "assistant", "content": "a blue heart"}]
    (folder / "many.json").write_text(json.dumps([{"messages": turn, "images": many}]))
    code, said = job.run(convert(folder, "--calib", folder / "many.json"))
    found.check(code == 0, f"long: an entry with 20 pictures: {code} {said}")
    asked = [a for picture in many for a in ("--image", folder / picture)]
    done = subprocess.run([options.program, "chat", folder / "o.gguf", *asked, "-p", "What is in the last picture?", "--", "--temp", "0"],
                          env=job.env, capture_output=True, stdin=subprocess.DEVNULL)
    found.check(done.returncode == 0, f"long: chat with 20 pictures: {done}")
    print(f"long: 20 pictures: {done.stdout.decode().strip()!r}", flush=True)


@kind
def questions(options, found):
    """5,000 questions, killed three times and resumed; one in ten is about a picture."""
    folder, count = options.work / "questions", 5000
    job = Job(options, folder)
    shutil.copytree(DEMO / "eval/images", folder / "images")
    lines = [json.loads(line) for line in open(DEMO / "eval/questions.jsonl")]
    data = folder / "many.jsonl"
    with open(data, "w") as out:
        for i in range(count):
            line = lines[i % len(lines)]
            line = line | {"question": f"{line['question']} ({i})", "id": str(i)}
            if i % 10:
                del line["image"]
            out.write(json.dumps(line) + "\n")
    ask = evaluate(options, folder, data=data)
    ask[ask.index("--limit") + 1] = str(count)
    few = evaluate(options, folder / "few", data=data)
    (folder / "few").mkdir()
    ask[ask.index("--max-tokens") + 1] = few[few.index("--max-tokens") + 1] = "2"
    few[few.index("--limit") + 1] = "100"
    code, said = job.run(few)
    found.check(code == 0, f"questions: {code} {said}")
    kept = lambda d: sum(f.stat().st_size for end in ("reference", "candidate") for f in (d / "cache").glob(end + "*"))
    whole, start, sizes = kept(folder / "few") * count // 100, time.monotonic(), []
    for part in (.25, .6, .96):  # the last while the candidate answers
        child = job.start(ask)
        while child.poll() is None and kept(folder) < whole * part:
            time.sleep(.2)
        found.check(child.poll() is None, f"questions: ended before the kill at {part}: {child.returncode}")
        child.kill()
        child.communicate()
        sizes.append(kept(folder) >> 10)
    child = job.start(ask)
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    report = json.loads((folder / "e.json").read_text()) if status == 0 else {}
    found.check(status == 0 and sizes == sorted(set(sizes)), f"questions: {status} {said} {sizes}")
    print(f"questions: {count}: {time.monotonic() - start:.0f} s, {usage.ru_maxrss >> 10} MiB, KiB kept at the kills: {sizes}; "
          f"keys {list(report)[:12]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moments", type=int, default=20, help="kills of each command")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cuda", metavar="RUNTIME")
    options = parser.parse_args()
    options.runtime = ["--runtime", os.path.abspath(options.cuda)] if options.cuda else []
    if options.cuda:
        CALIBRATED.extend([*options.runtime, "--device", "cuda"])
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"kinds are {', '.join(KINDS)}")
    options.program = os.path.abspath(options.program)
    with tempfile.TemporaryDirectory(prefix="mbq-faults-") as work:
        options.work = pathlib.Path(work)
        options.cache, options.models = options.work / "cache", options.work / "models"
        prepare(options)
        found = Findings()
        quick = ("kills", "disk", "reads", "memory", "signals", "names")
        for name in options.kinds or (quick if options.quick else KINDS):
            # A kind's moments do not depend on what ran before it.
            options.random = random.Random(f"{options.seed} {name}")
            start = time.monotonic()
            KINDS[name](options, found)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{found.count} checks, {len(found)} findings")
    sys.exit(bool(found))


main()
