"""FID and KID: Inception v3 by its published size and its files' names, the formulas by closed forms, and
stand-in weights for the rest."""
import pytest
import torch

import diffusion
from common import UserError
from lab import fid


def test_inception_has_its_published_size():
    """21,785,568 weights before the last layer: Keras' 21,802,784 counts two running numbers more, and one
    scale less, for each of 17,216 channels"""
    with torch.device("meta"):
        network = fid.Inception()
    assert sum(p.numel() for name, p in network.named_parameters() if not name.startswith("fc")) == 21_785_568
    names = set(network.state_dict())
    assert {"Conv2d_4a_3x3.bn.running_var", "Mixed_6c.branch7x7dbl_5.conv.weight", "fc.bias",
            "Mixed_7c.branch3x3_2b.bn.bias", "Mixed_7a.branch7x7x3_4.conv.weight",
            "Mixed_5d.branch_pool.conv.weight"} <= names


def test_a_mixed_block_is_its_branches_side_by_side():
    torch.manual_seed(0)
    pair = [("in", 4, 1), ("x_2a", 5, (1, 3)), ("x_2b", 6, (3, 1))]
    block = fid.Mixed(3, {"1x1": [("one", 2, 1)], "pair": pair}, "mean", 7).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        found, before = block(x), getattr(block, "in")(x)
        ones = torch.nn.functional.avg_pool2d(torch.ones(1, 1, 8, 8), 3, 1, 1)
        mean = torch.nn.functional.avg_pool2d(x, 3, 1, 1) / ones             # the padding does not count
        wanted = [block.one(x), block.x_2a(before), block.x_2b(before), block.branch_pool(mean)]
    assert block.width == found.shape[1] == 20 and torch.allclose(found, torch.cat(wanted, 1), atol=1e-5)


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 4, generator=generator).double()
    assert abs(fid.frechet(a, a)) < 1e-9
    shift = torch.tensor([1.0, 0, 2, 0])
    assert fid.frechet(a, a + shift) == pytest.approx(5, abs=1e-6)           # the same covariance
    C = torch.cov(a.T)
    assert fid.frechet(a, a.mean(0) + 3 * (a - a.mean(0))) == pytest.approx(4 * C.trace().item(), rel=1e-6)


def test_kid_of_one_distribution_is_zero_by_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 1, 8, generator=generator)
    value, deviation = fid.kid(a, b, torch.Generator().manual_seed(0))
    other, _ = fid.kid(a, b + 1, torch.Generator().manual_seed(0))
    assert abs(value) < 3 * deviation and other > 10 * deviation
    # Views of one object are alike.  As if they were independent, two sets of objects would seem far apart
    objects = torch.randn(2, 60, 1, 8, generator=generator).expand(2, 60, 4, 8)
    a, b = objects + 0.3 * torch.randn(2, 60, 4, 8, generator=generator)
    value, _ = fid.kid(a, b, torch.Generator().manual_seed(0))
    wrong, _ = fid.kid(*(some.reshape(240, 1, 8) for some in (a, b)), torch.Generator().manual_seed(0))
    assert abs(value) < wrong / 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A stand-in: the right names and shapes, random numbers"""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "stand_in.pth"
    state = {name: some for name, some in fid.Inception().state_dict().items() if "num_batches" not in name}
    torch.save(state | {"AuxLogits.fc.bias": torch.zeros(3)}, file)         # torchvision's file has these too
    return file


def test_a_table_by_stand_in_weights(weights, trained, data, tmp_path, cache, capsys):
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                    "--out", str(tmp_path / "diffusion")])
    fid.main(["--preset", "smoke", "--inception", str(weights), "--diffusion", str(tmp_path / "diffusion"),
              "--cache", str(cache), "--out", str(tmp_path / "fid"), "--device", "cpu"])
    text = (tmp_path / "fid/fid.md").read_text()
    assert "stand_in.pth" in text and all(f"| {name} |" in text for name in ("fresh objects", "ours"))
    assert "| ours | 16 |" in text and "nan" not in text


def test_weights_that_are_missing_or_others_are_one_sentence(weights, tmp_path):
    with pytest.raises(UserError, match="give a file by --inception"):
        fid.main([])
    with pytest.raises(UserError, match="cannot be read"):
        fid.load_inception(str(tmp_path / "nothing.pth"))
    state = torch.load(weights)
    some = state["Mixed_5b.branch1x1.conv.weight"]
    for wrong in (None, some.to_sparse(), some.long(), some / 0, some.to("meta")):
        torch.save(state | {"Mixed_5b.branch1x1.conv.weight": wrong}, tmp_path / "none.pth")
        with pytest.raises(UserError, match="no Inception v3: Mixed_5b.branch1x1.conv.weight|cannot be read"):
            fid.load_inception(str(tmp_path / "none.pth"))
    less = {name: some for name, some in state.items() if "Mixed_6b.branch1x1" not in name}
    torch.save(less, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"no Inception v3: Mixed_6b.branch1x1.conv.weight .*192, 768, 1, 1"):
        fid.load_inception(str(tmp_path / "less.pth"))


def test_torchvisions_file_pools_as_torchvision(weights, tmp_path):
    state = torch.load(weights)
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "torchvision.pth")
    ours, theirs = (fid.load_inception(str(file)) for file in (weights, tmp_path / "torchvision.pth"))
    pools = [[network.get_submodule(f"Mixed_{name}").pool for name in ("5b", "7c")]
             for network in (ours, theirs)]
    assert pools == [["mean", "max"], ["padded mean", "padded mean"]]
