#!/usr/bin/env python3
"""Damages real inputs field by field and runs the program on each mutant: every one must end in success or a clear error.

  mutants.py PROGRAM FIXTURES [--only convert,inspect,…] [--count 1000] [--seed 1] [--jobs 2] [--log FILE] [--keep DIR]
             [--runtime DIR]

FIXTURES is a folder of checkpoints (folders with config.json) and of folders with a GGUF pair (model.gguf, mmproj*.gguf),
questions.jsonl, pairs.json and pictures; tests/bench/mutants.sh makes one. A mutant follows from seed and number alone.
Checked of every run: no signal, no panic, at most 10 s and 1 GiB resident, an error that names the damaged file, nothing left
behind. --log writes a JSON line a mutant, with whether a success changed the output; --keep keeps the mutants that fail.
"""
import argparse, json, os, random, resource, select, shutil, signal, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mutations

SECONDS, BYTES = 10, 1 << 30


class Run:
    """A finished run: status (negative for a signal), text, seconds, resident bytes."""

    def __init__(self, command, scratch, environment, until=None, seconds=SECONDS):
        self.limit, out, err = seconds, scratch / "stdout", scratch / "stderr"
        files = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
        files += [(os.POSIX_SPAWN_OPEN, n, str(p), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for n, p in [(1, out), (2, err)]]
        begin = time.monotonic()
        pid = os.posix_spawn(command[0], command, environment, file_actions=files, setpgroup=0)
        handle = os.pidfd_open(pid)
        started, ended = False, False
        while not (started or ended) and time.monotonic() - begin < seconds * 1.5:
            ended = select.select([handle], [], [], 0.05 if until else seconds * 1.5)[0]
            started = until and until in out.read_bytes()
        self.timed_out = not (started or ended)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
        os.close(handle)
        _, status, usage = os.wait4(pid, 0)
        self.seconds = time.monotonic() - begin
        self.processor = usage.ru_utime + usage.ru_stime
        self.resident = usage.ru_maxrss * 1024
        self.status = 0 if started else os.waitstatus_to_exitcode(status)
        self.error = err.read_text("utf-8", "replace")
        self.output = out.read_text("utf-8", "replace")

    def faults(self, names):
        """What is wrong with how it ended; `names` are the words of which an error must have one."""
        found = []
        if self.timed_out or self.processor > self.limit:
            found.append(f"took {self.seconds:.1f} s")
        if self.status < 0 and not self.timed_out:
            found.append(f"ended by signal {-self.status}")
        if "llama-mtmd-cli crashed" in self.error or "failed with status" in self.error and "failed with status 1 " not in self.error:
            found.append("llama-mtmd-cli crashed")
        if "panicked at" in self.error or self.status == 101:
            found.append("panicked")
        if self.resident > BYTES:
            found.append(f"took {self.resident >> 20} MiB")
        if self.status not in (0, 1) and self.status > 0:
            found.append(f"status {self.status}")
        if self.status == 1 and not any(name in self.error for name in names):
            found.append("the error names no file")
        return found


def left(folder, allowed):
    return [f"left {p.name}" for p in folder.iterdir() if p.name not in allowed]


class Campaign:
    def __init__(self, arguments):
        self.arguments = arguments
        self.fixtures = Path(arguments.fixtures)
        folders = sorted(p for p in self.fixtures.iterdir() if p.is_dir())
        self.checkpoints = [p for p in folders if (p / "config.json").is_file()]
        self.pairs = [p for p in folders if (p / "model.gguf").is_file()]
        self.asked = [p for p in self.pairs if b"tokenizer.chat_template" in (p / "model.gguf").read_bytes()[:1 << 20]]
        self.pictures = sorted(p for p in (self.fixtures / "pictures").glob("*") if p.is_file())
        self.environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
        self.environment["GGML_NO_BACKTRACE"] = "1"  # ggml would start gdb where it aborts
        self.baselines, self.lock = {}, threading.Lock()

    # Each of these makes one mutant in `dir` and returns (what, command, names, allowed output files, folder of outputs).

    def convert(self, rng, dir):
        source = rng.choice(self.checkpoints)
        model = dir / "model"
        mutations.link(source, model)
        name = mutations.pick_file(rng, source)
        what = mutations.mutate_file(rng, source / name, model / name)
        out = dir / "out"
        out.mkdir()
        command = [str(model), "-o", str(out / "o.gguf"), "--method", "rtn", "--type", "q4_0"]
        return f"{source.name}/{name}: {what}", command, [name, "model", *mutations.relatives(name)], out

    def gguf(self, rng, dir, types=(".gguf",)):
        source = rng.choice(self.pairs)
        model = dir / "model"
        mutations.link(source, model)
        names = [p.name for p in source.iterdir() if p.name.endswith(types)]
        name = rng.choice(sorted(names))
        what = mutations.mutate_file(rng, source / name, model / name)
        out = dir / "out"
        out.mkdir()
        return f"{source.name}/{name}: {what}", model, name, out

    def mmproj(self, model):
        return next(str(p) for p in sorted(model.iterdir()) if p.name.startswith("mmproj"))

    def inspect(self, rng, dir):
        what, model, name, out = self.gguf(rng, dir, (".gguf", ".mbq.json"))
        file = name if name.endswith(".gguf") else "model.gguf"
        more = rng.choice([["--verify"], ["--json"], ["--verify", "--json"], ["--tensors"]])
        return what, ["inspect", str(model / file), *more], [name, "model.gguf", self.mmproj(model).rsplit("/", 1)[1]], out

    def requantize(self, rng, dir):
        what, model, name, out = self.gguf(rng, dir)
        command = [str(model / "model.gguf"), "--mmproj", self.mmproj(model), "-o", str(out / "o.gguf"), "--method", "rtn"]
        return what, command + ["--type", "q4_0", "-q"], [name, "model.gguf"], out

    def picture(self, rng, dir):
        source = rng.choice(self.pictures)
        damaged = dir / source.name
        return source, damaged, mutations.mutate_file(rng, source, damaged)

    def chat(self, rng, dir):
        if rng.random() < 0.25:
            source, damaged, what = self.picture(rng, dir)
            model, picture, names = rng.choice(self.asked), damaged, [source.name]
            out = dir / "out"
            out.mkdir()
            what = f"{source.name}: {what}"
        else:
            what, model, name, out = self.gguf(rng, dir)
            picture, names = self.pictures[0], [name, "model.gguf"]
        command = ["chat", str(model / "model.gguf"), "--image", str(picture), "-p", "What is this?", "--mmproj", self.mmproj(model)]
        return what, command + ["--", "-n", "2", "-t", "1", "-c", "2048", "--no-warmup"], names, out

    def eval(self, rng, dir):
        kind = rng.random()
        if kind < 0.3:
            model = rng.choice(self.asked)
            out = dir / "out"
            out.mkdir()
            data, source = dir / "questions.jsonl", self.fixtures / "questions.jsonl"
            what, names = "questions.jsonl: " + mutations.mutate_file(rng, source, data), ["questions.jsonl", "question line", *(p.name for p in self.pictures)]
        elif kind < 0.5:
            model = rng.choice(self.asked)
            out = dir / "out"
            out.mkdir()
            source, damaged, what = self.picture(rng, dir)
            data = dir / "questions.jsonl"
            data.write_text(json.dumps({"image": source.name, "question": "What is this?", "answer": "a star"}))
            what, names = f"{source.name}: {what}", [source.name]
        else:
            what, model, name, out = self.gguf(rng, dir)
            data, names = self.fixtures / "questions.jsonl", [name, "model.gguf"]
        source = model / "model.gguf"
        command = ["eval", str(source), "--reference", str(source), "--mmproj", self.mmproj(model), "--data", str(data), "--limit", "2"]
        if data.parent == dir and kind < 0.3:
            command += ["--image-root", str(self.fixtures / "pictures")]
        elif kind >= 0.5:
            command += ["--image-root", str(self.fixtures / "pictures")]
        command += ["--max-tokens", "2", "--resamples", "10", "--threads", "1", "--cache", str(dir / "cache"), "--json", str(out / "e.json"), "-q"]
        return what, command, names, out

    def serve(self, rng, dir):
        """Start-up alone: what says its address is stopped."""
        what, model, name, out = self.gguf(rng, dir)
        command = ["serve", str(model / "model.gguf"), "--mmproj", self.mmproj(model), "--no-browser", "--threads", "1", "--slots", "1", "--port", "0"]
        return what, command + ["--context", "512"], [name, "model.gguf"], out

    def calibrate(self, rng, dir):
        source = next(p for p in self.checkpoints if p.name.startswith("demo"))
        out = dir / "out"
        out.mkdir()
        pairs = dir / "pairs.json"
        if rng.random() < 0.7:
            model, names = source, ["pairs.json", "picture"]
            what = "pairs.json: " + mutations.mutate_file(rng, self.fixtures / "pairs.json", pairs)
        else:
            model = dir / "model"
            mutations.link(source, model)
            name = rng.choice(["chat_template.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"])
            what, names = f"{source.name}/{name}: " + mutations.mutate_file(rng, source / name, model / name), [name, "model"]
            shutil.copy(self.fixtures / "pairs.json", pairs)
        command = [str(model), "-o", str(out / "o.gguf"), "--type", "q4_0", "-q", "--calib", str(pairs), "--samples", "2"]
        return what, command + ["--image-root", str(self.fixtures)], names, out

    def publish(self, rng, dir):
        what, model, name, out = self.gguf(rng, dir, (".gguf", ".mbq.json", "eval.json"))
        command = [rng.choice(["card", "report"]), str(model / "model.gguf"), "-o", str(out / "page")]
        if (model / "eval.json").exists() and (name == "eval.json" or rng.random() < 0.3):
            command += ["--eval", str(model / "eval.json")]
        return what, command, [name, "model.gguf"], out

    def one(self, kind, number):
        rng = random.Random(f"{self.arguments.seed} {kind} {number}")
        dir = Path(tempfile.mkdtemp(prefix="mutant-", dir=self.arguments.scratch))
        try:
            what, command, names, out = getattr(self, kind)(rng, dir)
            runtime = ["--runtime", self.arguments.runtime] if self.arguments.runtime else []
            temporary = dir / "tmp"
            temporary.mkdir()
            run = Run([self.arguments.program, command[0], *runtime, *command[1:]], dir, self.environment | {"TMPDIR": str(temporary)},
                      b"http://" if kind == "serve" else None, 120 if kind == "calibrate" else SECONDS)
            faults = run.faults(names)
            outputs = {"o.gguf", "mmproj-o-f16.gguf", "mmproj-o-f32.gguf", "mmproj-o.gguf", "o.mbq.json", "e.json", "page"}
            faults += left(out, outputs if run.status == 0 else set()) + left(temporary, set())
            line = {"kind": kind, "number": number, "what": what, "status": run.status, "faults": faults,
                    "seconds": round(run.seconds, 2), "mib": run.resident >> 20, "error": run.error[-600:]}
            if run.status == 0:
                line["digest"] = mutations.digest(out)
            if faults and self.arguments.keep:
                kept = Path(self.arguments.keep) / f"{kind}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(dir, kept)
                (kept / "command").write_text(" ".join(command) + "\n" + what + "\n")
            return line
        finally:
            shutil.rmtree(dir, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("fixtures")
    parser.add_argument("--only", default="convert,inspect,requantize,chat,eval,serve,calibrate,publish")
    parser.add_argument("--count", type=int, default=100, help="mutants of each kind")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--log")
    parser.add_argument("--keep")
    parser.add_argument("--runtime")
    parser.add_argument("--scratch", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    arguments = parser.parse_args()
    campaign = Campaign(arguments)
    if not arguments.runtime:  # A limit for accidents, which the children inherit; sanitizers need more addresses.
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    log = open(arguments.log, "a") if arguments.log else None
    begin, failed = time.monotonic(), 0
    for kind in arguments.only.split(","):
        tally = {}
        with ThreadPoolExecutor(arguments.jobs) as pool:
            numbers = range(arguments.first, arguments.first + arguments.count)
            for line in pool.map(lambda n: campaign.one(kind, n), numbers):
                end = "success" if line["status"] == 0 else "error"
                tally[end] = tally.get(end, 0) + 1
                if line["faults"]:
                    failed += 1
                    print(f"{kind} {line['number']}: {', '.join(line['faults'])}: {line['what']}: {line['error'][-300:].strip()}")
                if log:
                    log.write(json.dumps(line) + "\n")
        print(f"{kind}: {arguments.count} mutants, {tally}, {time.monotonic() - begin:.0f} s")
    print(f"{failed} findings")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
