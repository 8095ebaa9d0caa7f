"""Following objects through videos with frozen features."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import cli, evaluation, networks
from data.sources import FileSource
from evals.sets.davis import Video, check_davis, open_davis
from evals.video import Propagation, follow, measure, summary
from models.anysize import FeatureMap
from runtime.agreement import same_on_every_rank, together
from runtime.device import Process, gather_objects
from runtime.errors import UserError
from runtime.outputs import check_output_folder
from runtime.state import load_json, save_json, write_atomic

HELP = "following objects through the videos of DAVIS 2017: J and F of masks that features propagate"
DATA = ("DAVIS 2017 in its official layout: a folder that holds JPEGImages/480p/, Annotations/480p/ and "
        "ImageSets/2017/val.txt")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    group = evaluation.add_common_flags(parser, data=DATA, keeps_features=False, share_of="the videos; default 1")
    cli.check_by(group, "--data", check_davis)
    group.add_argument("--image-size", "--image_size", type=cli.number(int, 8), default=None, metavar="S",
                       help="image size that the network is built for, which sets a ViT's position embeddings; "
                            "frames are seen at --short-side; default: what the checkpoint records, else 224")
    usual, group = Propagation(), parser.add_argument_group("following objects")
    group.add_argument("--split", default="val", metavar="NAME",
                       help="which ImageSets/2017/NAME.txt; default val, 30 videos; --subset takes the first of them")
    group.add_argument("--stride", type=int, choices=(8, 16), default=8,
                       help="stride in pixels of a convolutional network's feature map, its last stage of stride 16, "
                            "or 8 (default) with strides removed as in Jabri et al. 2020; a ViT's is its patch size")
    group.add_argument("--short-side", type=cli.number(int, 64), default=480, metavar="S",
                       help="shorter side of a frame as the network sees it; default 480, DINO's")
    group.add_argument("--top-k", type=cli.number(int, 1), default=usual.top_k, metavar="K",
                       help=f"cells that a cell takes its label from, the most similar; default {usual.top_k}, DINO's "
                            "(others use 7 or 10)")
    group.add_argument("--context", type=cli.number(int, 0), default=usual.context, metavar="N",
                       help=f"earlier frames to compare with, plus the first; default {usual.context}, DINO's")
    group.add_argument("--radius", type=cli.number(int, 1), default=usual.radius, metavar="R",
                       help=f"radius of the search window, in cells of the feature map; default {usual.radius}, DINO's")
    group.add_argument("--temperature", type=cli.number(float, above=0), default=usual.temperature, metavar="T",
                       help=f"temperature T of the weights exp(cosine / T); default {usual.temperature}, DINO's")
    group.add_argument("--masks", default=None, metavar="DIR",
                       help="also write the masks to DIR/VIDEO/00000.png, as the official toolkit reads them")


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    return [("video", evaluation.lacks(args, "davis") or ["--data", args.davis, *evaluation.WHOLE])]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """J and F of DAVIS 2017 (semi-supervised, measured as by its toolkit): the first frame's masks are propagated by
    feature similarity, of a ViT's patch tokens or a convolutional network's feature map. Nothing is trained. Finished
    videos are not repeated unless their files change; with torchrun the processes share the videos."""
    with together(process):
        folder = evaluation.open_output(args)
        if args.masks:
            check_output_folder(Path(args.masks), "--masks")
            masks = Path(args.masks).resolve()
            if (Path(args.data) / "Annotations").resolve() in (masks, *masks.parents):
                raise UserError(f"--masks {args.masks} lies in the Annotations of --data {args.data}, which it would "
                                "replace; choose a folder elsewhere")
        videos = open_davis(args.data, args.split)
        if not 0 < args.subset <= 1:
            raise UserError(f"--subset {args.subset:g} is not a share of the videos; give a number above 0, up to 1")
        videos = videos[:max(1, int(args.subset * len(videos) + 1e-9))]
        network = evaluation.open_network(args, process)
    same_on_every_rank({"the videos": [video.name for video in videos], "the network": network.identity}, process)
    maps = FeatureMap(network.encoder.backbone, args.stride).to(process.device).eval()
    how = Propagation(args.top_k, args.context, args.radius, args.temperature)
    settings = {**network.identity, **asdict(how), "short_side": args.short_side, "stride": maps.stride}
    kept = folder / "video" / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    keeps = network.file != networks.UNTRAINED

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        return maps(network.encoder.normalise(images))

    found = {}
    bar = tqdm(videos[process.rank::process.world_size], desc="videos", unit="video", leave=False,
               disable=None if process.is_main else True)
    with together(process):
        for video in bar:
            place = kept / f"{video.name}.json"
            found[video.name] = _kept(place, video) if keeps and not args.masks else None
            if found[video.name] is None:
                found[video.name] = scores(video, encode, how, args.short_side, process.device, args.masks)
                if keeps:
                    save_json({"files": video.identity(), "objects": found[video.name]}, place)
    found = {name: objects for part in gather_objects(found) for name, objects in part.items()}
    everyone = [one for video in videos for one in found[video.name]]
    if not everyone:
        raise UserError(f"--data {args.data}: no video has an object in its first mask; unpack DAVIS again")
    names = [str(path.relative_to(args.data)) for video in videos for path in video.frames]
    frames = FileSource(Path(args.data), names, None, [], f"{args.data}, {args.split}")
    title = (f"video: {maps.name} at stride {maps.stride}; {len(everyone)} objects in {len(videos)} videos, %")
    return evaluation.finish("video", args, process, [network], {"frames": frames}, summary(everyone), title=title,
                         map={"stage": maps.name, "stride": maps.stride},
                         videos={name: summary(objects)["J&F mean"] for name, objects in found.items() if objects})


def scores(video: Video, encode: Callable[[Tensor], Tensor], how: Propagation, short_side: int, device: torch.device,
           masks: str | None = None) -> list[dict[str, list[float]]]:
    """``J`` and ``F`` of each object of a video in every frame but the first and the last, as DAVIS counts them."""
    first = video.mask(0)
    objects, count = int(first.max()), len(video.frames)
    if not objects:
        return []
    followed = follow((video.frame(i) for i in range(count)), first, encode, how, short_side, device)
    found: list[np.ndarray] = []
    for i, mask in enumerate(tqdm(followed, total=count - 1, desc=video.name, unit="frame", leave=False), 1):
        found.append(mask)
        if masks:
            _write(Path(masks) / video.name / f"{video.frames[i].stem}.png", mask)
    if masks:
        _write(Path(masks) / video.name / f"{video.frames[0].stem}.png", first)
    measured = measure(found[:-1], (video.mask(i) for i in range(1, count - 1)), objects, device)
    return [{"J": j, "F": f} for j, f in zip(measured["J"], measured["F"], strict=True)]


def _kept(place: Path, video: Video) -> list[dict[str, list[float]]] | None:
    try:
        content = load_json(place)
        return content["objects"] if content["files"] == video.identity() else None
    except (OSError, ValueError, TypeError, LookupError):  # not there, or not as it was written
        return None


def _write(path: Path, mask: np.ndarray) -> None:
    """A PNG with a palette; the colours do not matter."""
    image = Image.fromarray(mask)
    image.putpalette([value for i in range(256) for value in (i * 67 % 256, i * 131 % 256, i * 193 % 256)])
    write_atomic(path, lambda file: image.save(file, format="PNG"))
