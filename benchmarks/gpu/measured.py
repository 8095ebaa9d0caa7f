"""Parts (b) to (e): the step, the search, colour, and a run that is fed from files; by the benchmarks beside."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from job import Command, Found, Job, Part

# Precision -> flags of train_step.py. The first has every means left out once and both batches.
PRECISIONS = {"fp16": ["--amp", "fp16"], "bf16": ["--amp", "bf16"], "tf32": ["--amp", "off", "--tf32", "conv"],
              "fp32": ["--amp", "off", "--tf32", "off"]}
IMAGENET = (1_281_167, 2048, 384)  # features, their numbers, neighbours


def read(path: Path) -> Any:
    """JSON, or None where a command did not come so far."""
    return json.loads(path.read_text()) if path.exists() else None


# ---- (b)


def step_commands(job: Job, seconds: float) -> list[Command]:
    """Most telling first, so that what is cut off is the least."""
    def command(name: str, limit: float, *more: object) -> Command:
        small = ["--teacher", "resnet18", "--student", "shufflenet_v2_x0_5", "--image-size", 32, "--no-memory"]
        return Command(name, ("benchmarks/train_step.py", "--device", job.device, *job.size([], small), *more,
                              "--output", job.work / f"step-{name}.json"), limit)

    rounds = ["--rounds", job.size(3, 1), "--steps", job.size(5, 1)]
    small, large = job.size((256, 1024), (8, 16))
    if job.device == "cpu":
        return [command("bf16", 60, *PRECISIONS["bf16"], "--batches", small, *rounds)]
    return [command("fp16", 100, *PRECISIONS["fp16"], "--batches", small, large, *rounds, "--each"),
            *(command(name, 40, *PRECISIONS[name], "--batches", small, *rounds) for name in ("fp32", "bf16", "tf32")),
            command("compiled", 100, *PRECISIONS["fp16"], "--batches", small, *rounds, "--compile")]


def step_harvest(job: Job) -> Found:
    reports = {name: read(job.work / f"step-{name}.json") for name in (*PRECISIONS, "compiled")}
    reports = {name: report for name, report in reports.items() if report}
    rows = ["| precision | batch | step | images/s | ratio | peak MiB | waiting % | TFLOP/s | of one product % |",
            "|---|---|---|---|---|---|---|---|---|"]
    best = (0.0, "nothing measured")
    for name, report in reports.items():
        for batch, recipes in report["batches"].items():
            for recipe, found in recipes.items():
                rate, ratio, waited = found["images_per_second"], found["ratio"], 100 * found["shares"]["waiting"]
                rows.append(f"| {name} | {int(batch):,} | {recipe} | {rate:,.0f} | {ratio:.2f} | "
                            f"{found['peak_mib']:,.0f} | {waited:.0f} | {found['tflops']:.4g} | "
                            f"{100 * found['tflops'] / report['matrix_tflops']:.0f} |")
                best = max(best, (rate, f"{rate:,.0f} images/s ({recipe}, {name}, batch {batch}), {ratio:.2f} x the "
                                        "reference"))
        rows.append(f"| {name} | | *one product of matrices* | | | | | {report['matrix_tflops']:.4g} | 100 |")
    return Found(best[1], rows, reports, "" if reports else "no recipe was measured")


STEP = Part("step", "The training step: ResNet-50 → ResNet-18 at 224, the reference way beside ours", 60, 200,
            step_commands, step_harvest)


# ---- (c)


def search_commands(job: Job, seconds: float) -> list[Command]:
    rows, dim, k = job.size(IMAGENET, (3000, 32, 20))
    words = ("benchmarks/knn.py", "--rows", rows, "--dim", dim, "--k", k, "--device", job.device, "--repeats", 1,
             "--reference-rows", rows // job.size(10, 3), "--products", "bf16", "tf32", "float32", "--seconds",
             max(1, int(seconds - 10)), "--json", job.work / "search.json")
    return [Command("search", words, seconds)]


def search_harvest(job: Job) -> Found:
    report = read(job.work / "search.json")
    if not report:
        return Found("nothing measured", [], {}, "the comparison on a tenth did not end")
    some = report["compared"]
    rows = ["| rows | way | seconds | reference / it | it / bare product | same neighbours as the reference % |",
            "|---|---|---|---|---|---|"]
    for name, way in some["ways"].items():
        same = "–" if way["same"] is None or name.startswith("reference") else f"{100 * way['same']:.3f}"
        rows.append(f"| {some['rows']:,} | {name} | {way['seconds']:.3f} | {way['ratio']:.2f} | "
                    f"{way['of_product']:.2f} | {same} |")
    for products, way in report["all"].items():
        rows.append(f"| {report['rows']:,} | ours, {products}, near | {way['seconds']:.1f} | – | "
                    f"{way['of_product']:.2f} | {100 * way['same']:.1f} (of 256 rows) |")
    figure = "; ".join(f"{name} {way['seconds']:.1f} s" for name, way in report["all"].items()) or "only on a tenth"
    short = [name for name, way in report["all"].items() if way["same"] < 0.5]  # so dense a bank has many near ties
    wrong = f"{', '.join(short)}: other neighbours than the reference's" * bool(short)
    return Found(f"{report['rows']:,} x {report['dim']}: {figure}", rows, report, wrong)


SEARCH = Part("search", "The search: ImageNet's 1,281,167 features of 2,048 numbers, 384 neighbours each", 45, 150,
              search_commands, search_harvest)


# ---- (d)


def colour_commands(job: Job, seconds: float) -> list[Command]:
    flags = ("benchmarks/data_path.py", "--device", "--rounds", job.size(5, 1))
    return [Command(name, (*flags, *more, "--json", job.work / f"colour-{name}.json"), limit)
            for name, more, limit in (("eager", ["--eager"], 30), *job.size([("compiled", [], 60)], []))]


def colour_harvest(job: Job) -> Found:
    found = {**(read(job.work / "colour-eager.json") or {}), **(read(job.work / "colour-compiled.json") or {})}
    rows = ["| on the device | images/s |", "|---|---|", *(f"| {name} | {rate:,.0f} |" for name, rate in found.items())]
    best = "; ".join(f"{name}: {rate:,.0f}/s" for name, rate in found.items() if name.endswith("eager"))
    return Found(best or "nothing measured", rows, found, "" if found else "nothing was measured")


COLOUR = Part("colour", "Colour on the device, and `--cache device` at 32 pixels", 20, 70, colour_commands,
              colour_harvest)


# ---- (e)


def feed_commands(job: Job, seconds: float) -> list[Command]:
    """Both runs: teacher, student and the loader's workers together, as a training is."""
    side, count, batch = job.size((224, 4096, 512), (32, 32, 8))
    teacher, student = job.size(("resnet50", "resnet18"), ("resnet18", "shufflenet_v2_x0_5"))
    work, photos = job.work / "feed", job.data / "photos" if job.data and (job.data / "photos").is_dir() else None
    made = Command("photographs and teacher", (
        "benchmarks/gpu/made.py", "--photos", work / "photos.txt", "--count", count, "--teacher", work / "teacher.pth",
        "--arch", teacher, "--image-size", side, *(["--source", photos] if photos else [])), 60)
    pack = Command("raw pack", ("pack_dataset.py", "--data", work / "photos.txt", "--output", work / "raw.pack",
                                "--mode", "raw", "--short-side", job.size(256, 40), "-j", job.cores), 60)
    runs = [Command(name, (
        "train_distill.py", "--data", data, "--distill", work / "teacher.pth", "-a", student, "--sampler", "random",
        "-b", batch, "--image-size", side, "--epochs", 1, "--epoch-steps", job.size(60, 3), "-p", job.size(5, 1),
        "--lr", 1e-4, "-j", job.size(job.cores, 0), "--device", job.device, "--output", work / name), 45)
        for name, data in (("raw pack, fed", work / "raw.pack"), ("JPEG folder, fed", work / "photos.txt"))]
    return [made, pack, *runs]


def feed_harvest(job: Job) -> Found:
    rows, values = ["| source | images/s | waiting for data % | steps |", "|---|---|---|---|"], {}
    for name in ("raw pack, fed", "JPEG folder, fed"):
        path = job.work / "feed" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        lines = [line for line in lines if line["group"] == "train"]
        lines = lines[len(lines) // 4:]  # without the start: workers, cuDNN's choices
        if lines:
            rate, waited = (statistics.median(line[key] for line in lines)
                            for key in ("images_per_second", "data_wait"))
            values[name] = {"images_per_second": rate, "data_wait": waited}
            rows.append(f"| {name} | {rate:,.0f} | {100 * waited:.0f} | {len(lines)} lines |")
    figure = "; ".join(f"{name} {value['images_per_second']:,.0f} images/s, {value['data_wait']:.0%} waiting"
                       for name, value in values.items())
    return Found(f"{job.cores} cores: {figure or 'nothing measured'}", rows, values, "" if values else "no run was fed")


FEED = Part("feed", "A run fed from files at 224: loader, colour, teacher and student together", 50, 120, feed_commands,
            feed_harvest)
