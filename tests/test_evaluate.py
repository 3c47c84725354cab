"""Each metric by brute force and by its identities; whole runs repeat, and say what is missing."""
import json
import math
import os
import shutil

import pytest
import torch

import autodecoder
import diffusion
import lab.evaluate as stage
import render_shapenet
from common import UserError
from conftest import train
from lab import fresh, sweep


def clouds(count, points=20, seed=0, shift=0.0):
    return torch.rand(count, points, 3, generator=torch.Generator().manual_seed(seed)) - 0.5 + shift


def brute_chamfer(a, b):
    """By ten plain lines"""
    result = torch.zeros(len(a), len(b))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            there = sum(min(((p - q) ** 2).sum().item() for q in y) for p in x) / len(x)
            back = sum(min(((p - q) ** 2).sum().item() for p in x) for q in y) / len(y)
            result[i, j] = there + back
    return result


def brute_one_nna(a, b):
    right, both = 0, [(x, 0) for x in a] + [(y, 1) for y in b]
    for i, (x, label) in enumerate(both):
        others = [(brute_chamfer(x[None], y[None]).item(), its) for j, (y, its) in enumerate(both) if j != i]
        right += min(others)[1] == label
    return right / len(both)


# ------------------------------------------------------------------------------------------------- metrics

def test_the_largest_piece():
    solid = torch.zeros(6, 6, 6, dtype=torch.bool)
    solid[0, 0, :4] = solid[1, 1, 4] = True                      # five that hang together, by a corner
    solid[4, 4, 4] = True
    assert abs(stage.largest_piece(solid) - 5 / 6) < 1e-6


@pytest.mark.parametrize("tile", [1 << 18, 50])
def test_chamfer_is_its_formula(tile):
    a, b = clouds(4), clouds(9, 15, seed=1)
    assert (stage.chamfer(a, b, tile) - brute_chamfer(a, b)).abs().max() < 1e-6


def test_coverage_mmd_and_one_nna_are_their_formulas():
    a, b = clouds(6), clouds(6, seed=1, shift=0.05)
    between = brute_chamfer(a, b)
    assert (stage.mmd(stage.chamfer(a, b)) - between.min(0).values).abs().max() < 1e-6
    named = {row.index(min(row)) for row in between.tolist()}
    assert set(stage.coverage(stage.chamfer(a, b)).tolist()) == named
    mine = stage.one_nna(stage.chamfer(a, a), stage.chamfer(a, b), stage.chamfer(b, b)).double().mean().item()
    assert mine == pytest.approx(brute_one_nna(a, b))


def test_identities_of_a_set_with_itself_and_with_its_other_half():
    a = clouds(200, 8)
    D = stage.chamfer(a, a)
    assert len(stage.coverage(D).unique()) == 200 and stage.mmd(D).max() < 1e-6
    assert not stage.one_nna(D, D, D).any()                         # the nearest is its copy in the other set
    half = stage.one_nna(D[:100, :100], D[:100, 100:], D[100:, 100:]).double().mean()
    assert 0.35 < half < 0.65
    far = stage.chamfer(a[:100], a[100:] + 3)
    assert stage.one_nna(D[:100, :100], far, D[100:, 100:]).all()


def test_one_nna_against_fewer_objects_takes_every_group_of_samples():
    held, samples = {"points": clouds(4, 8)}, {"points": clouds(9, 8, seed=1)}
    samples["points"][4:8] += 3                                      # the second group is told apart, always
    row = stage.judge(samples, None, held, None, None, stage.Config(bootstrap=50))
    value, redrawn = row["1-NNA, decoded"]
    groups = [brute_one_nna(part, held["points"]) for part in samples["points"].split(4)[:2]]
    assert groups[1] == 1 and value == pytest.approx(sum(groups) / 2)
    assert redrawn.shape == (50,)


def test_the_deviation_of_one_nna_and_cov_is_that_of_other_draws():
    """Sets drawn again and again: a deviation may be a little too large, and not too small"""
    found = {"1-NNA, decoded": [], "COV": []}
    for k in range(40):
        g = torch.Generator().manual_seed(k)
        sets = [{"points": torch.randn(n, 4, 3, generator=g) * 0.05 + torch.randn(n, 1, 3, generator=g)}
                for n in (96, 48, 96)]
        row = stage.judge(sets[0], sets[2], sets[1], None, None, stage.Config(bootstrap=50, seed=k))
        for name, both in found.items():
            both.append((row[name][0], row[name][1].std().item()))
    for name, both in found.items():
        value, deviation = torch.tensor(both).T
        assert 0.9 < deviation.mean() / value.std() < 1.8, name


def test_an_empty_sample_is_not_whole_and_has_no_colours():
    some = {"piece": torch.tensor([1.0, 0.5, math.nan, 0.99]), "haze": torch.zeros(4),
            "colours": torch.tensor([0.1, 0.3, math.nan, 0.2]), "whose": torch.zeros(4, dtype=torch.long),
            "shape to training": torch.tensor([[1.0, 2]]).expand(4, 2)}
    row = stage.judge(some, None, None, {"piece": torch.ones(1)}, None, stage.Config(bootstrap=5))
    assert row["in pieces"][0] == 0.5 and row["colours"][0] == pytest.approx(0.2)


def test_a_collapsed_generator_and_swapped_sets():
    reference = clouds(10, 8)
    same = clouds(1, 8, seed=5).expand(10, -1, -1)
    assert len(stage.coverage(stage.chamfer(same, reference)).unique()) == 1
    # Samples all near one reference: COV is 1 of 10; taken the other way round it would look better
    near = reference[:1] + 0.001 * clouds(10, 8, seed=6)
    D = stage.chamfer(near, reference)
    assert len(stage.coverage(D).unique()) == 1 < len(stage.coverage(D.T).unique())


def test_z_u_sees_copies_and_passes_fresh_draws():
    g = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(count, 6, generator=g)
    training, unseen = draw(60), draw(200)
    distance = lambda x: torch.cdist(x, training).min(1).values
    copied = training[torch.randint(60, (200,), generator=g)] + 0.2 * draw(200)
    assert stage.z_u(distance(copied), distance(unseen)).item() < -10
    assert abs(stage.z_u(distance(draw(200)), distance(unseen)).item()) < 3
    assert stage.z_u(distance(3 * draw(200)), distance(unseen)).item() > 3
    # By hand: of 2 x 3 pairs the samples are larger in 1.5
    value = stage.z_u(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
    assert value.item() == pytest.approx((1.5 - 3) / math.sqrt(6 * 6 / 12))
    # Weights of a resampling count as the objects repeated would
    twice = stage.z_u(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]),
                      torch.tensor([[0, 2.0]]).double(), torch.tensor([[2.0, 0]]).double())
    assert twice.item() == pytest.approx(stage.z_u(torch.tensor([3.0, 3]), torch.tensor([2.0, 2])).item())


def test_copies_are_those_with_one_neighbour_far_nearer_than_the_next():
    assert stage.is_copy(torch.tensor([[1.0, 3.1, 9.0], [1.0, 2.0, 9.0]])).tolist() == [True, False]


@pytest.mark.parametrize("kernel", [stage.cubic, stage.minus_distance])
def test_kernel_distance_is_its_formula(kernel):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=g), torch.randn(9, 5, generator=g) + 1
    one = {stage.cubic: lambda x, y: (x @ y / 5 + 1).item() ** 3,
           stage.minus_distance: lambda x, y: -(x - y).norm().item()}[kernel]
    mean = lambda pairs: sum(pairs) / len(pairs)
    within = lambda s: mean([one(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    brute = within(a) + within(b) - 2 * mean([one(x, y) for x in a for y in b])
    assert stage.kernel_distance(kernel, a, b).item() == pytest.approx(brute, rel=1e-4)
    # An object drawn twice counts twice, and is no pair with itself
    times = torch.tensor([[2.0, 0, 1, 1, 0, 1, 1, 3, 0]]).double()
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    counts = [(times[0, i] * times[0, j]).item() for i, j in pairs]
    within_b = sum(n * one(b[i], b[j]) for n, (i, j) in zip(counts, pairs)) / sum(counts)
    between = sum(times[0, j].item() * one(x, b[j]) for x in a for j in range(9)) / (7 * 9)
    mine = stage.kernel_distance(kernel, a, b, torch.ones(1, 7).double(), times).item()
    assert mine == pytest.approx(within(a) + within_b - 2 * between, rel=1e-4)


def test_kernel_distance_tells_sets_apart():
    g = torch.Generator().manual_seed(1)
    draw = lambda shift: torch.randn(300, 4, generator=g) + shift
    for kernel in (stage.cubic, stage.minus_distance):
        assert abs(stage.kernel_distance(kernel, draw(0), draw(0))) < 0.1
        assert stage.kernel_distance(kernel, draw(0), draw(0.7)) > 0.2


def test_gaussian_has_the_points_mean_and_covariance():
    g = torch.Generator().manual_seed(2)
    points = torch.randn(50, 2, 3, generator=g) @ torch.randn(3, 3, generator=g) + 5
    drawn = stage.gaussian(points, 40_000, g)
    assert (drawn.mean(0) - points.mean(0)).abs().max() < 0.1
    assert (drawn.flatten(1).T.cov() - points.flatten(1).T.cov()).abs().max() < 0.15


# ------------------------------------------------------------------------------------------- fresh objects

def test_points_of_a_mesh_lie_on_it_and_the_cameras_stand_all_around():
    one = fresh.see_object("fresh", 3, 0, 4, 256)
    points = torch.from_numpy(one["points"])
    assert points.shape == (256, 3) and points.abs().max() < 0.5
    again = fresh.see_object("fresh", 3, 0, 4, 128)
    assert torch.equal(torch.from_numpy(again["points"]), points[:128])           # fewer are a part of more
    # The fused points of a sphere: on its surface, and on every side of it
    origins, directions = fresh.rays_around()
    unit = directions / directions.norm(dim=-1, keepdim=True)
    along = -(origins * unit).sum(-1)
    gap = 0.3 ** 2 - (origins.square().sum(-1) - along ** 2)
    depth = (along - gap.clamp(min=0).sqrt()) / directions.norm(dim=-1)
    ball = fresh.cloud(origins, directions, depth, gap > 0, 2000)
    assert (ball.norm(dim=1) - 0.3).abs().max() < 1e-5 and ball.mean(0).norm() < 0.02
    assert torch.equal(fresh.cloud(origins, directions, depth, gap > 9, 5), torch.zeros(5, 3))


def test_the_reader_learns_what_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh, "FEW", 2)                                          # by several processes
    config = stage.Config(readings=6, reader_steps=120, cache=str(tmp_path))
    run = stage.Run(tmp_path, "fresh", config, (), stale=())
    reader = fresh.train_reader(config, run, torch.device("cpu"))
    seen = fresh.see_objects(tmp_path / "readings.pt", "test", range(72, 78), config, 4, 0, run)
    _, answers = fresh.read(reader, seen["rgb"])
    assert (answers == seen["true labels"]).float().mean() > 0.9
    again = fresh.train_reader(config, run, torch.device("cpu"))                  # from the file, the same
    assert torch.equal(fresh.read(again, seen["rgb"])[1], fresh.read(reader, seen["rgb"])[1])
    cells = fresh.training_cells(["train_00000", "train_00006"], tmp_path)
    assert cells and fresh.training_cells(["train_00000", "1a2b3c"], tmp_path) is None


# ---------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def arguments(trained, data, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                    "--out", str(folder / "diffusion")])
    return ["--preset", "smoke", "--diffusion", str(folder / "diffusion"), "--cache", str(cache),
            "--data", str(data / "earphones_test"), "--out", str(folder / "out"), "--device", "cpu"]


def test_a_run_repeats_to_the_last_digit(arguments, cache, capsys):
    for file in cache.glob("fits_*"):                                   # other tests may have fitted them
        file.unlink()
    stage.main(arguments)
    out = stage.Path(arguments[arguments.index("--out") + 1])
    first = (out / "tables.json").read_text()
    stage.main(arguments)
    said = capsys.readouterr().out
    assert said.count("fitting the codes") == 1 and (out / "tables.json").read_text() == first
    rows = json.loads(first)["rows"]
    assert {"ours", "recombined codes", "swapped colours", "Gaussian of codes", "Gaussian of latents",
            "a copier",
            "training objects", "held-out objects", "fresh objects", "fresh objects, blurred",
            "noise"} == set(rows)
    assert rows["a copier"]["copies"][0] == 1
    assert "Z_U" in rows["ours"] and "MMD" not in rows["noise"]
    text = (out / "tables.md").read_text()
    for heading in ("Generation", "Memorisation", "Neatness", "Factors"):
        assert heading in text
    assert "down the ladder noise, fresh objects, blurred" in text
    assert (out / "figure.png").exists()


def test_of_thousands_some_stand_for_all(arguments, monkeypatch, capsys, tmp_path):
    flags = [*arguments, "--no-controls", "--out", str(tmp_path)]
    stage.main(flags)
    whole = json.loads((tmp_path / "tables.json").read_text())["rows"]["ours"]
    monkeypatch.setattr(stage, "MOST", 2)                               # of three
    capsys.readouterr()
    stage.main(flags)
    assert "seeing 2 of training objects" in capsys.readouterr().out
    assert "Of 3 training objects 2 stand for all" in (tmp_path / "tables.md").read_text()
    row = json.loads((tmp_path / "tables.json").read_text())["rows"]["ours"]
    assert row["d1"] == whole["d1"] and row["copies"] == whole["copies"]     # latents: to all of them
    assert row["Z_U"] == whole["Z_U"]


def test_without_fresh_objects_the_table_says_so(data, cache, tmp_path):
    for k, entry in enumerate(sorted((data / "earphones_train").iterdir())):
        (tmp_path / "real/earphones_train").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"real/earphones_train/model{k}").symlink_to(entry)
    train(tmp_path / "real", tmp_path / "autodecoder", "--steps", "100", "--rays", "256")
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(tmp_path / "autodecoder"),
                    "--device", "cpu", "--out", str(tmp_path / "diffusion")])
    flags = ["--preset", "smoke", "--diffusion", str(tmp_path / "diffusion"), "--device", "cpu",
             "--out", str(tmp_path / "out"), "--cache", str(cache), "--no-controls"]
    stage.main(flags)                                          # nothing is held out: only what needs nothing
    rows = json.loads((tmp_path / "out/tables.json").read_text())["rows"]
    assert {"d1", "copies"} <= set(rows["ours"]) and not {"Z_U", "1-NNA"} & set(rows["ours"])
    assert (tmp_path / "out/tables.md").read_text().count("not defined") > 10
    (tmp_path / "real/earphones_test").symlink_to(data / "earphones_test")
    stage.main(flags)                                          # beside the training photos, _test for _train
    rows = json.loads((tmp_path / "out/tables.json").read_text())["rows"]
    assert {"Z_U", "1-NNA", "COV"} <= set(rows["ours"]) and "to photos" not in rows["ours"]
    text = (tmp_path / "out/tables.md").read_text()
    assert "not defined" in text and "noise" not in text


def test_what_is_missing_or_too_little_is_one_sentence(arguments, tmp_path):
    with pytest.raises(UserError, match="--count 2: at least 4"):
        stage.main([*arguments, "--count", "2"])
    with pytest.raises(UserError, match="nothing.*/last.pt is not there|last.pt is not there"):
        stage.main([*arguments, "--diffusion", str(tmp_path / "nothing")])
    (tmp_path / "file").write_text("")
    for flag in ("--out", "--cache"):                                  # before an hour's work, not after it
        for place in ("file", "file/out"):
            with pytest.raises(UserError, match="cannot write to"):
                stage.main([*arguments, flag, str(tmp_path / place)])


def test_a_cache_is_of_what_made_it(tmp_path, capsys):
    made = []

    def make(value):
        made.append(value)
        return {"x": torch.full((3,), float(value))}
    file = tmp_path / "cache.pt"
    of = lambda value, *ingredients: fresh.kept(file, [*ingredients], lambda: make(value))["x"][0].item()
    assert of(1, "seed", 0, torch.zeros(2)) == 1 and of(2, "seed", 0, torch.zeros(2)) == 1 and made == [1]
    state = fresh.load_checkpoint(file)
    fresh.save_checkpoint(file, {"recipe": state["recipe"]})
    assert of(2, "seed", 0, torch.zeros(2)) == 2 and made.pop() == 2
    assert of(3, "seed", 1, torch.zeros(2)) == 3 and of(4, "seed", 1, torch.tensor([0, 1e-30])) == 4
    assert "making it again" in capsys.readouterr().out
    file.write_bytes(b"broken")
    assert of(5, "seed", 1) == 5 and "damaged" in capsys.readouterr().out
    assert fresh.kept(file, ["seed", 1], lambda: make(6), lambda content: False)["x"][0] == 6     # too small


def test_fits_of_other_steps_are_made_again_and_tables_come_before_files(arguments, tmp_path, monkeypatch,
                                                                         capsys):
    out = tmp_path / "caf\udce9"                                         # a name that is no UTF-8
    out.mkdir()
    (out / "config.json").write_text("a run's own")
    flags = [*arguments, "--no-controls", "--out", str(out)]
    stage.main(flags)
    assert "caf\\udce9: tables.md" in capsys.readouterr().out
    assert (out / "tables.md").exists() and (out / "config.json").read_text() == "a run's own"

    def full(path, text):
        raise UserError("the disk is full")
    monkeypatch.setattr(stage, "save_text", full)
    with pytest.raises(UserError, match="the disk is full"):
        stage.main([*flags, "--fit_steps", "2"])
    said = capsys.readouterr().out
    assert "fitting the codes" in said and "### Factors" in said


def test_fits_to_other_photos_are_made_again(trained, data, tmp_path, capsys):
    model, _ = autodecoder.load_autodecoder(trained)
    shutil.copytree(data / "earphones_test", tmp_path / "data")
    config = stage.Config(data=str(tmp_path / "data"), cache=str(tmp_path), fit_steps=1)
    made = lambda: (fresh.held_out_codes(model, config, None, torch.device("cpu")),
                    "fitting" in capsys.readouterr().out)[1]
    assert made() and not made()
    one = tmp_path / "data/test_00000"
    for kind in ("rgb/00000{}.png", "mask/00000{}.png", "pose/00000{}.txt"):       # each of them counts
        shutil.copy(one / kind.format(2), one / kind.format(1))
        assert made() and not made()


def test_a_name_in_a_table_is_text():
    lines = stage.markdown("t", ["", "a|b"], [["<b>x</b>\n| y", "1"]]).splitlines()
    assert lines[2:] == ["|  | a\\|b |", "|---|---|", "| &lt;b&gt;x&lt;/b&gt; \\| y | 1 |"]


@pytest.mark.parametrize("factors", [b"[]", b"{}", b"\xff", b'{"kind": "x", "palette": "y", "part": "z"}'])
def test_factors_of_somebody_else_are_none_of_ours(tmp_path, factors):
    (tmp_path / "train_00000").mkdir()
    (tmp_path / "train_00000/factors.json").write_bytes(factors)
    assert fresh.training_cells(["train_00000"], tmp_path) is None


def test_a_worker_whose_disk_is_full_is_one_sentence(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_): pass
        def shutdown(self, **_): pass
        def map(self, *_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(fresh, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match="worker process cannot go on: .*No space"):
        fresh.see_objects(tmp_path / "x.pt", "test", range(65), stage.Config(), 4, 0, None)


def test_lines_of_a_log_that_are_no_rows_are_passed_over(tmp_path):
    log, read = tmp_path / "log.jsonl", lambda: autodecoder.read_log(tmp_path)
    assert not read()
    log.write_bytes(b'{"step": 1, "heldout": 20.5}\nnull\n[3]\n\xff\0\n{"heldout": {}}\n{"step": 2}\n{"hel')
    assert read() == [{"step": 1, "heldout": 20.5}, {"step": 2}]
    log.write_bytes(b"[" * 100_000)
    assert not read()
    log.unlink()
    os.mkfifo(log)                                                       # which would never end
    assert not read()


def test_the_held_out_number_is_that_of_the_closing_table(tmp_path):
    assert math.isnan(sweep.held_out_psnr(tmp_path))
    (tmp_path / "table.txt").write_text(
        "PSNR, dB: full / foreground   ours  all white\nbuds  9 objects   28.76 / 21.20   12.86 /  3.81\n"
        "all              256 objects   27.95 / 21.32   11.78 /  3.59                0.0000\n")
    assert sweep.held_out_psnr(tmp_path) == 27.95
    (tmp_path / "table.txt").write_bytes(b"\xff\0all 3 objects")
    assert math.isnan(sweep.held_out_psnr(tmp_path))


@pytest.mark.parametrize("content", ['{"rows": {"ou', "[]", '{"rows": {}}', '{"rows": {"ours": {"d1": 3}}}',
                                     '{"rows": {"ours": {"copies": [null, null]}}}', '{"rows": {"ours": "ab"}}',
                                     '{"rows": {"ours": {"COV": [1, ""]}}}', '{"rows": {"ours": {"COV": [1e308, 0]}}}',
                                     '{"rows": {"ours": {}}}', '{"rows": {"ours": {"COV": [0.5, -1]}}}',
                                     '{"rows": {"ours": {"COV": [1%s, 0]}}}' % ("0" * 400)])
def test_tables_that_are_cut_are_one_sentence(tmp_path, content):
    config = sweep.Config(out=str(tmp_path))
    folder = tmp_path / "stage2/default+mix=0.0+0/evaluate"
    folder.mkdir(parents=True)
    (folder / "tables.json").write_text(content)
    with pytest.raises(UserError, match="tables.json cannot be read"):
        sweep.one_run(config, {}, {"mix": 0.0}, 0)


def test_a_report_of_runs_without_held_out_numbers(tmp_path, capsys):
    rows = [("0.0", {"PSNR": math.nan, "copies": [0.5, 0.1]}),
            ("1.0", {"PSNR": 20.0, "copies": [0, 0], "Z_U": [1, 1]})]
    sweep.report(tmp_path, "mix", rows)
    assert "| 0.0 | nan | 50.0 +- 10.0 | - |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").exists()


def test_a_pipe_for_factors_is_not_opened(tmp_path):
    (tmp_path / "train_00000").mkdir()
    os.mkfifo(tmp_path / "train_00000/factors.json")
    assert fresh.training_cells(["train_00000"], tmp_path)               # as earphones.py draws them


def test_a_sweep_resumes_and_reports(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sweep.SWEEPS, "mix", [("0.0", {}, dict(mix=0.0)), ("0.5", {}, {})])
    photos = str(tmp_path / "data")
    render_shapenet.main(["--out", photos, "--objects", "3", "--test_objects", "0",
                          "--views", "2", "--holdout_views", "8", "--size", "32", "--workers", "1"])
    flags = ["mix", "--stages", "smoke", "--data", photos, "--out", str(tmp_path), "--steps1", "100",
             "--steps2", "4", "--count", "6", "--points", "64", "--fits", "4", "--device", "cpu", "--cache",
             arguments[arguments.index("--cache") + 1]]
    with pytest.raises(UserError, match="--hours 0 are over, 0 runs done"):
        sweep.main([*flags, "--hours", "0"])
    with pytest.raises(UserError, match="--count 2: at least 4"):
        sweep.main([*flags, "--count", "2"])
    (tmp_path / "empty/earphones_train").mkdir(parents=True)
    with pytest.raises(UserError, match="fewer than the 4096 objects"):
        sweep.main(["objects", *flags[1:], "--out", str(tmp_path / "many")])
    with pytest.raises(UserError, match="holds no photos"):                 # and the folder is not remembered
        sweep.main([*flags, "--data", str(tmp_path / "empty")])
    sweep.main(flags)
    assert (tmp_path / "mix/table.md").read_text().count("\n| 0.") == 2
    assert (tmp_path / "mix/figure.png").exists()
    with open(tmp_path / "stage1/default/log.jsonl", "a") as log:
        log.write('{"step": 9, "heldo')                                           # cut off by a kill
    capsys.readouterr()
    sweep.main(flags)                                                             # all is there already
    assert "step" not in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with --steps2 4, not 5"):
        sweep.main([*flags, "--steps2", "5"])
    with pytest.raises(UserError, match="which sweep.*objects, latent"):
        sweep.main(["mixx"])


@pytest.mark.parametrize("notes", ["", "\n# I think\n", "\xff"])
def test_notes_among_the_answers_do_no_harm(tmp_path, notes, capsys):
    from lab import blind
    file = tmp_path / "answers.txt"
    file.write_bytes(b"1 sample of seed 0\n2 fresh object 3\n" + notes.encode("latin-1"))
    blind.score(file, {1})
    assert "2 of 2 right" in capsys.readouterr().out
    file.write_text(notes)
    with pytest.raises(UserError, match="holds no answers"):
        blind.score(file, {1})


def test_a_blind_sheet_hides_what_it_shows_and_scores_answers(trained, data, cache, tmp_path, capsys):
    from lab import blind
    out = tmp_path / "blind"
    diffusion.main(["--preset", "smoke", "--autodecoder", str(trained), "--steps", "4",
                    "--out", str(tmp_path / "diffusion")])
    with pytest.raises(UserError, match="first draw the sheet"):
        blind.main(["--out", str(out), "--samples", "1"])
    blind.main(["--preset", "smoke", "--diffusion", str(tmp_path / "diffusion"), "--fits", "4",
                "--data", str(data / "earphones_test"), "--out", str(out),
                "--cache", str(cache)])
    lines = [line.split() for line in (out / "answers.txt").read_text().splitlines()]
    true = [int(number) for number, kind, *_ in lines if kind == "sample"]
    assert len(lines) == 2 * len(true) == 4 and (out / "blind.png").exists()     # of two test objects
    capsys.readouterr()
    blind.main(["--out", str(out), "--samples", *map(str, true)])
    said = capsys.readouterr().out
    assert "4 of 4 right (100%; 50 % is guessing, and as good by chance: 0.062); of 2 taken" in said
    wrong = [number for number in range(1, 5) if number not in true]
    blind.main(["--out", str(out), "--samples", *map(str, wrong)])
    assert "0 of 4 right (0%; 50 % is guessing, and as good by chance: 1)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--samples 9: the sheet's numbers are 1 to 4"):
        blind.main(["--out", str(out), "--samples", "9"])
