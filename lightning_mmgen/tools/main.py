"""The ``mmgen`` command. Each sub-command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys

DTYPES = ["float32", "float16", "bfloat16"]


def parser() -> argparse.ArgumentParser:
    """All sub-commands."""
    top = argparse.ArgumentParser(prog="mmgen", description="Tools around training; `mmgen fit` and its kin are `lightning fit`.")
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = subs.add_parser("generate", help="draw pictures from an instruction with pictures in it")
    _model(generate)
    generate.add_argument("--prompt", required=True, help="text with [ref#1], [ref#2], ...")
    generate.add_argument("--ref", action="append", default=[], metavar="PICTURE", help="the pictures of [ref#1], [ref#2], ... in order")
    generate.add_argument("--out", required=True, help="a PNG; with --count above 1, NAME-0.png, NAME-1.png, ...")
    generate.add_argument("--count", type=int, default=1, help="pictures")
    generate.add_argument("--height", type=int, help="pixels")
    generate.add_argument("--width", type=int, help="pixels")

    edit = subs.add_parser("edit", help="edit a picture by instructions, one after the other, and report the drift of each turn")
    _model(edit)
    edit.add_argument("--image", required=True, metavar="PICTURE", help="what to edit")
    edit.add_argument("--instruction", required=True, action="append", help="what to change; again for the next turn")
    edit.add_argument("--mask", metavar="PICTURE", help="white where the picture may change: drift is measured outside it")
    edit.add_argument("--out", required=True, help="a PNG; with several instructions, NAME-1.png, NAME-2.png, ...")

    export = subs.add_parser("export", help="write a checkpoint as a diffusers-style folder, or as the start of another fit")
    export.add_argument("--ckpt", required=True)
    export.add_argument("--out", required=True, metavar="DIR", help="or FILE.ckpt, which the `start` of another fit takes")
    export.add_argument("--without", nargs="+", default=[], metavar="PART", help="left out of FILE.ckpt, as reference_attention")
    export.add_argument("--dtype", choices=DTYPES, help="of fully trained weights; as trained by default")

    merge = subs.add_parser("merge", help="fold the UNet's LoRA into a checkpoint of the same UNet")
    merge.add_argument("--lora", required=True, help="a folder that `mmgen export` wrote, or a pytorch_lora_weights.safetensors")
    merge.add_argument("--into", required=True, help="a diffusers folder, or a single .safetensors file")
    merge.add_argument("--out", required=True, help="the folder or file to write")
    merge.add_argument("--strength", type=float, default=1.0, help="1 is the LoRA as trained")
    merge.add_argument("--config", metavar="DIR", help="for a single file: where the UNet's config.json is")

    report = subs.add_parser("report", help="runs side by side on one page")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders; of several versions in it the newest")
    report.add_argument("--out", required=True, metavar="PAGE.html")
    report.add_argument("--pictures", type=int, default=16, help="instructions in the grid")
    report.add_argument("--score", help="what the best and worst cases go by; the first one by default")

    rate = subs.add_parser("rate", help="a local page where people score a run's pictures (SC and PQ of ImagenHub)")
    rate.add_argument("--run", required=True, metavar="RUN", help="a run folder with evaluation rows")
    rate.add_argument("--port", type=int, default=7860, help="on 127.0.0.1")

    subs.add_parser("encoders", help="the vision-language encoders that an experiment may name")

    cache = subs.add_parser("cache", help="keep what frozen networks make of an experiment's pictures")
    cache.add_argument("-c", "--config", required=True, action="append", help="a YAML of the experiment; again for an overlay")
    cache.add_argument("--out", required=True, metavar="DIR", help="the cache; the experiment names it as data.cache")
    cache.add_argument("--only", choices=["moments", "vision"], help="of the VAE, or of the encoder's vision tower; both by default")
    cache.add_argument("--epochs", type=int, default=1, help="more than 1 where other targets or references are drawn each epoch")
    cache.add_argument("--shard", default="0/1", metavar="I/N", help="this part of the rows only")
    cache.add_argument("--device", help="cuda where there is one by default")

    data = subs.add_parser("data", help="check or preview records").add_subparsers(dest="action", required=True, metavar="ACTION")
    check = data.add_parser("check", help="every record: schema, markers, pictures; exit 1 if any row is bad")
    check.add_argument("file")
    preview = data.add_parser("preview", help="what the model will see, as a page")
    preview.add_argument("file")
    preview.add_argument("--out", required=True, metavar="PAGE.png")
    preview.add_argument("--encoder", default="toybox/vlm", help="whose tokens to count")
    preview.add_argument("--image-tokens", type=int, default=25, help="token budget of a reference")
    preview.add_argument("--target-size", type=int, default=64, help="pixels")
    preview.add_argument("--count", type=int, default=12, help="records")
    preview.add_argument("--spread", action="store_true", help="from all over the file, not the first ones")
    preview.add_argument("--crops", action="store_true", help="as CropDataModule trains on them: crops before their words")

    build = subs.add_parser("build", help="make records").add_subparsers(dest="action", required=True, metavar="ACTION")
    _crops(build.add_parser("crops", help="captioned pictures to records with the boxes of their phrases"))
    _synthetic(build.add_parser("synthetic", help="pictures that a text-to-image model draws of contents in styles"))
    _styled(build.add_parser("styled", help="those pictures as styled generation or style transfer"))
    _photos(build.add_parser("photos", help="a folder of pictures, filtered, cropped around people and captioned"))
    _masks(build.add_parser("masks", help="a segmentation of every box of records"))
    _clusters(build.add_parser("clusters", help="captioned pictures with their nearest neighbours as references"))
    _subjects(build.add_parser("subjects", help="a folder of pictures a subject: each a target, others of its subject as references"))
    _edits(build.add_parser("edits", help="published edits: a source, an instruction, a target"))
    _attention(build.add_parser("attention", help="where a diffusion model looks for each word of a caption"))
    _questions(build.add_parser("questions", help="published pictures with questions and answers, or captions"))
    return top


def _model(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint of a run; its config.yaml lies in the run folder")
    source.add_argument("--model", help="a folder that `mmgen export` wrote")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="denoising steps; the experiment's own by default")
    command.add_argument("--guidance", type=float, help="guidance scale; the experiment's own by default")
    command.add_argument("--image-guidance", type=float, help="guidance scale of the pictures alone; likewise")
    command.add_argument("--guidance-rule", choices=["constant", "alternating"], help="every step, or every other; likewise")
    command.add_argument("--scheduler", choices=["ddim", "ddpm"], help="likewise")


def _crops(crops: argparse.ArgumentParser) -> None:
    crops.add_argument("--images", required=True, metavar="DIR", help="the pictures")
    crops.add_argument("--captions", help="COCO JSON, JSONL rows {image, caption}, or a folder of .txt; beside the pictures by default")
    crops.add_argument("--boxes", metavar="FILE|DIR", help="boxes that exist; else phrases are parsed and detected")
    crops.add_argument("--format", choices=["coco", "grit", "flickr30k"], help="of --boxes; guessed by default")
    crops.add_argument("--detector", default="IDEA-Research/grounding-dino-base", help="a GroundingDINO, name or folder")
    crops.add_argument("--parser", default="en_core_web_sm", help="a spaCy pipeline, name or folder")
    crops.add_argument("--box-threshold", type=float, default=0.35, help="least score of a detected box")
    crops.add_argument("--text-threshold", type=float, default=0.25, help="least score of its phrase")
    crops.add_argument("--min-area", type=float, default=22500, help="least area of a box in square pixels")
    crops.add_argument("--max-share", type=float, default=0.75, help="largest share of the picture that a box may take")
    crops.add_argument("--heads", choices=["detector", "keypoints", "none"], help="keypoints with COCO's boxes, else detector, by default")
    crops.add_argument("--min-head-area", type=float, default=1024, help="least area of a head in square pixels")
    crops.add_argument("--batch-size", type=int, default=8, help="pictures a batch")
    crops.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    _common(crops)


def _synthetic(command: argparse.ArgumentParser) -> None:
    command.add_argument("--contents", required=True, metavar="FILE", help="what to draw, one a line")
    command.add_argument("--styles", required=True, metavar="FILE", help="styles to draw it in, one a line")
    command.add_argument("--styles-per-content", type=int, metavar="K", help="different styles for each content; all by default")
    command.add_argument("--model", required=True, help="a text-to-image pipeline of diffusers: hub name or folder")
    command.add_argument("--steps", type=int, help="denoising steps; the pipeline's own by default")
    command.add_argument("--guidance", type=float, help="guidance scale; the pipeline's own by default")
    command.add_argument("--height", type=int, help="pixels; the pipeline's own by default")
    command.add_argument("--width", type=int, help="pixels; the pipeline's own by default")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of the pipeline's weights")
    command.add_argument("--pickscore", default="yuvalkirstain/PickScore_v1", help="hub name or folder; an empty name scores nothing")
    command.add_argument("--min-pickscore", type=float, help="drop pictures below it; the report has the quantiles to choose from")
    command.add_argument("--seed", type=int, default=0, help="of the draw of styles and of the noise")
    command.add_argument("--batch-size", type=int, default=8, help="pictures a batch")
    _common(command)


def _styled(command: argparse.ArgumentParser) -> None:
    command.add_argument("--records", required=True, metavar="FILE", help="records.jsonl of `mmgen build synthetic`")
    command.add_argument("--contents", required=True, metavar="FILE", help="that it was given")
    command.add_argument("--styles", required=True, metavar="FILE", help="that it was given")
    command.add_argument("--task", choices=["styled", "style_transfer"], default="styled", help="contents in words, or by a picture")
    command.add_argument("--clip", default="openai/clip-vit-large-patch14", help="hub name or folder of a CLIP")
    command.add_argument(
        "--min-style", type=float, help="drop targets whose cosine with the style's picture is lower; no filter by default"
    )
    command.add_argument("--min-caption", type=float, help="the same with the words of the content")
    command.add_argument("--batch-size", type=int, default=64, help="pictures a batch")
    _common(command)


def _photos(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", required=True, metavar="DIR", help="searched with all folders in it")
    command.add_argument("--min-side", type=int, default=1024, help="least width and height, in pixels")
    command.add_argument("--max-people", type=int, default=1)
    command.add_argument("--person", default="person", help="what the detector is asked for")
    command.add_argument("--detector", default="IDEA-Research/grounding-dino-base", help="a GroundingDINO: hub name or folder")
    command.add_argument("--box-threshold", type=float, default=0.35)
    command.add_argument("--text-threshold", type=float, default=0.25)
    for name, label in (("watermark", "watermark"), ("unsafe", "nsfw")):
        command.add_argument(f"--{name}", default="", metavar="MODEL", help="an image classifier: hub name or folder; no filter by default")
        command.add_argument(f"--{name}-label", default=label, help=f"its class (default: {label})")
        command.add_argument(f"--max-{name}", type=float, default=0.5, help="highest probability of the class")
    command.add_argument(
        "--captions", default="", metavar="FILE|DIR", help="JSONL rows {image, caption}, COCO JSON or a folder of .txt; else written"
    )
    command.add_argument("--captioner", default="llava-hf/llava-v1.6-mistral-7b-hf", help="a vision-language model: hub name or folder")
    command.add_argument("--caption-prompt", default="Describe this picture in one sentence.")
    command.add_argument("--caption-tokens", type=int, default=128, help="of the longest caption")
    command.add_argument("--caption-dtype", choices=DTYPES, default="float16", help="of the captioner's weights")
    command.add_argument("--format", choices=["jpeg", "png"], default="jpeg", help="of the crops; JPEG at quality 95")
    command.add_argument("--batch-size", type=int, default=8, help="pictures a batch")
    command.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    _common(command)


def _masks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--records", required=True, metavar="FILE")
    command.add_argument("--model", default="facebook/sam-vit-base", help="a SAM: hub name or folder")
    command.add_argument("--min-iou", type=float, default=0.8, help="leave out masks of which SAM expects a lower one")
    command.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    _common(command)


def _clusters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", required=True, metavar="DIR", help="the pictures")
    command.add_argument(
        "--captions", required=True, metavar="FILE", help="JSONL rows {image, caption, url?, score?}, or such a parquet file"
    )
    command.add_argument("--min-score", type=float, help="drop pictures whose score is lower; no filter by default")
    command.add_argument(
        "--quality", default="", metavar="MODEL", help="an image classifier that scores: hub name or folder; else the rows do"
    )
    command.add_argument("--quality-label", default="good", help="its class whose probability is the score (default: good)")
    command.add_argument("--clip", default="openai/clip-vit-large-patch14", help="hub name or folder of a CLIP")
    command.add_argument("--domains", metavar="FILE", help="texts, one a line; neighbours are of one domain (default: a photograph, ...)")
    command.add_argument("--neighbours", type=int, default=10, help="nearest pictures to choose from")
    command.add_argument("--duplicate", type=float, default=0.96, help="a cosine above it is a near-duplicate")
    command.add_argument("--size", type=int, default=5, help="most pictures of a cluster, its target among them")
    command.add_argument("--min-size", type=int, default=4, help="drop smaller clusters")
    command.add_argument(
        "--index", choices=["auto", "flat", "ivfpq"], default="auto", help="exact, or compressed; auto compresses domains of over 100,000"
    )
    command.add_argument("--engine", choices=["local", "ray"], default="local", help="what runs the embedding")
    command.add_argument("--batch-size", type=int, default=64, help="pictures a batch")
    command.add_argument("--workers", type=int, default=0, help="processes that read pictures; on Ray, actors that embed")
    _common(command)


def _subjects(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", required=True, metavar="DIR", help="with a folder of pictures for each subject")
    command.add_argument(
        "--classes", default="", metavar="FILE", help="lines FOLDER,WORDS: what each subject is called; its folder by default"
    )
    command.add_argument("--captions", default="", metavar="FILE|DIR", help="COCO JSON, JSONL rows {image, caption} or a folder of .txt")
    command.add_argument("--references", type=int, default=3, help="most pictures beside a target")
    command.add_argument("--min-size", type=int, default=2, help="drop subjects of fewer pictures")
    _output(command)


def _edits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", required=True, metavar="NAME|FOLDER|FILE", help="of the hub or on disk; streamed where it has no sessions"
    )
    command.add_argument("--format", choices=["instructpix2pix", "magicbrush", "omnigen", "step1x"], help="guessed by default")
    command.add_argument("--split", default="train", help="of a data set that has several")
    command.add_argument(
        "--images", default="", metavar="DIR", help="where pictures that are given by a path lie; beside the data by default"
    )
    command.add_argument("--max-aspect", type=float, default=1.02, help="largest ratio of the aspects of source and target")
    for name, what in (
        ("source", "the picture before the edit; omnigen: a list of pictures"),
        ("target", "the picture after it"),
        ("instruction", "the words"),
        ("mask", "the source with the region to edit cut out"),
        ("session", "which edits follow each other"),
        ("turn", "their place in the session, from 1"),
        ("caption", "the target in words"),
        ("source-caption", "the source in words"),
    ):
        command.add_argument(f"--{name}-column", metavar="NAME", help=f"{what}; the format's own by default, '' for none")
    _output(command)


def _attention(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", required=True, metavar="FILE|FOLDER|NAME", help="records with a picture and words; toybox or toybox/TASK: drawn ones"
    )
    command.add_argument("--model", required=True, help="a Stable Diffusion 1.x, an SDXL, a folder that `mmgen export` wrote, or toybox")
    command.add_argument("--mode", choices=["full", "fast"], default="full", help="with null-text optimisation, or the inversion alone")
    command.add_argument("--steps", type=int, default=10, help="of diffusion")
    command.add_argument("--inner-steps", type=int, default=5, help="of null-text optimisation at each of them")
    command.add_argument("--guidance", type=float, help="guidance scale of the way back; the model's own by default")
    command.add_argument("--rate", type=float, help="of null-text optimisation; the model's own by default")
    command.add_argument(
        "--layers", default="", metavar="N|NAMES", help="cross-attention layers of a resolution, or by name (default: 32, else the last)"
    )
    command.add_argument("--size", type=int, help="side of the maps; that of the finest layer by default")
    command.add_argument("--side", type=int, help="of the pictures in pixels, padded to squares; the model's own by default")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model's weights")
    command.add_argument("--count", type=int, help="the first so many rows; all by default")
    command.add_argument("--compare", type=int, default=8, help="so many rows in both modes, to tell how well they agree")
    command.add_argument("--batch-size", type=int, default=4, help="pictures a batch")
    command.add_argument("--shard-size", type=int, default=64, help="rows a file")
    _common(command)


def _questions(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="NAME|FOLDER|FILE", help="of the hub or on disk, streamed; laion: .tar files too")
    command.add_argument("--format", choices=["flickr30k", "rlaifv", "ocrvqa", "laion"], help="guessed by default")
    command.add_argument("--split", default="train", help="of a data set that has several")
    command.add_argument(
        "--images", default="", metavar="DIR", help="where pictures that are given by a path lie; beside the data by default"
    )
    command.add_argument("--question", default="Describe the picture.", help="what is asked where the answers are captions")
    command.add_argument("--per-image", type=int, default=0, metavar="N", help="most questions of a picture; 0 for all")
    command.add_argument("--max-rows", type=int, default=0, metavar="N", help="rows to read; 0 for all")
    for name in ("image", "question", "answer", "id"):
        command.add_argument(f"--{name}-column", metavar="NAME", help="the format's own by default")
    _output(command)


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="of records.jsonl and pictures; a build goes on from what is there")
    command.add_argument("--shard", default="0/1", metavar="I/N", help="build this part only; the last to finish joins all")


def _common(command: argparse.ArgumentParser) -> None:
    _output(command)
    command.add_argument("--device", help="cuda where there is one by default")


def main(argv: list[str]) -> int:
    """Run a sub-command; an error that a user can mend is one line, and the exit status 1."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, KeyError) as error:
        if os.environ.get("MMGEN_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Dispatch to the sub-command's module."""
    if args.command == "data":
        from . import data

        if args.action == "check":
            return data.check(args.file)
        print(data.preview(args.file, args.out, args.encoder, args.image_tokens, args.target_size, args.count, args.crops, args.spread))
        return 0
    if args.command == "build":
        from .build import build

        print(build(args))
        return 0
    if args.command == "cache":
        from .cache import cache

        kinds = [args.only] if args.only else ["moments", "vision"]
        print(cache(args.config, args.out, kinds, args.epochs, args.shard, args.device))
        return 0
    if args.command == "report":
        from .report import report

        print(report(args.runs, args.out, args.pictures, args.score))
        return 0
    if args.command == "rate":
        from .rate import serve

        serve(args.run, args.port)
        return 0
    if args.command == "encoders":
        from .encoders import table

        print(table())
        return 0
    if args.command == "merge":
        from .merge import merge

        print(merge(args.lora, args.into, args.out, args.strength, args.config))
        return 0
    if args.command == "edit":
        from .edit import edit

        print(edit(args))
        return 0
    from . import generate

    if args.command == "export":
        print(generate.export_checkpoint(args.ckpt, args.out, args.dtype, args.without))
        return 0
    for path in generate.generate(args):
        print(path)
    return 0
