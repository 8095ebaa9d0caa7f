#!/usr/bin/env python
"""Detection and instance segmentation with detectron2, fine-tuned from a ResNet that export.py has written for it.

    python export.py --weights run/student.pth --to detectron2 --output resnet18.pkl
    python scripts/detection/train.py --config voc_r18_c4 --weights resnet18.pkl --datasets datasets --output det/ \
        --num-gpus 8

--config is the name of a file in scripts/detection/configs: {voc,coco_1x,coco_2x,cityscapes}_{r18,r34,r50}_{c4,fpn}, or
the path of another. NAME VALUE pairs at the end of the line change its settings (SOLVER.IMS_PER_BATCH 8). With fewer
GPUs than 8 add SOLVER.REFERENCE_WORLD_SIZE 8: detectron2 then scales batch, rate and schedule. Needs detectron2,
https://detectron2.readthedocs.io/en/latest/tutorials/install.html; what the data sets' folder must look like stands in
https://detectron2.readthedocs.io/en/latest/tutorials/builtin_datasets.html. Each score is added to results.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np

from checkpoints.safe_load import file_sha256, read_file
from evals.results import add_result
from runtime.errors import UserError, run_script
from runtime.numbers import number
from runtime.provenance import versions

CONFIGS = Path(__file__).resolve().parent / "configs"
BASIC = {18: 2, 34: 3}  # depths with basic blocks, and how many of them make res5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME", help="see above")
    parser.add_argument("--weights", required=True, metavar="FILE",
                        help="what export.py --to detectron2 has written; its normalisation is taken too")
    parser.add_argument("--datasets", default=os.environ.get("DETECTRON2_DATASETS", "datasets"), metavar="DIR",
                        help="folder of the data sets; default: $DETECTRON2_DATASETS, else ./datasets")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for checkpoints, log and results.jsonl")
    parser.add_argument("--num-gpus", type=number(int, 0), default=1, metavar="N",
                        help="GPUs of this machine; default 1; 0 with MODEL.DEVICE cpu")
    parser.add_argument("--num-machines", type=number(int, 1), default=1, metavar="N", help="machines; default 1")
    parser.add_argument("--machine-rank", type=number(int, 0), default=0, metavar="N",
                        help="which of them this is, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL",
                        help="where they meet, tcp://HOST:PORT; default auto, for one machine")
    parser.add_argument("--no-resume", action="store_true",
                        help="start anew; default: resume from the last checkpoint in --output, if any")
    parser.add_argument("--eval-only", action="store_true", help="score the last checkpoint in --output, or --weights")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="settings to change")
    return parser.parse_args(argv)


def find_config(name: str) -> Path:
    """The file of --config. Raises :class:`UserError` if there is none."""
    found = [path for path in (Path(name), CONFIGS / f"{name}.yaml") if path.is_file()]
    if not found:
        raise UserError(f"--config {name} is neither a file nor one of "
                        f"{', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}")
    return found[0]


def read_weights(path: str) -> dict[str, Any]:
    """An exported file: ``model``, arrays by detectron2's names, and ``settings``. Nothing in it is run."""
    content = read_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "__author__" not in content:
        raise UserError(f"--weights {path} is not a file for detectron2; write one with export.py --to detectron2")
    return content


def check_depth(config: str, depth: int, weights: str, settings: Mapping[str, Any]) -> None:
    """Refuse a configuration for another network: detectron2 would silently skip what does not fit."""
    found = settings.get("MODEL.RESNETS.DEPTH", depth)
    if found != depth:
        raise UserError(f"--weights {weights} is a ResNet-{found} and --config {config} is for a ResNet-{depth}; take "
                        "the configuration of that depth")


def not_loaded(state: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Those of ``weights`` whose values no tensor of a model's ``state`` has, by the name or one that ends in it."""
    def arrives(name: str) -> bool:
        wanted = np.asarray(weights[name])
        return any(np.array_equal(np.asarray(tensor.cpu()), wanted) for key, tensor in state.items()
                   if key == name or key.endswith(f".{name}"))
    return [name for name in weights if not arrives(name)]


def define() -> type:
    """Register the head of C4 and return the trainer; here, since detectron2 is there only when it is needed."""
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator, PascalVOCDetectionEvaluator
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_HEADS_REGISTRY
    from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
    from detectron2.modeling.roi_heads import Res5ROIHeads
    from detectron2.utils import comm

    class Res5NormROIHeads(Res5ROIHeads):
        """C4's head: res5 of the blocks that a network of this depth has, and a norm behind it (He et al., CVPR 2020).

        detectron2's builds three bottlenecks, into which a ResNet-18's or -34's res5 does not fit.
        """

        @classmethod
        def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
            parts = super().from_config(cfg, input_shape)
            resnet, res5 = cfg.MODEL.RESNETS, parts["res5"]
            width = 8 * resnet.RES2_OUT_CHANNELS
            if resnet.DEPTH in BASIC:
                count = BASIC[resnet.DEPTH]
                blocks = ResNet.make_stage(BasicBlock, count, stride_per_block=[2] + [1] * (count - 1),
                                           in_channels=width // 2, out_channels=width, norm=resnet.NORM)
                res5 = type(res5)(*blocks)
            res5.add_module("norm", get_norm(resnet.NORM, width))
            return {**parts, "res5": res5}

    if "Res5NormROIHeads" not in ROI_HEADS_REGISTRY:
        ROI_HEADS_REGISTRY.register(Res5NormROIHeads)

    class Trainer(DefaultTrainer):
        """detectron2's, with the evaluator of each data set, and scores kept."""

        @classmethod
        def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
            folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
            if dataset_name.startswith("voc"):
                return PascalVOCDetectionEvaluator(dataset_name)
            if dataset_name.startswith("cityscapes"):
                return CityscapesInstanceEvaluator(dataset_name)
            return COCOEvaluator(dataset_name, output_dir=folder)

        @classmethod
        def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
            scores = super().test(cfg, model, evaluators)
            if comm.is_main_process():
                add_result(Path(cfg.OUTPUT_DIR), {
                    "command": "detectron2", "weights": cfg.MODEL.WEIGHTS, "sha256": file_sha256(cfg.MODEL.WEIGHTS),
                    "data": list(cfg.DATASETS.TEST), "settings": cfg.dump(), "metrics": scores,
                    "table": [{"task": task, **values} for task, values in scores.items()], "versions": versions(),
                    "processes": comm.get_world_size()})
            return scores

    return Trainer


def configure(args: argparse.Namespace, settings: Mapping[str, Any]) -> Any:
    """detectron2's configuration: the file's, then the weights' settings, then the command line's."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(find_config(args.config)))
    check_depth(args.config, cfg.MODEL.RESNETS.DEPTH, args.weights, settings)
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    cfg.merge_from_list(["MODEL.WEIGHTS", args.weights, "OUTPUT_DIR", args.output, *args.opts])
    cfg.freeze()
    return cfg


def work(args: argparse.Namespace) -> None:
    """One process: train, or score."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import default_setup

    weights = read_weights(args.weights)
    cfg, trainer_class = configure(args, weights.get("settings", {})), define()
    default_setup(cfg, args)
    resume = not args.no_resume
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        trainer_class.test(cfg, model)
        return
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    if trainer.start_iter == 0 and (lost := not_loaded(trainer.model.state_dict(), weights["model"])):
        raise UserError(f"--weights {args.weights}: {len(lost)} of {len(weights['model'])} tensors found no place in "
                        f"the network of --config {args.config} ({', '.join(lost[:3])}); take the configuration for it")
    trainer.train()


def main() -> None:
    args = parse_args()
    find_config(args.config)
    read_weights(args.weights)
    if importlib.util.find_spec("detectron2") is None:
        raise UserError("detectron2 is missing; install it as https://detectron2.readthedocs.io/en/latest/tutorials/"
                        "install.html says, or use scripts/detection_torchvision.py, which needs torchvision alone")
    if not Path(args.datasets).is_dir():
        raise UserError(f"--datasets {args.datasets} is not a folder; give the one that holds the data sets as "
                        "detectron2 expects them (VOC2007/, coco/, cityscapes/)")
    os.environ["DETECTRON2_DATASETS"] = args.datasets  # read when detectron2 is imported, by every process
    from detectron2.engine import launch

    launch(work, args.num_gpus, num_machines=args.num_machines, machine_rank=args.machine_rank, dist_url=args.dist_url,
           args=(args,))


if __name__ == "__main__":
    run_script(main)
