"""
Words about earphones: what each means, what a text leaves open, and captions of an object from its factors.

The vocabulary is closed: WORDS.  A word means a set of values of some factors (earphones.py): "headset" is
any headphone with a boom microphone.  A caption is true, and it never says everything.

read WORDS, understood, caption; chapters/prompt.py trains on them.
"""
import difflib
import re

import torch

from common import UserError
from shapes.earphones import BANDS, KINDS, PALETTES, PARTS

HEAD = ("over-ear", "on-ear")
WORDS = {}                               # word -> {factor: the values of which it is true}


def _means(words, **factors):
    WORDS.update(dict.fromkeys(words.split(), factors))


_means("over-ear around-ear circumaural", kind=("over-ear",))
_means("on-ear supra-aural", kind=("on-ear",))
_means("neckband", kind=("neckband",))
_means("buds earbuds in-ear", kind=("buds",))
_means("headphones headphone headband", kind=HEAD)
_means("headset gaming microphone mic boom", kind=HEAD, boom=(True,))
for palette, also in zip(PALETTES, ("jet", "grey gray", "ivory", "metallic", "cream sand", "blue", "pink")):
    _means(f"{palette} {also}", palette=(palette,))
for part, also in zip(PARTS, ("round circular", "oval elliptical", "d-shaped half-round")):
    _means(also, part=(part,))
for band in dict.fromkeys(sum(BANDS.values(), ())):
    _means(band, band=(band,), kind=tuple(kind for kind in KINDS if band in BANDS[kind]))
MEANINGS = [dict(items) for items in dict.fromkeys(tuple(means.items()) for means in WORDS.values())]
IGNORED = set("a an the with and in of pair shape cup cups pod pods band earphones colour color".split())
NOT = set("no not without non never except minus".split())


def words_of(text):
    """-> its words, in lower case; "over ear" is one word"""
    text = re.sub(r"\b(over|on|in|around|d)[ -](ears?|shaped)\b",
                  lambda m: f"{m[1]}-{m[2].removesuffix('s')}", text.lower())
    return re.findall(r"[\w-]+", text)


def understood(text):
    """text -> {factor: values}, what its words leave open; a UserError if they leave nothing"""
    allowed, by = {}, {}
    for word in words_of(text):
        if word in NOT:
            raise UserError(f"\"{word}\": this model knows no negation; say what the earphones shall be")
        if word not in WORDS and word not in IGNORED:
            near = difflib.get_close_matches(word, WORDS, 3, 0)
            raise UserError(f"\"{word}\" is none of the {len(WORDS)} words that this model knows; the nearest"
                            f" are {', '.join(near)}.  (--encoder minilm takes any text)")
        for factor, values in WORDS.get(word, {}).items():
            left = tuple(v for v in allowed.get(factor, values) if v in values)
            if not left:
                raise UserError(f"\"{by[factor]}\" and \"{word}\" contradict each other: nothing is both")
            allowed[factor], by[factor] = left, word
    return allowed


def is_true(meaning, parents):
    """Is a meaning true of all these objects' factors?"""
    return all(one[factor] in values for one in parents for factor, values in meaning.items())


def caption(shapes, colours, generator):
    """Factors of the objects whose shape and whose colours a code has -> one of the many captions that are
    true of it"""
    drawn = lambda options: options[torch.randint(len(options), (), generator=generator)] if options else ""
    maybe = lambda share, word: word if torch.rand((), generator=generator) < share else ""
    true = [word for word, meaning in WORDS.items()
            if is_true(meaning, [colours] if "palette" in meaning else shapes)]
    of = lambda *factors: [word for word in true if set(WORDS[word]) == set(factors)]
    colour, outline = maybe(0.8, drawn(of("palette"))), maybe(0.5, drawn(of("part")))
    band = drawn(of("band", "kind"))
    # A noun, and perhaps an adjective before it
    noun = drawn([word for word in of("kind") if word in ("neckband", "buds", "earbuds", "headphones")])
    form = maybe(0.8, drawn([word for word in of("kind") if word.endswith(("-ear", "aural"))]))
    mic = maybe(0.8, drawn(of("kind", "boom")))
    if mic in ("headset", "gaming"):
        noun, mic = "gaming headset" if mic == "gaming" else "headset", ""
    said = [word for word in (mic, maybe(0.3, band and f"{band} band")) if word]
    front = " ".join(word for word in (colour, outline, form, maybe(0.9, noun) or "earphones") if word)
    return f"{front} with a {' and a '.join(said)}".replace("a arched", "an arched") if said else front
