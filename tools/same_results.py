"""Does this working tree compute what an older commit computes? Both run the same commands; their files are compared.

    python tools/same_results.py [--base COMMIT] [--cases lora,check] [--no_text] [--self_test]

The commands of CASES train a tiny SDXL with all kinds of options and call the other commands on the results. Every file
they leave is compared: tensors bit for bit, JSON, YAML and TensorBoard's logs value by value, all else line by line or
byte by byte. What may differ is in IGNORED and TEXT of same_files.py, what was renamed in its RENAMED. The results of a
commit are kept in --work.
Both sides run in one folder, one after the other, so paths are equal. Exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from same_cases import CASES, PROCESSES, TRAIN, write_inputs
from same_files import differences, self_test

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "pillow", "tensorboard")
PRELOADED = (*PACKAGES[:6], "numpy", "PIL.Image", "tensorboard", "torch.utils.tensorboard", "tyro", "pyarrow.parquet")
"""Loaded once per side, before a process is forked for each command; no part of lpl is among them."""
SHOWN = 10
"""Maximum number of files per case whose first difference is printed."""
TRAINING = ("train", "cache", "check", "compare", "data")
UNKNOWN = ("error: unknown option", "error: unknown command")


def expand(case: str, line: str) -> list[str]:
    """The words of a command; TRAIN's come first where it takes the options of training."""
    command, *words = shlex.split(line.format(out=f"{case}/out", case=case))
    if command not in TRAINING or words[:1] in (["verify"], ["prune"]):
        return [command, *words]
    given = {word.split("=")[0] for word in words}
    common = [*TRAIN, f"--output_dir={case}/out", f"--latent_cache_dir={case}/cache"]
    return [command, *(word for word in common if word.split("=")[0] not in given), *words]


def run_command(argv: list[str], log: Path, environment: dict[str, str]) -> int:
    """Forks a process for `python -m lpl ARGV`, which writes to LOG.stdout and LOG.stderr; returns its process id."""
    child = os.fork()
    if child:
        return child
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    sys.argv = ["lpl", *argv]
    runpy.run_module("lpl", run_name="__main__", alter_sys=True)
    sys.exit(0)


def run_case(case: str) -> None:
    """Runs the commands of a case one after the other and writes their exit codes to CASE/exit.json."""
    folder = Path(case)
    folder.mkdir()
    codes = []
    for number, line in enumerate(CASES[case]):
        processes = PROCESSES if line.startswith(f"{PROCESSES}x ") else 1
        argv = expand(case, line.removeprefix(f"{PROCESSES}x "))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = []
        for rank in range(processes):
            own = {} if processes == 1 else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(run_command(argv, folder / f"{number}-{argv[0]}{f'-{rank}' if rank else ''}", own))
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    (folder / "exit.json").write_text(f"{codes}\n")


def run_cases(cases: list[str], jobs: int) -> None:
    """Runs cases in the current folder, `jobs` at a time, each in its own process."""
    for name in PRELOADED:
        __import__(name)
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  (loads what is lazy)

    waiting, running = list(cases), set[int]()
    while waiting or running:
        if waiting and len(running) < jobs:
            case = waiting.pop(0)
            child = os.fork()
            if not child:
                run_case(case)
                os._exit(0)
            running.add(child)
        else:
            child, status = os.wait()
            running.remove(child)
            if status:
                sys.exit("a case could not be run")


def run_side(source: Path, inputs: Path, work: Path, cases: list[str], jobs: int) -> Path:
    """Runs cases with the lpl in SOURCE; returns the folder with their results."""
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder / "inputs")
    environment = os.environ | {
        "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "ACCELERATE_USE_CPU": "true",
        "HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home"), "HF_HOME": str(folder / "home/hf"),
        "COLUMNS": "120", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    started = time.monotonic()
    command = [sys.executable, __file__, "--side", ",".join(cases), "--jobs", str(jobs)]
    log = work / "run.log"
    with log.open("w") as file:
        if subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file).returncode:
            sys.exit(f"{source}: the cases did not run: see {log}")
    print(f"{source}: {len(cases)} cases in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def git(*argv: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *argv], check=True, capture_output=True, text=True
    ).stdout.strip()


def write_archive(commit: str, folder: Path) -> None:
    """Writes src of a commit to a folder."""
    archive = subprocess.run(["git", "-C", str(REPOSITORY), "archive", commit, "src"], check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def results_of(commit: str, inputs: Path, work: Path, cases: list[str], jobs: int) -> Path:
    """The folder with the results of a commit; only cases that it lacks are run."""
    kept = work / commit
    missing = [case for case in cases if not (kept / case).is_dir()]
    if missing:
        with tempfile.TemporaryDirectory() as source:
            write_archive(commit, Path(source))
            found = run_side(Path(source) / "src", inputs, work, missing, jobs)
        kept.mkdir(exist_ok=True)
        for case in missing:
            (found / case).rename(kept / case)
    return kept


def lacks(case: Path) -> str | None:
    """The error where a commit did not know an option or command; None where it knew all."""
    for log in sorted(case.glob("*.stderr")):
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(UNKNOWN):
                return line
    return None


def compare(older: Path, newer: Path, cases: list[str], text: bool) -> bool:
    """Prints what differs; returns whether nothing does."""
    equal, compared = True, 0
    for case in cases:
        unknown = lacks(older / case)
        if unknown is not None:
            print(f"{case}: skipped: the older commit says {unknown!r}")
            continue
        found, number = differences(older / case, newer / case, text)
        compared += number
        equal &= not found
        files = list(dict.fromkeys(item.file for item in found))
        for file in files[:SHOWN]:
            first, *more = (item for item in found if item.file == file)
            print(f"{case}: {file}: {first.key}: {first.what}" + (f" (and {len(more)} more)" if more else ""))
        if len(files) > SHOWN:
            print(f"{case}: ... and {len(files) - SHOWN} more files")
    print(f"{'equal' if equal else 'DIFFERENT'}: {compared:,} files in {len(cases)} cases")
    return equal


def default_base() -> str:
    """Where this branch left main; on main, the commit before."""
    base, head = git("merge-base", "HEAD", "main"), git("rev-parse", "HEAD")
    return "HEAD~1" if base == head else base


def work_folder(root: Path) -> Path:
    """A folder of results for these cases and these versions of packages."""
    key = hashlib.sha256()
    key.update(Path(__file__).with_name("same_cases.py").read_bytes())
    for package in PACKAGES:
        key.update(metadata.version(package).encode())
    folder = root / key.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the older commit; unset: where this branch left main, on main HEAD~1")
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, separated by commas")
    parser.add_argument("--no_text", dest="text", action="store_false", help="leave out what commands print, and pages")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lpl-same-results")
    parser.add_argument("--self_test", action="store_true", help="change a value of each kind of file: is it seen?")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_cases(options.side.split(","), options.jobs)
        return
    if options.self_test:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(0 if self_test(Path(folder)) else 1)
    cases = options.cases.split(",")
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        parser.error(f"--cases {unknown[0]}: there are {', '.join(CASES)}")
    commit = git("rev-parse", "--verify", f"{options.base or default_base()}^{{commit}}")
    work = work_folder(options.work)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run of this tool in {work}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        inputs = work / "inputs"
        if not inputs.is_dir():
            made = Path(tempfile.mkdtemp(dir=work))
            write_inputs(made, REPOSITORY)
            made.rename(inputs)
        older = results_of(commit, inputs, work, cases, options.jobs)
        newer = run_side(REPOSITORY / "src", inputs, work, cases, options.jobs)
        sys.exit(0 if compare(older, newer, cases, options.text) else 1)


if __name__ == "__main__":
    main()
