"""
What every stage shares and no stage is about: conventions, configuration, device, safe writing, progress,
pictures.

Conventions (everything in this project obeys them; whatever comes in from elsewhere is converted at the door)
    world       right-handed, Z up, object centred on the origin, its bounding box's diagonal 1: it fits in
                [-0.5, 0.5]^3
    camera      camera_to_world, 4x4, columns are the camera's axes: OpenCV's, +X right, +Y down, +Z forward
    pixel       (0, 0) is the *corner* of the top-left pixel; pixel (i, j) is seen along (i + 0.5, j + 0.5);
                cx = W/2
    intrinsics  3x3, in pixels; for photos at another size scale f, cx, cy by new/old and nothing else
    ray         its direction has camera z = 1, so the ray's parameter t *is* the z-depth
    photo       8-bit RGB on white; mask: 8-bit coverage; colours in [0, 1] once they are floats
    volume      (B, C, D, H, W), D = z, H = y, W = x over [-0.5, 0.5]^3, voxel centres at (i + 0.5)/N
                (align_corners=False)

Letters for shapes
    B objects   V views   R rays   S samples on a ray   C channels
    D H W voxels (or H W pixels)   N vertices   F faces

read parse_config, atomic_file, Run, load_checkpoint.
"""
import argparse
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class UserError(SystemExit):
    """Something that the user can mend.  Python prints its one sentence, without a traceback,
    and exits with status 1."""


# ---------------------------------------------------------------------------------------------- configuration

def parse_config(Config, presets=None, argv=None):
    """The dataclass at the top of a stage is its command line:  defaults < --preset < flags.

    A field's flag has the field's name, its trailing comment is the help text, and a comment that
    opens with `a | b | c:` lists the values allowed.  Abbreviated, unknown or ill-typed flags are
    errors that name the flag.
    """
    presets = presets or {}
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = wrong_flag
    if presets:
        parser.add_argument("--preset", choices=["auto", *presets], default="auto",
                            help="sets of values for the flags below; auto: gpu where there is one, else cpu")
    for field in fields(Config):
        help_text = comments.get(field.name, "")
        choices = re.match(r"([\w.]+(?: \| [\w.]+)+): *", help_text)
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        if field.type is tuple:                                   # a pair of numbers: --interpolate 3 5
            kind = {"type": int, "nargs": 2}
        if choices:
            kind["choices"] = [field.type(choice) for choice in choices[1].split(" | ")]
            help_text = help_text[choices.end():]                 # argparse lists them
        default = "" if field.default in ("", ()) else f" (default: {field.default})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                            help=f"{help_text}{default}".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", None)
    if preset == "auto":
        preset = "gpu" if torch.cuda.is_available() else "cpu"
        if presets.get("gpu") and preset == "gpu":
            print("preset gpu, as there is one; the README's numbers are those of --preset cpu")
    return Config(**{**presets.get(preset, {}), **flags})


def at_least(config, **least):
    """at_least(config, steps=1): a smaller --steps is one sentence"""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"--{name} {getattr(config, name)}: at least {value} is wanted")


def widths_of(channels):
    """The flag --channels: "64,32" -> [64, 32]"""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", channels):
        raise UserError(f"--channels {channels}: numbers with commas between them are wanted, as 64,32")
    return [int(width) for width in channels.split(",")]


def wrong_flag(message):
    """In argparse's place, which would print the usage of every flag before its one sentence."""
    raise UserError(f"{message}  (--help lists the flags)")


def pick_device(name="auto"):
    """`auto` takes CUDA where there is one.  Apple's MPS has neither float64 nor 3D
    grid_sample's gradient: CPU there."""
    if name == "auto":
        name, why = ("cuda", "found") if torch.cuda.is_available() else ("cpu", "no CUDA GPU found")
    else:
        why = "asked for"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UserError(f"--device {name}: auto, cpu or cuda (or cuda:1, ...) is wanted")
        if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name} was asked for, but torch {torch.__version__} finds no such "
                            "GPU: use --device cpu")
    cuda = name.startswith("cuda")
    title = torch.cuda.get_device_name(name) if cuda else f"{torch.get_num_threads()} threads"
    print(f"device {name} ({why}; {title})")
    return torch.device(name)


# ----------------------------------------------------------------------------------------------- safe writing

@contextmanager
def atomic_file(path):
    """Write to the path given; the file then appears whole or not at all.  A full disk is one sentence."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:        # (+: Windows syncs only what it may write)
            os.fsync(file.fileno())                 # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}") from None


@contextmanager
def atomic_folder(path):
    """Fill the folder given; it then takes its name.  What an interruption leaves is hidden (.name.tmp), so
    that readers pass it by, and is cleared by the next try."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- long work

class Run:
    """What surrounds every long loop: the recipe that may not change halfway, checkpoints, resume, signals
    that only raise a flag, the guard against NaN, log.jsonl and the progress line."""

    def __init__(self, folder, config, recipe, name="config.json", stale=()):
        """recipe: the names of the config's fields that whatever is in the folder already must agree with;
        stale: what to throw away first, for --fresh."""
        self.folder, self.config, self.stopping = Path(folder), asdict(config), None
        self.began, self.first, self.printed, self.width = time.time(), {}, 0.0, 0       # the progress line's
        self.bad, self.skipped = 0, 0                                                    # the guard's
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")   # names that it cannot show must not end a run
        self._lock(f".{name}.lock")
        remove(*stale)
        self._check(self.folder / name, {key: self.config[key] for key in recipe})

    def _lock(self, name):
        """One run a folder.  The lock goes with its process, however that dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / name, "w")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error}") from None
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:                                     # Windows: no such lock
            pass
        except OSError:
            raise UserError(f"another run is writing to {self.folder} now: "
                            "wait for it, or use another --out") from None

    def _check(self, file, wanted):
        """The recipe that the folder was begun with, against today's."""
        if file.exists():
            try:
                found = dict(json.loads(file.read_text()))
            except (OSError, ValueError, TypeError):
                raise UserError(f"{file} cannot be read: delete it and what it describes, "
                                "and run again") from None
            if len(found.keys() & wanted.keys()) < len(wanted) / 2:        # a few names all stages share
                raise UserError(f"{self.folder} holds another stage's run: use another --out")
            for field, value in wanted.items():
                if found.get(field, value) != value:
                    named = ["(none)" if some == "" else some for some in (found[field], value)]
                    anew = "start over with --fresh" if "fresh" in self.config else f"delete {self.folder}"
                    raise UserError(f"{file} says that what is there was made with --{field} "
                                    f"{named[0]}, not {named[1]}: use the same value or another folder, or "
                                    + anew)
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1))

    def __enter__(self):
        """Around the loop alone: Ctrl-C and SIGTERM only set `stopping`, which the loop
        looks at when it is safe to."""
        self.before = {}
        if threading.current_thread() is threading.main_thread():     # no other can set handlers
            self.before = {number: signal.signal(number, self._stop)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.lock.close()

    def _stop(self, number, frame):
        if self.stopping:                            # asked twice: the user means now
            raise UserError("stopped at once; the same command goes on from what is saved")
        self.stopping = signal.Signals(number).name

    def save(self, state):
        """last.pt, written beside, read back, then renamed; the one before stays as previous.pt.  At any
        moment one of the two is whole.  It holds tensors, numbers, strings, lists and dicts alone:
        torch.load's safe default reads it."""
        last = self.folder / "last.pt"
        content = io.BytesIO()                    # torch.save itself answers a full disk with a C++ assertion
        torch.save(state, content)
        with atomic_file(last) as temporary:
            temporary.write_bytes(content.getbuffer())
            damaged = zipfile.ZipFile(temporary).testzip()      # a checkpoint is a zip: a CRC for each member
            if damaged:
                raise OSError(f"{damaged} does not read back as written")
            if last.exists():
                os.replace(last, self.folder / "previous.pt")

    def load(self):
        """The state saved last, or the one before where that is damaged, or None."""
        files = [file for file in (self.folder / "last.pt", self.folder / "previous.pt") if file.exists()]
        for file in files:
            try:
                return load_checkpoint(file)
            except UserError as error:
                more = "; going on from previous.pt, the one before" if file != files[-1] else ""
                self.say(f"!! {error}{more}")
        if files:
            raise UserError(f"no checkpoint in {self.folder} can be read: start over with --fresh")
        return None

    def finite(self, step, value):
        """False for a step to leave out because its loss or gradient is not finite; the
        third in a row ends the run."""
        if math.isfinite(value):
            self.bad = 0
            return True
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        self.say(f"!! step {step}: the loss is not finite: step left out, {self.skipped} so far")
        if self.bad == 3:
            raise UserError(f"the loss was not finite three times in a row, at step {step}; what was saved "
                            f"in {self.folder} is intact: lower the learning rate and use another --out, or "
                            "go on from there by the same command")
        return False

    def log(self, step, steps, show=True, **numbers):
        """A line of log.jsonl, and the same numbers on the progress line."""
        with open(self.folder / "log.jsonl", "a") as file:
            seconds = round(time.time() - self.began, 1)
            file.write(json.dumps({"step": step, **numbers, "seconds": seconds}) + "\n")
        if show:
            text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            self.progress("step", step, steps, text)

    def progress(self, what, done, total, numbers=""):
        """One line, rewritten on a terminal, repeated every ten seconds in a log file."""
        now, last = time.time(), done == total
        if what not in self.first:                                   # resumed: the first steps are not of now
            self.first[what] = (now, done) if done or self.first else (self.began, 0)
        rate = (now - self.first[what][0]) / max(done - self.first[what][1], 1)
        if not last and (not rate or now - self.printed < (0.2 if sys.stdout.isatty() else 10)):
            return
        self.printed = now
        percent, eta = 100 * done // max(total, 1), clock(rate * (total - done))
        line = f"{what} {done}/{total} {percent}%  {numbers}  {rate:.2f} s each  eta {eta}"
        if sys.stdout.isatty():
            print("\r" + line.ljust(self.width), end="\n" if last else "", flush=True)
            self.width = 0 if last else len(line)
        else:
            print(line, flush=True)

    def say(self, text):
        """A line that does not run into the progress line."""
        print(("\r" + " " * self.width + "\r" if self.width else "") + text, flush=True)
        self.width = 0


# What a file that is no longer whole makes zipfile, pickle and torch raise
DAMAGE = (OSError, ValueError, RuntimeError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile,
          pickle.UnpicklingError, zlib.error)


def load_checkpoint(file):
    """What Run.save wrote, verified, on the CPU."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} is not there") from None
    except DAMAGE as error:
        why = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged and cannot be read ({why})") from None


def load_stage(folder, what, script, key):
    """What an earlier stage saved in its folder; `key` is in no other stage's"""
    file = Path(folder) / "last.pt"
    if not file.exists():
        raise UserError(f"this needs {what}, and {file} is not there. Run: python {script}")
    state = load_checkpoint(file)
    if key not in state:
        raise UserError(f"this needs {what}, and {file} holds something else: another folder is wanted, of "
                        f"what python {script} made")
    return state


def clock(seconds):
    """3700 -> 1h01m, 65 -> 1m05s, 9 -> 9s"""
    seconds = int(seconds + 0.5)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def remove(*paths):
    """For --fresh: files and folders, if they are there."""
    for path in paths:
        try:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--fresh: cannot remove {path}: {error}") from None


# --------------------------------------------------------------------------------------------------- pictures

def decode(image, mode):
    """A PIL image as 8 bits a channel in `mode`.  Pillow itself would clip 16-bit greys to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def to_bytes(picture):
    """A picture in [0, 1], or a little outside, as 8 bits"""
    return (picture.clamp(0, 1) * 255).round().byte()


def grid(pictures, columns, gap=2):
    """Pictures (N,H,W,3) uint8, a tensor or array -> one array, `columns` to a row, white between them."""
    pictures = np.asarray(pictures)
    number, height, width, _ = pictures.shape
    rows = -(-number // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for k, picture in enumerate(pictures):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        sheet[y:y + height, x:x + width] = picture
    return sheet


def save_picture(path, picture):
    with atomic_file(path) as temporary:
        Image.fromarray(np.asarray(picture)).save(temporary, format="PNG", optimize=True)


def new_figure(*arguments, **options):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*arguments, layout="constrained", **options)


def save_figure(figure, path):
    import matplotlib.pyplot as plt
    figure.canvas.draw()
    save_picture(path, np.asarray(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)


def plot_log(folder, ylabel, **labels):
    """log.jsonl -> curve.png: the numbers that labels name, where they were logged"""
    rows = []
    for line in open(Path(folder) / "log.jsonl"):
        with suppress(ValueError):                    # a line that a kill cut off in the middle
            rows.append(json.loads(line))
    figure, axis = new_figure(figsize=(6, 3.5))
    for key, label in labels.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            often = len(points) > 50
            axis.plot(*zip(*points), lw=0.7 if often else 1.5, marker="" if often else "o", ms=3, label=label)
    axis.set(xlabel="step", ylabel=ylabel)
    axis.legend()
    save_figure(figure, Path(folder) / "curve.png")
