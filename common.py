"""
What every stage shares and no stage is about: conventions, configuration, device, safe writing, progress, pictures.

Conventions (everything in this project obeys them; whatever comes in from elsewhere is converted at the door)
    world       right-handed, Z up, object centred on the origin, its bounding box's diagonal 1: it fits [-0.5, 0.5]^3
    camera      camera_to_world, 4x4, columns are the camera's axes: OpenCV's, +X right, +Y down, +Z forward
    pixel       (0, 0) is the *corner* of the top-left pixel; pixel (i, j) is seen along (i + 0.5, j + 0.5); cx = W/2
    intrinsics  3x3, in pixels; for photos at another size scale f, cx, cy by new/old and nothing else
    ray         its direction has camera z = 1, so the ray's parameter t *is* the z-depth
    photo       8-bit RGB on white; mask: 8-bit coverage; colours in [0, 1] once they are floats
    volume      (B, C, D, H, W), D = z, H = y, W = x over [-0.5, 0.5]^3, voxel centres at (i + 0.5)/N (align_corners=False)

Letters for shapes
    B objects   V views   R rays   S samples on a ray   C channels   D H W voxels (or H W pixels)   N vertices   F faces
"""
import argparse
import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class UserError(SystemExit):
    """Something that the user can mend.  Python prints its one sentence, without a traceback, and exits with status 1."""


# ---------------------------------------------------------------------------------------------------- configuration

def parse_config(Config, presets=None, argv=None):
    """The dataclass at the top of a stage is its command line:  defaults < --preset < flags.

    A field's flag has the field's name, its trailing comment is the help text, and a comment that opens with
    `a | b | c:` lists the values allowed.  Abbreviated, unknown or ill-typed flags are errors that name the flag.
    """
    presets = presets or {}
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message}  (--help lists the flags)"))
    if presets:
        parser.add_argument("--preset", choices=["auto", *presets], default="auto", help="auto: gpu where there is one")
    for field in fields(Config):
        help_text = comments.get(field.name, "")
        choices = re.match(r"([\w.]+(?: \| [\w.]+)+):", help_text)
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        if choices:
            kind["choices"] = [field.type(choice) for choice in choices[1].split(" | ")]
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                            help=f"{help_text} (default: {field.default})".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", None)
    if preset == "auto":
        preset = "gpu" if torch.cuda.is_available() else "cpu"
    return Config(**{**presets.get(preset, {}), **flags})


def pick_device(name="auto"):
    """`auto` takes CUDA where there is one.  Apple's MPS has neither float64 nor 3D grid_sample's gradient: CPU there."""
    if name == "auto":
        name, why = ("cuda", "found") if torch.cuda.is_available() else ("cpu", "no CUDA GPU found")
    else:
        why = "asked for"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {name} was asked for, but torch {torch.__version__} finds no CUDA GPU: use --device cpu")
    title = torch.cuda.get_device_name(name) if name.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"device {name} ({why}; {title})")
    return torch.device(name)


# ----------------------------------------------------------------------------------------------------- safe writing

@contextmanager
def atomic_file(path):
    """Write to the path given; the file then appears whole or not at all.  A full disk is one sentence."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}") from None


@contextmanager
def atomic_folder(path):
    """Fill the folder given; it then takes its name.  What an interruption leaves is hidden (.name.tmp), so that readers
    pass it by, and is cleared by the next try."""
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


# -------------------------------------------------------------------------------------------------------- long work

class Run:
    """What surrounds every long loop: the recipe it may not change halfway, signals that only raise a flag, progress."""

    def __init__(self, recipe_file, config, recipe):
        """recipe: the names of the config's fields that what is already on disk must agree with."""
        self.stopping, self.began, self.printed = None, time.time(), 0.0
        self.width = 0                               # of the progress line now on the screen
        wanted = {name: value for name, value in asdict(config).items() if name in recipe}
        recipe_file = Path(recipe_file)
        if recipe_file.exists():
            try:
                found = json.loads(recipe_file.read_text())
            except (OSError, ValueError):
                raise UserError(f"{recipe_file} cannot be read: delete it and what it describes, and run again") from None
            for name, value in wanted.items():
                if found.get(name) != value:
                    raise UserError(f"{recipe_file} says that what is there was made with --{name} {found.get(name)}, not "
                                    f"{value}: use the same value, another --out, or start over with --fresh")
        with atomic_file(recipe_file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1))
        if threading_main():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._stop)

    def _stop(self, number, frame):
        if self.stopping:                            # asked twice: the user means now
            raise KeyboardInterrupt
        self.stopping = signal.Signals(number).name

    def progress(self, what, done, total, start=0):
        """One line, rewritten on a terminal, repeated every ten seconds in a log file."""
        now, last = time.time(), done == total
        if not last and now - self.printed < (0.2 if sys.stdout.isatty() else 10):
            return
        self.printed, rate = now, (now - self.began) / max(done - start, 1)
        line = f"{what} {done}/{total} {100 * done // max(total, 1)}%  {rate:.2f} s each  eta {clock(rate * (total - done))}"
        if sys.stdout.isatty():
            print("\r" + line.ljust(self.width), end="\n" if last else "", flush=True)
            self.width = 0 if last else len(line)
        else:
            print(line, flush=True)

    def say(self, text):
        """A line that does not run into the progress line."""
        print(("\r" + " " * self.width + "\r" if self.width else "") + text, flush=True)
        self.width = 0


def threading_main():
    import threading                                 # signal handlers can be set by the main thread alone
    return threading.current_thread() is threading.main_thread()


def clock(seconds):
    """3700 -> 1h01m, 65 -> 1m05s, 9 -> 9s"""
    seconds = int(seconds + 0.5)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


# --------------------------------------------------------------------------------------------------------- pictures

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
