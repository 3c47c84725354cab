"""
A chapter on stage 1: cameras learned in training.  Photos of an object, and nobody knows where they were taken from.

    min over e, G, and a camera c_{i,v} for each photo     mean | render(G(e_i), c_{i,v}) - photo_{i,v} |^2

A camera is three angles: azimuth, elevation, and the turn in the picture; they are learned beside the codes.
Its distance and lens are known, and it looks at the object's middle.

If the angles are roughly known (--start noisy), gradient descent repairs them.  If nothing is known, descent from
a guess ends in a bad minimum nearly always.  So a search comes first, by silhouettes alone.  A few coarse shapes are
seen from 264 sides.  Each silhouette is like some of these views, with probabilities; each shape is moved until
its views are the means of the silhouettes that are like them; and again (expectation maximisation).  Nobody says
which object is of which shape: that has probabilities too.  The temperature falls, from "all views are alike" to
"the nearest view".  Then the objects are trained, and now and then each photo is compared with its own object,
in colours, from all 264 sides, and takes the best one.

What photos cannot tell counts apart: the frame in which all cameras are right together, and front against back
of an object that looks the same from both.

in   data/earphones_train/       as stage 1; its poses are used to measure, and by --start noisy | true
out  runs/cameras/               last.pt, log.jsonl, previews/, cameras.txt, cameras.png
run  python -m chapters.cameras
     python -m chapters.cameras --start noisy --noise 20 --out runs/cameras_20
     python -m chapters.cameras --start true --out runs/cameras_true
read pose_of, bootstrap, search, main; measure.
"""
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

import autodecoder
from autodecoder import (BETAS, CLIP, FREE, Autodecoder, draw_batch, jitter, learning_rate_share,
                         reconstruction_loss)
from common import (Run, camera_to_world_at, command, fill, fill_optimizer, intrinsics_at, parse_config,
                    pick_device, save_figure, save_preview, save_text, to_bytes)
from shapes.packed import read_photos
from volume_render import camera_rays, psnr, render, render_volumes


@dataclass
class Config(autodecoder.Config):
    out: str = "runs/cameras"            # folder for the model, the log and the pictures
    start: str = "unknown"               # unknown | noisy | true: what is known of the cameras at first
    noise: float = 20.0                  # degrees (rms of the rotation's angle), of noisy cameras (from 0 to 90)
    steps: int = 3000                    # gradient steps (at least 1)
    recolour: float = 0.0                # objects are shown as they are (from 0 to 1)
    stretched: float = 0.0               # and not stretched, which would need cameras first (from 0 to 1)
    camera_lr: float = 1e-2              # the angles' learning rate, in radians
    clusters: int = 4                    # coarse shapes that the search by silhouettes knows (at least 1)
    rounds: int = 100                    # of that search (at least 1)
    starts: int = 2                      # random beginnings of it; the one that explains most is taken (at least 1)
    max_elevation: float = 80.0          # degrees: no camera is higher or lower (from 1 to 89)
    search_at: tuple = (300, 600, 1000, 1500)  # steps at which each photo is compared from all sides


PRESETS = {"cpu": {}, "gpu": autodecoder.PRESETS["gpu"],
           "smoke": dict(autodecoder.PRESETS["smoke"], clusters=2, rounds=2, starts=1, search_at=(10,))}
DISTANCE, SIDE = 1.3, 16                 # of all cameras; and the pixels of the pictures that are searched by


def pose_of(angles):
    """Radians (...,3): azimuth, elevation, turn in the picture -> camera to world (...,4,4)"""
    flat = angles.reshape(-1, 3)
    pose = camera_to_world_at(flat[:, 0].rad2deg(), flat[:, 1].rad2deg(), torch.full_like(flat[:, 0], DISTANCE))
    c, s, zero = flat[:, 2].cos(), flat[:, 2].sin(), torch.zeros_like(flat[:, 2])
    turn = torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], 1).view(-1, 3, 3)
    pose = torch.cat([torch.cat([pose[:, :3, :3] @ turn, pose[:, :3, 3:]], 2), pose[:, 3:]], 1)
    return pose.view(*angles.shape[:-1], 4, 4)


def angles_of(pose):
    """The other way round, for cameras that look at the middle: rotations (...,3,3) -> (...,3)"""
    azimuth, elevation = torch.atan2(-pose[..., 1, 2], -pose[..., 0, 2]), -pose[..., 2, 2].clamp(-1, 1).asin()
    level = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)], -1)
    down = torch.linalg.cross(pose[..., 2], level)
    turn = torch.atan2((pose[..., 0] * down).sum(-1), (pose[..., 0] * level).sum(-1))
    return torch.stack([azimuth, elevation, turn], -1)


def noisy(pose, degrees, generator):
    """Rotations (...,3,3), turned around random axes; the angle's root mean square is `degrees`"""
    vector = torch.randn(*pose.shape[:-1], generator=generator) * math.radians(degrees) / math.sqrt(3)
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))) @ pose


def all_sides(max_elevation):
    """-> angles (264,3), spread over the sphere between the elevations"""
    height = torch.linspace(-1, 1, 11) * math.sin(math.radians(max_elevation)) * 0.97
    azimuth = torch.arange(24) * math.tau / 24
    return torch.stack([azimuth.repeat(11), height.asin().repeat_interleave(24), torch.zeros(264)], 1)


def small(some):
    """(...,n,n) or (...,n,n,3), bytes -> floats, SIDE pixels a side, flat: (...,P) or (...,P,3)"""
    colours = some.shape[-1] == 3
    x = (some if colours else some[..., None]).float() / 255
    x = F.adaptive_avg_pool2d(x.flatten(0, -4).permute(0, 3, 1, 2), SIDE).flatten(2).mT
    x = x.unflatten(0, some.shape[:-3 if colours else -2])
    return x if colours else x[..., 0]


def bootstrap(masks, sides, config, generator, say):
    """Silhouettes (N,V,P) -> angles (N,V,3), which coarse shape each object is like (N,), mean squared error"""
    K, G, (N, V, P) = config.clusters, 20, masks.shape
    rays = [some.flatten(0, 1)[None].expand(K, -1, -1)
            for some in camera_rays(pose_of(sides), intrinsics_at(SIDE).float().expand(len(sides), 3, 3), SIDE)]
    field = lambda channels, position: (F.softplus(channels[..., 0]), channels.expand(*channels.shape[:-1], 3) * 0)

    # Random balls of fog, because equal ones would stay equal
    z = torch.linspace(-1, 1, G)
    radius = (z[:, None, None] ** 2 + z[:, None] ** 2 + z ** 2).sqrt()
    ball = 1 - 8 * (radius - 0.5).clamp(min=0) + torch.randn(K, 1, G, G, G, generator=generator)
    shapes = nn.Parameter(ball)
    optimizer = torch.optim.Adam([shapes], 0.2)

    def compare():
        views = render(shapes, *rays, 24, field, None)[1].view(K, -1, P)                       # (K,H,P)
        both = torch.einsum("nvp,khp->nvkh", masks, views.detach())
        return views, (masks.square().sum(-1)[..., None, None] + views.detach().square().sum(-1) - 2 * both) / P
    for step in range(config.rounds):
        temperature = 0.03 * (0.002 / 0.03) ** min(step / (0.8 * config.rounds), 1)
        views, error = compare()
        # How likely is each view, of each shape; and, from all of an object's photos together, each shape?
        of_shape = torch.logsumexp(-error / temperature, -1).sum(1) / (0.2 * V)                # (N,K)
        likely = of_shape.softmax(-1)[:, None, :, None] * (-error / temperature).softmax(-1)   # (N,V,K,H)
        weight = likely.sum((0, 1))
        means = torch.einsum("nvkh,nvp->khp", likely, masks) / weight.clamp(min=1e-6)[..., None]
        loss = (weight[..., None] * (views - means).square()).sum() / masks.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say("rounds", step + 1, config.rounds, f"error {loss.item():.5f}")
    with torch.no_grad():
        error = compare()[1]
    which = error.min(-1).values.sum(1).argmin(1)                                              # (N,)
    best = error[torch.arange(N), :, which].min(-1)                                            # (N,V)
    return sides[best.indices], which, best.values.mean().item()


@torch.no_grad()
def search(model, photos, views, sides):
    """Each photo, in colours, beside its own object from all sides -> angles (N,V,3) and errors (N,V)"""
    found, errors = [], []
    poses = pose_of(sides).to(model.shapes.device)
    for o, code in enumerate(model.codes):
        rgb, alpha, _ = render_volumes(model, model.volumes_of(code[None]), poses, intrinsics_at(SIDE).float(), SIDE)
        seen = torch.cat([rgb[0].flatten(1), alpha[0].flatten(1)], 1).cpu()                    # (H,4P)
        photo = torch.cat([small(photos.rgb[o, views]).flatten(1), small(photos.mask[o, views])], 1)
        best = (torch.cdist(photo, seen).square() / photo.shape[1]).min(1)
        found.append(sides[best.indices])
        errors.append(best.values)
    photos.forget()
    return torch.stack(found), torch.stack(errors)


def placed(cameras, objects, shape):
    """A table of angles (N,3V), some objects -> a full set of poses (N,V',4,4), in which only theirs are right"""
    angles = F.embedding(objects, cameras, sparse=True).unflatten(1, (-1, 3))                  # (B,V,3)
    full = torch.zeros(*shape, 4, 4)
    return full.index_put((objects[:, None], torch.arange(angles.shape[1])), pose_of(angles))


def refine(model, photos, views, angles, steps=60):
    """Cameras (N,V,3) of these views go downhill; the objects stay"""
    way, N = torch.zeros_like(angles, requires_grad=True), len(angles)
    optimizer = torch.optim.Adam([way], 0.02)
    recipe = Config(**vars(model.config) | dict(batch_views=len(views), rays=256 * min(N, 8)))
    for step in range(steps if N else 0):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / steps))
        for objects in torch.arange(N).split(8):
            generator = torch.Generator().manual_seed(step)
            pose = torch.zeros(*photos.rgb.shape[:2], 4, 4).index_put(
                (objects[:, None], torch.tensor(views)), pose_of((angles + way)[objects]))
            _, *batch = draw_batch(photos, recipe, torch.tensor(views), generator, objects, pose)
            volume = model.volumes_of(model.codes[objects]).detach()
            place = jitter(batch, recipe.samples, generator, volume.device)
            batch = [some.to(volume.device) for some in batch]
            reconstruction_loss(model, volume, batch, recipe, place, True, photos.has_masks)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return (angles + way).detach()


def degrees_off(found, true):
    """Rotations (...,3,3) -> degrees between them"""
    return ((found * true).sum((-1, -2)) / 2 - 0.5).clamp(-1, 1).acos().rad2deg()


def best_frame(angles, true):
    """Turns all cameras around the vertical together until most are within 15 degrees -> the angles, turned"""
    every = torch.arange(360.0).deg2rad()
    turned = torch.stack([angles + torch.tensor([some, 0, 0]) for some in every.tolist()])       # (360,N,V,3)
    share = (degrees_off(pose_of(turned)[..., :3, :3], true) < 15).float().mean((1, 2))
    return turned[share.argmax()]


def measure(angles, true, which):
    """Found angles (N,V,3), true rotations (N,V,3,3), the frame of each object (N,) -> lines, and the turned angles"""
    lines, half, flip = [], torch.tensor([math.pi, 0, 0]), torch.tensor([-1.0, 1, 1])
    frames = {"one frame for all": which * 0, "a frame for each coarse shape": which,
              "a frame for each object": torch.arange(len(which))}
    for name, frame in frames.items():
        turned = torch.empty_like(angles)
        for k in frame.unique():
            turned[frame == k] = best_frame(angles[frame == k], true[frame == k])
        # From behind: half a turn.  In a mirror: the camera that sees the mirrored object, mirrored
        off = degrees_off(pose_of(turned)[..., :3, :3], true)
        behind = degrees_off(pose_of(turned + half)[..., :3, :3], true)
        mirrored = degrees_off(flip[:, None] * pose_of(turned)[..., :3, :3] * flip, true)
        right = off < 15
        share = lambda some: f"{some.float().mean():.0%}"
        lines.append(f"{name}: off by {off.median():.1f} degrees (median); within 15 degrees {share(right)}; from behind "
                     f"{share(~right & (behind < 15))} more, in a mirror {share(~right & (behind >= 15) & (mirrored < 15))}"
                     " more")
        first = turned if name == "one frame for all" else first
    return lines, first


def draw(found, true, chosen, names, path):
    """True and found cameras of some objects, as a map of the sphere around each"""
    figure = Figure(figsize=(10, 2.2 * len(chosen)), layout="constrained")
    for o, axis in zip(chosen, figure.subplots(len(chosen), 1, squeeze=False)[:, 0]):
        t, f = (some[o].rad2deg() for some in (true, found))
        near = t[:, 0] + (f[:, 0] - t[:, 0] + 180) % 360 - 180                       # the short way round
        for x0, y0, x1, y1 in zip(t[:, 0], t[:, 1], near, f[:, 1]):
            axis.plot([x0, x1], [y0, y1], "-", color="0.7", lw=0.8)
        axis.plot(t[:, 0], t[:, 1], "o", mfc="none", mec="k", ms=6, label="true")
        axis.plot(near, f[:, 1], ".", color="C1", label="found")
        axis.set(xlabel="azimuth, degrees", ylabel="elevation", title=names[o], ylim=(-90, 90))
    axis.legend(fontsize=7)
    save_figure(path, figure)


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    photos = read_photos(config.data, config.size, config.objects)
    N, count = photos.rgb.shape[:2]
    V = count - config.holdout_views
    train_views, test_views = list(range(V)), list(range(V, count))
    truth, sides = photos.pose[..., :3, :3], all_sides(config.max_elevation)
    run = Run(config.out, "cameras", config, [f.name for f in fields(Config) if f.name not in FREE])

    torch.manual_seed(config.seed)
    model = Autodecoder(config, N).to(device)
    state, step = run.load("names", "model", "optimizer", "code_optimizer", "step"), 0
    which, generator = torch.zeros(N, dtype=torch.long), torch.Generator().manual_seed(config.seed)
    with run:
        # Where do the cameras begin?
        if state:
            angles, which, step = state["cameras"]["angles"], state["cameras"]["which"], state["step"]
            print(f"going on from step {step} of {config.out}/last.pt")
        elif config.start == "unknown":
            masks = small(photos.mask[:, :V])
            found = [bootstrap(masks, sides, config, generator, run.progress) for _ in range(config.starts)]
            run.say("the beginnings explain the silhouettes up to " + ", ".join(f"{some[2]:.5f}" for some in found))
            angles, which, _ = min(found, key=lambda some: some[2])
        else:
            angles = angles_of(noisy(truth[:, :V], config.noise * (config.start == "noisy"), generator))
        print(*measure(angles, truth[:, :V], which)[0], sep="\n")

        cameras = nn.Parameter(angles.flatten(1))
        decoder = [p for name, p in model.named_parameters() if name not in ("shapes", "colours")]
        optimizers = (torch.optim.Adam(decoder, betas=BETAS),
                      torch.optim.SparseAdam([model.shapes, model.colours], betas=BETAS),
                      torch.optim.SparseAdam([cameras], betas=BETAS))
        if state:
            fill(model, state["model"], config.out)
            for optimizer, name in zip(optimizers, ("optimizer", "code_optimizer", "camera_optimizer")):
                fill_optimizer(optimizer, state[name], config.out)
        while step < config.steps:
            # Schedule
            share = learning_rate_share(step, config.steps, config.lr_floor)
            highest = config.decoder_lr, config.code_lr, config.camera_lr * (config.start != "true")
            for optimizer, rate in zip(optimizers, highest):
                optimizer.param_groups[0]["lr"] = rate * share

            # Batch, by the cameras as they are believed to stand
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            objects = torch.randperm(N, generator=generator)[:config.batch_objects]
            pose = placed(cameras, objects, (N, V))
            _, *batch = draw_batch(photos, config, torch.tensor(train_views), generator, objects, pose)
            place = jitter(batch, config.samples, generator, device)
            batch = [part.to(device) for part in batch]

            # Loss, and a step of decoder, codes and cameras
            code = model.code(objects, objects, torch.zeros(len(objects), 3, device=device))
            loss, photo, alpha = reconstruction_loss(model, model.volumes_of(code), batch, config, place,
                                                     step >= config.dense_steps, photos.has_masks)
            loss = loss + config.code_decay * code.square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(decoder, CLIP)
            if run.finite(step, loss.item() + norm.item()):
                for optimizer in optimizers:
                    optimizer.step()
            step += 1

            # From all sides: does another camera explain a photo better?
            if step in config.search_at and config.start == "unknown":
                before = cameras.detach().unflatten(1, (V, 3))
                found, _ = search(model, photos, train_views, sides)
                moved = degrees_off(pose_of(found)[..., :3, :3], pose_of(before)[..., :3, :3]) > 30
                with torch.no_grad():
                    cameras.copy_(torch.where(moved[..., None], found, before).flatten(1))
                run.say(f"step {step}: {moved.float().mean():.0%} of the photos are better seen from elsewhere")
            if step % config.log_every == 0 or step == config.steps:
                run.log(step, config.steps, loss=loss.item(), alpha=alpha.item(), lr=share * config.decoder_lr,
                        training_psnr=-10 * math.log10(photo.item() + 1e-10))
            if step % config.preview_every == 0 or step == config.steps:
                angles = cameras.detach().unflatten(1, (V, 3))
                run.say(f"step {step}: " + measure(angles, truth[:, :V], which)[0][0])
                shown = torch.linspace(0, N - 1, min(N, 8)).long()
                ours = [render_volumes(model, model.volumes_of(model.codes[o][None]), pose_of(angles[o, :1]),
                                       photos.intrinsics[o], config.size)[0][0, 0].cpu() for o in shown]
                save_preview(run.folder / f"previews/step_{step:06d}.png",
                             torch.stack([photos.rgb[shown, 0], to_bytes(torch.stack(ours).detach())]))
            if step % config.save_every == 0 or step == config.steps or run.stopping:
                run.save({"config": asdict(config), "names": photos.names, "step": step, "model": model.state_dict(),
                          "optimizer": optimizers[0].state_dict(), "code_optimizer": optimizers[1].state_dict(),
                          "camera_optimizer": optimizers[2].state_dict(),
                          "cameras": {"angles": cameras.detach().unflatten(1, (V, 3)), "which": which}})
            run.stop_if_asked(step)

    # The held-out photos' cameras are found with the objects as they are; then how alike are the pictures?
    model.requires_grad_(False)
    angles = cameras.detach().unflatten(1, (V, 3))
    lines, turned = measure(angles, truth[:, :V], which)
    if config.start == "true":
        held = angles_of(truth[:, V:])
    else:
        held = refine(model, photos, test_views, search(model, photos, test_views, sides)[0])
    quality = [psnr(render_volumes(model, model.volumes_of(model.codes[o][None]), pose[None], photos.intrinsics[o],
                                   config.size)[0][0, 0].cpu(), photos.rgb[o, v].float() / 255)
               for o in range(N) for v, pose in zip(test_views, pose_of(held[o]))]
    lines.append(f"held-out photos, each from the camera that was found for it: {sum(quality) / len(quality):.2f} dB")
    save_text(run.folder / "cameras.txt", "\n".join(lines) + "\n")
    draw(turned, angles_of(truth[:, :V]), list(range(0, N, max(N // 4, 1)))[:4], photos.names, run.folder / "cameras.png")
    print(*lines, f"wrote {config.out}: last.pt, previews/, cameras.txt, cameras.png (row C1)", sep="\n")


if __name__ == "__main__":
    command(main)
