"""Records of the toybox, one function a task family: each takes a generator and returns a record with the truth about it.

The truth (:class:`~lightning_mmgen.toybox.truth.Truth`) travels in ``record.extra["truth"]``, for the oracle alone; no model sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image

from ..prompt import CONTROLS, EDIT, Picture, Record, Reference, in_context
from .render import SIDE, draw, portrait
from .truth import Truth, boxes, picture
from .world import BACKGROUNDS, COLOURS, SHAPES, STYLES, TEXTURES, Placed, Scene, Toy, held_out, other_view, place, random_scene

REFERENCE_SIDE = 48
PREFIXES = ("", "", "draw ", "generate an image of ", "a picture of ")


def _mask(coverage: Any) -> Image:
    return PILImage.fromarray((np.clip(coverage, 0, 1) * 255).astype(np.uint8))


def _portrait(rng: np.random.Generator, toy: Toy) -> Image:
    ground = str(rng.choice([b for b in BACKGROUNDS if b != toy.colour]))
    return PILImage.fromarray(portrait(toy, ground, REFERENCE_SIDE))


def _glimpses(rng: np.random.Generator, scene: Scene) -> tuple[Scene, list[Image]]:
    """Each toy of a scene alone, as references show it, and the scene in the style that they show: portraits, which are flat, or as often
    crops of other pictures in the scene's style (their boxes, up to a pixel off)."""
    if rng.random() < 0.5:
        return replace(scene, style="flat"), [_portrait(rng, placed.toy) for placed in scene.toys]
    return scene, [_cropped(rng, place(rng, (placed.toy,), style=scene.style)) for placed in scene.toys]


def _cropped(rng: np.random.Generator, scene: Scene) -> Image:
    """The first toy of a scene, cut out of its picture; up to a pixel off."""
    box, off = boxes(scene)[0], rng.integers(-1, 2, 4)
    return picture(scene).crop(tuple(int(edge) + int(by) for edge, by in zip(box[1:5], off, strict=True)))  # type: ignore[arg-type]


def _record(
    task: str,
    text: str,
    scene: Scene,
    refs: list[Reference],
    truth: Truth,
    told: str | None = None,
    pictured: tuple[str, ...] = (),
    **more: Any,
) -> Record:
    """``told``: what the instruction says of the scene in words, if that is not all; ``pictured``: as of :meth:`Truth.foil`."""
    pixels, masks = draw(scene)
    target, where, words = PILImage.fromarray(pixels), boxes(scene, masks), scene.caption()
    more |= {"description": truth.description(), "foil": truth.foil(pictured), "boxes": where}
    return Record(text, tuple(refs), target, words, task=task, extra={"truth": truth, "told": told or words}, **more)


def caption(rng: np.random.Generator, held: bool) -> Record:
    """Words alone: every named attribute, sometimes without the sizes, and without the style where it is flat."""
    scene = random_scene(rng, held=held)
    sizes, style = bool(rng.random() < 0.7), scene.style != "flat" or bool(rng.random() < 0.5)
    told = scene.caption(sizes=sizes, style=style)
    return _record("caption", str(rng.choice(PREFIXES)) + told, scene, [], Truth(scene, (), sizes, style), told)


def measured(rng: np.random.Generator, held: bool, twin: bool = False, alone: bool = False) -> Record:
    """A caption that names most of the toys' measures too, or none of them in a third of the cases. What published text-to-image models
    know of shapes' proportions from their captions; a reference can only steer what the UNet can draw.

    Args:
        twin: every toy :meth:`~lightning_mmgen.toybox.world.Toy.mirrored`, all else as without it.
        alone: one toy, large, in the centre of a grey picture, all measures named: where geometry is learned first.
    """
    scene = random_scene(rng, held=held, toys=1 if alone else None)
    if alone:
        scene = replace(other_view(rng, scene.toys[0].toy), background="grey")
    if twin:
        scene = replace(scene, toys=tuple(replace(p, toy=p.toy.mirrored()) for p in scene.toys))
    sizes, style = bool(rng.random() < 0.7), scene.style != "flat" or bool(rng.random() < 0.5)
    share = 1.0 if alone else 0.0 if rng.random() < 0.35 else 0.85
    names = [p.toy.words([n for n, u in zip(p.toy.measures(), rng.random(5), strict=False) if u < share]) for p in scene.toys]
    told = scene.caption(names, sizes=sizes, style=style)
    return _record("measured", str(rng.choice(PREFIXES)) + told, scene, [], Truth(scene, (), sizes, style), told)


def subject(rng: np.random.Generator, held: bool, toys: int | None = None, kinds: bool = False) -> Record:
    """The toys are shown, not named: another picture of each, and words for place and background. ``kinds``: the words say which shape each
    toy has, as captions of photographs do ("a [ref#1] vase")."""
    scene = replace(random_scene(rng, held=held, toys=toys), style="flat")
    phrases = ["toy" if u < 0.7 else "" if u < 0.85 else p.toy.shape for u, p in zip(rng.random(2), scene.toys, strict=False)]
    phrases = [p.toy.shape for p in scene.toys] if kinds else phrases
    names = [f"[ref#{k + 1}] {phrase}".strip() for k, phrase in enumerate(phrases)]
    refs = [Reference(k + 1, _portrait(rng, p.toy), phrase) for k, (p, phrase) in enumerate(zip(scene.toys, phrases, strict=True))]
    sizes, where = bool(rng.random() < 0.3), len(names) == 1 or bool(rng.random() < 0.85)
    stated = scene if where else replace(scene, place="and")
    text = str(rng.choice(PREFIXES)) + stated.caption(names, sizes=sizes, style=False)
    told = stated.caption([phrase or "toy" for phrase in phrases], sizes=sizes, style=False)
    return _record("subject", text, scene, refs, Truth(scene, tuple((k, k + 1) for k in range(len(names))), sizes, place=where), told)


def crops(rng: np.random.Generator, held: bool) -> Record:
    """MUMU's records: a caption that names the toys wholly, by their shape, or only as toys, and the style in half of them; and where its
    phrases lie. What the words leave out is for crops of the target to show, which :class:`~lightning_mmgen.data.crops.CropRecipe` puts
    before them."""
    scene = random_scene(rng, held=held)
    how = str(rng.choice(["wholly", "shape", "toy"]))
    names = [{"wholly": p.toy.words(), "shape": p.toy.shape, "toy": "toy"}[how] for p in scene.toys]
    text, at, where = scene.caption(names, style=bool(rng.random() < 0.5)), 0, []
    shown = tuple((k, k + 1) for k in range(len(names)))
    record = _record("crops", text, scene, [], Truth(scene, shown, True, True))
    for name, box in zip(names, record.boxes, strict=True):
        at = text.index(f"{name} ", at)
        where.append(box._replace(phrase=name, start=at))
        at += len(name)
    return replace(record, caption=text, boxes=tuple(where))


def style(rng: np.random.Generator, held: bool) -> Record:
    """The style is shown by another picture, the scene is told."""
    scene = random_scene(rng, held=held)
    other = replace(random_scene(rng), style=scene.style)
    told = scene.caption(style=False)
    text = f"Create an image in [ref#1] style with the caption: {told}"
    return _record("style", text, scene, [Reference(1, picture(other), "style", "style")], Truth(scene, (), True, True), told, ("style",))


def style_transfer(rng: np.random.Generator, held: bool) -> Record:
    """The style is shown by one picture, the content by another."""
    content = replace(random_scene(rng, held=held), style="flat")
    scene = replace(content, style=str(rng.choice(STYLES[1:])))
    other = replace(random_scene(rng), style=scene.style)
    refs = [Reference(1, picture(other), "style", "style"), Reference(2, picture(content), "content", "content")]
    text = "Draw a picture in the given [ref#1] style, following the specified [ref#2] content"
    return _record(
        "style_transfer",
        text,
        scene,
        refs,
        Truth(scene, tuple((k, 2) for k in range(len(scene.toys))), False, True),
        None,
        ("sizes", "style"),
    )


def control_image(scene: Scene, kind: str) -> Image:
    """The scene's ``mask``, ``depth`` (near is bright), ``edge`` or ``sketch`` as a grey picture."""
    pixels, masks = draw(scene)
    if kind == "mask":
        return _mask(np.maximum.reduce(masks))
    if kind == "depth":
        depth = np.linspace(0.1, 0.3, SIDE, dtype=np.float32)[:, None].repeat(SIDE, 1)
        for placed, mask in zip(scene.toys, masks, strict=True):
            depth = depth * (1 - mask) + (0.9 if placed.size == "large" else 0.7) * mask
        return _mask(depth)
    source = pixels.astype(np.float32) / 255 if kind == "edge" else np.maximum.reduce(masks)[..., None]
    slope = np.hypot(*np.gradient(source, axis=(0, 1))).max(-1)  # of the channel that changes most
    return _mask(np.clip(slope * 4, 0, 1) if kind == "edge" else 1 - np.clip(slope * 2, 0, 1))


def control(rng: np.random.Generator, held: bool, kind: str | None = None) -> Record:
    """The layout is shown by an edge, mask, depth or sketch picture, the rest is told."""
    scene = random_scene(rng, held=held)
    kind = kind or str(rng.choice(["edge", "mask", "depth", "sketch"]))
    told = scene.caption(sizes=False)
    text = f"Using the [ref#1] {kind} image, generate an image to reflect the caption: {told}"
    return _record(
        "control", text, scene, [Reference(1, control_image(scene, kind), kind, kind)], Truth(scene, (), True, True), told, ("sizes",)
    )


def composition(rng: np.random.Generator, held: bool, shows: tuple[str, ...], toys: int | None = None) -> Record:
    """Several conditions at once, each by a picture of its own, in the order of ``shows``: ``subject`` (one for each toy), ``style``, a
    kind of control (``mask``, say); what no picture shows is told, and of subjects their shapes. Instruct-Imagen, section 5: no task of
    its training has two of them."""
    scene = random_scene(rng, held=held, toys=toys)
    if "style" not in shows:
        scene = replace(scene, style="flat")
    refs: list[Reference] = []
    names, said = [p.toy.words() for p in scene.toys], []
    shown: tuple[tuple[int, int], ...] = ()
    for what in shows:
        k = len(refs) + 1
        if what == "subject":
            refs += [Reference(k + i, _portrait(rng, p.toy), p.toy.shape) for i, p in enumerate(scene.toys)]
            names = [f"[ref#{k + i}] {p.toy.shape}" for i, p in enumerate(scene.toys)]
            shown = tuple((i, k + i) for i in range(len(scene.toys)))
        elif what == "style":
            refs.append(Reference(k, picture(replace(random_scene(rng), style=scene.style)), "style", "style"))
            said.append(f"in [ref#{k}] style")
        else:
            refs.append(Reference(k, control_image(scene, what), what, what))
            said.append(f"following the [ref#{k}] {what} image")
    asked = " ".join(["Generate an image", *said, "with the caption:"])
    told = scene.caption([p.toy.shape for p in scene.toys] if shown else names, sizes=False, style=False)
    truth = Truth(scene, shown, sizes=bool(set(shows) - {"subject", "style"}), style="style" in shows)
    return _record("composition", f"{asked} {scene.caption(names, sizes=False, style=False)}", scene, refs, truth, told)


def change(rng: np.random.Generator, scene: Scene) -> tuple[str, Scene, int | None, str]:
    """One edit of a scene: its instruction, the scene after it, the toy that it touches, if it is of one, and the condition that it
    brings about."""
    k = int(rng.integers(len(scene.toys)))
    placed, toy = scene.toys[k], scene.toys[k].toy
    kind = str(rng.choice(["colour", "texture", "shape", "background", "style"]))
    if kind == "background":
        new = str(rng.choice([b for b in BACKGROUNDS if b != scene.background and b not in {p.toy.colour for p in scene.toys}]))
        return f"change the background to {new}", replace(scene, background=new), None, kind
    if kind == "style":
        new = str(rng.choice([s for s in STYLES if s != scene.style]))
        return f"make it {new} style", replace(scene, style=new), None, kind
    taken = {p.toy.colour for p in scene.toys} | {scene.background}
    pool = {
        "colour": [c for c in COLOURS if c not in taken],
        "texture": [t for t in TEXTURES if t != toy.texture],
        "shape": [s for s in SHAPES if s != toy.shape],
    }
    new = str(rng.choice(pool[kind]))
    edited = replace(placed, toy=replace(toy, **{kind: new}))  # type: ignore[arg-type]
    toys = tuple(edited if i == k else p for i, p in enumerate(scene.toys))
    text = f"turn the {toy.words()} into a {new}" if kind == "shape" else f"make the {toy.words()} {new}"
    return text, replace(scene, toys=toys), k, f"{kind} {k + 1}"


def edit(rng: np.random.Generator, held: bool) -> Record:
    """One edit of a source picture, with the mask of what may change: a toy before and after it, what is no toy, or all (a style)."""
    return edit_session(rng, held, 1)[0]


def edit_turn(rng: np.random.Generator, held: bool, turns: int = 5) -> Record:
    """Any one turn of a multi-turn edit."""
    return edit_session(rng, held, turns)[int(rng.integers(turns))]


def edit_session(rng: np.random.Generator, held: bool, turns: int) -> list[Record]:
    """A multi-turn edit: the target of turn k is the source of turn k + 1."""
    scene, name, out = random_scene(rng, held=held), f"s{rng.integers(1 << 40):010x}", []
    for turn in range(turns):
        text, after, k, what = change(rng, scene)
        while not held and held_out(tuple(p.toy for p in after.toys)):  # training never sees a held-out combination
            text, after, k, what = change(rng, scene)
        toys, now = draw(scene)[1], draw(after)[1]
        cover = np.maximum(toys[k], now[k]) if k is not None else 1 - np.maximum.reduce(toys) * (what == "background")
        refs, shown = [Reference(1, picture(scene), "picture", "source")], tuple((i, 1) for i in range(len(toys)))
        truth = Truth(after, shown, sizes=True, style=True, edited=what)
        more: dict[str, Any] = {"source_caption": scene.caption(), "mask": _mask(cover), "session": name, "turn": turn}
        out.append(_record("edit", EDIT.format(text), after, refs, truth, **more))
        scene = after
    return out


def retrieval(rng: np.random.Generator, held: bool) -> Record:
    """Three neighbours as context, with their captions as phrases. In two of three clusters they have the target's first toy, or all its
    toys, on its background and in its style: other pictures, or close-ups. In the others they have all its toys where it has them, on
    other backgrounds and in other styles. Captions are as the web has them, the target's too: they name the first toy wholly, by its
    shape, or only as a toy, and leave out background and style in half of the cases each, or where and how large the toys are. What a
    caption leaves out, the context shows."""
    scene, alike = random_scene(rng, held=held), bool(rng.random() < 2 / 3)
    toys = tuple(placed.toy for placed in scene.toys)

    def said(scene: Scene) -> str:
        names = [str(rng.choice([toys[0].words(), toys[0].shape, "toy"])), *(p.toy.words() for p in scene.toys[1:])]
        if alike:
            return scene.caption(names, background=bool(rng.random() < 0.5), style=bool(rng.random() < 0.5))
        placed, sizes = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        stated = scene if placed else replace(scene, place="and" if len(names) == 2 else "")
        return " ".join(stated.caption(names, sizes=sizes).split())

    near = [_alike(rng, scene) if alike else _arranged(rng, scene) for _ in range(3)]
    refs, told = [Reference(k + 1, image, said(other), "neighbour") for k, (other, image) in enumerate(near)], said(scene)
    shown = tuple((k, 1) for k in range(1 if alike else len(toys)))
    pictured = () if alike else ("sizes",)
    record = _record("retrieval", in_context(refs, told), scene, refs, Truth(scene, shown, True, True), told, pictured)
    return replace(record, caption=told)


def _alike(rng: np.random.Generator, scene: Scene) -> tuple[Scene, Image]:
    """Another picture of a scene's first toy, or of all its toys, and what it shows; half of those of one toy are close-ups."""
    toys = tuple(placed.toy for placed in scene.toys)
    other = place(rng, toys[: int(rng.integers(1, 3))], scene.background, scene.style)
    if len(other.toys) == 2 or rng.random() < 0.5:
        return other, picture(other)
    return replace(other, toys=(replace(other.toys[0], size="large"),), place="in the centre"), _cropped(rng, other)


def _arranged(rng: np.random.Generator, scene: Scene) -> tuple[Scene, Image]:
    """Another picture of a scene's toys where they are, and what it shows."""
    ground = place(rng, tuple(placed.toy for placed in scene.toys))
    toys = tuple(replace(p, x=p.x + rng.uniform(-1, 1), y=p.y + rng.uniform(-1, 1)) for p in scene.toys)
    other = replace(scene, toys=toys, background=ground.background, style=ground.style)
    return other, picture(other)


def question(rng: np.random.Generator, held: bool, kinds: tuple[str, ...] | None = None) -> Record:
    """A picture, a question about it, and the answer; of these ``kinds`` alone, if any are given."""
    scene = random_scene(rng, held=held)
    placed = scene.toys[int(rng.integers(len(scene.toys)))]
    toy = placed.toy
    pool: dict[str, tuple[str, str]] = {
        "describe": ("describe the picture", scene.caption()),
        "colour": (f"which colour is the {toy.shape}?", toy.colour),
        "shape": (f"which shape is {toy.colour}?", toy.shape),
        "texture": (f"which texture has the {toy.colour} {toy.shape}?", toy.texture),
        "count": ("how many toys are there?", str(len(scene.toys))),
        "background": ("which colour is the background?", scene.background),
        "style": ("which style is it?", scene.style),
        "where": (f"where is the {toy.colour} {toy.shape}?", _where(scene, placed)),
    }
    if len({p.toy.shape for p in scene.toys}) < len(scene.toys):
        pool.pop("colour")
    kind = str(rng.choice([name for name in pool if kinds is None or name in kinds]))
    ask, answer = pool[kind]
    return Record(
        "[ref#1]",
        (Reference(1, picture(scene), "", "content"),),
        caption=scene.caption(),
        task="question",
        question=ask,
        answer=answer,
        extra={"truth": Truth(scene)},
    )


def naming(rng: np.random.Generator, held: bool) -> Record:
    """What is this? One toy or two, each alone on its picture, and their words."""
    scene, shown = _glimpses(rng, random_scene(rng, held=held))
    toys = [p.toy for p in scene.toys]
    text = " and ".join(f"[ref#{k + 1}]" for k in range(len(toys)))
    refs = tuple(Reference(k + 1, image) for k, image in enumerate(shown))
    ask, answer = "what is this?" if len(toys) == 1 else "what are these?", " and ".join(f"a {t.words()}" for t in toys)
    return Record(text, refs, task="naming", question=ask, answer=answer, extra={"truth": Truth(scene)})


def measuring(rng: np.random.Generator, held: bool) -> Record:
    """A toy alone on its picture, and its unnamed traits on a scale of 0 to 9: what a VLM may report and no caption says."""
    scene, shown = _glimpses(rng, random_scene(rng, held=held, toys=1))
    toy = scene.toys[0].toy
    answer = " ".join(f"{name} {mark}" for name, mark in toy.measures().items())
    return Record(
        "[ref#1]",
        (Reference(1, shown[0]),),
        task="measuring",
        question="what are its measures?",
        answer=answer,
        extra={"truth": Truth(scene)},
    )


def _where(scene: Scene, placed: Placed) -> str:
    if len(scene.toys) == 1:
        return scene.place
    first = placed is scene.toys[0]
    return {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}[scene.place][not first]


class ControlImages(Mapping[str, Picture]):
    """A scene's edge, depth and sketch pictures, each drawn when it is asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __getitem__(self, kind: str) -> Picture:
        if kind not in CONTROLS:
            raise KeyError(kind)
        return control_image(self.scene, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(CONTROLS)

    def __len__(self) -> int:
        return len(CONTROLS)


TASKS: dict[str, Callable[[np.random.Generator, bool], Record]] = {
    f.__name__: f for f in (caption, measured, subject, crops, style, style_transfer, control, edit, retrieval, question, naming, measuring)
}

COMPOSITIONS: dict[str, Callable[[np.random.Generator, bool], Record]] = {
    "style and subject": partial(composition, shows=("style", "subject"), toys=1),
    "two subjects": partial(composition, shows=("subject",), toys=2),
    "control and subject": partial(composition, shows=("depth", "subject"), toys=1),
    "control and style": partial(composition, shows=("depth", "style")),
    "style, subject and mask": partial(composition, shows=("style", "subject", "mask"), toys=1),
}
"""What Instruct-Imagen is tried on without training (its section 5 and Figure 1); training shows ``one subject`` at most."""

ALL_TASKS = TASKS | COMPOSITIONS | {kind: partial(control, kind=kind) for kind in ("edge", "mask", "depth", "sketch")}
ALL_TASKS |= {"one subject": partial(subject, toys=1, kinds=True), "edit turn": edit_turn}
ALL_TASKS |= {"measured twin": partial(measured, twin=True), "measured alone": partial(measured, alone=True)}
ALL_TASKS |= {"measured alone twin": partial(measured, twin=True, alone=True)}
ALL_TASKS |= {"short question": partial(question, kinds=("colour", "shape", "count", "where"))}
"""And ``control`` with one kind of picture alone, ``subject`` with one toy whose shape is said, ``edit`` at any turn, ``measured`` with
twins and of one toy, ``question`` with answers of a word or a few, and the compositions."""
