"""
What all stages share: conventions, configuration, device, cameras, safe writing, progress, pictures.

Conventions (everything in this project obeys them; data from elsewhere is converted where it is read)
    world       right-handed, Z up, object centred on 0, its bounding box's diagonal 1: inside [-0.5, 0.5]^3
    camera      camera_to_world, 4x4 (a "pose"); its columns are OpenCV's axes: +X right, +Y down, +Z forward
    pixel       (0, 0) is the top-left *corner*; pixel (i, j) is seen along (i + 0.5, j + 0.5); cx = W/2
    intrinsics  3x3, in pixels; for photos at another size scale f, cx, cy by new/old and nothing else
    ray         its direction has camera z = 1, so the ray's parameter t *is* the z-depth
    photo       8-bit RGB on white; mask: 8-bit coverage; colours in [0, 1] once they are floats
    volume      (B,C,D,H,W), D H W = z y x over [-0.5, 0.5]^3, voxel centres (i + 0.5)/N (align_corners=False)
    shapes      B objects, V views, R rays, S samples on a ray, C channels, D H W voxels (or H W pixels),
                N vertices, F faces

read parse_config, camera_to_world_at, Run; the rest when you need it.
"""
import sys
STOPPED = "stopped; what was written before is kept"
sys.excepthook = lambda kind, error, trace: (print(STOPPED, file=sys.stderr) if kind is KeyboardInterrupt
                                             else sys.__excepthook__(kind, error, trace))
# That came first: Ctrl-C is one line also in the seconds that these imports take
import argparse
import copy
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

class UserError(SystemExit):
    """A mistake that the user can mend.  Python prints its one sentence, without a traceback."""
    def __init__(self, message):
        super().__init__(plain(message))

def plain(text):
    """What cannot be printed is written out, because the names of files may hold anything"""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))

# ---------------------------------------------------------------------------------------------- configuration
def parse_config(Config, presets=None, argv=None):
    """The dataclass at the top of a stage is its command line: defaults < --preset < flags.  Each field is a
    flag.  Its trailing comment is the help text, and says what is allowed (see `checked`)."""
    presets, comments = presets or {}, comments_of(Config)
    with suppress(AttributeError):        # names that a terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    # argparse itself would guess what a shortened flag means, and print the usage of all flags at each error
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = wrong_flag
    if presets:
        parser.add_argument("--preset", choices=["auto", *presets], default="auto",
                            help="sets of values for the flags below; auto: gpu where there is one, else cpu")
    # One flag for each field.  SUPPRESS: a default that argparse filled in would overwrite the preset's value
    for field in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        if field.type is tuple:          # several numbers, as --channels 64 32, of the first one's type
            kind = {"type": type((*field.default, 0)[0]), "nargs": "+"}
        default = "" if field.default in ("", ()) else f" (default: {field.default})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                            help=(comments.get(field.name, "") + default).replace("%", "%%"))
    # --shape-of and --shape_of are the same flag
    dashed = lambda word: re.sub(r"^--(?!no-)[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word)
    flags = vars(parser.parse_args(list(map(dashed, sys.argv[1:] if argv is None else argv))))
    # A preset is a named set of values.  In a dict the later entry wins, so flags overwrite the preset
    preset = flags.pop("preset", None)
    if preset == "auto":
        preset = "gpu" if torch.cuda.is_available() else "cpu"
        if presets.get("gpu") and preset == "gpu":
            print("preset gpu, because there is a GPU; the README's numbers are those of --preset cpu")
    # A value that makes no sense is refused now, by its flag's name, and not by a traceback hours later
    config = checked(Config(**{**presets.get(preset, {}), **flags}))
    # If memory runs out, it names them: those of the command itself, not of a stage that it calls
    command.knobs = command.knobs or asdict(config)
    return config

def wrong_flag(message):
    raise UserError(f"{message}  (--help lists the flags)")

def comments_of(Config):
    """Field -> comment, from the source.  A chapter's Config inherits fields, so its parents are read too"""
    sources = [inspect.getsource(parent) for parent in reversed(Config.__mro__[:-1])]
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", "\n".join(sources), re.M))

def checked(config, where=""):
    """The config, if each value has its field's type and is what its comment allows: `edm | ddpm:`, (at least
    1), (from -9 to 9).  Where a comment says nothing, no number may be negative or absurd."""
    comments = comments_of(type(config))
    for field in fields(config):
        comment, kind, values = comments.get(field.name, ""), field.type, [getattr(config, field.name)]
        if kind is tuple and isinstance(values[0], (list, tuple)):       # each of its numbers is looked at
            kind = type((*field.default, 0)[0])
            values = values[0] or [None] * len(field.default[:1])          # it is empty: is that allowed?
        choices = re.match(r"([\w.]+(?: \| [\w.]+)+):", comment)
        found = re.search(r"\((?:at least|from) (-?[\d.]+)(?: to (-?[\d.]+))?\)", comment)
        most = 1e6 if kind is int and field.name != "seed" else 1e12
        low, high = (float(found[1]), float(found[2] or most)) if found else (0, most)
        wanted = f"at least {low:g}, at most {high:,.12g}" if kind in (int, float) else kind.__name__
        wanted = choices[1] if choices else "printable text" if kind is str else wanted
        for one in values:
            # NaN (not a number) fails every comparison, so `low <= one` refuses it; `not one < low` would not
            number = kind in (int, float) and type(one) in (int, kind)
            text = re.sub("[\udc80-\udcff]", "", str(one))       # bytes that are no UTF-8: a name like others
            right = low <= one <= high if number else type(one) is kind and text.isprintable()
            if not right or choices and str(one) not in choices[1].split(" | "):
                raise UserError(f"{where}--{field.name} {one}: {wanted} is wanted")
    return config

def command(main):
    """What `python stage.py` runs.  Ctrl-C or want of memory ends it with one line, a closed pipe silently"""
    sys.stdout, began = sys.stdout or open(os.devnull, "w"), time.time()      # None if the shell closed it
    command.knobs = {}
    try:
        main()
        if RANK:              # Python's way to end would abort a thread that still clears up its last message
            os._exit(0)
        # It is flushed here, because a closed pipe must be noticed inside the `try`
        print(f"in {clock(time.time() - began)}{peak_memory()}", flush=True)
    except KeyboardInterrupt:
        raise UserError(STOPPED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # Python flushes once more at exit
    except OSError as error:                  # a name that is too long, a folder that may not be read
        raise UserError(error) from None
    except (MemoryError, RuntimeError) as error:
        if dist.is_initialized() and re.search("peer|[Tt]imed out|NCCL|[Cc]onnection", str(error)):
            raise UserError("another process of this run has ended; what is saved is intact, and the same "
                            "command goes on") from None
        # torch has many words for too little memory, and for a size that it cannot even count
        if not re.search("alloc|out of memory|overflow|MemoryError", repr(error)):
            raise
        # (--channels 8 8 8 has three levels.  Each further one doubles the side, so it weighs four times)
        sizes = {f"--{name} {value}": np.max(value or 0) * 2.0 ** (2 * np.size(value) - 2)
                 for name, value in command.knobs.items()
                 if np.asarray(value).dtype.kind == "i" and name != "seed"}
        raise UserError("more memory is needed than there is; the largest knobs are "
                        + ", ".join(sorted(sizes, key=sizes.get)[:-4:-1])) from None

command.knobs = {}

def peak_memory():
    """What this process has held at most, for the last line"""
    gpu = f", the GPU's {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
    with suppress(ImportError):                                              # Windows keeps no such count
        import resource
        unit = 1e-9 if sys.platform == "darwin" else 1024e-9                 # a Mac counts in bytes
        return f"; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit:.1f} GB{gpu}"
    return gpu

def judge(config, free, what, value, low, high, where):
    """Compares a number with the one that the header promises.  It says so, and never fails a run"""
    # Other knobs promise nothing.  Nor does a chapter, whose Config inherits from a stage's
    here = lambda some: {key: value for key, value in asdict(some).items() if key not in free}
    if here(type(config)()) != here(config) or type(config).__base__ is not object:
        return f"{what}: not judged, because this is not the default stage"
    wrong = "" if low <= value <= high else "not "
    return f"{what}: {wrong}as expected ({low:g} to {high:g}){wrong and f'; see {where}'}"

# --------------------------------------------------------------------------------------- device and processes
def pick_device(name="auto"):
    """`auto`, cpu, cuda or cuda:1 -> torch.device.  `auto` takes a CUDA GPU if there is one."""
    # Apple's MPS lacks float64 and the gradient of a lookup in a 3D volume, so a Mac uses its CPU
    found = ("cuda", "found") if torch.cuda.is_available() else ("cpu", "no CUDA GPU found")
    name, why = found if name == "auto" else (name, "asked for")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: auto, cpu or cuda (or cuda:1, ...) is wanted")
    if name == "cuda" and "LOCAL_RANK" in os.environ:                          # under torchrun, one for each
        name += f":{os.environ['LOCAL_RANK']}"
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such GPU: use --device cpu")
    title = f"{torch.get_num_threads()} threads" if name == "cpu" else torch.cuda.get_device_name(name)
    print(f"device {name} ({why}; {title})")
    if PROCESSES > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if name == "cpu" else "cpu:gloo,cuda:nccl")
        if RANK:
            sys.stdout = open(os.devnull, "w")
    return torch.device(name)

# `torchrun --nproc_per_node 2 autodecoder.py` starts two processes, on a GPU each or on the CPU.  Each takes
# a share of every batch, and their gradients are averaged, so they train as one does.  The first one speaks
# and writes for all.  torchrun tells each process its rank (0 is the first), and how many there are
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def my_share(items):
    """Which items of a batch are this process's"""
    if items % PROCESSES:
        raise UserError(f"{PROCESSES} processes cannot share the {items} items of a batch equally")
    return slice(RANK, None, PROCESSES)

def together(tensor):
    """The mean over all processes, in place"""
    if PROCESSES > 1:
        dist.all_reduce(tensor)
        tensor /= PROCESSES
    return tensor

def first_then_others(make):
    """make() in the first process, which writes a file; then in the others, which find it and read it"""
    made = make() if RANK == 0 else None
    together(torch.zeros(1))                                   # waits until all are here
    return make() if made is None else made

# --------------------------------------------------------------------------------------------------- cameras
def camera_to_world_at(azimuth, elevation, distance):
    """Degrees -> (4,4) float64: a camera that looks at the origin; tensors (B,) -> (B,4,4), with gradients"""
    a, e, distance = (some if isinstance(some, torch.Tensor) else torch.tensor(some, dtype=torch.float64)
                      for some in (azimuth, elevation, distance))
    a, e = a.deg2rad(), e.deg2rad()
    outward = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
    # `right` follows from the azimuth alone: the usual cross product with Z is zero straight above the object
    right = torch.stack([-a.sin(), a.cos(), torch.zeros_like(a)], -1)
    down, position = torch.linalg.cross(-outward, right), distance[..., None] * outward
    pose = torch.stack([right, down, -outward, position], -1)                                   # (...,3,4)
    return torch.cat([pose, pose.new_tensor([0, 0, 0, 1]).expand(*a.shape, 1, 4)], -2)

DISTANCE = 1.3                     # from the camera to the object's centre, in all stages
def intrinsics_at(size, focal=131.25):
    """Pixels along a side -> (3,3) float64"""
    # The focal length is that of a 128-pixel photo of the SRN data set.  From its usual distance, 1.3, a ball
    # of diameter 1 fills 85 % of the frame
    f = focal * size / 128
    return torch.tensor([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]], dtype=torch.float64)

# ------------------------------------------------------------------------------- safe writing and checkpoints
@contextmanager
def atomic_file(path):
    """Write to the path given; the file then appears whole or not at all.  A full disk is one sentence."""
    # A kill in the middle of writing damages only the temporary file.  Renaming is a single step
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)      # it may be a link, and what it leads to is somebody else's
        yield temporary
        # Without fsync a power cut can leave the new name on an empty file.  (Windows wants r+ for it)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}") from None

def save_text(path, text):
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

def digest(thing):
    """A hash of tensors, numbers, strings, lists and dicts of them: every bit of every tensor counts."""
    if isinstance(thing, torch.Tensor):
        flat = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content = f"{thing.dtype} {list(thing.shape)}".encode() + flat.numpy().tobytes()
    elif isinstance(thing, (list, tuple, dict)):
        content = " ".join(map(digest, thing.items() if isinstance(thing, dict) else thing)).encode()
    else:
        content = repr(thing).encode(errors="backslashreplace")
    return hashlib.blake2b(content, digest_size=16).hexdigest()

def save_checkpoint(file, state):
    """`state` holds only tensors, numbers, strings, lists and dicts: torch.load's safe default reads them."""
    content = io.BytesIO()             # because torch.save itself answers a full disk with a C++ assertion
    torch.save(state | {"digest": digest(state)}, content)
    with atomic_file(file) as temporary:
        temporary.write_bytes(content.getbuffer())

def load_checkpoint(file, *parts):
    """What save_checkpoint wrote, on the CPU, verified; it must have these parts"""
    # A pipe or a device in its place might never end, so it is not opened
    if not os.path.isfile(file):
        raise UserError(f"{file} is {'no file' if os.path.lexists(file) else 'not there'}")
    try:
        with zipfile.ZipFile(file) as archive:
            # torch does not compress.  What is larger than its file is a trap, a "zip bomb"
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(file):
                raise ValueError("its size is wrong")
        # weights_only, because a file from a stranger could otherwise run any code while it is read
        state = torch.load(file, map_location="cpu", weights_only=True)
        # torch checks no checksum.  A bit that flipped would be a wrong number, or random memory
        if not isinstance(state, dict) or state.pop("digest", None) != digest(state):
            raise ValueError("no checkpoint of this version of the program, or its digest is wrong")
    except Exception as error:              # there is no end of what zipfile, pickle and torch may raise
        why = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged and cannot be read ({why})") from None
    for part in parts:
        kind = {"names": list, "optimizers": list, "step": int, "autodecoder": str}.get(part, dict)
        if not isinstance(state.get(part), kind):
            held = ", ".join(map(str, state))[:200]
            raise UserError(f"{file} holds something else ({held}), where {part} ({kind.__name__}) is wanted")
    return state

def load_newest(folder, *parts, say=print):
    """last.pt, or the checkpoint before it where that is damaged or missing; None if there is neither"""
    last, previous = Path(folder, "last.pt"), Path(folder, "previous.pt")
    if not previous.exists():
        return load_checkpoint(last, *parts) if os.path.lexists(last) else None
    try:
        return load_checkpoint(last, *parts)
    except UserError as error:
        say(f"!! {error}: taking {previous}, the checkpoint before it")
    return load_checkpoint(previous, *parts)

def load_stage(folder, what, script, *parts):
    """What an earlier stage saved in its folder.  Each stage asks for a part that no other stage saves"""
    try:
        # (Where there is neither file, the second call says so)
        return load_newest(folder, "config", *parts) or load_checkpoint(Path(folder, "last.pt"))
    except UserError as error:
        raise UserError(f"this needs {what}, and {error}. Run: python {script}") from None

def saved_config(Config, state, folder):
    """The config of a checkpoint.  Its fields must be exactly those of this version's Config."""
    # With other fields another network could be built than the one whose weights are in the file
    if strange := {field.name for field in fields(Config)} ^ set(state["config"]):
        raise UserError(f"{folder} was trained by another version of this program, or by a chapter "
                        f"(knobs {', '.join(sorted(map(str, strange))[:3])}): train it again with --fresh")
    return checked(Config(**state["config"]), f"{folder}/last.pt: ")

def fill(network, weights, folder):
    """The network, with weights from a file, which must have its names, shapes and types, and be finite
    (half precision, as in pretrained/, becomes float)"""
    # A network on the device "meta" has shapes without numbers.  So a file that asks for more than memory
    # holds is refused before anything is built; else the file's tensors become such a network's own
    wanted = network.state_dict()
    kind = lambda some: f"{some.dtype} {[*some.shape]}" if isinstance(some, torch.Tensor) else type(some)
    weights = {name: some.float() if getattr(some, "dtype", 0) == torch.half else some
               for name, some in weights.items()}
    for name in [*wanted, *weights]:
        here, there = [kind(some[name]) if name in some else "nothing" for some in (weights, wanted)]
        if here != there or not weights[name].isfinite().all():
            raise UserError(f"{folder}/last.pt holds {name}: {here}, where {there}, all finite, is wanted")
    network.load_state_dict(weights, assign=any(some.is_meta for some in wanted.values()))
    return network

def fill_optimizer(optimizer, state, folder):
    """Its state from a file.  torch looks at the state's structure, but not at its tensors' shapes"""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        optimizer.load_state_dict(state)
        if all(some.dim() == 0 or some.shape == p.shape for p, kept in optimizer.state.items()
               for some in kept.values() if isinstance(some, torch.Tensor)):
            return
    raise UserError(f"{folder}/last.pt holds the state of another optimizer: start over with --fresh")

# -------------------------------------------------------------------------------------------------- long work
CLEAR = "\r\033[K"                 # a terminal goes back to the start of its line, and empties it

class Run:
    """What surrounds every long loop: recipe, lock, checkpoints, signals, NaN guard, log, progress line"""
    def __init__(self, folder, stage, config, recipe, name="config.json",
                 stale=("last.pt", "previous.pt", "log.jsonl", "previews")):
        """recipe: fields that must agree with the folder's earlier run; stale: what --fresh throws away"""
        # First all is checked.  Until `with run:` only the lock is written.  (What an earlier --fresh put
        # aside may come back, or be cleared away)
        self.folder, self.file, self.config = Path(folder), Path(folder, name), asdict(config)
        self.fresh, self.stale = self.config.get("fresh"), [self.folder / some for some in stale]
        wanted = {"stage": stage} | {key: self.config[key] for key in recipe}
        self.recipe = json.loads(json.dumps(wanted))            # as the file gives it back: a tuple is a list
        self.began, self.first, self.printed = time.time(), {}, 0.0                    # for the progress line
        self.bad, self.skipped, self.doubtful = 0, 0, False                            # for the guards
        self.asked, self.stopping = None, None                                         # for signals
        self.first_process, self.lock = RANK == 0, open(os.devnull)
        self.thread, self.saving, self.aside = ThreadPoolExecutor(1), None, self.folder / f".{name}.before"
        if self.first_process:
            self._lock(f".{name}.lock")
            self._settle()
            self._check_recipe()

    def _lock(self, name):
        """One run for each folder: two would overwrite each other's checkpoints."""
        try:
            self.lock = os.fdopen(open_lock(self.folder / name), "r+")
            # The system frees this lock when the process ends, even by kill -9.  A mere file would stay
            with suppress(ImportError):                         # Windows has no such lock
                import fcntl
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {self.folder} now: wait for it, or use another --out")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error}") from None

    def _check_recipe(self):
        """The recipe that the folder was begun with must be today's"""
        # Files without a recipe are not ours, and a later --fresh would delete them
        if not os.path.lexists(self.file):
            for path in filter(Path.exists, self.stale):
                raise UserError(f"{path} is there, but no {self.file.name} beside it: use another --out")
            return
        try:
            found = dict(json.loads(self.file.read_text() if self.file.is_file() else ""))
        except (OSError, ValueError, TypeError, RecursionError):
            raise UserError(f"{self.file} cannot be read: delete it and what it describes") from None
        if found.get("stage") != self.recipe["stage"]:
            raise UserError(f"{self.folder} holds another stage's run, or an older one: use another --out")
        # A run continued with another learning rate, for example, would be neither of the two experiments
        normal = lambda some: os.path.normpath(some) if some and isinstance(some, str) else some    # ./a is a
        for field, value in ({} if self.fresh else self.recipe).items():
            if normal(found.get(field, value)) != normal(value):
                anew = f"delete {self.folder}" if self.fresh is None else "start over with --fresh"
                late = " (its learning rate fell to the end over those steps, so it cannot be made longer)"
                raise UserError(f"{self.file} says that what is there was made with --{field} "
                                f"{str(found[field]) or '(none)'}, not {str(value) or '(none)'}"
                                f"{late * (field == 'steps')}: use the same value, another folder, or {anew}")

    def _settle(self):
        """What --fresh put aside is deleted once there is something new in its place.  Until then it comes
        back, because a run may end before its first checkpoint, as when memory runs out"""
        paths = [*self.stale, self.file]
        if self.aside.is_dir() and not os.path.lexists(paths[0]):
            for path in reversed(paths):                         # the first comes last: then all is back
                if os.path.lexists(self.aside / path.name):
                    remove(path)
                    os.replace(self.aside / path.name, path)
        remove(self.aside)

    def __enter__(self):
        """From here on files are written.  The first Ctrl-C or SIGTERM only sets `asked` and `stopping`"""
        if self.first_process:
            for path in [*self.stale, self.file] if self.fresh else ():
                if os.path.lexists(path):
                    self.aside.mkdir(exist_ok=True)
                    os.replace(path, self.aside / path.name)
            save_text(self.file, json.dumps(self.recipe, indent=1))
        # A signal in the middle of a step would lose work, so the loop itself stops, after it has saved
        self.before = {}
        with suppress(ValueError):                                    # only the main thread can set handlers
            self.before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        if error[0] and sys.stdout.isatty():
            print()                                  # what is said next stands below the progress line
        for number, handler in self.before.items():
            signal.signal(number, handler)
        try:
            self.written()
        finally:
            if self.first_process:
                self._settle()
            self.lock.close()

    def _stop(self, number, frame):
        if self.asked:                               # a second Ctrl-C means: at once
            raise UserError("stopped at once; the same command goes on from what is saved")
        self.asked = signal.Signals(number).name
        if PROCESSES == 1:                           # else `finite` tells all processes, at the same step
            self.stopping = self.asked

    def save(self, state):
        """Write last.pt; the one before stays as previous.pt.  A thread does it while training goes on, with
        a copy of what training changes"""
        if self.first_process:
            self.written()
            self.saving = self.thread.submit(self._write, copy.deepcopy(state))

    def _write(self, state):
        # A copy, and not a rename: at any moment there is a last.pt, and it is whole
        last = self.folder / "last.pt"
        if last.exists() and not self.doubtful:                 # else a damaged one would replace a good one
            with atomic_file(self.folder / "previous.pt") as temporary:
                shutil.copyfile(last, temporary)
        save_checkpoint(last, state)
        self.doubtful = False

    def written(self):
        """Waits for the thread that saves, and raises here what went wrong there"""
        if self.saving:
            self.saving.result()

    def load(self, *parts):
        """The state to go on from, with these parts, or None."""
        def doubt(trouble):
            self.doubtful = True
            self.say(trouble)
        return None if self.fresh else load_newest(self.folder, *parts, say=doubt)

    def finite(self, step, value):
        """False for a step to leave out, because its loss or gradient is not finite (NaN or infinity)"""
        # What one process finds, or was asked, all must know
        value, asked = together(torch.tensor([value, float(bool(self.asked))])).tolist()
        self.stopping = self.stopping or asked and (self.asked or "a signal to another process")
        # One unlucky batch is harmless if its step is left out.  Three in a row mean that the weights are bad
        self.bad = 0 if math.isfinite(value) else self.bad + 1
        if self.bad:
            self.skipped += 1
            self.say(f"!! step {step}: the loss is not finite: step left out, {self.skipped} so far")
        if self.bad == 3:
            raise UserError(f"the loss was not finite three times in a row, at step {step}; what is saved is "
                            "intact: go on by the same command, or lower the learning rate in another --out")
        return self.bad == 0

    def log(self, step, steps, show=True, **numbers):
        """A line of log.jsonl, and the same numbers on the progress line."""
        if not self.first_process:
            return
        try:
            if (path := self.folder / "log.jsonl").is_fifo():            # a pipe would block for ever
                raise OSError(f"{path} is a pipe")
            with open(path, "a") as file:               # closed after each line: a kill loses one at most
                seconds = round(time.time() - self.began, 1)
                file.write(json.dumps({"step": step, **numbers, "seconds": seconds}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the log: {error}; what is saved is intact") from None
        if show:
            self.progress("step", step, steps, "  ".join(f"{key} {x:.4g}" for key, x in numbers.items()))

    def progress(self, what, done, total, numbers=""):
        """One line, rewritten on a terminal, repeated every ten seconds in a log file"""
        # Speed is counted from this process's first call, because steps before a resume took none of its time
        now, last, terminal = time.time(), done == total, sys.stdout.isatty()
        began, first = self.first.setdefault(what, (now, done))
        rate = (now - began) / max(done - first, 1)
        if not last and (not rate or now - self.printed < (0.2 if terminal else 10)):
            return
        self.printed, percent, left = now, 100 * done // max(total, 1), clock(rate * (total - done))
        line = f"{what} {done}/{total} {percent}%  {numbers}  {rate:.2f} s each  eta {left}"
        print(CLEAR * terminal + line, end="" if terminal and not last else "\n", flush=True)

    def say(self, text):
        """A line that does not run into the progress line"""
        print(CLEAR * sys.stdout.isatty() + plain(text), flush=True)

    def stop_if_asked(self, step):
        """Called after a save: if Ctrl-C or SIGTERM came, the run ends here, and nothing is lost."""
        if self.stopping:
            raise UserError(f"stopped by {self.stopping} at step {step}, saved: the same command goes on")

def open_lock(path):
    """-> a descriptor, to lock by.  A symbolic link could lead to another user's file, so it is not followed;
    a pipe in its place does not block, because it is opened for both"""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)

def remove(path):
    """A file, a folder with all in it, a link (but not what it leads to), or nothing"""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

def clock(seconds):
    m, s = divmod(int(seconds + 0.5), 60)                # 3700 -> 1h01m, 65 -> 1m05s, 9 -> 9s
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s" if m else f"{s}s"

# --------------------------------------------------------------------------------------------------- pictures
def to_bytes(picture):
    return (picture.clamp(0, 1) * 255).round().byte()    # what is a little outside [0, 1] is brought inside

def grid(pictures, columns, gap=2):
    """Pictures (N,H,W,3) uint8, a tensor or array -> one array, `columns` to a row, white between them."""
    # White pictures fill the last row.  Each picture has a gap on its right and below; the outermost are cut
    missing = -len(pictures) % columns
    padded = np.pad(pictures, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, H, W, _ = padded.shape
    sheet = padded.reshape(-1, columns, H, W, 3).swapaxes(1, 2).reshape(-1, columns * W, 3)
    return sheet[:len(sheet) - gap, :columns * W - gap]

def save_picture(path, picture):
    with atomic_file(path) as temporary:
        Image.fromarray(np.asarray(picture)).save(temporary, format="PNG", optimize=True)

def save_preview(path, rows):
    """Rows of pictures (rows,B,H,W,3) uint8, twice as large, to look at"""
    save_picture(path, np.kron(grid(rows.flatten(0, 1), rows.shape[1]), np.ones((2, 2, 1), np.uint8)))

def save_figure(path, figure):
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
