"""
Does a kill -9 at any moment cost more than time?  All stages, the viewer and the lab each run once
undisturbed, and once killed at twenty random moments and started again by the same command; then what they
wrote (of stages 1 and 2 the checkpoint) is compared, bit for bit.  Not a test of CI: it takes a while.

    python tests/kill.py                 20 kills of each, and what came of them
    python tests/kill.py --times 5
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import UserError, load_checkpoint, parse_config


@dataclass
class Config:
    times: int = 20                      # kills of each stage
    seed: int = 0                        # of the moments


def start(command, log):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(command, log):
    """-> seconds it took"""
    began = time.time()
    if start(command, log).wait():
        raise UserError(f"{' '.join(command)} failed: see {log.name}")
    return time.time() - began


def same(a, b):
    """Tensors, numbers, strings, and dicts and lists of them: equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def same_files(a, b):
    files = lambda folder: {path.relative_to(folder): path for path in folder.rglob("*")
                            if path.is_file() and not path.name.startswith(".")}
    ours, theirs = files(a), files(b)
    content = lambda path, folder: path.read_bytes().replace(str(folder).encode(), b"OUT")   # configs name it
    return ours.keys() == theirs.keys() and all(content(ours[name], a) == content(theirs[name], b)
                                                for name in ours)


def same_checkpoints(a, b):
    a, b = load_checkpoint(a / "last.pt"), load_checkpoint(b / "last.pt")
    for state in (a, b):
        state["config"].pop("out")
    return same(a, b)


def main(argv=None):
    config = parse_config(Config, argv=argv)
    moments = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder, log = Path(folder), open(Path(tempfile.gettempdir(), "kill.log"), "w")
        small = ["--preset", "smoke", "--device", "cpu", "--preview_every", "100", "--save_every", "5"]
        trained = ["--diffusion", str(folder / "2_whole"), "--device", "cpu"]
        stages = {
            "0": (same_files, lambda out: ["render_shapenet.py", "--out", out, "--objects", "40",
                                           "--test_objects", "2", "--device", "cpu"]),
            "1": (same_checkpoints, lambda out: ["autodecoder.py", *small, "--steps", "400", "--out", out,
                                                 "--data", str(folder / "0_whole/earphones_train")]),
            "2": (same_checkpoints, lambda out: ["diffusion.py", *small, "--steps", "600", "--out", out,
                                                 "--autodecoder", str(folder / "1_whole")]),
            "3": (same_files, lambda out: ["sample.py", *trained, "--count", "2", "--views", "4",
                                           "--size", "32", "--out", out]),
            "viewer": (same_files, lambda out: ["-m", "viewer.export", *trained, "--count", "2", "--level",
                                                "1", "--sheet", "4", "--frames", "4", "--out", out]),
            "lab": (same_files, lambda out: ["-m", "lab.evaluate", "--preset", "smoke", *trained,
                                             "--cache", out + "/cache", "--out", out])}
        for stage, (equal, command) in stages.items():
            whole, killed = folder / f"{stage}_whole", folder / f"{stage}_killed"
            seconds, died = finish(command(str(whole)), log), 0
            while died < config.times:
                # Late enough to have begun, early enough that twenty fit in: a run spends seconds on imports
                process = start(command(str(killed)), log)
                try:
                    if process.wait(moments.uniform(0.5, 5 + seconds / config.times)):
                        raise UserError(f"stage {stage} failed after its kill {died}: see {log.name}")
                    print(f"stage {stage} was done before its kill {died + 1}: beginning again")
                    subprocess.run(["rm", "-rf", killed], check=True)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    died += 1
            finish(command(str(killed)), log)
            verdict = "equal" if equal(whole, killed) else "DIFFERENT"
            print(f"stage {stage}: {seconds:.0f} s undisturbed; killed {died} times and resumed: {verdict}",
                  flush=True)


if __name__ == "__main__":
    main()
