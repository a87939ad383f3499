"""Render characters in many type families into a folder of pictures, with whole families held out.

A picture is a character in one type family, rotated, sheared, scaled and moved a little. Pictures for validation and
for test come from families that training has not seen: a network must learn the character and not the typeface.

    apt install fonts-ipafont fonts-hanazono fonts-sawarabi-mincho fonts-motoya-l-cedar ...   # some thirty families
    python recipes/study/render_glyphs.py pictures/kanji --classes 1000
    python app.py recipes/pictures_resnet18.yaml data.path=pictures/kanji data.size=32
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

# Families drawn from the same outlines count as one: otherwise a held-out family would have been seen in training.
LINEAGES = {
    "ipa": ("ipa", "takao", "migmix", "migu", "monapo"),
    "mplus": ("m+", "umeplus", "vl"),
    "ume": ("ume",),
    "aoyagi": ("aoyagi",),
    "kouzan": ("衡山", "kouzan", "青柳"),
    "yoz": ("yoz",),
    "biz": ("biz",),
    "kiloji": ("kiloji",),
    "konatu": ("konatu",),
    "misaki": ("misaki",),
}
LARGE = 96  # pixels, before a picture is scaled down


def level_1_kanji() -> list[str]:
    """The 2,965 kanji of JIS X 0208's first level, those in common use."""
    codes = (bytes((row + 0xA0, cell + 0xA0)) for row in range(16, 48) for cell in range(1, 95))
    characters = (code.decode("euc_jp", errors="ignore") for code in codes)
    return [character for character in characters if character]


def lineage(family: str) -> str:
    """The name that a type family shares with all that are drawn from the same outlines."""
    name = family.lower()
    for shared, starts in LINEAGES.items():
        if name.startswith(starts):
            return shared
    return " ".join(name.replace("-", " ").split()[:2])


def find_families(folder: Path) -> dict[str, list[Path]]:
    """Font files below a folder, by lineage."""
    families = defaultdict(list)
    for path in sorted(folder.rglob("*.[ot]t[fc]")):
        try:
            families[lineage(ImageFont.truetype(path, 16).getname()[0] or path.stem)].append(path)
        except OSError:  # Pillow cannot read it
            continue
    return dict(families)


def drawn(path: Path, characters: Iterable[str]) -> dict[str, bool]:
    """Which characters a font draws: those that differ from its picture of a character that does not exist."""
    try:
        font = ImageFont.truetype(path, 24)
        missing = bytes(font.getmask("\U0010fffd")), bytes(font.getmask("\ue000"))
        masks = {character: bytes(font.getmask(character)) for character in characters}
    except OSError:
        return {}
    return {character: any(mask) and mask not in missing for character, mask in masks.items()}


def render(rng: random.Random, character: str, path: Path, size: int, difficulty: float) -> Image.Image:
    """One gray picture. `difficulty` in [0, 1]: coarser resolution, noise, and a square that covers a part."""
    font = ImageFont.truetype(path, round(LARGE * rng.uniform(0.6, 0.8)))
    large = Image.new("L", (LARGE, LARGE), 0)
    ImageDraw.Draw(large).text((LARGE / 2, LARGE / 2), character, fill=255, font=font, anchor="mm")
    shear, moves = rng.uniform(-0.15, 0.15), [rng.uniform(-0.08, 0.08) * LARGE for _ in range(2)]
    large = large.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, translate=moves)
    large = large.transform(
        large.size, Image.Transform.AFFINE, (1, shear, -shear * LARGE / 2, 0, 1, 0), Image.Resampling.BILINEAR
    )
    if difficulty:
        side = round(size - difficulty * (size - 14))
        small = large.resize((side, side), Image.Resampling.BOX)
        covered = round(side * 0.4 * difficulty)
        corner = [rng.randrange(side - covered + 1) for _ in range(2)]
        small.paste(rng.randrange(256), (*corner, corner[0] + covered, corner[1] + covered))
        large = small.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(large.resize((size, size), Image.Resampling.BOX), np.float32)
    pixels = rng.uniform(0, 60) + pixels * rng.uniform(0.6, 0.75)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 1, pixels.shape)
    return Image.fromarray((pixels + noise * (4 + 36 * difficulty)).clip(0, 255).astype(np.uint8))


def split(families: list[str], seed: int) -> dict[str, list[str]]:
    """A fifth of the families for validation, a fifth for test."""
    families = sorted(families)
    random.Random(seed).shuffle(families)
    held = max(1, len(families) // 5)
    return {"val": families[:held], "test": families[held : 2 * held], "train": families[2 * held :]}


def plan(args: argparse.Namespace) -> Iterator[tuple[Path, str, list[Path]]]:
    """Each picture: its file, its character, and the fonts to draw one from."""
    families = find_families(args.fonts)
    candidates = list(args.characters) or level_1_kanji()
    fonts: dict[str, dict[str, list[Path]]] = {character: defaultdict(list) for character in candidates}
    for name, paths in track(families.items(), "Reading fonts", transient=True):
        for path in paths:
            for character, is_drawn in drawn(path, candidates).items():
                if is_drawn:
                    fonts[character][name].append(path)
    random.Random(args.seed).shuffle(candidates)
    common = sorted(candidates, key=lambda character: -len(fonts[character]))[: args.classes or len(candidates)]
    known = {name for character in common for name in fonts[character]}
    if len(known) < 5:
        raise SystemExit(f"error: {len(known)} type families below {args.fonts} draw these characters; install more")
    parts = split([name for name in known if sum(name in fonts[one] for one in common) > len(common) / 2], args.seed)
    print(f"{len(common)} characters; " + ", ".join(f"{part}: {len(names)} families" for part, names in parts.items()))
    for part, names in parts.items():
        for character in common:
            for name in names:
                for copy in range(args.copies if fonts[character].get(name) else 0):
                    folder = args.folder / part / f"U+{ord(character):04X}"
                    yield folder / f"{name.replace(' ', '_')}-{copy}.png", character, fonts[character][name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to create, with train/, val/ and test/")
    parser.add_argument("--characters", default="", help="by default the kanji in common use")
    parser.add_argument("--classes", type=int, help="at most so many characters, those in most families")
    parser.add_argument("--copies", type=int, default=2, help="pictures of a character in a family")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--difficulty", type=float, default=0.0, help="0 to 1: resolution, noise, occlusion")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists already")
    pictures = list(plan(args))
    for number, (path, character, fonts) in enumerate(track(pictures, "Rendering")):
        rng = random.Random(f"{args.seed} {number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        for font in rng.sample(fonts, len(fonts)):
            try:
                render(rng, character, font, args.size, args.difficulty).save(path)
                break
            except OSError:  # some fonts fail at some sizes
                continue


if __name__ == "__main__":
    main()
