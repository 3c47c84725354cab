"""
A device that is not there.  Its tensors hold a tensor on the CPU, where everything is computed, but they
claim to be on "far", and an operation that mixes them with tensors on the CPU is refused.  So a forgotten
.to(device) is found without a GPU.
"""
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import common


class Module:
    """What torch asks of a device's module"""
    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


backend_registration._setup_privateuseone_for_python_backend("far", backend_module=Module())
DEVICE = torch.device("far:0")
CROSSING = "aten::copy_", "aten::_to_copy", "aten::set_"


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        dense = dict(strides=raw.stride(), storage_offset=raw.storage_offset()) if not raw.is_sparse else {}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, layout=raw.layout,
                                                   device=DEVICE, **dense)

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"Far({self.raw})"

    def __format__(self, how):
        return format(self.raw, how)

    def tolist(self):
        return self.raw.tolist()

    def __getitem__(self, where):
        there = lambda one: torch.tensor(one).to(DEVICE) if isinstance(one, list) else one
        return super().__getitem__(tuple(map(there, where)) if isinstance(where, tuple) else there(where))

    def numpy(self, *_, **__):
        raise RuntimeError("numpy: this tensor is on the device")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, *args, **(kwargs or {}))


def compute(operation, *args, **kwargs):
    name, leaves = operation.name().split(".")[0], tree_leaves((args, kwargs))
    far = any(isinstance(some, Far) for some in leaves)
    for some in leaves if far and name not in CROSSING else ():
        # As on a GPU, a number on the CPU may be mixed with anything, and indices may come from there
        on_cpu = isinstance(some, torch.Tensor) and not isinstance(some, Far)
        if on_cpu and some.dim() and not name.startswith("aten::index"):
            raise RuntimeError(f"{name}: a tensor {[*some.shape]} is on the CPU, others are on the device")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    result = operation(*tree_map(near, args), **tree_map(near, kwargs))
    if name.endswith("_") and isinstance(args[0], torch.Tensor):                   # in place
        return args[0]
    to_far = torch.device(asked).type == "far" if asked is not None else far
    wrap = lambda some: Far(some) if isinstance(some, torch.Tensor) and not isinstance(some, Far) else some
    return tree_map(wrap, result) if to_far else result


def near(some):
    return some.raw if isinstance(some, Far) else some


LIBRARY = torch.library.Library("_", "IMPL")       # kept: it is undone when it is collected
LIBRARY.fallback(compute, "PrivateUse1")


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if torch.device(device).type == "far" else device)


def pretend(monkeypatch):
    """What such a device cannot do by itself: generators, ranges and tensors from lists, checkpoints"""
    monkeypatch.setattr(torch, "Generator", Generator)
    save = common.save_checkpoint
    monkeypatch.setattr(common, "save_checkpoint", lambda file, state: save(file, tree_map(near, state)))
    for name in ("arange", "tensor"):
        monkeypatch.setattr(torch, name, made_near(getattr(torch, name)))


def made_near(make):
    def made(*some, device=None, **more):
        if device is None or torch.device(device).type != "far":
            return make(*some, device=device, **more)
        return make(*some, device="cpu", **more).to(device)
    return made
