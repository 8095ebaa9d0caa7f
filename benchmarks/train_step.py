#!/usr/bin/env python
"""A training step of CoSS: the usual implementation compared with this project's, alternating in one run.

    python benchmarks/train_step.py --each            # on a GPU: ResNet-50 -> ResNet-18 at 224, batches 256 and 1,024
    python benchmarks/train_step.py --micro-batch 128 --compile           # and ours in parts, and compiled
    python benchmarks/train_step.py --teacher resnet18 --student shufflenet_v2_x0_5 --image-size 64 --batches 32 # CPU

Reference: weights and images contiguous, images normalised to float32 on the host and copied in the step, the teacher
as it was trained, autocast with a scaler on a GPU, float32 on a CPU, a plain SGD, `loss.item()` after each step. Ours:
what train_distill.py does, by the same modules; --each leaves its means out one by one. Images are random bytes, so
that no decoding is in it; all begin from the same weights. Medians over the rounds; the ratio is the median of a step's
rate over the reference's of the same round. On a GPU stages are timed there (CUDA events), where the reference's
`.item()` shows as waiting; on a CPU everything is processor time of one thread, which other programs disturb less.
Peak memory: what the recipe allocates on a GPU; on a CPU, by how much a process of its own grows. TFLOP/s:
convolutions and products of teacher, student and gradient, beside what one product of large matrices reaches here in
that precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

import torch
from step_recipes import DTYPES, MEANS, STAGES, Ours, Reference, random_images, random_networks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from losses import build_objective
from models.distiller import Distiller
from models.teachers import FrozenEncoder
from runtime.errors import run_script
from runtime.hardware import TF32, use_hardware
from runtime.optim import precision


def networks_of(args: argparse.Namespace) -> tuple[FrozenEncoder, Distiller]:
    """Teacher and student with the same random weights each time."""
    return copy.deepcopy(random_networks(args.teacher, args.student, args.image_size))


def flops_an_image(networks: tuple[FrozenEncoder, Distiller], size: int) -> float:
    """Of teacher, student and gradient: convolutions and matrix products, a product with its sum being two."""
    teacher, student = copy.deepcopy(networks)
    images = random_images(2, size)
    with FlopCounterMode(display=False) as counter:
        target, = teacher.targets(images, ("features",))
        build_objective("coss")(student=student(images), teacher=(target,),
                                **build_objective("coss").inputs((images,)).context)["loss"].backward()
    return counter.get_total_flops() / len(images)


def matrix_rate(device: torch.device, amp: str, tf32: bool) -> float:
    """FLOP/s of one product of square matrices in the step's precision, the best of ten; ``tf32`` as convolutions."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[amp] or torch.float32)
    best, before = float("inf"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for _ in range(10):
        start = clock(device)
        a @ a
        best = min(best, clock(device) - start)
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def clock(device: torch.device) -> float:
    """Seconds: of the wall with nothing left to do on a GPU, of the processor without one."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def recipes_of(args: argparse.Namespace, images: list[Tensor], device: torch.device, amp: str,
               ) -> dict[str, tuple[Reference | Ours, int]]:
    """Each recipe by name, with the bytes that it holds on a GPU between steps."""
    wanted = {"reference": {}, "ours": {}}
    wanted |= {f"ours without {mean}": {"without": mean} for mean in MEANS} if args.each else {}
    wanted |= {"ours compiled": {"compiled": True}} if args.compile else {}
    wanted |= {f"ours, --micro-batch {args.micro_batch}": {"micro_batch": args.micro_batch}} if args.micro_batch else {}
    made = {}
    for name, options in wanted.items():
        if args.only in (None, name):
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            kind = Reference if name == "reference" else Ours
            recipe = kind(networks_of(args), images, device, amp, **options)
            recipe.run(2)  # cuDNN's choice, the optimizer's state
            clock(device)
            recipe.watch.seconds()
            made[name] = recipe, torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 0
    return made


def measure(args: argparse.Namespace, batch: int, device: torch.device, amp: str) -> dict[str, dict]:
    """For each recipe: images/s, ratio to the reference, stages as shares of the step, peak memory in MiB."""
    before = memory("VmRSS")
    images = [random_images(batch, args.image_size) for _ in range(4)]
    recipes = recipes_of(args, images, device, amp)
    if args.only:
        Path("/proc/self/clear_refs").write_text("5")  # what was the most so far is forgotten
    held = sum(static for _, static in recipes.values())
    rates, stages, peaks = defaultdict(list), defaultdict(lambda: defaultdict(list)), defaultdict(int)
    for _ in range(args.rounds):
        for name, (recipe, static) in recipes.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = clock(device)
            recipe.run(args.steps)
            seconds = clock(device) - start
            rates[name].append(args.steps * batch / seconds)
            for stage, spent in recipe.watch.seconds().items():
                stages[name][stage].append(spent)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - held + static)
    found = {}
    for name in recipes:
        middle = {stage: statistics.median(times) for stage, times in stages[name].items()}
        ratios = [a / b for a, b in zip(rates[name], rates.get("reference", rates[name]), strict=True)]
        found[name] = {"images_per_second": statistics.median(rates[name]), "ratio": statistics.median(ratios),
                       "shares": {stage: middle.get(stage, 0) / sum(middle.values()) for stage in STAGES},
                       "peak_mib": peaks[name] / 2**20 if device.type == "cuda" else
                       grown(before) if args.only else resident(batch, name) if args.memory else 0.0}
    return found


def resident(batch: int, name: str) -> float:
    """MiB by which a process grows that runs this recipe alone."""
    done = subprocess.run([sys.executable, *sys.argv, "--batches", str(batch), "--only", name, "--rounds", "1",
                           "--steps", "1", "--output", "-"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["batches"][str(batch)][name]["peak_mib"]


def grown(before: int) -> float:
    return (memory("VmHWM") - before) / 1024


def memory(kind: str) -> int:
    """KiB of this process, now (VmRSS) or at most (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])


def main() -> None:
    """Measure, print rows, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet50", help="default resnet50")
    parser.add_argument("--student", default="resnet18", help="default resnet18")
    parser.add_argument("--image-size", type=int, default=224, help="default 224")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024], help="default 256 1024")
    parser.add_argument("--steps", type=int, default=10, help="of a round; default 10")
    parser.add_argument("--rounds", type=int, default=7, help="alternating; default 7")
    parser.add_argument("--amp", choices=("auto", *DTYPES), default="auto", help="default auto, as the scripts")
    parser.add_argument("--tf32", choices=TF32, default="conv", help="as the scripts'; default conv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--micro-batch", type=int, default=0, metavar="M", help="add ours in parts of M images")
    parser.add_argument("--compile", action="store_true", help="add ours compiled")
    parser.add_argument("--each", action="store_true", help=f"add ours without each of {', '.join(MEANS)}")
    parser.add_argument("--no-memory", dest="memory", action="store_false",
                        help="leave out peak memory on a CPU, which takes a process for each recipe")
    parser.add_argument("--only", help="one recipe by name, as the memory of a CPU is measured")
    parser.add_argument("--output", default="train_step.json", help="where the JSON goes; - prints it and nothing else")
    args = parser.parse_args()
    device = torch.device(args.device)
    use_hardware(args.tf32)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    amp = precision(args.amp, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    flops = 0 if args.only else flops_an_image(networks_of(args), args.image_size)
    peak = 1 if args.only else matrix_rate(device, amp, args.tf32 != "off")
    report = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "amp": amp,
              "tf32": args.tf32, "teacher": args.teacher, "student": args.student, "image_size": args.image_size,
              "gflop_an_image": flops / 1e9, "matrix_tflops": peak / 1e12, "batches": {}}
    say = print if args.output != "-" else lambda *_: None
    say(f"{name}, torch {torch.__version__}, {args.teacher} -> {args.student} at {args.image_size}, amp {amp}; "
        f"{flops / 1e9:.2f} GFLOP an image; one product of matrices: {peak / 1e12:.3g} TFLOP/s\n")
    say(f"| batch | step | images/s | ratio | peak MiB | {' | '.join(f'{s} %' for s in STAGES)} | TFLOP/s | of it % |")
    say("|---" * (7 + len(STAGES)) + "|")
    for batch in args.batches:
        report["batches"][batch] = measure(args, batch, device, amp)
        for recipe, found in report["batches"][batch].items():
            found["tflops"] = found["images_per_second"] * flops / 1e12
            shares = " | ".join(f"{100 * found['shares'][stage]:.0f}" for stage in STAGES)
            say(f"| {batch:,} | {recipe} | {found['images_per_second']:,.1f} | {found['ratio']:.2f} | "
                f"{found['peak_mib']:,.0f} | {shares} | {found['tflops']:.3g} | "
                f"{100 * found['tflops'] * 1e12 / peak:.0f} |")
        if args.output != "-":  # after each, for whoever is cut short
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    if args.output == "-":
        print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
